"""The engine's process: ``python -m dougong.server.process.worker ADDRESS``.

One thread does everything: it takes the commands that have come in, runs a step, and hands over what the step gave, in
one message each way. Sending never waits. It speaks of tokens only; all text is made in the API process.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from dougong.errors import DougongError, InvalidRequestError
from dougong.plugins import StepRecord
from dougong.server.process.messages import (
    Abort,
    Add,
    Close,
    Command,
    Commands,
    Configure,
    Failed,
    Finish,
    Ready,
    ResetPrefixCache,
    Snapshot,
    StepCounters,
    Steps,
    ToEngine,
    TokenScores,
    Update,
    Watch,
)
from dougong.server.process.snapshot import SnapshotReader, engine_info
from dougong.types import Logprob, RequestOutput

if TYPE_CHECKING:
    from dougong.engine import Engine

__all__ = ["EngineWorker", "main"]

log = logging.getLogger(__name__)

#: How long the loop may take to end by itself once the parent is gone.
_GRACE_S = 5.0
#: How often an idle loop looks whether a grammar is compiled.
_COMPILING_S = 0.005


class _Stream:
    """What of a request's output has been handed over."""

    __slots__ = ("handle", "output", "sent", "told")

    def __init__(self, handle: int, output: RequestOutput) -> None:
        self.handle = handle
        self.output = output
        self.sent = [0] * len(output.outputs)
        self.told = False
        """Whether the request's first token went out, and with it what is known of its start."""


