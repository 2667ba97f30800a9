"""The fused attention operator: both versions, with and without ``out``, on the twin's device."""

from __future__ import annotations

from typing import Any

import torch

from dougong_ascend.twin.fused_rules import Request, check
from dougong_ascend.twin.refusal import require
from dougong_ascend.twin.semantics import attend, gather_pages
from dougong_ascend.twin.settings import settings

__all__ = ["register"]

_FIRST_NAMES = {
    "actual_seq_qlen": "actual_seq_lengths",
    "actual_seq_kvlen": "actual_seq_lengths_kv",
    "num_query_heads": "num_heads",
    "softmax_scale": "scale",
    "return_softmax_lse": "softmax_lse_flag",
    "dequant_scale_key": "key_antiquant_scale",
    "dequant_scale_value": "value_antiquant_scale",
    "key_quant_mode": "key_antiquant_mode",
    "value_quant_mode": "value_antiquant_mode",
}
_DEFAULTS: dict[str, Any] = {
    "actual_seq_lengths": None, "actual_seq_lengths_kv": None, "num_heads": 1, "num_key_value_heads": 0, "scale": 1.0,
    "softmax_lse_flag": False, "query_rope": None, "key_rope": None, "atten_mask": None, "block_table": None,
    "block_size": 0, "input_layout": "BSH", "sparse_mode": 0, "pre_tokens": 2147483647, "next_tokens": 2147483647,
    "inner_precise": 0, "learnable_sink": None,
    "key_antiquant_scale": None, "value_antiquant_scale": None, "key_antiquant_mode": 0, "value_antiquant_mode": 0,
}  # fmt: skip
# The call as the device runs it: recorded whole, lengths by value, so that a replay of a graph that was not updated
# computes on old lengths.
_SCHEMA = (
    "fused_attention(Tensor query, Tensor key, Tensor value, Tensor? query_rope, Tensor? key_rope, Tensor? mask,"
    " Tensor? table, Tensor? sink, Tensor? k_scale, Tensor? v_scale,"
    " int[] q_lens, int[] kv_lens, int kv_heads, float scale, str layout, int mode,"
    " int pre, int next, int block, bool fix_blind, Tensor(a!) out, Tensor(b!)? lse) -> ()"
)


def register(npu: torch.library.Library, inner: torch.library.Library, device: torch.device) -> None:
    """Implement the operators for the twin's device."""
    inner.define(_SCHEMA)
    inner.impl("fused_attention", _compute, "CPU")
    for version, name in ((1, "npu_fused_infer_attention_score"), (2, "npu_fused_infer_attention_score_v2")):
        call = _Fused(version, getattr(torch.ops.npu, name), device)
        npu.impl(name, call.functional, "PrivateUse1")
        npu.impl(f"{name}.out", call.into, "PrivateUse1")
        npu.impl(f"_{name}_get_max_workspace", call.workspace, "PrivateUse1")


