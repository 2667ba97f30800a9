"""Several workers on one device: shares of the cases, one queue, answers judged as they come.

Kernels that compile when first used (Triton's) are compiled once per process, so cases of one kernel shape go to one
worker. What needs much memory, or the device to itself, is asked by the first worker alone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dougong_compat.pool import Answer, Clock, OpenError, Worker
from dougong_compat.problem import DEFAULTS

__all__ = ["answer_all", "is_heavy", "shares"]

#: What a compiled kernel depends on, as far as the suite can know.
_SHAPE = (
    "dtype", "kv", "layout", "block", "D", "Dv", "H", "K", "window", "softcap", "alibi", "sinks", "causal", "latent",
    "lse", "ragged", "scale_tensor", "batch_invariant", "stride", "op", "check",
)  # fmt: skip
_LEAST, _MOST = 8, 24


def _params(request: Mapping[str, Any]) -> Mapping[str, Any]:
    params: Mapping[str, Any] = request["params"]
    base: Mapping[str, Any] = params.get("base", params)
    return base


def is_heavy(request: Mapping[str, Any]) -> bool:
    """Whether a case may take gigabytes of the device."""
    params = _params(request)
    return params.get("stride") in ("giant", "wide") or (request["kind"] == "device" and params["check"] == "giant")


def _alone(request: Mapping[str, Any]) -> bool:
    """Whether a case looks at what all processes share: the device's free memory."""
    return request["kind"] == "device" and bool(_params(request)["check"] == "memory")


def _shape(request: Mapping[str, Any]) -> str:
    params = _params(request)
    if "rows" in params:
        params, kind = {**DEFAULTS, **params}, "attention"
    else:
        kind = request["kind"]
    return json.dumps([kind, *(params.get(name) for name in _SHAPE)])


def shares(requests: Sequence[Mapping[str, Any]], jobs: int) -> tuple[list[int], list[int], list[list[int]]]:
    """(asked before all others, asked by the first worker only, the rest in shares): indices into ``requests``.

    One worker is asked everything, in order.
    """
    everything = range(len(requests))
    if jobs == 1:
        return [], [], [list(everything)] if requests else []
    alone = [at for at in everything if _alone(requests[at])]
    heavy = [at for at in everything if is_heavy(requests[at])]
    apart = {*alone, *heavy}
    by_shape: dict[str, list[int]] = {}
    engine: list[int] = []
    for at in everything:
        if requests[at]["kind"] == "engine":  # seconds each: first, and few at a time
            engine.append(at)
        elif at not in apart:
            by_shape.setdefault(_shape(requests[at]), []).append(at)
    cut = [engine[at : at + 4] for at in range(0, len(engine), 4)]
    share: list[int] = []
    for name in sorted(by_shape):
        group = by_shape[name]
        if len(group) > _MOST:
            cut += [group[at : at + _MOST] for at in range(0, len(group), _MOST)]
            continue
        share += group
        if len(share) >= _LEAST:
            cut.append(share)
            share = []
    return alone, heavy, [*cut, share] if share else cut


def _opens(worker: Worker) -> bool:
    try:
        worker.start()
    except OpenError:
        return False
    return True


def answer_all(
    workers: Sequence[Worker],
    requests: Sequence[dict[str, Any]],
    take: Callable[[int, Answer], None],
    clock: Clock,
) -> None:
    """Ask every request once and hand its answer to ``take(index, answer)``, until all are answered or time is up.

    ``take`` is called from several threads, one per worker; the first error in any of them ends the run. A worker that
    cannot open the backend a second time beside the first (no memory left, say) leaves its work to the others.

    Raises:
        OpenError: not even the first worker could open the backend.
    """
    alone, heavy, cut = shares(requests, len(workers))
    lock, queue = threading.Lock(), iter(cut)

    def ask(worker: Worker, indices: Sequence[int]) -> None:
        # the list is longer than the answers where time runs out
        for at, answer in zip(indices, worker.ask([requests[at] for at in indices], clock), strict=False):
            take(at, answer)

    def next_share() -> list[int] | None:
        with lock:
            return next(queue, None)

    def serve(worker: Worker, first: Sequence[int]) -> None:
        try:
            if worker is not workers[0] and not _opens(worker):
                return
            if first:
                ask(worker, first)
            while not clock.over and (share := next_share()) is not None:
                ask(worker, share)
        except BaseException:
            clock.stop()
            raise

    if len(workers) == 1:
        serve(workers[0], ())
        return
    ask(workers[0], alone)
    with ThreadPoolExecutor(len(workers)) as threads:
        lanes = [threads.submit(serve, worker, heavy if not at else ()) for at, worker in enumerate(workers)]
        try:
            for lane in lanes:
                lane.result()
        except BaseException:  # an interrupt too: nobody waits for what nobody wants any more
            clock.stop()
            for worker in workers:
                worker.kill()
            raise
