"""KV groups and the sizes of their pools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from execution_harness import HostDevice, host_backend, make_runner

from dougong.config import EngineConfig
from dougong.errors import CacheMemoryError, ConfigError, KernelSelectionError, ModelLoadError
from dougong.execution.groups import form_groups
from dougong.execution.memory import CacheBudget, CacheDemand, allocate, has_meter, metered_budget, size_pools
from dougong.hal import AttentionSpec, Device, Exactly, KVGroup, KVLayout, Multiple
from dougong.hal.selection import Candidate
from dougong.models import CausalLM
from dougong.plugins import ABI, KernelSpec

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
WINDOW = replace(SPEC, window=8)


def demand(**values: Any) -> CacheDemand:
    return CacheDemand(**{"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 32, "padding": 0, **values})


def groups(*specs: AttentionSpec, block_size: int = 4) -> tuple[KVGroup, ...]:
    return tuple(one.group for one in form_groups(specs, host_backend(), block_size=block_size))


def test_layers_alike_share_a_group_and_full_attention_comes_first() -> None:
    found = groups(WINDOW, WINDOW, SPEC, WINDOW, SPEC)
    assert [(one.index, one.layers, one.spec.window) for one in found] == [(0, (2, 4), None), (1, (0, 1, 3), 8)]
    assert groups(SPEC)[0].bytes_per_block() == 2 * 2 * 16 * 4 * 4


def _offer(backend: Any, **values: Any) -> None:
    spec = KernelSpec(op="attention", abi=ABI, target=f"{__name__}:{values.pop('target')}", **values)
    backend.candidates.setdefault("attention", []).append(Candidate("test", spec))


def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels: one for blocks of 16 in a layout of its own, one that likes blocks of 32."""
    import sys
    import types

    from dougong.hal.reference.attention import ReferenceAttention

    wide = KVLayout("wide", block_sizes=Exactly(16), default_block=16)
    plain = KVLayout("nhd", block_sizes=Multiple(8), default_block=16)
    module = types.ModuleType(__name__)
    module.Wide = type("Wide", (ReferenceAttention,), {"layouts": (wide,)})  # type: ignore[attr-defined]
    module.Tuned = type(  # type: ignore[attr-defined]
        "Tuned", (ReferenceAttention,), {"layouts": (plain,), "tuned_block": classmethod(lambda *_: 32)}
    )
    monkeypatch.setitem(sys.modules, __name__, module)


def test_the_kernel_decides_layout_and_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    _kernels(monkeypatch)
    backend = host_backend()
    _offer(backend, provider="wide", target="Wide", priority=5, layouts=("wide",))
    _offer(backend, provider="tuned", target="Tuned", priority=3, layouts=("nhd",), features=frozenset({"window"}))
    full, window = form_groups([SPEC, WINDOW], backend)
    assert (full.group.layout.name, full.group.manager_block, full.choice.spec.provider) == ("wide", 16, "wide")
    assert (window.group.layout.name, window.group.manager_block, window.choice.spec.provider) == ("nhd", 32, "tuned")
    (split,) = form_groups([SPEC], backend, block_size=48)
    assert (split.group.manager_block, split.group.kernel_block) == (48, 16)
    (asked,) = form_groups([SPEC], backend, block_size=40)
    assert (asked.group.layout.name, asked.group.kernel_block) == ("nhd", 40)
    with pytest.raises(KernelSelectionError, match="lacks window"):
        form_groups([WINDOW], backend, provider="wide")
    with pytest.raises(ConfigError, match=r"block_size=12.*\n.*wide.*16"):
        form_groups([SPEC], backend, block_size=12)


