"""Metrics: what requests and steps add up to, across a restart, and as Prometheus reads it."""

from __future__ import annotations

import re
from pathlib import Path
from time import monotonic

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dougong import SamplingParams
from dougong.server.histogram import Histogram, one_two_five
from dougong.server.metrics import Metrics
from dougong.server.process.messages import EngineInfo, StepCounters
from dougong.server.process.observer import RequestStart
from dougong.types import CompletionOutput, FinishReason, RequestOutput, RequestTimes

DOCS = Path(__file__).resolve().parents[3] / "docs"

INFO = EngineInfo(
    version="0.1.0", pid=1, model_path="/m", model_type="llama", dtype="bfloat16", quantization=None, vocab_size=100,
    max_model_len=4096, capacity_tokens=None, eos_token_ids=[2], max_num_seqs=8, max_num_batched_tokens=2048,
    backend="cpu", device="a processor", hidden_size=64, usable_blocks=63, kernels=[], start_s=1.0,
)  # fmt: skip


def counters(index: int = 0, **values: float) -> StepCounters:
    given = {
        "num_rows": 4, "num_decode_rows": 3, "num_tokens": 20, "generated_tokens": 4, "running": 4, "waiting": 2,
        "preemptions": 0, "kv_usage": 0.25, "prefix_queries": 100, "prefix_hits": 40, "schedule_s": 0.001,
        "launch_s": 0.002, "wait_s": 0.005, "commit_s": 0.001, "step_s": 0.01, "cpu_s": 0.008,
    } | values  # fmt: skip
    return StepCounters(index=index, **given)  # type: ignore[arg-type]


def output(
    request_id: str = "r", prompt: int = 10, made: int = 5, reason: FinishReason = FinishReason.STOP
) -> RequestOutput:
    arrival = monotonic() - 4.0
    times = RequestTimes(arrival, arrival + 0.5, arrival + 1.5, arrival + 3.5)
    completion = CompletionOutput(0, "secret words", list(range(made)), finish_reason=reason)
    return RequestOutput(request_id, None, [1] * prompt, [completion], True, num_cached_tokens=4, times=times)


def samples(metrics: Metrics) -> dict[str, float]:
    """Name and labels (model_name and engine left out) to value."""
    text = metrics.render()[0].decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key not in ("model_name", "engine")}
            found[sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(labels.items()))] = sample.value
    return found


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny", INFO)


