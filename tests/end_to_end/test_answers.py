"""What a request gives back: samples, text, log-probabilities, and options that steer them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_harness import EOS, VOCAB, Reference, check_clean, greedy, make_llm, opened, prompts

from dougong import LLM, SamplingParams
from dougong.engine import BeamSearchParams
from dougong.errors import InvalidRequestError
from dougong.types import FinishReason, RequestOutput


@pytest.fixture(scope="module")
def shared(tiny: dict[str, Path]) -> Iterator[LLM]:
    made = make_llm(tiny["llama"])
    yield made
    made.close()


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """One engine for all these tests, looked through after each."""
    yield shared
    check_clean(shared.engine)


@pytest.fixture(scope="module")
def reference(references: dict[str, Reference]) -> Reference:
    return references["llama"]


def one(llm: LLM, prompt: Any, sampling: SamplingParams) -> RequestOutput:
    return llm.generate(prompt, sampling, use_tqdm=False)[0]


# -- several completions, seeds --------------------------------------------------------------------------


def test_greedy_completions_of_one_prompt_are_alike_and_share_its_blocks(llm: LLM, reference: Reference) -> None:
    prompt = prompts()[4]
    llm.engine.reset_prefix_cache()
    output = llm.engine.add("five", prompt, greedy(12, n=5))
    most = 0
    while not output.finished:
        llm.engine.step()
        pool = llm.engine.kv.groups[0].pool
        most = max(most, pool.num_usable - pool.num_free)
    assert [c.index for c in output.outputs] == list(range(5))
    assert all(c.token_ids == reference.greedy(prompt, 12) for c in output.outputs)
    assert all(c.finish_reason is FinishReason.LENGTH for c in output.outputs)
    size = llm.engine.kv.groups[0].block_size
    alone = -(-(len(prompt) + 12) // size)
    assert most < 5 * alone  # at the least, the full blocks of the prompt are held once


def test_samples_differ_and_are_repeatable(llm: LLM) -> None:
    sampling = SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    first, second = (one(llm, [prompts()[2]], sampling) for _ in range(2))
    ids = [tuple(c.token_ids) for c in first.outputs]
    assert len(set(ids)) == 4
    assert ids == [tuple(c.token_ids) for c in second.outputs]
    alone = one(llm, [prompts()[2]], replace(sampling, n=1))
    assert tuple(alone.outputs[0].token_ids) == ids[0]


def test_a_seeded_request_does_not_depend_on_what_shares_its_batch(tiny: dict[str, Path], llm: LLM) -> None:
    items = prompts()
    own = SamplingParams(temperature=0.9, top_k=40, top_p=0.95, seed=5, max_tokens=16, ignore_eos=True)
    alone = one(llm, [items[3]], own).outputs[0].token_ids
    others = SamplingParams(temperature=1.3, min_p=0.01, presence_penalty=0.5, max_tokens=20, ignore_eos=True)
    outputs = llm.generate(items, [own if i == 3 else others for i in range(len(items))], use_tqdm=False)
    assert outputs[3].outputs[0].token_ids == alone
    with opened(tiny["llama"], num_kv_blocks=13, long_prefill_token_threshold=7, max_model_len=128) as small:
        outputs = small.generate(items, [own if i == 3 else others for i in range(len(items))], use_tqdm=False)
        assert outputs[3].outputs[0].token_ids == alone


def test_without_a_seed_two_engines_with_the_same_one_agree(tiny: dict[str, Path]) -> None:
    sampling = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    found = []
    for seed in (1, 1, 2):
        with opened(tiny["llama"], seed=seed) as llm:
            found.append([o.outputs[0].token_ids for o in llm.generate(prompts(3), sampling, use_tqdm=False)])
    assert found[0] == found[1] != found[2]


# -- text ------------------------------------------------------------------------------------------------


def test_streamed_pieces_join_to_the_whole(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    text = "".join(f"{c} " for c in "aé漢🙂")
    ids = tokenizer(text)["input_ids"]
    shown = [""]
    final = None
    for output in llm.stream(text, SamplingParams(temperature=1.0, seed=3, max_tokens=60, ignore_eos=True)):
        now = output.outputs[0].text
        assert now.startswith(shown[-1])
        shown.append(now)
        final = output
    assert final is not None and final.finished and final.prompt == text and final.prompt_token_ids == ids
    assert shown[-1] == tokenizer.decode(final.outputs[0].token_ids, skip_special_tokens=True)


def test_characters_of_several_tokens_come_whole(llm: LLM) -> None:
    """The model may write only the bytes of one character: whole ones and broken ones, never a part of a whole one."""
    tokenizer = llm.get_tokenizer()
    ids = tuple(tokenizer("🙂")["input_ids"])
    assert len(ids) == 4
    sampling = SamplingParams(temperature=2.0, seed=8, max_tokens=60, allowed_token_ids=ids, ignore_eos=True)
    shown = [""]
    for output in llm.stream("x", sampling):
        shown.append(output.outputs[0].text)
        assert shown[-1].startswith(shown[-2])
    assert shown[-1] == tokenizer.decode(output.outputs[0].token_ids)


def test_stop_strings(llm: LLM) -> None:
    prompt = prompts()[2]
    whole = one(llm, [prompt], greedy(40, detokenize=True)).outputs[0].text
    stop = next(whole[i : i + 3] for i in range(8, 30) if whole[i : i + 3].isascii() and whole[i : i + 3].strip())
    at = whole.index(stop)
    other = "never in the text \u2603"
    output = one(llm, [prompt], greedy(40, detokenize=True, stop=(other, stop)))
    completion = output.outputs[0]
    assert (completion.text, completion.stop_reason) == (whole[:at], stop)
    assert completion.finish_reason is FinishReason.STOP and len(completion.token_ids) < 40
    shown = [
        o.outputs[0].text for o in llm.stream({"prompt_token_ids": prompt}, greedy(40, detokenize=True, stop=stop))
    ]
    assert all(whole[:at].startswith(text) for text in shown)  # no part of it is ever shown
    kept = one(llm, [prompt], greedy(40, detokenize=True, stop=stop, include_stop_str_in_output=True))
    assert kept.outputs[0].text == whole[: at + len(stop)]
    late = one(llm, [prompt], greedy(40, detokenize=True, stop=stop, min_tokens=len(completion.token_ids)))
    assert len(late.outputs[0].token_ids) > len(completion.token_ids)


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(llm: LLM) -> None:
    prompt = prompts()[2]
    whole = one(llm, [prompt], greedy(12, detokenize=True)).outputs[0].text
    output = one(llm, [prompt], greedy(12, detokenize=True, stop=(whole[-2:] + "\u2603", whole[-1] + "\u2603")))
    assert output.outputs[0].text == whole and output.outputs[0].finish_reason is FinishReason.LENGTH


def test_stop_tokens_and_the_end_token(llm: LLM, reference: Reference) -> None:
    prompt = prompts()[2]
    tokens = reference.greedy(prompt, 20)
    place = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
    completion = one(llm, [prompt], greedy(20, stop_token_ids=(tokens[place],), detokenize=True)).outputs[0]
    assert completion.token_ids == tokens[: place + 1] and completion.stop_reason == tokens[place]
    assert completion.finish_reason is FinishReason.STOP
    decode = llm.get_tokenizer().decode
    assert completion.text == decode(tokens[:place])
    shown = greedy(20, stop_token_ids=(tokens[place],), detokenize=True, include_stop_str_in_output=True)
    assert one(llm, [prompt], shown).outputs[0].text == decode(tokens[: place + 1])
    # The model's own end token, pushed by a bias at once, and held back by min_tokens.
    push = {"logit_bias": {EOS: 100.0}, "ignore_eos": False}
    ended = one(llm, [prompt], greedy(20, **push)).outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([EOS], FinishReason.STOP, None)
    held = one(llm, [prompt], greedy(20, **push, min_tokens=7)).outputs[0]
    assert len(held.token_ids) == 8 and held.token_ids[-1] == EOS and held.token_ids[:7] == tokens[:7]
    ignored = one(llm, [prompt], greedy(5, logit_bias={EOS: 100.0})).outputs[0]
    assert ignored.token_ids == [EOS] * 5 and ignored.finish_reason is FinishReason.LENGTH


def test_max_tokens_none_goes_on_to_the_end_of_the_context_or_of_the_pool(tiny: dict[str, Path]) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    prompt = prompts()[1]
    with opened(tiny["llama"], max_model_len=40) as llm:
        completion = one(llm, [prompt], sampling).outputs[0]
        assert len(completion.token_ids) == 40 - len(prompt)
        assert completion.finish_reason is FinishReason.LENGTH
    with opened(tiny["llama"], max_model_len=256, num_kv_blocks=4, enforce_eager=True) as llm:
        completion = one(llm, [prompt], sampling).outputs[0]
        assert len(completion.token_ids) == llm.engine.kv.capacity_tokens + 1 - len(prompt) < 256


# -- log-probabilities -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"long_prefill_token_threshold": 7, "num_kv_blocks": 13}], ids=["plain", "cut"]
)
def test_logprobs_are_those_of_transformers(
    tiny: dict[str, Path], reference: Reference, options: dict[str, Any]
) -> None:
    items = [item for item in prompts() if len(item) < 60]
    with opened(tiny["llama"], max_model_len=128, **options) as llm:
        outputs = llm.generate(items, greedy(10, logprobs=3, prompt_logprobs=2), use_tqdm=False)
        again = llm.generate(items[1], greedy(4, prompt_logprobs=0), use_tqdm=False)[0]
    for item, output in zip(items, outputs):
        completion = output.outputs[0]
        wanted = reference.logprobs(item + completion.token_ids)
        assert completion.logprobs is not None and len(completion.logprobs) == 10
        for step, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs)):
            check_entry(entry, token, wanted[len(item) - 1 + step], 3)
        assert completion.cumulative_logprob == pytest.approx(
            sum(entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs))
        )
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(item)
        assert output.prompt_logprobs[0] is None
        for place, entry in enumerate(output.prompt_logprobs[1:], 1):
            assert entry is not None
            check_entry(entry, item[place], wanted[place - 1], 2)
    # The prefix cache holds KV, not log-probabilities: they are computed again.
    assert again.prompt_logprobs is not None and len(again.prompt_logprobs) == len(items[1])


def check_entry(entry: dict[int, Any], token: int, wanted: torch.Tensor, count: int) -> None:
    assert next(iter(entry)) == token
    assert entry[token].logprob == pytest.approx(float(wanted[token]), abs=2e-3)
    assert entry[token].rank == int((wanted > wanted[token]).sum()) + 1
    best = wanted.topk(count).indices.tolist()
    assert set(entry) == {token, *best}
    for other in best:
        assert entry[other].logprob == pytest.approx(float(wanted[other]), abs=2e-3)
    assert [entry[other].rank for other in best] == list(range(1, count + 1))


def test_all_logprobs_sum_to_one_and_have_texts(llm: LLM) -> None:
    completion = one(llm, [prompts()[1]], greedy(2, logprobs=-1)).outputs[0]
    assert completion.logprobs is not None
    entry = completion.logprobs[0]
    assert len(entry) == VOCAB
    assert math.fsum(math.exp(found.logprob) for found in entry.values()) == pytest.approx(1, abs=1e-4)
    assert entry[65].decoded_token == llm.get_tokenizer().decode([65])


def test_siblings_share_the_prompt_logprobs(llm: LLM) -> None:
    llm.engine.reset_prefix_cache()
    output = one(llm, [prompts()[4]], greedy(4, n=3, prompt_logprobs=1, logprobs=1))
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompts()[4])
    assert all(c.logprobs is not None and len(c.logprobs) == 4 for c in output.outputs)


# -- options that change logits --------------------------------------------------------------------------


def test_penalties_are_those_of_transformers(llm: LLM, reference: Reference) -> None:
    prompt = prompts()[2]
    wanted = reference.generate(prompt, max_new_tokens=24, repetition_penalty=1.7)
    assert one(llm, [prompt], greedy(24, repetition_penalty=1.7)).outputs[0].token_ids == wanted
    assert wanted != reference.greedy(prompt, 24)


def test_presence_and_frequency_penalties(llm: LLM, reference: Reference) -> None:
    prompt = prompts()[2]
    tokens = one(llm, [prompt], greedy(24, presence_penalty=2.0, frequency_penalty=1.0)).outputs[0].token_ids
    made: list[int] = []
    for token in tokens:  # the definition, token by token: what was generated counts, the prompt does not
        logits = reference.logprobs(prompt + made)[-1].clone()
        for seen in set(made):
            logits[seen] -= 2.0 + 1.0 * made.count(seen)
        assert token == int(logits.argmax())
        made.append(token)


def test_bad_words_bias_and_allowed_tokens(llm: LLM, reference: Reference) -> None:
    prompt = prompts()[2]
    tokens = reference.greedy(prompt, 24)
    pair = (tokens[3], tokens[4])
    wanted = reference.generate(prompt, max_new_tokens=24, bad_words_ids=[list(pair), [tokens[0]]])
    output = one(llm, [prompt], greedy(24, bad_words_ids=(pair, (tokens[0],))))
    assert output.outputs[0].token_ids == wanted != tokens
    word = llm.get_tokenizer().decode([tokens[0]])
    if word.isascii() and word.strip():
        by_text = one(llm, [prompt], greedy(24, bad_words=(word,)))
        assert tokens[0] not in by_text.outputs[0].token_ids
    biased = one(llm, [prompt], greedy(6, logit_bias={65: 100.0})).outputs[0].token_ids
    assert biased == [65] * 6
    allowed = one(llm, [prompt], greedy(12, allowed_token_ids=(66, 67, 68))).outputs[0].token_ids
    assert set(allowed) <= {66, 67, 68}


def test_options_of_one_request_leave_its_neighbours_alone(llm: LLM, reference: Reference) -> None:
    items = prompts()
    odd = [
        greedy(12, repetition_penalty=1.5), greedy(12, logit_bias={65: 50.0}), greedy(12, bad_words_ids=((1,),)),
        SamplingParams(temperature=1.5, seed=1, max_tokens=12), greedy(12, min_tokens=4, logprobs=2),
    ]  # fmt: skip
    samplings = [odd[i // 2] if i % 2 else greedy(12) for i in range(len(items))]
    outputs = llm.generate(items, samplings, use_tqdm=False)
    for index in range(0, len(items), 2):
        assert outputs[index].outputs[0].token_ids == reference.greedy(items[index], 12)


# -- beam search -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
def test_beams_are_those_of_transformers(llm: LLM, reference: Reference, width: int) -> None:
    """Without an end token both definitions say the same."""
    for prompt in prompts()[1:4]:
        wanted = beams(reference, prompt, 8, width)
        found = llm.beam_search([prompt], BeamSearchParams(beam_width=width, max_tokens=8, ignore_eos=True))[0]
        assert [beam.token_ids for beam in found.sequences] == wanted
        for beam in found.sequences:
            logprobs = reference.logprobs(prompt + beam.token_ids)[len(prompt) - 1 :]
            total = sum(float(logprobs[i, token]) for i, token in enumerate(beam.token_ids))
            assert beam.cumulative_logprob == pytest.approx(total, abs=5e-3)
            assert beam.finish_reason is FinishReason.LENGTH
            assert beam.text == llm.get_tokenizer().decode(beam.token_ids, skip_special_tokens=True)


def beams(reference: Reference, prompt: list[int], count: int, width: int) -> list[list[int]]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = reference.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0,
            max_new_tokens=count, num_beams=width, num_return_sequences=width,
        )  # fmt: skip
    found: list[list[int]] = out[:, len(prompt) :].tolist()
    return found


def test_beams_keep_to_the_tenant_s_salt(llm: LLM) -> None:
    """What one tenant's search leaves in the prefix cache, no other tenant finds."""
    llm.engine.reset_prefix_cache()
    prompt = prompts()[5]
    search = BeamSearchParams(beam_width=2, max_tokens=2, ignore_eos=True)
    salted = llm.beam_search({"prompt_token_ids": prompt, "cache_salt": "one"}, search)[0]
    assert one(llm, [prompt], greedy(1)).num_cached_tokens == 0
    again = one(llm, {"prompt_token_ids": prompt, "cache_salt": "one"}, greedy(1))
    assert again.num_cached_tokens > 0
    assert [beam.token_ids for beam in salted.sequences] == [
        beam.token_ids for beam in llm.beam_search([prompt], search)[0].sequences
    ]


@pytest.mark.parametrize("wrong", [{"beam_width": 0}, {"max_tokens": 0}, {"beam_width": 2.5}, {"max_tokens": "9"}])
def test_wrong_beams(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=r"integers >= 1"):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, **wrong})


def test_beams_that_end(llm: LLM, reference: Reference) -> None:
    """Two steps, wide enough to see every pair: the best of all sequences that end with the end token or are full."""
    prompt = prompts()[1]
    first = reference.logprobs(prompt)[-1]
    scores = {(EOS,): float(first[EOS])}
    second = torch.stack([reference.logprobs([*prompt, token])[-1] for token in range(VOCAB)])
    for a in range(VOCAB):
        if a != EOS:
            for b in range(VOCAB):
                scores[(a, b)] = (float(first[a]) + float(second[a, b])) / 2
    best = sorted(scores, key=lambda ids: -scores[ids])[:6]
    found = llm.beam_search([prompt], BeamSearchParams(beam_width=VOCAB, max_tokens=2))[0].sequences[:6]
    assert [tuple(beam.token_ids) for beam in found] == best
    assert all((beam.finish_reason is FinishReason.STOP) == (beam.token_ids[-1] == EOS) for beam in found)
