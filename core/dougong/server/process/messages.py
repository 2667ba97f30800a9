"""What crosses between the API process and the engine's process: msgpack arrays, one message per step each way."""

from __future__ import annotations

from typing import Any

import msgspec

from dougong.config import EngineConfig
from dougong.types import SamplingParams

__all__ = [
    "Abort",
    "Add",
    "BlockMap",
    "Close",
    "Command",
    "Commands",
    "Configure",
    "EngineInfo",
    "EngineSnapshot",
    "Failed",
    "Finish",
    "FromEngine",
    "KernelInfo",
    "MAX_LISTED",
    "Ready",
    "RequestState",
    "ResetPrefixCache",
    "Snapshot",
    "StepCounters",
    "StepTimes",
    "Steps",
    "ToEngine",
    "TokenScores",
    "Update",
    "Watch",
]


class _Message(msgspec.Struct, array_like=True, tag=True, gc=False):
    """Fields are sent by position: a change of their order is a change of both sides."""


# -- to the engine --------------------------------------------------------------------------------------------


class Configure(_Message):
    """The first message: how to make the engine."""

    config: EngineConfig
    log_level: str = "WARNING"


class Add(_Message):
    """A new request. Completion i of it is called ``handle + i`` from here on; handles are never used twice."""

    handle: int
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None


class Finish(_Message):
    """One completion ended in the API process, by a stop string."""

    handle: int
    stop: str


class Abort(_Message):
    """Nobody waits for this request any more; no answer."""

    handle: int
    """Of its first completion."""


class Watch(_Message):
    """Send snapshots every ``interval_s`` seconds; 0 ends that."""

    interval_s: float


class Snapshot(_Message):
    """Send one snapshot."""


class ResetPrefixCache(_Message):
    """Forget every cached prefix that no request holds."""


class Close(_Message):
    """End the process."""


Command = Add | Finish | Abort | Watch | Snapshot | ResetPrefixCache | Close


class Commands(_Message):
    """All that the API process has to say since its last message, in order."""

    items: list[Command]


ToEngine = Configure | Commands


# -- from the engine ------------------------------------------------------------------------------------------


class KernelInfo(msgspec.Struct, frozen=True):
    """What an op runs on, and why not on each of the others."""

    op: str
    provider: str
    plugin: str
    refused: list[tuple[str, str]]
    """(kernel, reason)."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is fixed once the engine stands."""

    version: str
    pid: int
    model_path: str
    model_type: str
    dtype: str
    quantization: str | None
    vocab_size: int
    max_model_len: int
    capacity_tokens: int | None
    """Tokens of one request alone that the KV pool can hold; None: no bound."""
    eos_token_ids: list[int]
    max_num_seqs: int
    max_num_batched_tokens: int
    backend: str
    device: str
    hidden_size: int
    usable_blocks: int
    kernels: list[KernelInfo]
    start_s: float
    """Seconds from the process's start until it was ready."""


class Ready(_Message):
    """The engine stands."""

    info: EngineInfo


class Failed(_Message):
    """The engine could not start, or its loop ended. ``error``: the exception's class name."""

    error: str
    message: str


class TokenScores(_Message):
    """Log-probabilities at one position: the token's own first, then the likeliest ones, as a `Logprob` mapping."""

    ids: list[int]
    logprobs: list[float]
    ranks: list[int | None]


class Update(_Message):
    """What a step did to one completion, where that is more than one plain token."""

    handle: int
    token_ids: list[int] = []
    scores: list[TokenScores] | None = None
    """One per token."""
    finish: str | None = None
    """The finish reason's word."""
    last_is_text: bool = False
    """It stopped, and not by an end token: its grammar is complete."""
    stop_token: int | None = None
    error: str | None = None
    error_type: str | None = None
    """``InvalidRequestError`` where the request was refused; otherwise the engine's."""
    cached_tokens: int = 0
    scheduled_at: float | None = None
    """On ``time.monotonic()``'s clock, which the processes of a machine share; sent once."""
    prompt_scores: list[TokenScores | None] | None = None
    """Sent once, when complete."""
    vector: list[float] | None = None
    """Of a pooling request."""
    kv_transfer_params: dict[str, Any] | None = None


class StepCounters(_Message):
    """One step's figures, and totals since the engine's start where it says so. Times in seconds."""

    index: int
    num_rows: int
    num_decode_rows: int
    num_tokens: int
    generated_tokens: int
    running: int
    waiting: int
    preemptions: int
    kv_usage: float
    """Share of the fullest group's blocks that requests hold, 0 to 1."""
    prefix_queries: int
    """Total: prompt tokens that were looked up."""
    prefix_hits: int
    """Total: those found."""
    schedule_s: float
    launch_s: float
    wait_s: float
    commit_s: float
    step_s: float
    """Wall time of the engine loop's round: commands, step, and handing the outputs over."""
    cpu_s: float
    """Processor time of the whole engine process in the same round."""
    kv_stored_blocks: int = 0
    """Total: given to the KV connector."""
    kv_loaded_tokens: int = 0
    """Total: those whose KV the connector brought."""
    kv_failures: int = 0
    """Total: promises that were not kept, blocks that were refused or lost."""


class RequestState(msgspec.Struct, frozen=True, kw_only=True):
    """One running or waiting completion. Ages in seconds."""

    request_id: str
    status: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    computed_tokens: int
    max_tokens: int | None
    priority: int
    preemptions: int
    age_s: float
    """Since it arrived."""
    running_s: float | None
    """Since its first step; None while it never had one."""
    first_token_s: float | None
    """From its arrival to its first token."""
    blocks: list[list[int]]
    """Block ids by KV group; 0 where a block fell behind a window."""


class BlockMap(msgspec.Struct, frozen=True, kw_only=True):
    """One KV group's blocks."""

    block_size: int
    window: int | None
    scratch_blocks: int
    """The first ids, never handed out."""
    states: bytes
    """A byte per block: 0 free, 1 free with a cached prefix, 2 held, 3 held and cached."""
    ref_counts: bytes
    """A byte per block, 255 for more."""


class StepTimes(msgspec.Struct, frozen=True):
    """One step of the recent past, in seconds."""

    index: int
    num_rows: int
    num_tokens: int
    schedule_s: float
    launch_s: float
    wait_s: float
    commit_s: float
    cpu_s: float


class EngineSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The engine as it stands between two steps."""

    time: float
    """Seconds since the epoch."""
    uptime_s: float
    pid: int
    steps: int
    running: list[RequestState]
    waiting: list[RequestState]
    """The first `MAX_LISTED` of them; ``num_waiting`` counts all."""
    num_running: int
    num_waiting: int
    blocks: list[BlockMap]
    kv_usage: float
    prompt_tokens: int
    """Totals since the start, these and those below."""
    cached_tokens: int
    generated_tokens: int
    computed_tokens: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    evictions: int
    finished: dict[str, int]
    tokens_per_s: float
    """Generated tokens per second over the last seconds."""
    cpu_s: float
    """Processor time of the engine process since its start."""
    recent_steps: list[StepTimes]


#: Requests listed in a snapshot, running and waiting each.
MAX_LISTED = 1000


class Steps(_Message):
    """All that the engine has to say after one round of its loop.

    A completion that got exactly one plain token stands in ``handles`` and ``tokens``; everything else in ``updates``.
    """

    handles: list[int]
    tokens: list[int]
    updates: list[Update]
    counters: StepCounters | None = None
    snapshot: EngineSnapshot | None = None


FromEngine = Ready | Failed | Steps
