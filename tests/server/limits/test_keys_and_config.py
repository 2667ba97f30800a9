"""Where options come from, keys on disk, and what rate limits count. No server runs here."""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dougong.cli.app import build_app
from dougong.config import EngineConfig
from dougong.errors import ConfigError
from dougong.server.config import ENGINE_ONLY, ServerConfig, option_types, resolve_config
from dougong.server.errors import ApiError
from dougong.server.keys import KeyFile, KeyRing
from dougong.server.limits import Allowance, Bucket, RateLimits


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("port: 1\nmax-num-seqs: 2\ncors_origins: [a, b]\noverlap: false\nkernel_providers: {x: y}\nuds:\n")
    environ = {"DOUGONG_PORT": "3", "DOUGONG_MAX_NUM_SEQS": "4", "DOUGONG_API_KEY": "k1,k2", "DOUGONG_PLUGINS": "x"}
    config = resolve_config({"port": 5, "model": "m"}, file=file, environ=environ)
    assert (config.port, config.engine.max_num_seqs, config.engine.model) == (5, 4, "m")
    assert config.cors_origins == ("a", "b")
    assert config.api_key == ("k1", "k2")
    assert config.engine.overlap is False
    assert config.engine.kernel_providers == {"x": "y"}


def test_every_option_has_an_environment_variable_a_line_in_the_file_and_a_flag_with_help(tmp_path: Path) -> None:
    names = {one.name for cls in (ServerConfig, EngineConfig) for one in fields(cls)} - {"engine"} - ENGINE_ONLY
    assert names == set(option_types())
    text = CliRunner().invoke(build_app(), ["serve", "--help"], env={"COLUMNS": "400", "TERM": "dumb"}).output
    shown = set(re.findall(r"--([a-z0-9-]+)", text))
    assert {name.replace("_", "-") for name in names - {"model"}} <= shown
    for name, kind in option_types().items():
        sample = {int: "7", float: "0.5", bool: "true", tuple: "3,4", dict: "{}", str: "x"}[kind.kind]
        with_file = tmp_path / "one.yaml"
        with_file.write_text(f"{name}: {sample if kind.kind is not tuple else '[3, 4]'}\n")
        results = []
        for given in ({"environ": {f"DOUGONG_{name.upper()}": sample}}, {"file": with_file, "environ": {}}):
            try:
                resolve_config({}, **given)  # type: ignore[arg-type]
                results.append("")
            except ConfigError as error:  # it was read: "x" is no dtype
                results.append(re.sub("^(config|environment)[^:]*: ", "", str(error)))
        assert results[0] == results[1], name
        assert "unknown option" not in results[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prot": 1}, "Did you mean 'port'"),
        ({"port": "x"}, "port='x': expected an integer"),
        ({"port": 70000}, "0 to 65535"),
        ({"tls_cert": "x"}, "tls_cert and tls_key go together"),
        ({"unknown_fields": "x"}, "refuse or ignore"),
        ({"body_timeout_s": 0}, "above 0"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        resolve_config(given, environ={})


def test_keys_are_hashed_on_disk_and_a_running_server_notices_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    file = KeyFile(path)
    secret = file.add("alice", requests_per_minute=7)
    assert secret not in path.read_text()
    assert os.stat(path).st_mode & 0o777 == 0o600
    ring = KeyRing(("fixed",), path)
    found = ring.find(secret)
    assert found is not None and (found.name, found.requests_per_minute) == ("alice", 7)
    assert ring.find("fixed") is not None
    assert ring.find("sk-wrong") is ring.find("\ud800") is None
    with pytest.raises(ConfigError, match="name of its own"):
        file.add("alice")
    other = file.add("bob")
    ring._next_look = 0  # a second later
    assert ring.find(other) is not None
    file.remove("alice")
    ring._next_look = 0
    assert ring.find(secret) is None
    with pytest.raises(ConfigError, match="carol"):
        file.remove("carol")
    with pytest.raises(ConfigError, match="dougong keys add"):
        KeyRing((), tmp_path / "none.json")


def test_the_keys_command_makes_lists_and_removes(tmp_path: Path) -> None:
    app, path = build_app(), str(tmp_path / "keys.json")
    made = CliRunner().invoke(app, ["keys", "add", "alice", "--file", path])
    assert made.output.startswith("sk-dougong-")
    assert json.loads(Path(path).read_text())["keys"][0]["name"] == "alice"
    assert "alice" in CliRunner().invoke(app, ["keys", "list", "--file", path]).output
    assert CliRunner().invoke(app, ["keys", "remove", "alice", "--file", path]).exit_code == 0
    assert KeyFile(path).read() == []


def test_a_bucket_fills_again_and_the_refusal_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("dougong.server.limits.time.monotonic", lambda: now)
    allowance = Allowance(Bucket(2), Bucket(1000))
    first = allowance.take_request()
    assert first["x-ratelimit-remaining-requests"] == "1"
    allowance.take_request()
    with pytest.raises(ApiError) as refused:
        allowance.take_request()
    assert refused.value.status == 429
    assert refused.value.headers["retry-after"] == "30"
    now += 30
    allowance.take_request()
    assert allowance.tokens is not None
    allowance.tokens.left = -1000  # a long answer: its tokens are paid back first
    now += 31
    with pytest.raises(ApiError, match="rate limit"):
        allowance.take_request()


def test_each_key_has_limits_of_its_own(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    ring = KeyRing((file.add("a"), file.add("b", requests_per_minute=1)), None)
    assert ring.find("x") is None
    rates = RateLimits(5, None)
    keys = file.read()
    assert rates.of(keys[0], "") is rates.of(keys[0], "other") is not rates.of(keys[1], "")
    limited = rates.of(keys[1], "")
    assert limited is not None and limited.requests is not None
    assert limited.requests.rate == 1
    assert RateLimits(None, None).of(keys[0], "") is None
