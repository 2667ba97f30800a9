"""KV connectors: those that come with the core, and opening one by name."""

from dougong.connectors.opening import BUILT_IN, open_connector

__all__ = ["BUILT_IN", "open_connector"]
