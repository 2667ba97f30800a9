"""Metrics, traces, logs, the live stream and the load client at a real server."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from server_harness import Served

from dougong.cli.bench.load import Target, run_load
from dougong.cli.bench.server_process import engine_figures
from dougong.cli.bench.workload import Arrivals, Prompt
from dougong.cli.remote import Remote
from dougong.server.logs import RequestLog
from dougong.server.tracing import Tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"


pytestmark = pytest.mark.xdist_group("server")


@pytest.fixture
def server(tiny: Served) -> Iterator[Served]:
    tiny.wait_idle()
    yield tiny
    tiny.wait_idle()


def sums(server: Served) -> dict[str, float]:
    """Each sample's value, over all labels."""
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_load_is_counted_once(server: Served) -> None:
    target = Target(f"{server.url}/v1", "tiny")
    prompts = [Prompt(list(range(10, 40 + index)), 8) for index in range(12)]
    asyncio.run(run_load(target, prompts[-1:], Arrivals()))  # what they share is cached
    server.wait_idle()
    before, engine = sums(server), engine_figures(f"{server.url}/v1")
    answers, _ = asyncio.run(run_load(target, prompts, Arrivals()))
    assert [answer.error for answer in answers] == [""] * 12
    assert [answer.output_tokens for answer in answers] == [8] * 12
    assert [answer.prompt_tokens for answer in answers] == [len(prompt.content) for prompt in prompts]
    server.wait_idle()
    after = sums(server)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:generation_tokens_total"] == 96
    assert grown["vllm:prompt_tokens_total"] == sum(len(prompt.content) for prompt in prompts)
    assert grown["vllm:request_success_total"] == 12
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
                 "request_decode_time_seconds", "request_time_per_output_token_seconds"):  # fmt: skip
        assert grown[f"vllm:{name}_count"] == 12, name
    # Each token after a completion's first waited one round.
    assert grown["vllm:inter_token_latency_seconds_count"] == 12 * 7
    assert grown["vllm:prompt_tokens_cached_total"] == sum(answer.cached_tokens for answer in answers) > 0
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0 and after["dougong:engine_up"] == 1
    figures = engine_figures(f"{server.url}/v1")
    assert figures is not None and engine is not None
    per_step = figures.since(engine)
    assert per_step is not None and per_step["cpu_us_per_step"] > 0  # type: ignore[operator]


def test_a_callers_trace_goes_on_and_a_line_is_logged(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(None, "tiny", exporter=exporter)
    server.client.observers += [tracing, RequestLog()]
    try:
        body = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "my secret"}]}
        headers = {"Content-Type": "application/json", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with caplog.at_level(logging.INFO, "dougong.requests"), urllib.request.urlopen(request) as response:
            answer = json.load(response)
        server.wait_idle()
    finally:
        del server.client.observers[-2:]
        tracing.close()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert {"llm_request", "queue", "prefill", "decode"} == set(spans)
    assert f"{spans['llm_request'].context.trace_id:032x}" == TRACE
    assert spans["llm_request"].attributes["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    (record,) = [one for one in caplog.records if one.name == "dougong.requests"]
    fields: Any = vars(record)
    assert fields["output_tokens"] == answer["usage"]["completion_tokens"] and fields["first_token_ms"] > 0
    assert "secret" not in json.dumps({key: str(value) for key, value in fields.items()})


def test_the_live_stream_begins_with_the_engine(server: Served) -> None:
    with urllib.request.urlopen(f"{server.url}/web/live", timeout=20) as response:
        events = [response.readline().decode() for _ in range(5)]
    engine, snapshot = json.loads(events[1].removeprefix("data: ")), json.loads(events[4].removeprefix("data: "))
    assert events[0] == "event: engine\n" and engine["models"] == ["tiny", "alias"]
    assert any(one["op"].startswith("attention") for one in engine["kernels"])
    assert events[3] == "event: snapshot\n" and snapshot["num_running"] == 0
    (group,) = snapshot["groups"]
    assert group["blocks"] - group["scratch"] == engine["usable_blocks"] and group["held"] == 0


def test_chat_from_the_command_line(server: Served) -> None:
    remote = Remote(server.url)
    assert remote.models() == ["tiny", "alias"]
    chunks = list(remote.chat([{"role": "user", "content": "hi"}], model="alias", max_tokens=3, ignore_eos=True))
    assert chunks[-1]["usage"]["completion_tokens"] == 3
