"""A fleet of dougong engines on Ray Serve.

``start_fleet`` deploys the replicas, ``FleetClient`` asks them, ``python -m dougong_ray.serve`` is both behind the
OpenAI-compatible server. Importing this imports neither Ray nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["FleetClient", "FleetConfig", "start_fleet"]

_WHERE = {"FleetClient": "client", "FleetConfig": "config", "start_fleet": "fleet"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
