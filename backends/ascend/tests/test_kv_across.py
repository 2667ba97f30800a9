"""KV across vendors: blocks that one backend wrote are read by another, to the bit; a request prefilled here goes on
there."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dougong.hal import HND, NHD, NZ16, X_PACKED, AttentionSpec, Backend, KVGroup, KVLayout, convert_blocks
from dougong_ascend.layouts import HND_PAGED, LATENT, NHD_PAGED, NZ

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.float16)
MLA = AttentionSpec(num_heads=4, num_kv_heads=1, head_dim=576, head_dim_v=512, latent=True)
HERE = {"nhd": NHD_PAGED, "hnd": HND_PAGED, "nz16": NZ}
THERE = {"nhd": NHD, "hnd": replace(HND, planes={"k": "b h n d", "v": "b h n d"}), "nz16": NZ16, "x_packed": X_PACKED}
_numbers = itertools.count()


class _Host:
    """The CPU's side of a transfer."""

    type = "cpu"
    pins_memory = False
    torch_device = torch.device("cpu")


def blocks_of(device: Any, spec: AttentionSpec, layout: KVLayout, size: int, count: int) -> tuple[Any, Any, Any]:
    """(group, cache, reader of blocks) of two layers' caches filled with any bits. The second layer owns its own."""
    from dougong.execution.kv_blocks import KVBlocks
    from dougong.execution.transfer import Transfer
    from dougong.hal import allocate_cache

    group = KVGroup(index=0, layers=(0, 1), spec=spec, layout=layout, manager_block=size, kernel_block=size)
    generator = torch.Generator().manual_seed(1)
    caches = []
    for _ in group.layers:
        if device.type == "cpu":
            cache = allocate_cache(spec, layout, count, size, "cpu")
        else:
            cache = device.empty_cache(group, count)
        for plane in cache.planes.values():
            bits = torch.randint(-(2**15), 2**15, plane.shape, dtype=torch.int16, generator=generator)
            plane.copy_(bits.view(spec.kv_dtype))
        caches.append(cache)
    context: Any = type("Context", (), {"caches": caches})()
    return group, caches, KVBlocks((group,), context, Transfer(device))


def bits(reader: Any, runs: list[list[int]]) -> torch.Tensor:
    found: torch.Tensor = reader.read(0, runs).get()[0]
    return found.clone()


@pytest.mark.parametrize("there", THERE)
@pytest.mark.parametrize("here", HERE)
def test_blocks_cross_to_the_bit(backend: Backend, here: str, there: str) -> None:
    """NPU blocks of 32 and host blocks of 16, every layout against every other, there and back again."""
    _, caches, npu = blocks_of(backend.device, SPEC, HERE[here], 32, 4)
    _, host_caches, host = blocks_of(_Host(), SPEC, THERE[there], 16, 12)
    sent = bits(npu, [[3], [1]])
    before = bits(host, [[block] for block in range(12)])
    host.write(0, [[8, 2], [5, 11]], [bytes(row.numpy()) for row in sent])
    assert torch.equal(bits(host, [[8, 2], [5, 11]]), sent)
    after = bits(host, [[block] for block in range(12)])
    untouched = [block for block in range(12) if block not in (8, 2, 5, 11)]
    assert torch.equal(after[untouched], before[untouched])
    npu.write(0, [[0], [2]], [bytes(row.numpy()) for row in bits(host, [[8, 2], [5, 11]])])
    assert torch.equal(bits(npu, [[0], [2], [3], [1]]), torch.cat((sent, sent)))
    # The direct road, without bytes between, gives the same.
    convert_blocks(caches[0], torch.tensor([3], device="npu"), host_caches[0], torch.tensor([0, 1]))
    direct = torch.cat([plane.flatten() for plane in host_caches[0].read(torch.arange(32))])
    npu_read = torch.cat([plane.flatten() for plane in caches[0].read(torch.arange(96, 128, device="npu"))])
    assert torch.equal(direct.view(torch.int16), npu_read.cpu().view(torch.int16))


