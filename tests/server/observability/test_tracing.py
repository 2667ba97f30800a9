"""Spans of a request: under the caller's, with the times that it noted."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

sys.path.insert(0, str(Path(__file__).parent))

from test_metrics import output

from dougong import SamplingParams
from dougong.errors import ConfigError
from dougong.server.process.observer import RequestStart
from dougong.server.tracing import Tracing
from dougong.types import FinishReason, RequestTimes

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans_of(out: Any, trace: dict[str, str] | None) -> dict[str, Any]:
    exporter = InMemorySpanExporter()
    tracing = Tracing(None, "tiny", exporter=exporter)
    tracing.started(RequestStart(out.request_id, 10, SamplingParams(max_tokens=5, temperature=0.5), trace=trace))
    tracing.first_token(out)
    tracing.finished(out)
    tracing.close()
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_is_a_span_under_its_callers() -> None:
    out = output("req-1")
    spans = spans_of(out, {"Traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"})
    assert set(spans) == {"llm_request", "queue", "prefill", "decode"}
    request = spans["llm_request"]
    assert request.kind is SpanKind.SERVER
    assert f"{request.context.trace_id:032x}" == TRACE and f"{request.parent.span_id:016x}" == PARENT
    for name in ("queue", "prefill", "decode"):
        assert spans[name].parent.span_id == request.context.span_id
        assert f"{spans[name].context.trace_id:032x}" == TRACE
    lengths = {name: (span.end_time - span.start_time) / 1e9 for name, span in spans.items()}
    assert lengths["queue"] == pytest.approx(0.5, abs=1e-3)
    assert lengths["prefill"] == pytest.approx(1.0, abs=1e-3)
    assert lengths["decode"] == pytest.approx(2.0, abs=1e-3)
    assert request.start_time == spans["queue"].start_time
    assert request.attributes["gen_ai.usage.input_tokens"] == 10
    assert request.attributes["gen_ai.usage.output_tokens"] == 5
    assert request.attributes["gen_ai.request.max_tokens"] == 5
    assert request.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert request.resource.attributes["service.name"] == "dougong"
    assert "secret" not in str(dict(request.attributes))


def test_without_a_caller_it_is_a_trace_of_its_own() -> None:
    request = spans_of(output(), None)["llm_request"]
    assert request.parent is None


def test_a_request_that_failed_in_the_queue() -> None:
    out = output(reason=FinishReason.ERROR)
    out.outputs[0].error = "EngineError: the engine's process was killed"
    out.times = RequestTimes(out.times.arrival)
    spans = spans_of(out, None)
    assert set(spans) == {"llm_request"}
    assert spans["llm_request"].status.status_code is StatusCode.ERROR
    assert "was killed" in spans["llm_request"].status.description


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("opentelemetry.sdk"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"dougong\[otel\]"):
        Tracing("http://localhost:4318/v1/traces", "tiny")
