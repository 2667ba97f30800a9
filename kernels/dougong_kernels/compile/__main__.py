"""Compile for the targets, then check against the tables or write them."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from dougong_kernels.compile.targets import TARGETS, Target

__all__ = ["compile_target", "main"]


def compile_target(target: Target, *, whole: bool) -> tuple[dict[str, Any], list[str]]:
    """(what each kernel takes, or its error; the names of all kernels). ``whole``: every kernel, not the core ones."""
    from dougong_kernels.compile.build import compile_for
    from dougong_kernels.compile.launches import launches

    found: dict[str, Any] = {}
    every = list(launches(target))
    for launch in every:
        if whole or launch.core:
            try:
                found[launch.name] = compile_for(target, launch.kernel, launch.args)
            except Exception as error:  # whatever the compiler throws is the answer for this kernel
                found[launch.name] = f"{type(error).__name__}: {str(error)[:300]}"
    return found, [launch.name for launch in every]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dougong_kernels.compile", description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all of them without any")
    parser.add_argument("--write", action="store_true", help="write the tables anew, from every kernel")
    parser.add_argument("--all", action="store_true", help="check every kernel, not only those that matter most")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"unknown target {unknown[0]!r}: choose of {', '.join(TARGETS)}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    try:
        import triton
    except ImportError:
        parser.error("Triton is not installed: pip install 'dougong-kernels[offline]'")
    from dougong_kernels.compile.table import Table, regressions

    wrong: list[str] = []
    for name in options.targets or TARGETS:
        target = TARGETS[name]
        found, every = compile_target(target, whole=options.write or options.all)
        if options.write:
            failed = [
                f"{name}: {kernel} does not compile: {now}" for kernel, now in found.items() if isinstance(now, str)
            ]
            wrong += failed or regressions(target, Table("", found), found, every)
            if not failed:
                print(f"{name}: {len(found)} kernels -> {Table(triton.__version__, found).write(name).name}")
            continue
        table = Table.read(name)
        if table is not None and table.triton.split(".")[:2] != triton.__version__.split(".")[:2]:
            parser.error(
                f"the table of {name} was written with Triton {table.triton}, this is {triton.__version__}: another "
                "compiler allots otherwise. Install that one, or write the tables anew with --write."
            )
        worse = regressions(target, table, found, every)
        print(f"{name}: {len(found)} kernels compiled, {len(worse)} worse than the table", flush=True)
        wrong += worse
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
