"""Host memory with an edge: lazily committed giants, and tensors that end where the readable world ends."""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import lru_cache
from typing import Any

import torch

__all__ = ["guard_pages_work", "lazy_bytes", "trapped_copy"]

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_PAGE = mmap.PAGESIZE


def lazy_bytes(size: int) -> torch.Tensor:
    """``size`` bytes of zeros that take memory only where they are touched; freed with the tensor.

    Raises:
        OSError: the address space or the overcommit policy does not allow it.
    """
    if not guard_pages_work():
        raise OSError("this platform has no memory that is taken only where it is touched")
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    return torch.frombuffer(region, dtype=torch.uint8)


@lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def guard_pages_work() -> bool:
    """Whether this platform can take a page's access away."""
    return os.name == "posix" and hasattr(mmap, "MAP_ANONYMOUS")


def trapped_copy(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of ``x`` (host memory) whose last byte lies directly before a page that cannot be touched.

    A read or write past its end kills the process, which the parent sees as CRASH. Where the platform has no such pages
    it is a plain copy.
    """
    if not guard_pages_work():
        return x.clone(memory_format=torch.contiguous_format)
    count = x.numel() * x.element_size()
    inside = -(-max(count, 1) // _PAGE) * _PAGE
    region = mmap.mmap(-1, inside + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(region))
    if _libc().mprotect(base + inside, _PAGE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    whole = torch.frombuffer(region, dtype=torch.uint8, count=inside)
    # dtypes wider than a byte need an aligned start: the page's end is aligned, so the tail is too
    flat = whole[inside - count :].view(x.dtype) if count else torch.empty(0, dtype=x.dtype)
    out = flat.reshape(x.shape)
    if count:
        out.copy_(x)
    return out
