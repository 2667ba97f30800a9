"""How many KV blocks there are: from options, or from what memory is left; and their allocation."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dougong.config import EngineConfig
from dougong.errors import CacheMemoryError
from dougong.hal import Device, KVGroup, LayerCache
from dougong.hal.device import is_out_of_memory
from dougong.kv import GroupSpec

__all__ = ["CacheBudget", "CacheDemand", "allocate", "has_meter", "host_budget", "metered_budget", "size_pools"]

GIB = 1 << 30

#: On a device without a meter (the host): the cache's share of free memory. Weights are loaded by then, the rest is for
#: activations and for whatever else runs there.
HOST_SHARE = 0.4


@dataclass(frozen=True)
class CacheDemand:
    """What the engine may use at most, and what it must have at least.

    ``max_model_len``: tokens of the longest request; ``wanted`` whether the user asked for that length;
    ``padding`` tokens that the largest padding takes.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    padding: int
    wanted: bool = False

    def scratch_blocks(self, group: KVGroup) -> int:
        """Blocks at the start of the pool whose slots padding tokens write."""
        return max(1, -(-self.padding // group.manager_block))

    def most_tokens(self, group: KVGroup) -> int:
        """Tokens that all requests together can have in the group's cache."""
        longest = self.max_model_len
        window = group.spec.window
        if window is None or window >= longest:
            return self.max_num_seqs * (longest + group.manager_block)
        held = min(longest, window + 2 * group.manager_block)
        chunks = min(self.max_num_batched_tokens, self.max_num_seqs * longest)
        return self.max_num_seqs * (held + group.manager_block) + chunks

    def least_tokens(self, group: KVGroup) -> int:
        """Tokens that one request alone needs to make progress."""
        window = group.spec.window
        return group.manager_block if window is None else min(window + group.manager_block, self.max_model_len)


@dataclass(frozen=True)
class CacheBudget:
    """Bytes for the cache, where they come from, and the options that change it."""

    size: int
    source: str
    remedy: str


def has_meter(device: Device) -> bool:
    """Whether the device tells how much memory was used at most."""
    module = device.module
    return device.torch_device.type != "cpu" and all(
        hasattr(module, name) for name in ("reset_peak_memory_stats", "max_memory_allocated", "memory_allocated")
    )


def host_budget(device: Device, config: EngineConfig) -> CacheBudget:
    """A share of what is free now."""
    info = device.memory()
    share = min(HOST_SHARE, config.memory_utilization)
    return CacheBudget(
        int(info.free * share),
        f"{share:.0%} of the {_gib(info.free)} that are free",
        "Set kv_cache_memory (bytes) or num_kv_blocks to take more, lower max_model_len or max_num_seqs, or choose a "
        "smaller kv_cache_dtype.",
    )


def metered_budget(
    device: Device,
    config: EngineConfig,
    step: Callable[[int], Callable[[], None]],
    tokens: int,
    reserve: int,
    *,
    smaller: Sequence[int] = (),
) -> CacheBudget:
    """What ``memory_utilization`` leaves beside everything held now, one largest step's activations, and ``reserve``.

    Args:
        step: makes a function that runs a step of so many tokens; what that allocates and frees is measured.
        tokens: of the largest step.
        reserve: bytes for device graphs.
        smaller: steps to try, in this order, when that one does not fit, so that the error can name one that does;
            none where other ranks take part in a step.

    Raises:
        CacheMemoryError: the largest step itself does not fit.
    """
    gc.collect()
    found = _measure(device, step, tokens)
    if isinstance(found, Exception):
        raise _step_does_not_fit(device, config, step, tokens, smaller) from found
    activations, held = found
    total = device.memory().total
    allowed = int(total * config.memory_utilization)
    return CacheBudget(
        max(0, allowed - held - activations - reserve),
        f"memory_utilization={config.memory_utilization} of {_gib(total)}, of which {_gib(held)} are in use, "
        f"{_gib(activations)} go to activations and {_gib(reserve)} to graphs",
        "Raise memory_utilization, lower max_model_len, max_num_batched_tokens or max_num_seqs, choose a smaller "
        "kv_cache_dtype, or take smaller weights (quantization=).",
    )


def _measure(device: Device, step: Callable[[int], Callable[[], None]], tokens: int) -> tuple[int, int] | RuntimeError:
    """(bytes that a step takes while it runs, bytes in use beside it), or the error of one that does not fit."""
    module, index = device.module, device.index
    forward: Callable[[], None] | None = None
    try:
        forward = step(tokens)
        before = module.memory_allocated(index)
        module.reset_peak_memory_stats(index)
        forward()
        device.synchronize()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        forward = None  # the error's frames, this one too, hold what the step had allocated
        traceback.clear_frames(error.__traceback__)
        return error
    activations = max(0, module.max_memory_allocated(index) - before)
    gc.collect()
    info = device.memory()
    return activations, info.total - info.free


def _step_does_not_fit(
    device: Device,
    config: EngineConfig,
    step: Callable[[int], Callable[[], None]],
    tokens: int,
    smaller: Sequence[int],
) -> CacheMemoryError:
    gc.collect()
    info = device.memory()
    text = (
        f"a step of {tokens} tokens and the logits of {config.max_num_seqs} requests do not fit beside the weights: "
        f"{_gib(info.free)} of {_gib(info.total)} are free on {device.name}."
    )
    other = "lower max_num_seqs, or take smaller weights (quantization=)."
    for fewer in smaller:
        if not isinstance(_measure(device, step, fewer), Exception):
            return CacheMemoryError(
                f"{text} One of {fewer} tokens fits: set max_num_batched_tokens={fewer}; or {other}"
            )
    if smaller:
        return CacheMemoryError(f"{text} Nor does one of {smaller[-1]} tokens: {other}")
    return CacheMemoryError(f"{text} Set a lower max_num_batched_tokens, {other}")


def size_pools(
    groups: Sequence[KVGroup], demand: CacheDemand, config: EngineConfig, budget: Callable[[], CacheBudget]
) -> tuple[list[GroupSpec], int]:
    """Blocks per group and the longest request that can be served: (specs, max_model_len).

    ``num_kv_blocks`` counts all blocks of a pool, scratch blocks included. From a budget, every group gets blocks for
    the same number of tokens, except that a window's group gets no more than its windows can use.

    Raises:
        CacheMemoryError: not even one request fits, or not one of the ``max_model_len`` asked for.
    """
    if config.num_kv_blocks is not None:
        return _given_blocks(groups, demand, config.num_kv_blocks), demand.max_model_len
    found = (
        budget()
        if config.kv_cache_memory is None
        else CacheBudget(
            config.kv_cache_memory,
            f"kv_cache_memory={config.kv_cache_memory}",
            "Raise kv_cache_memory, lower max_model_len, or choose a smaller kv_cache_dtype.",
        )
    )
    low, high = 0, max(demand.most_tokens(group) for group in groups)
    while low < high:  # the most tokens whose blocks fit
        middle = (low + high + 1) // 2
        if sum(_bytes(group, demand, middle) for group in groups) <= found.size:
            low = middle
        else:
            high = middle - 1
    size = max(group.manager_block for group in groups)
    longest = max(demand.least_tokens(group) for group in groups)
    needed = min(demand.max_model_len, longest)
    if demand.wanted:
        needed = demand.max_model_len
    if low < needed:
        least = sum(_bytes(group, demand, needed) for group in groups)
        raise CacheMemoryError(
            f"the KV cache of one request of {needed} tokens takes {_gib(least)}; there are {_gib(found.size)} "
            f"({found.source}), enough for {low} tokens. {found.remedy}"
        )
    specs = [
        GroupSpec(
            block_size=group.manager_block,
            num_blocks=_blocks(group, demand, low),
            num_scratch_blocks=demand.scratch_blocks(group),
            window=group.spec.window,
        )
        for group in groups
    ]
    return specs, min(demand.max_model_len, max(low // size * size, needed))


def _given_blocks(groups: Sequence[KVGroup], demand: CacheDemand, blocks: int) -> list[GroupSpec]:
    specs = []
    for group in groups:
        scratch = demand.scratch_blocks(group)
        least = scratch + -(-demand.least_tokens(group) // group.manager_block)
        if blocks < least:
            raise CacheMemoryError(
                f"num_kv_blocks={blocks}: {scratch} are scratch blocks (for padding) and one request needs "
                f"{least - scratch} of {group.manager_block} tokens. Give at least {least}, or leave it out."
            )
        specs.append(
            GroupSpec(
                block_size=group.manager_block,
                num_blocks=blocks,
                num_scratch_blocks=scratch,
                window=group.spec.window,
            )
        )
    return specs


def _blocks(group: KVGroup, demand: CacheDemand, tokens: int) -> int:
    tokens = min(tokens, demand.most_tokens(group))
    return demand.scratch_blocks(group) + -(-tokens // group.manager_block)


def _bytes(group: KVGroup, demand: CacheDemand, tokens: int) -> int:
    blocks = _blocks(group, demand, tokens)
    ratio = group.manager_block // group.kernel_block
    for plane in group.layout.planes:  # a layout that counts in 32 bits bounds the pool too
        bound = group.layout.max_blocks(group.kernel_block, *group.spec.plane_dims(plane))
        if bound is not None and blocks * ratio > bound:
            return 1 << 62
    return blocks * group.bytes_per_block()


def allocate(device: Device, groups: Sequence[KVGroup], specs: Sequence[GroupSpec]) -> list[LayerCache]:
    """Every layer's cache, in layer order; a layer that shares another's gets that one.

    Raises:
        CacheMemoryError: the device refused, or has less; says what was asked and what was free.
    """
    caches: dict[int, LayerCache] = {}
    total = sum(spec.num_blocks * group.bytes_per_block() for group, spec in zip(groups, specs))
    if not has_meter(device) and total > device.memory().free:
        # A host promises memory that it does not have, and kills whoever then fills it.
        raise _does_not_fit(device, groups, specs, total)
    try:
        for group, spec in zip(groups, specs):
            blocks = spec.num_blocks * (group.manager_block // group.kernel_block)
            for layer in group.owners:
                caches[layer] = device.empty_cache(group, blocks)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        caches.clear()
        gc.collect()
        raise _does_not_fit(device, groups, specs, total) from error
    for group in groups:
        for layer, owner in group.shares:
            caches[layer] = caches[owner]
    return [caches[layer] for layer in sorted(caches)]


def _does_not_fit(
    device: Device, groups: Sequence[KVGroup], specs: Sequence[GroupSpec], total: int
) -> CacheMemoryError:
    free = device.memory().free
    per_block = sum(group.bytes_per_block() for group in groups)
    return CacheMemoryError(
        f"allocating the KV cache failed: {total} bytes ({_gib(total)}) were asked for, {free} ({_gib(free)}) are "
        f"free on {device.name}: {_names(specs)}. About {free // per_block} blocks fit: lower num_kv_blocks, "
        "kv_cache_memory or memory_utilization, or choose a smaller kv_cache_dtype."
    )


def _names(specs: Sequence[GroupSpec]) -> str:
    return ", ".join(f"{spec.num_blocks} blocks of {spec.block_size} tokens" for spec in specs)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.2f} MiB"
