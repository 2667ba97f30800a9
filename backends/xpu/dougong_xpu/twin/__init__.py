"""The XPU twin: this backend's own code on the operator schemas of Intel's libraries, with the CPU's arithmetic.

``install(library)`` makes one of the libraries importable in this process, without an Intel GPU: its functions with
their signatures, its operators with their schemas, the rules that its own checks and documents state, and plain torch
behind them on a simulated device (package dougong-sim) of type ``xputwin``. What the library refuses, it refuses
(``TwinRefusal``). The operators also have shape functions, so that calls can be checked on fake ``xpu:0`` tensors.
"""

from __future__ import annotations

import os

from dougong_xpu.twin.refusal import TwinRefusal

__all__ = ["DEVICE_TYPE", "LIBRARY_VARIABLE", "TwinRefusal", "install"]

DEVICE_TYPE = "xputwin"
#: Which library ``install()`` without an argument stands for: vllm (default), sgl or ipex.
LIBRARY_VARIABLE = "DOUGONG_XPU_TWIN"


def install(library: str | None = None, *, device: bool = True) -> None:
    """Become the twin of one library; a second call for the same does nothing. A process may be the twin of several.

    ``device`` False leaves the simulated device out, for checks on fake tensors alone.

    Raises:
        ConfigError: no such library.
        RuntimeError: the process has the real one.
        PluginLoadError: this process's simulated device has another name already, or cannot be built.
    """
    from dougong_xpu.twin.installation import install as run

    run(library or os.environ.get(LIBRARY_VARIABLE, "vllm"), device)
