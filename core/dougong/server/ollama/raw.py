"""A prompt as it stands, without a chat template, answered in the events of a chat."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from dougong.server.chat.answer import Answer
from dougong.server.chat.turn import Done, Event, Started, Usage
from dougong.server.streaming import first_then
from dougong.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["run_raw"]


async def run_raw(
    state: ServerState, prompt: str, params: SamplingParams, request_id: str, trace: Mapping[str, str] | None
) -> AsyncGenerator[Event, None]:
    """The events of `ChatService.run`, and what it raises."""
    with state.queue.room(params.n):
        ids = await state.client.texts.encode(prompt, add_special_tokens=False)
        state.client.check(ids, params)
        await state.client.ready(state.config.request_timeout_s)
    answer = Answer(0, None, None)
    final: RequestOutput | None = None
    outputs = state.client.generate(
        ids, params, request_id=request_id, trace=trace, timeout_s=state.config.request_timeout_s
    )
    if params.structured is not None:
        outputs = await first_then(outputs)  # only the engine knows whether it can be compiled
    async with aclosing(outputs):
        yield Started(len(ids))
        async for final in outputs:
            for event in answer.read(final.outputs[0]):
                yield event
    assert final is not None
    yield Done(Usage(len(ids), len(final.outputs[0].token_ids), final.num_cached_tokens))
