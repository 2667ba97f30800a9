"""Beam search over the engine: every beam is extended by a request of one token, the prefix cache does the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dougong.engine.prompt import Prompt
from dougong.errors import EngineError, InvalidRequestError
from dougong.types import FinishReason, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from dougong.engine.engine import Engine

__all__ = ["Beam", "BeamSearchOutput", "BeamSearchParams", "beam_search"]


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Options of a beam search. A finished beam's score is its summed log-probability over length ** length_penalty.

    Raises:
        InvalidRequestError: a width or length that is no integer from 1 on.
    """

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if any(type(value) is not int or value < 1 for value in (self.beam_width, self.max_tokens)):
            raise InvalidRequestError(
                f"BeamSearchParams(beam_width={self.beam_width!r}, max_tokens={self.max_tokens!r}): "
                "both must be integers >= 1."
            )


@dataclass
class Beam:
    """One hypothesis: the tokens after the prompt, their summed log-probability, and the text."""

    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    text: str = ""
    finish_reason: FinishReason | None = None

    def score(self, length_penalty: float) -> float:
        return self.cumulative_logprob / float(max(1, len(self.token_ids)) ** length_penalty)


@dataclass
class BeamSearchOutput:
    """The beams of one prompt, the best first."""

    prompt_token_ids: list[int]
    sequences: list[Beam]


def beam_search(engine: Engine, prompt: Prompt, params: BeamSearchParams, name: Callable[[], str]) -> BeamSearchOutput:
    """Search the likeliest completions of ``prompt``.

    Args:
        name: gives fresh request ids.

    Raises:
        InvalidRequestError: the prompt cannot be served.
        EngineError: a step failed.
    """
    read = engine.prompts.read(prompt)
    prompt_ids = read.token_ids
    base: dict[str, Any] = {} if read.cache_salt is None else {"cache_salt": read.cache_salt}
    width = params.beam_width
    # Twice the width: even if every beam's likeliest token ends it, enough are left to go on with.
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        logprobs=min(2 * width, engine.prompts.vocab_size),
        ignore_eos=True,
        detokenize=False,
    )
    ends = frozenset() if params.ignore_eos else engine.eos_token_ids
    steps = min(params.max_tokens, engine.max_model_len - len(prompt_ids))
    live, done = [Beam()], list[Beam]()
    for _ in range(steps):
        candidates: list[Beam] = []
        for beam, choices in zip(live, _extend(engine, base, prompt_ids, live, sampling, name), strict=True):
            for token, logprob in choices:
                longer = Beam([*beam.token_ids, token], beam.cumulative_logprob + logprob)
                if token in ends:
                    longer.finish_reason = FinishReason.STOP
                    done.append(longer)
                else:
                    candidates.append(longer)
        candidates.sort(key=lambda beam: -beam.cumulative_logprob)
        live = candidates[:width]
        if not live:
            break
    for beam in live:
        beam.finish_reason = FinishReason.LENGTH
    best = sorted(done + live, key=lambda beam: -beam.score(params.length_penalty))[:width]
    if engine.tokenizer is not None:
        for beam in best:
            beam.text = engine.tokenizer.decode(beam.token_ids, skip_special_tokens=True)
    return BeamSearchOutput(prompt_ids, best)


def _extend(
    engine: Engine,
    base: Mapping[str, Any],
    prompt_ids: list[int],
    live: list[Beam],
    sampling: SamplingParams,
    name: Callable[[], str],
) -> list[list[tuple[int, float]]]:
    """For each beam its likeliest next tokens with their log-probabilities. ``base``: what else the prompt says."""
    outputs: list[RequestOutput] = []
    try:
        for beam in live:
            outputs.append(engine.add(name(), {**base, "prompt_token_ids": prompt_ids + beam.token_ids}, sampling))
        while not all(output.finished for output in outputs):
            engine.step()
    except BaseException:
        for output in outputs:
            engine.abort(output.request_id)
        raise
    found = []
    for output in outputs:
        completion = output.outputs[0]
        if completion.error is not None:
            raise EngineError(f"beam search stopped: {completion.error}")
        assert completion.logprobs is not None
        found.append([(token, entry.logprob) for token, entry in completion.logprobs[0].items()])
    return found
