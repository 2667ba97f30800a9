"""Rotary position embedding's table and the shape of a packed QKV row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["QKVShape", "RopeTable"]


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines by position.

    cos_sin [P, R] float32: the first R/2 columns cosines, the rest sines; R is the number of rotated elements of
    a head (its first R). ``interleaved``: pairs are (0, 1), (2, 3) … instead of (i, i + R/2).
    """

    cos_sin: torch.Tensor
    interleaved: bool = False

    @property
    def rotary_dim(self) -> int:
        return self.cos_sin.shape[1]


@dataclass(frozen=True)
class QKVShape:
    """How a packed row [H·D + K·D + K·Dv] splits, and the norms that queries and keys pass before rope.

    q_norm, k_norm: [D] weights of an RMS norm over each head (None: no norm); the norm multiplies by
    ``norm_offset + weight``.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 1e-6
    norm_offset: float = 0.0

    @property
    def splits(self) -> tuple[int, int, int]:
        """Widths of the query, key and value parts."""
        return (
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
            self.num_kv_heads * self.head_dim_v,
        )
