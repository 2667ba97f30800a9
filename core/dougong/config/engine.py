"""What a user may set on an engine, under the names known from vLLM where the meaning is equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dougong.errors import ConfigError

__all__ = ["EngineConfig"]

_DTYPES = ("auto", "bfloat16", "float16", "float32")
_KV_DTYPES = ("auto", "bfloat16", "float16", "float32", "int8", "fp8", "fp8_e4m3", "fp8_e5m2")
_POLICIES = ("fcfs", "priority")
_KV_ROLES = ("producer", "consumer", "both")
_LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")


def _refuse(name: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"{name}={value!r}: allowed is {allowed}.")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of one engine. None means: worked out from the model and the device.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    model: str = "smollm2-135m"
    """A local folder, a .gguf file, a hub id, or the alias ``smollm2-135m`` of the packaged model."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not beside the weights."""
    skip_tokenizer_init: bool = False
    """Prompts come as token ids and no text is made."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the tokenizer. Only for sources that you trust."""
    dtype: str = "auto"
    """auto (as the weights, where the device can), bfloat16, float16 or float32."""
    backend: str | None = None
    """None: ``DOUGONG_BACKEND``, or the best that this machine has."""
    device_index: int = 0
    """Which of the backend's devices; the first of several with tensor_parallel_size."""
    load_format: str = "auto"
    """``dummy``: random weights of the config's shapes."""
    quantization: str | None = None
    """``int8`` or ``int4`` weights, ``fp8`` weights and activations, or a plugin's format; None: as the files say."""
    kv_cache_dtype: str = "auto"
    """Data type of the KV cache; auto: the model's. int8 and fp8 hold about twice the tokens."""
    max_model_len: int | None = None
    """Longest prompt and answer together, in tokens; None: the model's own."""
    max_num_seqs: int = 256
    """Most requests that run at once; the others wait."""
    max_num_batched_tokens: int | None = None
    """Tokens computed in one step, over all requests; None: 2,048 on hosts and 8,192 where memory is ample."""
    long_prefill_token_threshold: int | None = None
    """Most tokens that one prompt takes of a step while others wait; None: no such bound."""
    block_size: int | None = None
    """Tokens per KV block; None: what the attention kernel likes best."""
    num_kv_blocks: int | None = None
    """Blocks in the pool; None: what fits into ``memory_utilization`` of the device."""
    memory_utilization: float = 0.9
    """Share of the device's memory that weights, activations and cache may take together."""
    kv_cache_memory: int | None = None
    """Bytes for the cache, in place of ``memory_utilization``."""
    enable_prefix_caching: bool = True
    """Keep the KV of prompts, so that a prompt that begins alike need not be computed again."""
    enable_chunked_prefill: bool = True
    """Compute long prompts over several steps, so that running requests need not wait for them."""
    scheduling_policy: str = "fcfs"
    """fcfs (in the order of arrival), priority, or a plugin's policy."""
    overlap: bool = True
    """Schedule step N+1 while step N runs. Results are the same."""
    enforce_eager: bool = False
    """Never capture device graphs."""
    graph_sizes: tuple[int, ...] | None = None
    """Batch sizes to capture; None: 1, 2, 4, 8 and then steps of 8 to 16, as many as the device holds."""
    warm_up: bool = True
    """Capture graphs and compile before the first request; otherwise when each is first needed."""
    tensor_parallel_size: int = 1
    """Devices over which each layer is split."""
    seed: int = 0
    """Seeds requests that bring none, and dummy weights."""
    attention_provider: str | None = None
    """Take only this provider's attention kernel (see ``dougong doctor``)."""
    kernel_providers: Mapping[str, str] = field(default_factory=dict)
    """The same for other ops, by op name: ``linear``, ``silu_mul``, …"""
    kv_connector: str | None = None
    """Give KV to other engines, or take it from them: ``shared_memory``, or the name of a plugin's connector."""
    kv_role: str | None = None
    """``producer`` (prefill), ``consumer`` (decode) or ``both``; goes with ``kv_connector``."""
    kv_connector_options: Mapping[str, Any] = field(default_factory=dict)
    """The connector's own options; see the handbook's page on KV transfer."""
    disable_log_stats: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise _refuse("model", self.model, "a folder, a .gguf file, a hub id or an alias")
        for name, values in (
            ("dtype", _DTYPES),
            ("kv_cache_dtype", _KV_DTYPES),
            ("scheduling_policy", None),
            ("load_format", _LOAD_FORMATS),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or (values is not None and value not in values):
                raise _refuse(name, value, "one of " + ", ".join(values or _POLICIES))
        for name, low in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("long_prefill_token_threshold", 1),
            ("block_size", 1),
            ("num_kv_blocks", 2),
            ("kv_cache_memory", 1),
            ("max_model_len", 1),
            ("tensor_parallel_size", 1),
            ("device_index", 0),
        ):
            value = getattr(self, name)
            if value is None and name not in ("max_num_seqs", "tensor_parallel_size", "device_index"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise _refuse(name, value, f"an integer >= {low}")
        use = self.memory_utilization
        if isinstance(use, bool) or not isinstance(use, (int, float)) or not 0 < use <= 1:
            raise _refuse("memory_utilization", use, "a number in (0, 1]")
        tokens = self.max_num_batched_tokens
        if tokens is not None and tokens < self.max_num_seqs and not self.enable_chunked_prefill:
            raise ConfigError(
                f"max_num_batched_tokens={tokens} is less than max_num_seqs={self.max_num_seqs}: each running request "
                "needs a token per step. Raise the first or lower the second."
            )
        if not isinstance(self.kernel_providers, Mapping):
            raise _refuse("kernel_providers", self.kernel_providers, "a mapping of op names to providers")
        if "attention" in self.kernel_providers:
            raise ConfigError(
                f"kernel_providers={dict(self.kernel_providers)!r}: attention has an option of its own. Use "
                f"attention_provider={self.kernel_providers['attention']!r}."
            )
        self._check_connector()
        if self.graph_sizes is not None and (not self.graph_sizes or min(self.graph_sizes) < 1):
            raise _refuse("graph_sizes", self.graph_sizes, "None or batch sizes >= 1")

    def _check_connector(self) -> None:
        if (self.kv_connector is None) != (self.kv_role is None):
            raise ConfigError(
                f"kv_connector={self.kv_connector!r} with kv_role={self.kv_role!r}: give both or neither. Roles are "
                f"{', '.join(_KV_ROLES)}."
            )
        if self.kv_connector is None:
            if self.kv_connector_options:
                raise ConfigError("kv_connector_options without kv_connector: name the connector, or leave them out.")
            return
        if self.kv_role not in _KV_ROLES:
            raise _refuse("kv_role", self.kv_role, "one of " + ", ".join(_KV_ROLES))
        if not isinstance(self.kv_connector_options, Mapping):
            raise _refuse("kv_connector_options", self.kv_connector_options, "a mapping of option names to values")
        if self.kv_role != "producer" and not self.enable_prefix_caching:
            raise ConfigError(
                f"kv_role={self.kv_role!r} with enable_prefix_caching=False: KV from other engines enters through the "
                "prefix cache. Turn it on."
            )
        if self.tensor_parallel_size > 1:
            raise ConfigError(
                f"kv_connector={self.kv_connector!r} with tensor_parallel_size={self.tensor_parallel_size}: ranks hold "
                "parts of the KV and cannot transfer them yet. Use tensor_parallel_size=1."
            )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The options' names, in order."""
        return tuple(one.name for one in fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for logs and ``--json``."""
        return {name: getattr(self, name) for name in self.names()}
