"""The handbook's table of real bugs and the cases that re-enact them."""

from __future__ import annotations

from collections import defaultdict

from dougong_compat.case import Case
from dougong_compat.cases import collect_all
from dougong_compat.cases.regression.entry import TOTAL, WITHOUT
from dougong_compat.selftest.mutants import all_mutants

__all__ = ["catalogue"]


def catalogue() -> str:
    """Markdown; a test keeps docs/conformance/catalogue.md equal to it."""
    by_entry: dict[int, list[Case]] = defaultdict(list)
    for case in collect_all(False):
        if case.entry:
            by_entry[case.entry].append(case)
    mutants: dict[int, list[str]] = defaultdict(list)
    for mutant in all_mutants():
        if mutant.entry and not mutant.equivalent:
            mutants[mutant.entry].append(f"`{mutant.name}`")
    lines = [
        "# The bug catalogue",
        "",
        "Real bugs of attention kernels and KV caches, one or more cases for each, named after the report; and",
        "the bug planted in an honest kernel that the named case must kill. Written by",
        "`python -c 'from dougong_compat.report.catalogue import catalogue; print(catalogue(), end=\"\")'`.",
        "",
        f"{len(by_entry)} of {TOTAL} entries have cases.",
        "",
        "| entry | cases | levels | planted bug |",
        "|---|---|---|---|",
    ]
    for entry in sorted(by_entry):
        cases = by_entry[entry]
        name = cases[0].id.split("/")[2].partition("-")[2]
        levels = ", ".join(sorted({case.level for case in cases}))
        planted = ", ".join(mutants.get(entry, [])) or "none"
        lines.append(f"| {entry} [{name}]({cases[0].link}) | {len(cases)} | {levels} | {planted} |")
    lines += ["", "## Entries without a case", "", "| entry | why |", "|---|---|"]
    lines += [f"| {entry} | {why} |" for entry, why in sorted(WITHOUT.items())]
    return "\n".join(lines) + "\n"
