"""Sending a request's KV to other engines and taking it from them: what to move, when, and under which names."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from dougong.config import EngineConfig
from dougong.connectors import open_connector
from dougong.execution import HostCopies, KVBlocks, ModelRunner
from dougong.kv import BlockHasher, KVCacheManager
from dougong.models import model_digest
from dougong.plugins import KVBlockName, KVConnector, KVContext, KVFormat, KVRole, KVTransferError, Plugins
from dougong.scheduling import Request, RequestStatus, StepPlan

__all__ = ["KVTransfer", "KVTransferStats", "open_transfer"]

log = logging.getLogger(__name__)

_DIGEST_SIZE = 16
_WAIT_S = 5.0
"""How long a promised block is waited for when the request does not say."""


@dataclass
class KVTransferStats:
    """Counters since the start."""

    stored_blocks: int = 0
    loaded_tokens: int = 0
    failures: int = 0
    """Requests whose promised KV did not come, and blocks that were refused or lost on the way."""


@dataclass
class _Progress:
    """One request's names, and how far it is."""

    chain: list[bytes] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    """Of full transfer blocks: the chain's links, at the length that connectors know."""
    stored: int = 0
    """Transfer blocks looked at for storing."""
    promised: int = 0
    deadline: float = 0.0
    fetched_at: int = -1
    """The number of preemptions that the request had when its KV was last looked for."""
    waiting: bool = False


@dataclass
class _Sending:
    """Blocks on their way to the host."""

    request: Request
    names: list[KVBlockName]
    copies: HostCopies = field(repr=False)


