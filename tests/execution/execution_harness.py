"""A backend of plain torch on the host, a way to drive a runner, and what its tokens must be."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from dougong.config import EngineConfig
from dougong.execution import ModelRunner, StepResult
from dougong.hal import Backend, BatchView, Device, KVGroup, Limits, MemoryInfo, OpTable, allocate_cache
from dougong.hal.layout import NHD
from dougong.hal.reference.attention import ReferenceAttention
from dougong.kv import KVCacheManager
from dougong.models import CausalLM, StepContext, load_model
from dougong.plugins import load_plugins
from dougong.scheduling import Request, Scheduler, SchedulerConfig, StepPlan
from dougong.types import SamplingParams


class HostDevice(Device):
    """The host's memory and torch's own operators."""

    type = "cpu"
    dtypes = (torch.float32, torch.bfloat16)
    free = 8 << 30

    def setup(self) -> None: ...

    def memory(self) -> MemoryInfo:
        return MemoryInfo(self.free, 16 << 30)

    def synchronize(self) -> None: ...


def host_backend(device: Device | None = None) -> Backend:
    """No plugin takes part."""
    return Backend("host", "test", device or HostDevice(), load_plugins("", entries=()))


def make_runner(folder: Path, *, sharpen: float = 30.0, backend: Backend | None = None, **options: Any) -> ModelRunner:
    """A runner on dummy weights, in float32. ``sharpen`` scales the head, so that logits differ enough to matter."""
    values: dict[str, Any] = {
        "model": str(folder), "load_format": "dummy", "dtype": "float32", "max_num_seqs": 4, "max_model_len": 64,
        "num_kv_blocks": 64, "block_size": 4, "max_num_batched_tokens": 32, **options,
    }  # fmt: skip
    config = EngineConfig(**values)
    backend = backend or host_backend()
    loaded = load_model(config, backend)
    sharpen_model(loaded.model, sharpen)
    return ModelRunner(config, backend=backend, model=loaded)


def sharpen_model(model: CausalLM, factor: float) -> None:
    """Scale the logits."""
    plain = model.logits
    model.logits = lambda hidden: plain(hidden) * factor  # type: ignore[method-assign]


Watch = Callable[[StepPlan, StepResult], None]


def drive(
    runner: ModelRunner,
    requests: Iterable[Request],
    *,
    overlap: bool = False,
    prefix_caching: bool = True,
    watch: Watch | None = None,
    stagger: int = 0,
) -> dict[str, list[int]]:
    """Run requests to their end; returns their tokens. ``stagger``: steps between one request and the next."""
    kv = KVCacheManager(runner.group_specs, enable_prefix_caching=prefix_caching, hash_key=b"0" * 32)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=runner.max_num_seqs,
            max_num_batched_tokens=runner.max_num_batched_tokens,
            max_model_len=runner.max_model_len,
            watermark=0.0,
        ),
        kv,
    )
    waiting = deque(requests)
    every = list(waiting)
    flights: deque[tuple[StepPlan, Any]] = deque()
    step = 0
    while waiting or scheduler.has_work or flights:
        while waiting and (not stagger or step % stagger == 0 or not scheduler.has_work):
            scheduler.add(waiting.popleft())
            if stagger:
                break
        plan = scheduler.schedule()
        if plan is not None:
            flights.append((plan, runner.execute(plan)))
        if flights and (len(flights) > int(overlap) or plan is None):
            done, pending = flights.popleft()
            result = pending.result()
            if watch is not None:
                watch(done, result)
            scheduler.commit(done, result.tokens)
        step += 1
        assert step < 5000
    kv.check_integrity()
    return {request.request_id: list(request.output_token_ids) for request in every}


@torch.inference_mode()
def full_logits(model: CausalLM, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] float32 of a sequence computed alone and at once, with a plain cache per layer."""
    specs = [attention.spec for attention in model.attentions]
    count = len(tokens)
    kinds = list(dict.fromkeys(specs))
    device = HostDevice()
    groups = [
        KVGroup(
            index=i,
            layers=tuple(layer for layer, spec in enumerate(specs) if spec == kind),
            spec=kind,
            layout=NHD,
            manager_block=count,
            kernel_block=count,
        )
        for i, kind in enumerate(kinds)
    ]
    limits = Limits(max_rows=1, max_tokens=count, max_kv_len=count, max_blocks=1)
    kernels = [ReferenceAttention(group.spec, group, limits, device) for group in groups]
    caches = [allocate_cache(spec, NHD, 1, count, "cpu") for spec in specs]
    context = StepContext(OpTable(), list(kernels), [kernel.new_plan() for kernel in kernels], caches)
    view = BatchView.build([count], [count], torch.zeros(1, 1, dtype=torch.int32), count, "cpu")
    batch = BatchView(1, count, view.num_decode_rows, count, view.cu_q, view.host_cu_q, view.groups * len(groups))
    bound = [(attention.group_index, attention.cache_layer) for attention in model.attentions]
    for layer, (attention, spec) in enumerate(zip(model.attentions, specs)):
        attention.bind(kinds.index(spec), layer)
    context.set_batch(batch)
    for kernel, plan in zip(kernels, context.plans):
        kernel.plan(batch, plan)
    hidden = model(torch.tensor(tokens), torch.arange(count), context)
    for attention, (group, layer) in zip(model.attentions, bound):
        attention.bind(group, layer)
    return model.logits(hidden).float()


def greedy_alone(model: CausalLM, prompt: Sequence[int], got: Sequence[int]) -> list[int]:
    """The tokens that a computation of everything before them gives, one for each of ``got``.

    Equal to ``got`` if and only if greedy decoding of the prompt alone gives ``got``: the first that differed would
    have had the right tokens before it.
    """
    logits = full_logits(model, [*prompt, *got])
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def request(name: str, prompt: Sequence[int], **sampling: Any) -> Request:
    """A request; greedy for 8 tokens unless told otherwise."""
    eos = sampling.pop("eos", ())
    parent = sampling.pop("parent", None)
    values = {"temperature": 0.0, "max_tokens": 8, **sampling}
    return Request(name, list(prompt), SamplingParams(**values), eos_token_ids=eos, parent=parent)


def prompts(count: int, seed: int = 0, low: int = 3, high: int = 24, vocab: int = 97) -> list[list[int]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(2, vocab, (length,), generator=generator).tolist() for length in lengths]
