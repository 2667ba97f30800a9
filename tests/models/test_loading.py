"""Loading: sharded, tied and dummy weights, formats in few bits, and an error with a way out for all that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_harness import PagedModel
from safetensors.torch import load_file, save_file

from dougong.errors import ConfigError, ModelLoadError, UnsupportedModelError
from dougong.hal import Backend, QuantizedWeight
from dougong.models import LoadedModel, get_tokenizer, read_config, resolve_model
from dougong.models.quantization import slice_weight
from tests.models.conftest import save_model

TOKENS = [5, 44, 7, 71, 30, 12, 9, 9, 50]
Load = Callable[..., LoadedModel]


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_sharded_files_with_an_index(tmp_path: Path, backend: Backend, load: Load) -> None:
    theirs = save_model(tmp_path / "whole", "Llama")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    got = PagedModel(load(tmp_path / "parts").model, backend).run(TOKENS, (9,))
    torch.testing.assert_close(got, logits_of(theirs), atol=2e-5, rtol=2e-4)
    next((tmp_path / "parts").glob("model-00002*")).unlink()
    with pytest.raises(ModelLoadError, match="of which 1 are not there"):
        load(tmp_path / "parts")


def test_dummy_weights_come_from_the_config_alone(tmp_path: Path, backend: Backend, load: Load) -> None:
    save_model(tmp_path, "Qwen3", head_dim=8)
    (tmp_path / "model.safetensors").unlink()
    runs = [
        PagedModel(load(tmp_path, load_format="dummy", seed=seed).model, backend).run(TOKENS, (9,))
        for seed in (1, 1, 2)
    ]
    assert torch.isfinite(runs[0]).all()
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.03), ("int4", 0.35)])
def test_quantization_keeps_logits_near(name: str, bound: float, tmp_path: Path, backend: Backend, load: Load) -> None:
    theirs = save_model(tmp_path, "Llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=True)
    loaded = load(tmp_path, quantization=name)
    got, want = PagedModel(loaded.model, backend).run(TOKENS, (9,)), logits_of(theirs)
    error = float((got - want).norm() / want.norm())
    assert 1e-4 < error < bound
    head: Any = loaded.model.head  # type: ignore[assignment]
    assert head.packed.format == "int8"
    assert loaded.model.layers[0].qkv.packed.format == name  # type: ignore[index, union-attr]
    assert set(loaded.model.choices) == {"linear (int8)", f"linear ({name})"}


def test_parts_of_quantised_weights_are_the_parts_of_the_matrix() -> None:
    from dougong.hal.reference.linear import quantize_weight

    weight = torch.randn(6, 128)
    for format in ("int4", "int8"):
        stored: QuantizedWeight = quantize_weight(weight, format)
        part = slice_weight(stored, slice(1, 4), slice(32, 96))
        assert torch.equal(part.dequantize(), stored.dequantize()[1:4, 32:96])
    with pytest.raises(ConfigError, match="columns 0 to 48 of a weight in groups of 32"):
        slice_weight(quantize_weight(weight, "int4"), slice(None), slice(0, 48))


def test_auto_dtype_is_the_files_own_where_the_device_runs_it(tmp_path: Path, load: Load) -> None:
    theirs = save_model(tmp_path, "Llama")
    assert load(tmp_path, dtype="auto").dtype == torch.float32
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype="auto", kv_cache_dtype="int8")
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.attentions[0].spec.kv_dtype == torch.int8


def test_an_8_bit_cache_is_of_the_device_s_own_kind(
    tmp_path: Path, load: Load, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, "Llama")
    assert load(tmp_path, kv_cache_dtype="fp8").kv_dtype == torch.float8_e4m3fn
    monkeypatch.setattr(backend.device, "fp8_dtype", torch.float8_e4m3fnuz, raising=False)
    assert load(tmp_path, kv_cache_dtype="fp8").kv_dtype == torch.float8_e4m3fnuz
    assert load(tmp_path, kv_cache_dtype="fp8_e4m3").kv_dtype == torch.float8_e4m3fn


def test_eos_ids_are_those_of_the_generation_config(tmp_path: Path) -> None:
    save_model(tmp_path, "Llama")
    assert read_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read_config(tmp_path).eos_token_ids == (2, 7)


@pytest.mark.parametrize("keep", [5, 900, -100])
def test_truncated_safetensors(keep: int, tmp_path: Path, load: Load) -> None:
    save_model(tmp_path, "Llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is truncated or corrupt"):
        load(tmp_path)


def test_weights_that_do_not_match_are_counted_and_named(tmp_path: Path, load: Load) -> None:
    save_model(tmp_path, "Llama")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(31)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)

    edit_weights(tmp_path, spoil)
    with pytest.raises(ModelLoadError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "1 missing (model.layers.1.self_attn.k_proj.weight)" in message
    assert "1 of another shape (model.norm.weight: [31] where the config says [32])" in message
    assert "1 not part of the model (model.layers.0.self_attn.q_proj.bias)" in message


def test_a_config_of_another_size_names_the_shapes(tmp_path: Path, load: Load) -> None:
    save_model(tmp_path, "Llama")
    edit_config(tmp_path, intermediate_size=64)
    with pytest.raises(ModelLoadError, match=r"9 of another shape .*gate_proj.*\[48, 32\].*says \[64, 32\].*…"):
        load(tmp_path)


def test_integer_tensors_are_no_plain_weights(tmp_path: Path, load: Load) -> None:
    save_model(tmp_path, "Llama")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.down_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    edit_weights(tmp_path, spoil)
    with pytest.raises(ModelLoadError, match=r"holds torch\.int8"):
        load(tmp_path)


def test_stored_quantisation_that_is_not_known_is_named(tmp_path: Path, load: Load) -> None:
    save_model(tmp_path, "Llama")
    edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    with pytest.raises(UnsupportedModelError, match=r"stored quantised \(gptq\)"):
        load(tmp_path)


def test_config_without_weights(tmp_path: Path, load: Load) -> None:
    save_model(tmp_path, "Llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="holds a config but no weights"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelLoadError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        load(tmp_path)


def test_weights_without_config(tmp_path: Path, load: Load) -> None:
    save_model(tmp_path, "Llama")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"weights but no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", ModelLoadError, "cannot read"),
        ("[]", ModelLoadError, "names no model_type"),
        ('{"hidden_size": 3}', ModelLoadError, "names no model_type"),
        ('{"model_type": "no_such_model"}', UnsupportedModelError, "'no_such_model' is not known"),
        ('{"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}', UnsupportedModelError, "trust_remote_code=True"),
        ('{"model_type": "llama", "vocab_size": 0, "architectures": ["X"]}', ModelLoadError, "vocab_size"),
        ('{"model_type": "t5", "architectures": ["T5Model"]}', UnsupportedModelError, "encoder-decoder"),
        ('{"model_type": "llama"}', UnsupportedModelError, r"names no architecture.*LlamaForCausalLM"),
        (
            '{"model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 1}',
            UnsupportedModelError,
            "BertModel .* is an encoder.*Qwen3-Embedding",
        ),
        (
            '{"model_type": "modernbert", "architectures": ["ModernBertModel"], "num_hidden_layers": 1}',
            UnsupportedModelError,
            "ModernBertModel .* is no causal language model.*encoders are not run",
        ),
    ],
)
def test_bad_configs(content: str, error: type[Exception], message: str, tmp_path: Path, load: Load) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        load(tmp_path, load_format="dummy")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 3}, {"head_dim": -16}, {"num_key_value_heads": "two"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "far"}}, {"rms_norm_eps": "small"},
    ],
    ids=str,
)  # fmt: skip
def test_configs_whose_values_make_no_sense(changes: dict[str, Any], tmp_path: Path, load: Load) -> None:
    save_model(tmp_path, "Llama")
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load(tmp_path)


def test_an_index_of_no_sense(tmp_path: Path, load: Load) -> None:
    save_model(tmp_path, "Llama")
    for content in ('{"weight_map": {"a": null, "b": "c"}}', '{"weight_map": {"a": {}}}', "[]", "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ModelLoadError, match="is corrupt"):
            load(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "what is this?", "lost.gguf"])
def test_unknown_paths(name: str) -> None:
    with pytest.raises(ModelLoadError, match="there is no folder or file"):
        resolve_model(name)


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def offline(*args: Any, **options: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelLoadError, match="no folder here, and fetching it from the hub failed: ConnectionError"):
        resolve_model("someone/some-model")


def test_a_folder_or_file_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no config\.json and no \.gguf file"):
        resolve_model(str(tmp_path))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ModelLoadError, match="is a file; a model is a folder"):
        resolve_model(str(tmp_path / "a.txt"))


def test_options_that_do_not_fit(tmp_path: Path, load: Load) -> None:
    save_model(tmp_path, "Llama")
    with pytest.raises(ConfigError, match=r"max_model_len=65: .* at most 64 positions"):
        load(tmp_path, max_model_len=65)
    with pytest.raises(ConfigError, match="quantization='int3': known are int8, int4"):
        load(tmp_path, quantization="int3")
    with pytest.raises(ModelLoadError, match="came as no GGUF file"):
        load(tmp_path, load_format="gguf")


def test_no_tokenizer_and_a_wrong_one(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    save_model(tmp_path, "Llama")
    with pytest.raises(ModelLoadError, match="no tokenizer can be loaded"):
        get_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ModelLoadError, match="no tokenizer can be loaded"):
        get_tokenizer(tmp_path)
    words = {f"w{index}": index for index in range(120)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")))
    tokenizer.save_pretrained(tmp_path)
    assert len(get_tokenizer(tmp_path)) == 120
    with pytest.raises(ModelLoadError, match=r"23 tokens with ids the model does not have \(97 in its vocabulary"):
        get_tokenizer(tmp_path, vocab_size=97)
