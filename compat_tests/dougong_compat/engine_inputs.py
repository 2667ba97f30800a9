"""Prompts of an engine case."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from dougong_compat.numbers import dtype_of
from dougong_compat.tiny_llama import config

__all__ = ["prompts"]


def prompts(params: Mapping[str, Any], seed: int) -> dict[str, list[int]]:
    """Token ids by request id: some share a prefix, lengths stand around block edges."""
    rng = random.Random(seed)
    vocabulary = config(dtype_of(params["dtype"]))["vocab_size"]
    lengths = params.get("lengths", [5, 16, 33, 17])
    stem = [rng.randrange(3, vocabulary) for _ in range(max(lengths))]
    asked = {}
    for index, length in enumerate(lengths):
        tokens = [rng.randrange(3, vocabulary) for _ in range(length)]
        if index % 2:
            common = min(length - 1, 17)
            tokens[:common] = stem[:common]
        asked[f"r{index}"] = tokens
    return asked
