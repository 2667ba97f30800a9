"""``POST /v1/completions``: plain prompts, as text or token ids, one or many."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field, JsonValue

from dougong.errors import InvalidRequestError
from dougong.server.chat.turn import Finished, Usage
from dougong.server.errors import as_api_error, openai_body
from dougong.server.formats import read_response_format
from dougong.server.openai.chat import choice_failed, trace_of, usage_body
from dougong.server.openai.fields import GenerationFields, StreamOptions, check_fields
from dougong.server.openai.logprobs import completion_logprobs
from dougong.server.streaming import DONE, EventStream, first_then, sse, until_gone
from dougong.types import CompletionOutput, FinishReason, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["CompletionRequest", "as_prompts", "read_prompts", "router"]

_REFUSED = {"suffix": "this server completes text at its end only. Leave it out."}
_ACCEPTED = frozenset({"metadata", "safety_identifier", "service_tier", "store"})

TokenIds = list[Annotated[int, Field(ge=0)]]
Prompts = str | TokenIds | list[str] | list[TokenIds]


class CompletionRequest(GenerationFields):
    """Prompts, and how to go on with each."""

    prompt: Prompts
    best_of: int | None = None
    """Make so many and give back the ``n`` of the highest mean log-probability."""
    echo: bool | None = None
    """Give the prompt back before the answer, with its log-probabilities where these were asked for."""
    logprobs: int | None = None
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own tokens (such as BOS) to prompts of text."""
    response_format: dict[str, JsonValue] | None = None

    def sampling(self, state: ServerState) -> SamplingParams:
        """The sampling options; ``n`` is ``best_of`` where that is given.

        Raises:
            InvalidRequestError: names the field that is wrong.
        """
        config = state.config
        check_fields(self, config, _REFUSED, _ACCEPTED)
        n = self.n if self.n is not None else 1
        best_of = n if self.best_of is None else self.best_of
        if not n <= best_of <= config.max_choices:
            raise InvalidRequestError(f"best_of={best_of} with n={n}: allowed is n to {config.max_choices}.")
        if self.stream and best_of > n:
            raise InvalidRequestError("best_of with stream=true: which is the best is known only at the end.")
        top = self.logprobs
        if top is not None and not 0 <= top <= config.max_logprobs:
            raise InvalidRequestError(f"logprobs={top}: allowed is 0 to {config.max_logprobs}.")
        more: dict[str, Any] = {"n": best_of, "logprobs": 0 if top is None and best_of > n else top}
        if self.max_tokens is None:
            more["max_tokens"] = 16  # as OpenAI has it
        elif self.max_tokens == 0 and self.echo:
            more["max_tokens"] = 1  # the prompt alone is shown; the token that comes with it is dropped
        form = read_response_format(self.response_format)
        if form is not None:
            if self.structured_outputs is not None:
                raise InvalidRequestError("response_format and structured_outputs: give one of them.")
            more["structured"] = form
        if self.echo and top is not None:
            more["prompt_logprobs"] = top
        return self.params(config, state.sampling_defaults, **more)


def as_prompts(given: Any, most: int) -> list[str | list[int]]:
    """One prompt or many as a list.

    Raises:
        InvalidRequestError: none, or more than ``most``.
    """
    prompts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not prompts:
        raise InvalidRequestError("give at least one prompt.")
    if len(prompts) > most:
        raise InvalidRequestError(f"{len(prompts)} prompts; at most {most} are allowed at once.")
    return prompts


async def read_prompts(
    state: ServerState, prompts: Iterable[str | list[int]], *, add_special_tokens: bool = True
) -> list[tuple[str, list[int]]]:
    """Each prompt's text ('' where it came as ids) and token ids.

    Raises:
        InvalidRequestError: one is empty, or no text.
    """
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError("a prompt is empty: give at least one character or token id.")
            ids = await state.client.texts.encode(prompt, add_special_tokens=add_special_tokens)
            found.append((prompt, ids))
        else:
            found.append(("", list(prompt)))
    return found


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", tags=["OpenAI"], responses=_RESPONSES)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Go on with one prompt or many."""
        model = state.check_model(body.model)
        params = body.sampling(state)
        name = body.request_id or f"cmpl-{uuid.uuid4().hex}"
        run = _Run(state, body, params, name, trace_of(request))
        head = {"id": name, "object": "text_completion", "created": int(time.time()), "model": model}
        if not body.stream:
            return JSONResponse(await until_gone(request, run.whole(head)))
        ready = await until_gone(request, first_then(run.chunks(head, body.stream_options or StreamOptions())))
        return EventStream(ready)

    return routes


