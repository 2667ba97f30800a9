"""Blocks of the KV cache as plain bytes on the host, and back: what leaves an engine depends on no layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dougong.execution.transfer import HostCopies, Transfer
from dougong.hal import KVGroup, dtype_name
from dougong.models import StepContext
from dougong.plugins import KVGroupFormat

__all__ = ["KVBlocks"]


class KVBlocks:
    """Reads and writes runs of manager blocks, in the device's order with the steps around them.

    The bytes of a run are token-major within a layer, as `dougong.plugins.KVGroupFormat` says: whatever a backend's
    layout, tiles or padding, they are the same. Values move as stored: no conversion, no scale.
    """

    def __init__(self, groups: Sequence[KVGroup], context: StepContext, transfer: Transfer) -> None:
        self._groups = groups
        self._context = context  # not its caches: they go when the runner is closed
        self._transfer = transfer

    def formats(self) -> tuple[KVGroupFormat, ...]:
        """By group: what a token's bytes are."""
        return tuple(
            KVGroupFormat(
                layers=group.owners, heads=group.spec.num_kv_heads, dim=group.spec.head_dim,
                dim_v=group.spec.head_dim_v, dtype=dtype_name(group.spec.kv_dtype), latent=group.spec.latent,
                window=group.spec.window,
            )
            for group in self._groups
        )  # fmt: skip

    def bytes_per_token(self, group: int) -> int:
        spec = self._groups[group].spec
        width = spec.head_dim + (0 if spec.latent else spec.head_dim_v)
        return spec.num_kv_heads * width * spec.kv_dtype.itemsize * len(self._groups[group].owners)

    @torch.inference_mode()
    def read(self, group: int, runs: Sequence[Sequence[int]]) -> HostCopies:
        """Start to copy runs of equally many blocks to the host: one tensor [runs, bytes] uint8 will arrive."""
        one = self._groups[group]
        slots = self._slots(one, runs)
        parts: list[torch.Tensor] = []
        for layer in one.owners:
            k, v = self._context.caches[layer].read(slots)
            parts.append(k.reshape(len(runs), -1))
            if not one.spec.latent:
                parts.append(v.reshape(len(runs), -1))
        whole = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        return self._transfer.to_host([whole], aside=False)

    @torch.inference_mode()
    def write(self, group: int, runs: Sequence[Sequence[int]], blocks: Sequence[bytes]) -> None:
        """Fill runs of equally many blocks with what `read` gave, here or elsewhere. Nothing else changes."""
        one = self._groups[group]
        spec = one.spec
        slots = self._slots(one, runs)
        host = torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.uint8).view(len(runs), -1)
        data = self._transfer.to_device(host.numpy())
        tokens = slots.numel() // len(runs)
        k_size = tokens * spec.num_kv_heads * spec.head_dim * spec.kv_dtype.itemsize
        v_size = 0 if spec.latent else tokens * spec.num_kv_heads * spec.head_dim_v * spec.kv_dtype.itemsize
        at = 0
        for layer in one.owners:
            k = self._values(data[:, at : at + k_size], one, spec.head_dim)
            at += k_size
            v = k[..., : spec.head_dim_v]
            if v_size:
                v = self._values(data[:, at : at + v_size], one, spec.head_dim_v)
                at += v_size
            self._context.caches[layer].write(slots, k, v)

    @staticmethod
    def _values(data: torch.Tensor, group: KVGroup, dim: int) -> torch.Tensor:
        return data.contiguous().view(group.spec.kv_dtype).reshape(-1, group.spec.num_kv_heads, dim)

    def _slots(self, group: KVGroup, runs: Sequence[Sequence[int]]) -> torch.Tensor:
        """[tokens of all runs] int64 on the device. A manager block's slots are its kernel blocks' in order."""
        size = group.manager_block
        blocks = torch.tensor(runs, dtype=torch.int64).flatten()
        slots = (blocks[:, None] * size + torch.arange(size)).flatten()
        return self._transfer.to_device(slots.numpy())