def test_a_block_size_that_no_kernel_takes_is_named_as_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not what the last layout tried could not do besides; nor does the reference step in for it."""
    _kernels(monkeypatch)
    backend = host_backend()
    _offer(backend, provider="wide", target="Wide", priority=5, layouts=("wide",))
    (plain,) = form_groups([SPEC], backend)
    assert plain.choice.spec.provider == "wide"
    for provider in (None, "wide"):  # the plain layout would take 24: with the reference alone, or not with "wide"
        with pytest.raises(ConfigError, match=r"block_size=24.*other sizes:\n.*layout wide.*nearest is 16$"):
            form_groups([SPEC], backend, block_size=24, provider=provider)
    (window,) = form_groups([WINDOW], backend, block_size=24)  # no kernel does it in any size
    assert window.choice.is_reference


def test_a_given_number_of_blocks_is_taken() -> None:
    specs, length = size_pools(groups(SPEC, WINDOW), demand(padding=9), EngineConfig(num_kv_blocks=20), _never)
    assert [(one.num_blocks, one.num_scratch_blocks, one.window) for one in specs] == [(20, 3, None), (20, 3, 8)]
    assert length == 64
    with pytest.raises(CacheMemoryError, match=r"num_kv_blocks=5.*3 are scratch blocks.*Give at least 6"):
        size_pools(groups(SPEC, WINDOW), demand(padding=9), EngineConfig(num_kv_blocks=5), _never)


def _never() -> CacheBudget:
    raise AssertionError("no budget is needed")


def test_bytes_are_shared_out_and_windows_take_no_more_than_they_can_use() -> None:
    pair = groups(SPEC, WINDOW)
    config = EngineConfig(kv_cache_memory=pair[0].bytes_per_block() * 60)
    specs, length = size_pools(pair, demand(), config, _never)
    assert length == 64
    used = sum(one.num_blocks * group.bytes_per_block() for one, group in zip(specs, pair))
    assert 55 * pair[0].bytes_per_block() < used <= config.kv_cache_memory  # type: ignore[operator]
    plenty = EngineConfig(kv_cache_memory=1 << 40)
    specs, _ = size_pools(pair, demand(max_num_seqs=1, max_model_len=4000), plenty, _never)
    assert specs[0].num_blocks == 1 + 4004 // 4
    assert specs[1].num_blocks == 1 + (16 + 4 + 32) // 4


def test_too_little_memory_says_what_fits_and_what_to_change() -> None:
    pair = groups(SPEC)
    small = EngineConfig(kv_cache_memory=pair[0].bytes_per_block() * 9)
    with pytest.raises(CacheMemoryError, match=r"64 tokens takes .*enough for 32 tokens.*Raise kv_cache_memory"):
        size_pools(pair, demand(wanted=True), small, _never)
    specs, length = size_pools(pair, demand(), small, _never)
    assert (specs[0].num_blocks, length) == (9, 32)
    with pytest.raises(CacheMemoryError, match="Raise kv_cache_memory"):
        size_pools(pair, demand(), EngineConfig(kv_cache_memory=10), _never)


class FullDevice(HostDevice):
    free = 3 << 20

    def empty_cache(self, group: KVGroup, blocks: int) -> Any:
        raise RuntimeError("device is out of memory: tried to allocate too much")


def test_an_allocation_that_fails_names_sizes_and_options(llama_folder: Path) -> None:
    specs, _ = size_pools(groups(SPEC), demand(), EngineConfig(num_kv_blocks=3000), _never)
    with pytest.raises(CacheMemoryError, match=r"3000 blocks of 4 tokens.*About 3072 blocks fit: lower num_kv_blocks"):
        allocate(FullDevice(), groups(SPEC), specs)
    with pytest.raises(CacheMemoryError, match=r"out of memory|free on"):
        make_runner(llama_folder, backend=host_backend(FullDevice()))


def test_a_host_is_not_asked_for_more_than_it_has() -> None:
    """It would promise it, and kill the process when the blocks are used."""
    device = HostDevice()
    device.free = 3 << 20
    specs, _ = size_pools(groups(SPEC), demand(), EngineConfig(num_kv_blocks=3073), _never)
    with pytest.raises(CacheMemoryError, match=r"3073 blocks of 4 tokens.*About 3072 blocks fit: lower num_kv_blocks"):
        allocate(device, groups(SPEC), specs)
    device.free += 1024
    assert allocate(device, groups(SPEC), specs)[0].k.shape[0] == 3073


def test_weights_that_do_not_fit_say_what_they_take_and_what_would_fit(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(CausalLM, "load", full)
    device = HostDevice()
    device.free = 120_000  # the model has 29 thousand parameters
    words = (
        r"do not fit in the memory of cpu: \d\d,\d{3} parameters take 0\.\d\d MiB in float32, and 0.11 MiB of "
        r"16.00 GiB were free. quantization='int8' takes .*quantization='int4' takes .*tensor_parallel_size=2 puts"
    )
    with pytest.raises(ModelLoadError, match=words) as caught:
        make_runner(llama_folder, backend=host_backend(device))
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    device.free = 0
    with pytest.raises(ModelLoadError, match=r"0.00 MiB of 16.00 GiB were free. Free memory on the device"):
        make_runner(llama_folder, backend=host_backend(device))


def test_the_host_takes_a_share_of_what_is_free(llama_folder: Path) -> None:
    device = HostDevice()
    device.free = 1 << 20
    runner = make_runner(llama_folder, backend=host_backend(device), num_kv_blocks=None)
    (group,), (spec,) = runner.groups, runner.group_specs
    assert 0.35 * device.free < spec.num_blocks * group.bytes_per_block() <= 0.4 * device.free or spec.num_blocks == 69
    device.free = 1 << 12
    with pytest.raises(CacheMemoryError, match=r"40% of the 0.00 MiB that are free.*kv_cache_memory"):
        make_runner(llama_folder, backend=host_backend(device), num_kv_blocks=None)


class Meter:
    """torch's module of a device of 1,000 MiB with 600 MiB of weights; a step takes 100 KiB a token."""

    def __init__(self) -> None:
        self.used = self.peak = 600 << 20
        self.asked: list[int] = []

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return (1000 << 20) - self.used, 1000 << 20

    def memory_allocated(self, index: int) -> int:
        return self.used

    memory_reserved = memory_allocated

    def reset_peak_memory_stats(self, index: int) -> None:
        self.peak = self.used

    def max_memory_allocated(self, index: int) -> int:
        return self.peak

    def synchronize(self, index: int) -> None: ...

    def step(self, tokens: int) -> Callable[[], None]:
        def run() -> None:
            self.asked.append(tokens)
            need = self.used + tokens * 100 * 1024
            if need > 1000 << 20:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            self.peak = need

        return run


