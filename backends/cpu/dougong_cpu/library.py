"""Loading the C++ library and choosing its instruction set."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from dougong_cpu._abi import STRUCTS

__all__ = ["ENV_ISA", "LIBRARY", "NOT_BUILT", "Library", "available", "load", "unavailable_reason"]

ENV_ISA = "DOUGONG_CPU_ISA"
LIBRARY = Path(__file__).parent / "native" / "libdougong_cpu.so"
NOT_BUILT = (
    "native library not built: no C++ compiler found at install; install g++ and reinstall dougong-cpu "
    "(or run python -m dougong_cpu.build)"
)

_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float}
_SIGNATURES = {
    "attention": "p", "write": "p", "rope": "p", "norm": "p", "linear": "p",
    "attend": "pppppllll",
    "store": "ppppillll",
    "qkv": "ppppili",
    "rms": "ppppiilllffii",
    "gated": "plpliiii",
    "argmax": "plpili",
    "product": "pppili",
}  # fmt: skip


class Library:
    """The loaded library: its functions as ctypes callables that take the address of a struct.

    ``isa`` is the variant in use. ``variants`` maps each variant in the library to whether this machine runs it.
    """

    attention: Callable[[int], None]
    write: Callable[[int], None]
    rope: Callable[[int], None]
    norm: Callable[[int], None]
    linear: Callable[[int], None]
    attend: Callable[..., None]
    store: Callable[..., None]
    qkv: Callable[..., None]
    rms: Callable[..., None]
    gated: Callable[..., None]
    argmax: Callable[..., None]
    product: Callable[..., None]

    def __init__(self, path: Path) -> None:
        lib = ctypes.CDLL(str(path))
        lib.dg_sizeof.restype = ctypes.c_int64
        for index, struct in enumerate(STRUCTS):
            if lib.dg_sizeof(index) != ctypes.sizeof(struct):
                raise OSError(
                    f"{path}: built from other sources than this package ({struct.__name__} is "
                    f"{lib.dg_sizeof(index)} bytes there, {ctypes.sizeof(struct)} here). "
                    "Run python -m dougong_cpu.build."
                )
        self.path = path
        self._lib = lib
        lib.dg_variant.restype = lib.dg_select.restype = ctypes.c_char_p
        lib.dg_select.argtypes = [ctypes.c_char_p]
        self.variants: dict[str, bool] = {}
        usable = ctypes.c_int32()
        while name := lib.dg_variant(len(self.variants), ctypes.byref(usable)):
            self.variants[name.decode()] = bool(usable.value)
        for name, arguments in _SIGNATURES.items():
            call = getattr(lib, f"dg_{name}")
            call.argtypes = [_KINDS[kind] for kind in arguments]
            call.restype = None
            setattr(self, name, call)
        self.isa = ""
        self.select(os.environ.get(ENV_ISA) or None)

    def select(self, isa: str | None) -> None:
        """Use a variant from now on; None takes the best this machine runs.

        Raises:
            ValueError: the library lacks it or this machine cannot run it.
        """
        chosen = self._lib.dg_select(isa.encode() if isa else None)
        if chosen is None:
            able = ", ".join(name for name, usable in self.variants.items() if usable)
            raise ValueError(f"{ENV_ISA}={isa!r}: this machine runs {able}")
        self.isa = chosen.decode()


@lru_cache(maxsize=1)
def load() -> Library:
    """The library, loaded once.

    Raises:
        OSError: it is not built, or does not fit this package.
    """
    path = Path(os.environ.get("DOUGONG_CPU_LIBRARY") or LIBRARY)
    if not path.exists():
        raise OSError(NOT_BUILT)
    return Library(path)


@lru_cache(maxsize=1)
def unavailable_reason() -> str:
    """Why the library cannot be used, '' if it can."""
    try:
        load()
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def available() -> bool:
    return not unavailable_reason()
