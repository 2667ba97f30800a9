"""A wrong request is refused with what to do, and the request beside it never notices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_harness import VOCAB, Reference, check_clean, edit_config, greedy, make_llm, opened, prompts, settle

from dougong import LLM, SamplingParams
from dougong.errors import EngineError, InvalidRequestError
from dougong.types import FinishReason, RequestOutput

COUNT = 14


@pytest.fixture(scope="module")
def shared(tiny: dict[str, Path]) -> Iterator[LLM]:
    made = make_llm(tiny["llama"], max_model_len=128, num_kv_blocks=12, max_num_seqs=4)
    yield made
    made.close()


@dataclass
class Beside:
    """An engine with a good request under way."""

    llm: LLM
    good: RequestOutput
    expected: list[int]


@pytest.fixture
def beside(shared: LLM, references: dict[str, Reference]) -> Iterator[Beside]:
    """After the test the good request must have transformers' tokens and nothing may be left."""
    prompt = prompts()[2]
    good = shared.engine.add("good", prompt, greedy(COUNT))
    for _ in range(3):
        shared.engine.step()
    expected = references["llama"].greedy(prompt, COUNT)
    yield Beside(shared, good, expected)
    check_clean(shared.engine)
    assert good.outputs[0].token_ids == expected and good.outputs[0].finish_reason is FinishReason.LENGTH


