"""GGUF: the same model as transformers makes of the file, 4-bit blocks untouched, damage reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import interleave, write_gguf
from model_harness import PagedModel

from dougong.errors import ModelLoadError, UnsupportedModelError
from dougong.hal import Backend, QuantizedWeight
from dougong.models import LoadedModel, WeightSpec, get_tokenizer, resolve_model
from dougong.models.loading.gguf import GGUFWeights
from tests.models.conftest import save_model

SIZES = {"hidden_size": 64, "intermediate_size": 96}
TOKENS = [5, 44, 7, 71, 30, 12, 9, 9, 50]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOUGONG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_model(tmp_path_factory.mktemp("llama"), "Llama", **SIZES, tie_word_embeddings=True)


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q5_1"])
def test_logits_equal_those_that_transformers_gets_from_the_file(
    kind: str, llama: Any, tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]
) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / f"tiny-{kind}.gguf"
    write_gguf(path, llama, kind)
    ours = load(path)
    got = PagedModel(ours.model, backend).run(TOKENS, (4,))
    widened = _widened(llama, kind)
    torch.testing.assert_close(got, logits_of(widened), atol=2e-5, rtol=2e-4)
    unpacked = AutoModelForCausalLM.from_pretrained(ours.path, dtype=torch.float32)
    torch.testing.assert_close(got, logits_of(unpacked), atol=2e-5, rtol=2e-4)
    again = load(path, load_format="gguf")
    assert torch.equal(PagedModel(again.model, backend).run(TOKENS, (4,)), got)


def _widened(model: Any, kind: str) -> Any:
    """The model after its matrices passed through ggml's own rounding."""
    from transformers import AutoModelForCausalLM

    copy = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, attn_implementation="eager")
    state = {}
    for name, weight in model.state_dict().items():
        if "embed" in name or name == "lm_head.weight":
            weight = weight.half().float()
        elif weight.dim() == 2 and kind != "F32":
            type = gguf.GGMLQuantizationType[kind]
            rounded = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), type), type)
            weight = torch.from_numpy(rounded.reshape(weight.shape).copy())
        state[name] = weight
    copy.load_state_dict(state)
    return copy.eval()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_four_bit_blocks_keep_their_bits(
    kind: str, llama: Any, tmp_path: Path, load: Callable[..., LoadedModel]
) -> None:
    path = tmp_path / f"tiny-{kind}.gguf"
    write_gguf(path, llama, kind)
    source = GGUFWeights(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    stored = source.read_quantized(WeightSpec(name, (64, 64)))
    assert stored is not None
    assert stored.scale.dtype == torch.float16
    raw = source.file.bytes_of(source.file.tensors["blk.1.attn_q.weight"]).reshape(64, 2, -1)
    # every byte of nibbles is in the packed weight, in another order: the sums of nibbles per row and block are equal
    nibbles = torch.from_numpy(raw[..., -16:].copy())
    theirs = ((nibbles & 15).int() + (nibbles >> 4).int()).sum(-1)
    packed = stored.q.view(64, 2, 16)
    ours = ((packed & 15).int() + (packed >> 4).int()).sum(-1)
    assert torch.equal(interleave(ours, 4), theirs)
    # and it stands for the very numbers of ggml's own widening
    want = _widened(llama, kind).state_dict()
    torch.testing.assert_close(stored.dequantize(), want[name], atol=0, rtol=1e-6)
    loaded = load(path, quantization="int4")
    layer: Any = loaded.model.layers[1]  # type: ignore[index]
    assert isinstance(layer.qkv.packed, QuantizedWeight)
    assert torch.equal(layer.qkv.packed.q[:64], stored.q)
    fused = torch.cat([want[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    torch.testing.assert_close(layer.feed_forward.gate_up.weight(), fused, atol=0, rtol=1e-6)


def test_tokenizer_and_chat_template_come_with_the_file(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, "Q8_0")
    tokenizer = get_tokenizer(path, vocab_size=97)
    assert tokenizer.decode(tokenizer("ahe he")["input_ids"]) == "ahe he"
    assert "he" in tokenizer.convert_ids_to_tokens(tokenizer("ahe he")["input_ids"])
    assert tokenizer.eos_token_id == 2
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<s>hi</s>"
    assert tokenizer(text)["input_ids"][0] == 1


def test_a_second_start_takes_what_the_first_unpacked(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, "Q4_1")
    first = resolve_model(str(path))
    stamp = (first.path / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(path)) == first
    assert (first.path / "model.safetensors").stat().st_mtime_ns == stamp
    write_gguf(path, llama, "Q4_0")
    assert resolve_model(str(path)).path != first.path


def test_large_files_are_read_where_they_lie(
    llama: Any, tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, "Q4_1")
    want = PagedModel(load(path).model, backend).run(TOKENS, (9,))
    monkeypatch.setattr("dougong.models.loading.source._UNPACK_BYTES", 100)
    loaded = load(path)
    assert loaded.path == path.parent
    assert not (loaded.folder / "model.safetensors").exists()
    assert torch.equal(PagedModel(loaded.model, backend).run(TOKENS, (9,)), want)


@pytest.mark.parametrize("keep", [3, 200, 20_000, -40])
def test_truncated_files_are_reported(keep: int, llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, "Q4_1")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"tiny\.gguf"):
        resolve_model(str(path))
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_other_bytes_are_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(ModelLoadError, match="no GGUF file"):
        resolve_model(str(path))
    path.write_bytes(b"GGUF" + (99).to_bytes(4, "little") + bytes(40))
    with pytest.raises(ModelLoadError, match="version 99"):
        resolve_model(str(path))


def test_architectures_that_are_not_read_are_named(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, "F16", architecture="mamba")
    with pytest.raises(UnsupportedModelError, match="architecture 'mamba'; from GGUF are read: llama"):
        resolve_model(str(path))
    write_gguf(path, llama, "F16", expert_count=4)
    with pytest.raises(UnsupportedModelError, match="'llama' with experts"):
        resolve_model(str(path))


def test_missing_metadata_is_named(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, "F16")
    path.write_bytes(path.read_bytes().replace(b"llama.block_count", b"llama.block_xount"))
    with pytest.raises(ModelLoadError, match=r"lacks llama\.block_count"):
        resolve_model(str(path))
