"""Putting a runner together: backend, model, KV groups and kernels, cache, persistent batch, sampler, graphs."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dougong.config import EngineConfig
from dougong.errors import ConfigError
from dougong.execution.graphs import GraphCache, decode_sizes, mixed_sizes, within
from dougong.execution.groups import GroupChoice, form_groups
from dougong.execution.memory import (
    CacheBudget,
    CacheDemand,
    allocate,
    has_meter,
    host_budget,
    metered_budget,
    size_pools,
)
from dougong.execution.parallel import Ranks
from dougong.execution.persistent_batch import PersistentBatch
from dougong.execution.profile import largest_step
from dougong.execution.sampler import Sampler
from dougong.execution.sampling_state import SamplingState
from dougong.execution.transfer import Transfer
from dougong.hal import (
    FUNCTION_OPS,
    AttentionKernel,
    Backend,
    Choice,
    Collectives,
    Device,
    KVGroup,
    LayerCache,
    Limits,
    OpTable,
    Plan,
)
from dougong.kv import GroupSpec
from dougong.models import CausalLM, LoadedModel, StepContext, load_model
from dougong.plugins import Plugins

__all__ = ["RunnerParts", "assemble"]

log = logging.getLogger(__name__)

#: Tokens of a step when the user names none: on hosts and small devices, and where memory is ample.
SMALL_STEP, LARGE_STEP = 2048, 8192
AMPLE_MEMORY = 32 << 30


@dataclass
class RunnerParts:
    """What a runner is made of. ``context`` and its plans serve the steps that run without a graph."""

    backend: Backend
    model: CausalLM
    model_path: Path
    max_model_len: int
    max_num_batched_tokens: int
    choices: dict[str, Choice]
    groups: tuple[KVGroup, ...]
    group_specs: list[GroupSpec]
    context: StepContext
    batch: PersistentBatch
    transfer: Transfer
    state: SamplingState
    sampler: Sampler
    collectives: Collectives
    graphs: GraphCache | None = None
    graph_tables: list[torch.Tensor] = field(default_factory=list)
    """Per group, [rows, W] int32: the gathered block tables that captured forwards read."""

    def new_context(self, plans: list[Plan]) -> StepContext:
        """A context with plans of its own."""
        own = self.context
        return StepContext(own.ops, own.kernels, plans, own.caches, own.collectives)

    def release(self) -> None:
        """Let go of everything that holds device memory."""
        if self.graphs is not None:
            self.graphs.clear()
        self.graph_tables.clear()
        self.context.caches = []
        self.context.plans = []
        self.context.batch = None
        self.context.slots = []
        del self.model
        gc.collect()
        module = self.backend.device.module
        if hasattr(module, "empty_cache"):
            module.empty_cache()


def assemble(
    config: EngineConfig,
    backend: Backend,
    ranks: Ranks,
    *,
    plugins: Plugins | None = None,
    model: LoadedModel | None = None,
) -> RunnerParts:
    """Load, choose, size and allocate, in this order.

    Raises:
        DougongError: whatever stops the start; the message says what to do.
    """
    collectives = ranks.collectives
    _check_providers(config)
    if model is None:
        model = load_model(config, backend, plugins=plugins, collectives=collectives)
    device = backend.device
    with torch.inference_mode():
        step_tokens = _step_tokens(config, device, model.max_len)
        attentions = model.model.attentions
        chosen = form_groups(
            [attention.spec for attention in attentions],
            backend,
            block_size=config.block_size,
            provider=config.attention_provider,
        )
        groups = tuple(one.group for one in chosen)
        for group in groups:
            for layer in group.layers:
                attentions[layer].bind(group.index)
        ops = backend.op_table(model.dtype, groups[0].layout, config.kernel_providers)
        sizes = _graph_sizes(config, device, model.model, chosen, min(step_tokens, model.max_len), collectives)
        demand = CacheDemand(
            max_model_len=model.max_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=step_tokens,
            padding=_largest_padding(*sizes),
            wanted=config.max_model_len is not None,
        )

        def budget() -> CacheBudget:
            if not has_meter(device):
                return host_budget(device, config)

            def step(tokens: int) -> Callable[[], None]:
                return largest_step(
                    model.model, chosen, ops, device, collectives,
                    rows=config.max_num_seqs, tokens=tokens, max_len=demand.max_model_len,
                )  # fmt: skip

            reserve = (device.memory().total // 50) if sizes[0] else 0
            halves = [step_tokens >> i for i in range(1, step_tokens.bit_length())] if ranks.alone else []
            smaller = [tokens for tokens in halves if tokens >= config.max_num_seqs]
            return metered_budget(device, config, step, step_tokens, reserve, smaller=smaller)

        specs, max_len = size_pools(groups, demand, config, budget)
        specs, max_len = _agree(specs, max_len, ranks)
        if max_len < demand.max_model_len:
            log.warning("max_model_len is %d: the KV cache holds no longer request", max_len)
        caches = allocate(device, groups, specs)
        return _finish(config, backend, model, collectives, chosen, ops, sizes, specs, caches, max_len, step_tokens)


def _finish(
    config: EngineConfig,
    backend: Backend,
    model: LoadedModel,
    collectives: Collectives,
    chosen: tuple[GroupChoice, ...],
    ops: OpTable,
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    specs: list[GroupSpec],
    caches: list[LayerCache],
    max_len: int,
    step_tokens: int,
) -> RunnerParts:
    device = backend.device
    groups = tuple(one.group for one in chosen)
    rows = config.max_num_seqs
    # One row may hold all tokens of a padded step, so a graph is no larger than a request.
    sizes = sizes[0], tuple(size for size in sizes[1] if size <= max_len)
    most_tokens = max(step_tokens, *sizes[0], *sizes[1], 1)
    batch = PersistentBatch(
        groups,
        device,
        max_rows=rows,
        max_tokens=most_tokens,
        max_len=max_len,
        num_scratch=[spec.num_scratch_blocks for spec in specs],
    )
    kernels = [
        make_kernel(one, device, rows=rows + 1, tokens=most_tokens, max_len=max_len, width=width)
        for one, width in zip(chosen, batch.widths)
    ]
    transfer = Transfer(device)
    state = SamplingState(transfer, rows, model.config.vocab_size)
    choices = dict(ops.choices)
    for one in chosen:
        name = "attention" if len(chosen) == 1 else f"attention ({_describe(one.group)})"
        choices[name] = one.choice
        _warn_of_reference(name, one.choice, config)
    choices.update(model.model.choices)
    parts = RunnerParts(
        backend=backend,
        model=model.model,
        model_path=model.path,
        max_model_len=max_len,
        max_num_batched_tokens=step_tokens,
        choices=choices,
        groups=groups,
        group_specs=specs,
        context=StepContext(ops, kernels, [kernel.new_plan() for kernel in kernels], caches, collectives),
        batch=batch,
        transfer=transfer,
        state=state,
        sampler=Sampler(ops, state, batch.last_token),
        collectives=collectives,
    )
    if sizes[0] or sizes[1]:
        assert device.graphs is not None
        parts.graphs = GraphCache(
            backend=device.graphs,
            kernels=kernels,
            needs_update=[one.choice.spec.graph == "update" for one in chosen],
            decode=sizes[0],
            mixed=sizes[1],
            max_rows=rows,
        )
        parts.graph_tables = [
            torch.zeros(rows + 1, width, dtype=torch.int32, device=device.torch_device) for width in batch.widths
        ]
    return parts


def _check_providers(config: EngineConfig) -> None:
    """Refuse providers for what is no op: they would be ignored."""
    unknown = sorted(set(config.kernel_providers) - {*FUNCTION_OPS, "linear"})
    if unknown:
        raise ConfigError(
            f"kernel_providers names {', '.join(unknown)}; ops are linear, {', '.join(sorted(FUNCTION_OPS))}."
        )


def _warn_of_reference(name: str, choice: Choice, config: EngineConfig) -> None:
    """Say so where a backend has kernels, and none of them does this model's attention."""
    if choice.is_reference and choice.refused and config.attention_provider is None:
        reasons = "; ".join(f"{candidate.label}: {reason}" for candidate, reason in choice.refused)
        log.warning("%s runs on the torch reference, which is slow. Its kernels refuse: %s", name, reasons)


