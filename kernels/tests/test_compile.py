"""Every kernel compiled for every target without its hardware, and held to the committed tables.

The compiler must run outside the interpreter, so each target is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dougong_kernels.compile.build import Resources
from dougong_kernels.compile.launches import launches
from dougong_kernels.compile.table import FOLDER, Table, regressions
from dougong_kernels.compile.targets import TARGETS

TUNING = FOLDER.parent / "tuning"


@pytest.mark.prove
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_as_the_table_says(target: str, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "dougong_kernels.compile", target]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("target", TARGETS)
def test_tables_hold_every_kernel_within_the_targets_limits(target: str) -> None:
    table = Table.read(target)
    assert table is not None
    assert list(table.kernels) == [launch.name for launch in launches(TARGETS[target])]
    for name, found in table.kernels.items():
        assert found.shared <= TARGETS[target].shared, name
        assert found.registers <= TARGETS[target].registers, name


@pytest.mark.parametrize("target", [path.stem for path in TUNING.glob("*.json")])
def test_kernels_with_settings_of_their_own_do_not_spill(target: str) -> None:
    """What a person chose for a target must suit it; other shapes take safe settings, which must only fit."""
    table = Table.read(target)
    assert table is not None, f"{target} has settings and is not compiled for"
    for label in ("d128", "d64 features", "d256"):
        if label.split()[0] in json.loads((TUNING / f"{target}.json").read_text()):
            spilling = {f"{part} {label}" for part in ("split", "extend") if table.kernels[f"{part} {label}"].spills}
            assert spilling <= SPILLING.get(target, set())


#: Settings that spill all the same.
SPILLING = {
    # Measured on an H100: d128 held to 128 registers is faster than without a spill, and so are d256's large tiles.
    "sm90": {"extend d128", "extend d256"},
    "sm80": {"extend d256"},  # 8 bytes, outside the loop
    # RDNA's threads have 256 registers: a head of 256 takes more at the smallest tiles.
    "gfx1100": {"split d256", "extend d256"},
    "gfx1201": {"split d256"},
}


BEFORE = Table("3.6.0", {"kernel": Resources(100, 0, 1000), "other": Resources(50, 4, 0)})


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (Resources(100, 0, 1000), None),
        (Resources(117, 0, 1100), None),
        (Resources(60, 0, 0), None),
        (Resources(100, 2, 1000), "kernel spills 2, before 0"),
        (Resources(130, 0, 1000), "kernel takes 130 registers, before 100"),
        (Resources(100, 0, 4000), "kernel takes 4000 shared, before 1000"),
        (Resources(100, 0, 70_000), "kernel takes 70000 bytes of shared memory; a program has 65536"),
        ("CompilationError: no", "kernel does not compile: CompilationError: no"),
    ],
)
def test_what_gets_worse_is_named(now: Resources | str, words: str | None) -> None:
    wrong = regressions(TARGETS["gfx942"], BEFORE, {"kernel": now}, ["kernel", "other"])
    assert (not wrong) if words is None else any(words in line and "gfx942" in line for line in wrong)


def test_new_and_vanished_kernels_ask_for_a_new_table() -> None:
    target = TARGETS["sm90"]
    assert "not in the table" in regressions(target, BEFORE, {"new": Resources(1, 0, 0)}, ["new", "kernel", "other"])[0]
    assert "other is in the table and is no kernel" in regressions(target, BEFORE, {}, ["kernel"])[0]
    assert "no table" in regressions(target, None, {}, [])[0]


def test_tables_come_back_as_they_were_written(tmp_path: Path) -> None:
    BEFORE.write("sm90", tmp_path)
    back = Table.read("sm90", tmp_path)
    assert back is not None and back.kernels == BEFORE.kernels and back.triton == "3.6.0"


@pytest.mark.parametrize("arguments", [["sm75"], []])
def test_what_cannot_be_compiled_is_said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from dougong_kernels.compile.__main__ import main

    with pytest.raises(SystemExit):
        main(arguments)
    message = capsys.readouterr().err
    assert ("unknown target 'sm75'" in message) if arguments else ("the interpreter compiles nothing" in message)
