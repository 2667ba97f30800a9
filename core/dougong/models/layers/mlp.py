"""The gated feed-forward block."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dougong.errors import UnsupportedModelError
from dougong.models.build import Builder
from dougong.models.context import StepContext
from dougong.models.layers.linear import Linear, column_linear, row_linear
from dougong.models.weights import WeightSource, WeightSpec

__all__ = ["ACTIVATIONS", "MLP", "activation_op"]

#: Activations by their names in config.json -> the op over a packed [gate, up] row.
ACTIVATIONS = {
    "silu": "silu_mul",
    "swish": "silu_mul",
    "gelu_pytorch_tanh": "gelu_tanh_mul",
    "gelu_tanh": "gelu_tanh_mul",
    "gelu_new": "gelu_tanh_mul",
}


def activation_op(name: str) -> str:
    """The op table's name for a gated activation.

    Raises:
        UnsupportedModelError: there is no such op.
    """
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise UnsupportedModelError(
            f"activation {name!r}: gated ones known here are {', '.join(ACTIVATIONS)}."
        ) from None


class MLP:
    """x [T, E] -> down(act(gate(x)) * up(x)) [T, E]; gate and up are one product."""

    def __init__(
        self,
        build: Builder,
        prefix: str,
        *,
        intermediate: int | None = None,
        gate_up: Linear | None = None,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        config = build.config
        inner = config.intermediate_size if intermediate is None else intermediate
        gate, up, down = (f"{prefix}.{name}" for name in names)
        bias = config.mlp_bias
        self.gate_up = gate_up or column_linear(build, (gate, up), config.hidden_size, (inner, inner), bias=bias)
        self.down = row_linear(build, down, inner, config.hidden_size, bias=bias)
        self._op = activation_op(config.activation)

    def weights(self) -> Iterator[WeightSpec]:
        yield from self.gate_up.weights()
        yield from self.down.weights()

    def load(self, source: WeightSource) -> None:
        self.gate_up.load(source)
        self.down.load(source)

    def __call__(self, x: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        return self.down(getattr(ctx.ops, self._op)(self.gate_up(x)))
