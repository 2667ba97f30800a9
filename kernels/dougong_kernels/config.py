"""Block shapes, warps and stages of the attention kernels: a table per target, tuned offline.

`tuning/<target>.json` maps a class of shapes to settings. It is read once, when the first kernel is made, and nothing
is tried out at serve time: the first request pays for compilation only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources
from typing import Any

__all__ = ["ExtendConfig", "Settings", "SplitConfig", "config_class", "configs_for", "table_for"]


@dataclass(frozen=True)
class SplitConfig:
    """The split-KV kernel. `columns` = keys times kv heads in a tile; `per_core` programs per multiprocessor."""

    heads_per_tile: int = 4
    columns: int = 64
    warps: int = 4
    stages: int = 3
    per_core: int = 2
    min_units: int = 2
    """Fewest key tiles of a program: fewer would cost more in merging than they save in reading."""
    half_below: int = 0
    """With fewer key tiles than this for each program, half of the programs do the work."""


@dataclass(frozen=True)
class ExtendConfig:
    """The extend kernel: rows of queries times heads, keys per tile. `max_registers` 0 leaves the choice to Triton."""

    rows: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 2
    max_registers: int = 0
    heads_outer: bool = False


@dataclass(frozen=True)
class Settings:
    """What a kernel object is made with. `few` serves batches of up to `few_rows` rows, where merging costs most;
    `fewest` those of up to `fewest_rows`, where programs that find nothing to do cost as much as those that work, in
    objects whose rows have at most `fewest_keys` keys (None: any number). That is the object's own limit, never a
    batch's lengths: a graph is captured once and replayed at every length."""

    split: SplitConfig
    extend: ExtendConfig
    few: SplitConfig | None = None
    few_rows: int = 0
    fewest: SplitConfig | None = None
    fewest_rows: int = 0
    fewest_keys: int | None = None


def config_class(head_dim: int, latent: bool, wide: bool, exact: bool) -> str:
    """The table's key. `wide`: the cache's dtype has as many bytes as the queries' (not int8 or fp8)."""
    if latent:
        return "latent"
    if exact:
        return "float32"
    padded = max(32, 1 << (head_dim - 1).bit_length())
    return f"d{padded}" + ("" if wide else "_narrow")


@lru_cache(maxsize=16)
def table_for(target: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The table of a target ("sm90", "gfx942"), else of the one compiled for its family ("gfx1100" for gfx1151)."""
    folder = resources.files("dougong_kernels") / "tuning"
    relative = "gfx1100" if target.startswith("gfx11") else "gfx1201" if target.startswith("gfx12") else target
    for name in (target, relative):
        path = folder / f"{name}.json"
        if path.is_file():
            table: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))
            return table
    return {}


def configs_for(
    target: str, head_dim: int, *, latent: bool = False, wide: bool = True, exact: bool = False
) -> Settings:
    """Settings for a head dim on a target: the tuned ones where the table has them, safe ones elsewhere.

    `exact`: products in float32, which no matrix unit does; they want small tiles.
    """
    entry = table_for(target).get(config_class(head_dim, latent, wide, exact), {})
    split, extend = _safe(target, head_dim, latent, exact)
    split, extend = replace(split, **entry.get("split", {})), replace(extend, **entry.get("extend", {}))
    few = replace(split, **entry["few"]) if "few" in entry else None
    fewest = replace(few or split, **entry["fewest"]) if "fewest" in entry else None
    rows = {name: entry.get(name, {}).get("rows", 0) for name in ("few_rows", "fewest_rows")}
    keys = entry.get("fewest_keys", {}).get("keys")
    return Settings(split, extend, few, rows["few_rows"], fewest, rows["fewest_rows"], keys)


def _safe(target: str, head_dim: int, latent: bool, exact: bool) -> tuple[SplitConfig, ExtendConfig]:
    """Settings that fit 64 KiB of shared memory (AMD) or 160 KiB (NVIDIA) at any head dim."""
    cuda = target.startswith("sm")
    if latent:
        return (
            SplitConfig(1, 32 if cuda else 16, 8 if cuda else 4, 2 if cuda else 1, 1, 2),
            ExtendConfig(64 if cuda else 16, 32 if cuda else 16, 8 if cuda else 4, 2 if cuda else 1),
        )
    if exact:
        return SplitConfig(1, 16, 4, 1, 2, 2), ExtendConfig(16, 16, 4, 1)
    if head_dim > 128:
        return (
            SplitConfig(4, 64 if cuda else 32, 4, 2 if cuda else 1, 1, 2),
            ExtendConfig(64, 64 if cuda else 32, 4, 2 if cuda else 1),
        )
    return (
        SplitConfig(4, 64, 4, 3 if cuda else 2, 2, 2),
        ExtendConfig(128, 64, 8 if cuda else 4, 2),
    )
