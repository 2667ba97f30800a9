"""Teacher-forced tokens of one engine beside another's, from outside: by prompts alone, through its decode path.

An engine generates freely until its token differs from the reference's. There it is given the reference's tokens up to
and with that place as its prompt, and goes on. So every token is chosen behind the reference's own, and most of them in
decodes, as in serving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["SHARE", "best_two", "follow", "near_tie", "right"]

SHARE = 0.98
"""Least share of equal tokens, near ties and all."""

#: (prompts, how many tokens of each) -> their tokens.
Generate = Callable[[list[list[int]], list[int]], list[list[int]]]


def best_two(logprobs: Mapping[int, float], vocabulary: int) -> tuple[float, float, int]:
    """The best two logits of a step from its log-probabilities by token, and the second one's token.

    Engines tell no logits; these lie below the true ones by log(mean of exp(logit)), which is next to nothing where
    most logits are small (random_weights.py's are).
    """
    best, second, *_ = sorted(logprobs, key=lambda token: -logprobs[token])
    return logprobs[best] + math.log(vocabulary), logprobs[second] + math.log(vocabulary), second


def near_tie(best: float, second: float) -> bool:
    """Within 4 units in the last place that bfloat16 has at the best logit."""
    # Engines subtract in float32: what is 4 units exactly may be a little more.
    return best - second <= 4 * 2.0 ** (math.floor(math.log2(max(best, 2.0**-20))) - 7) * (1 + 1e-4)


def follow(
    prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]],
    logits: Sequence[Sequence[tuple[float, float, int]]], generate: Generate,
) -> dict[str, Any]:  # fmt: skip
    """Hold an engine's tokens against the reference's.

    Args:
        tokens: [request][step], the reference's.
        logits: [request][step], the reference's best and second best logit and the second's token.

    Returns:
        counts of ``tokens``, ``equal`` ones and ``near_ties`` and ``wrong`` ones among the others; ``rounds`` of
        generation; ``differing``: (request, step, token, expected, best, second) of the wrong ones first, at most 50.
    """
    at = [0] * len(prompts)
    equal = rounds = 0
    differing: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    unfinished = list(range(len(prompts)))
    while unfinished:
        rounds += 1
        found = generate(
            [[*prompts[i], *tokens[i][: at[i]]] for i in unfinished], [len(tokens[i]) - at[i] for i in unfinished]
        )
        for i, got in zip(unfinished, found, strict=True):
            for token, expected in zip(got, tokens[i][at[i] :], strict=True):
                step = at[i]
                at[i] += 1
                if token == expected:
                    equal += 1
                    continue
                best, second, runner_up = logits[i][step]
                differing[token == runner_up and near_tie(best, second)].append(
                    dict(request=i, step=step, token=token, expected=expected, best=best, second=second)
                )
                break
        unfinished = [i for i in unfinished if at[i] < len(tokens[i])]
    return {
        "tokens": sum(len(one) for one in tokens),
        "equal": equal,
        "near_ties": len(differing[True]),
        "wrong": len(differing[False]),
        "rounds": rounds,
        "differing": [*differing[False], *differing[True]][:50],
    }


def right(result: dict[str, Any]) -> bool:
    """Whether tokens are equal in the house's sense: every one that is no near tie, and `SHARE` of all."""
    return not result["wrong"] and result["equal"] >= SHARE * result["tokens"]
