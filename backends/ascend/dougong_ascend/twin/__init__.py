"""The Ascend twin: this backend's own code on the SDK's real operator schemas, with the CPU's arithmetic behind them.

``install()`` makes ``torch.npu`` and ``torch_npu`` exist in this process, without CANN and without an NPU: a simulated
device (package dougong-sim) under the name ``npu``; the schemas and shape functions of torch-npu's wheel, whose text
files are fetched once; the rules that the shape functions miss, written here from the operator documents in that
wheel; and plain torch for the arithmetic. What the device refuses, it refuses (``TwinRefusal``); what the documents
leave open, it refuses too.
"""

from __future__ import annotations

from dougong_ascend.twin.refusal import TwinRefusal
from dougong_ascend.twin.wheel import WheelMissing

__all__ = ["TwinRefusal", "WheelMissing", "install"]


def install() -> None:
    """Become the twin, once per process. A second call does nothing.

    Raises:
        WheelMissing: torch-npu's wheel is not in the cache and cannot be fetched.
        PluginLoadError: this process's simulated device has another name already, or cannot be built.
        RuntimeError: the real torch_npu is imported in this process.
    """
    from dougong_ascend.twin.installation import install as run

    run()
