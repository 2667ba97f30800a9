#!/usr/bin/env python3
"""Run a peer's bench so that it says when its engine is up, and measures only when told to.

    python barrier.py NAME SCRIPT ARGUMENTS…     # touches /tmp/ready.NAME, waits for /tmp/go.NAME

Engines take a minute or two to come up: several can do so at once, and are then measured one after another, alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

MARKS = ("    for wi, (n, i, o) in enumerate(W):\n", '    for workload in options.workloads.split(","):\n')
"""The line in a bench that begins to measure."""


def main() -> None:
    name, script = sys.argv[1], sys.argv[2]
    text = Path(script).read_text(encoding="utf-8")
    mark = next((one for one in MARKS if one in text), None)
    if mark is None:
        raise SystemExit(f"{script} has none of the lines before which to wait")
    wait = (
        f"    open('/tmp/ready.{name}', 'w').close()\n"
        f"    while not __import__('os').path.exists('/tmp/go.{name}'):\n"
        "        __import__('time').sleep(0.02)\n"
    )
    changed = Path(f"/tmp/barrier_{name}.py")
    changed.write_text(text.replace(mark, wait + mark, 1), encoding="utf-8")
    os.execv(sys.executable, [sys.executable, str(changed), *sys.argv[3:]])


if __name__ == "__main__":
    main()
