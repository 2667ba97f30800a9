"""Attention over transformers' contiguous caches (dynamic, static, sliding) and over no cache, without a copy.

K [B, K, S, D] of any strides is read as one long run of tokens in which sequences lie apart; kernel rows without
queries skip what lies between them.
"""

from __future__ import annotations

import torch

from dougong.hal import AttentionSpec, BatchView, GroupView, LayerArgs, RaggedKV
from dougong_transformers.kernels import kernel_for
from dougong_transformers.masks import Mask

__all__ = ["attend_dense"]


def attend_dense(
    spec: AttentionSpec, args: LayerArgs, mask: Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """q [B, H, Q, D], k [B, K, S, D], v [B, K, S, Dv] -> [B, Q, H, Dv], zeros where a query is padding.

    Raises:
        ValueError: the mask cannot be said by lengths, or no kernel does this.
    """
    batch, heads, queries, _ = q.shape
    if (batch, queries, k.shape[2]) != (mask.batch, mask.q_length, mask.kv_length):
        raise ValueError(
            f"`dougong` attention was given {batch} sequences of {queries} queries and {k.shape[2]} keys with a mask "
            f"made for {mask.batch} of {mask.q_length} and {mask.kv_length}. Try `sdpa`."
        )
    apart = _apart(k)
    if apart is None or apart != _apart(v):
        k, v = k.contiguous(), v.contiguous()
        apart = k.shape[1] * k.shape[2]
    out = q.new_empty((batch, queries, heads, spec.head_dim_v))
    step = _step(mask, apart, q.device)
    kernel = kernel_for(q.device, spec, 0, step.batch.num_rows, step.batch.num_tokens, step.batch.groups[0].max_kv_len)
    plan = kernel.plan_for(step, step.batch)
    flat = q.transpose(1, 2).reshape(batch * queries, heads, q.shape[3])
    kv = RaggedKV(_flat(k, apart), _flat(v, apart), step.cu_k, step.host_cu_k)
    kernel.attention.run(plan, args, flat, kv, out=out.view(batch * queries, heads, spec.head_dim_v))
    return out


class _Step:
    """A mask's rows as a batch; ``apart`` is the distance of two sequences in tokens."""

    def __init__(self, mask: Mask, apart: int, device: torch.device) -> None:
        rows = mask.rows()
        q_lens: list[int] = []
        k_lens: list[int] = []
        at = 0
        for queries, (sequence, first, count) in zip(rows.q_lens, rows.keys, strict=True):
            start = sequence * apart + first if count else at
            if start > at:  # what lies between two sequences: keys that no query asks for
                q_lens.append(0)
                k_lens.append(start - at)
            q_lens.append(queries)
            k_lens.append(count)
            at = start + count
        self.host_cu_k = _prefix_sums(k_lens)
        self.cu_k = self.host_cu_k.to(device)
        host_cu_q = _prefix_sums(q_lens)
        lengths = torch.tensor(k_lens, dtype=torch.int32)
        rows_count = len(q_lens)
        decode = next((i for i, queries in enumerate(q_lens) if queries != 1), rows_count)
        group = GroupView(
            kv_len=lengths.to(device),
            host_kv_len=lengths,
            max_kv_len=max(k_lens, default=0),
            block_table=torch.zeros((rows_count, 1), dtype=torch.int32, device=device),
            slots=torch.empty(0, dtype=torch.int64, device=device),
        )
        self.batch = BatchView(
            num_rows=rows_count,
            num_tokens=int(host_cu_q[-1]),
            num_decode_rows=decode,
            max_q_len=max(q_lens, default=0),
            cu_q=host_cu_q.to(device),
            host_cu_q=host_cu_q,
            groups=(group,),
        )


def _step(mask: Mask, apart: int, device: torch.device) -> _Step:
    found: _Step | None = mask.steps.get((apart, device))
    if found is None:
        found = mask.steps[apart, device] = _Step(mask, apart, device)
    return found


def _prefix_sums(lengths: list[int]) -> torch.Tensor:
    sums = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    sums[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    return sums


def _apart(x: torch.Tensor) -> int | None:
    """How many tokens apart two sequences of x [B, K, S, D] lie; None where no whole number says it."""
    batch, _heads, length, _ = x.shape
    if batch == 1:
        return length
    between, _, step, inner = x.stride()
    if inner != 1 or step < 1 or between % step or between // step < length:
        return None
    apart = between // step
    return apart if apart * batch < 2**31 else None


def _flat(x: torch.Tensor, apart: int) -> torch.Tensor:
    """x [B, K, S, D] as tokens [(B-1)·apart + S, K, D]."""
    batch, heads, length, dim = x.shape
    _, head, step, inner = x.stride()
    return x.as_strided(((batch - 1) * apart + length, heads, dim), (step, head, inner))
