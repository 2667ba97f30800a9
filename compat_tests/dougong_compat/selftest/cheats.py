"""Backends that try to pass without being right, or that behave badly. Each must come out FAIL or INVALID, and none may
break the run."""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch

from dougong.plugins import ABI, BackendSpec, KernelSpec, hookimpl
from dougong_compat.selftest.honest import EagerDevice
from dougong_compat.selftest.kernels import EagerKernel

__all__ = ["CHEATS", "BadDevice", "dougong_backends", "dougong_kernels", "verdict_on"]

_HERE = "dougong_compat.selftest.cheats"

#: Name -> what it does.
CHEATS: dict[str, str] = {
    "cheat-zeros": "answers zeros",
    "cheat-nan": "leaves out as it was",
    "cheat-cached": "answers a shape it has seen with the answer it gave then",
    "cheat-first": "answers everything with the first row's answer",
    "cheat-mutates": "changes its inputs so that they fit",
    "cheat-declares-nothing": "declares no capability at all",
    "cheat-skips": "refuses everything that it declares",
    "cheat-raises": "raises whatever it is asked",
    "cheat-lies": "declares a feature that it drops",
    "cheat-detects": "is right where poison tells that it is tested, and sloppy elsewhere",
    "cheat-by-address": "answers memory that it has seen before with the answer it gave then",
    "cheat-skips-itself": "raises the suite's own skip",
    "cheat-patches": "switches the suite's checks off in its worker",
    "bad-segfault": "reads address 0",
    "bad-exit": "ends the process",
    "bad-hang": "never answers",
    "bad-prints": "prints garbage on every stream it finds",
    "bad-lost": "loses its device: all that follows in the process raises",
    "bad-leak": "keeps every tensor it ever made",
}