def test_a_latent_cache_crosses_too(backend: Backend) -> None:
    _, _, npu = blocks_of(backend.device, MLA, LATENT, 128, 3)
    _, _, host = blocks_of(_Host(), MLA, KVLayout("latent", {"k": "b n h d"}), 16, 20)
    sent = bits(npu, [[2]])
    run = list(range(19, 11, -1))
    host.write(0, [run], [bytes(sent[0].numpy())])
    assert torch.equal(bits(host, [run]), sent)
    npu.write(0, [[0]], [bytes(bits(host, [run])[0].numpy())])
    assert torch.equal(bits(npu, [[0]]), sent)


# -- whole engines ----------------------------------------------------------------------------------------------------

PROMPTS = [list(range(3, 90)), [5, 7, 9, 3, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24], [11]]


def make(model: Path, backend: str, role: str | None, name: str, **options: Any) -> Any:
    """An engine; on the twin only where this process has become it."""
    import dougong_ascend
    import dougong_cpu
    from dougong import Engine, EngineConfig
    from dougong.plugins import load_plugins
    from dougong_ascend.twin import plugin

    own = options.pop("own", {})
    plugins = load_plugins(entries=(), extra=[("ascend", dougong_ascend), ("twin", plugin), ("cpu", dougong_cpu)])
    chosen: dict[str, Any] = {
        "model": str(model), "backend": backend, "dtype": "float16", "skip_tokenizer_init": True, "max_num_seqs": 4,
        "max_model_len": 192, "num_kv_blocks": 40, "block_size": 16, "enforce_eager": True,
    }  # fmt: skip
    if role is not None:
        size = {} if role == "consumer" else {"size_mib": 4}
        chosen |= {"kv_connector": "shared_memory", "kv_role": role}
        chosen["kv_connector_options"] = {"name": name, **size, **own}
    return Engine(EngineConfig(**(chosen | options)), plugins=plugins)


def run(engine: Any, count: int, params: list[Any] | None = None) -> list[Any]:
    from dougong import SamplingParams

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=100, initializer_range=0.3, max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    return folder


@pytest.fixture
def name() -> str:
    return f"a{os.getpid()}-{next(_numbers)}"


@pytest.mark.prove
@pytest.mark.parametrize("soc", ["Ascend910B1", "Ascend310P3"])
@pytest.mark.parametrize("way", ["cpu to npu", "npu to cpu"])
def test_prefill_on_one_decode_on_the_other(
    model: Path, name: str, way: str, soc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 310P the planes are tiles (NZ), on the CPU plain: the bytes between know neither."""
    from dougong_ascend.twin.settings import settings

    monkeypatch.setattr(settings, "soc", soc)
    first, second = ("cpu", "ascend-twin") if way == "cpu to npu" else ("ascend-twin", "cpu")
    alone = make(model, "cpu", None, name)
    right = tokens(run(alone, 24))
    producer = make(model, first, "producer", name)
    params = [output.kv_transfer_params for output in run(producer, 1)]
    assert [one and one["num_tokens"] for one in params] == [80, 16, None]
    consumer = make(model, second, "consumer", name)
    outputs = run(consumer, 24, params)
    assert [output.num_cached_tokens for output in outputs] == [80, 16, 0]
    assert consumer.transfer.stats.failures == 0
    assert tokens(outputs) == right
    for engine in (alone, producer, consumer):
        engine.close()


def _prefill_on_the_cpu(model: Path, name: str, pipe: Any) -> None:
    engine = make(model, "cpu", "producer", name, own={"tokens_per_block": 64})
    pipe.send([output.kv_transfer_params for output in run(engine, 1)])
    pipe.recv()
    engine.close()


@pytest.mark.prove
def test_two_processes_and_two_block_sizes(model: Path, name: str) -> None:
    """The CPU, in a process of its own and in blocks of 16, prefills; the twin decodes in blocks of 64."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_prefill_on_the_cpu, args=(model, name, there), daemon=True)
    process.start()
    alone = make(model, "ascend-twin", None, name, block_size=64)
    right = tokens(run(alone, 24))
    consumer = make(model, "ascend-twin", "consumer", name, block_size=64)
    assert here.poll(120)
    params = here.recv()
    outputs = run(consumer, 24, params)
    assert [output.num_cached_tokens for output in outputs] == [64, 0, 0]
    assert tokens(outputs) == right
    here.send(None)
    process.join(60)
    assert process.exitcode == 0
    alone.close()
    consumer.close()
