"""Everything that can be set on a server, and where a value comes from: defaults < YAML file < environment < command
line. Every option of the engine is one of the server's too."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from dougong.config import EngineConfig
from dougong.errors import ConfigError
from dougong.server.other_names import OTHER_NAMES, translated

__all__ = ["ENGINE_ONLY", "OptionType", "ServerConfig", "option_types", "resolve_config"]

#: Engine options that make no sense on a server.
ENGINE_ONLY = frozenset({"skip_tokenizer_init", "disable_log_stats"})
#: What an environment variable's name begins with.
_PREFIX = "DOUGONG_"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Options of one server. ``None`` means: no limit, or worked out.

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    uds: str | None = None
    """Path of a Unix socket to listen on, in place of host and port."""
    root_path: str = ""
    """Path under which a proxy serves this server."""
    served_model_name: tuple[str, ...] = ()
    """Names under which clients may ask for the model, the first one shown; none: the model's own."""
    chat_template: str | None = None
    """File with a chat template (jinja) in place of the model's own."""
    trust_request_chat_template: bool = False
    """Let requests bring chat templates. A template is a program: only for clients that you trust."""
    tool_call_parser: str | None = None
    """How the model writes tool calls (hermes, llama3, mistral; none: no parser); unset: by its chat template."""
    reasoning_parser: str | None = None
    """How the model marks its thinking (think, think-inside, magistral; none: never); unset: by its chat template."""
    generation_config: str = "auto"
    """auto: defaults of sampling are those of the model's generation_config.json; none: they are not."""
    unknown_fields: str = "refuse"
    """What to do with fields of a request that no API names: refuse or ignore."""
    api_key: tuple[str, ...] = ()
    """Keys that clients must show, besides those of api_keys_file; better in DOUGONG_API_KEY than here."""
    api_keys_file: str | None = None
    """File with the hashes of the keys that clients must show (`dougong keys`)."""
    rate_limit_requests: int | None = None
    """Requests per minute for each key, or each address where no key is asked for."""
    rate_limit_tokens: int | None = None
    """Tokens per minute for each key, prompts and answers together."""
    max_queue: int = 2048
    """Completions that may wait beyond the max_num_seqs that run; more are answered with 429."""
    max_body_bytes: int = 16 * 1024 * 1024
    """Largest body of a request, in bytes."""
    head_timeout_s: float = 30.0
    """Seconds in which a request's head must have come in, on a new connection and on one that is kept."""
    body_timeout_s: float = 30.0
    """Seconds in which a request's body must have come in."""
    write_timeout_s: float = 120.0
    """Seconds in which a client must take some of an answer that lies ready for it; it is cut off otherwise."""
    request_timeout_s: float | None = None
    """Seconds a request may take from its arrival to its end."""
    max_choices: int = 128
    """Largest n and best_of of a request."""
    max_logprobs: int = 20
    """Most log-probabilities per token that a request may ask for."""
    max_prompts: int = 1024
    """Most prompts in one request to /v1/completions and /v1/embeddings."""
    max_stop: int = 64
    """Most stop strings of a request."""
    keep_alive_s: int = 65
    """Seconds that an idle connection is kept."""
    drain_s: float = 30.0
    """Seconds that running requests may take to finish after SIGTERM; a second signal ends at once."""
    tls_cert: str | None = None
    """File with the server's certificate chain (PEM): serve HTTPS."""
    tls_key: str | None = None
    """File with the certificate's private key (PEM)."""
    tls_client_ca: str | None = None
    """File with the authorities whose client certificates are asked for (PEM)."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the server; * for all."""
    web: bool = True
    """Serve the page at / (a playground and a live view of the engine)."""
    docs: bool = True
    """Serve the API's description at /docs and /openapi.json."""
    metrics: bool = True
    """Serve Prometheus metrics at /metrics."""
    log_format: str = "text"
    """text, or json for one object a line."""
    log_level: str = "info"
    """debug, info, warning or error."""
    log_requests: bool = True
    """Write a line for each finished request: its id, tokens and times, never its text."""
    log_prompts: bool = False
    """Write prompts and answers too. They are your users' data."""
    access_log: bool = False
    """Write a line for each HTTP request."""
    otlp_traces_endpoint: str | None = None
    """Where to send OpenTelemetry traces (needs the extra dougong[otel])."""

    def __post_init__(self) -> None:
        for name, low, high in (("port", 0, 65535), ("max_queue", 0, None), ("max_body_bytes", 1024, None),
                                ("max_choices", 1, None), ("max_logprobs", 0, None), ("max_prompts", 1, None),
                                ("max_stop", 0, None), ("keep_alive_s", 0, None), ("drain_s", 0, None),
                                ("rate_limit_requests", 1, None), ("rate_limit_tokens", 1, None)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                allowed = f"a number >= {low}" if high is None else f"{low} to {high}"
                raise ConfigError(f"{name}={value!r}: allowed is {allowed}.")
        for name in ("head_timeout_s", "body_timeout_s", "write_timeout_s", "request_timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value!r}: allowed is a number of seconds above 0.")
        for name, values in (
            ("generation_config", ("auto", "none")),
            ("unknown_fields", ("refuse", "ignore")),
            ("log_format", ("text", "json")),
            ("log_level", ("debug", "info", "warning", "error")),
        ):
            if getattr(self, name) not in values:
                raise ConfigError(f"{name}={getattr(self, name)!r}: allowed is {' or '.join(values)}.")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together: give both or neither.")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError("tls_client_ca asks clients for certificates over TLS: give tls_cert and tls_key too.")
        for name in ("tls_cert", "tls_key", "tls_client_ca", "chat_template"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name}={path!r}: there is no such file.")
        if "" in self.served_model_name or "" in self.api_key:
            raise ConfigError("served_model_name and api_key take no empty strings.")

    @property
    def model_names(self) -> tuple[str, ...]:
        """What clients may call the model; the first is shown."""
        return self.served_model_name or (self.engine.model,)

    @property
    def wants_keys(self) -> bool:
        return bool(self.api_key) or self.api_keys_file is not None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The server's own options, in order."""
        return tuple(one.name for one in fields(cls) if one.name != "engine")


@dataclass(frozen=True)
class OptionType:
    """How an option's text is read: ``kind`` is str, int, float, bool, tuple or dict; ``item`` is a tuple's."""

    kind: type
    item: type = str
    optional: bool = False
    default: Any = None


def option_types() -> dict[str, OptionType]:
    """Every option by name, the server's own first."""
    found: dict[str, OptionType] = {}
    for cls, left_out in ((ServerConfig, {"engine"}), (EngineConfig, ENGINE_ONLY)):
        hints = get_type_hints(cls)
        for one in fields(cls):
            if one.name in left_out:
                continue
            default = one.default
            if one.default_factory is not MISSING:
                default = one.default_factory()
            found[one.name] = _option_type(hints[one.name], default)
    return found


def _option_type(hint: Any, default: Any) -> OptionType:
    parts = [part for part in get_args(hint) if part is not type(None)]
    optional = type(None) in get_args(hint)
    base = parts[0] if optional else hint
    origin = get_origin(base)
    if origin is tuple:
        return OptionType(tuple, get_args(base)[0], optional, default)
    if origin is not None:
        return OptionType(dict, str, optional, default)
    return OptionType(base if base in (int, float, bool) else str, str, optional, default)


def resolve_config(
    command_line: Mapping[str, Any], *, file: str | Path | None = None, environ: Mapping[str, str] | None = None
) -> ServerConfig:
    """The server's options from all places.

    Args:
        command_line: those given there, by name; values as text or already of their type.
        file: YAML, a mapping of option names to values.
        environ: ``DOUGONG_PORT`` and so on; None takes the process's own.

    Raises:
        ConfigError: an unknown option (the nearest known name is suggested), or a value that cannot be; says where it
            came from.
    """
    types = option_types()
    given: dict[str, Any] = {}
    if file is not None:
        given |= _from_file(Path(file), types)
    variables = {
        name.removeprefix(_PREFIX).lower(): text
        for name, text in (os.environ if environ is None else environ).items()
        if name.startswith(_PREFIX) and text != ""
    }  # others with the prefix are not the server's
    known = {name: text for name, text in sorted(variables.items()) if name in types or name in OTHER_NAMES}
    given |= _read(known, types, lambda name: f"environment variable {_PREFIX}{name.upper()}")
    there = {name: value for name, value in command_line.items() if value is not None}
    given |= _read(there, types, lambda _: "the command line")
    own = {name: value for name, value in given.items() if name in ServerConfig.names()}
    engine = {name: value for name, value in given.items() if name not in own}
    return ServerConfig(engine=EngineConfig(**engine), **own)


def _from_file(path: Path, types: Mapping[str, OptionType]) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"config file {path}: expected a mapping of options to values, found {type(content).__name__}."
        )
    named = {str(key).replace("-", "_"): value for key, value in content.items()}
    # `option:` with nothing behind it: the default
    there = {name: value for name, value in named.items() if value is not None or name not in types}
    return _read(there, types, lambda _: f"config file {path}")


