"""Teacher-forced tokens of one engine beside another's, from outside: by prompts alone, through its decode path.

An engine generates freely until its token differs from the reference's. There it is given the reference's tokens up to
and with that place as its prompt, and goes on. So every token is chosen behind the reference's own, and most of them in
decodes, as in serving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["NEAR_TIE", "SHARE", "follow", "right"]

NEAR_TIE = 4 * 2.0**-7
"""4 units in the last place of bfloat16 from 1 to 2. The best of a vocabulary's logits is larger, so this is at most
what the house's rule of equal tokens allows."""
SHARE = 0.98
"""Least share of equal tokens, near ties and all."""

#: (prompts, how many tokens of each) -> their tokens.
Generate = Callable[[list[list[int]], list[int]], list[list[int]]]


def follow(
    prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], gaps: Sequence[Sequence[float]],
    generate: Generate,
) -> dict[str, Any]:  # fmt: skip
    """Hold an engine's tokens against the reference's.

    Args:
        tokens: [request][step], the reference's.
        gaps: [request][step], how far its best logit lies above its second.

    Returns:
        counts of ``tokens``, ``equal`` ones and ``near_ties`` among the others; ``wrong``, the rest: (request, step,
        token, expected, gap), the first 20; ``rounds`` of generation.
    """
    at = [0] * len(prompts)
    equal = near = wrongs = rounds = 0
    wrong: list[dict[str, Any]] = []
    open_ = list(range(len(prompts)))
    while open_:
        rounds += 1
        found = generate(
            [[*prompts[i], *tokens[i][: at[i]]] for i in open_], [len(tokens[i]) - at[i] for i in open_]
        )  # fmt: skip
        for i, got in zip(open_, found, strict=True):
            for token, expected in zip(got, tokens[i][at[i] :], strict=True):
                step = at[i]
                at[i] += 1
                if token == expected:
                    equal += 1
                    continue
                if gaps[i][step] <= NEAR_TIE:
                    near += 1
                else:
                    wrongs += 1
                    wrong.append(dict(request=i, step=step, token=token, expected=expected, gap=gaps[i][step]))
                break
        open_ = [i for i in open_ if at[i] < len(tokens[i])]
    total = sum(len(one) for one in tokens)
    return {
        "tokens": total, "equal": equal, "near_ties": near, "wrong": wrongs, "examples": wrong[:20], "rounds": rounds,
    }  # fmt: skip


def right(result: dict[str, Any]) -> bool:
    """Whether tokens are equal in the house's sense: every one that is no near tie, and `SHARE` of all."""
    return not result["wrong"] and result["equal"] >= SHARE * result["tokens"]
