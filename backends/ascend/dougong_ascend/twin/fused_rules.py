"""What the fused attention operator refuses, from its two documents in torch-npu's wheel.

``Request`` has the names of the first version. A rule that the documents state for one query per row only, or for more
only, stands in the function of that name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dougong_ascend.twin.refusal import TwinRefusal, require

__all__ = ["Request", "check"]

_FLOATS = (torch.float16, torch.bfloat16)
_MASKS = (torch.bool, torch.int8, torch.uint8)
_INT32 = 2**31 - 1
#: Longest row of several queries, and of its keys.
_MOST_KEYS = 20971520


@dataclass
class Request:
    """One call, with what follows from it: batch, queries per row (TND: of the longest row) and query lengths."""

    version: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kwargs: dict[str, Any]
    tnd_paging: bool = False
    own_blocks: bool = False
    batch: int = 0
    q_size: int = 0
    dim: int = 0
    q_lens: tuple[int, ...] = ()
    kv_lens: tuple[int, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name in ("kwargs", "__setstate__"):
            raise AttributeError(name)
        return self.kwargs[name]

    @property
    def label(self) -> str:
        return "npu_fused_infer_attention_score" + ("_v2" if self.version == 2 else "")

    @property
    def paged(self) -> bool:
        return self.block_table is not None

    @property
    def latent(self) -> bool:
        return self.query_rope is not None

    @property
    def kv_heads(self) -> int:
        return int(self.num_key_value_heads or self.num_heads)


def check(request: Request, device: torch.device) -> None:
    """Refuse what the operator refuses; fills in what follows from the request.

    Raises:
        TwinRefusal: with the rule.
    """
    r = request
    _tensors(r, device)
    _shape(r)
    _heads(r)
    if r.learnable_sink is not None:
        _sink(r)
    if r.latent:
        _latent(r)
    elif r.input_layout == "TND":
        _tnd(r)
    _lengths(r)
    if r.paged:
        _paging(r)
    else:
        _dense(r)
    if r.q_size == 1 and r.input_layout != "TND":
        _one_query(r)
    else:
        _many_queries(r)


def _tensors(r: Request, device: torch.device) -> None:
    named = {"query": r.query, "key": r.key, "value": r.value}
    named |= {name: value for name, value in r.kwargs.items() if isinstance(value, torch.Tensor)}
    for name, tensor in named.items():
        require(tensor.device.type == device.type, r.label, f"{name} is on {tensor.device}, not on the device")
        require(tensor.is_contiguous(), r.label, f"{name} is not contiguous")
    modelled = {
        "key_antiquant_scale",
        "value_antiquant_scale",
        "query_rope",
        "key_rope",
        "atten_mask",
        "block_table",
        "learnable_sink",
        "workspace",
    }
    for name in set(named) - {"query", "key", "value"} - modelled:
        raise TwinRefusal(f"{r.label}: {name} is not modelled by the twin")
    require(r.query.dtype in _FLOATS, r.label, f"query in {r.query.dtype}: float16 or bfloat16")
    quantized = r.key_antiquant_scale is not None or r.value_antiquant_scale is not None
    if quantized:
        _quantized(r)
    for name in ("query_rope", "key_rope") if quantized else ("key", "value", "query_rope", "key_rope"):
        if name in named:
            require(
                named[name].dtype == r.query.dtype, r.label, f"{name} in {named[name].dtype}, query in {r.query.dtype}"
            )


def _quantized(r: Request) -> None:
    """Keys and values in int8 with a scale each, for a whole tensor: the kind that the backend asks for."""
    scales = r.key_antiquant_scale, r.value_antiquant_scale
    require(all(one is not None for one in scales), r.label, "one of the two antiquant scales alone")
    require(r.key.dtype == torch.int8 and r.value.dtype == torch.int8, r.label, "antiquant scales without int8 keys")
    require((r.key_antiquant_mode, r.value_antiquant_mode) == (0, 0), r.label, "the twin models antiquant mode 0")
    for one in scales:
        require(tuple(one.shape) == (1,), r.label, f"an antiquant scale {tuple(one.shape)}: the twin models (1,)")
        require(one.dtype == r.query.dtype, r.label, f"an antiquant scale in {one.dtype}, query in {r.query.dtype}")
    require(not r.latent, r.label, "MLA with antiquant scales")
    require(r.input_layout != "TND", r.label, "TND with antiquant scales")


def _shape(r: Request) -> None:
    layout, q = r.input_layout, r.query
    require(layout in ("BNSD", "BSND", "TND"), r.label, f"input_layout {layout!r}: the twin models BNSD, BSND and TND")
    require(q.dim() == (3 if layout == "TND" else 4), r.label, f"a query of {q.dim()} dimensions in {layout}")
    r.dim = q.shape[-1]
    if layout == "TND":
        ends = r.actual_seq_lengths
        require(ends is not None and len(ends) > 0, r.label, "TND needs query lengths, as prefix sums on the host")
        pairs = list(zip((0, *ends), ends))
        require(all(a <= b for a, b in pairs), r.label, "TND query lengths are prefix sums: they do not fall")
        require(ends[-1] == q.shape[0], r.label, f"TND query lengths end at {ends[-1]}, the query at {q.shape[0]}")
        r.batch, r.q_lens = len(ends), tuple(b - a for a, b in pairs)
        r.q_size = max(r.q_lens)
        heads = q.shape[1]
    else:
        r.batch = q.shape[0]
        r.q_size, heads = (q.shape[2], q.shape[1]) if layout == "BNSD" else (q.shape[1], q.shape[2])
        given = r.actual_seq_lengths
        r.q_lens = (r.q_size,) * r.batch if given is None or r.q_size == 1 else tuple(given)[: r.batch]
        require(len(r.q_lens) == r.batch, r.label, "as many query lengths as rows, or one")
        require(all(0 <= n <= r.q_size for n in r.q_lens), r.label, "a query length beyond the query")
    require(heads == r.num_heads, r.label, f"num_heads={r.num_heads}, the query has {heads}")


def _heads(r: Request) -> None:
    require(r.num_heads <= 256, r.label, f"{r.num_heads} heads: at most 256")
    require(r.num_heads % r.kv_heads == 0, r.label, f"{r.num_heads} heads over {r.kv_heads} kv heads")
    require(r.latent or r.num_heads // r.kv_heads <= 64, r.label, "more than 64 query heads per kv head")
    require(1 <= r.batch <= 65536, r.label, f"{r.batch} rows: 1 to 65536")
    require(r.dim <= 512, r.label, f"head dim {r.dim}: at most 512")
    require(r.dim % 16 == 0, r.label, f"head dim {r.dim}: a multiple of 16")


def _lengths(r: Request) -> None:
    given = r.actual_seq_lengths_kv
    if given is None:
        require(not r.paged, r.label, "paging needs kv lengths on the host")
        size = r.key.shape[2] if r.input_layout == "BNSD" else r.key.shape[1]
        r.kv_lens = (size,) * r.batch
    else:
        require(len(given) == 1 or len(given) >= r.batch, r.label, f"{len(given)} kv lengths for {r.batch} rows")
        r.kv_lens = tuple(given) * r.batch if len(given) == 1 else tuple(given)[: r.batch]
    require(all(n >= 0 for n in r.kv_lens), r.label, "a negative kv length")
    require(all(r.kv_lens), r.label, "a kv length of 0: the documents do not say what comes back")


def _paging(r: Request) -> None:
    table, key, value, block = r.block_table, r.key, r.value, r.block_size
    require(table.dtype == torch.int32, r.label, f"block_table in {table.dtype}: int32")
    require(
        table.dim() == 2 and table.shape[0] == r.batch, r.label, f"block_table {tuple(table.shape)} for {r.batch} rows"
    )
    require(block > 0, r.label, "block_size is 0")
    needed = [-(-n // block) for n in r.kv_lens]
    require(table.shape[1] >= max(needed), r.label, f"{table.shape[1]} table entries, {max(needed)} blocks in a row")
    require(
        not r.own_blocks or key.shape[0] >= sum(needed),
        r.label,
        f"a cache of {key.shape[0]} blocks for rows of {sum(needed)} together",
    )
    require(key.shape == value.shape, r.label, f"key {tuple(key.shape)} and value {tuple(value.shape)} differ")
    require(key.numel() <= _INT32, r.label, f"a cache of {key.numel()} elements: at most 2^31 - 1")
    require(key.dim() in (3, 4, 5), r.label, f"a paged cache of {key.dim()} dimensions: the twin models 3 to 5")
    if key.dim() == 5:
        _tiles(r)
        size = key.shape[3]
    elif key.dim() == 3:
        merged = r.kv_heads * r.dim
        require(key.shape[2] == merged, r.label, f"cache {tuple(key.shape)}: K·D is {merged}")
        require(merged <= 65535, r.label, f"K·D = {merged}: at most 65535 with heads inside a token")
        size = key.shape[1]
    else:
        require(r.input_layout in ("BNSD", "TND"), r.label, f"a cache with heads outside under {r.input_layout}")
        require(
            key.shape[1] == r.kv_heads and key.shape[3] == r.dim,
            r.label,
            f"cache {tuple(key.shape)}: [blocks, K, N, D]",
        )
        size = key.shape[2]
    require(size == block, r.label, f"block_size={block}, the cache has blocks of {size}")


def _tiles(r: Request) -> None:
    """A cache in NZ: MLA only."""
    require(r.latent, r.label, "a cache in NZ without query_rope")
    require(r.input_layout != "BNSD", r.label, "a cache in NZ under BNSD")
    require(r.block_size == 128, r.label, f"a cache in NZ with block_size={r.block_size}: 128")
    tiles = (r.kv_heads, r.dim // 16)
    require(
        tuple(r.key.shape[1:3]) == tiles and r.key.shape[4] == 16,
        r.label,
        f"cache {tuple(r.key.shape)}: [blocks, K, D/16, N, 16]",
    )


def _dense(r: Request) -> None:
    require(r.block_size == 0, r.label, "block_size without block_table")
    require(r.key.shape == r.value.shape, r.label, f"key {tuple(r.key.shape)} and value {tuple(r.value.shape)} differ")
    require(r.key.dim() == r.query.dim(), r.label, "key and query differ in dimensions")
    require(r.input_layout != "TND", r.label, "TND without paging is not modelled by the twin")
    heads, size = (1, 2) if r.input_layout == "BNSD" else (2, 1)
    require(r.key.shape[heads] == r.kv_heads and r.key.shape[3] == r.dim, r.label, f"key {tuple(r.key.shape)}")
    require(r.key.shape[0] == r.batch, r.label, f"{r.key.shape[0]} rows of keys, {r.batch} of queries")
    require(max(r.kv_lens) <= r.key.shape[size], r.label, "a kv length beyond the keys")


def _one_query(r: Request) -> None:
    require(max(r.kv_lens) <= 262144, r.label, "more than 262144 keys under one query")
    if r.key.dtype == torch.int8 and r.paged:
        require(r.block_size % 32 == 0, r.label, f"block_size={r.block_size} with int8 keys: multiples of 32")
    require(r.inner_precise in (0, 1), r.label, f"inner_precise={r.inner_precise} with one query: 0 or 1")
    if r.paged and not r.latent:
        require(
            r.block_size % 16 == 0 and r.block_size <= 512,
            r.label,
            f"block_size={r.block_size}: multiples of 16 up to 512",
        )
    mask = r.atten_mask
    if mask is None:
        return
    require(not r.latent, r.label, "MLA with one query takes no mask")
    require(mask.dtype in _MASKS, r.label, f"atten_mask in {mask.dtype}: bool, int8 or uint8")
    keys = r.block_table.shape[1] * r.block_size if r.paged else max(r.kv_lens)
    rows, last = mask.shape[0], mask.shape[-1]
    shaped = mask.dim() == 2 or (mask.dim() == 4 and mask.shape[1:3] == (1, 1))
    require(shaped and rows == r.batch, r.label, f"atten_mask {tuple(mask.shape)}: (B, 1, 1, S) or (B, S)")
    require(last >= keys, r.label, f"atten_mask covers {last} keys of {keys}")


def _many_queries(r: Request) -> None:
    longest = max(r.q_size, *r.kv_lens)
    require(longest <= _MOST_KEYS, r.label, f"{longest} queries or keys: at most {_MOST_KEYS}")
    require(
        r.key.dtype != torch.int8, r.label, "int8 keys under several queries: not with paging, and not modelled else"
    )
    if r.paged and not r.latent:
        good = r.block_size % 128 == 0 and 128 <= r.block_size <= 512
        require(good, r.label, f"block_size={r.block_size} with several queries: multiples of 128 up to 512")
    if r.input_layout == "BSND":
        require(r.num_heads * r.dim < 65535, r.label, f"N·D = {r.num_heads * r.dim} in BSND: below 65535")
    require(r.inner_precise in (0, 1, 2, 3), r.label, f"inner_precise={r.inner_precise}")
    mode, mask = r.sparse_mode, r.atten_mask
    require(mode in (0, 1, 2, 3, 4), r.label, f"sparse_mode={mode}: 0 to 4")
    if mode in (0, 1):
        require(mask is None, r.label, "a whole mask is not modelled by the twin for several queries")
        require(mode == 0, r.label, "sparse_mode 1 without a mask")
        return
    require(mask is not None, r.label, f"sparse_mode {mode} without a mask")
    require(tuple(mask.shape) in ((2048, 2048), (1, 2048, 2048), (1, 1, 2048, 2048)), r.label,
            f"atten_mask {tuple(mask.shape)}: 2048×2048 in sparse_mode {mode}")  # fmt: skip
    require(mask.dtype in _MASKS, r.label, f"atten_mask in {mask.dtype}: bool, int8 or uint8")
    if mode == 4:
        require(r.pre_tokens + r.next_tokens >= 0, r.label, "an empty band")


def _latent(r: Request) -> None:
    require(r.key_rope is not None, r.label, "query_rope without key_rope")
    require(r.dim == 512 and r.query_rope.shape[-1] == 64, r.label, "MLA: 512 and 64")
    require(r.query_rope.shape[:-1] == r.query.shape[:-1], r.label, "query_rope's shape differs from the query's")
    heads = (32, 64, 128) if r.version == 1 else (1, 2, 4, 8, 16, 32, 64, 128)
    require(r.num_heads in heads, r.label, f"MLA with {r.num_heads} heads: one of {heads}")
    require(r.kv_heads == 1, r.label, "MLA has one kv head")
    require(r.q_size <= 16, r.label, f"MLA with {r.q_size} queries per row: at most 16")
    require(r.input_layout in ("BNSD", "BSND"), r.label, f"MLA in {r.input_layout}")
    require(r.paged, r.label, "MLA without paging")
    require(r.block_size in (16, 128), r.label, f"MLA with block_size={r.block_size}: 16 or 128")
    require(not r.softmax_lse_flag, r.label, "MLA gives no LSE")
    require(r.sparse_mode == (0 if r.q_size == 1 else 3), r.label, f"MLA with sparse_mode {r.sparse_mode}")
    expected = (*r.key.shape[:-1], 64)
    if r.key.dim() == 5:
        expected = (*r.key.shape[:2], 4, *r.key.shape[3:])
    require(tuple(r.key_rope.shape) == expected, r.label, f"key_rope {tuple(r.key_rope.shape)}: {expected}")


def _tnd(r: Request) -> None:
    require(r.query.dtype == torch.bfloat16, r.label, "TND: bfloat16 only")
    dims, tokens = ((192,), 65536) if r.version == 1 else ((128, 192), 1 << 20)
    allowed = " or ".join(map(str, dims))
    require(r.dim in dims, r.label, f"TND with head dim {r.dim}: {allowed}")
    require(r.query.shape[0] <= tokens, r.label, f"TND with {r.query.shape[0]} tokens: at most {tokens}")
    if r.version == 1:
        alike = r.num_heads == r.kv_heads and r.num_heads in (8, 16, 32, 64, 128)
        require(alike, r.label, f"TND with {r.num_heads} over {r.kv_heads} heads: as many, and 8, 16, 32, 64 or 128")
    else:
        require(r.batch <= 4096, r.label, f"TND with {r.batch} rows: at most 4096")
    require(r.tnd_paging or not r.paged, r.label, "TND with paging: the documents contradict one another")
    require(
        r.actual_seq_lengths_kv is not None and len(r.actual_seq_lengths_kv) == r.batch,
        r.label,
        "TND: a kv length per row",
    )
    require(r.sparse_mode in (0, 3, 4), r.label, f"TND with sparse_mode {r.sparse_mode}: 0, 3 or 4")
    if r.sparse_mode == 3:
        fewer = all(queries < keys for queries, keys in zip(r.q_lens, r.actual_seq_lengths_kv))
        require(fewer, r.label, "TND with sparse_mode 3: fewer queries than keys in every row")


def _sink(r: Request) -> None:
    sink = r.learnable_sink
    require(r.input_layout == "TND", r.label, f"learnable_sink in {r.input_layout}: TND only")
    require(sink.dtype == torch.bfloat16, r.label, f"learnable_sink in {sink.dtype}: bfloat16")
    require(tuple(sink.shape) == (r.num_heads,), r.label, f"learnable_sink {tuple(sink.shape)}: (N,)")
    require(r.dim <= 128, r.label, f"learnable_sink with head dim {r.dim}: at most 128")
