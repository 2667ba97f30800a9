"""Prometheus metrics: vLLM's names where the meaning is equal, ``dougong:`` for what only this engine has.

Everything is counted from the one message that the engine sends after each step and from each request's end, into plain
numbers; text is made when somebody asks. No token costs anything here.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from dougong.server.histogram import Histogram, one_two_five
from dougong.server.http_metrics import HttpCounts
from dougong.server.process.messages import EngineInfo, StepCounters
from dougong.server.process.observer import RequestObserver, RequestStart
from dougong.types import FinishReason, RequestOutput

if TYPE_CHECKING:
    from dougong.server.state import ServerState

__all__ = ["Metrics", "router"]

# vLLM's bounds, so that rules which name one of them go on working, and finer ones below for small models.
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_PER_TOKEN = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_REQUEST = (
    0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_STEP = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_LABELS = ("model_name", "engine")
#: Counters that the engine gives as totals since its own start.
_TOTALS = ("prefix_queries", "prefix_hits", "kv_stored_blocks", "kv_loaded_tokens", "kv_failures")


class Metrics(Collector, RequestObserver):
    """One model's figures since the server's start; an observer of the engine's client.

    Counters go on over a restart of the engine, whose own totals begin again.
    """

    def __init__(self, model_name: str, info: EngineInfo) -> None:
        self.model_name = model_name
        self.info = info
        self.http = HttpCounts()
        lengths = one_two_five(info.max_model_len)
        self.first_token_s = Histogram(_FIRST_TOKEN)
        self.between_tokens_s = Histogram(_PER_TOKEN)
        self.per_output_token_s = Histogram(_PER_TOKEN)
        self.whole_s = Histogram(_REQUEST)
        self.queue_s = Histogram(_REQUEST)
        self.prefill_s = Histogram(_REQUEST)
        self.decode_s = Histogram(_REQUEST)
        self.inference_s = Histogram(_REQUEST)
        self.request_prompt_tokens = Histogram(lengths)
        self.request_generation_tokens = Histogram(lengths)
        self.request_computed_tokens = Histogram(lengths)
        self.request_n = Histogram((1, 2, 5, 10, 20))
        self.request_max_tokens = Histogram(lengths)
        self.step_tokens = Histogram(_STEP_TOKENS)
        self.step_s = Histogram(_STEP)
        self.finished_by = dict.fromkeys((str(reason) for reason in FinishReason), 0)
        self.parts_s = {"schedule": 0.0, "launch": 0.0, "wait": 0.0, "commit": 0.0, "exchange": 0.0}
        self.prompt_tokens = self.cached_tokens = self.generation_tokens = 0
        self.preemptions = 0
        self.restarts = 0
        self.cpu_s = 0.0
        self.running = self.waiting = 0
        self.kv_usage = 0.0
        self.up = True
        self.totals = dict.fromkeys(_TOTALS, 0)
        self._told = dict.fromkeys(_TOTALS, 0)  # the engine's own totals, as last told
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    # -- as an observer ----------------------------------------------------------------------------------

    def started(self, request: RequestStart) -> None:
        self.request_n.observe(request.params.n)
        if request.params.max_tokens is not None:
            self.request_max_tokens.observe(request.params.max_tokens)

    def first_token(self, output: RequestOutput) -> None:
        times = output.times
        self.prompt_tokens += len(output.prompt_token_ids)
        if times.first_token is not None and times.arrival is not None:
            self.first_token_s.observe(times.first_token - times.arrival)

    def finished(self, output: RequestOutput) -> None:
        for completion in output.outputs:
            reason = str(completion.finish_reason)
            self.finished_by[reason] = self.finished_by.get(reason, 0) + 1
            self.request_generation_tokens.observe(len(completion.token_ids))
        prompt, times = len(output.prompt_token_ids), output.times
        self.cached_tokens += output.num_cached_tokens
        self.request_prompt_tokens.observe(prompt)
        if times.arrival is None:
            return
        self.whole_s.observe(monotonic() - times.arrival)
        if times.first_scheduled is None:
            return
        self.queue_s.observe(times.first_scheduled - times.arrival)
        if times.first_token is None or times.last_token is None:
            return
        self.request_computed_tokens.observe(prompt - output.num_cached_tokens)
        self.prefill_s.observe(times.first_token - times.first_scheduled)
        decode = times.last_token - times.first_token
        self.decode_s.observe(decode)
        self.inference_s.observe(times.last_token - times.first_scheduled)
        longest = max(len(completion.token_ids) for completion in output.outputs)
        if longest > 1:
            self.per_output_token_s.observe(decode / (longest - 1))

    def step(self, counters: StepCounters) -> None:
        self.up = True
        self.running, self.waiting, self.kv_usage = counters.running, counters.waiting, counters.kv_usage
        self.generation_tokens += counters.generated_tokens
        self.preemptions += counters.preemptions
        for name in _TOTALS:
            total: int = getattr(counters, name)
            self.totals[name] += _since(total, self._told[name])
            self._told[name] = total
        self.cpu_s += counters.cpu_s
        parts = self.parts_s
        parts["schedule"] += counters.schedule_s
        parts["launch"] += counters.launch_s
        parts["wait"] += counters.wait_s
        parts["commit"] += counters.commit_s
        self.step_s.observe(counters.step_s)
        # A round launches one step and takes back the one before: only the sums of rounds and parts belong together.
        known = parts["schedule"] + parts["launch"] + parts["wait"] + parts["commit"]
        parts["exchange"] = max(parts["exchange"], self.step_s.sum - known)
        if counters.num_tokens:
            self.step_tokens.observe(counters.num_tokens)
        if counters.num_decode_rows:
            # A row that decodes had its last token in the round before: the round's length lies between the two.
            self.between_tokens_s.observe(counters.step_s, counters.num_decode_rows)

    def engine_died(self, cause: str) -> None:
        self.restarts += 1
        self.up = False
        self.running = self.waiting = 0
        self.kv_usage = 0.0
        self._told = dict.fromkeys(_TOTALS, 0)

    # -- as a collector ----------------------------------------------------------------------------------

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not look before anything was counted."""
        return []

    def collect(self) -> Iterator[Metric]:
        totals = self.totals
        yield self._gauge("vllm:num_requests_running", "Requests in the running batch.", self.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for room.", self.waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "Share of the KV blocks that requests hold, 0 to 1.", self.kv_usage
        )
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens of requests that gave a token, cached too.", self.prompt_tokens),
            ("vllm:prompt_tokens_cached", "Of these, found in the prefix cache.", self.cached_tokens),
            ("vllm:generation_tokens", "Tokens generated.", self.generation_tokens),
            ("vllm:num_preemptions", "Requests put back to wait because the KV pool was full.", self.preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", totals["prefix_queries"]),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", totals["prefix_hits"]),
            ("dougong:kv_transfer_stored_blocks", "KV blocks given to the connector.", totals["kv_stored_blocks"]),
            ("dougong:kv_transfer_loaded_tokens", "Prompt tokens whose KV came from it.", totals["kv_loaded_tokens"]),
            ("dougong:kv_transfer_failures", "Promises of KV that were not kept, blocks lost or refused on the way.",
             totals["kv_failures"]),
            ("dougong:engine_restarts", "Times the engine's process ended unasked.", self.restarts),
            ("dougong:engine_cpu_seconds", "Processor time of the engine's process, in steps.", self.cpu_s),
        ):  # fmt: skip
            yield self._counter(name, text, value)
        success = CounterMetricFamily(
            "vllm:request_success", "Completions that ended, by reason.", labels=(*_LABELS, "finished_reason")
        )
        for reason, count in self.finished_by.items():
            success.add_metric((*self._values, reason), count)
        yield success
        for name, text, histogram in (
            ("vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", self.first_token_s),
            ("vllm:inter_token_latency_seconds", "Between two tokens of a request.", self.between_tokens_s),
            ("vllm:request_time_per_output_token_seconds", "A request's mean time per token after the first.",
             self.per_output_token_s),
            ("vllm:e2e_request_latency_seconds", "From a request's arrival to its end.", self.whole_s),
            ("vllm:request_queue_time_seconds", "From a request's arrival to its first step.", self.queue_s),
            ("vllm:request_prefill_time_seconds", "From a request's first step to its first token.", self.prefill_s),
            ("vllm:request_decode_time_seconds", "From a request's first token to its last.", self.decode_s),
            ("vllm:request_inference_time_seconds", "From a request's first step to its last token.", self.inference_s),
            ("vllm:request_prompt_tokens", "Prompt tokens of a request.", self.request_prompt_tokens),
            ("vllm:request_generation_tokens", "Tokens of a completion.", self.request_generation_tokens),
            ("vllm:request_prefill_kv_computed_tokens", "Prompt tokens that were not in the prefix cache.",
             self.request_computed_tokens),
            ("vllm:request_params_n", "The n of requests.", self.request_n),
            ("vllm:request_params_max_tokens", "The max_tokens of requests.", self.request_max_tokens),
            ("vllm:iteration_tokens_total", "Tokens computed in a step.", self.step_tokens),
            ("dougong:step_time_seconds", "Wall time of one round of the engine's loop.", self.step_s),
        ):  # fmt: skip
            yield self._histogram(name, text, histogram)
        parts = CounterMetricFamily(
            "dougong:step_part_seconds",
            "Wall time of the engine's rounds by part; all but 'wait' is the host's share.",
            labels=(*_LABELS, "part"),
        )
        for part, seconds in self.parts_s.items():
            parts.add_metric((*self._values, part), seconds)
        yield parts
        yield self._gauge("dougong:engine_up", "1 while the engine's process answers.", float(self.up))
        yield self._gauge("dougong:kv_blocks", "KV blocks that requests can hold.", self.info.usable_blocks)
        about = {"version": self.info.version, "backend": self.info.backend, "device": self.info.device,
                 "dtype": self.info.dtype}  # fmt: skip
        built = GaugeMetricFamily("dougong:info", "What serves the model.", labels=(*_LABELS, *about))
        built.add_metric((*self._values, *about.values()), 1)
        yield built
        yield from self.http.collect()

    @property
    def _values(self) -> tuple[str, str]:
        return (self.model_name, "0")

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, text, labels=_LABELS)
        family.add_metric(self._values, buckets=histogram.buckets(), sum_value=histogram.sum)
        return family

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type: Prometheus' text, or OpenMetrics where ``accept`` asks for it."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


def _since(total: int, before: int) -> int:
    """How much a total grew; all of it where it began again."""
    return total - before if total >= before else total


def router(state: ServerState) -> APIRouter:
    """``GET /metrics``."""
    routes = APIRouter()

    @routes.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        content, content_type = state.metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    return routes
