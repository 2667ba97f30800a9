"""How a model's vectors are made, as the files of sentence-transformers say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Pooling", "read_pooling"]


@dataclass(frozen=True)
class Pooling:
    """``kind``: last, mean or cls. ``normalize``: to length 1."""

    kind: str = "last"
    normalize: bool = True


def read_pooling(folder: Path) -> Pooling:
    """From ``modules.json`` and the pooling module's ``config.json``; the default where there are none."""
    modules = _json(folder / "modules.json")
    if not isinstance(modules, list):
        return Pooling()
    kind, normalize = "last", False
    for module in modules:
        if not isinstance(module, dict):
            continue
        name = str(module.get("type", "")).rpartition(".")[2]
        if name == "Normalize":
            normalize = True
        elif name == "Pooling":
            found = _json(folder / str(module.get("path", "1_Pooling")) / "config.json")
            if isinstance(found, dict):
                if found.get("pooling_mode_mean_tokens"):
                    kind = "mean"
                elif found.get("pooling_mode_cls_token"):
                    kind = "cls"
    return Pooling(kind, normalize)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
