"""The twin as a backend, ``ascend-twin``: for ``--plugin dougong_ascend.twin.plugin`` and for tests.

Its device is the backend's own ``AscendDevice``; only the probe differs.
"""

from __future__ import annotations

from importlib.util import find_spec

from dougong.plugins import BackendSpec, Probe, hookimpl
from dougong_ascend import CONTRACT

__all__ = ["dougong_backends", "probe"]


def probe() -> Probe:
    """Whether the simulated device is installed; the wheel is fetched when the backend is opened."""
    if find_spec("dougong_sim") is None:
        return Probe(ok=False, reason="dougong-sim is not installed", remedy="pip install dougong-sim")
    return Probe(ok=True, reason="torch-npu's schemas with the CPU's arithmetic", devices=("npu:0 (twin)",))


@hookimpl
def dougong_backends() -> list[BackendSpec]:
    return [
        BackendSpec(
            name="ascend-twin",
            abi=CONTRACT,
            target="dougong_ascend.twin.opening:AscendDevice",
            probe=probe,
            score=-100,
            description="Ascend's operators by their schemas and rules, on the CPU",
        )
    ]