class _Run:
    """One HTTP request: several prompts, each a request to the engine."""

    def __init__(
        self,
        state: ServerState,
        body: CompletionRequest,
        params: SamplingParams,
        name: str,
        trace: dict[str, str] | None,
    ) -> None:
        self._state = state
        self._body = body
        self._params = params
        self._name = name
        self._trace = trace
        self._echo = bool(body.echo)
        self._only_prompt = self._echo and body.max_tokens == 0
        self._choices = body.n if body.n is not None else 1

    async def _prompts(self) -> list[tuple[str, list[int]]]:
        """Read and checked, before anything is sent to the engine, which is there."""
        state, params = self._state, self._params
        given = as_prompts(self._body.prompt, state.config.max_prompts)
        with state.queue.room(params.n * len(given)):
            prompts = await read_prompts(state, given, add_special_tokens=self._body.add_special_tokens)
            for place, (_, ids) in enumerate(prompts):
                state.client.check(
                    ids, params, request_id=self._id(place, alone=len(given) == 1), priority=self._body.priority,
                    kv_transfer_params=self._body.kv_transfer_params,
                )  # fmt: skip
            await state.client.ready(state.config.request_timeout_s)
        if self._echo:  # ids as the model would write them
            decode = state.client.tokenizer.decode
            prompts = [(text or decode(ids), ids) for text, ids in prompts]
        return prompts

    def _id(self, place: int, alone: bool) -> str:
        """The engine's name for a prompt of this request."""
        return self._name if alone else f"{self._name}-{place}"

    def _outputs(self, place: int, ids: list[int], alone: bool) -> AsyncGenerator[RequestOutput, None]:
        body = self._body
        # A seed makes prompts of one request repeatable one by one; equal prompts then give equal answers.
        return self._state.client.generate(
            ids,
            self._params,
            request_id=self._id(place, alone),
            priority=body.priority,
            cache_salt=body.cache_salt,
            kv_transfer_params=body.kv_transfer_params,
            trace=self._trace,
            timeout_s=self._state.config.request_timeout_s,
        )

    async def whole(self, head: dict[str, Any]) -> dict[str, Any]:
        prompts = await self._prompts()
        finals: list[RequestOutput | None] = [None] * len(prompts)
        async with aclosing(self._merged(prompts)) as merged:
            async for place, output in merged:
                finals[place] = output
                for completion in output.outputs:
                    _raise_if_failed(completion)
        choices: list[dict[str, Any]] = []
        transfer = None
        for (text, _), final in zip(prompts, finals):
            assert final is not None
            transfer = final.kv_transfer_params or transfer
            best = final.outputs
            if self._params.n > self._choices:
                best = sorted(best, key=_mean_logprob, reverse=True)[: self._choices]
            choices += [self._choice(len(choices) + i, text, final, one) for i, one in enumerate(best)]
        body = head | {"choices": choices, "usage": self._usage(final for final in finals if final is not None)}
        return body if transfer is None else body | {"kv_transfer_params": transfer}

    def _choice(self, index: int, prompt: str, final: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        text = "" if self._only_prompt else one.text
        return {
            "index": index,
            "text": prompt + text if self._echo else text,
            "logprobs": self._logprobs(prompt, final, one, 0, with_prompt=self._echo),
            "finish_reason": "length" if self._only_prompt else str(one.finish_reason),
            "stop_reason": one.stop_reason,
        }

    def _logprobs(
        self,
        prompt: str,
        final: RequestOutput,
        one: CompletionOutput,
        since: int,
        *,
        with_prompt: bool,
        offset: int = 0,
    ) -> dict[str, Any] | None:
        """Those of the tokens from ``since`` on; before them the prompt's, if it is shown."""
        top = self._body.logprobs
        if top is None or one.logprobs is None:
            return None
        entries: list[Any] = [] if self._only_prompt else list(one.logprobs[since:])
        ids = [] if self._only_prompt else one.token_ids[since:]
        if with_prompt:
            entries = [*(final.prompt_logprobs or ()), *entries]
            ids = [*final.prompt_token_ids, *ids]
        elif since == 0 and self._echo:
            offset += len(prompt)
        return completion_logprobs(entries, ids, top, self._state.client.tokenizer, offset)

    async def chunks(self, head: dict[str, Any], options: StreamOptions) -> AsyncGenerator[bytes, None]:
        """Chunks. The first is given out, empty, once all prompts are checked: errors before it have a status."""
        prompts = await self._prompts()
        if options.include_usage:
            head = head | {"usage": None}
        outputs = self._merged(prompts)
        if self._params.structured is not None:
            outputs = await first_then(outputs)  # only the engine knows whether it can be compiled
        yield b""
        sent = [[_Sent() for _ in range(self._params.n)] for _ in prompts]
        finals: dict[int, RequestOutput] = {}
        try:
            async with aclosing(outputs):
                async for place, output in outputs:
                    finals[place] = output
                    for one, told in zip(output.outputs, sent[place]):
                        if told.over:
                            continue
                        _raise_if_failed(one)
                        delta = self._delta(place, prompts[place][0], output, one, told)
                        if delta is not None:
                            if options.continuous_usage_stats:
                                head = head | {"usage": self._usage(finals.values())}
                            yield sse(head | {"choices": [delta]})
            if options.include_usage:
                yield sse(head | {"choices": [], "usage": self._usage(finals.values())})
        except Exception as error:
            yield sse(openai_body(as_api_error(error)))
        yield DONE

    def _usage(self, outputs: Iterable[RequestOutput]) -> dict[str, Any]:
        """Tokens of several prompts together, up to now."""
        prompt = answer = cached = 0
        for output in outputs:
            prompt += len(output.prompt_token_ids)
            cached += output.num_cached_tokens
            if not self._only_prompt:
                answer += sum(len(one.token_ids) for one in output.outputs)
        return usage_body(Usage(prompt, answer, cached))

    def _delta(
        self, place: int, prompt: str, output: RequestOutput, one: CompletionOutput, told: _Sent
    ) -> dict[str, Any] | None:
        first = self._echo and told.tokens == 0 and told.characters == 0
        new = "" if self._only_prompt else one.text[told.characters :]
        done = one.finish_reason is not None
        if not new and not done and not (one.logprobs is not None and len(one.logprobs) > told.tokens):
            return None
        if self._only_prompt and not done:
            return None
        logprobs = self._logprobs(prompt, output, one, told.tokens, with_prompt=first, offset=told.offset)
        if logprobs is not None and logprobs["tokens"]:
            told.offset = logprobs["text_offset"][-1] + len(logprobs["tokens"][-1])
        told.characters += len(new)
        told.tokens = len(one.token_ids)
        told.over = done
        return {
            "index": place * self._params.n + one.index,
            "text": prompt + new if first else new,
            "logprobs": logprobs,
            "finish_reason": ("length" if self._only_prompt else str(one.finish_reason)) if done else None,
            "stop_reason": one.stop_reason,
        }

    async def _merged(
        self, prompts: Sequence[tuple[str, list[int]]]
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """The outputs of all prompts as they change; of one that changes faster than it is read, the newest state."""
        if len(prompts) == 1:
            outputs = self._outputs(0, prompts[0][1], alone=True)
            async with aclosing(outputs):
                async for output in outputs:
                    yield 0, output
            return
        changed: dict[int, RequestOutput] = {}
        news = asyncio.Event()

        async def follow(place: int, ids: list[int]) -> None:
            outputs = self._outputs(place, ids, alone=False)
            async with aclosing(outputs):
                async for output in outputs:
                    changed[place] = output
                    news.set()

        tasks = [asyncio.ensure_future(follow(place, ids)) for place, (_, ids) in enumerate(prompts)]
        everything = asyncio.gather(*tasks)
        everything.add_done_callback(lambda _: news.set())
        try:
            while not everything.done() or changed:
                await news.wait()
                news.clear()
                items = sorted(changed.items())
                changed.clear()
                for place, output in items:
                    yield place, output
            await everything
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await asyncio.gather(*tasks, return_exceptions=True)


class _Sent:
    """What of a choice a stream has told."""

    __slots__ = ("characters", "offset", "over", "tokens")

    def __init__(self) -> None:
        self.characters = 0
        self.tokens = 0
        self.offset = 0
        self.over = False


def _raise_if_failed(one: CompletionOutput) -> None:
    if one.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
        reason = "error" if one.finish_reason is FinishReason.ERROR else "abort"
        failure = choice_failed(Finished(one.index, reason, None, one.error))  # type: ignore[arg-type]  # one of its words
        assert failure is not None
        raise failure


def _mean_logprob(one: CompletionOutput) -> float:
    return (one.cumulative_logprob or 0.0) / max(1, len(one.token_ids))


_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completions; with stream=true as server-sent events of chunks, ended by [DONE]",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    400: {"description": "The request is wrong; the error says what is allowed"},
    429: {"description": "Too many requests; Retry-After says when to come back"},
}
