"""JUnit XML, for CI systems."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

__all__ = ["junit"]


def junit(report: dict[str, Any]) -> str:
    """One suite per level; UNSUPPORTED, WAIVED and cases that a cut run did not come to are skips."""
    root = ElementTree.Element("testsuites", name=f"dougong compat {report['backend']}")
    left = [
        {"id": name, "level": name.partition("/")[0], "outcome": "not run", "seconds": 0.0}
        for name in report.get("not_run", ())
    ]
    for level in report["levels"]:
        cases = [case for case in [*report["cases"], *left] if case["level"] == level]
        if not cases:
            continue
        outcomes = [case["outcome"] for case in cases]
        errors = sum(outcome in ("ERROR", "CRASH", "TIMEOUT") for outcome in outcomes)
        suite = ElementTree.SubElement(
            root, "testsuite", name=level, tests=str(len(cases)),
            failures=str(sum(outcome in ("FAIL", "XPASS") for outcome in outcomes)), errors=str(errors),
            skipped=str(sum(outcome in ("UNSUPPORTED", "WAIVED", "not run") for outcome in outcomes)),
            time=f"{sum(case['seconds'] for case in cases):.3f}",
        )  # fmt: skip
        for case in cases:
            group, _, name = case["id"].rpartition("/")
            node = ElementTree.SubElement(
                suite, "testcase", classname=group.replace("/", "."), name=name, time=f"{case['seconds']:.4f}"
            )
            text = _clean(case.get("message", ""))
            outcome = case["outcome"]
            if outcome in ("FAIL", "XPASS"):
                ElementTree.SubElement(node, "failure", message=text[:300]).text = _clean(case.get("reproduce", ""))
            elif outcome in ("ERROR", "CRASH", "TIMEOUT"):
                ElementTree.SubElement(node, "error", type=outcome, message=text[:300]).text = _clean(
                    case.get("reproduce", "")
                )
            elif outcome != "PASS":
                ElementTree.SubElement(node, "skipped", message=f"{outcome}: {text[:300]}")
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def _clean(text: str) -> str:
    """XML allows no control characters."""
    return "".join(char if char >= " " or char in "\t\n" else "?" for char in text)
