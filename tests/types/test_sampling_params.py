"""Sampling options refuse what cannot be served, and say what is allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dougong.errors import InvalidRequestError
from dougong.types import SamplingParams


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0}, {"n": 1.5}, {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": "hot"}, {"top_p": 0},
        {"top_p": 1.1}, {"top_k": -2}, {"min_p": 2}, {"repetition_penalty": 0}, {"presence_penalty": 3},
        {"frequency_penalty": -3}, {"max_tokens": 0}, {"min_tokens": -1}, {"max_tokens": 2, "min_tokens": 3},
        {"logprobs": -2}, {"stop": ""}, {"stop": [""]}, {"stop_token_ids": [-1]}, {"stop_token_ids": "abc"},
        {"allowed_token_ids": []}, {"bad_words_ids": [[]]}, {"logit_bias": {5: 101}}, {"logit_bias": {"x": 1}},
        {"logit_bias": [1]}, {"seed": 1 << 64}, {"stop": "x", "detokenize": False}, {"temperature": True},
        {"temperature": 10**400}, {"top_p": math.inf}, {"n": 10**9}, {"stop": 5}, {"stop_token_ids": 5},
        {"bad_words": 5}, {"bad_words_ids": 5}, {"bad_words_ids": [5]}, {"allowed_token_ids": 5},
    ],
    ids=lambda wrong: str(wrong)[:40],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**wrong)
    assert any(name in str(error.value) for name in wrong)


def test_json_keys_and_single_strings_are_understood() -> None:
    sampling = SamplingParams(stop="END", logit_bias={"5": 1}, stop_token_ids=[3])  # type: ignore[dict-item, arg-type]
    assert sampling.stop == ("END",)
    assert sampling.logit_bias == {5: 1.0}
    assert sampling.stop_token_ids == (3,)


def test_none_stands_for_the_default_as_it_does_in_vllm() -> None:
    names = ("stop", "stop_token_ids", "bad_words", "bad_words_ids", "logit_bias", "allowed_token_ids")
    assert SamplingParams(**dict.fromkeys(names)) == SamplingParams()  # type: ignore[arg-type]


def test_zero_temperature_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=0.01).greedy
    assert SamplingParams(repetition_penalty=1.1).has_penalties
    assert not SamplingParams().has_penalties
