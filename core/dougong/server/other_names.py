"""The options of ``vllm serve`` as this server takes them, so that a command line that stands goes on working.

A name is understood where it means what an option here means; one that asks for what is so anyway is taken without a
word; of any other it is said what stands in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dougong.errors import ConfigError

__all__ = ["OTHER_NAMES", "SHORT_FLAGS", "OtherName", "flag_of", "translated"]


@dataclass(frozen=True)
class OtherName:
    """One of vLLM's options.

    ours      the option here that means the same; of an ``opposite`` switch, what it turns off
    accepted  where there is none: the values that ask for what is so here
    instead   what to do about any other
    switch    it takes no value on the command line
    """

    ours: str | None = None
    opposite: bool = False
    accepted: tuple[str, ...] = ()
    instead: str = ""
    switch: bool = False


def _same(ours: str, *, switch: bool = False) -> OtherName:
    return OtherName(ours, switch=switch)


def _off(ours: str) -> OtherName:
    return OtherName(ours, opposite=True, switch=True)


def _so(accepted: str, instead: str) -> OtherName:
    return OtherName(accepted=tuple(accepted.split()), instead=instead)


def _on(instead: str) -> OtherName:
    """A switch for what is always so."""
    return OtherName(accepted=_ON, instead=instead, switch=True)


def _no(instead: str, *, switch: bool = False) -> OtherName:
    return OtherName(accepted=_OFF if switch else (), instead=instead, switch=switch)


_ON, _OFF = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_ONE = "one device, or several with --tensor-parallel-size, is what one server runs on; put a balancer before several"
_SETTING = "the model's files say it: change config.json beside the weights"
_ADAPTERS = "adapters are not served: merge them into the weights"

OTHER_NAMES: Mapping[str, OtherName] = {
    # the engine
    "gpu_memory_utilization": _same("memory_utilization"),
    "kv_cache_memory_bytes": _same("kv_cache_memory"),
    "num_gpu_blocks_override": _same("num_kv_blocks"),
    "cudagraph_capture_sizes": _same("graph_sizes"),
    "async_scheduling": _same("overlap", switch=True),
    "tokenizer_revision": _no("--revision is the model's and the tokenizer's"),
    "tokenizer_mode": _so("auto hf", "the tokenizer is the one in the model's files; name another with --tokenizer"),
    "runner": _so("auto generate pooling", "completions and embeddings are served at once"),
    "task": _so("auto generate embed embedding", "completions and embeddings are served at once"),
    "convert": _so("auto none embed", "vectors come from /v1/embeddings; classes and scores are not served"),
    "model_impl": _so("auto", "a family's own code runs it, transformers' where there is none"),
    "distributed_executor_backend": _so("mp", "ranks are processes of this machine; see the plugin dougong-ray"),
    "pipeline_parallel_size": _so("1", _ONE),
    "data_parallel_size": _so("1", _ONE),
    "decode_context_parallel_size": _so("1", _ONE),
    "prefill_context_parallel_size": _so("1", _ONE),
    "enable_expert_parallel": _no("experts are split as all layers are, by --tensor-parallel-size", switch=True),
    "attention_backend": _no("--attention-provider names one; `dougong doctor` lists them"),
    "compilation_config": _no("--enforce-eager, --graph-sizes and --warm-up are what there is to set"),
    "speculative_config": _no("there is no speculative decoding"),
    "kv_transfer_config": _no("--kv-connector, --kv-role and --kv-connector-options take its parts"),
    "swap_space": _so("0", "preempted requests are computed again, nothing is swapped"),
    "cpu_offload_gb": _so("0", "weights stay on the device: use --quantization int8 or int4"),
    "calculate_kv_scales": _no("scales are the checkpoint's, or worked out as KV is stored", switch=True),
    "prefix_caching_hash_algo": _no("blocks are named by one keyed hash, with nothing to choose"),
    "num_scheduler_steps": _so("1", "a step is one step; --overlap schedules the next one meanwhile"),
    "enable_lora": _no(_ADAPTERS, switch=True),
    "lora_modules": _no(_ADAPTERS),
    "hf_overrides": _no(_SETTING),
    "rope_scaling": _no(_SETTING),
    "rope_theta": _no(_SETTING),
    "hf_config_path": _no(_SETTING),
    "hf_token": _no("set HF_TOKEN in the environment"),
    "download_dir": _no("set HF_HOME in the environment"),
    "limit_mm_per_prompt": _no("models read text only"),
    "enable_sleep_mode": _no("end the server, and start it again", switch=True),
    "disable_log_stats": _off("metrics"),
    # the server
    "enable_auto_tool_choice": _on("--tool-call-parser none turns tool calls off"),
    "enable_reasoning": _on("--reasoning-parser none leaves thinking in the text"),
    "enable_request_id_headers": _on("every answer has x-request-id"),
    "enable_prompt_tokens_details": _on("usage always tells the cached tokens"),
    "enable_force_include_usage": _no("a stream has it with stream_options.include_usage", switch=True),
    "tool_parser_plugin": _no("--tool-call-parser names one of those that are there"),
    "guided_decoding_backend": _so("auto guidance", "llguidance does it"),
    "structured_outputs_config": _no("llguidance does it, with nothing to set"),
    "override_generation_config": _no("clients say it in each request; --generation-config none drops the model's own"),
    "chat_template_content_format": _so("auto", "the form is what the template reads"),
    "response_role": _so("assistant", "answers are the assistant's"),
    "ssl_certfile": _same("tls_cert"),
    "ssl_keyfile": _same("tls_key"),
    "ssl_ca_certs": _no("--tls-client-ca names it, and clients must then show a certificate"),
    "ssl_cert_reqs": _so("0", "--tls-client-ca FILE is what 2 means"),
    "allowed_origins": _same("cors_origins"),
    "allowed_methods": _no("pages named by --cors-origins may use every method there is"),
    "allowed_headers": _no("pages named by --cors-origins may send every header"),
    "uvicorn_log_level": _same("log_level"),
    "disable_uvicorn_access_log": _off("access_log"),
    "enable_log_requests": _same("log_requests", switch=True),
    "disable_log_requests": _off("log_requests"),
    "enable_log_outputs": _no("--log-prompts writes prompts and answers", switch=True),
    "max_log_len": _no("--log-prompts writes whole prompts; without it none is written"),
    "disable_fastapi_docs": _off("docs"),
    "h11_max_incomplete_event_size": _no("--head-timeout-s and --max-body-bytes bound what comes in"),
    "disable_frontend_multiprocessing": _no("the engine always has a process of its own", switch=True),
    "api_server_count": _so("1", "one process speaks HTTP"),
    "headless": _no("a server runs on one machine", switch=True),
}
#: vLLM's words for values that have another word here, by option of this server.
_WORDS: Mapping[str, Mapping[str, str]] = {
    "dtype": {"half": "float16", "float": "float32"},
    "generation_config": {"vllm": "none"},
    "kv_role": {"kv_producer": "producer", "kv_consumer": "consumer", "kv_both": "both"},
    "reasoning_parser": {"qwen3": "think", "deepseek_v3": "think", "deepseek_r1": "think-inside",
                         "mistral": "magistral"},
    "tool_call_parser": {"llama3_json": "llama3"},
}  # fmt: skip
SHORT_FLAGS: Mapping[str, str] = {"tensor_parallel_size": "-tp", "quantization": "-q"}


def flag_of(name: str) -> str:
    """An option as it is written on the command line."""
    return "--" + name.replace("_", "-")


def translated(name: str, value: Any, source: str) -> tuple[str, Any] | None:
    """An option under the name and with the value that it has here; None where there is nothing to set.

    Names and values of this server's own come back as they are, and so do unknown ones.

    Raises:
        ConfigError: it is one of vLLM's that means nothing here; says what does.
    """
    other = OTHER_NAMES.get(name)
    if other is not None and other.ours is None:
        if str(value).lower() in other.accepted:
            return None
        shown = flag_of(name) if other.switch else f"{flag_of(name)} {value}"
        raise ConfigError(f"{source}: {shown} is an option of vLLM's, not of this server: {other.instead}.")
    if other is not None and other.ours is not None:
        name = other.ours
        if other.opposite:
            value = _negated(value)
    words = _WORDS.get(name)
    if words is not None and isinstance(value, str):
        value = words.get(value, value)
    return name, value


def _negated(value: Any) -> Any:
    """A switch the other way round; what is none is left for its reader to refuse."""
    text = str(value).lower()
    return False if text in _ON else True if text in _OFF else value
