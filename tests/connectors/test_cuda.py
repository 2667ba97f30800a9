"""KV between an NVIDIA GPU and the host: bits through every layout, a request's tokens through two engines.

The model is made here, so that none need be on the machine.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dougong import Engine, EngineConfig, SamplingParams
from dougong.execution.kv_blocks import KVBlocks
from dougong.execution.transfer import Transfer
from dougong.hal import (
    HND,
    NHD,
    X_PACKED,
    AttentionSpec,
    KVGroup,
    KVLayout,
    LayerCache,
    allocate_cache,
    convert_blocks,
    open_backend,
)
from dougong.plugins import load_plugins

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"
)

LAYOUTS = {"nhd": NHD, "hnd": HND, "x_packed": X_PACKED}
DTYPES = (torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn)
PROMPTS = [[3 + (7 * place) % 250 for place in range(75)], list(range(30, 62)), [5, 6, 7]]
_numbers = itertools.count()


def side(backend: Any, spec: AttentionSpec, layout: KVLayout, size: int, count: int) -> tuple[list[LayerCache], Any]:
    """(two layers' caches filled with any bits, the reader of their blocks)."""
    group = KVGroup(index=0, layers=(0, 1), spec=spec, layout=layout, manager_block=size, kernel_block=size)
    generator = torch.Generator().manual_seed(size)
    caches = []
    for _ in group.layers:
        cache = allocate_cache(spec, layout, count, size, backend.device.torch_device)
        for plane in cache.planes.values():
            raw = torch.randint(0, 256, (plane.numel() * plane.itemsize,), dtype=torch.uint8, generator=generator)
            plane.copy_(raw.view(plane.dtype).view(plane.shape))
        caches.append(cache)
    context: Any = type("Context", (), {"caches": caches})()
    return caches, KVBlocks((group,), context, Transfer(backend.device))


def bits(reader: Any, runs: list[list[int]]) -> torch.Tensor:
    found: torch.Tensor = reader.read(0, runs).get()[0]
    return found.clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("here", "there"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_blocks_cross_to_the_bit(here: str, there: str, dtype: torch.dtype) -> None:
    """GPU blocks of 32 and host blocks of 16, every layout against every other, there and back again."""
    wide = torch.bfloat16 if dtype.itemsize == 1 else dtype
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, dtype=wide, kv_dtype=dtype)
    gpu_caches, gpu = side(open_backend("cuda"), spec, LAYOUTS[here], 32, 4)
    host_caches, host = side(open_backend("cpu"), spec, LAYOUTS[there], 16, 12)
    sent = bits(gpu, [[3], [1]])
    before = bits(host, [[block] for block in range(12)])
    host.write(0, [[8, 2], [5, 11]], [bytes(row.numpy()) for row in sent])
    assert torch.equal(bits(host, [[8, 2], [5, 11]]), sent)
    untouched = [block for block in range(12) if block not in (8, 2, 5, 11)]
    assert torch.equal(bits(host, [[block] for block in range(12)])[untouched], before[untouched])
    gpu.write(0, [[0], [2]], [bytes(row.numpy()) for row in bits(host, [[8, 2], [5, 11]])])
    assert torch.equal(bits(gpu, [[0], [2], [3], [1]]), torch.cat((sent, sent)))
    # The direct road, without bytes between, gives the same in both directions.
    convert_blocks(gpu_caches[0], torch.tensor([3], device="cuda"), host_caches[0], torch.tensor([0, 1]))
    slots = torch.arange(32)
    for arrived, source in zip(host_caches[0].read(slots), gpu_caches[0].read((slots + 96).cuda())):
        assert torch.equal(arrived.view(torch.uint8), source.cpu().view(torch.uint8))
    convert_blocks(host_caches[1], torch.tensor([4, 7]), gpu_caches[1], torch.tensor([2], device="cuda"))
    from_slots = torch.cat((slots[:16] + 64, slots[:16] + 112))
    for arrived, source in zip(gpu_caches[1].read((slots + 64).cuda()), host_caches[1].read(from_slots)):
        assert torch.equal(arrived.cpu().view(torch.uint8), source.view(torch.uint8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 128,
        "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "torch_dtype": "float32",
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {"model.embed_tokens.weight": (256, 128), "model.norm.weight": (128,), "lm_head.weight": (256, 128)}
    for layer in ("model.layers.0.", "model.layers.1."):
        shapes |= {
            layer + "input_layernorm.weight": (128,), layer + "post_attention_layernorm.weight": (128,),
            layer + "self_attn.q_proj.weight": (128, 128), layer + "self_attn.k_proj.weight": (64, 128),
            layer + "self_attn.v_proj.weight": (64, 128), layer + "self_attn.o_proj.weight": (128, 128),
            layer + "mlp.gate_proj.weight": (192, 128), layer + "mlp.up_proj.weight": (192, 128),
            layer + "mlp.down_proj.weight": (128, 192),
        }  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: torch.ones(shape) if "norm" in name else 0.25 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make(model: Path, backend: str, role: str | None, name: str, **options: Any) -> Engine:
    chosen: dict[str, Any] = {
        "model": str(model), "backend": backend, "dtype": "float32", "max_num_seqs": 4,
        "skip_tokenizer_init": True, "max_model_len": 192, "num_kv_blocks": 64, "block_size": 16,
    }  # fmt: skip
    if role is not None:
        size = {} if role == "consumer" else {"size_mib": 8}
        chosen |= {"kv_connector": "shared_memory", "kv_role": role, "kv_connector_options": {"name": name, **size}}
    return Engine(EngineConfig(**(chosen | options)), plugins=load_plugins("cpu,cuda"))


def run(engine: Engine, count: int, params: list[Any] | None = None) -> list[Any]:
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = []
    for index, prompt in enumerate(PROMPTS):
        asked: dict[str, Any] = {"prompt_token_ids": prompt}
        if params is not None:
            asked["kv_transfer_params"] = params[index]
        outputs.append(engine.add(f"r{next(_numbers)}", asked, sampling))
    while engine.has_work:
        engine.step()
    return outputs


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_prefill_on_one_decode_on_the_other(model: Path, first: str, second: str, block: int) -> None:
    """In float32, where equal means equal: each engine alone, and the two together, give the same tokens."""
    name = f"g{os.getpid()}-{next(_numbers)}"
    engines = [make(model, "cpu", None, name), make(model, "cuda", None, name)]
    try:
        right, also = (tokens(run(engine, 24)) for engine in engines)
        assert right == also
        producer = make(model, first, "producer", name, block_size=block)
        engines.append(producer)
        params = [output.kv_transfer_params for output in run(producer, 1)]
        assert [one and one["num_tokens"] for one in params] == [64, 32, None]
        consumer = make(model, second, "consumer", name)
        engines.append(consumer)
        outputs = run(consumer, 24, params)
        assert [output.num_cached_tokens for output in outputs] == [64, 31, 0]
        assert consumer.transfer is not None and consumer.transfer.stats.failures == 0
        assert tokens(outputs) == right
    finally:
        for engine in engines:
            engine.close()
