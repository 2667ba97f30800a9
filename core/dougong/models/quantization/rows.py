"""Parts of weights that may be quantised: rows, columns, and several stacked. Bits are never changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dougong.errors import ConfigError
from dougong.hal import QuantizedWeight

__all__ = ["join_rows", "slice_weight", "take_rows"]


def take_rows(weight: QuantizedWeight, rows: slice | torch.Tensor) -> QuantizedWeight:
    """Some output rows, or all in another order."""
    q = weight.q[rows]
    return replace(
        weight,
        q=q,
        scale=weight.scale[rows],
        minimum=None if weight.minimum is None else weight.minimum[rows],
        shape=(q.shape[0], weight.shape[1]),
    )


def slice_weight(weight: QuantizedWeight, rows: slice, columns: slice) -> QuantizedWeight:
    """The block ``weight[rows, columns]``.

    Raises:
        ConfigError: the columns do not begin and end at a group's border.
    """
    if rows != slice(None):
        weight = take_rows(weight, rows)
    start, stop, _ = columns.indices(weight.shape[1])
    if (start, stop) == (0, weight.shape[1]):
        return weight
    size = weight.group_size
    if weight.format == "int8":
        return replace(
            weight, q=weight.q[:, start:stop], group_size=stop - start, shape=(weight.shape[0], stop - start)
        )
    if start % size or stop % size:
        raise ConfigError(
            f"columns {start} to {stop} of a weight in groups of {size} cannot be cut out; another "
            "tensor_parallel_size, or no quantization, avoids that."
        )
    groups = slice(start // size, stop // size)
    return replace(
        weight,
        q=weight.q[:, start // 2 : stop // 2],
        scale=weight.scale[:, groups],
        minimum=None if weight.minimum is None else weight.minimum[:, groups],
        shape=(weight.shape[0], stop - start),
    )


def join_rows(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Stack weights of one format, group size and width."""
    first = parts[0]
    if len(parts) == 1:
        return first
    assert all((part.format, part.group_size, part.shape[1]) == (first.format, first.group_size, first.shape[1])
               for part in parts)  # fmt: skip
    minima = [part.minimum for part in parts if part.minimum is not None]
    return replace(
        first,
        q=torch.cat([part.q for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        minimum=torch.cat(minima) if minima else None,
        shape=(sum(part.shape[0] for part in parts), first.shape[1]),
    )
