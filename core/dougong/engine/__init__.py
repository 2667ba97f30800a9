"""The engine: requests in, tokens and text out."""

from dougong.engine.async_engine import AsyncEngine
from dougong.engine.beam import Beam, BeamSearchOutput, BeamSearchParams
from dougong.engine.engine import Engine
from dougong.engine.llm import LLM

__all__ = ["LLM", "AsyncEngine", "Beam", "BeamSearchOutput", "BeamSearchParams", "Engine"]
