"""Masks as lengths: what transformers' mask functions say, in the terms of the kernels.

transformers asks the registered mask function once per step and kind of layer and hands its answer to every
attention layer. Ours is a ``Mask``: which queries and keys of each sequence are real, causal or not, and the window.
No [queries, keys] tensor is ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils

__all__ = ["Mask", "Rows", "Rule", "dougong_mask", "read_rule"]


@dataclass(frozen=True)
class Rule:
    """A mask function understood. ``window``: visible tokens, the query's own included (causal or not)."""

    causal: bool
    window: int | None = None
    packed: bool = False
    """Several sequences in one row, told apart by their positions."""


@dataclass(frozen=True)
class Rows:
    """Kernel rows in the order of the flattened queries. ``q`` and ``k`` are (start, length) in the sequence."""

    q_lens: list[int]
    keys: list[tuple[int, int, int]]
    """(sequence, first key, number of keys) of each row."""


class Mask(torch.Tensor):
    """One step's mask, by identity: layers that are handed the same object share a plan.

    To transformers it is a tensor [B, 1, Q, S], since it carries masks about as such; it has no values, and whoever
    asks for them gets an error. ``base`` is the key that stands at the first query's position; ``padding`` [B, S]
    bool, True for real keys; ``steps`` is what the kernels made of it, by how far apart sequences lie and where.
    """

    rule: Rule | None
    batch: int
    q_length: int
    kv_length: int
    base: int
    padding: torch.Tensor | None
    steps: dict[tuple[int, torch.device], Any]

    @staticmethod
    def make(
        rule: Rule | None, batch: int, q_length: int, kv_length: int, base: int, padding: torch.Tensor | None
    ) -> Mask:
        nothing = torch.zeros((), dtype=torch.bool).expand(batch, 1, q_length, kv_length)
        mask = torch.Tensor._make_subclass(Mask, nothing)
        mask.rule, mask.batch, mask.q_length, mask.kv_length = rule, batch, q_length, kv_length
        mask.base, mask.padding, mask.steps = base, padding, {}
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "dim", "size"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name in ("contiguous", "to"):
            return args[0]
        raise ValueError(
            f"a mask of `dougong` attention holds lengths, not values: this model's own code asks it for {name!r}. "
            "Try `sdpa`."
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Mask({self.rule}, batch={self.batch}, queries={self.q_length}, keys={self.kv_length})"

    def rows(self) -> Rows:
        """Every sequence cut into rows of real queries over real keys, and rows of padding that see nothing.

        Raises:
            ValueError: a mask that lengths cannot say.
        """
        if self.rule is None or self.rule.packed:
            what = "several sequences packed into one row" if self.rule else "custom mask functions"
            raise ValueError(f"`dougong` attention does not support {what}. Try `sdpa` or `flex_attention`.")
        seen = min(self.kv_length, self.base + self.q_length) if self.rule.causal else self.kv_length
        q_lens: list[int] = []
        keys: list[tuple[int, int, int]] = []

        def row(sequence: int, queries: int, first: int, count: int) -> None:
            if queries:
                q_lens.append(queries)
                keys.append((sequence, first, count))

        aligned = self.rule.causal or self.q_length == self.kv_length
        if self.rule.window and not aligned:
            raise ValueError("`dougong` attention does not support a window across two sequences. Try `sdpa`.")
        for sequence, (low, high) in enumerate(self._real(seen)):
            start, stop = 0, self.q_length
            if aligned:  # queries stand among the keys: those at padded places see nothing
                start = min(max(low - self.base, 0), self.q_length)
                stop = max(start, min(high - self.base, self.q_length))
                high = min(high, self.base + stop) if self.rule.causal else high
            row(sequence, start, 0, 0)
            row(sequence, stop - start, low, max(0, high - low))
            row(sequence, self.q_length - stop, 0, 0)
        return Rows(q_lens, keys)

    def _real(self, seen: int) -> list[tuple[int, int]]:
        """[low, high) of each sequence's real keys among the first ``seen``."""
        if self.padding is None:
            return [(0, seen)] * self.batch
        real = self.padding[:, :seen]
        count = real.sum(1)
        low = real.to(torch.int8).argmax(1)
        high = seen - real.flip(1).to(torch.int8).argmax(1)
        table = torch.stack((low, torch.where(count > 0, high, low), count), 1).tolist()  # one copy to the host
        if any(high - low != count for low, high, count in table):
            raise ValueError(
                "`dougong` attention takes padding on the left or on the right, not in the middle of a sequence. "
                "Pad on the left (tokenizer.padding_side='left'), or try `sdpa`."
            )
        return [(low, high) for low, high, _ in table]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def dougong_mask(
    batch_size: int,
    q_length: int | torch.Tensor | None = None,
    kv_length: int = 0,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    cache_position: torch.Tensor | None = None,
    **others: Any,
) -> Mask:
    """transformers' mask interface. ``attention_mask`` [B, seen tokens] bool, True for real tokens.

    ``cache_position`` [Q] is what earlier versions give in place of ``q_length`` and ``q_offset``.
    """
    if cache_position is None and isinstance(q_length, torch.Tensor):
        cache_position = q_length
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    assert isinstance(q_length, int)
    first = int(kv_offset)
    padding = None
    if attention_mask is not None:
        padding = attention_mask[:, first : first + kv_length].bool()
        if padding.shape[1] < kv_length:  # a static cache is longer than what was seen
            padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
    return Mask.make(read_rule(mask_function), batch_size, q_length, kv_length, int(q_offset) - first, padding)


def read_rule(function: Callable[..., Any]) -> Rule | None:
    """Recognise one of transformers' own mask functions by what it closes over; None for any other."""
    if function is masking_utils.causal_mask_function:
        return Rule(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Rule(causal=False)
    if not _made_by(function, "and_masks"):
        return None
    parts = _closed(function, "mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    overlay, base = parts
    if _made_by(overlay, "sliding_window_overlay") and base is masking_utils.causal_mask_function:
        return Rule(causal=True, window=_closed(overlay, "sliding_window"))
    if _made_by(overlay, "sliding_window_bidirectional_overlay") and base is masking_utils.bidirectional_mask_function:
        return Rule(causal=False, window=_closed(overlay, "sliding_window") + 1)  # its distance is inclusive
    for one, other in ((overlay, base), (base, overlay)):
        if _made_by(one, "remap_positions_for_packed_sequence") and _made_by(other, "packed_sequence_mask_function"):
            inner = read_rule(_closed(one, "mask_function"))
            return None if inner is None else Rule(causal=inner.causal, window=inner.window, packed=True)
    return None


def _made_by(function: Any, maker: str) -> bool:
    return (
        getattr(function, "__module__", "") == masking_utils.__name__
        and getattr(function, "__qualname__", "").partition(".<locals>")[0] == maker
    )


def _closed(function: Any, name: str) -> Any:
    """The value that ``function`` closes over under ``name``; None without it."""
    names = function.__code__.co_freevars
    return function.__closure__[names.index(name)].cell_contents if name in names else None
