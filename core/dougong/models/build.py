"""What layers are made with: the device, the formats, this rank's share, and kernels chosen once."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dougong.hal import Backend, Choice, Collectives, LinearKernel, LinearQuery, RopeTable, SingleRank
from dougong.models.config import ModelConfig
from dougong.models.layers.rope import rope_table
from dougong.models.quantization import WeightFormat, find_format

__all__ = ["Builder"]


class Builder:
    """Handed to every layer's constructor; not kept after the model is built.

    rank, size   this rank's place among those that share the model
    max_len      longest sequence the engine will run; rope tables have that many rows
    choices      ``linear`` products by format, as chosen for the device
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: Backend,
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        weight_format: WeightFormat | None = None,
        collectives: Collectives | None = None,
        max_len: int | None = None,
        providers: Mapping[str, str] | None = None,
    ) -> None:
        self.config = config
        self.backend = backend
        self.device: torch.device = backend.device.torch_device
        self.dtype = dtype
        self.weight_format = find_format(None) if weight_format is None else weight_format
        self.collectives = SingleRank() if collectives is None else collectives
        self.rank, self.size = self.collectives.rank, self.collectives.size
        self.max_len = config.max_positions if max_len is None else max_len
        self.specs = config.attention_specs(dtype, kv_dtype, size=self.size)
        self.choices: dict[str, Choice] = {}
        self._providers = providers or {}
        self._kernels: dict[LinearQuery, LinearKernel] = {}
        self._ropes: dict[str, RopeTable] = {}

    def linear_kernel(self, in_features: int, out_features: int, format: str) -> LinearKernel:
        """The product for such a matrix; layers alike share it.

        Raises:
            KernelSelectionError: none can; each reason is listed.
        """
        query = LinearQuery(
            in_features=in_features,
            out_features=out_features,
            dtype=self.dtype,
            format=format,
            group_size=self.weight_format.group_size,
        )
        kernel = self._kernels.get(query)
        if kernel is None:
            choice = self.backend.choose_linear(query, self._providers.get("linear"))
            self.choices.setdefault(f"linear ({format})", choice)
            kernel = self._kernels[query] = choice.target(query, self.backend.device)
        return kernel

    def rope(self, key: str) -> RopeTable | None:
        """The table of the config's rope ``key``; layers alike share it. None for ''."""
        if not key:
            return None
        table = self._ropes.get(key)
        if table is None:
            table = self._ropes[key] = rope_table(self.config.ropes[key], self.max_len, self.device)
        return table

    def share(self, total: int) -> slice:
        """This rank's part of ``total`` rows or columns, which the ranks divide evenly."""
        each = total // self.size
        return slice(self.rank * each, (self.rank + 1) * each)
