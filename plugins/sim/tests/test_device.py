"""Memory, streams, events, devices, pinned buffers, modules: what torch and the core's Device defaults ask for."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dougong_sim
from dougong.errors import BackendNotFoundError, PluginLoadError
from dougong.hal import find_backends, open_backend
from dougong.plugins import load_plugins
from dougong_sim.device import SimDevice
from dougong_sim.extension import install

MIB = 1 << 20


def test_memory_is_counted_and_limited(device: SimDevice, limit: int) -> None:
    before = torch.sim.memory_allocated()
    held = torch.empty(32 * MIB, dtype=torch.uint8, device="sim")
    assert torch.sim.memory_allocated() - before == 32 * MIB
    assert device.memory().free == limit - 32 * MIB
    assert torch.accelerator.get_memory_info(0) == torch.sim.mem_get_info(0)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 48\.00 MiB\. Device 0 .* 32\.00 MiB is free"):
        torch.empty(48 * MIB, dtype=torch.uint8, device="sim")
    torch.empty(48 * MIB, dtype=torch.uint8, device="sim:1")  # the other device has its own
    del held
    torch.empty(48 * MIB, dtype=torch.uint8, device="sim")
    assert torch.sim.memory_allocated() == before
    assert torch.sim.memory_stats()["num_ooms"] >= 1
    assert torch.sim.max_memory_allocated() >= before + 48 * MIB
    torch.sim.reset_peak_memory_stats()
    assert torch.sim.max_memory_allocated() == before == torch.accelerator.max_memory_allocated()


def test_results_count_too(limit: int) -> None:
    x = torch.ones(20 * MIB // 4, device="sim")
    y = x * 2
    with pytest.raises(torch.OutOfMemoryError):
        _ = torch.cat((x, y))
    del x, y
    torch.ones(60 * MIB // 4, device="sim")


def test_a_view_keeps_its_storage(limit: int) -> None:
    before = torch.sim.memory_allocated()
    view = torch.ones(8 * MIB, dtype=torch.uint8, device="sim")[5:6]
    assert torch.sim.memory_allocated() - before == 8 * MIB
    assert view.item() == 1
    del view
    assert torch.sim.memory_allocated() == before


def test_large_memory_is_committed_lazily() -> None:
    cache = torch.empty(3 << 30, dtype=torch.uint8, device="sim")
    cache[-1] = 3
    assert cache[-1].item() == 3
    assert cache.view(torch.int64).numel() == 3 << 27


def test_devices() -> None:
    assert torch.accelerator.current_accelerator() == torch.device("sim")
    assert torch.accelerator.device_count() == torch.sim.device_count() == 2
    assert torch.get_device_module("sim") is torch.sim
    assert torch.sim.is_available()
    with torch.sim.device(1):
        assert torch.sim.current_device() == 1 == torch.accelerator.current_device_index()
        assert torch.empty(1, device="sim").device == torch.device("sim", 1)
    assert torch.sim.current_device() == 0
    with torch.device("sim:1"):
        assert torch.ones(2).device == torch.device("sim", 1)
    assert torch.ones(2, device="sim:1").new_zeros(1).device.index == 1
    with pytest.raises(RuntimeError, match="no device 2; this process has 2"):
        torch.empty(1, device="sim:2")
    with pytest.raises(ValueError, match="expected a sim device"):
        torch.sim.set_device("cpu")


def test_streams_and_events(device: SimDevice) -> None:
    default, side = torch.sim.current_stream(), device.new_stream()
    assert default == torch.sim.default_stream()
    assert side != default
    assert isinstance(side, torch.sim.Stream)
    start, end = torch.sim.Event(enable_timing=True), torch.sim.Event(enable_timing=True)
    with device.stream(side):
        assert torch.sim.current_stream() == side
        start.record()
        x = torch.ones(8, device="sim").to("cpu", non_blocking=True)
        end.record(side)
    assert torch.sim.current_stream() == default
    default.wait_event(end)
    default.wait_stream(side)
    event = device.new_event()
    event.record()
    event.wait(side)
    event.synchronize()
    side.synchronize()
    assert event.query()
    assert side.query()
    assert start.elapsed_time(end) >= 0
    device.synchronize()
    torch.accelerator.synchronize()
    assert x.sum() == 8
    with device.stream(None):
        assert torch.sim.current_stream() == default


def test_pinned_memory() -> None:
    plain = torch.ones(4)
    pinned = plain.pin_memory()
    assert pinned.is_pinned()
    assert pinned[1:].is_pinned()
    assert not plain.is_pinned()
    assert torch.empty(3, pin_memory=True).is_pinned()
    there = torch.zeros(4, device="sim").copy_(pinned, non_blocking=True)
    back = torch.empty(4, pin_memory=True).copy_(there, non_blocking=True)
    torch.sim.synchronize()
    assert torch.equal(back, plain)
    with pytest.raises(RuntimeError, match="pin"):
        torch.ones(2, device="sim").pin_memory()


@contextmanager
def torch_future_swap() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_modules_and_files(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Embedding(3, 4))
    model[2].weight = model[0].weight  # tied
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, tmp_path / "w.safetensors")
    apart = copy.deepcopy(model).to("sim")
    assert apart[2].weight is not apart[0].weight  # torch unties on the way to any PrivateUse1 device …
    with torch_future_swap():
        moved = copy.deepcopy(model).to("sim", torch.bfloat16)
    assert moved[2].weight is moved[0].weight  # … unless it swaps parameters in place
    assert {p.device.type for p in moved.parameters()} == {"sim"}
    loaded = load_file(tmp_path / "w.safetensors", device="cpu")
    moved.load_state_dict({"2.weight": loaded["0.weight"], **loaded})
    assert torch.equal(moved[0].weight.cpu(), model[0].weight.bfloat16())
    buffer = io.BytesIO()
    torch.save(moved.state_dict(), buffer)
    buffer.seek(0)
    again = torch.load(buffer, map_location="cpu")
    assert torch.equal(again["1.weight"], moved[1].weight.cpu())
    buffer.seek(0)
    assert torch.load(buffer)["1.weight"].device.type == "sim"
    assert moved.cpu()[0].weight.device.type == "cpu"


def test_printing_shows_the_device() -> None:
    assert "device='sim:0'" in repr(torch.ones(2, device="sim"))
    assert torch.ones(2, device="sim").is_sim


def test_a_cpu_custom_operator_runs_on_the_device() -> None:
    @torch.library.custom_op("dougong_sim_test::twice", mutates_args=("out",), device_types="cpu")
    def twice(x: torch.Tensor, out: torch.Tensor) -> None:
        assert x.device.type == "cpu"
        out.copy_(x * 2)

    y = torch.zeros(3, device="sim")
    twice(torch.ones(3, device="sim"), y)
    assert y.tolist() == [2, 2, 2]


def test_one_name_per_process() -> None:
    assert install("sim") is torch.sim
    with pytest.raises(PluginLoadError, match="already 'sim' in this process and cannot become 'npu'"):
        install("npu")


def test_never_chosen_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOUGONG_BACKEND", raising=False)
    plugins = load_plugins(entries=(), extra=[("sim", dougong_sim)])
    reports = find_backends(plugins)
    assert [(r.spec.name, r.probe.ok) for r in reports] == [("sim", True)]
    with pytest.raises(BackendNotFoundError, match="no backend can run"):
        open_backend(plugins=plugins)
    backend = open_backend("sim", plugins=plugins)
    assert isinstance(backend.device, SimDevice)
    assert backend.device.facts()["devices"] == 2
