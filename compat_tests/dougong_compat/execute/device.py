"""L0: the device as the core uses it: discovery, copies, streams, events, pinned buffers, memory accounting.

Each check yields (what should hold, whether it does). Work is checked by its results, never by time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dougong.hal import NHD, AttentionSpec, KVGroup, MemoryInfo
from dougong_compat.harness.cachemaker import CannotAllocate
from dougong_compat.harness.memory import lazy_bytes
from dougong_compat.numbers import dtype_of

__all__ = ["execute"]

_Checks = Iterator[tuple[str, bool]]


def execute(ctx: Any, request: dict[str, Any], message: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    params = request["params"]
    check = globals()[f"_{params['check']}"]
    message["provider"] = ctx.device.name
    message["checks"] = [[what, bool(held)] for what, held in check(ctx.device, params, request["seed"])]


def _identity(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    yield "type is a torch device type", torch.device(device.type) is not None
    yield "index is kept", device.index == 0
    yield "tensors land on it", torch.empty(1, device=device.torch_device).device.type == device.type
    yield "it has a name", bool(device.name)
    yield "at least one dtype", len(device.dtypes) > 0
    yield "a distributed backend is named", isinstance(device.dist_backend, str) and bool(device.dist_backend)
    yield "facts are a mapping", isinstance(device.facts(), dict)


def _dtypes(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    for dtype in device.dtypes:
        x = torch.ones(3, 5, dtype=dtype, device=device.torch_device)
        yield f"arithmetic in {dtype}", bool(((x + x).cpu() == 2).all())


def _copy(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    """There and back, ``count`` elements from ``offset``, bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    dtype, count, offset = dtype_of(params["dtype"]), params["count"], params["offset"]
    raw = torch.randint(0, 256, ((count + offset) * dtype.itemsize,), generator=generator).to(torch.uint8)
    source = raw.view(dtype)[offset:]
    there = torch.zeros(count, dtype=dtype, device=device.torch_device)
    there.copy_(source)
    again = there.clone()
    device.synchronize()
    back = again.cpu()
    same = torch.equal(back.view(torch.uint8), source.contiguous().view(torch.uint8)) if count else True
    yield f"{count} elements of {dtype} at offset {offset} come back", same


