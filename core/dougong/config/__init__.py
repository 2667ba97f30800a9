"""Frozen configurations, resolved once at start-up. Nothing here imports torch."""

from dougong.config.engine import EngineConfig
from dougong.config.options import engine_config_from_options

__all__ = ["EngineConfig", "engine_config_from_options"]
