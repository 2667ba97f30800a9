"""dougong (斗拱): one LLM serving core for every accelerator.

Names are imported when they are first used: ``import dougong`` loads neither torch nor a vendor's SDK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dougong.lazy import lazy_names

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "DougongError",
    "Engine",
    "EngineConfig",
    "FinishReason",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutput",
    "__version__",
]

if TYPE_CHECKING:
    from dougong.config import EngineConfig
    from dougong.engine.async_engine import AsyncEngine
    from dougong.engine.engine import Engine
    from dougong.engine.llm import LLM
    from dougong.errors import DougongError
    from dougong.types import CompletionOutput, FinishReason, RequestOutput, SamplingParams, StructuredOutput

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "LLM": "dougong.engine.llm",
        "AsyncEngine": "dougong.engine.async_engine",
        "Engine": "dougong.engine.engine",
        "EngineConfig": "dougong.config",
        "SamplingParams": "dougong.types",
        "RequestOutput": "dougong.types",
        "CompletionOutput": "dougong.types",
        "FinishReason": "dougong.types",
        "StructuredOutput": "dougong.types",
        "DougongError": "dougong.errors",
    },
)