def _strided_copy(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    generator = torch.Generator().manual_seed(seed)
    host = torch.randn(9, 7, 5, generator=generator)
    on = host.to(device.torch_device)
    yield "a transposed view", torch.equal(on.transpose(0, 2).cpu(), host.transpose(0, 2))
    yield "every second row", torch.equal(on[::2].contiguous().cpu(), host[::2])
    target = torch.zeros(5, 7, 9, device=device.torch_device)
    target.permute(2, 1, 0).copy_(on)
    yield "into a permuted view", torch.equal(target.cpu(), host.permute(2, 1, 0))
    yield "a slice written leaves the rest", _slice_write(device, host)


def _slice_write(device: Any, host: torch.Tensor) -> bool:
    on = host.to(device.torch_device)
    on[3:5] = 7.0
    want = host.clone()
    want[3:5] = 7.0
    return torch.equal(on.cpu(), want)


def _index(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    generator = torch.Generator().manual_seed(seed)
    host = torch.randn(50, 6, generator=generator)
    rows = torch.randperm(50, generator=generator)[:13]
    on = host.to(device.torch_device)
    yield "index_select", torch.equal(on.index_select(0, rows.to(device.torch_device)).cpu(), host[rows])
    on.index_copy_(0, rows.to(device.torch_device), torch.zeros(13, 6, device=device.torch_device))
    want = host.clone()
    want[rows] = 0
    yield "index_copy_ touches its rows only", torch.equal(on.cpu(), want)
    ints = torch.arange(7, dtype=torch.int32, device=device.torch_device)
    yield "int32 prefix sums", ints.cumsum(0).cpu().tolist() == [0, 1, 3, 6, 10, 15, 21]


def _giant(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    """More than 2 GiB: the last bytes are where they should be."""
    size = params["bytes"]
    try:
        if device.type == "cpu":
            x = lazy_bytes(size)
        else:
            if device.memory().free < 2 * size:
                raise CannotAllocate(f"{size / 2**30:.1f} GiB asked for")
            x = torch.zeros(size, dtype=torch.uint8, device=device.torch_device)
    except (OSError, RuntimeError) as error:
        raise CannotAllocate(str(error)) from error
    marks = {0: 1, 2**31 - 1: 2, 2**31: 3, size - 1: 4}
    for at, value in marks.items():
        x[at] = value
    device.synchronize()
    for at, value in marks.items():
        yield f"byte {at} of {size}", int(x[at]) == value
    yield "a slice past 2^31", x[2**31 - 2 : 2**31 + 2].cpu().tolist() == [0, 2, 3, 0]


def _streams(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    stream, event = device.new_stream(), device.new_event()
    x = torch.ones(1000, device=device.torch_device)
    with device.stream(stream):
        y = x * 3
        event.record()
    event.synchronize()
    device.synchronize()
    yield "a waited-for event means the work is done", bool((y.cpu() == 3).all())
    yield "query says so", event.query() in (True, None) or bool(event.query())


def _event_reuse(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    event = device.new_event()
    for turn in range(4):
        x = torch.full((513,), float(turn), device=device.torch_device)
        event.record()
        event.synchronize()
        yield f"turn {turn}", bool((x.cpu() == turn).all())


def _copy_after_compute(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    """What is copied out is what was computed before it (vllm 45704): behind it on the same stream, and on a side
    stream that waits for an event."""
    device_x = torch.zeros(1 << 16, device=device.torch_device)
    for turn in range(1, 12):
        device_x.fill_(0)
        for _ in range(turn):
            device_x.add_(1)
        host = torch.empty(1 << 16, pin_memory=device.pins_memory)
        event = device.new_event()
        host.copy_(device_x, non_blocking=True)
        event.record()
        event.synchronize()
        yield f"turn {turn}", bool((host == turn).all())
    side = device.new_stream()
    if not hasattr(side, "wait_event"):
        return
    # Long enough on a device that a copy which does not wait overtakes it.
    size, adds = (1 << 12, 3) if device.torch_device.type == "cpu" else (1 << 24, 40)
    for turn in range(1, 4):
        results = torch.zeros(size, device=device.torch_device)
        for _ in range(adds):
            results.add_(turn)
        computed = device.new_event()
        computed.record()
        host = torch.empty(size, pin_memory=device.pins_memory)
        side.wait_event(computed)
        with device.stream(side):
            host.copy_(results, non_blocking=True)
            arrived = device.new_event()
            arrived.record()
        arrived.synchronize()
        yield f"turn {turn}, on a side stream", bool((host == adds * turn).all())


def _compute_after_copy(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    """What is computed after a copy in, on the same stream, sees the copy."""
    x = torch.zeros(1 << 16, device=device.torch_device)
    for turn in range(1, 12):
        host = torch.full((1 << 16,), float(turn), pin_memory=device.pins_memory)
        x.copy_(host, non_blocking=True)
        y = x * 2
        device.synchronize()
        yield f"turn {turn}", bool((y.cpu() == 2 * turn).all())


def _pinned_lifetime(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    """A staging buffer may be written again after its event, not before; the copies all arrive (TensorRT-LLM 15546)."""
    host = torch.empty(4096, pin_memory=device.pins_memory)
    outs = []
    for turn in range(16):
        host.fill_(turn)
        outs.append(host.to(device.torch_device, non_blocking=True, copy=True))
        event = device.new_event()
        event.record()
        event.synchronize()
    device.synchronize()
    for turn, out in enumerate(outs):
        yield f"copy {turn}", bool((out.cpu() == turn).all())


def _memory(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    before = device.memory()
    yield "a MemoryInfo", isinstance(before, MemoryInfo)
    yield "free is within total", 0 <= before.free <= before.total
    yield "total is above 0", before.total > 0
    block = torch.ones(1 << 20, device=device.torch_device)
    device.synchronize()
    after = device.memory()
    yield "total stays", after.total == before.total
    yield "an allocation does not add free memory", after.free <= before.free + (1 << 26)
    del block


def _cache(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, dtype=device.dtypes[0])
    layout = NHD
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=layout, manager_block=16, kernel_block=16)
    for blocks in (1, 7):
        cache = device.empty_cache(group, blocks)
        yield f"{blocks} blocks", cache.num_blocks == blocks
        yield "on the device", cache.k.device.type == device.type and cache.v.device.type == device.type
        yield "in the cache's dtype", cache.k.dtype == spec.kv_dtype
        yield "planes do not overlap", cache.k.data_ptr() != cache.v.data_ptr()


def _seeding(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    torch.manual_seed(seed & 0x7FFFFFFF)
    a = torch.rand(100, device=device.torch_device).cpu()
    torch.manual_seed(seed & 0x7FFFFFFF)
    b = torch.rand(100, device=device.torch_device).cpu()
    yield "the same seed gives the same numbers", torch.equal(a, b)


def _empties(device: Any, params: dict[str, Any], seed: int) -> _Checks:
    for shape in ((0,), (0, 4, 64), (3, 0)):
        x = torch.zeros(shape, device=device.torch_device)
        yield f"an empty tensor of shape {shape}", tuple((x + 1).cpu().shape) == shape