BAD_PROMPTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty text": ("", {}, "prompt is empty"),
    "no tokens": ({"prompt_token_ids": []}, {}, "prompt is empty"),
    "longer than the context": ([5] * 128, {}, "128 tokens; the context holds 128.*max_model_len"),
    "too much for the pool": ([5] * 100, {"max_tokens": 27, "n": 1}, ""),
    "an id too large": ([5, VOCAB], {}, f"{VOCAB}.*0 to {VOCAB - 1}"),
    "a negative id": ([5, -1], {}, "-1"),
    "no integer": ([5, 1.5], {}, "1.5"),
    "a truth value": ([True], {}, "True"),
    "bytes": (b"abc", {}, "bytes"),
    "half a character": ("so \ud83d", {}, r"the prompt is not valid Unicode: a lone surrogate U\+D83D at character 3"),
    "unknown key": ({"text": "hi"}, {}, "'prompt'"),
    "nothing in it": ({"prompt": None}, {}, "nothing in it"),
    "no text": ({"prompt": 5}, {}, "prompt=5"),
    "no list": ({"prompt_token_ids": 5}, {}, "prompt_token_ids=5"),
    "text for ids": ({"prompt_token_ids": "abc"}, {}, "prompt_token_ids='abc'"),
    "salt": ({"prompt_token_ids": [5], "cache_salt": 5}, {}, "cache_salt=5"),
    "half a character of salt": ({"prompt_token_ids": [5], "cache_salt": "\udc00"}, {}, "cache_salt is not valid"),
    "stop token too large": ([5], {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
    "bias too large": ([5], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
    "allowed too large": ([5], {"allowed_token_ids": (VOCAB,)}, "allowed_token_ids"),
    "bad word too large": ([5], {"bad_words_ids": ((3, VOCAB),)}, "bad_words_ids"),
    "a bad word too long": ([5], {"bad_words_ids": ((3,) * 129,)}, "1 sequences of up to 129 tokens.* 128 each"),
    "too many bad words": ([5], {"bad_words_ids": ((3,),) * 8193}, "8193 sequences"),
    "a bad word of text too long": ([5], {"bad_words": ("so " * 50,)}, "2 sequences of up to 151 tokens"),
    "too many logprobs": ([5], {"logprobs": VOCAB + 1}, "vocabulary has 260"),
    "too many prompt logprobs": ([5], {"prompt_logprobs": VOCAB + 1}, "vocabulary has 260"),
}


@pytest.mark.parametrize("case", [name for name, (_, _, match) in BAD_PROMPTS.items() if match])
def test_wrong_prompts_and_options(beside: Beside, case: str) -> None:
    prompt, options, match = BAD_PROMPTS[case]
    with pytest.raises(InvalidRequestError, match=match):
        beside.llm.engine.add("bad", prompt, greedy(4, **options))


def test_a_minimum_larger_than_any_integer_of_the_device(beside: Beside) -> None:
    """It means to go on to the end of the context, and must not fail the step of everybody else."""
    huge = beside.llm.engine.add("huge", [7], greedy(6, min_tokens=10**30, max_tokens=None, stop_token_ids=(9,)))
    while not huge.finished:
        beside.llm.engine.step()
    assert huge.outputs[0].error is None and huge.outputs[0].finish_reason is FinishReason.LENGTH
    assert 9 not in huge.outputs[0].token_ids


def test_priority_is_an_integer(beside: Beside) -> None:
    with pytest.raises(InvalidRequestError, match=r"priority='high'"):
        beside.llm.engine.add("bad", [5], greedy(4), priority="high")  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [b"abc", 5, None, [b"abc"]], ids=repr)
def test_what_is_no_prompt_is_refused_offline_too(beside: Beside, prompt: Any) -> None:
    """Bytes are a sequence of integers, and no token ids."""
    with pytest.raises(InvalidRequestError, match=f"a prompt of type {type(prompt).__name__}|type bytes"):
        beside.llm.generate(prompt, greedy(4), use_tqdm=False)


def test_a_request_that_the_pool_can_never_hold_names_the_option_to_change(tiny: dict[str, Path]) -> None:
    with opened(tiny["llama"], max_model_len=256, num_kv_blocks=5) as llm:
        capacity = llm.engine.kv.capacity_tokens
        assert capacity < 256
        with pytest.raises(InvalidRequestError, match=rf"pool holds {capacity}\b.*num_kv_blocks to at least"):
            llm.generate([5] * (capacity + 5), greedy(4), use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="lower max_tokens"):
            llm.generate([5] * 10, greedy(capacity), use_tqdm=False)
        assert len(llm.generate([5] * (capacity - 3), greedy(4), use_tqdm=False)[0].outputs[0].token_ids) == 4


def test_ids_in_use_and_wrong_options(beside: Beside) -> None:
    engine = beside.llm.engine
    with pytest.raises(InvalidRequestError, match=r"'good' is in use"):
        engine.add("good", [5])
    with pytest.raises(InvalidRequestError, match=r"give a SamplingParams"):
        engine.add("bad", [5], {"temperature": 0})  # type: ignore[arg-type]
    engine.add("good-x", [5], greedy(2, n=2))
    with pytest.raises(InvalidRequestError, match=r"good-x-1"):  # the name of one of the two
        engine.add("good-x-1", [5], greedy(2))


def test_one_wrong_prompt_of_a_batch_starts_none_of_it(beside: Beside) -> None:
    llm = beside.llm
    running = llm.engine.scheduler.num_waiting
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate([[5, 6], [7], []], greedy(4), use_tqdm=False)
    assert llm.engine.scheduler.num_waiting == running
    with pytest.raises(InvalidRequestError, match="2 entries for 3 prompts"):
        llm.generate([[5], [6], [7]], [greedy(1), greedy(1)], use_tqdm=False)


# -- abort in every state --------------------------------------------------------------------------------


def test_abort_unknown_and_finished(beside: Beside) -> None:
    engine = beside.llm.engine
    assert engine.abort("never") is None
    output = engine.add("short", [5, 6], greedy(1))
    while not output.finished:
        engine.step()
    assert engine.abort("short") is None
    assert output.outputs[0].finish_reason is FinishReason.LENGTH


def test_abort_before_its_first_step(beside: Beside) -> None:
    engine = beside.llm.engine
    output = engine.add("bad", [5] * 40, greedy(5))
    assert engine.abort("bad") is output
    assert output.finished and output.outputs[0].finish_reason is FinishReason.ABORT
    assert all(changed is not output for changed in engine.step())


def test_abort_while_it_waits_for_a_seat(beside: Beside) -> None:
    engine = beside.llm.engine
    others = [engine.add(f"o{i}", [5 + i], greedy(6)) for i in range(6)]
    engine.step()
    assert engine.scheduler.num_waiting
    assert engine.abort("o5") is others[5]
    settle(engine)
    assert all(output.outputs[0].finish_reason is FinishReason.LENGTH for output in others[:5])


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in-turn"])
@pytest.mark.parametrize("steps", range(1, 9))
def test_abort_after_any_number_of_steps(
    tiny: dict[str, Path], references: dict[str, Reference], overlap: bool, steps: int
) -> None:
    """Prefilling (three chunks), running, with a step in flight; n > 1; the good one beside it goes on."""
    engine = _engine(tiny, overlap)
    items = prompts()
    good = engine.add("good", items[1], greedy(10))
    bad = engine.add("bad", items[2], greedy(6, n=2))
    for _ in range(steps):
        engine.step()
    free = engine.kv.groups[0].pool.num_free
    before = [len(completion.token_ids) for completion in bad.outputs]
    if not bad.finished:
        assert engine.abort("bad") is bad
        assert engine.kv.groups[0].pool.num_free > free or not any(before)
    engine.scheduler.check_integrity()
    check_clean(engine)
    assert bad.finished and [len(completion.token_ids) for completion in bad.outputs] == before
    assert good.outputs[0].token_ids == references["llama"].greedy(items[1], 10)


_ENGINES: dict[bool, LLM] = {}


def _engine(tiny: dict[str, Path], overlap: bool) -> Any:
    if overlap not in _ENGINES:
        _ENGINES[overlap] = make_llm(tiny["llama"], overlap=overlap, long_prefill_token_threshold=12)
    return _ENGINES[overlap].engine


def test_abort_of_a_preempted_request(tiny: dict[str, Path], references: dict[str, Reference]) -> None:
    items = [item for item in prompts() if len(item) < 60]
    with opened(tiny["llama"], num_kv_blocks=13, max_model_len=128) as llm:
        engine = llm.engine
        outputs = {f"r{i}": engine.add(f"r{i}", item, greedy(40)) for i, item in enumerate(items)}
        victim = None
        while victim is None:
            engine.step()
            victim = next((r for r in engine.scheduler.waiting() if r.num_preemptions), None)
        assert engine.abort(victim.request_id) is outputs[victim.request_id]
        settle(engine)
        for (name, output), item in zip(outputs.items(), items):
            if name != victim.request_id:
                assert output.outputs[0].token_ids == references["llama"].greedy(item, 40)


# -- what fails inside -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama with NaN for one token's embedding."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("poisoned")
    model = AutoModelForCausalLM.from_pretrained(tiny["llama"], dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[201] = float("nan")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny["llama"] / name).read_bytes())
    return folder


