"""`dougong bench serve` and `dougong chat --url` as a shell sees them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent))

from fake_server import USAGE, Fake, chat_events, event, fake_server

from dougong.cli.bench.serve import _flags, serve
from dougong.cli.chat import chat
from dougong.errors import ConfigError, EngineError


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server() as server:
        server.events = [event({"choices": [{"text": text}]}) for text in "abc"] + [event(USAGE), "data: [DONE]\n\n"]
        yield server


def bench(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(serve)
    return CliRunner().invoke(app, arguments)


def test_one_line_of_json_and_a_table_for_people(fake: Fake, tmp_path: Path) -> None:
    details, plot = tmp_path / "details.jsonl", tmp_path / "plot.png"
    done = bench(
        "--url", fake.url, "-n", "6", "--request-rate", "500", "--burst", "2", "--slo", "ttft:60000 tpot:60000",
        "--warmup", "1", "--details", str(details), "--plot", str(plot), "--body", '{"top_k": 3}',
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout)
    result = line["result"]
    assert line["bench"] == "serve" and line["workload"]["model"] == "tiny" and line["workload"]["request_rate"] == 500
    assert (result["completed"], result["failed"], result["output_tokens"]) == (6, 0, 18)
    assert result["goodput_share"] == 1.0 and result["ttft_ms"]["p99"] > 0
    assert "time to first token" in done.stderr and "goodput" in done.stderr
    assert len(details.read_text().splitlines()) == 6 and plot.read_bytes().startswith(b"\x89PNG")
    assert len(fake.bodies) == 7 and fake.bodies[0]["top_k"] == 3


def test_nothing_but_json_where_it_is_asked_for(fake: Fake) -> None:
    done = bench("--url", fake.url, "-n", "2", "--json", "--dataset", "conversation", "--token-ids", "5000")
    assert done.stderr == "" and json.loads(done.stdout)["result"]["completed"] == 2
    assert isinstance(fake.bodies[-1]["prompt"][0], int)


def test_a_run_in_which_all_fails_is_an_error(fake: Fake) -> None:
    fake.events = [event({"error": {"message": "out of blocks"}})]
    done = bench("--url", fake.url, "-n", "2", "--warmup", "0")
    assert isinstance(done.exception, EngineError) and "out of blocks" in str(done.exception)
    assert json.loads(done.stdout)["result"]["failed"] == 2


@pytest.mark.parametrize(
    "arguments",
    [["--endpoint", "embeddings"], ["--body", "[1]"], ["--slo", "fast"], ["--request-rate", "0"], ["-n", "0"]],
)
def test_wrong_options_are_said_before_anything_is_sent(fake: Fake, arguments: list[str]) -> None:
    done = bench("--url", fake.url, *arguments)
    assert done.exit_code == 2 or isinstance(done.exception, ConfigError)
    assert fake.bodies == []


def test_engine_options_become_the_servers_own() -> None:
    assert _flags(["max_num_seqs=8", "overlap=false", "dtype=float32", "enforce-eager=true"]) == [
        "--max-num-seqs", "8", "--no-overlap", "--dtype", "float32", "--enforce-eager",
    ]  # fmt: skip


def talk(fake: Fake, *lines: str, options: tuple[str, ...] = ()) -> Result:
    app = typer.Typer()
    app.command()(chat)
    return CliRunner().invoke(app, ["--url", fake.url, *options], input="".join(f"{line}\n" for line in lines))


def test_a_conversation_with_a_server(fake: Fake) -> None:
    fake.events = [event({"choices": [{"delta": {"reasoning_content": "(a city)"}}]}), *chat_events("Par", "is.")]
    done = talk(
        fake, "capital of France?", "and again", "/undo", "once more", "/quit",
        options=("--system", "be short", "--api-key", "sk-3", "-t", "0.5", "--seed", "9"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stdout.count("Paris.") == 3 and done.stderr.count("(a city)") == 3
    assert "tiny at http" in done.stderr and "7 prompt + 3 new tokens" in done.stderr and "ended by stop" in done.stderr
    roles = [[message["role"] for message in body["messages"]] for body in fake.bodies]
    one_turn = ["system", "user", "assistant", "user"]
    assert roles == [["system", "user"], one_turn, one_turn]
    assert fake.bodies[2]["messages"][-1]["content"] == "once more"
    assert fake.bodies[0]["temperature"] == 0.5 and fake.bodies[0]["seed"] == 9
    assert all(headers["Authorization"] == "Bearer sk-3" for headers in fake.headers)


def test_a_failed_turn_is_told_and_forgotten(fake: Fake) -> None:
    fake.events = chat_events("half")[:-1]
    done = talk(fake, "hello", "/quit")
    assert done.exit_code == 0 and "went away in the middle" in done.stderr


def test_the_servers_choices_are_not_ours(fake: Fake) -> None:
    done = talk(fake, "/quit", options=("--dtype", "float32", "--backend", "cpu"))
    assert done.exit_code == 2 and "backend, dtype" in done.stderr
