"""Run commands side by side, each with its output in one piece and its seconds; exit status 1 if one of them failed.

    python scripts/side_by_side.py WORKERS 'NAME: COMMAND' …

Commands are started in the order given, so the long ones come first. Exit status 5, pytest's "no test was selected", is
no failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

__all__ = ["main"]


def run(job: str) -> tuple[str, str, int, float]:
    name, _, command = job.partition(": ")
    started = time.monotonic()
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return name, done.stdout, done.returncode, time.monotonic() - started


def main(arguments: list[str]) -> int:
    workers, jobs = int(arguments[0]), arguments[1:]
    failed = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            name, output, status, seconds = future.result()
            print(f"{name} ({seconds:.0f} s)\n{output.rstrip()}", flush=True)
            if status not in (0, 5):
                failed.append(name)
    for name in failed:
        print(f"FAILED: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
