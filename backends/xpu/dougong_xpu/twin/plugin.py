"""The twin as a backend, ``xpu-twin``: for ``--plugin dougong_xpu.twin.plugin`` and for tests.

Its device is the backend's own; only its type's name and the probe differ.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

from dougong.plugins import BackendSpec, Probe, hookimpl
from dougong_xpu import CONTRACT
from dougong_xpu.twin import LIBRARY_VARIABLE

__all__ = ["dougong_backends", "probe"]


def probe() -> Probe:
    """Whether the simulated device is installed."""
    if find_spec("dougong_sim") is None:
        return Probe(ok=False, reason="dougong-sim is not installed", remedy="pip install dougong-sim")
    library = os.environ.get(LIBRARY_VARIABLE, "vllm")
    return Probe(ok=True, reason=f"{library}'s schemas with the CPU's arithmetic", devices=("xpu:0 (twin)",))


@hookimpl
def dougong_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="xpu-twin",
            abi=CONTRACT,
            target="dougong_xpu.twin.opening:TwinDevice",
            probe=probe,
            score=-100,
            description="Intel's attention operators by their schemas and rules, on the CPU",
        )
    ]
