"""A device on the host that works late: what is launched waits in its stream's queue, in order, until somebody asks.

Cases about copies and events pass by themselves where everything is done at once, as on a CPU. Here a copy that does
not wait, and an event that promises too much, show. Bugs are planted by replacing lines of this text (``mutants``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dougong.plugins import ABI, BackendSpec, hookimpl
from dougong_compat.selftest.plant import at_uproot
from dougong_compat.selftest.reference_backend import HostDevice

__all__ = ["LateDevice", "LateEvent", "LateQueue", "LateStream", "dougong_backends"]


class LateQueue(TorchFunctionMode):
    """Sees every call of torch. Tensors made with ``device=`` are the device's; all others are the host's own.

    Calls in place on a device tensor, and copies that need not be waited for, are kept. Any other call that is given a
    device tensor has all that was kept done first, so that it computes what a stream in order would.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Callable[[], object]] = []
        """The current stream's."""
        self.side: list[Callable[[], object]] = []
        """The other stream's."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        lazily = given.get("non_blocking", False)
        if func is torch.Tensor.copy_ and lazily:
            self.copy(args[0], args[1])
            return args[0]
        if func is torch.Tensor.to and lazily:
            there = func(torch.empty_like(args[0]), *args[1:], **{**given, "copy": True})
            self.copy(self.own(there), args[0])
            return there
        if func in (torch.Tensor.fill_, torch.Tensor.add_) and self.owns(args[0]):
            self.kept.append(lambda: func(*args, **given))
            return args[0]
        mine = any(self.owns(x) for x in (*args, *given.values()))
        if mine:
            self.finish(len(self.kept))
        result = func(*args, **given)
        return self.own(result) if mine or given.get("device") is not None else result

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy when all that was launched before is done."""
        self.kept.append(lambda: torch.Tensor.copy_(target, source))

    def finish(self, count: int) -> None:
        """Do the oldest ``count`` of what is kept."""
        now, self.kept = self.kept[:count], self.kept[count:]
        with torch._C.DisableTorchFunction():
            for call in now:
                call()

    def owns(self, x: Any) -> bool:
        """Whether ``x`` is a tensor of the device's, or holds one."""
        if isinstance(x, (list, tuple)):
            return any(self.owns(part) for part in x)
        return isinstance(x, torch.Tensor) and getattr(x, "late", False)

    def own(self, x: Any) -> Any:
        """``x``, whose tensors are the device's from here on."""
        for part in x if isinstance(x, (list, tuple)) else (x,):
            if isinstance(part, torch.Tensor):
                part.late = True  # type: ignore[attr-defined]
        return x

    def finish_all(self) -> None:
        """Do what is kept on both streams."""
        for _ in range(2):
            self.finish(len(self.kept))
            self.swap()

    def swap(self) -> None:
        """Have the other stream be the current one."""
        self.kept, self.side = self.side, self.kept


class LateEvent:
    """Waits for what was launched on the current stream before ``record``."""

    def __init__(self, queue: LateQueue) -> None:
        self.queue = queue
        self.before: list[Callable[[], object]] = []

    def record(self) -> None:
        self.before = list(self.queue.kept)

    def query(self) -> bool:
        return not any(call in (*self.queue.kept, *self.queue.side) for call in self.before)

    def synchronize(self) -> None:
        if not any(call in self.queue.kept for call in self.before):
            self.queue.swap()
            self._catch_up()
            self.queue.swap()
        self._catch_up()

    def _catch_up(self) -> None:
        while any(call in self.queue.kept for call in self.before):
            self.queue.finish(1)


class LateStream:
    """The device's one side stream."""

    def __init__(self, queue: LateQueue) -> None:
        self.queue = queue

    def wait_event(self, event: LateEvent) -> None:
        self.queue.side.append(event.synchronize)


class LateDevice(HostDevice):
    """The host, late. One is open at a time; the queue listens until another backend is opened."""

    queue: LateQueue

    def setup(self) -> None:
        self.listen(LateQueue())

    def listen(self, queue: LateQueue) -> None:
        """Have ``queue`` take what is launched from here on."""
        self.queue = queue
        listening = ExitStack()
        listening.enter_context(queue)
        at_uproot(listening.close)

    def synchronize(self) -> None:
        self.queue.finish_all()

    def new_stream(self) -> LateStream:
        return LateStream(self.queue)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.queue.swap()
        try:
            yield
        finally:
            self.queue.swap()

    def new_event(self) -> LateEvent:
        return LateEvent(self.queue)


@hookimpl
def dougong_backends() -> Iterable[BackendSpec]:
    yield BackendSpec(
        name="honest-late",
        abi=ABI,
        target="dougong_compat.selftest.late:LateDevice",
        score=-100,
        description="the host's CPU, whose work is done when somebody waits for it",
    )
