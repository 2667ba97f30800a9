"""The number of threads kernels use: torch's, asked once per step."""

from __future__ import annotations

import torch

__all__ = ["count", "refresh"]

count: int = torch.get_num_threads()


def refresh() -> int:
    """Take over torch's setting; attention's plan does it in every step."""
    global count
    count = torch.get_num_threads()
    return count
