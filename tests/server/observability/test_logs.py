"""Logs: one JSON object a line, one line a request, and no text of anybody's."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_metrics import output

from dougong.errors import ConfigError
from dougong.server.logs import RequestLog, log_config
from dougong.types import FinishReason


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is written to stderr; the loggers are put back afterwards."""
    root, names = logging.getLogger(), ("dougong", "uvicorn", "uvicorn.access")
    before = root.level, root.handlers[:], {name: logging.getLogger(name).level for name in names}
    yield io.StringIO()
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    for name, level in before[2].items():
        logging.getLogger(name).setLevel(level)


def configure(stream: io.StringIO, form: str, level: str) -> None:
    with redirect_stderr(stream):
        logging.config.dictConfig(log_config(form, level))  # type: ignore[arg-type]


def test_json_lines(stream: io.StringIO) -> None:
    configure(stream, "json", "info")
    logging.getLogger("dougong.server").info("serving %s", "tiny\nmodel", extra={"port": 8000})
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("dougong.server").exception("a step failed")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert first["message"] == "serving tiny\nmodel" and first["port"] == 8000 and first["level"] == "info"
    assert first["logger"] == "dougong.server" and first["time"].endswith("+00:00")
    assert "ValueError: broken" in second["exception"] and second["level"] == "error"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_request_is_one_line_without_its_text(stream: io.StringIO, form: str) -> None:
    configure(stream, form, "info")
    RequestLog().finished(output("chatcmpl-7"))
    (line,) = stream.getvalue().splitlines()
    assert "chatcmpl-7" in line and "secret" not in line
    if form == "json":
        fields = json.loads(line)
        assert fields["prompt_tokens"] == 10 and fields["output_tokens"] == 5 and fields["cached_tokens"] == 4
        assert fields["queue_ms"] == 500 and fields["first_token_ms"] == 1500 and fields["finish_reason"] == "stop"


def test_text_only_where_it_is_asked_for(stream: io.StringIO) -> None:
    configure(stream, "json", "info")
    RequestLog(True).finished(output())
    assert json.loads(stream.getvalue())["text"] == ["secret words"]


def test_an_error_is_a_warning_with_its_cause(stream: io.StringIO) -> None:
    configure(stream, "json", "warning")
    RequestLog().finished(output())
    assert stream.getvalue() == ""  # below the level
    configure(stream, "json", "info")
    failed = output(reason=FinishReason.ERROR)
    failed.outputs[0].error = "EngineError: killed"
    RequestLog().finished(failed)
    fields = json.loads(stream.getvalue())
    assert fields["level"] == "warning" and fields["error"] == "EngineError: killed"


@pytest.mark.parametrize(("form", "level"), [("xml", "info"), ("json", "loud")])
def test_what_is_allowed_is_said(form: str, level: str) -> None:
    with pytest.raises(ConfigError, match="allowed is"):
        log_config(form, level)  # type: ignore[arg-type]
