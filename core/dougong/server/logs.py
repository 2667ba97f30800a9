"""Logs: lines for people or JSON for machines, and one line per request. No prompt and no answer by default."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from time import monotonic
from typing import Any, Literal

from dougong.errors import ConfigError
from dougong.server.process.observer import RequestObserver
from dougong.types import RequestOutput

__all__ = ["JsonFormatter", "LogFormat", "RequestLog", "log_config"]

LogFormat = Literal["text", "json"]
_LEVELS = ("debug", "info", "warning", "error")
#: What every LogRecord has; anything else was given as ``extra=``.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}

log = logging.getLogger("dougong.requests")


class JsonFormatter(logging.Formatter):
    """One JSON object per record: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, what came as ``extra``,
    and ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN and name not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _TextFormatter(logging.Formatter):
    """``12:34:56 INFO dougong.server message key=value``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s  %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        extra = [f"{name}={value}" for name, value in vars(record).items() if name not in _OWN]
        return f"{line}  {' '.join(extra)}" if extra else line


def log_config(format: LogFormat = "text", level: str = "info") -> dict[str, Any]:
    """A mapping for `logging.config.dictConfig`, and for uvicorn's ``log_config``. Everything goes to stderr.

    Raises:
        ConfigError: an unknown format or level.
    """
    if format not in ("text", "json"):
        raise ConfigError(f"log_format={format!r}: allowed is text or json.")
    if level not in _LEVELS:
        raise ConfigError(f"log_level={level!r}: allowed is {', '.join(_LEVELS)}.")
    formatter = JsonFormatter if format == "json" else _TextFormatter
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": formatter}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines", "stream": "ext://sys.stderr"}},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {
            "dougong": {"level": level.upper()},
            # Its access log repeats what our own line per request says, for pages and probes too.
            "uvicorn": {"level": level.upper()},
            "uvicorn.access": {"level": "DEBUG" if level == "debug" else "WARNING"},
        },
    }


class RequestLog(RequestObserver):
    """An observer that logs each request's end, with its figures and without its text.

    Args:
        prompts: log prompt token ids and the answer's text too. For debugging: they may be anybody's secrets.
    """

    def __init__(self, prompts: bool = False) -> None:
        self._prompts = prompts

    def finished(self, output: RequestOutput) -> None:
        if not log.isEnabledFor(logging.INFO):
            return
        times, now = output.times, monotonic()
        fields: dict[str, Any] = {
            "request_id": output.request_id,
            "prompt_tokens": len(output.prompt_token_ids),
            "cached_tokens": output.num_cached_tokens,
            "output_tokens": sum(len(completion.token_ids) for completion in output.outputs),
            "finish_reason": ",".join(str(completion.finish_reason) for completion in output.outputs),
        }
        for name, start, end in (
            ("queue_ms", times.arrival, times.first_scheduled),
            ("first_token_ms", times.arrival, times.first_token),
            ("total_ms", times.arrival, now),
        ):
            if start is not None and end is not None:
                fields[name] = round(1000 * (end - start), 1)
        errors = [completion.error for completion in output.outputs if completion.error]
        if errors:
            fields["error"] = errors[0]
        if self._prompts:
            fields["prompt_token_ids"] = output.prompt_token_ids
            fields["text"] = [completion.text for completion in output.outputs]
        log.log(logging.WARNING if errors else logging.INFO, "request finished", extra=fields)