def _read(
    options: Mapping[str, Any], types: Mapping[str, OptionType], source_of: Callable[[str], str]
) -> dict[str, Any]:
    """One place's options under their own names, of their types.

    Raises:
        ConfigError: as `read_option`; or one is given twice, by both of its names.
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        source = source_of(name)
        own = translated(name, value, source)
        if own is None:
            continue
        if own[0] in found:
            raise ConfigError(f"{source}: {own[0]} is given twice (as {name} too). Leave one out.")
        found[own[0]] = read_option(*own, types, source)
    return found


def read_option(name: str, value: Any, types: Mapping[str, OptionType], source: str) -> Any:
    """A value of the option's type.

    Raises:
        ConfigError: unknown option, or not of its type.
    """
    if name not in types:
        near = difflib.get_close_matches(name, types, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{source}: unknown option {name!r}.{hint} `dougong serve --help` lists all.")
    kind = types[name]
    try:
        return _convert(value, kind)
    except (TypeError, ValueError):
        word = {str: "text", int: "an integer", float: "a number", bool: "true or false"}.get(
            kind.kind, "a list" if kind.kind is tuple else "a mapping (JSON)"
        )
        raise ConfigError(f"{source}: {name}={value!r}: expected {word}.") from None


def _convert(value: Any, kind: OptionType) -> Any:
    if isinstance(value, str) and kind.optional and value.lower() in ("none", "null"):
        return None
    if kind.kind is tuple:
        if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], str):
            # As the command line has it. Texts are not taken apart: a name may have a comma.
            value = value[0] if value[0].startswith("[") or kind.item is not str else value
        if isinstance(value, str):
            value = json.loads(value) if value.startswith("[") else value.split(",")
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_scalar(item.strip() if isinstance(item, str) else item, kind.item) for item in items)
    if kind.kind is dict:
        found = json.loads(value) if isinstance(value, str) else value
        if not isinstance(found, dict):
            raise TypeError
        return found
    return _scalar(value, kind.kind)


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        words = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ValueError
    if isinstance(value, (dict, list)) or (kind is not str and isinstance(value, bool)):
        raise TypeError
    if kind is int and isinstance(value, float):
        raise TypeError
    return kind(value)
