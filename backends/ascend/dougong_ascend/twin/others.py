"""The other operators: cache writes, 310P's attention, norms, rotation, activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dougong_ascend.twin.refusal import require
from dougong_ascend.twin.semantics import attend, gather_pages
from dougong_ascend.twin.settings import settings

__all__ = ["register"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

_INNER = {
    "scatter": "scatter(Tensor key, Tensor value, Tensor(a!) k, Tensor(b!) v, Tensor slots, bool tiled) -> ()",
    "paged": "paged(Tensor q, Tensor k, Tensor v, int heads, float scale, Tensor table, int[] n, Tensor(a!) out) -> ()",
    "rms_norm": "rms_norm(Tensor x, Tensor gamma, float eps, float offset) -> (Tensor, Tensor)",
    "add_rms_norm": "add_rms_norm(Tensor x, Tensor y, Tensor gamma, float eps) -> (Tensor, Tensor, Tensor)",
    "rotary": "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    "swiglu": "swiglu(Tensor x, int dim) -> Tensor",
}


def register(npu: Any, atb: Any, inner: Any, device: torch.device) -> None:
    """Implement the operators for the twin's device."""
    for name, schema in _INNER.items():
        inner.define(schema)
        inner.impl(name, globals()[f"_{name}"], "CPU")
    for library, functions in ((npu, _NPU), (atb, _ATB)):
        for name, function in functions.items():
            library.impl(name, _on_device(name, function, device), "PrivateUse1")


