"""sgl-kernel-xpu: its attention operator by its schema, and the function that users call."""

from __future__ import annotations

from typing import Any

import torch

from dougong_xpu.twin.refusal import require

__all__ = ["MODULES", "register"]

_FWD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? q_v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q,"
    " int max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos,"
    " Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale,"
    " float softmax_scale, Tensor? sinks, bool is_causal, int window_size_left, int window_size_right, float softcap,"
    " bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_kv_splits, bool? pack_gqa, int sm_margin,"
    " Tensor(a!)? out=None) -> (Tensor(a!), Tensor, Tensor, Tensor)"
)
_HEAD_DIMS = (64, 96, 128, 192, 256, 512)


def register() -> list[torch.library.Library]:
    library = torch.library.Library("sgl_kernel", "DEF")
    library.define(_FWD)
    for key in ("PrivateUse1", "CPU"):
        library.impl("fwd", _fwd, key)
    library.impl("fwd", _check, "Meta")
    return [library]


def _check(
    q: Any, k: Any, v: Any, q_v: Any, cu_q: Any, lengths: Any, max_q: int, max_k: int, table: Any, batch: Any, pad: Any,
    cos: Any, sin: Any, rotary: Any, q_descale: Any, k_descale: Any, v_descale: Any, scale: float, sinks: Any,
    causal: bool, left: int, right: int, softcap: float, interleaved: bool, metadata: Any, splits: int, pack: Any,
    margin: int, out: Any = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Every rule that needs no data; gives the outputs as the shape function does."""

    def need(holds: bool, rule: str) -> None:
        require(holds, "fwd", rule)

    need(q.dtype in (torch.float16, torch.bfloat16), f"only Half and BFloat16, got {q.dtype}")
    need(k.dtype == v.dtype == q.dtype, "query, key and value must have the same dtype")
    need(all(x.stride(-1) == 1 for x in (q, k, v)), "contiguous last dimensions")
    need(table is not None and table.dtype == torch.int32 and table.stride(-1) == 1, "page_table: contiguous int32")
    need(q.dim() == 3 and k.dim() == 4, "ragged queries over pages")
    for name, x in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", lengths)):
        need(x.dtype == torch.int32 and x.is_contiguous() and x.device == q.device, f"{name}: contiguous int32")
    need(table.shape[0] == lengths.shape[0] == cu_q.shape[0] - 1, "one table row and length per sequence")
    need(q.shape[1] % k.shape[2] == 0 and q.shape[1] // k.shape[2] <= 16, "at most 16 query heads per kv head")
    need(q.shape[2] in _HEAD_DIMS and k.shape[3] == q.shape[2], f"head size {q.shape[2]}")
    need(k.shape[1] in (64, 128), f"page size {k.shape[1]}: 64 or 128")
    need(sinks is None or q.shape[2] == 64, "sinks for a head size of 64 only")
    given = (q_v, batch, pad, cos, sin, rotary, q_descale, metadata)
    need(all(x is None for x in given) and not softcap, "what this backend never passes")
    if out is None:
        out = q.new_empty((*q.shape[:2], v.shape[-1]))
    need(out.shape == (*q.shape[:2], v.shape[-1]) and out.dtype == q.dtype and out.stride(-1) == 1, "out")
    return (out, *(q.new_empty(0, dtype=torch.float32) for _ in range(3)))


def _fwd(*args: Any) -> tuple[torch.Tensor, ...]:
    found = _check(*args)
    q, k, v, _, cu_q, lengths, max_q, max_k, table = args[:9]
    scale, sinks, causal, left, right = args[17:22]
    require(sinks is None, "fwd", "sinks are not modelled")
    torch.ops.dougong_xpu_twin.attend(
        q, k, v, cu_q, None, lengths, table, max_q, max_k, scale, causal, left, right, None, None, False, found[0]
    )
    return found


def flash_attn_with_kvcache(
    q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, qv: Any = None, rotary_cos: Any = None,
    rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None,
    page_table: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None, max_seqlen_q: int = 0,
    max_seqlen_k: int = 0, rotary_seqlens: Any = None, q_descale: Any = None, k_descale: Any = None,
    v_descale: Any = None, softmax_scale: float | None = None, sinks: Any = None, causal: bool = False,
    window_size: Any = (-1, -1), softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Any = None,
    num_splits: int = 0, pack_gqa: Any = None, sm_margin: int = 0, return_softmax_lse: bool = False, out: Any = None,
) -> Any:  # fmt: skip
    """The library's function."""
    require(k is None and v is None and cu_seqlens_k_new is None, "flash_attn_with_kvcache", "new keys: not modelled")
    found = torch.ops.sgl_kernel.fwd(
        q, k_cache, v_cache, qv, cu_seqlens_q, cache_seqlens, max_seqlen_q, max_seqlen_k, page_table, cache_batch_idx,
        cache_leftpad, rotary_cos, rotary_sin, rotary_seqlens, q_descale, k_descale, v_descale,
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, sinks, causal, *window_size, softcap,
        rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin, out,
    )  # fmt: skip
    return found if return_softmax_lse else found[0]


MODULES: dict[str, dict[str, Any]] = {
    "sgl_kernel": {},
    "sgl_kernel.flash_attn": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
}
