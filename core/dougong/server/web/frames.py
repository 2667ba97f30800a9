"""From the engine's snapshots to what the page draws: small, and with no text of anybody's."""

from __future__ import annotations

import re
import zlib
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from dougong.server.process.messages import BlockMap, EngineInfo, EngineSnapshot, RequestState, StepTimes

__all__ = ["COLOURS", "engine_frame", "snapshot_frame"]

#: Cells of the block map: more would be smaller than a pixel's worth of sense, and make each frame larger.
MOST_CELLS = 4096
#: Requests of each kind that a frame lists.
MOST_REQUESTS = 200
MOST_STEPS = 120
#: Requests are told apart by this many colours, chosen by a hash of their id.
COLOURS = 12

#: Cells: below `_OWNED` a state, from there on the colour of the request that holds it.
_FREE, _CACHED, _SHARED, _SCRATCH, _HELD, _OWNED = 0, 1, 2, 3, 4, 8
#: `BlockMap.states` to cells; whose a held block is comes after. A pool has 100,000 blocks: no loop over them here.
_CELLS = bytes((_FREE, _CACHED, _HELD, _HELD)) + bytes(252)
_SEVERAL = re.compile(rb"[^\x00\x01]")


def engine_frame(info: EngineInfo, model_names: Sequence[str]) -> dict[str, Any]:
    """What is fixed once the engine stands, the chosen kernels among it."""
    return {
        "models": list(model_names),
        "version": info.version,
        "model_type": info.model_type,
        "backend": info.backend,
        "device": info.device,
        "dtype": info.dtype,
        "quantization": info.quantization,
        "max_model_len": info.max_model_len,
        "max_num_seqs": info.max_num_seqs,
        "max_num_batched_tokens": info.max_num_batched_tokens,
        "usable_blocks": info.usable_blocks,
        "start_s": info.start_s,
        "pid": info.pid,
        "kernels": [
            {
                "op": one.op,
                "provider": one.provider,
                "plugin": one.plugin,
                "refused": [{"provider": name, "reason": reason} for name, reason in one.refused],
            }
            for one in info.kernels
        ],
    }


def snapshot_frame(snapshot: EngineSnapshot, after_step: int = -1) -> dict[str, Any]:
    """One moment of the engine.

    Args:
        after_step: steps up to this index were sent already.
    """
    return {
        "time": snapshot.time,
        "uptime_s": snapshot.uptime_s,
        "steps": snapshot.steps,
        "num_running": snapshot.num_running,
        "num_waiting": snapshot.num_waiting,
        "running": [_request(one) for one in snapshot.running[:MOST_REQUESTS]],
        "waiting": [_request(one) for one in snapshot.waiting[:MOST_REQUESTS]],
        "kv_usage": snapshot.kv_usage,
        "groups": [_group(block_map, index, snapshot.running) for index, block_map in enumerate(snapshot.blocks)],
        "tokens_per_s": snapshot.tokens_per_s,
        "totals": {
            "prompt_tokens": snapshot.prompt_tokens,
            "cached_tokens": snapshot.cached_tokens,
            "generated_tokens": snapshot.generated_tokens,
            "preemptions": snapshot.preemptions,
            "prefix_queries": snapshot.prefix_queries,
            "prefix_hits": snapshot.prefix_hits,
            "evictions": snapshot.evictions,
            "finished": snapshot.finished,
        },
        "recent": [_step(one) for one in snapshot.recent_steps if one.index > after_step][-MOST_STEPS:],
    }


def _colour(request_id: str) -> int:
    return zlib.crc32(request_id.encode()) % COLOURS


def _request(one: RequestState) -> dict[str, Any]:
    return {
        "id": one.request_id,
        "colour": _colour(one.request_id),
        "status": one.status,
        "prompt_tokens": one.prompt_tokens,
        "cached_tokens": one.cached_tokens,
        "output_tokens": one.output_tokens,
        "max_tokens": one.max_tokens,
        "priority": one.priority,
        "preemptions": one.preemptions,
        "age_s": one.age_s,
        "running_s": one.running_s,
        "first_token_s": one.first_token_s,
        "blocks": sum(1 for group in one.blocks for block in group if block),
    }


def _step(one: StepTimes) -> list[float]:
    """index, rows, tokens, then milliseconds: schedule, launch, wait, commit."""
    parts = (one.schedule_s, one.launch_s, one.wait_s, one.commit_s)
    return [one.index, one.num_rows, one.num_tokens, *(round(1000 * part, 3) for part in parts)]


def _group(blocks: BlockMap, index: int, running: Sequence[RequestState]) -> dict[str, Any]:
    states, counts = blocks.states, blocks.ref_counts
    cells = bytearray(states.translate(_CELLS))
    for request in running:
        if index < len(request.blocks):
            mark = _OWNED + _colour(request.request_id)
            for block in request.blocks[index]:
                if block and cells[block] == _HELD:
                    cells[block] = mark
    for match in _SEVERAL.finditer(counts):
        cells[match.start()] = _SHARED
    cells[: blocks.scratch_blocks] = bytes([_SCRATCH]) * blocks.scratch_blocks
    usable = states[blocks.scratch_blocks :]
    per_cell = -(-len(cells) // MOST_CELLS)
    if per_cell > 1:
        cells = bytearray(_most(cells[start : start + per_cell]) for start in range(0, len(cells), per_cell))
    return {
        "block_size": blocks.block_size,
        "window": blocks.window,
        "blocks": len(states),
        "scratch": blocks.scratch_blocks,
        "held": sum(usable.count(state) for state in (2, 3)),
        "cached": usable.count(1),
        "per_cell": per_cell,
        "cells": b64encode(cells).decode("ascii"),
    }


def _most(cells: bytearray) -> int:
    """What a cell of several blocks shows: the state most of them have."""
    first = cells[0]
    return first if cells.count(first) == len(cells) else max(set(cells), key=cells.count)
