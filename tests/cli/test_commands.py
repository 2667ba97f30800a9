"""The commands as a shell sees them: what they print, where, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_harness import BACKEND

from tests.cli.shell import Command


@pytest.fixture
def model(llama: Path) -> list[str]:
    return ["--model", str(llama), "--backend", BACKEND, "--dtype", "float32", "--max-model-len", "128"]


def test_generate_prints_the_answer_and_the_figures_apart(command: Command, model: list[str]) -> None:
    ended = command("generate", "hello", "-n", "8", "--ignore-eos", *model)
    assert ended.code == 0 and ended.out.endswith("\n")
    assert "5 prompt + 8 new tokens" in ended.err and "KV " in ended.err and f"backend {BACKEND}" in ended.err
    as_json = json.loads(command("generate", "hello", "-n", "8", "--ignore-eos", "--json", *model).out)
    assert as_json["text"] + "\n" == ended.out


def test_generate_json(command: Command, model: list[str], llama: Path) -> None:
    ended = command("generate", "hello", "-n", "8", "--ignore-eos", "--json", *model)
    answer = json.loads(ended.out)
    assert {"text", "token_ids", "finish_reason", "usage"} <= set(answer)
    assert isinstance(answer["text"], str) and len(answer["token_ids"]) == 8
    assert all(isinstance(token, int) for token in answer["token_ids"])
    assert (answer["finish_reason"], answer["stop_reason"], answer["error"]) == ("length", None, None)
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13, "cached_tokens": 0}
    assert answer["model"] == str(llama) and answer["backend"] == BACKEND
    assert 0 < answer["kv_blocks"]["peak"] <= answer["kv_blocks"]["usable"] and answer["first_token_s"] > 0


def test_generate_from_standard_input_with_chat_stop_and_set(command: Command, model: list[str]) -> None:
    piped = json.loads(command("generate", "-", "-n", "12", "--ignore-eos", "--json", *model, stdin="hello").out)
    whole = json.loads(command("generate", "hello", "-n", "12", "--ignore-eos", "--json", *model).out)
    assert piped["token_ids"] == whole["token_ids"]
    chat = json.loads(command("generate", "hello", "-n", "2", "--chat", "--json", *model).out)
    assert chat["usage"]["prompt_tokens"] == len("[user] hello\n[assistant] ")
    text = whole["text"]
    stop = next(text[i] for i in range(2, len(text)) if text[i] not in text[:i])
    stopped = json.loads(
        command(
            "generate", "hello", "-n", "12", "--ignore-eos", "--json", "--stop", stop, "--stop", "\u2603", *model
        ).out
    )
    assert stopped["text"] == text[: text.index(stop)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)
    options = ["--set", "overlap=false", "--set", "long-prefill-token-threshold=2", "--set", "num_kv_blocks=20"]
    by_set = command("generate", "hello", "-n", "12", "--ignore-eos", "--json", *model, *options)
    assert json.loads(by_set.out)["token_ids"] == whole["token_ids"]


def test_sampling_with_a_seed_is_repeatable(command: Command, model: list[str]) -> None:
    options = ["-t", "1.2", "--top-p", "0.95", "--top-k", "50", "--seed", "4", "--json", "-n", "10"]
    first, second = (json.loads(command("generate", "hello", *options, *model).out) for _ in range(2))
    assert first["token_ids"] == second["token_ids"]


ERRORS = {
    "no model": (["generate", "x", "--model", "./nowhere"], 1, "ModelLoadError: there is no folder"),
    "no backend": (["generate", "x", "--backend", "warp"], 1, "BackendNotFoundError: "),
    "empty prompt": (["generate", "", "MODEL"], 2, "InvalidRequestError: the prompt is empty"),
    "long prompt": (["generate", "x" * 200, "MODEL"], 2, "InvalidRequestError: the prompt has 200 tokens"),
    "bad value": (["generate", "x", "--top-p", "7", "MODEL"], 2, "InvalidRequestError: SamplingParams(top_p=7"),
    "bad option": (["generate", "x", "--set", "max_num_seq=3", "MODEL"], 1, "Did you mean 'max_num_seqs'?"),
    "no value": (["generate", "x", "--set", "overlap", "MODEL"], 2, "expected NAME=VALUE"),
    "no flag": (["generate", "x", "--tokens", "3"], 2, "No such option"),
    "no command": (["genrate", "x"], 2, "No such command"),
    "heads": (["doctor", "--heads", "9"], 2, "expected H/K"),
    "heads that do not divide": (["doctor", "--heads", "9/4"], 2, "expected H/K"),
    "head size": (["doctor", "--head-dim", "0"], 2, "--head-dim"),
    "no load": (["bench", "offline", "--workloads", ","], 2, "--workloads is empty"),
    "half a load": (["bench", "offline", "--workloads", "1:2"], 2, "expected N:IN:OUT"),
    "no requests": (["bench", "offline", "--workloads", "0:1:1"], 2, "integers >= 1"),
    "bench heads": (["bench", "attention", "--heads", "x"], 2, "expected H/K"),
    "bench dtype": (["bench", "attention", "--dtype", "half"], 2, "expected bfloat16, float16 or float32"),
    "bench rows": (["bench", "attention", "--decode", "1:a"], 2, "expected ROWS:CONTEXT"),
    "no surrogates": (["generate", "\udcff", "MODEL"], 2, "not valid Unicode"),
    "doctor dtype": (["doctor", "--backend", BACKEND, "--dtype", "int9"], 2, "expected bfloat16, float16 or float32"),
    "doctor backend": (["doctor", "--backend", "warp"], 1, ""),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_and_their_exit_codes(command: Command, model: list[str], case: str) -> None:
    arguments, code, message = ERRORS[case]
    if "MODEL" in arguments:
        arguments = [*arguments[: arguments.index("MODEL")], *model]
    ended = command(*arguments)
    assert ended.code == code
    assert message in ended.err and "Traceback" not in ended.err


def test_version_and_help(command: Command) -> None:
    import dougong

    assert command("--version").out.strip() == dougong.__version__
    shown = command("--help").out
    assert all(name in shown for name in ("generate", "chat", "doctor", "bench"))


# -- doctor ----------------------------------------------------------------------------------------------


def test_doctor_json(command: Command) -> None:
    ended = command("doctor", "--backend", BACKEND, "--dtype", "float32", "--json")
    report = json.loads(ended.out)
    assert ended.code == 0 and report["errors"] == []
    assert report["versions"]["dougong"] and report["versions"]["torch"]
    assert {plugin["name"]: plugin["state"] for plugin in report["plugins"]}[BACKEND] == "loaded"
    backend = next(one for one in report["backends"] if one["name"] == BACKEND)
    assert backend["ok"] and backend["devices"]
    for one in report["backends"]:
        assert one["ok"] or one["reason"]
    chosen = report["chosen"]
    assert chosen["backend"] == BACKEND and chosen["memory_total"] >= chosen["memory_free"] > 0
    names = [op["op"] for op in chosen["ops"]]
    assert any(name.startswith("attention") for name in names) and "linear (dense)" in names and len(names) > 6
    for op in chosen["ops"]:
        assert op["provider"] and all(refused["reason"] for refused in op["refused"])


def test_doctor_shows_the_same_to_a_person(command: Command) -> None:
    ended = command("doctor", "--backend", BACKEND)
    assert ended.code == 0
    for part in ("Plugins", "Backends, best first", "Chosen: ", "Ops in bfloat16", "attention", BACKEND):
        assert part in ended.out


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed plugin that fails to import."""
    (tmp_path / "dougong_warp.py").write_text("raise ImportError('libwarp.so.4 is not there')\n")
    info = tmp_path / "dougong_warp-3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dougong-warp\nVersion: 3.1\n")
    (info / "entry_points.txt").write_text("[dougong]\nwarp = dougong_warp\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("broken")
def test_doctor_tells_of_a_broken_plugin_and_an_engine_does_not_start(command: Command, model: list[str]) -> None:
    ended = command("doctor", "--backend", BACKEND, "--json")
    report = json.loads(ended.out)
    assert ended.code == 1
    plugin = next(one for one in report["plugins"] if one["name"] == "warp")
    assert (plugin["state"], plugin["version"], plugin["distribution"]) == ("broken", "3.1", "dougong-warp")
    assert "libwarp.so.4" in plugin["error"] and "DOUGONG_PLUGINS=-warp" in plugin["error"]
    assert report["chosen"]["backend"] == BACKEND  # the others are shown all the same
    shown = command("doctor", "--backend", BACKEND)
    assert shown.code == 1 and "broken" in shown.out and "libwarp.so.4" in shown.out
    start = command("generate", "hello", "-n", "2", *model)
    assert start.code == 1 and "libwarp.so.4" in start.err and "DOUGONG_PLUGINS=-warp" in start.err


@pytest.mark.usefixtures("broken")
def test_an_excluded_plugin_stops_nothing(command: Command, model: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOUGONG_PLUGINS", "-warp")
    report = json.loads(command("doctor", "--backend", BACKEND, "--json").out)
    assert next(one for one in report["plugins"] if one["name"] == "warp")["state"] == "excluded"
    assert command("generate", "hello", "-n", "2", *model).code == 0
    monkeypatch.setenv("DOUGONG_PLUGINS", "-warp,cpu")
    ended = command("doctor")
    assert ended.code == 1 and "not both" in ended.err
