"""A mixture of experts: each token passes a few of many feed-forward blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from dougong.errors import ConfigError, ModelLoadError
from dougong.models.build import Builder
from dougong.models.context import StepContext
from dougong.models.layers.linear import Linear, Piece, own
from dougong.models.layers.mlp import activation_op
from dougong.models.weights import WeightSource, WeightSpec

__all__ = ["MoE"]

Activation = Callable[[torch.Tensor], torch.Tensor]


class MoE:
    """x [T, E] -> sum over the chosen experts of weight · down(act(gate(x)) · up(x)).

    Routing is transformers': softmax over all experts in float32, the best ``k``, and their weights normalised to one
    where ``normalize`` says so. Every rank holds a share of each expert. ``round_weights``: the weights are rounded to
    the model's dtype before use.
    """

    def __init__(
        self,
        build: Builder,
        prefix: str,
        *,
        intermediate: int,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        normalize: bool = True,
        round_weights: bool = False,
    ) -> None:
        config = build.config
        if intermediate % build.size:
            raise ConfigError(
                f"tensor_parallel_size={build.size}: experts of {intermediate} features cannot be divided so; take a "
                "divisor."
            )
        self.top_k, self.num_experts = config.experts_per_token, config.num_experts
        if not 1 <= self.top_k <= self.num_experts:
            raise ModelLoadError(f"config.json routes to {self.top_k} of {self.num_experts} experts.")
        self._normalize, self._round_weights = normalize, round_weights
        self._router = WeightSpec(f"{prefix}.gate.weight", (self.num_experts, config.hidden_size))
        self._router_weight: torch.Tensor = torch.empty(0)
        self._device, self._dtype = build.device, build.dtype
        self._op = activation_op(config.activation)
        self._all_reduce = build.collectives.all_reduce if build.size > 1 else None
        kind = StackedExperts if build.weight_format.linear == "dense" else PackedExperts
        self.experts: StackedExperts | PackedExperts = kind(
            build,
            [tuple(f"{prefix}.experts.{index}.{name}.weight" for name in names) for index in range(self.num_experts)],
            intermediate,
        )

    def weights(self) -> Iterator[WeightSpec]:
        yield self._router
        yield from self.experts.weights()

    def load(self, source: WeightSource) -> None:
        self._router_weight = own(source.read(self._router), self._device, self._dtype)
        self.experts.load(source)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [T, k] float, experts [T, k] int64)."""
        scores = F.softmax(F.linear(x, self._router_weight), dim=-1, dtype=torch.float32)
        weights, chosen = torch.topk(scores, self.top_k, dim=-1)
        if self._normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype) if self._round_weights else weights, chosen

    def __call__(self, x: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        weights, chosen = self.route(x)
        # Rows (token, choice) sorted by expert, so that an expert's rows lie together.
        order = chosen.flatten().argsort(stable=True)
        rows = x[order // self.top_k]
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, chosen.flatten(), torch.ones_like(order))
        y = self.experts(rows, counts, getattr(ctx.ops, self._op))
        # Back in the order (token, choice): the sum over a token's choices has a fixed order on every device.
        back = torch.empty_like(y)
        back[order] = y
        out = (back.view(x.shape[0], self.top_k, -1) * weights[..., None]).sum(1).to(x.dtype)
        return out if self._all_reduce is None else self._all_reduce(out)


class StackedExperts:
    """All experts' matrices in two tensors, multiplied group by group without asking the host how large groups are."""

    def __init__(self, build: Builder, names: list[tuple[str, ...]], intermediate: int) -> None:
        hidden = build.config.hidden_size
        self.part = build.share(intermediate)
        width = self.part.stop - self.part.start
        self.specs = [_specs(one, intermediate, hidden) for one in names]
        self.gate_up = torch.empty((len(names), 2 * width, hidden), dtype=build.dtype, device=build.device)
        self.down = torch.empty((len(names), hidden, width), dtype=build.dtype, device=build.device)

    def weights(self) -> Iterator[WeightSpec]:
        for specs in self.specs:
            yield from specs

    def load(self, source: WeightSource) -> None:
        width = self.part.stop - self.part.start
        for index, (gate, up, down) in enumerate(self.specs):
            self.gate_up[index, :width].copy_(source.read(gate, self.part))
            self.gate_up[index, width:].copy_(source.read(up, self.part))
            self.down[index].copy_(source.read(down, columns=self.part))

    def __call__(self, rows: torch.Tensor, counts: torch.Tensor, activation: Activation) -> torch.Tensor:
        """rows [M, E] sorted by expert, counts [X] int64 -> [M, E]."""
        ends = counts.cumsum(0).to(torch.int32)
        inner = activation(F.grouped_mm(rows, self.gate_up.transpose(1, 2), offs=ends))
        return F.grouped_mm(inner, self.down.transpose(1, 2), offs=ends)


class PackedExperts:
    """Experts in few bits: a product each, for those that have rows. The host learns the groups' sizes, so a step with
    these cannot be captured."""

    def __init__(self, build: Builder, names: list[tuple[str, ...]], intermediate: int) -> None:
        hidden = build.config.hidden_size
        part = build.share(intermediate)
        width = part.stop - part.start
        self.pairs = []
        for one in names:
            gate, up, down = _specs(one, intermediate, hidden)
            first = Linear(build, [Piece(gate, rows=part), Piece(up, rows=part)], hidden, 2 * width)
            self.pairs.append((first, Linear(build, [Piece(down, columns=part)], width, hidden)))

    def weights(self) -> Iterator[WeightSpec]:
        for pair in self.pairs:
            for linear in pair:
                yield from linear.weights()

    def load(self, source: WeightSource) -> None:
        for pair in self.pairs:
            for linear in pair:
                linear.load(source)

    def __call__(self, rows: torch.Tensor, counts: torch.Tensor, activation: Activation) -> torch.Tensor:
        """As StackedExperts."""
        parts = rows.split(counts.tolist())
        done = [down(activation(gate_up(part))) for part, (gate_up, down) in zip(parts, self.pairs) if part.shape[0]]
        return torch.cat(done)


def _specs(names: tuple[str, ...], intermediate: int, hidden: int) -> tuple[WeightSpec, WeightSpec, WeightSpec]:
    gate, up, down = names
    wide = (intermediate, hidden)
    return WeightSpec(gate, wide), WeightSpec(up, wide), WeightSpec(down, (hidden, intermediate))
