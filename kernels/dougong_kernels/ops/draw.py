"""Sampling: greedy exact, otherwise Gumbel-max under a threshold."""

from __future__ import annotations

import torch

from dougong_kernels.ops.support import supports
from dougong_kernels.target import cores
from dougong_kernels.triton.draw import choose_kernel, threshold_kernel

__all__ = ["sample"]

_COUNTERS: dict[torch.device, torch.Tensor] = {}
_MAX_ROWS = 8192


def _counters(device: torch.device) -> torch.Tensor:
    """Zeros between launches (the last program of a row puts its counter back); launches are ordered on one stream."""
    found = _COUNTERS.get(device)
    if found is None:
        found = _COUNTERS[device] = torch.zeros(_MAX_ROWS, dtype=torch.int32, device=device)
    return found


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """logits [R, V] float32 (or narrower), any row stride, unchanged -> [R] int64."""
    rows, vocabulary = logits.shape
    device = logits.device
    out = torch.empty(rows, dtype=torch.int64, device=device)
    if rows == 0:
        return out
    if rows > _MAX_ROWS:
        raise ValueError(f"{rows} rows to sample in one call; at most {_MAX_ROWS}")
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    masked = any(x is not None for x in (top_k, top_p, min_p))
    threshold = out
    if masked:
        threshold = torch.empty(rows, dtype=torch.float32, device=device)
        # A program of 32 warps fills a core; AMD's wavefronts are twice as wide, and 1,024 threads are the most.
        wide = 32 if device.type == "cuda" and not torch.version.hip else 16
        threshold_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, threshold, vocabulary, logits.stride(0),
            TOP_K=top_k is not None, TOP_P=top_p is not None, MIN_P=min_p is not None,
            BLOCK=2048 if vocabulary > 2048 else 256, num_warps=wide if vocabulary > 2048 else 4,
        )  # fmt: skip
    # Enough programs for the whole device when rows are few; power of two, so that few variants are compiled.
    parts = 1
    while parts < 64 and parts * rows < 2 * cores(device) and vocabulary > parts * 4096:
        parts *= 2
    partial = torch.empty(rows * parts, dtype=torch.int64, device=device)
    choose_kernel[(rows, parts)](
        logits, temperature, threshold, seeds, positions, partial, _counters(device), out, vocabulary, logits.stride(0),
        PARTS=parts, PARTS_P=parts, BLOCK=1024 if vocabulary > 1024 else 256, MASKED=masked, num_warps=4,
    )  # fmt: skip
    return out


sample.supports = supports  # type: ignore[attr-defined]
