"""Structured output: the text is what was asked for, in every way to run it, and others do not notice."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from e2e_harness import EOS, VOCAB, Reference, greedy, make_llm, opened, prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dougong import LLM, SamplingParams
from dougong.engine import AsyncEngine, Engine
from dougong.engine import grammars as engine_grammars
from dougong.errors import ConfigError, InvalidRequestError
from dougong.models import get_tokenizer
from dougong.types import FinishReason, StructuredOutput

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "blé", "😀"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
ASKED: dict[str, StructuredOutput] = {
    "schema": StructuredOutput(json=PERSON),
    "compact": StructuredOutput(json=PERSON, whitespace=False),
    "regex": StructuredOutput(regex=r"[A-Z][a-z]{2,5} \d{4}-\d\d"),
    "choice": StructuredOutput(choice=["yes", "yes, but", 'a "quoted" \\ one\nof two lines', "no"]),
    "lark": StructuredOutput(lark='start: "<" word ("," word)~0..3 ">"\nword: /[a-c]{1,4}/'),
    "gbnf": StructuredOutput(lark='root ::= ("ab" | "cd") [0-9]'),
}


def check(name: str, text: str) -> None:
    asked = ASKED[name]
    if asked.json is not None:
        jsonschema.validate(json.loads(text), PERSON)
        assert name != "compact" or not re.search(r"[,:{] |\n", re.sub(r'"[^"]*"', "", text))
    elif asked.choice is not None:
        assert text in asked.choice
    else:
        pattern = {"regex": asked.regex, "lark": "<[a-c]{1,4}(,[a-c]{1,4}){0,3}>", "gbnf": "(ab|cd)[0-9]"}[name]
        assert pattern is not None and re.fullmatch(pattern, text)


@pytest.fixture(scope="module")
def llm(tiny: dict[str, Path]) -> Iterator[LLM]:
    with opened(tiny["llama"]) as one:
        yield one


@pytest.mark.parametrize("name", ASKED)
def test_texts_are_what_was_asked_for(llm: LLM, name: str) -> None:
    params = [
        SamplingParams(structured=ASKED[name], max_tokens=150, temperature=t, seed=i, n=2)
        for i, t in enumerate((0.0, 0.7, 1.5))
    ]
    for output in llm.generate(["say", "it", "now"], params, use_tqdm=False):
        for completion in output.outputs:
            assert completion.finish_reason is FinishReason.STOP, completion
            check(name, completion.text)


def oracle(llm: LLM, reference: Reference, asked: StructuredOutput, prompt: list[int]) -> list[int]:
    """One token after the other, everything computed anew each time."""
    grammar = llm.engine.grammars.compile(asked)
    tokens: list[int] = []
    while len(tokens) < 150 and tokens[-1:] != [EOS]:
        guide = grammar.start(tokens)
        if guide.complete:
            break
        bits = np.zeros((1, -(-VOCAB // 32)), dtype=np.int32)
        grammar.fill([guide], bits)
        allowed = np.unpackbits(bits.view(np.uint8), bitorder="little")[:VOCAB].astype(bool)
        row = reference.logprobs([*prompt, *tokens])[-1].numpy()
        tokens.append(int(np.where(allowed, row, -np.inf).argmax()))
    return tokens


WAYS: dict[str, dict[str, Any]] = {
    "overlap": {},
    "in-turn": {"overlap": False},
    "preempted": {"num_kv_blocks": 16, "block_size": 16, "max_num_batched_tokens": 40},
    "chunks": {"long_prefill_token_threshold": 7, "enable_prefix_caching": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_tokens(tiny: dict[str, Path], references: dict[str, Reference], way: str) -> None:
    reference = references["llama"]
    items = prompts(8, seed=5)
    names = ["schema", "regex", "choice", "lark"]
    free, bound = items[:4], items[4:]
    with opened(tiny["llama"], **WAYS[way]) as one:
        guided = [SamplingParams(structured=ASKED[name], temperature=0.0, max_tokens=150) for name in names]
        mixed_items = [item for pair in zip(free, bound) for item in pair]
        mixed_params = [params for g in guided for params in (greedy(40), g)]
        outputs = one.generate(mixed_items, mixed_params, use_tqdm=False)
        for item, output in zip(free, outputs[::2]):
            assert list(output.outputs[0].token_ids) == reference.greedy(item, 40)
        for name, item, output in zip(names, bound, outputs[1::2]):
            assert list(output.outputs[0].token_ids) == oracle(one, reference, ASKED[name], item), name
            check(name, output.outputs[0].text)
        if way == "preempted":
            assert one.engine.stats.preemptions, "the pool was not small enough to test anything"


def test_guided_requests_take_part_in_every_step(tiny: dict[str, Path]) -> None:
    """They are scheduled ahead like free ones: no step is left out to wait for their tokens."""
    with opened(tiny["llama"]) as one:
        guided = SamplingParams(structured=StructuredOutput(regex="[ab]{60}"), max_tokens=80, temperature=0.0)
        outputs = one.generate([[65, 66], [67]], [guided, greedy(60)], use_tqdm=False)
        assert len(outputs[0].outputs[0].text) == len(outputs[1].outputs[0].token_ids) == 60
        assert one.engine.stats.steps <= 63


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=6)
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.integers(1, 6).map(lambda n: {"type": "string", "maxLength": n}),
        st.tuples(st.integers(-50, 0), st.integers(1, 500)).map(
            lambda p: {"type": "integer", "minimum": p[0], "maximum": p[1]}
        ),
        st.lists(texts, min_size=1, max_size=4, unique=True).map(lambda values: {"enum": values}),
        texts.map(lambda value: {"const": value}),
    )

    def inner(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        return st.one_of(
            st.dictionaries(texts, children, max_size=3).flatmap(
                lambda properties: st.lists(st.sampled_from(sorted(properties)), unique=True).map(
                    lambda required: {
                        "type": "object", "properties": properties, "required": required,
                        "additionalProperties": False,
                    }
                ) if properties else st.just({"type": "object", "additionalProperties": False})
            ),
            children.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
            st.lists(children, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
        )  # fmt: skip

    return st.recursive(leaves, inner, max_leaves=5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=schemas(), seed=st.integers(0, 1 << 30))
def test_any_schema_is_kept(llm: LLM, schema: dict[str, Any], seed: int) -> None:
    params = SamplingParams(structured=StructuredOutput(json=schema), max_tokens=220, temperature=1.0, seed=seed)
    (output,) = llm.generate(["x"], params, use_tqdm=False)
    completion = output.outputs[0]
    if completion.finish_reason is FinishReason.STOP:
        jsonschema.validate(json.loads(completion.text), schema)
    else:
        assert completion.finish_reason is FinishReason.LENGTH


def test_it_goes_together_with_other_options(llm: LLM) -> None:
    asked = StructuredOutput(regex="[ab]{20}")
    together = SamplingParams(
        structured=asked, max_tokens=40, temperature=1.0, seed=1, logprobs=2, frequency_penalty=1.0,
        logit_bias={ord("a"): -20.0}, stop=["aaaaa"], ignore_eos=True, min_tokens=30,
    )  # fmt: skip
    (output,) = llm.generate(["x"], together, use_tqdm=False)
    completion = output.outputs[0]
    assert re.fullmatch("[ab]{20}", completion.text) and completion.finish_reason is FinishReason.STOP
    assert completion.stop_reason is None and completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids)
    # A stop string ends it before the grammar does, and so does the budget.
    (output,) = llm.generate(["x"], SamplingParams(structured=StructuredOutput(regex="[ab]{5}!.*"), stop=["!"],
                                                   max_tokens=40), use_tqdm=False)  # fmt: skip
    assert re.fullmatch("[ab]{5}", output.outputs[0].text) and output.outputs[0].stop_reason == "!"
    (output,) = llm.generate(["x"], SamplingParams(structured=asked, max_tokens=7), use_tqdm=False)
    assert output.outputs[0].finish_reason is FinishReason.LENGTH and len(output.outputs[0].text) == 7


BOMBS: dict[str, dict[str, Any]] = {
    "multiples": {"json": {"allOf": [{"type": "integer", "multipleOf": p} for p in (7919, 104729, 1299709)]}},
    "all-of": {"json": {"allOf": [{"properties": {f"p{i}": {"pattern": f".*{i}.*"}}} for i in range(300)]}},
    "endless-reference": {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    "remote": {"json": {"$ref": "http://example.com/x.json"}},
    "unknown-type": {"json": {"type": "strin"}},
    "unknown-keyword": {"json": {"type": "array", "uniqueItems": True}},
    "impossible": {"json": {"type": "object", "properties": {"a": False}, "required": ["a"]}},
    "open-group": {"regex": "(("},
    "look-around": {"regex": "(?=a)b"},
    "no-start": {"lark": "begin: /a/"},
    "no-rule": {"lark": "start: other"},
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_cannot_be_compiled_is_refused_before_it_is_queued(llm: LLM, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="StructuredOutput") as caught:
        llm.generate(["x"], SamplingParams(structured=StructuredOutput(**BOMBS[name])), use_tqdm=False)
    assert len(str(caught.value)) < 700
    assert not llm.engine.has_work


def test_hard_expressions_stay_within_bounds(llm: LLM) -> None:
    hard = [r"(.*a.{0,60}b|.*c.{0,60}d){5}", r"((a{1,100}){1,100}){1,100}", "(a?){500}a{500}", r"(a+)+b(.*x.{30})"]
    params = [SamplingParams(structured=StructuredOutput(regex=one), max_tokens=12) for one in hard]
    for output in llm.generate(["x"] * len(hard), params, use_tqdm=False):
        assert output.outputs[0].finish_reason in (FinishReason.LENGTH, FinishReason.ERROR, FinishReason.STOP)


def test_a_slow_compilation_is_given_up_and_others_go_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from threading import Event

    release = Event()
    compiler = llm.engine.grammars
    plain = compiler._compile

    def slow(structured: StructuredOutput) -> Any:
        if structured.regex == "slow":
            release.wait(30)
        return plain(structured)

    monkeypatch.setattr(compiler, "_compile", slow)
    monkeypatch.setattr(engine_grammars, "_SECONDS", 0.05)
    try:
        for _ in range(3):
            with pytest.raises(InvalidRequestError, match="takes more than"):
                compiler.compile(StructuredOutput(regex="slow"))
        monkeypatch.setattr(engine_grammars, "_SECONDS", 30)
        assert compiler.compile(StructuredOutput(regex="quick"))
    finally:
        release.set()


def test_a_missing_library_is_named(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tiny["llama"]) as one:
        monkeypatch.setitem(sys.modules, "llguidance", None)
        with pytest.raises(ConfigError, match=r"pip install 'dougong\[structured\]'"):
            one.generate(["x"], SamplingParams(structured=StructuredOutput(regex="a")), use_tqdm=False)


def test_an_engine_without_a_tokenizer_still_keeps_to_grammars(tiny: dict[str, Path]) -> None:
    with opened(tiny["llama"], skip_tokenizer_init=True) as one:
        asked = SamplingParams(structured=StructuredOutput(choice=["yes", "no"]), max_tokens=9)
        (output,) = one.generate([[65, 66]], asked, use_tqdm=False)
        assert get_tokenizer(tiny["llama"]).decode(output.outputs[0].token_ids, skip_special_tokens=True) in (
            "yes",
            "no",
        )


def test_the_asynchronous_engine(tiny: dict[str, Path]) -> None:
    llm = make_llm(tiny["llama"])

    async def one(served: AsyncEngine, index: int, structured: StructuredOutput) -> str:
        text = ""
        params = SamplingParams(structured=structured, max_tokens=60, temperature=1.0, seed=index)
        async for output in served.generate("x", params, request_id=f"{index}"):
            text = output.outputs[0].text
        return text

    async def main(served: AsyncEngine) -> None:
        names = [name for name in ASKED if name not in ("schema", "compact")] * 2
        for name, text in zip(names, await asyncio.gather(*(one(served, i, ASKED[n]) for i, n in enumerate(names)))):
            check(name, text)
        with pytest.raises(InvalidRequestError):
            await one(served, 99, StructuredOutput(regex="(("))
        # The step that was launched ahead may still be on its way when the last text arrives.
        while await served.call(lambda engine: engine.has_work):
            await asyncio.sleep(0.01)

    served = AsyncEngine(engine=llm.engine)
    try:
        asyncio.run(main(served))
    finally:
        served.close()
    assert isinstance(served.engine, Engine)