class Metered(Device):
    type, index, name = "meter", 0, "a card"
    torch_device = torch.device("meta")

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    @property
    def module(self) -> Any:
        return self.meter


def test_the_cache_takes_what_is_left_beside_weights_activations_and_graphs() -> None:
    meter = Meter()
    assert has_meter(Metered(meter))
    config = EngineConfig(memory_utilization=0.9)
    found = metered_budget(Metered(meter), config, meter.step, 1024, 20 << 20, smaller=[512])
    assert found.size == (900 - 600 - 100 - 20) << 20 and meter.asked == [1024]
    assert "0.59 GiB are in use, 100.00 MiB go to activations and 20.00 MiB to graphs" in found.source
    # Somebody else's memory on the same device counts too, and nothing left is none rather than less.
    meter.used = 890 << 20
    assert metered_budget(Metered(meter), config, meter.step, 512, 0).size == 0


def test_a_step_that_does_not_fit_names_one_that_does() -> None:
    meter = Meter()
    config = EngineConfig(max_num_seqs=256)
    words = r"8192 tokens and the logits of 256 requests do not fit .*0.39 GiB of 0.98 GiB are free on a card"
    with pytest.raises(
        CacheMemoryError, match=rf"{words}.*One of 4096 tokens fits: set max_num_batched_tokens=4096"
    ) as e:
        metered_budget(Metered(meter), config, meter.step, 8192, 0, smaller=[4096, 2048])
    assert isinstance(e.value.__cause__, torch.OutOfMemoryError) and meter.asked == [8192, 4096]
    with pytest.raises(CacheMemoryError, match=r"Nor does one of 5000 tokens: lower max_num_seqs"):
        metered_budget(Metered(meter), config, meter.step, 8192, 0, smaller=[5000])
    with pytest.raises(
        CacheMemoryError, match="Set a lower max_num_batched_tokens, lower max_num_seqs, or take smaller"
    ):
        metered_budget(Metered(meter), config, meter.step, 8192, 0)


def test_a_step_whose_own_cache_does_not_fit_is_told_from_a_broken_one() -> None:
    def full(tokens: int) -> Callable[[], None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(tokens: int) -> Callable[[], None]:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(CacheMemoryError, match="do not fit beside the weights"):
        metered_budget(Metered(Meter()), EngineConfig(), full, 64, 0)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        metered_budget(Metered(Meter()), EngineConfig(), broken, 64, 0)
