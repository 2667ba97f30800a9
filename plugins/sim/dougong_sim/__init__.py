"""The simulated accelerator's hooks: what the core learns at start-up.

This module and its probe are import-light: no torch, no extension, no compiler run. Classes are named by string and
imported only when this backend is opened (``DOUGONG_BACKEND=sim``). A new vendor's package begins as a copy of this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dougong.plugins import BackendSpec, KernelSpec, Probe, hookimpl

__version__ = "0.1.0"

#: The contract this package was written for: a literal, so that a newer core can tell. Never import the core's own.
CONTRACT = (1, 0)


def probe() -> Probe:
    """Whether the extension can be had on this machine: a supported torch, and a compiler or an earlier build."""
    from dougong_sim.build import obstacle
    from dougong_sim.settings import read_settings

    reason, remedy = obstacle()
    if reason:
        return Probe(ok=False, reason=reason, remedy=remedy)
    settings = read_settings()
    devices = tuple(f"sim:{index} ({settings.memory / 2**30:.1f} GiB)" for index in range(settings.devices))
    return Probe(ok=True, reason="host memory and the CPU's kernels behind a device of its own", devices=devices)


@hookimpl
def dougong_backends() -> Iterable[BackendSpec]:
    return [
        BackendSpec(
            name="sim",
            abi=CONTRACT,
            target="dougong_sim.device:SimDevice",
            probe=probe,
            score=-100,  # never chosen unless asked for
            description="simulated accelerator, for tests and as a template",
        )
    ]


@hookimpl
def dougong_kernels(device: Any, backend: str) -> Iterable[KernelSpec]:
    if backend != "sim":
        return []
    return [
        KernelSpec(
            op="attention",
            provider="sim",
            abi=CONTRACT,
            target="dougong_sim.attention:SimAttention",
            features=frozenset({"window", "softcap", "alibi", "sinks", "lse", "noncausal", "dv", "strided"}),
            layouts=("nhd",),
            graph="update",  # host lengths are baked into a graph: update_graph before each replay
            needs_host_lengths=True,
        )
    ]