class EngineWorker:
    """The loop around an engine. ``channel`` is a connected PAIR socket that drops nothing and never blocks a send."""

    def __init__(self, engine: Engine, channel: zmq.Socket[bytes], closing: threading.Event) -> None:
        self._engine = engine
        self._channel = channel
        self._closing = closing
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode
        self._by_id: dict[str, _Stream] = {}
        self._by_handle: dict[int, _Stream] = {}
        self._early: list[Update] = []  # answers that no step gives
        self._compiling: list[tuple[Future[Any], Add]] = []
        self._record: StepRecord | None = None
        self._snapshots = SnapshotReader(engine, os.getpid())
        self._watch_s = 0.0
        self._next_look = 0.0
        self._asked = False
        self._generated = 0
        self._unrecorded_s = 0.0
        self._cpu_s = time.process_time()
        engine.observers.append(self)

    def on_step(self, record: StepRecord) -> None:
        """The engine's observer: one record a step."""
        self._record = record

    def run(self) -> None:
        """Until told to close. An exception of a step that the engine itself did not survive goes through."""
        engine = self._engine
        while not self._closing.is_set():
            self._take_commands(wait=not engine.has_work and not self._early)
            if self._compiling:
                self._take_compiled()
            begun = time.perf_counter()
            outputs = engine.step() if engine.has_work else []
            self._hand_over(outputs, begun)

    # -- in ----------------------------------------------------------------------------------------------

    def _take_commands(self, wait: bool) -> None:
        if wait:
            # Wakes up to see whether the parent is gone, and for a snapshot that somebody watches.
            pause = 1.0 if not self._watch_s else max(0.0, self._next_look - time.monotonic())
            pause = min(pause, _COMPILING_S if self._compiling else 1.0)
            if not self._channel.poll(int(1000 * pause) + 1):
                return
        while True:
            try:
                data = self._channel.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = self._decode(data)
            assert isinstance(message, Commands)
            for item in message.items:
                self._obey(item)

    def _obey(self, command: Command) -> None:
        if isinstance(command, Add):
            self._add(command)
        elif isinstance(command, Abort):
            stream = self._by_handle.get(command.handle)
            if stream is not None:
                self._engine.abort(stream.output.request_id)
                self._forget(stream)
            else:
                self._compiling = [one for one in self._compiling if one[1].handle != command.handle]
        elif isinstance(command, Finish):
            self._finish(command)
        elif isinstance(command, Watch):
            self._watch_s = command.interval_s
            self._next_look = 0.0
        elif isinstance(command, Snapshot):
            self._asked = True
        elif isinstance(command, ResetPrefixCache):
            self._engine.reset_prefix_cache()
        elif isinstance(command, Close):
            self._closing.set()

    def _add(self, command: Add) -> None:
        """Take a request, once what its text must look like is compiled: that is done on other threads."""
        structured = command.params.structured
        if structured is None:
            self._begin(command)
        else:
            self._compiling.append((self._engine.grammars.submit(structured), command))

    def _take_compiled(self) -> None:
        waiting, self._compiling = self._compiling, []
        for future, command in waiting:
            if not future.done():
                self._compiling.append((future, command))
                continue
            error = future.exception()
            if error is None:
                self._begin(command)
            else:
                self._refuse(command, error)

    def _refuse(self, command: Add, error: BaseException) -> None:
        kind = InvalidRequestError.__name__ if isinstance(error, InvalidRequestError) else type(error).__name__
        self._early.append(Update(command.handle, finish="error", error=str(error), error_type=kind))

    def _begin(self, command: Add) -> None:
        prompt: dict[str, Any] = {"prompt_token_ids": command.prompt_token_ids}
        if command.cache_salt is not None:
            prompt["cache_salt"] = command.cache_salt
        if command.kv_transfer_params is not None:
            prompt["kv_transfer_params"] = command.kv_transfer_params
        try:
            output = self._engine.add(command.request_id, prompt, command.params, priority=command.priority)
        except DougongError as error:
            self._refuse(command, error)
            return
        stream = _Stream(command.handle, output)
        self._by_id[command.request_id] = stream
        for index in range(len(output.outputs)):
            self._by_handle[command.handle + index] = stream

    def _finish(self, command: Finish) -> None:
        stream = self._by_handle.pop(command.handle, None)
        if stream is None:
            return
        index = command.handle - stream.handle
        stream.sent[index] = -1
        self._engine.stop(stream.output.request_id, index, command.stop)
        if stream.output.finished:
            self._forget(stream)

    def _forget(self, stream: _Stream) -> None:
        self._by_id.pop(stream.output.request_id, None)
        for index in range(len(stream.sent)):
            self._by_handle.pop(stream.handle + index, None)

    # -- out ---------------------------------------------------------------------------------------------

    def _hand_over(self, outputs: list[RequestOutput], begun: float) -> None:
        handles: list[int] = []
        tokens: list[int] = []
        updates, self._early = self._early, []
        by_id = self._by_id
        for output in outputs:
            stream = by_id.get(output.request_id)
            if stream is None:
                continue
            sent = stream.sent
            for index, completion in enumerate(output.outputs):
                ids = completion.token_ids
                if sent[index] < 0:
                    continue
                new = len(ids) - sent[index]
                # The plain case first: this line is what a running request costs per step.
                if new == 1 and stream.told and completion.finish_reason is None and completion.logprobs is None:
                    handles.append(stream.handle + index)
                    tokens.append(ids[-1])
                    sent[index] += 1
                elif new or completion.finish_reason is not None:
                    updates.append(self._update(stream, index))
            if output.finished:
                self._forget(stream)
        counters = self._counters(begun)
        snapshot = None
        if self._asked or (self._watch_s and time.monotonic() >= self._next_look):
            self._asked = False
            self._next_look = time.monotonic() + self._watch_s
            snapshot = self._snapshots.read()
        if handles or updates or counters is not None or snapshot is not None:
            self._channel.send(self._encode(Steps(handles, tokens, updates, counters, snapshot)), zmq.NOBLOCK)

    def _update(self, stream: _Stream, index: int) -> Update:
        """Everything that is new of one completion."""
        output = stream.output
        completion = output.outputs[index]
        since = stream.sent[index]
        update = Update(stream.handle + index, completion.token_ids[since:])
        if completion.logprobs is not None:
            update.scores = [_scores(entry) for entry in completion.logprobs[since:]]
        stream.sent[index] = len(completion.token_ids)
        if not stream.told:
            stream.told = True
            update.cached_tokens = output.num_cached_tokens
            update.scheduled_at = output.times.first_scheduled
            if output.prompt_logprobs is not None:
                update.prompt_scores = [None if entry is None else _scores(entry) for entry in output.prompt_logprobs]
        if completion.finish_reason is not None:
            stream.sent[index] = -1  # all is said
            update.finish = completion.finish_reason.value
            update.stop_token = completion.stop_reason if isinstance(completion.stop_reason, int) else None
            ids, ends = completion.token_ids, self._engine.eos_token_ids
            update.last_is_text = update.stop_token is None and bool(ids) and ids[-1] not in ends
            update.error = completion.error
            update.cached_tokens = output.num_cached_tokens
            update.kv_transfer_params = output.kv_transfer_params
            update.vector = output.embedding
        return update

    def _counters(self, begun: float) -> StepCounters | None:
        record, self._record = self._record, None
        took = self._unrecorded_s + time.perf_counter() - begun
        # With overlap a burst's first round only launches: its time goes with the step that it launched.
        self._unrecorded_s = took if record is None else 0.0
        if record is None:
            return None
        engine = self._engine
        generated, cpu_s = engine.stats.generated_tokens, time.process_time()
        counters = StepCounters(
            record.index, record.num_rows, record.num_decode_rows, record.num_tokens, generated - self._generated,
            record.running, record.waiting, record.preemptions, record.kv_usage,
            engine.kv.prefix_queries, engine.kv.prefix_hits,
            record.schedule_s, record.launch_s, record.wait_s, record.commit_s,
            took, cpu_s - self._cpu_s,
        )  # fmt: skip
        if engine.transfer is not None:
            moved = engine.transfer.stats
            counters.kv_stored_blocks, counters.kv_loaded_tokens = moved.stored_blocks, moved.loaded_tokens
            counters.kv_failures = moved.failures
        self._generated, self._cpu_s = generated, cpu_s
        self._snapshots.step(counters)
        return counters