class _Cheat(EagerKernel):
    def run(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        getattr(self, self.device.name.partition("-")[2].replace("-", "_"), super().run)(
            plan, layer, q, kv, out=out, lse=lse
        )

    _seen: dict[Any, Any] = {}  # noqa: RUF012 - a cheat's memory
    _kept: list[Any] = []  # noqa: RUF012

    @classmethod
    def supports(cls, query: Any, device: Any) -> Any:
        if device.name == "cheat-skips":
            from dougong.hal import Refusal

            return (Refusal("not today"),)
        return super().supports(query, device)

    def honest(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        super().run(plan, layer, q, kv, out=out, lse=lse)

    def zeros(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        out.zero_()
        if lse is not None:
            lse.zero_()

    def nan(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        pass

    def cached(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        key = (tuple(q.shape), tuple(plan.lens))
        if key not in self._seen:
            self.honest(plan, layer, q, kv, out=out, lse=lse)
            self._seen[key] = (out.clone(), None if lse is None else lse.clone())
        kept, kept_lse = self._seen[key]
        if kept.shape == out.shape:
            out.copy_(kept)
            if lse is not None and kept_lse is not None:
                lse.copy_(kept_lse)

    def first(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        self.honest(plan, layer, q, kv, out=out, lse=lse)
        if out.shape[0]:
            out[:] = out[:1].clone()

    def mutates(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        q.zero_()
        self.honest(plan, layer, q, kv, out=out, lse=lse)

    def raises(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        raise NotImplementedError("later")

    def lies(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        object.__setattr__(self.spec, "softcap", None)
        self.honest(plan, layer, q, kv, out=out, lse=lse)

    def detects(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        self.honest(plan, layer, q, kv, out=out, lse=lse)
        if not any(bool(torch.isnan(plane.float()).any()) for plane in kv.planes.values()):
            out.mul_(1 + 2.0**-5)

    def by_address(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        key = (q.data_ptr(), out.data_ptr(), tuple(q.shape))
        if key not in self._seen:
            self.honest(plan, layer, q, kv, out=out, lse=lse)
            self._seen[key] = (out.clone(), None if lse is None else lse.clone())
        out.copy_(self._seen[key][0])

    def skips_itself(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        from dougong_compat.harness.cachemaker import CannotAllocate

        raise CannotAllocate("no memory, honestly")

    def patches(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        from dougong_compat.harness.guard import Fenced, Watch

        Fenced.finding = lambda self, name: ""  # type: ignore[method-assign]
        Watch.findings = lambda self: []  # type: ignore[method-assign]
        self.honest(plan, layer, q, kv, out=out, lse=lse)
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)

    def segfault(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        import ctypes

        ctypes.string_at(0)

    def exit(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        os._exit(7)

    def hang(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        time.sleep(3600)

    def prints(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        for stream in (1, 2):
            os.write(stream, b"\x00\xff{not json}" * 50)
        for number in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
            try:
                if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                    os.write(int(number), b"rubbish on the line that answers take" * 3)
            except OSError:
                continue
        self.honest(plan, layer, q, kv, out=out, lse=lse)

    def lost(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        self.device.gone = True  # type: ignore[attr-defined]
        self.device.synchronize()

    def leak(self, plan: Any, layer: Any, q: Any, kv: Any, *, out: Any, lse: Any = None) -> None:
        self._kept.extend(torch.empty(8) for _ in range(4))
        self.honest(plan, layer, q, kv, out=out, lse=lse)


class BadDevice(EagerDevice):
    """The device of every cheat; which one it is, its opener says."""

    provider = ""
    label = ""
    gone = False

    @property
    def name(self) -> str:
        return self.label

    def synchronize(self) -> None:
        if self.gone:
            raise RuntimeError("an illegal address was encountered")
        super().synchronize()


def _device(label: str) -> type[BadDevice]:
    return type(f"Device_{label.replace('-', '_')}", (BadDevice,), {"label": label})


for _name in CHEATS:
    globals()[f"Device_{_name.replace('-', '_')}"] = _device(_name)


@hookimpl
def dougong_backends() -> Iterable[BackendSpec]:
    for name in CHEATS:
        yield BackendSpec(name=name, abi=ABI, target=f"{_HERE}:Device_{name.replace('-', '_')}", score=-1000)


@hookimpl
def dougong_kernels(device: Any) -> Iterable[KernelSpec]:
    if isinstance(device, BadDevice):
        yield KernelSpec(
            op="attention",
            provider=device.label,
            abi=ABI,
            target=f"{_HERE}:_Cheat",
            priority=10,
            graph="capture",
            features=frozenset({"window", "softcap", "alibi", "sinks", "lse", "noncausal", "dv", "strided"}),
            layouts=("nhd", "hnd"),
        )


_PROBES = (
    "L1/attention/mandatory/decode-h4k1-d64",
    "L1/attention/mandatory/decode-h4k1-d128",
    "L1/attention/mandatory/extend-h4k1-d64",
    "L1/attention/feature/softcap-decode-",
    "L1/attention/length/decode-1b-h8k1-d64",
    "L2/needle/mask/decode-future-h8k2-d128",
    "L2/metamorphic/rows/decode-h4k1-d64",
    "L4/stress/leak/decode",
)
_ALSO = ("L2/metamorphic/paging/decode-h4k1-d64", "L2/plan-reuse/decode-tables-h4k1-d64-write")


def verdict_on(name: str, timeout: float = 6.0) -> tuple[str, str]:
    """(verdict word, why) over a few cases with floors set to their number. The first that fails decides; one more must
    be answered after it (else BROKEN): what a bad backend did must not end the run."""
    from dougong_compat.cases import collect_all, find_case
    from dougong_compat.manifest import Manifest, find
    from dougong_compat.outcome import Outcome, Result
    from dougong_compat.pool import Target, Worker
    from dougong_compat.run import Runner

    cases = [case for case in collect_all(False) if case.id.startswith(_PROBES) or case.id in _ALSO]
    cases = [case for case in cases if "fp16" not in case.id and "bf16" not in case.id]
    target = Target(name, (_HERE,))
    with Worker(target, timeout=timeout) as worker:
        facts = worker.start()
        manifest = find({**facts, "backend": "honest-tiled"}, None, ())
        if name == "cheat-declares-nothing":
            manifest = Manifest(name, {}, frozenset())
        runner = Runner(worker, manifest, datetime.date(2026, 1, 1))
        results: list[Result] = []
        for case in cases:
            results += runner.run([case])
            if results[-1].outcome.bad:
                bad, next_case = results[-1], find_case("L0/device/dtypes")
                assert next_case is not None
                after = runner.run([next_case])[0].outcome
                word = "BROKEN" if after in (Outcome.CRASH, Outcome.TIMEOUT) else "NOT"
                return word, f"{bad.outcome.value} {bad.case_id}: {bad.message}"
    problems = manifest.problems(datetime.date(2026, 1, 1))
    if problems:
        return "INVALID", problems[0]
    executed = sum(1 for result in results if result.outcome.executed)
    if executed < len(cases):
        return "INVALID", f"{executed} of {len(cases)} cases executed"
    return "CONFORMANT", ""
