"""From an engine's options to a model on its device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dougong.config import EngineConfig
from dougong.errors import ConfigError, DougongError, ModelLoadError, UnsupportedModelError
from dougong.hal import Backend, Collectives, Device, MemoryInfo, dtype_name
from dougong.hal.device import is_out_of_memory
from dougong.models.base import CausalLM
from dougong.models.build import Builder
from dougong.models.config import ModelConfig, torch_dtype
from dougong.models.loading.cache import is_unpacked
from dougong.models.loading.dummy import DummyWeights
from dougong.models.loading.gguf_names import COMPLETE_CONFIGS
from dougong.models.loading.headless import named_as_with_head, without_head
from dougong.models.loading.plain_config import plain_config
from dougong.models.loading.safetensors import SafetensorsWeights, find_safetensors
from dougong.models.loading.source import ModelFiles, resolve_model
from dougong.models.quantization import WeightFormat, find_format
from dougong.models.registry import find_model
from dougong.models.weights import WeightSource
from dougong.plugins import Plugins

__all__ = ["LoadedModel", "load_model", "read_config"]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. ``path`` is the folder the weights were loaded from, readable by transformers; ``max_len``
    the longest sequence."""

    model: CausalLM
    config: ModelConfig
    path: Path
    dtype: torch.dtype
    kv_dtype: torch.dtype
    max_len: int


def load_model(
    options: EngineConfig,
    backend: Backend,
    *,
    plugins: Plugins | None = None,
    collectives: Collectives | None = None,
) -> LoadedModel:
    """Find, build and fill the model that ``options`` name, this rank's share of it.

    Raises:
        ModelLoadError: files are missing, corrupt, or do not match one another; or the weights do not fit.
        UnsupportedModelError: the architecture is refused, with the reason.
        ConfigError: an option does not fit the model or the device.
        KernelSelectionError: no kernel for a product it needs.
    """
    plugins = backend.plugins if plugins is None else plugins
    dummy = options.load_format == "dummy"
    weight_format = find_format(options.quantization, plugins)
    files = resolve_model(options.model, revision=options.revision, weights=not dummy)
    config = read_config(files.folder, trust_remote_code=options.trust_remote_code)
    if files.gguf is None and not dummy:
        config = without_head(config, files.folder)
    dtype = _dtype(options.dtype, config, backend)
    kv_dtype = _kv_dtype(options.kv_cache_dtype, dtype, backend.device)
    max_len = _max_len(options.max_model_len, config)
    model_type = find_model(config, plugins)
    build = Builder(
        config,
        backend,
        dtype=dtype,
        kv_dtype=kv_dtype,
        weight_format=weight_format,
        collectives=collectives,
        max_len=max_len,
        providers=options.kernel_providers,
    )
    source = _source(options, files, weight_format, build)
    before = backend.device.memory()
    try:
        with torch.inference_mode():
            model = model_type(build)
            try:
                model.load(source)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise ModelLoadError(_too_large(model, options, build, before)) from error
    finally:
        source.close()
    model.eval()
    return LoadedModel(model, config, files.folder, dtype, kv_dtype, max_len)


