"""GGUF: the same model as transformers makes of the file, 4-bit blocks untouched, damage reported."""

from __future__ import annotations

import math
import struct
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
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(path)) == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp
    write_gguf(path, llama, "Q4_0")
    assert resolve_model(str(path)).folder != first.folder


def test_large_files_are_read_where_they_lie(
    llama: Any, tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, "Q4_1")
    want = PagedModel(load(path).model, backend).run(TOKENS, (9,))
    monkeypatch.setattr("dougong.models.loading.source._UNPACK_BYTES", 100)
    (tmp_path / "another.gguf").write_bytes(b"")  # a folder of models is no model's folder
    loaded = load(path)
    assert not (loaded.path / "model.safetensors").exists()
    assert torch.equal(PagedModel(loaded.model, backend).run(TOKENS, (9,)), want)
    # The folder is still one that transformers reads, the weights too.
    assert get_tokenizer(loaded.path, vocab_size=97).eos_token_id == 2
    assert (loaded.path / "tiny.gguf").samefile(path)
    again = load(loaded.path)
    assert torch.equal(PagedModel(again.model, backend).run(TOKENS, (9,)), want)
    (tmp_path / "there").mkdir()
    moved = path.rename(tmp_path / "there" / "tiny.gguf")
    assert load(moved).path == loaded.path and (loaded.path / "tiny.gguf").samefile(moved)


@pytest.mark.parametrize("keep", [3, 200, b"tokenizer.ggml.token_type", 20_000, -40], ids=str)
def test_truncated_files_are_reported(keep: int | bytes, llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, "Q4_1")
    whole = path.read_bytes()
    cut = keep if isinstance(keep, int) else whole.index(keep) + len(keep) + 100  # in the middle of an array
    path.write_bytes(whole[:cut])
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


@pytest.mark.parametrize(
    "values",
    [
        {"general.alignment": 0}, {"llama.attention.head_count": 0}, {"llama.context_length": 0.5},
        {"llama.attention.head_count_kv": 3}, {"llama.block_count": 1.5},
    ],
    ids=str,
)  # fmt: skip
def test_metadata_of_no_sense_is_reported(values: dict[str, float], llama: Any, tmp_path: Path, load: Any) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, "F16")
    ((key, value),) = values.items()
    name = key.encode()
    entry = struct.pack("<Q", len(name)) + name
    content = path.read_bytes()
    new = struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)
    at = content.find(entry)
    if at < 0:
        write_gguf(path, llama, "F16", values=values)
    else:
        at += len(entry)
        path.write_bytes(content[:at] + new + content[at + 8 :])
    with pytest.raises(ModelLoadError):
        load(path)


def test_the_end_of_a_turn_ends_an_answer(llama: Any, tmp_path: Path, load: Callable[..., LoadedModel]) -> None:
    """Gemma's and Llama 3's files name it beside the end of the text."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, "F16", values={"tokenizer.ggml.eot_token_id": 84, "tokenizer.ggml.eom_token_id": 2})
    assert load(path).config.eos_token_ids == (2, 84)


def llama3_factors(rope: dict[str, Any], dim: int) -> torch.Tensor:
    """What ggml's converter stores for Llama 3: the divisor of each frequency."""
    found = []
    for index in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / dim)
        trained, low, high = (
            rope[name] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        smooth = (trained / wavelength - low) / (high - low)
        within = 1 / ((1 - smooth) / rope["factor"] + smooth)
        found.append(1 if wavelength < trained / high else rope["factor"] if wavelength > trained / low else within)
    return torch.tensor(found)


def same_logits(path: Path, model: Any, backend: Backend, load: Callable[..., LoadedModel], rtol: float) -> None:
    """Ours from the file, and transformers' from what was unpacked, are those of ``model``."""
    from transformers import AutoModelForCausalLM

    ours = load(path)
    want = logits_of(model)
    torch.testing.assert_close(PagedModel(ours.model, backend).run(TOKENS, (4,)), want, atol=2e-5, rtol=rtol)
    unpacked = AutoModelForCausalLM.from_pretrained(ours.path, dtype=torch.float32)
    torch.testing.assert_close(logits_of(unpacked), want, atol=2e-5, rtol=rtol)


def half_embedding(model: Any) -> Any:
    """The embedding is stored in half precision."""
    with torch.no_grad():
        weight = model.model.embed_tokens.weight
        weight.copy_(weight.half().float())
    return model


def test_llama_3_s_frequencies_are_scaled_as_the_file_says(
    tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]
) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = half_embedding(
        save_model(tmp_path / "plain", "Llama", **SIZES, tie_word_embeddings=True, rope_parameters=rope)
    )
    factors = llama3_factors(rope, 16)
    assert factors.unique().numel() == 4
    write_gguf(tmp_path / "tiny.gguf", model, "F32", vectors={"rope_freqs.weight": factors})
    same_logits(tmp_path / "tiny.gguf", model, backend, load, 2e-4)


@pytest.mark.parametrize("trained", [64, 5], ids=["short", "long"])
def test_phi_3_s_factors_for_short_and_long_texts(
    trained: int, tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]
) -> None:
    short, long = ([1 + step * index for index in range(8)] for step in (0.1, 0.7))
    model = half_embedding(
        save_model(
            tmp_path / "plain", "Phi3", **SIZES, tie_word_embeddings=False, original_max_position_embeddings=trained,
            sliding_window=None, rope_parameters={
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long,
                "original_max_position_embeddings": trained, "attention_factor": 1.19,
            },
        )
    )  # fmt: skip
    scaling = "phi3.rope.scaling"
    vectors = {"rope_factors_short.weight": torch.tensor(short), "rope_factors_long.weight": torch.tensor(long)}
    values = {f"{scaling}.original_context_length": trained, f"{scaling}.attn_factor": 1.19}
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, "F32", architecture="phi3", values=values, vectors=vectors)
    same_logits(path, model, backend, load, 2e-4)
    write_gguf(path, model, "F32", architecture="phi3", vectors={"rope_factors_short.weight": torch.tensor(short)})
    with pytest.raises(ModelLoadError, match="short and long factors belong together"):
        load(path)


GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}
GEMMA_VALUES = {"attention.key_length": 16, "attention.sliding_window": 4}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "mistral": ("Mistral", {"sliding_window": 4}, {"attention.sliding_window": 4}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen3": ("Qwen3", {"head_dim": 24}, {"attention.key_length": 24}),
    "gemma2": (
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {**GEMMA_VALUES, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **GEMMA, "num_hidden_layers": 7, "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {**GEMMA_VALUES, "rope.scaling.factor": 2.0},
    ),
}  # fmt: skip


@pytest.mark.prove
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(
    architecture: str, tmp_path: Path, backend: Backend, load: Callable[..., LoadedModel]
) -> None:
    kind, changes, values = ARCHITECTURES[architecture]
    model = half_embedding(save_model(tmp_path / "plain", kind, **{**SIZES, "tie_word_embeddings": True, **changes}))
    path = tmp_path / "tiny.gguf"
    given: dict[str, Any] = {f"{architecture}.{key}": value for key, value in values.items()}
    if architecture == "gemma3":
        given["gemma3.rope.scaling.type"] = "linear"
    write_gguf(path, model, "F32", architecture=architecture, values=given)
    same_logits(path, model, backend, load, 2e-4)


def test_names_that_are_no_text_are_reported(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama, "F16")
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_k.weight", b"blk.0.attn_\xff.weight"))
    with pytest.raises(ModelLoadError, match="truncated or corrupt"):
        resolve_model(str(path))