def make_kernel(
    chosen: GroupChoice, device: Device, *, rows: int, tokens: int, max_len: int, width: int
) -> AttentionKernel:
    """The group's attention kernel for batches up to these sizes."""
    limits = Limits(max_rows=rows, max_tokens=tokens, max_kv_len=max_len, max_blocks=width)
    kernel: AttentionKernel = chosen.choice.target(chosen.group.spec, chosen.group, limits, device)
    return kernel


def _step_tokens(config: EngineConfig, device: Device, max_len: int) -> int:
    """Most tokens of a step."""
    tokens = config.max_num_batched_tokens
    if tokens is None:
        ample = has_meter(device) and device.memory().total >= AMPLE_MEMORY
        tokens = LARGE_STEP if ample else SMALL_STEP
        if not config.enable_chunked_prefill:
            tokens = max(tokens, max_len)
    return max(tokens, config.max_num_seqs)


def _graph_sizes(
    config: EngineConfig,
    device: Device,
    model: CausalLM,
    chosen: tuple[GroupChoice, ...],
    most: int,
    collectives: Collectives,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(decode batch sizes, token counts of mixed batches up to ``most``) to capture; empty without graphs."""
    safe = all(one.choice.spec.graph != "none" for one in chosen) and model.capturable and collectives.capturable
    if config.enforce_eager or device.graphs is None or not safe:
        return (), ()
    budget = device.graphs.budget(len(model.attentions))
    decode = within(decode_sizes(config.max_num_seqs, config.graph_sizes), budget)
    # A user who names sizes means those of decode batches, and no others.
    decodes_only = config.graph_sizes is not None or any(one.choice.spec.graph_batches == "decode" for one in chosen)
    mixed = () if decodes_only else within(mixed_sizes(most), budget - len(decode))
    return decode, mixed


def _largest_padding(decode: tuple[int, ...], mixed: tuple[int, ...]) -> int:
    """The most tokens by which a batch is padded to the next size."""
    return max(
        (after - before - 1 for sizes in (decode, mixed) for before, after in zip((0, *sizes), sizes)), default=0
    )


def _agree(specs: list[GroupSpec], max_len: int, ranks: Ranks) -> tuple[list[GroupSpec], int]:
    """Every rank has as many blocks as the one with the fewest."""
    max_len, *counts = ranks.smallest([max_len, *(spec.num_blocks for spec in specs)])
    agreed = [
        GroupSpec(
            block_size=spec.block_size, num_blocks=count, num_scratch_blocks=spec.num_scratch_blocks, window=spec.window
        )
        for spec, count in zip(specs, counts)
    ]
    return agreed, max_len


def _describe(group: KVGroup) -> str:
    window = group.spec.window
    return "full" if window is None else f"window {window}"
