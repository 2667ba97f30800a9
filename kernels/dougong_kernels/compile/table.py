"""The committed record of what each kernel takes on each target: compiled/<target>.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from dougong_kernels.compile.build import Resources
from dougong_kernels.compile.targets import Target

__all__ = ["FOLDER", "Table", "regressions"]

FOLDER = Path(str(resources.files("dougong_kernels") / "compiled"))

#: Registers and shared memory may grow by this much before it counts, for another Triton of the same minor version
#: allots them a little differently.
_GROWTH = 1.10
_SLACK = 8


class Table:
    """One target's record. ``triton`` is the version that it was written with."""

    def __init__(self, triton: str, kernels: Mapping[str, Resources]) -> None:
        self.triton = triton
        self.kernels = dict(kernels)

    @staticmethod
    def read(target: str, folder: Path = FOLDER) -> Table | None:
        path = folder / f"{target}.json"
        if not path.is_file():
            return None
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Table(data["triton"], {name: Resources(**entry) for name, entry in data["kernels"].items()})

    def write(self, target: str, folder: Path = FOLDER) -> Path:
        """One line per kernel, so that a change reads as a change of one kernel."""
        path = folder / f"{target}.json"
        lines = [f"  {json.dumps(name)}: {json.dumps(vars(found))}" for name, found in self.kernels.items()]
        body = ",\n".join(lines)
        path.write_text(f'{{"triton": {json.dumps(self.triton)}, "kernels": {{\n{body}\n}}}}\n', encoding="utf-8")
        return path


def regressions(
    target: Target, table: Table | None, found: Mapping[str, Resources | str], launched: Iterable[str]
) -> list[str]:
    """What got worse, a line each with the kernel's name.

    Args:
        found: what was compiled now; a string is the compiler's error.
        launched: names of every kernel there is, compiled now or not: an entry for none of them is stale.
    """
    renew = "python -m dougong_kernels.compile --write"
    if table is None:
        return [f"{target.name}: no table; write it with {renew}"]
    wrong = []
    for name, now in found.items():
        where = f"{target.name}: {name}"
        if isinstance(now, str):
            wrong.append(f"{where} does not compile: {now}")
            continue
        if now.shared > target.shared:
            wrong.append(f"{where} takes {now.shared} bytes of shared memory; a program has {target.shared}")
        before = table.kernels.get(name)
        if before is None:
            wrong.append(f"{where} is not in the table; look at {now} and write it with {renew}")
            continue
        if now.spills > before.spills:
            wrong.append(f"{where} spills {now.spills}, before {before.spills}")
        for what in ("registers", "shared"):
            new, old = getattr(now, what), getattr(before, what)
            if new > old * _GROWTH + _SLACK:
                wrong.append(f"{where} takes {new} {what}, before {old}")
    stale = sorted(set(table.kernels) - set(launched))
    wrong += [f"{target.name}: {name} is in the table and is no kernel any more; {renew}" for name in stale]
    return wrong
