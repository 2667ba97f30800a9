"""Bugs of masks, positions, windows, chunks and head geometry."""

from __future__ import annotations

from dougong_compat.selftest.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_RE = "L1/regression/"
_CAUSAL = "            hidden = hidden | (distance > 0)\n"
_WINDOW = "            hidden = hidden | (distance.abs() >= spec.window)\n"
_WIDE_K = "        wide = k.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1)\n"
_TILED_POS = "        q_pos = kv_len - q_len + torch.arange(q_len)\n        top ="
_EAGER_POS = "        q_pos = kv_len - q_len + torch.arange(q_len)\n        distance = torch.arange(first, kv_len)"

MUTANTS = [
    Mutant(
        "tail-joins-the-softmax", "honest-tiled", f"{_RE}29-flashinfer-3717-tail-joins-the-softmax/kv17",
        "            width = min(n, kv_len - tile * n)\n", "            width = n if not spec.causal else min(n, kv_len - tile * n)\n", 29,
    ),
    Mutant(
        "empty-prefix-chunk", "honest-split", f"{_RE}31-sglang-22688-empty-chunk-of-a-short-prefix/plain",
        "        q_pos = kv_len - q_len + torch.arange(q_len)\n        outs, lses = [], []\n",
        "        q_pos = max(1 if row else 0, kv_len - q_len) + torch.arange(q_len)\n        outs, lses = [], []\n", 31,
    ),
    Mutant(  # a chunk's context is attended apart, and merged by an LSE to the base of two
        "context-merged-in-base-two", "honest-eager", "L2/regression/30-vllm-26042-mla-chunked-prefill/by16",
        "        lse = torch.logsumexp(s, -1)\n        total = lse\n",
        "        if self.spec.latent and 1 < q_len < kv_len:\n"
        "            context = s[..., : kv_len - q_len]\n"
        "            context = context + (1 / 0.6931471805599453 - 1) * torch.logsumexp(context, -1, keepdim=True)\n"
        "            s = torch.cat((context, s[..., kv_len - q_len :]), -1)\n"
        "        lse = torch.logsumexp(s, -1)\n        total = lse\n", 30,
    ),
    Mutant(
        "prefix-of-one-block", "honest-tiled", f"{_RE}33-sglang-22819-prefix-is-one-block/q7", _TILED_POS,
        "        q_pos = kv_len - q_len + torch.arange(q_len)\n        q_pos = q_pos - n if kv_len - q_len == n else q_pos\n        top =", 33,
    ),
    Mutant(
        "chunk-counted-twice", "honest-eager", "L2/regression/34-vllm-ascend-11508-chunk-counted-twice/three-chunks", _EAGER_POS,
        "        q_pos = kv_len - q_len + torch.arange(q_len)\n        q_pos = q_pos - q_len // 2 if kv_len > 2 * q_len else q_pos\n"
        "        distance = torch.arange(first, kv_len)", 34,
    ),
    Mutant(
        "window-one-more", "honest-eager", f"{_RE}35-transformers-29623-window-off-by-one/w16+1", _WINDOW,
        "            hidden = hidden | (distance.abs() > spec.window)\n", 35,
        also=(("        return min(kv_len, max(0, kv_len - q_len - window + 1))\n", "        return min(kv_len, max(0, kv_len - q_len - window))\n"),),
    ),
    Mutant(
        "window-one-less", "honest-split", f"{_RE}35-transformers-29623-window-off-by-one/w17-q4", _WINDOW,
        "            hidden = hidden | (distance.abs() >= spec.window - 1)\n", 35,
    ),
    Mutant(
        "window-by-blocks", "honest-tiled", f"{_RE}35-transformers-29623-window-off-by-one/w33-q4", _WINDOW,
        "            hidden = hidden | (distance.abs() >= -(-spec.window // 16) * 16)\n", 35,
    ),
    Mutant(
        "window-ignored", "honest-eager", f"{_RE}36-sglang-26516-window-ignored/d64-q1", _WINDOW, "            pass\n", 36,
        also=(("        if window is None:\n            return 0\n", "        return 0\n"),),
    ),
    Mutant(
        "window-ignored-below-64", "honest-tiled", f"{_RE}36-sglang-26516-window-ignored/d32-q1",
        "        if spec.window is not None:\n            hidden", "        if spec.window is not None and spec.head_dim >= 64:\n            hidden", 36,
    ),
    Mutant(
        "deadlock-on-crossing", "honest-split", f"{_RE}37-flashinfer-3682-fp8-window-deadlock/kv300",
        "        first = self.first_key(q_len, kv_len)\n        for begin",
        "        first = self.first_key(q_len, kv_len)\n        while spec.window and spec.kv_dtype != spec.dtype and kv_len > 256:\n"
        "            torch.zeros(1)\n        for begin", 37,
    ),
    Mutant(
        "finite-sentinel", "honest-tiled", f"{_RE}38-flashinfer-4401-finite-sentinel/fp32-q6",
        "        top = q.new_full((q_len, H), NEG)\n", "        top = q.new_full((q_len, H), -5.0e4)\n", 38,
    ),
    Mutant(
        "mask-of-the-first-row", "honest-split", f"{_RE}39-llama-cpp-14505-mask-broadcast/rows-differ",
        "        q_pos = kv_len - q_len + torch.arange(q_len)\n        outs, lses = [], []\n",
        "        q_pos = plan.lens[0] - q_len + torch.arange(q_len)\n        outs, lses = [], []\n", 39,
    ),
    Mutant(
        "no-mask-in-decode", "honest-eager", f"{_RE}40-vllm-ascend-12605-no-mask-in-decode/draft2", _CAUSAL,
        "            hidden = hidden | (distance > 0) if distance.shape[0] > 4 else hidden\n", 40,
    ),
    Mutant("no-causal-mask", "honest-split", "L2/needle/mask/prefill-future-h8k2-d128", _CAUSAL, "            pass\n"),
    Mutant(
        "causal-strict", "honest-eager", "L1/attention/mandatory/prefill-h4k1-d64", _CAUSAL,
        "            hidden = hidden | (distance >= 0)\n",
    ),
    Mutant(
        "top-left-causal", "honest-tiled", "L2/needle/mask/extend-future-h8k2-d128", _TILED_POS,
        "        q_pos = torch.arange(q_len)\n        top =",
    ),
    Mutant(
        "group-padded-to-a-power-of-two", "honest-eager", f"{_RE}41-flashinfer-1614-group-of-seven/7over1-decode", _WIDE_K,
        "        group = spec.num_heads // spec.num_kv_heads\n        padded = 1 << (group - 1).bit_length()\n"
        "        heads = torch.arange(spec.num_heads) // padded\n        wide = k[:, heads]\n"
        "        if group != padded:\n            wide = wide.clone()\n            wide[:, group - 1 :: group] = 0\n", 41,
    ),
    Mutant(
        "heads-interleaved", "honest-tiled", "L2/needle/mask/decode-future-h8k2-d128", _WIDE_K,
        "        wide = k.repeat(1, spec.num_heads // spec.num_kv_heads, 1)\n",
    ),
    Mutant(
        "slope-offset", "honest-split", f"{_RE}42-llama-cpp-20031-odd-dims-and-48-slopes/alibi48",
        "            s = s + layer.slopes[None, :, None] * distance[:, None, :]\n",
        "            s = s + layer.slopes[torch.arange(spec.num_heads) % 32][None, :, None] * distance[:, None, :]\n", 42,
    ),
    Mutant(
        "odd-dims-cut", "honest-tiled", f"{_RE}42-llama-cpp-20031-odd-dims-and-48-slopes/d72",
        "        s = torch.einsum(\"qhd,shd->qhs\", q, wide) * scale\n",
        "        cut = spec.head_dim // 16 * 16\n        s = torch.einsum(\"qhd,shd->qhs\", q[..., :cut], wide[..., :cut]) * scale\n", 42,
    ),
    Mutant(
        "block-above-512", "honest-tiled", f"{_RE}43-vllm-metal-292-heads-and-block-544/block544-mean",
        "            width = min(n, kv_len - tile * n)\n", "            width = min(n, 512, kv_len - tile * n)\n", 43,
    ),
    Mutant(
        "empty-row-divides", "honest-eager", f"{_RE}44-fa-2470-zero-lengths/no-keys",
        "        if kv_len == first:\n", "        if kv_len == first and False:\n", 44,
        also=(("        return self.values(weights, v), lse\n\n\nclass TiledKernel", "        return self.values(weights, v) / (total > NEG)[..., None], lse\n\n\nclass TiledKernel"),),
    ),
    Mutant(
        "empty-rows-unwritten", "honest-split", f"{_RE}27-flashinfer-1533-empty-rows-unwritten/decode",
        "            if start == stop:\n", "            if start == stop or plan.lens[row] == 0:\n", 27,
    ),
    Mutant(
        "max-q-len-of-the-first", "honest-tiled", f"{_RE}45-flashinfer-1930-max-q-len/uneven",
        "            out[start:stop] = got.to(out.dtype)\n",
        "            longest = max(2, plan.cu[1] - plan.cu[0]) * 4\n            out[start : min(stop, start + longest)] = got[:longest].to(out.dtype)\n", 45,
    ),
    Mutant(
        "writes-past-out", "honest-eager", "L1/attention/mandatory/decode-h4k1-d64",
        "            out[start:stop] = got.to(out.dtype)\n",
        "            out[start:stop] = got.to(out.dtype)\n"
        "            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)\n",
    ),
    Mutant(
        "scales-q-in-place", "honest-split", "L1/attention/mandatory/extend-h4k1-d64",
        "        scale = self.spec.scale\n", "        q.mul_(self.spec.scale)\n        scale = 1.0\n",
    ),
]  # fmt: skip
