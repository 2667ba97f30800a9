"""Builds the C++ library while installing. Without a compiler the install succeeds without it; ``doctor`` says so."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = Path(__file__).parent / "dougong_cpu"
_spec = importlib.util.spec_from_file_location("dougong_cpu_build", PACKAGE / "build.py")
assert _spec is not None and _spec.loader is not None
native = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native)


class BuildWithLibrary(build_py):
    """Put the library beside its sources: in the build folder, or in place for an editable install."""

    def run(self) -> None:
        super().run()
        target = PACKAGE if self.editable_mode else Path(self.build_lib) / "dougong_cpu"
        compiler = native.find_compiler()
        if compiler is None:
            print("dougong-cpu: no C++ compiler found; installing without the native library", file=sys.stderr)
            return
        try:
            native.build(target / "native", compiler)
        except subprocess.CalledProcessError as error:
            print(f"dougong-cpu: {error}; installing without the native library", file=sys.stderr)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs: list[str] = super().get_outputs(include_bytecode)
        library = Path(self.build_lib) / "dougong_cpu" / "native" / native.NAME
        return [*outputs, str(library)] if library.exists() else outputs


class PlatformWheel(bdist_wheel):
    """The library needs no particular Python, only this kind of machine."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, machine = super().get_tag()
        return "py3", "none", machine


class WithLibrary(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(distclass=WithLibrary, cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel})
