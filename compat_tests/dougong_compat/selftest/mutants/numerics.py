"""Features dropped, reductions and numbers."""

from __future__ import annotations

from dougong_compat.selftest.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_RE = "L1/regression/"
_LSE_CASE = "L1/attention/feature/lse-decode-h6k2-d64-lse"
_EAGER_END = "        return self.values(weights, v), lse\n\n\nclass TiledKernel"
_CAP = "            s = spec.softcap * torch.tanh(s / spec.softcap)\n"
_K_SCALE = "            k = k * layer.k_scale\n"
_V_SCALE = "            v = v * layer.v_scale\n"

MUTANTS = [
    Mutant("softcap-dropped", "honest-tiled", f"{_RE}46-sglang-33915-softcap-dropped/cap3-q1", _CAP, "            pass\n", 46),
    Mutant("softcap-forgets-the-factor", "honest-eager", f"{_RE}46-sglang-33915-softcap-dropped/cap50-q6", _CAP, "            s = torch.tanh(s / spec.softcap)\n", 46),
    Mutant(
        "alibi-dropped", "honest-split", f"{_RE}47-vllm-57614-alibi-and-page-32/n32-q1",
        "            s = s + layer.slopes[None, :, None] * distance[:, None, :]\n", "            pass\n", 47,
    ),
    Mutant(
        "alibi-absolute", "honest-eager", "L1/attention/feature/softcap_alibi-extend-h6k2-d64-cap5.0-alibi-lse",
        "            s = s + layer.slopes[None, :, None] * distance[:, None, :]\n",
        "            s = s + layer.slopes[None, :, None] * (distance + distance.shape[1])[:, None, :]\n", 47,
    ),
    Mutant(
        "sink-once-per-split", "honest-split", f"{_RE}48-rocm-libraries-12227-sink-per-split/split",
        "            total = torch.logaddexp(lse, layer.sinks.float()[None, :])\n        share",
        "            total = torch.logaddexp(lse, layer.sinks.float()[None, :] + math.log(outs.shape[0]))\n        share", 48,
        also=(("NEG = float(\"-inf\")\n", "import math\n\nNEG = float(\"-inf\")\n"),),
    ),
    Mutant(
        "sink-in-the-lse", "honest-eager", f"{_RE}48-rocm-libraries-12227-sink-per-split/decode",
        _EAGER_END, "        return self.values(weights, v), total\n\n\nclass TiledKernel", 48,
    ),
    Mutant(
        "sinks-unreachable", "honest-tiled", f"{_RE}48-rocm-libraries-12227-sink-per-split/extend",
        "        if layer.sinks is not None:\n            total, acc", "        if layer.sinks is not None and q_len == 1:\n            total, acc", 48,
    ),
    Mutant(
        "stale-scale", "honest-eager", "L2/regression/49-flashinfer-4014-stale-scale/q1",
        "        scale = self.spec.scale\n",
        "        key = (self.spec.num_heads, self.spec.head_dim, self.spec.dtype)\n        scale = _CACHE.setdefault(key, self.spec.scale)\n", 49,
        also=(("NEG = float(\"-inf\")\n", "NEG = float(\"-inf\")\n_CACHE: dict = {}\n"),),
    ),
    Mutant("k-scale-dropped", "honest-tiled", f"{_RE}50-vllm-42580-descale-dropped/k0.25-v1-q1", _K_SCALE, "            pass\n", 50),
    Mutant("v-scale-dropped", "honest-split", f"{_RE}50-vllm-42580-descale-dropped/k1-v3-q6", _V_SCALE, "            pass\n", 50),
    Mutant(
        "scale-on-a-plain-cache", "honest-eager", f"{_RE}50-vllm-42580-descale-dropped/unscaled-bfloat16",
        "        if self.spec.kv_dtype != self.spec.dtype:\n", "        if True:\n", 50,
    ),
    Mutant(
        "fnuz-for-fn", "honest-split", f"{_RE}51-aiter-4051-fn-is-not-fnuz/read",
        "        k, v = k.float(), v.float()\n        if self.spec",
        "        k, v = k.float().clamp(-240, 240), v.float().clamp(-240, 240)\n        if self.spec", 51,
    ),
    Mutant(
        "fp8-wraps-instead-of-saturating", "honest-tiled", f"{_RE}51-aiter-4051-fn-is-not-fnuz/write",
        "        return x.clamp(-top, top).to(dtype)\n", "        return torch.where(x.abs() > top, 0 * x, x).to(dtype)\n", 51,
    ),
    Mutant(
        "int8-truncates", "honest-eager", "L1/write/scale/x1-h4k2-kv-int8-d64-ks0.05-vs0.11",
        "            return x.round().clamp(-127, 127).to(dtype)\n", "            return x.clamp(-127, 127).to(dtype)\n", 52,
    ),
    Mutant(
        "int8-odd-heads", "honest-split", f"{_RE}52-openvino-29100-int8-odd-heads/d72",
        "        k, v = k.float(), v.float()\n        if self.spec",
        "        k, v = k.float(), v.float()\n        if self.spec.kv_dtype == torch.int8 and k.shape[-1] % 16:\n"
        "            k = k.clone()\n            k[..., k.shape[-1] // 16 * 16 :] = 0\n        if self.spec", 52,
    ),
    Mutant(
        "merge-both-empty-nan", "honest-eager", f"{_RE}53-fa-26d7d92f-both-parts-empty/merge-both",
        "    base = torch.where(lse == NEG, 0.0, lse)\n", "    base = lse\n", 53,
        also=(("    part_a = torch.where(share_a > 0, out_a.float() * share_a, 0.0)\n", "    part_a = torch.nan_to_num(out_a.float()) * share_a\n"),),
    ),
    Mutant(
        "merge-multiplies-the-empty-part", "honest-tiled", f"{_RE}53-fa-26d7d92f-both-parts-empty/merge-a",
        "    part_a = torch.where(share_a > 0, out_a.float() * share_a, 0.0)\n", "    part_a = out_a.float() * share_a\n", 53,
    ),
    Mutant(
        "merge-base-two", "honest-split", "L1/op/merge_lse/t6-h3-d64-none-own",
        "    share_a = torch.exp(lse_a - base)[..., None]\n", "    share_a = torch.exp2(lse_a - base)[..., None]\n",
    ),
    Mutant(
        "merge-ignores-strides", "honest-split", f"{_RE}32-local-inference-lab-vllm-17-merge-strides/b",
        "    part_b = torch.where(share_b > 0, out_b.float() * share_b, 0.0)\n",
        "    out_b = out_b.as_strided(out_a.shape, (out_b.shape[1] * out_b.shape[2], out_b.shape[2], 1), out_b.storage_offset())\n"
        "    part_b = torch.where(share_b > 0, out_b.float() * share_b, 0.0)\n", 32,
    ),
    Mutant(
        "lse-heads-swapped", "honest-tiled", f"{_RE}54-vllm-fa-87-lse-layout/8over2-q1",
        "                lse[start:stop] = got_lse\n",
        "                lse[start:stop] = got_lse.reshape(stop - start, self.spec.num_kv_heads, -1).transpose(1, 2).reshape(stop - start, -1)\n", 54,
    ),
    Mutant(
        "lse-base-two", "honest-eager", "L1/attention/feature/lse-decode-h6k2-d64-lse",
        "                lse[start:stop] = got_lse\n", "                lse[start:stop] = got_lse * 1.4426950408889634\n", 54,
    ),
    # out is right in these three: only the rule for the LSE can see them
    Mutant("lse-in-half", "honest-tiled", _LSE_CASE, "                lse[start:stop] = got_lse\n", "                lse[start:stop] = got_lse.half()\n"),
    Mutant(
        "lse-of-half-scores", "honest-eager", _LSE_CASE, _EAGER_END,
        "        return self.values(weights, v), torch.logsumexp(s.half().float(), -1)\n\n\nclass TiledKernel",
    ),
    Mutant(
        "lse-of-tf32-products", "honest-eager", _LSE_CASE, _EAGER_END,
        "        q, k = (((x.contiguous().view(torch.int32) + 4096) & -8192).view(torch.float32) for x in (q, k))\n"
        "        return self.values(weights, v), torch.logsumexp(self.scores(layer, q, k, distance, scale), -1)\n\n\nclass TiledKernel",
    ),
    Mutant(
        "empty-split-merged", "honest-split", f"{_RE}55-aiter-4711-empty-split/129-257-513",
        "        lse = torch.logsumexp(lses, 0)\n",
        "        lses = torch.cat((lses, torch.zeros_like(lses[:1])))\n        outs = torch.cat((outs, torch.zeros_like(outs[:1])))\n"
        "        lse = torch.logsumexp(lses, 0)\n", 55,
    ),
    Mutant(
        "half-accumulator", "honest-tiled", f"{_RE}56-llama-cpp-17746-fp16-accumulator/v-q1",
        "            acc = acc * shrink[..., None] + self.values(weights, v)\n",
        "            acc = (acc * shrink[..., None] + self.values(weights, v)).half().float()\n", 56,
    ),
    Mutant(
        "half-scores", "honest-eager", f"{_RE}56-llama-cpp-17746-fp16-accumulator/qk-q6",
        "        s = torch.einsum(\"qhd,shd->qhs\", q, wide) * scale\n",
        "        s = torch.einsum(\"qhd,shd->qhs\", q, wide).half().float() * scale\n", 56,
    ),
    Mutant(
        "short-fp8-tail-nan", "honest-tiled", f"{_RE}57-aiter-2106-fp8-short-tail/tail3",
        "            distance = tile * n + torch.arange(width)[None, :] - q_pos[:, None]\n",
        "            distance = tile * n + torch.arange(width)[None, :] - q_pos[:, None]\n"
        "            if width < 4 and spec.kv_dtype != spec.dtype:\n                k = k * float(\"nan\")\n", 57,
    ),
    Mutant(
        "no-rescale-of-the-sum", "honest-tiled", "L1/attention/mandatory/long-h4k1-d64",
        "            total = total * shrink + weights.sum(-1)\n", "            total = total + weights.sum(-1)\n",
    ),
    Mutant(
        "running-maximum-forgotten", "honest-tiled", "L1/attention/mandatory/longextend-h4k1-d64",
        "            top = new_top\n", "            pass\n",
    ),
    Mutant(
        "weights-in-bfloat16", "honest-eager", "L1/attention/mandatory/long-h8k1-d64",
        _EAGER_END,
        "        return self.values(weights.bfloat16().float(), v), lse\n\n\nclass TiledKernel",
    ),
    Mutant(
        "maximum-plus-a-constant", "honest-tiled", "",
        "            safe = torch.where(new_top == NEG, 0.0, new_top)\n", "            safe = torch.where(new_top == NEG, 1.0, new_top)\n",
        equivalent="where nothing was seen yet every weight is exp(-inf) = 0 whatever is subtracted, so the stand-in "
        "for the maximum never meets a finite number",
    ),
]  # fmt: skip
