"""vllm-xpu-kernels: its two operators by their schemas, and the function that users call."""

from __future__ import annotations

from typing import Any

import torch

from dougong_xpu.twin.refusal import require

__all__ = ["MODULES", "register"]

_FWD = (
    "varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor(a!)? out, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, Tensor? alibi_slopes, int max_seqlen_q,"
    " int max_seqlen_k, float p_dropout, Tensor? k_scale, Tensor? v_scale, float softmax_scale, Tensor? softmax_sink,"
    " bool zero_tensors, bool is_causal, int window_size_left, int window_size_right, float softcap,"
    " bool return_softmax, Generator? gen, int? num_splits, bool mix_batch, Tensor? splits_per_seq,"
    " Tensor? work_list) -> Tensor[]"
)
_STORE = (
    "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()"
)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_HEAD_DIMS = (64, 96, 128, 192, 256, 512)


def register() -> list[torch.library.Library]:
    attention, cache = torch.library.Library("_vllm_fa2_C", "DEF"), torch.library.Library("_C_cache_ops", "DEF")
    attention.define(_FWD)
    cache.define(_STORE)
    for key in ("PrivateUse1", "CPU"):
        attention.impl("varlen_fwd", _varlen_fwd, key)
        cache.impl("reshape_and_cache_flash", _store, key)
    attention.impl("varlen_fwd", _check, "Meta")
    cache.impl("reshape_and_cache_flash", _check_store, "Meta")
    return [attention, cache]


def _check(
    q: Any, k: Any, v: Any, out: Any, cu_q: Any, cu_k: Any, used: Any, leftpad: Any, table: Any, alibi: Any, max_q: int,
    max_k: int, dropout: float, k_scale: Any, v_scale: Any, scale: float, sink: Any, zero: bool, causal: bool,
    left: int, right: int, softcap: float, return_softmax: bool, gen: Any, splits: Any, mix: bool, per_seq: Any,
    work: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """Every rule that needs no data; gives the outputs as the shape function does."""

    def need(holds: bool, rule: str) -> None:
        require(holds, "varlen_fwd", rule)

    need(q.dtype in (torch.float16, torch.bfloat16), f"queries in {q.dtype}: fp16 and bf16 only")
    need(k.dtype == v.dtype, "key and value must have the same dtype")
    need(k.dtype == q.dtype or k.dtype in _FP8, f"a cache in {k.dtype} under queries in {q.dtype}")
    need(q.dim() == 3, "query must be in ragged format")
    for name, x in (("q", q), ("k", k), ("v", v)):
        need(x.device == q.device and x.stride(-1) == 1, f"{name}: the queries' device, contiguous last dimension")
        aligned = all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1])
        need(aligned, f"{name}: strides {tuple(x.stride())} are no multiples of 16 bytes")
    for name, x in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        need(x.dtype == torch.int32 and x.is_contiguous() and x.device == q.device, f"{name}: contiguous int32")
    need(q.shape[1] % k.shape[-2] == 0, "a whole number of query heads per kv head")
    need(q.shape[2] in _HEAD_DIMS and k.shape[-1] == q.shape[2], f"head size {q.shape[2]}: no kernel was compiled")
    if table is not None:
        need(table.dtype == torch.int32 and table.stride(-1) == 1, "page_table must be int32, rows contiguous")
        need(used is not None and used.dtype == torch.int32, "seqused_k must be int32")
        need(table.shape[0] == used.shape[0] == cu_q.shape[0] - 1, "one table row and length per sequence")
        need(k.dim() == 4 and k.shape[1] % 64 == 0, f"pages of {k.shape[1] if k.dim() == 4 else '?'}: multiples of 64")
        need(all(x.stride(0) % x.stride(1) == 0 for x in (k, v)), "page stride must be divisible by sequence stride")
    else:
        need(k.dim() == 3 and cu_k.shape == cu_q.shape, "dense keys with their own prefix sums")
    if k.dtype in _FP8:
        for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
            need(x is not None and x.dtype == torch.float32, f"fp8: {name} must be a float32 tensor")
    need(alibi is None and not softcap and dropout == 0, "the kernels leave ALiBi, softcap and dropout out")
    need(sink is None or sink.dtype == q.dtype, "a sink in the queries' dtype")
    if out is None:
        out = q.new_empty((*q.shape[:2], v.shape[-1]))
    need(out.shape == (*q.shape[:2], v.shape[-1]) and out.dtype == q.dtype and out.stride(-1) == 1, "out")
    return [out, q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)]