class KVTransfer:
    """One engine's side of its connector. Called on the engine's thread.

    A producer stores every full transfer block of its requests, prompt and answer, once the step that computed it has
    ended; copies to the host run behind the next step. A consumer loads what its request lacks right before the
    request is admitted, into free blocks, and puts them into the prefix index under this engine's own names: from there
    on they are a prefix hit like any other. So KV that does not come, or comes too late, is computed.
    """

    def __init__(self, connector: KVConnector, kv: KVCacheManager, blocks: KVBlocks, format_: KVFormat) -> None:
        self.connector = connector
        self.stats = KVTransferStats()
        self.produces = connector.context.role.produces
        self.consumes = connector.context.role.consumes
        self._prefetches = type(connector).prefetch is not KVConnector.prefetch
        self._kv = kv
        self._blocks = blocks
        self._identity = blake2b(json.dumps(format_.to_dict(), sort_keys=True).encode()).hexdigest()
        self._hasher: BlockHasher | None = None
        self._key = b""
        self._progress: dict[Request, _Progress] = {}
        self._sending: deque[_Sending] = deque()

    # -- a request's life -------------------------------------------------------------------------------------

    def expect(self, request: Request, params: Mapping[str, Any] | None) -> None:
        """A request was added; ``params`` are its ``kv_transfer_params``."""
        if not self.consumes:
            return
        if self._prefetches:
            names = self._names(request, request.num_tokens // max(1, self.connector.block_tokens)) or ()
            self.connector.prefetch([KVBlockName(group.index, name) for group in self._kv.groups for name in names])
        if not params:
            return
        progress = self._of(request)
        progress.promised = int(params.get("num_tokens", 0))
        progress.deadline = time.monotonic() + float(params.get("wait_s", _WAIT_S))

    def finished(self, request: Request) -> dict[str, Any] | None:
        """A request ended: what its consumer needs to know; None if nothing was stored."""
        progress = self._progress.pop(request, None)
        if progress is None or not self.produces or self._hasher is None:
            return None
        tokens = progress.stored * self._hasher.block_size
        if not tokens:
            return None
        return {"num_tokens": tokens, **self.connector.finished(request.request_id, tokens)}

    @property
    def num_waiting(self) -> int:
        """Requests that are held back until their promised KV is there or overdue."""
        return sum(progress.waiting for progress in self._progress.values())

    @property
    def has_work(self) -> bool:
        return bool(self._sending)

    def _of(self, request: Request) -> _Progress:
        progress = self._progress.get(request)
        if progress is None:
            progress = self._progress[request] = _Progress()
        return progress

    def _names(self, request: Request, count: int) -> list[bytes] | None:
        """The first ``count`` links of a request's chain, as far as its tokens go; None while no side is there."""
        size = self.connector.block_tokens
        if not size:
            return None
        key = self.connector.hash_key
        if self._hasher is None or self._hasher.block_size != size or self._key != key:
            self._hasher, self._key = BlockHasher(size, key, self._identity), key
            for other in self._progress.values():
                other.chain, other.names, other.stored = [], [], 0
        progress = self._of(request)
        if not progress.chain:
            progress.chain = [self._hasher.root(request.adapter, request.cache_salt)]
        self._hasher.extend(progress.chain, request, min(count, request.num_tokens // size))
        for link in progress.chain[len(progress.names) + 1 :]:
            progress.names.append(blake2b(link, digest_size=_DIGEST_SIZE).digest())
        return progress.names[:count]

    # -- storing ----------------------------------------------------------------------------------------------

    def computed(self, plan: StepPlan) -> None:
        """A step has ended, its plan is about to be committed: begin to store the blocks that it filled."""
        if not self.produces:
            return
        size = self.connector.block_tokens
        for row, request in enumerate(plan.requests):
            full = (plan.starts[row] + plan.num_tokens[row]) // size
            if not full or request in plan.stale or request.status is not RequestStatus.RUNNING:
                continue
            if request.generation != self._kv.generation:
                continue  # computed with weights that are no more
            progress = self._of(request)
            if full > progress.stored:
                self._send(request, progress, full, size)

    def _send(self, request: Request, progress: _Progress, full: int, size: int) -> None:
        names = self._names(request, full)
        assert names is not None
        first, progress.stored = progress.stored, full
        for group in self._kv.groups:
            ratio = size // group.block_size
            table = request.block_ids[group.index]
            runs: list[list[int]] = []
            wanted: list[KVBlockName] = []
            for block in range(first, full):
                run = table[block * ratio : (block + 1) * ratio]
                if len(run) == ratio and 0 not in run:  # not behind the group's window
                    runs.append(run)
                    wanted.append(KVBlockName(group.index, names[block]))
            held = self.connector.contains(wanted)
            runs = [run for run, known in zip(runs, held) if not known]
            wanted = [name for name, known in zip(wanted, held) if not known]
            if runs:
                self._sending.append(_Sending(request, wanted, self._blocks.read(group.index, runs)))

    def flush(self) -> None:
        """Hand the connector all blocks whose copies have begun; waits for those that have not arrived."""
        while self._sending:
            batch = self._sending.popleft()
            data = batch.copies.get()[0].numpy()
            try:
                self.connector.store(batch.names, [memoryview(row) for row in data])
                self.stats.stored_blocks += len(batch.names)
            except Exception as error:  # whatever is wrong with a connector, requests go on
                self.stats.failures += 1
                name, count = batch.request.request_id, len(batch.names)
                log.warning("request %s: %d KV blocks were not stored: %s", name, count, _why(error))

    # -- loading ----------------------------------------------------------------------------------------------

    def admit(self, request: Request) -> bool:
        """A request is about to be admitted: load what it lacks. False: its KV is awaited, pass it over."""
        if not self.consumes or request.sampling.prompt_logprobs is not None:
            return True
        progress = self._of(request)
        if progress.fetched_at == request.num_preemptions:
            return True
        ready = self._count_ready(request) if progress.promised else 0
        if ready < progress.promised and time.monotonic() < progress.deadline:
            progress.waiting = True
            return False
        progress.waiting = False
        try:
            if not self._load(request):
                return True
        except Exception as error:  # whatever is wrong with a connector, requests go on
            self._failed(request, _why(error))
        else:
            if ready < progress.promised:
                self._failed(request, f"{progress.promised} tokens were promised, {ready} were there in time")
        progress.fetched_at, progress.promised = request.num_preemptions, 0
        return True

    def _failed(self, request: Request, why: str) -> None:
        self.stats.failures += 1
        log.warning("request %s: KV transfer failed, the rest is computed here: %s", request.request_id, why)

    def _count_ready(self, request: Request) -> int:
        """Tokens from the beginning on that are here or could be loaded."""
        size = self.connector.block_tokens
        names = self._names(request, request.num_tokens // size) if size else None
        if not names:
            return 0
        here = self._kv.match(request).num_tokens
        block = here // size
        full_groups = [group.index for group in self._kv.groups if group.window is None] or [0]
        while block < len(names) and all(
            self.connector.contains([KVBlockName(group, names[block]) for group in full_groups])
        ):
            block += 1
        return max(here, block * size)

    def _load(self, request: Request) -> bool:
        """False: there is no room now; the request itself will find none either, and is asked for again."""
        size = self.connector.block_tokens
        names = self._names(request, request.num_tokens // size) if size else None
        if not names:
            return True
        kv = self._kv
        hit = kv.match(request)
        first = hit.num_tokens // size
        last = self._end(names, first)
        if last * size <= hit.num_tokens:
            return True
        for group in kv.groups:
            begin = max(first, group.first_visible_block(last * size) * group.block_size // size)
            wanted = list(range(begin, last))
            ratio = size // group.block_size
            lent = kv.lend(group.index, len(wanted) * ratio, hit)
            if lent is None:
                return False
            try:
                found = self.connector.load([KVBlockName(group.index, names[block]) for block in wanted])
                good = self._whole(group.index, size, found)
                runs = [lent[place * ratio : (place + 1) * ratio] for place in range(len(good))]
                if good:
                    self._blocks.write(group.index, runs, good)
                    if group.window is None:
                        self.stats.loaded_tokens += len(good) * size
            except BaseException:
                kv.adopt(request, group.index, 0, lent, 0)
                raise
            kv.adopt(request, group.index, begin * ratio, lent, len(good) * ratio)
            if len(good) < len(wanted) and group.window is None:
                raise KVTransferError(f"of {len(wanted)} blocks {len(good)} came")
        return True

    def _end(self, names: Sequence[bytes], first: int) -> int:
        """Blocks up to the first one that a group without a window could not load."""
        for group in self._kv.groups:
            if group.window is None:
                held = self.connector.contains([KVBlockName(group.index, name) for name in names[first:]])
                count = held.index(False) if False in held else len(held)
                names = names[: first + count]
        return len(names)

    def _whole(self, group: int, size: int, found: Sequence[bytes]) -> list[bytes]:
        """The blocks up to the first of a wrong size, which no honest connector gives."""
        expected = self._blocks.bytes_per_token(group) * size
        for block in found:
            if len(block) != expected:
                raise KVTransferError(f"a block of {len(block)} bytes; {size} tokens of this model take {expected}")
        return list(found)

    def reset(self) -> None:
        """The weights have changed: forget what is on its way, and have the connector forget the rest."""
        self._sending.clear()
        for progress in self._progress.values():
            progress.stored = 0
        self.connector.reset()

    def close(self) -> None:
        """Hand over what is on its way, and end the connection."""
        try:
            self.flush()
        finally:
            self.connector.close()


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, KVTransferError) else f"{type(error).__name__}: {error}"


def open_transfer(config: EngineConfig, runner: ModelRunner, kv: KVCacheManager, plugins: Plugins) -> KVTransfer | None:
    """The engine's side of ``config.kv_connector``; None without one.

    Raises:
        ConfigError: nobody offers it, its options cannot be used, or the engine on the other side differs.
    """
    if config.kv_connector is None:
        return None
    blocks = runner.kv_blocks
    drawn = f"seed {config.seed} on {runner.backend.device.type}" if config.load_format == "dummy" else None
    format_ = KVFormat(
        model=model_digest(runner.model_path, dummy=drawn),
        quantization=config.quantization or "",
        groups=blocks.formats(),
    )
    tokens = math.lcm(*(group.block_size for group in kv.groups))
    context = KVContext(
        role=KVRole(config.kv_role),
        format=format_,
        block_tokens=tokens,
        block_bytes=tuple(blocks.bytes_per_token(group.index) * tokens for group in kv.groups),
        options=dict(config.kv_connector_options),
    )
    return KVTransfer(open_connector(config.kv_connector, context, plugins), kv, blocks, format_)
