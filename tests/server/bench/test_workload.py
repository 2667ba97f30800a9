"""What a serving benchmark asks, when, and what it makes of the answers."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from dougong.cli.bench.load import Answer
from dougong.cli.bench.summary import parse_slo, percentiles, plot_answers, summarize
from dougong.cli.bench.workload import Arrivals, conversation_prompts, file_prompts, random_prompts
from dougong.errors import ConfigError


def gaps(arrivals: Arrivals, count: int = 20_000) -> list[float]:
    times = list(arrivals.times(count, seed=3))
    assert times == sorted(times) and times[0] == 0
    return [after - before for before, after in pairwise(times)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_shape_asked_for(burstiness: float) -> None:
    found = gaps(Arrivals(rate=50.0, burstiness=burstiness))
    assert statistics.fmean(found) == pytest.approx(1 / 50, rel=0.05)
    # A gamma distribution's coefficient of variation is 1 / sqrt(shape); Poisson arrivals have 1.
    assert statistics.stdev(found) / statistics.fmean(found) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_bursts_come_together_at_the_same_mean_rate() -> None:
    found = gaps(Arrivals(rate=50.0, burst=10))
    assert sum(gap == 0 for gap in found) == pytest.approx(0.9 * len(found), rel=0.01)
    assert statistics.fmean(found) == pytest.approx(1 / 50, rel=0.1)
    assert set(gaps(Arrivals(), 100)) == {0.0}


def test_random_prompts_have_just_the_lengths_and_share_just_the_prefix() -> None:
    found = random_prompts(20, 64, 8, spread=0.25, shared_prefix=16, vocab_size=5000, seed=1)
    assert all(48 <= len(prompt.content) <= 80 and 6 <= prompt.output_len <= 10 for prompt in found)
    assert len({tuple(prompt.content[:16]) for prompt in found}) == 1
    assert len({tuple(prompt.content[16:24]) for prompt in found}) == 20
    assert found == random_prompts(20, 64, 8, spread=0.25, shared_prefix=16, vocab_size=5000, seed=1)
    words = random_prompts(2, 30, 8)
    assert all(len(str(prompt.content).split()) == 30 for prompt in words)


def test_conversations_are_long_tailed_and_fit() -> None:
    found = conversation_prompts(600, longest=2048, vocab_size=5000)
    asked = sorted(len(prompt.content) for prompt in found)
    assert all(len(prompt.content) + prompt.output_len <= 2048 for prompt in found)
    assert 50 < asked[300] < 95 and asked[-1] > 8 * asked[300]


def test_files_of_several_forms(tmp_path: Path) -> None:
    rows = [{"prompt": "hello", "output_len": 3}, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = file_prompts(lines, 5, 99)
    assert len(found) == 5 and {prompt.output_len for prompt in found} == {3, 4}
    shared = tmp_path / "b.json"
    shared.write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "x" * 40}]}])
    )
    (prompt,) = file_prompts(shared, 1, 99)
    assert prompt.content == "why?" and prompt.output_len == 10
    shared.write_text('[{"text": 1}]')
    with pytest.raises(ConfigError, match="none of its 1 rows"):
        file_prompts(shared, 1, 99)
    shared.write_text("{")
    with pytest.raises(ConfigError, match="Expected JSON lines"):
        file_prompts(shared, 1, 99)


def answer(ttft: float, gap: float, tokens: int, sent: float = 0.0, error: str = "") -> Answer:
    pieces = [sent + ttft + gap * index for index in range(tokens)]
    return Answer(sent, pieces, pieces[-1] + 0.001, 10, tokens, 0, error)


def test_percentiles_interpolate() -> None:
    found = percentiles([0.001 * value for value in range(101)])
    assert found == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert percentiles([]) is None


def test_goodput_counts_requests_that_meet_every_limit() -> None:
    answers = [
        answer(0.1, 0.010, 11),
        answer(0.1, 0.060, 11),  # slow between tokens
        answer(0.3, 0.010, 11),  # late
        answer(0.1, 0.0, 1),  # a single token: nothing between
        answer(0.1, 0.010, 5, error="500: no"),
    ]
    result = summarize(answers, 2.0, parse_slo(["ttft:200 tpot:50"]))
    assert (result["completed"], result["failed"], result["errors"]) == (4, 1, {"500: no": 1})
    assert result["goodput_requests_per_s"] == 1.0 and result["goodput_share"] == 0.4
    assert result["output_tokens"] == 34 and result["output_tok_s"] == 17.0
    assert result["tpot_ms"]["max"] == pytest.approx(60) and result["ttft_ms"]["max"] == pytest.approx(300)
    assert len(answers[0].itl) == 10 and result["peak_concurrency"] == 4


@pytest.mark.parametrize("text", ["ttft", "ttft:fast", "speed:3", "tpot:-1"])
def test_limits_of_another_form(text: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        parse_slo([text])
    assert parse_slo(["ttft:200,tpot:50", "e2e:1e3"]) == {"ttft": 200, "tpot": 50, "e2e": 1000}


@pytest.mark.parametrize("values", [{"rate": 0}, {"burstiness": 0}, {"burst": 0}])
def test_arrivals_that_cannot_be(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="allowed is"):
        Arrivals(**values)  # type: ignore[arg-type]


def test_a_plot(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot_answers(path, "title", [answer(0.1, 0.01, 5), answer(0.2, 0.02, 5)], {"ttft": 200})
    assert path.read_bytes().startswith(b"\x89PNG")
