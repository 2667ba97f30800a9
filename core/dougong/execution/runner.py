"""The model runner: takes the scheduler's plans, enqueues the device's work, gives back sampled tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from dougong.config import EngineConfig
from dougong.errors import InvalidRequestError, NumericalError
from dougong.execution.delta import DeltaReader, StepDelta
from dougong.execution.graphs import GraphKey
from dougong.execution.guides import Guides, StepGuides
from dougong.execution.kv_blocks import KVBlocks
from dougong.execution.logprobs import PromptLogprobs, unpack
from dougong.execution.parallel import WARM_UP, open_ranks
from dougong.execution.parts import RunnerParts, assemble
from dougong.execution.persistent_batch import StagedStep
from dougong.execution.pooling import PooledVectors
from dougong.execution.result import PendingStep, StepResult
from dougong.execution.sampler import BLOCKED_ROW, Sampled
from dougong.execution.timings import StepTimings
from dougong.hal import Backend, Choice, Collectives, Plan
from dougong.kv import GroupSpec
from dougong.models import LoadedModel
from dougong.plugins import Plugins
from dougong.scheduling import StepPlan

__all__ = ["ModelRunner", "first_line"]

log = logging.getLogger(__name__)


class ModelRunner:
    """One model on one device, driven step by step. One thread calls it.

    The device runs steps in the order of `execute`, on one stream; a step may be enqueued before the result of the
    one before is known, because a decode row's token is taken from where the sampler left it on the device.

    Args:
        config: the engine's options.
        plugins: those loaded already; None loads the installed ones.
        collectives: communication between ranks; None makes it from ``config.tensor_parallel_size``.
        backend, model: made already (tests, embedding); None opens and loads what ``config`` names.

    Raises:
        DougongError: whatever stops the start.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        plugins: Plugins | None = None,
        collectives: Collectives | None = None,
        backend: Backend | None = None,
        model: LoadedModel | None = None,
    ) -> None:
        self.config = config
        self._ranks, backend = open_ranks(config, plugins, backend, collectives)
        self._parts: RunnerParts = assemble(config, backend, self._ranks, plugins=plugins, model=model)
        parts = self._parts
        self.backend = parts.backend
        self.model = parts.model
        self.model_config = parts.model.config
        self.model_path: Path = parts.model_path
        self.groups = parts.groups
        self.group_specs: list[GroupSpec] = parts.group_specs
        self.max_model_len = parts.max_model_len
        self.max_num_batched_tokens = parts.max_num_batched_tokens
        self.max_num_seqs = config.max_num_seqs
        self.choices: dict[str, Choice] = parts.choices
        self.kv_blocks = KVBlocks(parts.groups, parts.context, parts.transfer)
        self._reader = DeltaReader(config.max_num_seqs, len(self.groups), config.seed)
        self._guides = Guides(parts.transfer, parts.model.config.vocab_size, self._ranks)
        self._closed = False
        if self._ranks.served:
            self.follow()
            raise SystemExit(0)

    # -- steps -------------------------------------------------------------------------------------------

    def execute(self, plan: StepPlan) -> PendingStep:
        """Enqueue a step; does not wait for the device. Called once per plan, right after it was made, in order."""
        started = perf_counter()
        delta = self._reader.read(plan)
        self._guides.follow(plan)
        if not self._ranks.alone:
            self._ranks.send(delta)
        return self.run(delta, started)

    def follow(self) -> None:
        """On a rank other than 0: run the steps that rank 0 sends, until it closes."""
        while True:
            message = self._ranks.receive()
            if isinstance(message, StepDelta):
                self.run(message)
            elif message == WARM_UP:
                self._warm_up()
            else:
                break
        self.close()

    @torch.inference_mode()
    def run(self, delta: StepDelta, started: float | None = None) -> PendingStep:
        """Enqueue a step that was read already (on every rank of a model)."""
        parts = self._parts
        timings = StepTimings()
        begun = perf_counter() if started is None else started
        state, batch = parts.state, parts.batch
        for slot in delta.released:
            state.release(slot)
        for init in delta.admitted:
            state.admit(init)
        if delta.copies:
            self._copy_blocks(delta)
        decode = delta.num_decode_rows == delta.num_rows
        key = None if parts.graphs is None else parts.graphs.key_for(delta.num_rows, delta.num_tokens, decode)
        if key is None:
            staged = batch.stage(delta)
        else:
            tables = [table[: key.rows] for table in parts.graph_tables]
            staged = batch.stage(delta, rows=key.rows, tokens=key.tokens, tables=tables)
        staged_at = perf_counter()
        guides = self._guides.begin(state, staged.sample_slots) if state.guided else None
        hidden, logits = self._forward(delta, staged, key, timings)
        launched = perf_counter()
        pending = self._sample(delta, staged, hidden, logits, timings, guides)
        timings.stage = staged_at - begun
        timings.launch = launched - staged_at
        timings.sample = perf_counter() - launched
        return pending

    def _copy_blocks(self, delta: StepDelta) -> None:
        """Copy-on-write, after every step before this one and before this one's forward."""
        parts = self._parts
        up = parts.transfer.to_device
        for group in parts.groups:
            pairs = np.array([copy[1:] for copy in delta.copies if copy[0] == group.index], dtype=np.int64)
            if not len(pairs):
                continue
            ratio = group.manager_block // group.kernel_block
            blocks = (pairs.T[:, :, None] * ratio + np.arange(ratio)).reshape(2, -1)
            caches = [parts.context.caches[layer] for layer in group.owners]
            parts.context.ops.copy_blocks(caches, up(blocks[0].copy()), up(blocks[1].copy()))

    # -- the forward -------------------------------------------------------------------------------------

    def _forward(
        self, delta: StepDelta, staged: StagedStep, key: GraphKey | None, timings: StepTimings
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states [T, E], logits of the rows that sample [R, V]); rows past the real ones may follow in both."""
        parts = self._parts
        if key is None:
            context = parts.context
            for kernel, plan in zip(context.kernels, context.plans):
                kernel.plan(staged.batch, plan)
            context.set_batch(staged.batch)
            hidden = parts.model(self._token_ids(delta, staged), staged.views.positions, context)
            return hidden, self._logits(hidden, staged)
        assert parts.graphs is not None
        entry = parts.graphs.entry(key)
        for kernel, plan in zip(parts.graphs.kernels, entry.plans):
            kernel.plan(staged.batch, plan)
        if entry.ready:
            timings.graph = True
            output = parts.graphs.replay(entry)
        else:
            forward = self._capturable(key, staged, entry.plans)
            output = forward()  # this step's result, and the warm-up that a capture needs
            parts.graphs.capture(entry, key, forward)
        hidden, logits = output
        return hidden, self._logits(hidden, staged) if logits is None else logits[: staged.num_samples]

    def _capturable(
        self, key: GraphKey, staged: StagedStep, plans: list[Plan]
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
        """The forward of a graph's size over addresses that stay."""
        parts = self._parts
        context = parts.new_context(plans)
        context.set_batch(staged.batch)
        views, last_token = staged.views, parts.batch.last_token

        def forward() -> tuple[torch.Tensor, torch.Tensor | None]:
            hidden = parts.model(_resolve(views.token_ids, last_token), views.positions, context)
            return hidden, parts.model.logits(hidden) if key.decode else None

        return forward

    def _token_ids(self, delta: StepDelta, staged: StagedStep) -> torch.Tensor:
        """The step's input tokens [T]; those that only the device knows are taken from their slots."""
        if delta.same_rows:
            return self._parts.batch.last_token.index_select(0, staged.views.row_slots)
        if not delta.num_decode_rows:
            return staged.views.token_ids
        return _resolve(staged.views.token_ids, self._parts.batch.last_token)

    def _logits(self, hidden: torch.Tensor, staged: StagedStep) -> torch.Tensor:
        count = staged.num_samples
        if count != hidden.shape[0]:
            hidden = hidden.index_select(0, staged.views.sample_index[:count])
        return self._parts.model.logits(hidden)

    # -- the sample --------------------------------------------------------------------------------------

    def _sample(
        self,
        delta: StepDelta,
        staged: StagedStep,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        timings: StepTimings,
        guides: StepGuides | None,
    ) -> PendingStep:
        parts = self._parts
        count = staged.num_samples
        prompts = self._prompt_logprobs(delta, staged, hidden)
        tensors: list[torch.Tensor] = []
        sampled: Sampled | None = None
        if count:
            views = staged.views
            sampled = parts.sampler.sample(
                logits,
                views.sample_slots[:count],
                views.sample_positions[:count],
                staged.sample_slots,
                staged.sample_positions,
                allowed=None if guides is None else guides.allowed(),
            )
            tensors.append(sampled.tokens)
            if sampled.logprobs is not None:
                tensors += sampled.logprobs
        for prompt in prompts:
            tensors += prompt.tensors
        pooled = PooledVectors(delta, hidden)
        tensors += pooled.tensors
        copies = parts.transfer.to_host(tensors)

        def collect() -> StepResult:
            begun = perf_counter()
            arrived = copies.get()
            timings.wait = perf_counter() - begun
            result = _result(delta, sampled, prompts, arrived)
            pooled.collect(result, arrived[len(arrived) - len(pooled.tensors) :])
            if guides is not None:
                guides.take(result, delta.sample_rows)
            return result

        pending = PendingStep(collect, timings)
        if guides is not None:
            self._guides.launched(pending)
        return pending

    def _prompt_logprobs(self, delta: StepDelta, staged: StagedStep, hidden: torch.Tensor) -> list[PromptLogprobs]:
        if not delta.prompt_targets:
            return []
        parts = self._parts
        assert delta.lengths is not None and delta.slots is not None
        ends = np.cumsum(delta.lengths)
        found = []
        for row, first, targets in delta.prompt_targets:
            start = int(ends[row] - delta.lengths[row]) + first
            top = int(parts.state.prompt_logprobs[delta.slots[row]])
            ids = parts.transfer.to_device(np.array(targets, dtype=np.int64))
            states = hidden[start : start + len(targets)]
            found.append(PromptLogprobs(row, states, targets, top, parts.model.logits, ids))
        return found

    # -- start and end -----------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Run and capture every graph size, the largest first, so that no request waits for it."""
        if not self._ranks.alone:
            self._ranks.send(WARM_UP)
        self._warm_up()

    def _warm_up(self) -> None:
        graphs = self._parts.graphs
        if graphs is None:
            return
        for key in graphs.sizes():
            if graphs.failed:
                break
            self._warm_size(key)
        self.backend.device.synchronize()

    @torch.inference_mode()
    def _warm_size(self, key: GraphKey) -> None:
        """A step of nothing but padding: it reads and writes scratch blocks alone."""
        nothing = np.zeros(0, dtype=np.int64)
        delta = StepDelta(-1, 0, 0, 0, False, nothing, nothing, nothing, nothing, nothing)
        tables = [table[: key.rows] for table in self._parts.graph_tables]
        staged = self._parts.batch.stage(delta, rows=key.rows, tokens=key.tokens, tables=tables, decode=key.decode)
        self._forward(delta, staged, key, StepTimings())

    def device_fault(self) -> str:
        """Why the device cannot be used any more, asked after a step that failed; '' if it still answers. Drivers
        refuse all further work of a process after some errors, and none after others: only trying tells."""
        try:
            self.backend.device.synchronize()
        except Exception as error:
            return f"{type(error).__name__}: {first_line(error)}"
        return ""

    def close(self) -> None:
        """Wait for the device, and let go of graphs, cache and weights. A device that is lost is not waited for."""
        if self._closed:
            return
        self._closed = True
        self._guides.close()
        fault = self.device_fault()
        if fault:
            log.warning("%s does not answer (%s); its memory goes with the process", self.backend.device.name, fault)
        try:
            self._parts.release()
        except RuntimeError:
            if not fault:
                raise
        self._ranks.close()


