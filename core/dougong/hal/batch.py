"""The batch as attention sees it: bare tensors, so that another framework can build one too."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dougong.hal.attention_spec import AttentionSpec

__all__ = ["BatchView", "GroupView"]


@dataclass(slots=True)
class GroupView:
    """A batch's lengths and addresses in one KV group.

    kv_len       [B] int32, device: tokens visible in the cache, the new ones included.
    host_kv_len  [B] int32, host: the same, exact; None where the host does not know.
    max_kv_len   a bound on ``kv_len``. While a graph is captured, a bound for every replay of it: what a kernel bakes
                 into the graph from it stays right.
    block_table  [B, W] int32, device; entries past ceil(kv_len/N) are garbage.
    slots        [T] int64, device: where each new token's K and V go. Unique, never negative.
    """

    kv_len: torch.Tensor
    host_kv_len: torch.Tensor | None
    max_kv_len: int
    block_table: torch.Tensor
    slots: torch.Tensor


@dataclass(slots=True)
class BatchView:
    """One step's batch of B rows and T query tokens.

    Decode rows (one query each) come first, ``num_decode_rows`` of them; padding is rows of length 0 or rows whose
    tokens go to scratch slots. ``cu_q`` [B+1] int32 on the device, ``host_cu_q`` [B+1] int32 on the host: prefix sums
    of query lengths, ``cu_q[B] == T``. ``groups[i]`` belongs to the KV group of index i.
    """

    num_rows: int
    num_tokens: int
    num_decode_rows: int
    max_q_len: int
    cu_q: torch.Tensor
    host_cu_q: torch.Tensor
    groups: tuple[GroupView, ...]

    def blind(self, spec: AttentionSpec, kv_len: torch.Tensor) -> torch.Tensor:
        """[T] bool: queries that see no key. Their answer is 0 and their LSE -inf, which many vendors' operators leave
        open.

        ``kv_len`` [B] int32: a group's, or the lengths of ragged rows. The answer lies where it lies, on the device or
        on the host, and is worked out there without a synchronisation.
        """
        rows, tokens = self.num_rows, self.num_tokens
        lengths = kv_len[:rows]
        if self.max_q_len <= 1 and tokens == rows:
            return lengths == 0
        cu_q = self.cu_q if kv_len.device == self.cu_q.device else self.host_cu_q
        counts = cu_q[1 : rows + 1] - cu_q[:rows]
        row = torch.repeat_interleave(torch.arange(rows, device=lengths.device), counts, output_size=tokens)
        seen = lengths[row]
        position = seen - counts[row] + torch.arange(tokens, device=lengths.device) - cu_q[row]
        if spec.causal:
            last = position
        elif spec.window is not None:
            last = position + (spec.window - 1)
        else:
            return seen == 0
        return (seen == 0) | (last < 0)

    @classmethod
    def build(
        cls,
        q_lens: list[int],
        kv_lens: list[int],
        block_table: torch.Tensor,
        block_size: int,
        device: torch.device | str,
        *,
        slots: torch.Tensor | None = None,
    ) -> BatchView:
        """A batch of one group from plain lists (tests, examples, a host framework's prefill).

        ``slots`` default to those that ``block_table`` gives to the last ``q_len`` of each row's ``kv_len`` tokens.
        """
        host_cu_q = torch.zeros(len(q_lens) + 1, dtype=torch.int32)
        host_cu_q[1:] = torch.tensor(q_lens, dtype=torch.int32).cumsum(0)
        host_kv_len = torch.tensor(kv_lens, dtype=torch.int32).reshape(len(q_lens))
        if slots is None:
            table = block_table.to("cpu", torch.int64)
            places = [
                int(table[row, position // block_size]) * block_size + position % block_size
                for row, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True))
                for position in range(kv_len - q_len, kv_len)
            ]
            slots = torch.tensor(places, dtype=torch.int64, device=device)
        decode = 0
        while decode < len(q_lens) and q_lens[decode] == 1:
            decode += 1
        group = GroupView(
            kv_len=host_kv_len.to(device),
            host_kv_len=host_kv_len,
            max_kv_len=max(kv_lens, default=0),
            block_table=block_table.to(device=device, dtype=torch.int32),
            slots=slots,
        )
        return cls(
            num_rows=len(q_lens),
            num_tokens=int(host_cu_q[-1]),
            num_decode_rows=decode,
            max_q_len=max(q_lens, default=0),
            cu_q=host_cu_q.to(device),
            host_cu_q=host_cu_q,
            groups=(group,),
        )
