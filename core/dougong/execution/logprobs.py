"""Log-probabilities from raw logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dougong.execution.result import TokenLogprobs

__all__ = ["LogprobTensors", "PromptLogprobs", "RawLogits", "unpack"]

#: (chosen logprob [R] float32, its rank [R] int64, top ids [R, k] int64, top logprobs [R, k] float32).
LogprobTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class RawLogits:
    """What must be kept of some rows' logits before sampling options change them.

    Args:
        logits: [R, V] of any float dtype; a float32 tensor must not change before `of` is called.
        top: how many of the likeliest tokens to name (-1: all).
    """

    def __init__(self, logits: torch.Tensor, top: int) -> None:
        self.logits = logits.float()
        self.norm = torch.logsumexp(self.logits, dim=-1, keepdim=True)
        count = self.logits.shape[-1] if top < 0 else min(top, self.logits.shape[-1])
        values, self.top_ids = torch.topk(self.logits, count, dim=-1)
        self.top = values - self.norm

    def of(self, tokens: torch.Tensor) -> LogprobTensors:
        """Those of ``tokens`` [R] int64. A rank is 1 more than the number of likelier tokens."""
        chosen = self.logits.gather(-1, tokens[:, None])
        rank = (self.logits > chosen).sum(-1) + 1
        return (chosen - self.norm)[:, 0], rank, self.top_ids, self.top


class PromptLogprobs:
    """Log-probabilities of a row's prompt tokens, a chunk at a time.

    Args:
        row: of the plan.
        hidden: [n, E], the states at the positions before ``targets``.
        targets: the n prompt tokens.
        top: how many of the likeliest tokens to name (-1: all).
    """

    #: Logits of this many tokens are made at once: with a vocabulary of 150,000 that is 150 MB.
    CHUNK = 256

    def __init__(
        self,
        row: int,
        hidden: torch.Tensor,
        targets: list[int],
        top: int,
        logits: Callable[[torch.Tensor], torch.Tensor],
        target_ids: torch.Tensor,
    ) -> None:
        self.row = row
        self.targets = targets
        self.top = top
        parts = []
        for start in range(0, len(targets), self.CHUNK):
            stop = min(start + self.CHUNK, len(targets))
            parts.append(RawLogits(logits(hidden[start:stop]), top).of(target_ids[start:stop]))
        self.tensors = [torch.cat(pieces) for pieces in zip(*parts)]

    def entries(self, arrived: list[torch.Tensor]) -> list[tuple[int, TokenLogprobs]]:
        """From ``tensors`` as they arrived on the host."""
        return list(zip(self.targets, unpack(arrived, [self.top] * len(self.targets))))


def unpack(tensors: LogprobTensors | list[torch.Tensor], counts: list[int]) -> list[TokenLogprobs]:
    """Host tensors as objects; row i names its ``counts[i]`` likeliest tokens (-1: all that there are)."""
    logprobs, ranks, ids, tops = (tensor.tolist() for tensor in tensors)
    out = []
    for i, count in enumerate(counts):
        stop = len(ids[i]) if count < 0 else count
        out.append(TokenLogprobs(logprobs[i], ranks[i], ids[i][:stop], tops[i][:stop]))
    return out
