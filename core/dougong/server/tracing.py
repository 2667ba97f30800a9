"""OpenTelemetry spans of requests: one for the request, under the caller's if it sent ``traceparent``, and one each for
its time in the queue, its prefill and its decoding.

Spans are made when a request is over, from the times it noted: nothing is paid while it runs. Attribute names are those
of OpenTelemetry's conventions for generative AI where they have one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic, time_ns
from typing import TYPE_CHECKING, Any

from dougong.errors import ConfigError
from dougong.server.process.observer import RequestObserver, RequestStart
from dougong.types import RequestOutput

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = ["Tracing"]


class Tracing(RequestObserver):
    """An observer that exports spans over OTLP (HTTP, protobuf).

    Args:
        endpoint: the collector's traces URL, e.g. ``http://localhost:4318/v1/traces``; None: the standard variables
            ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` and ``OTEL_EXPORTER_OTLP_ENDPOINT``. Sampling, headers and time
            limits are OpenTelemetry's own variables too.
        exporter: in place of OTLP, for tests.

    Raises:
        ConfigError: the extra ``otel`` is not installed.
    """

    def __init__(
        self,
        endpoint: str | None,
        model_name: str,
        *,
        service_name: str = "dougong",
        exporter: SpanExporter | None = None,
    ) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=endpoint)
        except ImportError as error:
            raise ConfigError(
                f"tracing needs OpenTelemetry's SDK and its OTLP exporter ({error}): pip install 'dougong[otel]', or "
                "leave --otlp-traces-endpoint out."
            ) from error
        resource = Resource.create()  # with what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": service_name}))
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("dougong.server")
        self._propagator = TraceContextTextMapPropagator()
        self._server_kind = SpanKind.SERVER
        self._failed: Callable[[str], Status] = lambda text: Status(StatusCode.ERROR, text)
        self._under = set_span_in_context
        self._model_name = model_name
        self._open: dict[str, RequestStart] = {}

    def started(self, request: RequestStart) -> None:
        self._open[request.request_id] = request

    def finished(self, output: RequestOutput) -> None:
        request = self._open.pop(output.request_id, None)
        times = output.times
        if times.arrival is None:
            return
        to_epoch = time_ns() - int(1e9 * monotonic())

        def at(seconds: float) -> int:
            return to_epoch + int(1e9 * seconds)

        span = self._tracer.start_span(
            "llm_request",
            context=self._propagator.extract(_lower(request.trace if request is not None else None)),
            kind=self._server_kind,
            start_time=at(times.arrival),
            attributes=self._attributes(request, output),
        )
        errors = [completion.error for completion in output.outputs if completion.error]
        if errors:
            span.set_status(self._failed(errors[0]))
        inner = self._under(span)
        for name, start, end in (
            ("queue", times.arrival, times.first_scheduled),
            ("prefill", times.first_scheduled, times.first_token),
            ("decode", times.first_token, times.last_token),
        ):
            if start is not None and end is not None:
                self._tracer.start_span(name, context=inner, start_time=at(start)).end(at(end))
        span.end(time_ns())

    def close(self) -> None:
        """Send what is left. May block for some seconds."""
        self._provider.shutdown()

    def _attributes(self, request: RequestStart | None, output: RequestOutput) -> dict[str, Any]:
        times = output.times
        found: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.id": output.request_id,
            "gen_ai.response.finish_reasons": [str(completion.finish_reason) for completion in output.outputs],
            "gen_ai.usage.input_tokens": len(output.prompt_token_ids),
            "gen_ai.usage.output_tokens": sum(len(completion.token_ids) for completion in output.outputs),
            "dougong.usage.cached_tokens": output.num_cached_tokens,
        }
        if times.arrival is not None and times.first_token is not None:
            found["dougong.latency.first_token_s"] = times.first_token - times.arrival
        if request is not None:
            params = request.params
            found |= {
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
                "gen_ai.request.choice.count": params.n,
            }
            if params.max_tokens is not None:
                found["gen_ai.request.max_tokens"] = params.max_tokens
        return found


def _lower(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Header names as the propagator looks them up."""
    return {name.lower(): value for name, value in (headers or {}).items()}
