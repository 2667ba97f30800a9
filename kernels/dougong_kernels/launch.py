"""Launching a compiled Triton kernel again without its just-in-time front end, which costs tens of microseconds."""

from __future__ import annotations

from collections.abc import Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

from dougong_kernels.target import interpreted

__all__ = ["Launcher", "aligned", "signature"]


def aligned(*tensors: torch.Tensor | None) -> int:
    """Bit i: tensor i is missing or starts at a multiple of 16 bytes (the compiler assumes it of the first call's)."""
    bits = 0
    for at, tensor in enumerate(tensors):
        if tensor is None or tensor.data_ptr() % 16 == 0:
            bits |= 1 << at
    return bits


def signature(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """What the compiler specialises on of these arguments: their dtypes (None: missing), and which are aligned."""
    return aligned(*tensors), *(None if tensor is None else tensor.dtype for tensor in tensors)


@lru_cache(maxsize=1)
def _compilers() -> ThreadPoolExecutor:
    # The compiler's passes and the assembler run outside Python's lock.
    return ThreadPoolExecutor(4, thread_name_prefix="dougong-compile")


class Launcher:
    """A kernel and what it was compiled to, by key.

    The caller's key must hold all that the compiler specialises on: constexprs, dtypes, whether pointers are aligned
    (``aligned``) and the integers that are not in ``do_not_specialize`` (strides). Arguments are positional and
    complete, constexprs included.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Hashable, Any] = {}
        self.ahead: dict[Hashable, Future[Any]] = {}
        self.interpreted = interpreted()

    def compile_ahead(
        self, constants: Hashable, device: torch.device, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """Start to compile in another thread what a launch with these arguments will need.

        args as a launch takes them, tensors as their dtypes. A wrong guess costs processor time and nothing else: the
        launch then compiles what it needs itself. ``constants`` is what the launch's key begins with.
        """
        if self.interpreted or device.type == "cpu" or constants in self.ahead:
            return

        def work() -> None:
            with torch.get_device_module(device.type).device(device):
                self.kernel.warmup(*args, grid=(1,), **options)

        self.ahead[constants] = _compilers().submit(work)

    def __call__(
        self, key: Hashable, grid: tuple[int, int, int], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[grid](*args)
            return
        ahead = self.ahead.get(key[0]) if isinstance(key, tuple) else None
        if ahead is not None:
            ahead.exception()  # waits; what went wrong there comes again here, where it can be raised
        compiled = self.kernel[grid](*args, **options)
        if not self.interpreted and compiled is not None:
            self.compiled[key] = compiled
