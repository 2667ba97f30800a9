"""The load client and the chat client against a small server that answers as told."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_server import USAGE, Fake, chat_events, event, fake_server

from dougong.cli.bench.load import Target, run_load
from dougong.cli.bench.server_process import engine_figures
from dougong.cli.bench.workload import Arrivals, Prompt
from dougong.cli.remote import Remote, base_url
from dougong.errors import ConfigError, EngineError, InvalidRequestError


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server() as server:
        yield server


def run(fake: Fake, count: int = 1, **options: Any) -> list[Any]:
    concurrency = options.pop("max_concurrency", None)
    target = Target(base_url(fake.url), "tiny", **options)
    prompts = [Prompt([1, 2, 3], 3) for _ in range(count)]
    return asyncio.run(run_load(target, prompts, Arrivals(), max_concurrency=concurrency))[0]


def test_times_and_tokens_of_a_stream(fake: Fake) -> None:
    fake.events = [event({"choices": [{"text": text}]}) for text in ("a", "b", "c")] + [
        event(USAGE),
        "data: [DONE]\n\n",
    ]
    (answer,) = run(fake, api_key="sk-1", extra={"seed": 4})
    assert answer.error == "" and len(answer.pieces) == 3
    assert (answer.prompt_tokens, answer.output_tokens, answer.cached_tokens) == (7, 3, 2)
    assert 0 < answer.ttft <= answer.e2e
    body = fake.bodies[0]
    assert body["path"] == "/v1/completions" and body["prompt"] == [1, 2, 3]
    assert body["max_tokens"] == 3 and body["ignore_eos"] is True and body["seed"] == 4
    assert fake.headers[0]["Authorization"] == "Bearer sk-1"


def test_a_role_is_no_first_token(fake: Fake) -> None:
    fake.events = chat_events("x", "y")
    (answer,) = run(fake, endpoint="chat", ignore_eos=False)
    assert len(answer.pieces) == 2 and answer.error == ""
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": [1, 2, 3]}]
    assert "ignore_eos" not in fake.bodies[0]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda fake: setattr(fake, "status", 429), "429: "),
        (lambda fake: fake.events.pop(), "closed before [DONE]"),
        (lambda fake: fake.events.insert(1, event({"error": {"message": "the step failed"}})), "the step failed"),
        (lambda fake: setattr(fake, "events", ["data: [DONE]\n\n"]), "empty"),
        (lambda fake: setattr(fake, "events", ["data: {\n\n"]), "JSONDecodeError"),
    ],
)
def test_what_goes_wrong_is_an_error_of_that_request(fake: Fake, change: Callable[[Fake], None], error: str) -> None:
    fake.events = chat_events("x")
    change(fake)
    (answer,) = run(fake, endpoint="chat")
    assert error in answer.error


def test_a_server_that_is_not_there() -> None:
    answers, _ = asyncio.run(run_load(Target("http://127.0.0.1:9/v1", "tiny"), [Prompt("x", 1)], Arrivals()))
    assert "Error" in answers[0].error


def test_all_at_once_and_in_a_closed_loop(fake: Fake) -> None:
    fake.events = chat_events("x")
    fake.gate = threading.Barrier(12)  # opens only when all are there together
    assert all(not answer.error for answer in run(fake, 12, endpoint="chat"))
    assert fake.most == 12
    fake.gate, fake.most = None, 0
    run(fake, 12, endpoint="chat", max_concurrency=2)
    # The server counts one out a moment after the client has read its end.
    assert 1 <= fake.most <= 4


# -- the chat client -----------------------------------------------------------------------------------------


def test_remote_streams_chunks(fake: Fake) -> None:
    fake.events = chat_events("Par", "is")
    remote = Remote(fake.url, "sk-2")
    assert remote.models() == ["tiny"]
    chunks = list(remote.chat([{"role": "user", "content": "capital?"}], model="tiny"))
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text == "Paris" and chunks[-1]["usage"]["completion_tokens"] == 3
    assert fake.bodies[0]["stream"] is True and fake.headers[0]["Authorization"] == "Bearer sk-2"


def test_remote_errors_say_what_to_do(fake: Fake) -> None:
    fake.events = ['{"error": {"message": "the prompt is too long"}}']
    fake.status = 400
    with pytest.raises(InvalidRequestError, match="answered 400: the prompt is too long"):
        list(Remote(fake.url).chat([], model="tiny"))
    fake.status = 401
    with pytest.raises(EngineError, match="--api-key"):
        list(Remote(fake.url).chat([], model="tiny"))
    fake.status, fake.events = 200, chat_events("x")[:-1]
    with pytest.raises(EngineError, match="went away in the middle"):
        list(Remote(fake.url).chat([], model="tiny"))
    with pytest.raises(EngineError, match=r"cannot be reached: .*dougong serve"):
        Remote("http://127.0.0.1:9").models()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("localhost:8000", "http://localhost:8000/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("https://h/proxy/v1", "https://h/proxy/v1"),
        ("http://h/v1/chat/completions", "http://h/v1"),
    ],
)
def test_what_a_person_types(given: str, url: str) -> None:
    assert base_url(given) == url


@pytest.mark.parametrize("given", ["", "ftp://h", "http://"])
def test_no_host(given: str) -> None:
    with pytest.raises(ConfigError, match="expected http"):
        base_url(given)


# -- a dougong server's own figures ---------------------------------------------------------------------------


def test_figures_per_step(fake: Fake) -> None:
    labels = '{model_name="m",engine="0"}'
    page = (
        "dougong:step_time_seconds_count{l} {steps}\ndougong:step_time_seconds_sum{l} {wall}\n"
        'dougong:engine_cpu_seconds_total{l} {cpu}\ndougong:step_part_seconds_total{{engine="0",part="wait"}} {wait}\n'
    )
    fake.metrics = page.format(l=labels, steps=10, wall=1.0, cpu=0.5, wait=0.75)
    before = engine_figures(f"{fake.url}/v1")
    fake.metrics = page.format(l=labels, steps=30, wall=1.2, cpu=0.6, wait=0.85)
    after = engine_figures(f"{fake.url}/v1")
    assert before is not None and after is not None
    assert after.since(before) == {
        "steps": 20, "cpu_us_per_step": 5000.0, "wall_us_per_step": 10000.0, "wall_us_by_part": {"wait": 5000.0},
    }  # fmt: skip
    assert after.since(after) is None
    fake.metrics = "other_metric 3\n"
    assert engine_figures(f"{fake.url}/v1") is None
