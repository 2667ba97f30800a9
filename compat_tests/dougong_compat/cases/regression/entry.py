"""How a catalogue entry becomes cases, and the entries that have none."""

from __future__ import annotations

from typing import Any

from dougong_compat.case import Case
from dougong_compat.cases.make import attention_case, variants_case

__all__ = ["TOTAL", "WITHOUT", "Entry", "link"]

#: Entries in the catalogue.
TOTAL = 70

#: Entries without a case, and why.
WITHOUT: dict[int, str] = {
    9: "a position, an output row or a mask offset past 2^31 needs gigabytes of real output or millions of computed "
    "keys; the cache's own offsets past 2^31 are covered by 1 to 8",
}


def link(repository: str, number: int | str) -> str:
    """The upstream thread (or, for a hash, commit)."""
    if isinstance(number, str):
        return f"https://github.com/{repository}/commit/{number}"
    return f"https://github.com/{repository}/issues/{number}"


class Entry:
    """A catalogue entry: its number, name and upstream thread; methods make its cases."""

    def __init__(self, number: int, name: str, repository: str, thread: int | str) -> None:
        self.number, self.name, self.link = number, name, link(repository, thread)

    @property
    def _more(self) -> dict[str, Any]:
        return {"entry": self.number, "link": self.link}

    @property
    def _group(self) -> str:
        return f"regression/{self.number:02d}-{self.name}"

    def call(self, variant: str, kind: str = "attention", level: str = "L1", **params: Any) -> Case:
        """A case of one call (or ``needle``, ``write``, ``roundtrip``, ``graph``: whatever takes its parameters)."""
        profile = params.pop("profile", "core")
        needs = params.pop("needs", ())
        case = attention_case(self._group, variant, params, kind=kind, level=level, profile=profile, **self._more)
        return Case(**{**case.__dict__, "needs": (*case.needs, *needs)}) if needs else case

    def variants(self, variant: str, base: dict[str, Any], changes: list[dict[str, Any]], **more: Any) -> Case:
        """A case of one call and changes of it."""
        return variants_case(self._group, variant, base, changes, **{**self._more, **more})

    def case(self, variant: str, level: str, kind: str, needs: tuple[str, ...] = (), **params: Any) -> Case:
        """Any other kind."""
        return Case(
            id=f"{level}/{self._group}/{variant}", level=level, kind=kind, params=params, needs=needs, **self._more
        )
