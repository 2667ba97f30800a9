"""An attention kernel for another framework's tensors: the best one for their device, made in one call."""

from __future__ import annotations

from functools import cache

import torch

from dougong.errors import BackendNotFoundError
from dougong.hal.attention import AttentionKernel, AttentionQuery
from dougong.hal.attention_spec import AttentionSpec
from dougong.hal.backend import Backend, find_backends, open_backend, resolve_target_of
from dougong.hal.group import KVGroup, Limits
from dougong.hal.layout import NHD, KVLayout
from dougong.plugins import KernelSpec, load_plugins

__all__ = ["attention_kernel", "backend_for"]


def backend_for(device: torch.device) -> Backend:
    """The best backend for torch's device of that type that can run here; opened once per process.

    Raises:
        BackendNotFoundError: there is none; the message lists what was found.
        PluginError: a plugin cannot be used.
    """
    return _backend_for(device.type, device.index or 0)


@cache
def _backend_for(device_type: str, index: int) -> Backend:
    plugins = load_plugins()
    found = []
    for report in find_backends(plugins):
        if report.probe.ok:
            kind = resolve_target_of(report)
            if kind.type == device_type:
                return open_backend(report.spec.name, index=index, plugins=plugins)
            found.append(f"  - {report.spec.name}: for tensors on {kind.type!r}")
        else:
            found.append(f"  - {report.spec.name}: cannot run here: {report.probe.reason}")
    raise BackendNotFoundError(
        f"no backend for tensors on {device_type!r}. Found:\n" + ("\n".join(found) or "  none") + "\n"
        f"Install one: pip install dougong-{device_type}."
    )


def attention_kernel(
    spec: AttentionSpec,
    *,
    block_size: int,
    limits: Limits,
    device: torch.device,
    layout: KVLayout = NHD,
    ragged: bool = False,
    strided: bool = True,
) -> tuple[AttentionKernel, KernelSpec]:
    """The kernel for one kind of attention layer, as group 0 of its batches, and what it declares of itself.

    Args:
        block_size: tokens in a block of the paged cache.
        limits: the largest batch it will be given.
        ragged: K and V come without a cache; ``block_size`` then means nothing.
        strided: the cache's planes may have gaps or swapped axes. Where they have none, say so: more kernels qualify.

    Raises:
        KernelSelectionError: none can do it; each one's reason is listed.
        BackendNotFoundError, PluginError: as `backend_for`.
    """
    backend = backend_for(device)
    query = AttentionQuery(
        spec=spec, layout=layout, block_size=block_size, ragged=ragged, strided=strided and not ragged,
        max_kv_len=limits.max_kv_len,
    )  # fmt: skip
    choice = backend.choose_attention(query)
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=layout, manager_block=block_size, kernel_block=block_size)
    kernel: AttentionKernel = choice.target(spec, group, limits, backend.device)
    return kernel, choice.spec
