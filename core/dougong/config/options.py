"""Building an EngineConfig from loose options, with an answer to a misspelt one."""

from __future__ import annotations

import difflib
from typing import Any

from dougong.config.engine import EngineConfig
from dougong.errors import ConfigError

__all__ = ["engine_config_from_options"]

#: vLLM's names for the same meaning.
_ALIASES = {
    "gpu_memory_utilization": "memory_utilization",
    "num_gpu_blocks_override": "num_kv_blocks",
    "async_scheduling": "overlap",
    "kv_cache_memory_bytes": "kv_cache_memory",
}


def engine_config_from_options(model: str | None = None, **options: Any) -> EngineConfig:
    """Make a config from keyword options; vLLM's names are understood where the meaning is equal.

    Raises:
        ConfigError: an unknown option (the nearest known name is suggested), or a value out of range.
    """
    known = EngineConfig.names()
    clean: dict[str, Any] = {} if model is None else {"model": model}
    for name, value in options.items():
        target = _ALIASES.get(name, name)
        if target not in known:
            near = difflib.get_close_matches(target, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown option {name!r}.{hint} Known are: {', '.join(known)}.")
        if target in clean:
            raise ConfigError(f"option {target!r} is given twice (as {name!r} too).")
        clean[target] = value
    return EngineConfig(**clean)
