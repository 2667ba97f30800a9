"""Device graphs of whole forwards, by size: captured when first needed or at warm-up, largest first, replayed after."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dougong.hal import AttentionKernel, Graph, GraphBackend, Plan

__all__ = ["CapturedForward", "GraphCache", "GraphKey", "decode_sizes", "mixed_sizes", "within"]

log = logging.getLogger(__name__)

#: Hidden states [T, E], and logits [T, V] of a batch of decodes.
Forward = tuple[torch.Tensor, torch.Tensor | None]

#: Mixed batches of more tokens than this keep the device busy without a graph.
MAX_MIXED_TOKENS = 512


def decode_sizes(max_rows: int, asked: Sequence[int] | None = None) -> tuple[int, ...]:
    """Batch sizes to capture, ascending: 1, 2, 4, 8, steps of 8 to 64, then of 16; the largest batch itself always."""
    if asked is not None:
        sizes = {size for size in asked if size <= max_rows}
    else:
        sizes = {size for size in (1, 2, 4, *range(8, 65, 8), *range(80, max_rows + 1, 16)) if size <= max_rows}
        sizes.add(max_rows)
    return tuple(sorted(sizes))


def mixed_sizes(max_tokens: int) -> tuple[int, ...]:
    """Token counts of mixed batches to capture, ascending."""
    return tuple(size for size in (32, *range(64, MAX_MIXED_TOKENS + 1, 64)) if size <= max_tokens)


def within(sizes: tuple[int, ...], budget: int) -> tuple[int, ...]:
    """At most ``budget`` of ascending sizes, the smallest and the largest among them."""
    if len(sizes) <= budget:
        return sizes
    if budget < 2:
        return sizes[-budget:] if budget > 0 else ()
    step = (len(sizes) - 1) / (budget - 1)
    return tuple(sizes[round(i * step)] for i in range(budget))


@dataclass(frozen=True)
class GraphKey:
    """A captured size: ``decode`` batches have one token per row, the others any distribution of tokens on rows."""

    tokens: int
    rows: int
    decode: bool


@dataclass
class CapturedForward:
    """A graph with what it reads and writes. ``output``: the forward's hidden states and, of decodes,
    logits, at their fixed addresses."""

    graph: Graph
    plans: list[Plan]
    output: Forward | None = None
    ready: bool = False


@dataclass
class GraphCache:
    """Which batch runs on which graph.

    Args:
        backend: the device's graphs.
        kernels: attention kernels by KV group, for their plans and updates.
        decode, mixed: sizes to capture, ascending.
        max_rows: rows of a mixed graph: every seat, and one for padding.
    """

    backend: GraphBackend
    kernels: Sequence[AttentionKernel]
    needs_update: Sequence[bool]
    decode: tuple[int, ...]
    mixed: tuple[int, ...]
    max_rows: int
    captured: dict[GraphKey, CapturedForward] = field(default_factory=dict)
    failed: str = ""
    """Why no more graphs are captured ('' while they are)."""

    def __post_init__(self) -> None:
        self._pool = self.backend.new_pool()

    def key_for(self, rows: int, tokens: int, decode: bool) -> GraphKey | None:
        """The smallest graph that holds such a batch; None: run it without one."""
        if decode:
            for size in self.decode:
                if size >= rows:
                    return self._usable(GraphKey(size, size, True))
            return None
        for size in self.mixed:
            if size >= tokens:
                return self._usable(GraphKey(size, min(size, self.max_rows) + 1, False))
        return None

    def sizes(self) -> list[GraphKey]:
        """All sizes, largest first, so that the small ones fit into the memory that the large ones left."""
        mixed = [GraphKey(size, min(size, self.max_rows) + 1, False) for size in reversed(self.mixed)]
        return mixed + [GraphKey(size, size, True) for size in reversed(self.decode)]

    def _usable(self, key: GraphKey) -> GraphKey | None:
        return key if key in self.captured or not self.failed else None

    def entry(self, key: GraphKey) -> CapturedForward:
        """The graph of a size, captured or not; its plans are made once and keep their addresses."""
        found = self.captured.get(key)
        if found is None:
            plans = [kernel.new_plan() for kernel in self.kernels]
            found = self.captured[key] = CapturedForward(self.backend.new(self._pool), plans)
        return found

    def capture(self, entry: CapturedForward, key: GraphKey, forward: Callable[[], Forward]) -> None:
        """Record ``forward``, which has run once at this size. On failure the size, and all others not yet captured,
        run without graphs from here on; the cause is logged and kept in ``failed``."""
        try:
            with entry.graph.capture():
                output = forward()
        except Exception as error:
            self.failed = f"capturing {key} failed: {type(error).__name__}: {error}"
            log.warning("%s; steps of sizes not yet captured run without graphs", self.failed)
            del self.captured[key]
            return
        entry.output = output
        entry.ready = True

    def replay(self, entry: CapturedForward) -> Forward:
        """Run the recording on the plans as they are now; returns its output."""
        for kernel, plan, update in zip(self.kernels, entry.plans, self.needs_update):
            if update:
                kernel.update_graph(entry.graph, plan)
        entry.graph.replay()
        assert entry.output is not None
        return entry.output

    def clear(self) -> None:
        """Drop every graph."""
        self.captured.clear()
        self._pool = None