@pytest.mark.parametrize(
    "sampling", [greedy(8), SamplingParams(temperature=1.0, seed=1, max_tokens=8)], ids=["greedy", "random"]
)
def test_nan_logits_end_only_their_own_request(
    poisoned: Path, references: dict[str, Reference], sampling: SamplingParams
) -> None:
    good = [item for item in prompts() if 201 not in item and 201 not in references["llama"].greedy(item, 8)]
    with opened(poisoned) as llm:
        for round_ in range(2):  # the second time, the good ones use blocks that held NaN
            items = [[5, 201, 7], *good, [9] * 30 + [201]]
            samplings = [sampling, *[greedy(8)] * len(good), sampling]
            outputs = llm.generate(items, samplings, use_tqdm=False)
            for output in (outputs[0], outputs[-1]):
                completion = output.outputs[0]
                assert output.finished and completion.finish_reason is FinishReason.ERROR, round_
                assert completion.error is not None and "NaN" in completion.error and not completion.token_ids
            for item, output in zip(good, outputs[1:-1]):
                assert output.outputs[0].token_ids == references["llama"].greedy(item, 8)
            llm.engine.reset_prefix_cache()


class Fault(RuntimeError):
    pass


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "in-turn"])
@pytest.mark.parametrize("place", ["before", "inside", "result"])
def test_a_step_that_raises_ends_its_requests_and_the_engine_goes_on(
    tiny: dict[str, Path], references: dict[str, Reference], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, place: str, overlap: bool,
) -> None:  # fmt: skip
    items = prompts()
    with opened(tiny["llama"], overlap=overlap, max_num_seqs=3) as llm:
        engine, runner = llm.engine, llm.engine.runner
        outputs = [engine.add(f"r{i}", item, greedy(COUNT, n=1 + i % 2)) for i, item in enumerate(items)]
        for _ in range(6):
            engine.step()
        done = [output for output in outputs if output.finished]
        with monkeypatch.context() as patch:
            _break(patch, runner, place)
            engine.step()
        settle(engine)
        failed = [o for o in outputs if any(c.finish_reason is FinishReason.ERROR for c in o.outputs)]
        assert failed and not any(output in done for output in failed)
        for output in failed:
            for completion in output.outputs:
                assert completion.error is None or completion.error == "EngineError: the step failed: Fault: ouch"
        for item, output in zip(items, outputs):
            for completion in output.outputs:
                if completion.finish_reason is not FinishReason.ERROR:
                    assert completion.token_ids == references["llama"].greedy(item, COUNT)
                    assert completion.finish_reason is FinishReason.LENGTH
        assert len(failed) <= 4 < sum(o.outputs[0].finish_reason is FinishReason.LENGTH for o in outputs)
        again = llm.generate(items, greedy(COUNT), use_tqdm=False)
        assert [o.outputs[0].token_ids for o in again] == [references["llama"].greedy(item, COUNT) for item in items]
    assert "could not be launched" in caplog.text or "failed" in caplog.text


def _break(patch: pytest.MonkeyPatch, runner: Any, place: str) -> None:
    def ouch(*_: object, **__: object) -> Any:
        raise Fault("ouch")

    if place == "before":
        patch.setattr(runner, "execute", ouch)
    elif place == "inside":
        patch.setattr(runner, "_forward", ouch)
    else:
        plain = runner.execute

        def execute(plan: Any) -> Any:
            pending = plain(plan)
            pending._collect = ouch
            return pending

        patch.setattr(runner, "execute", execute)


def test_a_closed_engine_says_so(tiny: dict[str, Path]) -> None:
    llm = make_llm(tiny["llama"])
    output = llm.engine.add("r", [5], greedy(9))
    llm.engine.step()
    llm.close()
    llm.close()
    assert output.outputs[0].finish_reason is FinishReason.ABORT
    with pytest.raises(EngineError, match="closed"):
        llm.generate([5], greedy(1), use_tqdm=False)


def test_max_model_len_beyond_the_model_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    from dougong.errors import ConfigError

    with pytest.raises(ConfigError, match=r"max_model_len=1000.*512"):
        make_llm(tiny["llama"], max_model_len=1000)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny["llama"] / name).read_bytes())
    edit_config(tmp_path, max_position_embeddings=1024)
    with opened(tmp_path, max_model_len=1000, load_format="dummy", num_kv_blocks=80) as llm:
        assert llm.engine.max_model_len == 1000
