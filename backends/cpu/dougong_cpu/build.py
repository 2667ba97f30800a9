"""Building the C++ library. Run at install by setup.py, or by hand: ``python -m dougong_cpu.build``.

Only the standard library is used: at install neither torch nor dougong need be there.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["build", "find_compiler"]

SOURCES = Path(__file__).parent / "native"
NAME = "libdougong_cpu.so"
FLAGS = (
    "-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-w",
)  # fmt: skip
#: Instruction sets beyond the machine type's baseline, with the compiler flags of each.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    }
}


def find_compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or the first of g++, c++ and clang++ on the path."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def build(target: Path, compiler: str) -> Path:
    """Compile every variant and link them into ``target`` / libdougong_cpu.so.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its output is on stderr.
    """
    machine = platform.machine().lower().replace("amd64", "x86_64")
    variants = VARIANTS.get(machine, {})
    have = tuple(f"-DDG_HAVE_{name.upper()}" for name in variants)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[tuple[str, str, tuple[str, ...]]] = [("pool", "pool.cpp", ()), ("dispatch", "dispatch.cpp", have)]
        for name, flags in {"base": (), **variants}.items():
            for part in ("attention", "linear", "ops"):
                jobs.append((f"{part}_{name}", f"{part}.cpp", (*flags, f"-DDG_ISA={name}")))

        def compile_one(job: tuple[str, str, tuple[str, ...]]) -> str:
            label, source, flags = job
            made = str(Path(folder) / f"{label}.o")
            command = [*compiler.split(), *FLAGS, *flags, "-c", str(SOURCES / source), "-o", made]
            subprocess.run(command, check=True)
            return made

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, jobs))
        made = Path(folder) / NAME
        subprocess.run([*compiler.split(), "-shared", "-pthread", *objects, "-o", str(made)], check=True)
        # Replaced, not overwritten: a process that has the old library mapped keeps it.
        staged = target / f".{NAME}.{os.getpid()}"
        shutil.copyfile(made, staged)
        staged.replace(target / NAME)
    return target / NAME


def main() -> int:
    compiler = find_compiler()
    if compiler is None:
        print("no C++ compiler found; install g++", file=sys.stderr)
        return 1
    print(build(SOURCES, compiler))
    return 0


if __name__ == "__main__":
    sys.exit(main())
