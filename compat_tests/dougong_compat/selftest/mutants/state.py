"""State that outlives a call, graph replay, batch invariance, and the block manager."""

from __future__ import annotations

from dougong_compat.selftest.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_RE = "L4/regression/"
_LENS = "        into.lens = view.kv_len.tolist()\n"
_TABLE = "        into.table = view.block_table\n"
_COPY = "        self.kept.append(lambda: torch.Tensor.copy_(target, source))\n"

MUTANTS = [
    Mutant(
        "replay-stale-lengths", "honest-tiled", f"{_RE}58-vllm-ascend-10895-stale-length-in-replay/longer", _LENS,
        "        into.lens = getattr(into, \"lens\", None) or view.kv_len.tolist()\n", 58,
    ),
    Mutant(
        "replay-lengths-at-capture", "honest-eager", f"{_RE}58-vllm-ascend-10895-stale-length-in-replay/swapped",
        "        HostGraph.launch(partial(self._run, plan, layer, q, kv, out, lse))\n",
        "        import copy\n\n        HostGraph.launch(partial(self._run, copy.copy(plan) if HostGraph.current else plan, layer, q, kv, out, lse))\n", 58,
    ),
    Mutant(
        "replay-stale-slots", "honest-split", f"{_RE}28-vllm-ascend-11774-stale-slots-in-a-capture/slots",
        "        HostGraph.launch(partial(self._write, layer, k, v, cache, slots))\n",
        "        HostGraph.launch(partial(self._write, layer, k, v, cache, slots.clone()))\n", 28,
    ),
    Mutant(
        "replay-padding-length", "honest-tiled", f"{_RE}28-vllm-ascend-11774-stale-slots-in-a-capture/padding", _LENS,
        "        into.lens = [max(1, n) for n in view.kv_len.tolist()]\n", 28,
    ),
    Mutant(
        "workspace-not-reset", "honest-split", "L2/regression/59-fa-1a58058a-semaphore-not-reset/big-then-small",
        "        lse = torch.logsumexp(lses, 0)\n",
        "        old = _LEFT.get(id(self), 0)\n        _LEFT[id(self)] = len(lses)\n"
        "        if old > len(lses):\n            outs = torch.cat((outs, 0 * outs[:1]))\n            lses = torch.cat((lses, lses[:1]))\n"
        "        lse = torch.logsumexp(lses, 0)\n", 59,
        also=(("NEG = float(\"-inf\")\n", "NEG = float(\"-inf\")\n_LEFT: dict = {}\n"),),
    ),
    Mutant(
        "table-bound-once", "honest-tiled", f"{_RE}60-vllm-ascend-8508-window-and-new-table/tables", _TABLE,
        "        into.table = getattr(into, \"table\", None) if hasattr(into, \"table\") else view.block_table.clone()\n", 60,
    ),
    Mutant(
        "window-start-kept", "honest-tiled", "L2/regression/60-vllm-ascend-8508-window-and-new-table/eager",
        "        first = self.first_key(q_len, kv_len) // n\n        last",
        "        first = plan.__dict__.setdefault(\"first\", {}).setdefault(row, self.first_key(q_len, kv_len) // n)\n        last", 60,
    ),
    Mutant(
        "batch-dependent-split", "honest-split", f"{_RE}70-vllm-53257-not-batch-invariant/decode-float32",
        "        for begin in range(first, kv_len, self.part):\n            end = min(kv_len, begin + self.part)\n",
        "        part = 16 * plan.batch.num_rows\n        for begin in range(first, kv_len, part):\n            end = min(kv_len, begin + part)\n", 70,
    ),
    Mutant(
        "nondeterministic-order", "honest-split", f"{_RE}63-llama-cpp-17887-shared-memory-race/split-float32",
        "        lse = torch.logsumexp(lses, 0)\n",
        "        order = torch.randperm(len(lses))\n        outs, lses = outs[order], lses[order]\n        lse = torch.logsumexp(lses, 0)\n", 63,
    ),
    Mutant(
        "race-drops-a-part", "honest-split", "L2/regression/63-llama-cpp-17887-shared-memory-race/twice",
        "        lse = torch.logsumexp(lses, 0)\n",
        "        _RUNS.append(1)\n        if len(_RUNS) % 3 == 0 and len(lses) > 1:\n            outs, lses = outs[1:], lses[1:]\n"
        "        lse = torch.logsumexp(lses, 0)\n", 63,
        also=(("NEG = float(\"-inf\")\n", "NEG = float(\"-inf\")\n_RUNS: list = []\n"),),
    ),
    Mutant(
        "copy-out-before-compute", "honest-late", "L0/regression/61-vllm-45704-copy-before-compute/copy-out", _COPY,
        "        if not self.owns(target):\n            torch.Tensor.copy_(target, source)\n            return\n" + _COPY, 61,
        file="late.py",
    ),
    Mutant(
        "side-stream-does-not-wait", "honest-late", "L0/regression/61-vllm-45704-copy-before-compute/copy-out",
        "        self.queue.side.append(event.synchronize)\n", "        pass\n", 61, file="late.py",
    ),
    Mutant(
        "compute-before-copy-in", "honest-late", "L0/regression/61-vllm-45704-copy-before-compute/copy-in",
        "        if mine:\n            self.finish(len(self.kept))\n",
        "        if mine:\n            copies = [call for call in self.kept if call.__qualname__.startswith(\"LateQueue.copy\")]\n"
        "            self.kept = [call for call in self.kept if call not in copies]\n"
        "            self.finish(len(self.kept))\n            self.kept = copies\n", 61,
        file="late.py",
    ),
    Mutant(  # recorded on a stream that the copy is not on
        "event-of-another-stream", "honest-late", "L0/regression/62-tensorrt-llm-15546-pinned-buffer-reused/event",
        "        self.before = list(self.queue.kept)\n", "        self.before = []\n", 62, file="late.py",
    ),
    Mutant(
        "second-plan-overwrites", "honest-eager", "L4/stress/two-plans/decode-h8k2-d64",
        "        return HostPlan()\n", "        self._plan = getattr(self, \"_plan\", None) or HostPlan()\n        return self._plan\n",
    ),
    Mutant("freed-while-held", "honest-eager", "L2/regression/64-vllm-45357-freed-in-flight/held_until_released", manager="free_early", entry=64),
    Mutant("release-twice", "honest-eager", "L2/manager/scene/held-until-released", manager="double_release", entry=64),
    Mutant("tag-before-computed", "honest-eager", "L2/regression/65-sglang-38319-insert-against-retract/insert_then_preempt", manager="tag_early", entry=65),
    Mutant("no-copy-on-write", "honest-eager", "L2/regression/66-vllm-17362-copy-blocks-layout/cow", manager="no_cow", entry=66),
    Mutant("key-without-adapter", "honest-eager", "L2/regression/67-vllm-30931-prefix-key-collisions/adapter", manager="no_adapter", entry=67),
    Mutant("key-without-salt", "honest-eager", "L2/regression/67-vllm-30931-prefix-key-collisions/salt", manager="no_salt", entry=67),
    Mutant("key-without-image", "honest-eager", "L2/regression/67-vllm-30931-prefix-key-collisions/image", manager="no_image", entry=67),
    Mutant("key-without-parent", "honest-eager", "L2/regression/67-vllm-30931-prefix-key-collisions/parent", manager="no_parent", entry=67),
    Mutant("hit-covers-the-last-token", "honest-eager", "L2/regression/68-lmcache-2206-partial-chunk/33", manager="long_hit", entry=68),
    Mutant("window-frees-too-early", "honest-eager", "L2/manager/window/n4-w2", manager="window_early"),
    Mutant("window-never-frees", "honest-eager", "L2/manager/window/n4-w16", manager="window_never"),
    Mutant("resume-counts-twice", "honest-eager", "L2/regression/69-vllm-ascend-11334-resumed-is-not-a-prompt/release-and-begin", manager="grow_extra", entry=69),
    Mutant("hybrid-hit-of-one-group", "honest-eager", "L2/regression/68-lmcache-2206-partial-chunk/hybrid", manager="hybrid_one", entry=68),
    Mutant("leaks-a-block", "honest-eager", "L2/manager/walk/plain-cached-00", manager="leak"),
]  # fmt: skip