def _scores(entry: Mapping[int, Logprob]) -> TokenScores:
    found = entry.values()
    return TokenScores(list(entry), [one.logprob for one in found], [one.rank for one in found])


def _follow_parent(closing: threading.Event) -> None:
    """Standard input is the parent's to hold open: its end is the parent's end."""
    while os.read(0, 4096):  # not through sys.stdin, whose lock would be held when the process ends
        pass
    closing.set()
    time.sleep(_GRACE_S)
    os._exit(0)


def main(address: str) -> int:
    """Connect, make the engine, run it. Exit status 0: told to close; 1: it failed, and the parent was told why."""
    started = time.monotonic()
    # Ctrl-C and a service manager's SIGTERM reach the whole process group: the parent drains, then closes us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    closing = threading.Event()
    threading.Thread(target=_follow_parent, args=(closing,), name="dougong-parent", daemon=True).start()
    context = zmq.Context()
    channel: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    channel.setsockopt(zmq.SNDHWM, 0)
    channel.setsockopt(zmq.RCVHWM, 0)
    channel.setsockopt(zmq.LINGER, 2000)
    channel.connect(address)
    encode = msgspec.msgpack.encode
    engine: Engine | None = None
    try:
        message = msgspec.msgpack.decode(channel.recv(), type=ToEngine)
        assert isinstance(message, Configure)
        logging.basicConfig(level=message.log_level, format="%(levelname)s %(name)s: %(message)s")
        from dougong.engine import Engine

        engine = Engine(message.config)
        worker = EngineWorker(engine, channel, closing)
        channel.send(encode(Ready(engine_info(engine, started, os.getpid()))))
        worker.run()
    except Exception as error:
        if not isinstance(error, DougongError):
            log.exception("the engine process ends")
        channel.send(encode(Failed(type(error).__name__, str(error))), zmq.NOBLOCK)
        return 1
    finally:
        if engine is not None:
            try:
                engine.close()
            except Exception:
                log.exception("closing the engine failed")
        channel.close()
        context.term()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