def test_a_request_and_its_steps(metrics: Metrics) -> None:
    metrics.started(RequestStart("r", 10, SamplingParams(n=2, max_tokens=7)))
    metrics.first_token(output())
    metrics.step(counters())
    metrics.finished(output())
    found = samples(metrics)
    assert found["vllm:num_requests_running"] == 4
    assert found["vllm:num_requests_waiting"] == 2
    assert found["vllm:kv_cache_usage_perc"] == 0.25
    assert found["vllm:prompt_tokens_total"] == 10
    assert found["vllm:prompt_tokens_cached_total"] == 4
    assert found["vllm:generation_tokens_total"] == 4
    assert found["vllm:request_success_total{finished_reason=stop}"] == 1
    assert found["vllm:request_success_total{finished_reason=abort}"] == 0
    for name, seconds in {
        "vllm:time_to_first_token_seconds": 1.5,
        "vllm:request_queue_time_seconds": 0.5,
        "vllm:request_prefill_time_seconds": 1.0,
        "vllm:request_decode_time_seconds": 2.0,
        "vllm:request_inference_time_seconds": 3.0,
        "vllm:request_time_per_output_token_seconds": 0.5,
        "vllm:request_generation_tokens": 5,
        "vllm:request_prefill_kv_computed_tokens": 6,
        "vllm:request_params_n": 2,
        "vllm:request_params_max_tokens": 7,
    }.items():
        assert found[f"{name}_count"] == 1, name
        assert found[f"{name}_sum"] == pytest.approx(seconds), name
    assert found["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(4.0, abs=0.5)


def test_a_row_that_decodes_waited_one_round_for_its_token(metrics: Metrics) -> None:
    metrics.step(counters(step_s=0.02, num_decode_rows=3))
    metrics.step(counters(step_s=0.5, num_decode_rows=0, num_tokens=64))
    found = samples(metrics)
    assert found["vllm:inter_token_latency_seconds_count"] == 3
    assert found["vllm:inter_token_latency_seconds_sum"] == pytest.approx(0.06)
    assert found["vllm:inter_token_latency_seconds_bucket{le=0.01}"] == 0
    assert found["vllm:inter_token_latency_seconds_bucket{le=0.025}"] == 3
    assert found["dougong:step_time_seconds_count"] == 2


def test_parts_of_a_step_add_up_to_it(metrics: Metrics) -> None:
    metrics.step(counters())
    found = samples(metrics)
    parts = {name: value for name, value in found.items() if name.startswith("dougong:step_part_seconds_total")}
    assert sum(parts.values()) == pytest.approx(found["dougong:step_time_seconds_sum"])
    assert found["dougong:step_part_seconds_total{part=exchange}"] == pytest.approx(0.001)
    assert found["dougong:engine_cpu_seconds_total"] == pytest.approx(0.008)


def test_parts_belong_to_another_round_than_the_time_but_their_sums_agree(metrics: Metrics) -> None:
    """With overlap a record's launch was made one round earlier: a slow launch must not be counted twice."""
    metrics.step(counters(launch_s=0.002, step_s=0.109))  # launches the slow step
    metrics.step(counters(launch_s=0.102, step_s=0.010))  # takes it back
    metrics.step(counters(launch_s=0.002, step_s=0.010))
    found = samples(metrics)
    assert found["dougong:step_part_seconds_total{part=exchange}"] <= 0.129 - 0.021 - 0.002
    parts = [value for name, value in found.items() if name.startswith("dougong:step_part_seconds_total")]
    before = sum(parts)
    for _ in range(200):
        metrics.step(counters())
    found = samples(metrics)
    parts = [value for name, value in found.items() if name.startswith("dougong:step_part_seconds_total")]
    assert sum(parts) - before == pytest.approx(200 * 0.01, rel=0.05)


def test_counters_go_on_over_a_restart_of_the_engine(metrics: Metrics) -> None:
    metrics.step(counters(prefix_queries=100, prefix_hits=40))
    metrics.engine_died("killed")
    down = samples(metrics)
    assert down["dougong:engine_up"] == 0 and down["dougong:engine_restarts_total"] == 1
    assert down["vllm:num_requests_running"] == 0 and down["vllm:kv_cache_usage_perc"] == 0
    metrics.step(counters(prefix_queries=30, prefix_hits=10))
    found = samples(metrics)
    assert found["vllm:prefix_cache_queries_total"] == 130
    assert found["vllm:prefix_cache_hits_total"] == 50
    assert found["dougong:engine_up"] == 1


def test_a_request_that_never_ran_has_no_phases(metrics: Metrics) -> None:
    waiting = output(made=0, reason=FinishReason.ABORT)
    waiting.times = RequestTimes(monotonic() - 1)
    metrics.finished(waiting)
    found = samples(metrics)
    assert found["vllm:request_success_total{finished_reason=abort}"] == 1
    assert found["vllm:e2e_request_latency_seconds_count"] == 1
    assert found["vllm:request_queue_time_seconds_count"] == 0
    assert found["vllm:request_decode_time_seconds_count"] == 0


def test_every_sample_names_the_model(metrics: Metrics) -> None:
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        if family.name.startswith(("vllm:", "dougong:")):
            assert family.samples, family.name
            assert all(sample.labels["model_name"] == "tiny" for sample in family.samples)


def test_openmetrics_where_it_is_asked_for(metrics: Metrics) -> None:
    content, content_type = metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert content.endswith(b"# EOF\n")


def test_no_text_of_a_request_is_shown(metrics: Metrics) -> None:
    metrics.finished(output("chatcmpl-1234"))
    page = metrics.render()[0].decode()
    assert "secret" not in page and "1234" not in page


def test_the_handbook_lists_exactly_what_there_is(metrics: Metrics) -> None:
    families = text_string_to_metric_families(metrics.render()[0].decode())
    shown = {family.name for family in families if family.name.startswith(("vllm:", "dougong:"))}
    # Prometheus' parser takes `_total` off counters; the page names them as they are queried.
    listed = re.findall(r"^\| `((?:vllm|dougong):\w+)`", (DOCS / "metrics.md").read_text(encoding="utf-8"), re.M)
    plain = {name if name in shown else name.removesuffix("_total") for name in listed}
    assert plain == shown


@pytest.mark.parametrize(("value", "bucket"), [(0.5, 0), (1, 0), (1.0001, 1), (5, 1), (6, 2)])
def test_a_bound_belongs_to_its_bucket(value: float, bucket: int) -> None:
    histogram = Histogram((5, 1))
    histogram.observe(value, 3)
    assert histogram.counts[bucket] == 3 and histogram.count == 3
    assert histogram.buckets()[-1] == ("+Inf", 3.0)


def test_one_two_five() -> None:
    assert one_two_five(40) == [1, 2, 5, 10, 20]
    assert one_two_five(1) == [1]