def _too_large(model: CausalLM, options: EngineConfig, build: Builder, before: MemoryInfo) -> str:
    """What weights that did not fit take, what was free before, and what would fit."""
    count = sum(prod(spec.shape) for part in model.parts() for spec in part.weights())
    room, whole = before.free, count * build.dtype.itemsize
    text = (
        f"the weights do not fit in the memory of {build.backend.device.name}: {count:,} parameters "
        f"take {_gib(whole / build.size)} in {dtype_name(build.dtype)}"
        f"{f' on each of {build.size} devices' if build.size > 1 else ''}, and {_gib(room)} of {_gib(before.total)} "
        "were free"
    )
    ways = []
    for name, share in (("int8", 1 / 2), ("int4", 0.3)):
        size = count * 2 * share / build.size
        if options.quantization is None and size < 0.9 * room:
            ways.append(f"quantization={name!r} takes about {_gib(size)}")
    ranks = build.size
    while ranks < 64 and whole / ranks > 0.9 * room:
        ranks *= 2
    if build.size < ranks and whole / ranks <= 0.9 * room:
        ways.append(f"tensor_parallel_size={ranks} puts {_gib(whole / ranks)} on each device")
    return f"{text}. {'; '.join(ways) or 'Free memory on the device, or take a smaller model'}."


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def read_config(folder: Path, *, trust_remote_code: bool = False) -> ModelConfig:
    """The config of a model's folder.

    Raises:
        ModelLoadError: there is none, or it cannot be read.
        UnsupportedModelError: transformers does not know its model type.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}.") from error
    if not isinstance(content, dict) or not content.get("model_type"):
        raise ModelLoadError(f"{path} names no model_type; it is not a transformers config.")
    plain = plain_config(content)
    if is_unpacked(folder) and content["model_type"] in COMPLETE_CONFIGS:
        plain = SimpleNamespace(**content)  # written by this package with every field that counts
    if plain is not None:
        return _view(plain, folder)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        kind = content["model_type"]
        if "auto_map" in content and not trust_remote_code:
            raise UnsupportedModelError(
                f"model type {kind!r} brings its own code, which runs only with trust_remote_code=True."
            ) from error
        if isinstance(error, (ValueError, KeyError)) and "architecture" in str(error):
            raise UnsupportedModelError(f"model type {kind!r} is not known to the installed transformers.") from error
        raise ModelLoadError(f"{path} is refused by transformers: {type(error).__name__}: {error}") from error
    return _view(config, folder)


def _view(config: Any, folder: Path) -> ModelConfig:
    try:
        view = ModelConfig.from_transformers(config, generation=_generation(folder))
        view.attention_specs(view.dtype)  # heads, head size and window must go together
    except DougongError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{folder / 'config.json'} has values that make no sense together: {type(error).__name__}: {error}."
        ) from error
    return view


def _generation(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _dtype(name: str, config: ModelConfig, backend: Backend) -> torch.dtype:
    offered = tuple(backend.device.dtypes)
    if name != "auto":
        dtype = torch_dtype(name)
        if dtype not in offered:
            raise ConfigError(
                f"dtype={name!r}: backend {backend.name!r} runs models in {', '.join(map(dtype_name, offered))}."
            )
        return dtype
    # float32 files are mostly kept so for safety: they run in what the device likes best.
    return config.dtype if config.dtype in offered and config.dtype != torch.float32 else offered[0]


_KV_DTYPES = {
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def _kv_dtype(name: str, dtype: torch.dtype, device: Device) -> torch.dtype:
    if name == "fp8":
        return device.fp8_dtype
    return dtype if name == "auto" else _KV_DTYPES[name] if name in _KV_DTYPES else torch_dtype(name)


def _max_len(asked: int | None, config: ModelConfig) -> int:
    if asked is not None and asked > config.max_positions:
        raise ConfigError(
            f"max_model_len={asked}: the model was made for at most {config.max_positions} positions (its config); "
            "choose no more, or extend its rope in config.json."
        )
    return config.max_positions if asked is None else asked


def _source(options: EngineConfig, files: ModelFiles, weight_format: WeightFormat, build: Builder) -> WeightSource:
    kind = options.load_format
    if kind == "dummy":
        return DummyWeights(build.device, build.dtype, seed=options.seed)
    if kind == "gguf" and files.gguf is None:
        raise ModelLoadError(f"load_format='gguf': {files.folder} came as no GGUF file.")
    # 4-bit blocks are taken from the GGUF file itself; plain weights from the unpacked folder, which maps faster.
    wants_blocks = "int4" in (weight_format.linear, weight_format.head)
    if files.gguf is not None and (kind == "gguf" or wants_blocks or not files.has_weights) and kind != "safetensors":
        from dougong.models.loading.gguf import GGUFWeights

        return GGUFWeights(files.gguf)
    return named_as_with_head(SafetensorsWeights(find_safetensors(files.folder)))
