"""Prefill in one engine, decode in another: equal tokens, or computed anew; never wrong KV."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from e2e_harness import BACKEND, check_clean, greedy

from dougong import Engine, EngineConfig
from dougong.errors import ConfigError, InvalidRequestError
from dougong.plugins import ABI, KVBlockName, KVConnector, KVConnectorSpec, hookimpl, load_plugins
from dougong.types import RequestOutput

_numbers = itertools.count()
LONG = [3 + (7 * place) % 250 for place in range(75)]
PROMPTS = [LONG, [*LONG[:40], 9, 9, 9], list(range(30, 62)), [5, 6, 7]]


@pytest.fixture
def name() -> str:
    return f"t{os.getpid()}-{next(_numbers)}"


def make(model: Path, role: str | None = None, name: str = "", **options: Any) -> Engine:
    own = options.pop("own", {})
    values: dict[str, Any] = {
        "model": str(model), "backend": BACKEND, "dtype": "float32", "max_num_seqs": 4, "max_model_len": 192,
        "num_kv_blocks": 64, "warm_up": False, "block_size": 16, "skip_tokenizer_init": True,
    }  # fmt: skip
    if role is not None:
        size = {} if role == "consumer" else {"size_mib": 8}
        values |= {
            "kv_connector": "shared_memory",
            "kv_role": role,
            "kv_connector_options": {"name": name, **size, **own},
        }
    plugins = options.pop("plugins", None) or load_plugins(BACKEND)
    return Engine(EngineConfig(**(values | options)), plugins=plugins)


class Pair:
    """Two engines that are closed in the end, and the tokens that one engine alone gives."""

    def __init__(self, model: Path, name: str) -> None:
        self.model, self.name = model, name
        self.engines: list[Engine] = []

    def open(self, role: str | None, **options: Any) -> Engine:
        self.engines.append(make(self.model, role, self.name, **options))
        return self.engines[-1]

    def close(self) -> None:
        for engine in self.engines:
            if not engine._closed:
                check_clean(engine)
                engine.close()


@pytest.fixture
def pair(llama: Path, name: str) -> Iterator[Pair]:
    made = Pair(llama, name)
    yield made
    made.close()


def run(
    engine: Engine, prompts: list[list[int]], count: int, params: list[Any] | None = None, **more: Any
) -> list[RequestOutput]:
    outputs = []
    for index, prompt in enumerate(prompts):
        asked: dict[str, Any] = {"prompt_token_ids": prompt, **more}
        if params is not None:
            asked["kv_transfer_params"] = params[index]
        outputs.append(engine.add(f"r{next(_numbers)}", asked, greedy(count)))
    while engine.has_work:
        engine.step()
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_prefill_here_decode_there(pair: Pair) -> None:
    right = tokens(run(pair.open(None), PROMPTS, 40))
    prefilled = run(pair.open("producer"), PROMPTS, 1)
    params = [output.kv_transfer_params for output in prefilled]
    assert params == [{"num_tokens": count, "name": pair.name} if count else None for count in (64, 32, 32, 0)]
    consumer = pair.open("consumer")
    outputs = run(consumer, PROMPTS, 40, params)
    assert tokens(outputs) == right
    assert [output.num_cached_tokens for output in outputs] == [64, 32, 31, 0]
    assert consumer.transfer is not None and consumer.transfer.stats.failures == 0
    assert consumer.transfer.stats.loaded_tokens == 96  # the second request's blocks are the first one's


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.prove)])
def test_windows(gemma: Path, name: str, overlap: bool) -> None:
    pair = Pair(gemma, name)
    right = tokens(run(pair.open(None), PROMPTS, 40))
    run(pair.open("producer", overlap=overlap, max_num_batched_tokens=20), PROMPTS, 1)
    consumer = pair.open("consumer", overlap=overlap)
    outputs = run(consumer, PROMPTS, 40)
    assert tokens(outputs) == right
    assert [output.num_cached_tokens for output in outputs] == [64, 32, 31, 0]
    pair.close()


def test_the_bits_arrive(pair: Pair) -> None:
    """What lies in the consumer's blocks is what lies in the producer's, to the bit, whatever the block's size."""
    producer = pair.open("producer", own={"tokens_per_block": 32}, dtype="bfloat16")
    consumer = pair.open("consumer", block_size=32, dtype="bfloat16")
    found = []
    for engine in (producer, consumer):
        run(engine, [LONG], 1)
        hit = engine.kv.match(_request(LONG))
        assert hit.num_tokens == 64
        group = engine.runner.groups[0]
        slots = torch.tensor([
            block * group.manager_block + place for block in hit.blocks[0] for place in range(group.manager_block)
        ])  # fmt: skip
        caches = [engine.runner._parts.context.caches[layer] for layer in group.owners]
        found.append([plane.view(torch.int16) for cache in caches for plane in cache.read(slots)])
    assert consumer.transfer is not None and consumer.transfer.stats.loaded_tokens == 64
    for here, there in zip(*found):
        assert torch.equal(here, there)