def _varlen_fwd(*args: Any) -> list[torch.Tensor]:
    found = _check(*args)
    (q, k, v, _, cu_q, cu_k, used, _, table, _, max_q, max_k, _, k_scale, v_scale, scale, sink, _, causal, left,
     right) = args[:21]  # fmt: skip
    require(sink is None and not args[22], "varlen_fwd", "sinks and LSE are not modelled")
    narrow = k.dtype in _FP8
    torch.ops.dougong_xpu_twin.attend(
        q, k, v, cu_q, None if table is not None else cu_k, used, table, max_q, max_k, scale, causal, left, right,
        k_scale if narrow else None, v_scale if narrow else None, False, found[0],
    )  # fmt: skip
    return found


def _check_store(
    key: Any, value: Any, k_cache: Any, v_cache: Any, slots: Any, kind: str, k_scale: Any, v_scale: Any
) -> None:
    def need(holds: bool, rule: str) -> None:
        require(holds, "reshape_and_cache_flash", rule)

    need(key.dim() == value.dim() == 3 and k_cache.dim() == 4, "key [T, K, D] and a cache [blocks, N, K, D]")
    need(slots.dtype == torch.int64 and slots.is_contiguous(), "slot_mapping must be int64")
    need(kind in ("auto", "fp8", "fp8_e4m3", "fp8_e5m2"), f"kv_cache_dtype {kind!r}")
    need((kind == "auto") == (k_cache.dtype == key.dtype), f"kv_cache_dtype {kind!r} for a cache in {k_cache.dtype}")
    need(k_scale.dtype == v_scale.dtype == torch.float32, "scales are float32 tensors")
    need(key.stride(-1) == value.stride(-1) == 1 and key.stride(1) == key.shape[2], "heads of a token lie together")


def _store(*args: Any) -> None:
    _check_store(*args)
    key, value, k_cache, v_cache, slots, kind, k_scale, v_scale = args
    scales = (None, None) if kind == "auto" else (k_scale, v_scale)
    torch.ops.dougong_xpu_twin.store(key, value, k_cache, v_cache, slots, *scales, False)


def flash_attn_varlen_func(
    q: Any, k: Any, v: Any, max_seqlen_q: int, cu_seqlens_q: Any, max_seqlen_k: int, cu_seqlens_k: Any = None,
    seqused_k: Any = None, q_v: Any = None, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: Any = None, softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
    return_softmax_lse: bool = False, out: Any = None, scheduler_metadata: Any = None, q_descale: Any = None,
    k_descale: Any = None, v_descale: Any = None, num_splits: int = 0, fa_version: int = 2, s_aux: Any = None,
    num_splits_kv: int | None = None, is_mix_batch: bool = True, host_kv_lens: Any = None,
) -> Any:  # fmt: skip
    """The library's function; which arguments exclude one another is the library's."""
    require((cu_seqlens_k is None) != (seqused_k is None), "flash_attn_varlen_func", "one of cu_seqlens_k, seqused_k")
    require(block_table is None or seqused_k is not None, "flash_attn_varlen_func", "block_table needs seqused_k")
    left, right = (-1, -1) if window_size is None else window_size
    found = torch.ops._vllm_fa2_C.varlen_fwd(
        q, k, v, out, cu_seqlens_q, torch.empty_like(cu_seqlens_q) if cu_seqlens_k is None else cu_seqlens_k,
        seqused_k, None, block_table, alibi_slopes, max_seqlen_q, max_seqlen_k, dropout_p, k_descale, v_descale,
        q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale, s_aux, False, causal, left, right, softcap,
        return_softmax_lse, None, num_splits_kv, is_mix_batch, None, None,
    )  # fmt: skip
    return (found[0], found[1]) if return_softmax_lse else found[0]


MODULES: dict[str, dict[str, Any]] = {
    "vllm_xpu_kernels": {},
    "vllm_xpu_kernels._C": {},
    "vllm_xpu_kernels.flash_attn_interface": {"flash_attn_varlen_func": flash_attn_varlen_func, "FA2_AVAILABLE": True},
}
