"""How large the simulated machine is. Read from the environment; imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dougong.errors import ConfigError

__all__ = ["Settings", "read_settings"]

MAX_DEVICES = 16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``devices`` devices of ``memory`` bytes each.

    ``poison`` fills new memory with 0xFF (NaN to every float type). ``late_transfers`` lets a non_blocking copy to
    pinned memory arrive only when the host waits for it, and checks that pinned memory is left alone until it was read.
    """

    devices: int = 2
    memory: int = 4 << 30
    poison: bool = False
    late_transfers: bool = True


def read_settings() -> Settings:
    """Settings from ``DOUGONG_SIM_DEVICES``, ``DOUGONG_SIM_MEMORY`` (bytes), ``DOUGONG_SIM_POISON`` and
    ``DOUGONG_SIM_LATE_TRANSFERS`` (0 or 1).

    Raises:
        ConfigError: a value is no whole number, or out of range.
    """
    return Settings(
        devices=_number("DOUGONG_SIM_DEVICES", Settings.devices, 1, MAX_DEVICES),
        memory=_number("DOUGONG_SIM_MEMORY", Settings.memory, 1, 1 << 50),
        poison=bool(_number("DOUGONG_SIM_POISON", 0, 0, 1)),
        late_transfers=bool(_number("DOUGONG_SIM_LATE_TRANSFERS", 1, 0, 1)),
    )


def _number(name: str, default: int, low: int, high: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise ConfigError(f"{name}={text!r}: expected a whole number from {low} to {high}; unset it for {default}")
    return value
