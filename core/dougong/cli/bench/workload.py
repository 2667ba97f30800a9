"""What a serving benchmark asks, and when: prompts of random, conversation-like or given texts; arrivals."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dougong.errors import ConfigError

__all__ = ["Arrivals", "Prompt", "conversation_prompts", "file_prompts", "random_prompts"]

#: Short, common English words: about a token each in most vocabularies.
_WORDS = tuple(
    """
    the of and to in a is that for it as was with be by on not he his but at are this have from or had an they
    which one you were all her she there would their we him been has when who will no more if out so up said
    what its about than into them can only other time new some could these two may first then do any like my now
    over such our man me even most made after also did many off before must well back through years much where
    your way down should because long each just state those people too mr how little good world make very year
    still see own work men day get here old
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Prompt:
    """One request: token ids, a text, or chat messages, and how many tokens to answer with."""

    content: list[int] | str | list[dict[str, Any]]
    output_len: int


@dataclass(frozen=True)
class Arrivals:
    """When requests come.

    rate         per second; infinity: all at once (or as `max_concurrency` lets them)
    burstiness   shape of the gamma distribution of gaps: 1 is Poisson, less is burstier, more is more even
    burst        requests that come together, every ``burst / rate`` seconds on average
    """

    rate: float = float("inf")
    burstiness: float = 1.0
    burst: int = 1

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ConfigError(f"--request-rate {self.rate}: allowed is a number > 0, or inf.")
        if not self.burstiness > 0:
            raise ConfigError(f"--burstiness {self.burstiness}: allowed is a number > 0; 1 is Poisson.")
        if self.burst < 1:
            raise ConfigError(f"--burst {self.burst}: allowed is an integer >= 1.")

    def times(self, count: int, seed: int) -> Iterator[float]:
        """Seconds after the start, ascending, one per request."""
        draw = random.Random(seed)
        now = 0.0
        for index in range(count):
            if index and index % self.burst == 0 and self.rate != float("inf"):
                # Mean gap burst / rate, whatever the shape.
                now += draw.gammavariate(self.burstiness, self.burst / (self.rate * self.burstiness))
            yield now


def _lengths(draw: random.Random, mean: int, spread: float) -> int:
    return max(1, draw.randint(int(mean * (1 - spread)), int(mean * (1 + spread))))


def _text(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(_WORDS, k=count))


def random_prompts(
    count: int,
    input_len: int,
    output_len: int,
    *,
    spread: float = 0.0,
    shared_prefix: int = 0,
    vocab_size: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """Prompts of random tokens, lengths drawn evenly from mean·(1 ± spread).

    Token ids below ``vocab_size`` where it is given (lengths are exact), else random words (about a token each). The
    first ``shared_prefix`` of each are the same.
    """
    draw = random.Random(seed)
    common = random.Random(12345)
    top = max(64, vocab_size - 1000) if vocab_size is not None else 0  # keep clear of special ids
    prefix_ids = [common.randrange(10, top) for _ in range(shared_prefix)] if top else []
    prefix_text = _text(common, shared_prefix)
    found = []
    for _ in range(count):
        own = max(1, _lengths(draw, input_len, spread) - shared_prefix)
        content: list[int] | str
        if top:
            content = prefix_ids + [draw.randrange(10, top) for _ in range(own)]
        else:
            content = f"{prefix_text} {_text(draw, own)}".strip()
        found.append(Prompt(content, _lengths(draw, output_len, spread)))
    return found


def conversation_prompts(count: int, *, longest: int, vocab_size: int | None = None, seed: int = 0) -> list[Prompt]:
    """Lengths as people's chats with assistants have them: log-normal, many short and a long tail.

    Medians are 70 tokens asked and 180 answered, like first turns of the ShareGPT collection; no text of it is here.
    """
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        asked = min(max(4, int(draw.lognormvariate(4.25, 1.2))), longest // 2)
        answered = min(max(4, int(draw.lognormvariate(5.2, 0.9))), longest - asked)
        found += random_prompts(1, asked, answered, vocab_size=vocab_size, seed=draw.getrandbits(32))
    return found


def file_prompts(path: Path, count: int, output_len: int, seed: int = 0) -> list[Prompt]:
    """Prompts of a file: JSON lines, or a JSON list, of objects with ``prompt`` (text or ids) or ``messages``, and
    ``output_len`` or ``max_tokens``; ShareGPT's form (``conversations`` of ``from`` and ``value``) is read too.

    Drawn without repetition while there are enough.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(row) for row in text.splitlines() if row.strip()]
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dataset {path}: {error}. Expected JSON lines with 'prompt' or 'messages'.") from error
    found = [prompt for row in rows if (prompt := _row(row, output_len)) is not None]
    if not found:
        raise ConfigError(
            f"--dataset {path}: none of its {len(rows)} rows has 'prompt', 'messages' or 'conversations'."
        )
    draw = random.Random(seed)
    draw.shuffle(found)
    return [found[index % len(found)] for index in range(count)]


def _row(row: Any, output_len: int) -> Prompt | None:
    if not isinstance(row, dict):
        return None
    wanted = row.get("output_len") or row.get("max_tokens")
    content = row.get("prompt") or row.get("messages")
    turns: Sequence[Any] = row.get("conversations") or ()
    if content is None and turns and turns[0].get("from") in ("human", "user"):
        content = turns[0]["value"]
        if wanted is None and len(turns) > 1:
            wanted = max(4, len(str(turns[1].get("value", ""))) // 4)
    if not content:
        return None
    return Prompt(content, int(wanted or output_len))
