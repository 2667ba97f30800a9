"""Which chip the twin is, and what it lets pass."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

__all__ = ["Settings", "settings"]


@dataclass
class Settings:
    """``soc`` is the chip's name (``DOUGONG_ASCEND_TWIN_SOC``). ``tnd_paging`` lets TND and paging meet, which the
    documents both allow and forbid. ``own_blocks``: a cache must have as many blocks as all rows of a call name, as the
    documents say; graphs of rows that share a prefix name more, and vllm-ascend's do. ``waits`` False: a graph does not
    wait for the events of its task groups, so that a replay without an update shows stale lengths in place of hanging.
    """

    soc: str = field(default_factory=lambda: os.environ.get("DOUGONG_ASCEND_TWIN_SOC", "Ascend910B1"))
    tnd_paging: bool = False
    own_blocks: bool = False
    waits: bool = True


settings = Settings()
