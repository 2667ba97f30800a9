"""Weights from a GGUF file: 4-bit blocks keep their bits where a layer wants 4 bits, anything else is widened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dougong.errors import ModelLoadError
from dougong.hal import QuantizedWeight
from dougong.models.loading.gguf_file import GGUFFile, GGUFTensor
from dougong.models.loading.gguf_names import ROPE_FACTORS, architecture_of, config_dict
from dougong.models.quantization import take_rows
from dougong.models.weights import ALL, WeightSource, WeightSpec

__all__ = ["GGUFWeights"]

_F32, _F16, _Q4_0, _Q4_1, _Q8_0, _BF16 = 0, 1, 2, 3, 8, 30
_GROUP = 32


class GGUFWeights(WeightSource):
    """A GGUF file under transformers' names.

    Raises:
        ModelLoadError: it cannot be read, or a tensor has a name that is not known.
        UnsupportedModelError: its architecture is not read from GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.description = str(path)
        self.file = GGUFFile(path)
        self.architecture = architecture_of(self.file.metadata, path)
        self._tensors: dict[str, GGUFTensor] = {}
        for name, tensor in self.file.tensors.items():
            target = self.architecture.transformers_name(name)
            if target is not None:
                self._tensors[target] = tensor

    def config(self) -> dict[str, Any]:
        """config.json's content.

        Raises:
            ModelLoadError: the metadata or the embedding is missing.
        """
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise ModelLoadError(
                f"{self.description} holds no token embedding (token_embd.weight); is it a whole model?"
            )
        return config_dict(
            self.file.metadata,
            self.description,
            tied="lm_head.weight" not in self._tensors,
            vocab_size=embedding.shape[0],
            rope_factors={
                name: self._widen(tensor).flatten().tolist()
                for name, tensor in self.file.tensors.items()
                if name in ROPE_FACTORS
            },
        )

    def shapes(self) -> Mapping[str, Sequence[int]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, spec: WeightSpec, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        tensor = self._tensors[spec.name]
        values = self._widen(tensor)
        if self._is_permuted(spec.name):
            values = values[self._order(tensor, spec.name)]
        if self.architecture.norm_plus_one and spec.name.endswith("norm.weight"):
            values = values - 1
        values = values[rows]
        return values if columns == ALL else values[:, columns]

    def read_quantized(self, spec: WeightSpec) -> QuantizedWeight | None:
        tensor = self._tensors[spec.name]
        if tensor.type not in (_Q4_0, _Q4_1) or len(tensor.shape) != 2:
            return None
        weight = self._blocks(tensor)
        return take_rows(weight, self._order(tensor, spec.name)) if self._is_permuted(spec.name) else weight

    def _widen(self, tensor: GGUFTensor) -> torch.Tensor:
        raw = self.file.bytes_of(tensor)
        plain = {_F32: torch.float32, _F16: torch.float16, _BF16: torch.bfloat16}.get(tensor.type)
        if plain is not None:
            return torch.from_numpy(raw.copy()).view(plain).reshape(tensor.shape)
        if tensor.type in (_Q4_0, _Q4_1) and len(tensor.shape) == 2:
            return self._blocks(tensor).dequantize()
        if tensor.type == _Q8_0:
            blocks = torch.from_numpy(raw.copy()).view(-1, 2 + _GROUP)
            scale = blocks[:, :2].contiguous().view(torch.float16).float()
            return (blocks[:, 2:].view(torch.int8).float() * scale).reshape(tensor.shape)
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            wide = dequantize(raw.reshape(*tensor.shape[:-1], -1), GGMLQuantizationType(tensor.type))
        except NotImplementedError as error:
            raise ModelLoadError(f"{self.description}: tensor {tensor.name!r} cannot be widened: {error}.") from error
        return torch.from_numpy(np.ascontiguousarray(wide)).reshape(tensor.shape)

    def _blocks(self, tensor: GGUFTensor) -> QuantizedWeight:
        """Blocks of 32 as they are: Q4_1 is scale and minimum, Q4_0 a scale and the minimum -8 times it.

        A block's byte j holds elements j (low nibble) and j+16 (high); ours holds elements 2j and 2j+1.
        """
        count, columns = tensor.shape
        head = 4 if tensor.type == _Q4_1 else 2
        blocks = torch.from_numpy(self.file.bytes_of(tensor).copy()).view(count, columns // _GROUP, head + _GROUP // 2)
        halves = blocks[..., :head].contiguous().view(torch.float16)
        scale = halves[..., 0].contiguous()
        # -8·d is exact in half precision unless it overflows, and d is far from that.
        minimum = halves[..., 1].contiguous() if tensor.type == _Q4_1 else scale * -8
        nibbles = blocks[..., head:]
        values = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
        packed = values[..., 0::2] | (values[..., 1::2] << 4)
        return QuantizedWeight("int4", packed.reshape(count, columns // 2), scale, minimum, _GROUP, (count, columns))

    def _is_permuted(self, name: str) -> bool:
        return self.architecture.permuted and (".q_proj." in name or ".k_proj." in name)

    def _order(self, tensor: GGUFTensor, name: str) -> torch.Tensor:
        """Where each row of the checkpoint's matrix lies: within a head, GGUF has rows 0, D/2, 1, D/2+1 …"""
        arch = self.file.metadata["general.architecture"]
        heads = self.file.metadata[f"{arch}.attention.head_count"]
        if ".k_proj." in name:
            heads = self.file.metadata.get(f"{arch}.attention.head_count_kv", heads)
        rows = tensor.shape[0]
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise ModelLoadError(
                f"{self.description} is corrupt: {rows} rows of tensor {tensor.name!r} are no {heads!r} heads."
            )
        return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)
