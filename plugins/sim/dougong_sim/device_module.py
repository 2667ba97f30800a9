"""``torch.sim``: the module that torch expects of a device type, after the pattern of ``torch.cuda``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

__all__ = ["make_module"]


def make_module(name: str) -> ModuleType:
    """The device module for a PrivateUse1 device called ``name``. The extension must be loaded."""
    ops = torch.ops.dougong_sim
    module: Any = ModuleType(f"torch.{name}", f"torch's simulated device type {name!r}.")

    def index_of(device: Any = None) -> int:
        if device is None:
            return int(ops.current_device())
        if isinstance(device, int):
            return device if device >= 0 else int(ops.current_device())
        device = torch.device(device)
        if device.type != name:
            raise ValueError(f"expected a {name} device, got {device}")
        return int(ops.current_device()) if device.index is None else int(device.index)

    # ----------------------------------------------------------------------------------------------- devices
    def set_device(device: Any) -> None:
        ops.set_device(index_of(device))

    def exchange(index: int) -> int:
        """torch's own guards: set the device and return the one before; a negative index changes nothing."""
        before = int(ops.current_device())
        if index >= 0:
            ops.set_device(index)
        return before

    @contextmanager
    def use_device(device: Any) -> Iterator[None]:
        before = exchange(index_of(device))
        try:
            yield
        finally:
            exchange(before)

    def get_device_properties(device: Any = None) -> SimpleNamespace:
        index = index_of(device)
        return SimpleNamespace(name=get_device_name(index), total_memory=ops.memory(index)[0])

    def get_device_name(device: Any = None) -> str:
        return f"simulated accelerator {index_of(device)}"

    # ------------------------------------------------------------------------------------ streams and events
    class Stream(torch.Stream):
        """A stream of the device. Work runs in the order of its calls, whatever the stream."""

        def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
            if "stream_id" in kwargs:
                return super().__new__(cls, **kwargs)
            where = torch.device(name, index_of(device))
            return super().__new__(cls, device=where, priority=priority)

    def Event(enable_timing: bool = False, **kwargs: Any) -> torch.Event:
        """An event of the device; without ``enable_timing`` it has no times to compare."""
        # Not a subclass: torch.Event.elapsed_time takes its own exact type only.
        return torch.Event(device=torch.device(name, int(ops.current_device())), enable_timing=enable_timing)

    def current_stream(device: Any = None) -> Any:
        with use_device(device):
            return torch.accelerator.current_stream(index_of(device))

    def default_stream(device: Any = None) -> Any:
        code = torch._C._autograd.DeviceType.PrivateUse1
        return Stream(stream_id=0, device_index=index_of(device), device_type=int(code.value))

    def set_stream(stream: Any) -> None:
        torch.accelerator.set_stream(stream)

    @contextmanager
    def stream(stream: Any) -> Iterator[None]:
        if stream is None:
            yield
            return
        with use_device(stream.device):
            before = torch.accelerator.current_stream(stream.device_index)
            torch.accelerator.set_stream(stream)
            try:
                yield
            finally:
                torch.accelerator.set_stream(before)

    def synchronize(device: Any = None) -> None:
        index_of(device)
        ops.synchronize()

    # ------------------------------------------------------------------------------------------------ memory
    def memory_stats(device: Any = None) -> dict[str, int]:
        keys = (
            "limit_bytes", "allocated_bytes.all.current", "allocated_bytes.all.peak", "reserved_bytes.all.current",
            "reserved_bytes.all.peak", "allocation.all.allocated", "allocation.all.freed", "num_ooms",
        )  # fmt: skip
        return dict(zip(keys, ops.memory(index_of(device)), strict=True))

    def stat(key: str) -> Any:
        return lambda device=None: memory_stats(device)[key]

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """(free, total) bytes."""
        stats = memory_stats(device)
        return stats["limit_bytes"] - stats["reserved_bytes.all.current"], stats["limit_bytes"]

    def set_memory_limit(limit: int, device: Any = None) -> None:
        """Change a device's capacity, in bytes. What is allocated stays, even beyond a smaller limit."""
        ops.set_capacity(index_of(device), limit)

    # ------------------------------------------------------------------------------------------------ random
    def manual_seed(seed: int) -> None:
        ops.seed(ops.current_device(), seed)

    def manual_seed_all(seed: int) -> None:
        for index in range(ops.device_count()):
            ops.seed(index, seed)

    def get_rng_state(device: Any = None) -> torch.Tensor:
        state: torch.Tensor = ops.rng_state(index_of(device))
        return state

    def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
        ops.set_rng_state(index_of(device), state)

    module.__dict__.update(
        is_dougong_sim=True,
        is_available=lambda: True,
        is_initialized=lambda: True,
        init=lambda: None,
        _lazy_init=lambda: None,
        _is_in_bad_fork=lambda: False,
        device_count=lambda: int(ops.device_count()),
        current_device=lambda: int(ops.current_device()),
        set_device=set_device,
        device=use_device,
        _exchange_device=exchange,
        _maybe_exchange_device=exchange,
        get_device_name=get_device_name,
        get_device_properties=get_device_properties,
        Stream=Stream,
        Event=Event,
        stream=stream,
        set_stream=set_stream,
        current_stream=current_stream,
        default_stream=default_stream,
        synchronize=synchronize,
        is_current_stream_capturing=lambda: bool(ops.is_capturing()),
        empty_cache=lambda: None,
        memory_stats=memory_stats,
        memory_allocated=stat("allocated_bytes.all.current"),
        max_memory_allocated=stat("allocated_bytes.all.peak"),
        memory_reserved=stat("reserved_bytes.all.current"),
        max_memory_reserved=stat("reserved_bytes.all.peak"),
        reset_peak_memory_stats=lambda device=None: ops.reset_peak(index_of(device)),
        mem_get_info=mem_get_info,
        set_memory_limit=set_memory_limit,
        manual_seed=manual_seed,
        manual_seed_all=manual_seed_all,
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        is_bf16_supported=lambda: True,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )
    return module  # type: ignore[no-any-return]
