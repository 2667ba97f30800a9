"""Shrunk failures that are kept: the suite's own, found by searching kernels with planted bugs, and a vendor's.

Each is one attention call in the smallest form that still showed a bug. The suite's are cases of the core profile; a
vendor keeps what `dougong compat fuzz --save FOLDER` found in the package and hands it over in a hook::

    @hookimpl
    def dougong_compat_cases(device):
        return saved_cases(Path(__file__).parent / "failures", "mydev")
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from dougong_compat.case import Case
from dougong_compat.cases.make import attention_case

__all__ = ["collect", "saved_cases"]


def collect() -> Iterator[Case]:
    """The suite's own: ``corpus.json`` holds {name, params, seed, note}, ``note`` saying what it was found in."""
    text = resources.files("dougong_compat").joinpath("corpus.json").read_text(encoding="utf-8")
    for entry in json.loads(text):
        case = attention_case("corpus", entry["name"], entry["params"], note=entry["note"])
        yield dataclasses.replace(case, seed=entry["seed"])


def saved_cases(folder: Path, backend: str) -> list[Case]:
    """Failures that ``fuzz`` saved in ``folder``, as cases of its own; none where there is no folder."""
    cases = []
    for file in sorted(folder.glob("*.json")):
        saved = json.loads(file.read_text(encoding="utf-8"))
        case = attention_case(f"plugin/{backend}", file.stem, saved["params"], note=saved.get("message", "")[:200])
        cases.append(dataclasses.replace(case, seed=saved["seed"]))
    return cases