def _request(prompt: list[int]) -> Any:
    from dougong.scheduling import Request

    return Request("x", [*prompt, 1])


def test_answers_go_on_too(pair: Pair) -> None:
    """A second turn finds the first one's answer; in role both the engine finds its own, evicted from the pool."""
    engine = pair.open("both", num_kv_blocks=14)
    first = tokens(run(engine, [LONG], 20))[0]
    run(engine, [[20 + place for place in range(120)]], 30)  # takes the whole pool
    again = run(engine, [[*LONG, *first, 4, 5]], 8)
    assert again[0].num_cached_tokens == 80
    assert tokens(again) == tokens(run(pair.open(None), [[*LONG, *first, 4, 5]], 8))


def test_a_promise_is_waited_for(pair: Pair) -> None:
    right = tokens(run(pair.open(None), [LONG], 10))
    producer, consumer = pair.open("producer"), pair.open("consumer")
    asked = {"prompt_token_ids": LONG, "kv_transfer_params": {"num_tokens": 64, "wait_s": 60}}
    output = consumer.add("late", asked, greedy(10))
    other = consumer.add("other", {"prompt_token_ids": [8, 9]}, greedy(3))
    while not other.finished:  # nobody else waits
        consumer.step()
    assert consumer.step() == [] and consumer.has_work and not output.outputs[0].token_ids
    run(producer, [LONG], 1)
    while consumer.has_work:
        consumer.step()
    assert tokens([output]) == right and output.num_cached_tokens == 64


