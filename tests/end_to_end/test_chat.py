"""Conversations through a chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_harness import greedy, opened

from dougong.errors import ConfigError, InvalidRequestError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_a_conversation_is_the_prompt_that_the_template_makes(tiny: dict[str, Path]) -> None:
    with opened(tiny["llama"]) as llm:
        text = "[system] Be brief.\n[user] Hi\n[assistant] "
        output = llm.chat(MESSAGES, greedy(6, detokenize=True), use_tqdm=False)[0]
        plain = llm.generate(text, greedy(6), use_tqdm=False)[0]
        assert output.prompt == text and output.prompt_token_ids == plain.prompt_token_ids
        assert output.outputs[0].token_ids == plain.outputs[0].token_ids
        both = llm.chat([MESSAGES, MESSAGES[1:]], greedy(6), use_tqdm=False)
        assert [o.prompt for o in both] == [text, "[user] Hi\n[assistant] "]
        own = llm.chat(MESSAGES, greedy(2), use_tqdm=False, chat_template="{{ messages|length }}")[0]
        assert own.prompt == "2"


def test_messages_that_the_template_refuses_are_a_wrong_request(tiny: dict[str, Path]) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    with opened(tiny["llama"]) as llm, pytest.raises(InvalidRequestError, match="System role not supported"):
        llm.chat(MESSAGES, greedy(2), use_tqdm=False, chat_template=strict)


def test_half_a_character_in_a_conversation(tiny: dict[str, Path]) -> None:
    with opened(tiny["llama"]) as llm, pytest.raises(InvalidRequestError, match="D83D at character 7"):
        llm.chat([{"role": "user", "content": "\ud83d"}], greedy(2), use_tqdm=False)


def test_what_a_conversation_lacks_is_said(tiny: dict[str, Path]) -> None:
    with opened(tiny["llama"]) as llm:
        llm.get_tokenizer().chat_template = None
        with pytest.raises(ConfigError, match="chat template"):
            llm.chat(MESSAGES, use_tqdm=False)
    with opened(tiny["llama"], skip_tokenizer_init=True) as llm:
        with pytest.raises(ConfigError, match="skip_tokenizer_init"):
            llm.get_tokenizer()
        with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
            llm.generate("text", greedy(2), use_tqdm=False)
        assert len(llm.generate([65, 66], greedy(2), use_tqdm=False)[0].outputs[0].token_ids) == 2
