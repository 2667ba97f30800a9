"""The engine: requests in, tokens and text out.

Names are imported when they are first used: what makes or reads text needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dougong.lazy import lazy_names

if TYPE_CHECKING:
    from dougong.engine.async_engine import AsyncEngine
    from dougong.engine.beam import Beam, BeamSearchOutput, BeamSearchParams
    from dougong.engine.engine import Engine
    from dougong.engine.llm import LLM

__all__ = ["LLM", "AsyncEngine", "Beam", "BeamSearchOutput", "BeamSearchParams", "Engine"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "LLM": "dougong.engine.llm",
        "AsyncEngine": "dougong.engine.async_engine",
        "Beam": "dougong.engine.beam",
        "BeamSearchOutput": "dougong.engine.beam",
        "BeamSearchParams": "dougong.engine.beam",
        "Engine": "dougong.engine.engine",
    },
)