def _on_device(name: str, function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``function`` behind the rule that its tensors lie contiguous on the device (ATB's lengths: on the host)."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for place, value in enumerate((*args, *kwargs.values())):
            if isinstance(value, torch.Tensor) and (name, place) != ("_npu_paged_attention", 7):
                require(value.device.type == device.type, name, f"argument {place} is on {value.device}")
                require(value.is_contiguous(), name, f"argument {place} is not contiguous")
        return function(*args, **kwargs)

    return call


def _ops() -> Any:
    return torch.ops.dougong_ascend_twin


# -- the cache ------------------------------------------------------------------------------------------------------


def _scatter_pa(
    key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor,
    slot_mapping: torch.Tensor, *, compress_lens: Any = None, compress_seq_offsets: Any = None, seq_lens: Any = None,
    cache_mode: str | None = "PA_NZ",
) -> None:  # fmt: skip
    name = "npu_scatter_pa_kv_cache"
    require("310P" not in settings.soc, name, "not on 310P")
    require(
        compress_lens is None and compress_seq_offsets is None and seq_lens is None, name, "compression is not modelled"
    )
    require(cache_mode in (None, "Norm", "PA_NZ"), name, f"cache_mode {cache_mode!r}")
    require(key.dim() == 3 and value.dim() == 3, name, "the twin models keys of three dimensions")
    require(key.shape[:2] == value.shape[:2], name, "key and value differ in tokens or heads")
    require(key_cache.dim() == 4 and value_cache.dim() == 4, name, "a cache has four dimensions")
    kinds = {x.dtype for x in (key, value, key_cache, value_cache)}
    require(len(kinds) == 1, name, f"dtypes differ: {kinds}")
    require(slot_mapping.dtype in (torch.int32, torch.int64), name, f"slots in {slot_mapping.dtype}: int32 or int64")
    require(
        tuple(slot_mapping.shape) == (key.shape[0],), name, f"{tuple(slot_mapping.shape)} slots, {key.shape[0]} tokens"
    )
    tiled = cache_mode == "PA_NZ"
    for new, cache in ((key, key_cache), (value, value_cache)):
        if tiled:
            fits = (
                cache.shape[3] * new.element_size() == 32
                and cache.shape[1] * cache.shape[3] == new.shape[1] * new.shape[2]
            )
        else:
            fits = tuple(cache.shape[2:]) == tuple(new.shape[1:])
        require(fits, name, f"a cache {tuple(cache.shape)} for keys {tuple(new.shape)} in mode {cache_mode}")
    _ops().scatter(key, value, key_cache, value_cache, slot_mapping, tiled)


def _reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_indices: torch.Tensor,
) -> None:
    name = "_npu_reshape_and_cache"
    require("310P" in settings.soc, name, "the twin models it on 310P only")
    require(slot_indices.dtype == torch.int32, name, f"slots in {slot_indices.dtype}: int32")
    require({x.dtype for x in (key, value, key_cache, value_cache)} == {torch.float16}, name, "float16 only")
    require(tuple(slot_indices.shape) == (key.shape[0],), name, "a slot per token")
    for new, cache in ((key, key_cache), (value, value_cache)):
        fits = cache.dim() == 4 and cache.shape[3] == 16 and cache.shape[1] * 16 == new.shape[1] * new.shape[2]
        require(fits, name, f"a cache {tuple(cache.shape)} for keys {tuple(new.shape)}: [blocks, K·D/16, N, 16]")
    _ops().scatter(key, value, key_cache, value_cache, slot_indices, True)


def _scatter(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    tiled: bool,
) -> None:
    slots = slots.to(torch.int64)
    size = k_cache.shape[2] if tiled else k_cache.shape[1]
    if slots.numel():
        low, high = int(slots.min()), int(slots.max())
        total = k_cache.shape[0] * size
        require(low >= 0 and high < total, "cache write", f"slots from {low} to {high}: 0 to {total - 1}")
        require(slots.unique().numel() == slots.numel(), "cache write", "a slot stands twice")
    block, place = slots // size, slots % size
    for new, cache in ((key, k_cache), (value, v_cache)):
        if tiled:
            cache[block, :, place] = new.reshape(new.shape[0], -1, cache.shape[3])
        else:
            cache[block, place] = new


def _paged_attention(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, num_kv_heads: int, num_heads: int,
    scale_value: float, block_table: torch.Tensor, context_lens: torch.Tensor, out: torch.Tensor, *,
    workspace: Any = None,
) -> None:  # fmt: skip
    name = "_npu_paged_attention"
    require("310P" in settings.soc, name, "the twin models it on 310P only")
    require({x.dtype for x in (query, key_cache, value_cache, out)} == {torch.float16}, name, "float16 only on 310P")
    require(query.dim() == 3 and query.shape[1] == num_heads, name, f"query {tuple(query.shape)}")
    rows, dim = query.shape[0], query.shape[2]
    require(0 < rows <= 2048, name, f"{rows} rows: 1 to 2048")
    require(dim % 16 == 0 and dim <= 256, name, f"head dim {dim}: multiples of 16 up to 256")
    require(num_heads % num_kv_heads == 0, name, "a whole number of query heads per kv head")
    require(key_cache.shape == value_cache.shape, name, "key and value caches differ")
    tiles = num_kv_heads * dim // 16
    require(key_cache.dim() == 4 and key_cache.shape[1] == tiles and key_cache.shape[3] == 16, name,
            f"cache {tuple(key_cache.shape)}: [blocks, K·D/16, N, 16]")  # fmt: skip
    block = key_cache.shape[2]
    require(block % 16 == 0 and block <= 128, name, f"blocks of {block}: multiples of 16 up to 128")
    require(block * dim <= 16384, name, f"block·D = {block * dim}: at most 16384")
    require(block_table.dtype == torch.int32 and block_table.shape[0] == rows, name, "an int32 table row per query")
    require(
        context_lens.device.type == "cpu" and context_lens.dtype == torch.int32, name, "context_lens: int32 on the host"
    )
    lens = context_lens.tolist()
    require(len(lens) == rows and all(n > 0 for n in lens), name, "a context length above 0 per query")
    require(max(lens) <= block_table.shape[1] * block, name, "a context length beyond the table")
    require(out.shape == query.shape, name, "out has the query's shape")
    _ops().paged(query, key_cache, value_cache, num_kv_heads, scale_value, block_table, lens, out)


def _paged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_heads: int, scale: float, table: torch.Tensor,
    lens: list[int], out: torch.Tensor,
) -> None:  # fmt: skip
    block = k.shape[2]
    for row, kv_len in enumerate(lens):
        used = table[row, : -(-kv_len // block)]
        require(
            bool(((used >= 0) & (used < k.shape[0])).all()), "_npu_paged_attention", "a block table leaves the cache"
        )
        keys, values = (gather_pages(x, table[row], kv_len, block, kv_heads, "tiled") for x in (k, v))
        out[row] = attend(q[row : row + 1], keys, values, scale, None, False)[0][0].to(out.dtype)


def _format_cast(
    x: torch.Tensor, acl_format: int, *, customize_dtype: Any = None, input_dtype: Any = None
) -> torch.Tensor:
    require(acl_format in (2, 29), "npu_format_cast", f"format {acl_format}: the twin models ND (2) and NZ (29)")
    require(acl_format == 2 or x.shape[-1] % 16 == 0, "npu_format_cast", "NZ with a last dimension that is no tile")
    return x.clone()


# -- norms, rotation, activation ------------------------------------------------------------------------------------


def _norm_rules(name: str, x: torch.Tensor, gamma: torch.Tensor) -> None:
    require("310P" not in settings.soc, name, "not documented for 310P")
    require(x.dtype in _FLOATS, name, f"{x.dtype}: float16, bfloat16 or float32")
    require(gamma.dtype == x.dtype, name, f"gamma in {gamma.dtype}, input in {x.dtype}")
    require(tuple(gamma.shape) == tuple(x.shape[-gamma.dim() :]), name, f"gamma {tuple(gamma.shape)}")
    require(1 <= x.dim() <= 8 and x.numel() > 0, name, "an empty input")


def _npu_rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> Any:
    _norm_rules("npu_rms_norm", x, gamma)
    return _ops().rms_norm(x, gamma, epsilon, 0.0)


def _npu_gemma_rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> Any:
    _norm_rules("npu_gemma_rms_norm", x, gamma)
    return _ops().rms_norm(x, gamma, epsilon, 1.0)


def _npu_add_rms_norm(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> Any:
    _norm_rules("npu_add_rms_norm", x1, gamma)
    require(x1.shape == x2.shape and x1.dtype == x2.dtype, "npu_add_rms_norm", "both addends alike")
    return _ops().add_rms_norm(x1, x2, gamma, epsilon)


def _rms_norm(x: torch.Tensor, gamma: torch.Tensor, eps: float, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * inverse * (offset + gamma.float())).to(x.dtype), inverse


def _add_rms_norm(x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    total = (x.float() + y.float()).to(x.dtype)
    return (*_rms_norm(total, gamma, eps, 0.0), total)


def _npu_rotary_mul(
    x: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str = "half", rotate: Any = None
) -> torch.Tensor:
    name = "npu_rotary_mul"
    require("310P" not in settings.soc, name, "not documented for 310P")
    require(rotate is None, name, "a rotation matrix is not modelled")
    require(rotary_mode in ("half", "interleave"), name, f"rotary_mode {rotary_mode!r}")
    require(x.dim() == 4 and r1.dim() == 4 and r1.shape == r2.shape, name, "four dimensions each")
    require(x.dtype in _FLOATS and r1.dtype == x.dtype and r2.dtype == x.dtype, name, "one dtype")
    require(x.shape[-1] < 896 and x.shape[-1] % 2 == 0, name, f"D = {x.shape[-1]}: even, below 896")
    require(x.shape[0] < 1000 and x.shape[2] < 1000, name, "B and N below 1000")
    batches, places, heads, dim = x.shape
    allowed = {(1, places, 1, dim)}
    if rotary_mode == "half":
        allowed |= {(batches, places, 1, dim), (batches, places, heads, dim)}
    require(tuple(r1.shape) in allowed, name, f"r1 {tuple(r1.shape)} for BSND {tuple(x.shape)} in mode {rotary_mode}")
    require(rotary_mode == "half" or batches * heads < 1000, name, "B·N below 1000")
    return _ops().rotary(x, r1, r2, rotary_mode == "interleave")  # type: ignore[no-any-return]


def _rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    wide = x.float()
    if interleaved:
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    else:
        low, high = wide.chunk(2, dim=-1)
        turned = torch.cat((-high, low), dim=-1)
    return (wide * cos.float() + turned * sin.float()).to(x.dtype)


def _npu_swiglu(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    require("310P" not in settings.soc, "npu_swiglu", "not documented for 310P")
    require(x.dtype in _FLOATS and x.shape[dim] % 2 == 0, "npu_swiglu", "an even dimension of floats")
    return _ops().swiglu(x, dim)  # type: ignore[no-any-return]


def _swiglu(x: torch.Tensor, dim: int) -> torch.Tensor:
    gate, up = x.float().chunk(2, dim=dim)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


_NPU: dict[str, Callable[..., Any]] = {
    "npu_scatter_pa_kv_cache": _scatter_pa,
    "npu_format_cast": _format_cast,
    "npu_rms_norm": _npu_rms_norm,
    "npu_gemma_rms_norm": _npu_gemma_rms_norm,
    "npu_add_rms_norm": _npu_add_rms_norm,
    "npu_rotary_mul": _npu_rotary_mul,
    "npu_swiglu": _npu_swiglu,
}
_ATB: dict[str, Callable[..., Any]] = {
    "_npu_paged_attention": _paged_attention,
    "_npu_reshape_and_cache": _reshape_and_cache,
}