class _Fused:
    def __init__(self, version: int, packet: Any, device: torch.device) -> None:
        self._version = version
        self._meta = packet.default
        self._device = device

    def _request(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kwargs: dict[str, Any]) -> Request:
        named = _DEFAULTS | {_FIRST_NAMES.get(name, name): value for name, value in kwargs.items()}
        lets = {"tnd_paging": settings.tnd_paging, "own_blocks": settings.own_blocks}
        request = Request(self._version, q, k, v, named, **lets)
        require("310P" not in settings.soc, request.label, "not on 310P")
        check(request, self._device)
        return request

    def _shapes(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The outputs' shapes and dtypes by the wheel's own shape function."""

        def meta(value: Any) -> Any:
            return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value

        out, lse = self._meta(meta(q), meta(k), meta(v), **{name: meta(value) for name, value in kwargs.items()})
        return out, lse

    def functional(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> Any:
        request = self._request(query, key, value, kwargs)
        out_meta, lse_meta = self._shapes(query, key, value, kwargs)
        out = torch.empty(out_meta.shape, dtype=out_meta.dtype, device=query.device)
        lse = torch.empty(lse_meta.shape, dtype=lse_meta.dtype, device=query.device)
        self._launch(request, out, lse)
        return out, lse

    def into(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> Any:
        out, lse = kwargs.pop("attention_out"), kwargs.pop("softmax_lse")
        workspace = kwargs.pop("workspace", None)
        request = self._request(query, key, value, kwargs)
        out_meta, lse_meta = self._shapes(query, key, value, kwargs)
        require(
            out.shape == out_meta.shape, request.label, f"attention_out {tuple(out.shape)}: {tuple(out_meta.shape)}"
        )
        require(out.dtype == out_meta.dtype and out.is_contiguous(), request.label, "attention_out's dtype or strides")
        if request.softmax_lse_flag:
            require(
                lse.shape == lse_meta.shape, request.label, f"softmax_lse {tuple(lse.shape)}: {tuple(lse_meta.shape)}"
            )
            require(lse.dtype == torch.float32 and lse.is_contiguous(), request.label, "softmax_lse's dtype or strides")
        capturing = torch.get_device_module(self._device).is_current_stream_capturing()
        require(workspace is not None or not capturing, request.label, "captured without a workspace of its own")
        self._launch(request, out, lse)
        return out, lse

    def workspace(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self._request(query, key, value, kwargs)
        return torch.empty(1024, dtype=torch.uint8, device=query.device)

    def _launch(self, r: Request, out: torch.Tensor, lse: torch.Tensor) -> None:
        torch.ops.dougong_ascend_twin.fused_attention(
            r.query, r.key, r.value, r.query_rope, r.key_rope, r.atten_mask, r.block_table, r.learnable_sink,
            r.key_antiquant_scale, r.value_antiquant_scale,
            r.q_lens, r.kv_lens, r.kv_heads, r.scale, r.input_layout, r.sparse_mode, r.pre_tokens, r.next_tokens,
            r.block_size, r.inner_precise >= 2, out, lse if r.softmax_lse_flag else None,
        )  # fmt: skip


def _compute(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_rope: torch.Tensor | None,
    key_rope: torch.Tensor | None, mask: torch.Tensor | None, table: torch.Tensor | None, sink: torch.Tensor | None,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
    q_lens: list[int], kv_lens: list[int], kv_heads: int, scale: float, layout: str, mode: int, pre: int, next: int,
    block: int, fix_blind: bool, out: torch.Tensor, lse: torch.Tensor | None,
) -> None:  # fmt: skip
    """The operator's kernel: every tensor is a CPU tensor over device memory."""
    label = "npu_fused_infer_attention_score"
    single = layout != "TND" and (query.shape[2] if layout == "BNSD" else query.shape[1]) == 1
    if mask is not None and not single:
        square = mask.reshape(2048, 2048).bool()
        require(
            torch.equal(square, torch.ones_like(square).triu(1)),
            label,
            "the mask is not the triangle that the mode takes",
        )
    rows_q, rows_out = _by_row(query, layout, q_lens), _by_row(out, layout, q_lens)
    rows_rope = None if query_rope is None else _by_row(query_rope, layout, q_lens)
    for row, kv_len in enumerate(kv_lens):
        q = rows_q[row] if rows_rope is None else torch.cat((rows_q[row], rows_rope[row]), dim=-1)
        if not q.shape[0]:
            continue
        if table is not None:
            used = table[row, : -(-kv_len // block)]
            require(
                bool(((used >= 0) & (used < key.shape[0])).all()), label, f"row {row}'s block table leaves the cache"
            )
            kind = {3: "merged", 4: "heads", 5: "nz"}[key.dim()]
            k = gather_pages(key, table[row], kv_len, block, kv_heads, kind)
            v = gather_pages(value, table[row], kv_len, block, kv_heads, kind)
            if key_rope is not None:
                k = torch.cat((k, gather_pages(key_rope, table[row], kv_len, block, 1, kind)), dim=-1)
        else:
            k, v = ((x[row].transpose(0, 1) if layout == "BNSD" else x[row])[:kv_len] for x in (key, value))
        if k_scale is not None and v_scale is not None:
            k, v = k.float() * k_scale.float(), v.float() * v_scale.float()
        hidden = _hidden(mask, row, q.shape[0], kv_len, single, mode, pre, next)
        answer, sums = attend(q, k, v, scale, hidden, fix_blind, sink)
        rows_out[row].copy_(answer.to(out.dtype))
        if lse is not None:
            target = lse.squeeze(-1)
            if layout == "TND":
                start = sum(q_lens[:row])
                target[start : start + q.shape[0]] = sums
            else:
                target[row, :, : q.shape[0]] = sums.transpose(0, 1)


def _by_row(x: torch.Tensor, layout: str, q_lens: list[int]) -> list[torch.Tensor]:
    """Views [S, N, D] of each row's queries."""
    if layout == "TND":
        return list(x.split(list(q_lens)))
    rows = [x[row].transpose(0, 1) if layout == "BNSD" else x[row] for row in range(x.shape[0])]
    return [row[:length] for row, length in zip(rows, q_lens)]


def _hidden(
    mask: torch.Tensor | None, row: int, queries: int, kv_len: int, single: bool, mode: int, pre: int, next: int
) -> torch.Tensor | None:
    """[S, L] bool, True where a query does not see a key."""
    if mask is None:
        return None
    if single:
        flat = mask.reshape(mask.shape[0], -1)
        return flat[row, :kv_len].bool()[None]
    k_pos = torch.arange(kv_len)[None]
    q_pos = torch.arange(queries)[:, None]
    if mode == 2:
        return k_pos > q_pos
    ahead = k_pos - (q_pos + kv_len - queries)  # modes 3 and 4 align the last query with the last key
    return ahead > 0 if mode == 3 else (ahead > next) | (ahead < -pre)