def first_line(error: BaseException) -> str:
    """What an error says first; drivers' errors go on with advice for those who write kernels."""
    return next(iter(str(error).strip().splitlines()), "")


def _resolve(token_ids: torch.Tensor, last_token: torch.Tensor) -> torch.Tensor:
    """Replace ids of ``-1 - slot`` by the token that lies on the device for that slot."""
    waiting = last_token.index_select(0, (-1 - token_ids).clamp_min(0))
    return torch.where(token_ids < 0, waiting, token_ids)


def _result(
    delta: StepDelta, sampled: Sampled | None, prompts: list[PromptLogprobs], arrived: list[torch.Tensor]
) -> StepResult:
    if sampled is None:
        result = StepResult([None] * delta.num_rows)
        place = 0
    else:
        ids: list[int] = arrived[0].tolist()
        rows = None if delta.sample_rows is None or len(ids) == delta.num_rows else delta.sample_rows.tolist()
        tokens: list[int | None] = list(ids)
        if rows is not None:
            tokens = [None] * delta.num_rows
            for row, token in zip(rows, ids):
                tokens[row] = token
        result = StepResult(tokens)
        place = 1
        if sampled.logprobs is not None:
            found = unpack(arrived[1:5], sampled.logprob_counts)
            place = 5
            for index, entry in zip(sampled.logprob_rows, found):
                result.logprobs[index if rows is None else rows[index]] = entry
        if min(ids) < 0:
            _take_errors(result)
    for prompt in prompts:
        count = len(prompt.tensors)
        result.prompt_logprobs[prompt.row] = prompt.entries(arrived[place : place + count])
        place += count
    return result


def _take_errors(result: StepResult) -> None:
    for row, token in enumerate(result.tokens):
        if token is not None and token < 0:
            if token == BLOCKED_ROW:
                result.errors[row] = InvalidRequestError(
                    "structured, allowed_token_ids, bad_words, logit_bias or min_tokens leave no token to choose; "
                    "loosen one"
                )
            else:
                result.errors[row] = NumericalError(
                    "the logits held NaN, so no token could be chosen; the model's weights or the input may be broken"
                )
            result.tokens[row] = None
            result.logprobs.pop(row, None)