def test_a_broken_promise_is_computed(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    right = tokens(run(pair.open(None), [LONG], 10))
    pair.open("producer")
    consumer = pair.open("consumer")
    with caplog.at_level(logging.WARNING):
        outputs = run(consumer, [LONG], 10, [{"num_tokens": 64, "wait_s": 0.02}])
    assert tokens(outputs) == right and outputs[0].num_cached_tokens == 0
    assert "64 tokens were promised, 0 were there in time" in caplog.text
    assert consumer.transfer is not None and consumer.transfer.stats.failures == 1


@pytest.mark.parametrize("harm", ["data", "gone", "size"])
def test_damage_is_computed(
    pair: Pair, harm: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tokens(run(pair.open(None), [LONG], 10))
    producer = pair.open("producer")
    run(producer, [LONG], 1)
    consumer = pair.open("consumer")
    assert producer.transfer is not None and consumer.transfer is not None
    arena = producer.transfer.connector._writer.arena  # type: ignore[attr-defined]
    if harm == "data":
        arena.slot(2, 8)[3] ^= 16
    elif harm == "gone":
        monkeypatch.setattr(consumer.transfer.connector, "load", lambda names: [])
    else:
        monkeypatch.setattr(consumer.transfer.connector, "load", lambda names: [b"short"] * len(names))
    with caplog.at_level(logging.WARNING):
        outputs = run(consumer, [LONG], 10, [{"num_tokens": 64}])
    assert tokens(outputs) == right and outputs[0].num_cached_tokens == 0
    assert {"data": "wrong checksum", "size": "a block of 5 bytes", "gone": "of 4 blocks 0 came"}[harm] in caplog.text


def test_a_killed_producers_blocks_stay_right(pair: Pair, llama: Path) -> None:
    """The writer closes and another one comes under its name: old names are not found, new ones are."""
    producer, consumer = pair.open("producer"), pair.open("consumer")
    run(producer, [LONG], 1)
    assert run(consumer, [LONG], 2)[0].num_cached_tokens == 64
    producer.close()
    consumer.reset_prefix_cache()
    assert run(consumer, [LONG], 2)[0].num_cached_tokens == 0
    run(pair.open("producer"), [PROMPTS[2]], 1)
    output = run(consumer, [PROMPTS[2]], 2, [{"num_tokens": 32, "wait_s": 60}])
    assert output[0].num_cached_tokens == 31


def test_a_pool_that_is_short(pair: Pair) -> None:
    right = tokens(run(pair.open(None), PROMPTS, 60))
    run(pair.open("producer"), PROMPTS, 1)
    consumer = pair.open("consumer", num_kv_blocks=13)
    assert tokens(run(consumer, PROMPTS, 60)) == right
    assert consumer.scheduler.stats().total_preemptions


def test_salts_keep_tenants_apart(pair: Pair) -> None:
    run(pair.open("producer"), [LONG], 1, cache_salt="a")
    consumer = pair.open("consumer")
    assert run(consumer, [LONG], 1, cache_salt="b")[0].num_cached_tokens == 0
    assert run(consumer, [LONG], 1, cache_salt="a")[0].num_cached_tokens == 64


def test_new_weights_forget_all(pair: Pair) -> None:
    producer, consumer = pair.open("producer"), pair.open("consumer")
    run(producer, [LONG], 1)
    producer.reset_prefix_cache()
    assert run(consumer, [LONG], 1)[0].num_cached_tokens == 0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16' here and 'float32' there"),
        ({"load_format": "dummy"}, "model is"),
        ({"block_size": 32}, 'kv_connector_options={"tokens_per_block": 32}'),
        ({"own": {"nmae": "x"}}, "['nmae']"),
        ({"own": {"tokens_per_block": 24}}, "multiples of 16"),
        ({"own": {"name": "a/b"}}, "letters, digits"),
        ({"kv_connector": "shared_memry"}, "Did you mean 'shared_memory'?"),
        ({"kv_role": "reader"}, "one of producer, consumer, both"),
        ({"kv_role": None}, "give both or neither"),
        ({"enable_prefix_caching": False}, "through the prefix cache"),
        ({"tensor_parallel_size": 2}, "parts of the KV"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(pair: Pair, changes: dict[str, Any], problem: str) -> None:
    pair.open("producer")
    with pytest.raises(ConfigError) as found:
        pair.open("consumer", **changes)
    assert problem in str(found.value)


def test_a_name_is_one_producers(pair: Pair) -> None:
    pair.open("producer")
    with pytest.raises(ConfigError, match="a name of its own"):
        pair.open("producer")


@pytest.mark.parametrize("params", [5, {"num_tokens": -1}, {"num_tokens": True}, {"wait_s": "soon"}, {"wait_s": 1e9}])
def test_bad_params_are_refused(pair: Pair, params: Any) -> None:
    engine = pair.open("consumer")
    with pytest.raises(InvalidRequestError, match="kv_transfer_params"):
        engine.add("x", {"prompt_token_ids": [1, 2], "kv_transfer_params": params}, greedy(1))
    assert not engine.has_work


class DictConnector(KVConnector):
    """The least that a connector can be: blocks in a dictionary of this process."""

    blocks: ClassVar[dict[KVBlockName, bytes]] = {}
    asked: ClassVar[list[KVBlockName]] = []
    block_tokens = 32  # type: ignore[assignment]
    hash_key = b"of this process"  # type: ignore[assignment]

    def contains(self, names: Sequence[KVBlockName]) -> list[bool]:
        return [name in self.blocks for name in names]

    def store(self, names: Sequence[KVBlockName], blocks: Sequence[memoryview]) -> None:
        for name, block in zip(names, blocks):
            assert block.nbytes == 2 * self.context.block_bytes[name.group]
            self.blocks[name] = bytes(block)

    def load(self, names: Sequence[KVBlockName]) -> list[bytes]:
        return [self.blocks[name] for name in names]

    def prefetch(self, names: Sequence[KVBlockName]) -> None:
        self.asked.extend(names)

    def finished(self, request_id: str, num_tokens: int) -> Mapping[str, Any]:
        return {"told": self.context.options["told"]}


class _Plugin:
    @staticmethod
    @hookimpl
    def dougong_kv_connectors() -> list[KVConnectorSpec]:
        return [
            KVConnectorSpec(name=name, abi=ABI, target=f"{__name__}:{kind}", options={"told": "by default"})
            for name, kind in (("dict", "DictConnector"), ("far", "FarConnector"))
        ]


def test_a_plugins_connector(llama: Path) -> None:
    plugins = load_plugins(BACKEND, extra=[("dict", _Plugin)])
    found = []
    for role in ("producer", "consumer"):
        options: dict[str, Any] = {"kv_connector": "dict", "kv_role": role, "plugins": plugins}
        engine = make(llama, **options)
        found.append(run(engine, [LONG], 12)[0])
        engine.close()
    first, second = found
    assert first.kv_transfer_params == {"num_tokens": 64, "told": "by default"}
    assert second.num_cached_tokens == 64 and tokens([first]) == tokens([second])
    assert DictConnector.asked == list(DictConnector.blocks)


class FarConnector(DictConnector):
    """Blocks that must be fetched: on a thread of its own, from `prefetch` on. `contains` and `load` never wait."""

    blocks: ClassVar[dict[KVBlockName, bytes]] = {}
    here: ClassVar[dict[KVBlockName, bytes]] = {}
    arrive: ClassVar[threading.Event] = threading.Event()
    fetches: ClassVar[list[threading.Thread]] = []

    def contains(self, names: Sequence[KVBlockName]) -> list[bool]:
        held = self.blocks if self.context.role.produces else self.here
        return [name in held for name in names]

    def load(self, names: Sequence[KVBlockName]) -> list[bytes]:
        return [self.here[name] for name in names]

    def prefetch(self, names: Sequence[KVBlockName]) -> None:
        def fetch() -> None:
            self.arrive.wait(60)
            self.here.update({name: self.blocks[name] for name in names if name in self.blocks})

        self.fetches.append(threading.Thread(target=fetch))
        self.fetches[-1].start()


def test_nobody_waits_for_a_connector_that_fetches(llama: Path) -> None:
    plugins = load_plugins(BACKEND, extra=[("dict", _Plugin)])
    options: dict[str, Any] = {"kv_connector": "far", "plugins": plugins}
    producer = make(llama, kv_role="producer", **options)
    first = run(producer, [LONG], 12)[0]
    producer.close()
    consumer = make(llama, kv_role="consumer", **options)
    asked = {"prompt_token_ids": LONG, "kv_transfer_params": {"num_tokens": 64, "wait_s": 60}}
    output = consumer.add("far", asked, greedy(12))
    other = consumer.add("other", {"prompt_token_ids": [8, 9]}, greedy(3))
    while not other.finished:
        consumer.step()
    assert not output.outputs[0].token_ids
    FarConnector.arrive.set()
    for thread in FarConnector.fetches:
        thread.join()
    while consumer.has_work:
        consumer.step()
    assert output.num_cached_tokens == 64 and tokens([output]) == tokens([first])
    consumer.close()


def _prefill(model: Path, name: str, pipe: Any) -> None:
    engine = make(model, "producer", name)
    pipe.send("ready")
    for prompts in iter(pipe.recv, None):
        pipe.send([output.kv_transfer_params for output in run(engine, prompts, 1)])
    engine.close()


@pytest.mark.prove  # test_arena has the two processes, the tests above the engines
def test_two_processes(pair: Pair) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_prefill, args=(pair.model, pair.name, there), daemon=True)
    process.start()
    right = tokens(run(pair.open(None), PROMPTS, 20))
    consumer = pair.open("consumer")
    assert here.poll(120) and here.recv() == "ready"
    here.send(PROMPTS)
    assert here.poll(60)
    outputs = run(consumer, PROMPTS, 20, here.recv())
    assert tokens(outputs) == right
    assert [output.num_cached_tokens for output in outputs] == [64, 32, 31, 0]
    here.send(None)
    process.join(60)
    assert process.exitcode == 0
