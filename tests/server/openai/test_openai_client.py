"""The real ``openai`` client against a served model, and answers against OpenAI's own types, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args, get_origin

import httpx
import openai
import pytest
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from server_harness import Served


@pytest.fixture(scope="module")
def client(tiny: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one


pytestmark = pytest.mark.xdist_group("server")
HELLO: Any = [{"role": "user", "content": "Hello"}]

#: Fields that dougong's answers add to OpenAI's; vLLM's clients know them.
EXTRA = {"reasoning_content", "stop_reason", "max_model_len", "root", "parent", "kv_transfer_params"}


def check_fields(body: Any, model: type[BaseModel], where: str = "") -> None:
    """Every field is one of OpenAI's (or of `EXTRA`), and every one that OpenAI requires is there, of its type."""
    model.model_validate(body, strict=True)
    unknown = set(body) - set(model.model_fields) - EXTRA
    assert not unknown, f"{where}{model.__name__}: {unknown}"
    for name, field in model.model_fields.items():
        if field.is_required():
            assert name in body, f"{where}{model.__name__}.{name} is missing"
        for kind in _models(field.annotation):
            values = body.get(name)
            for value in values if isinstance(values, list) else [values]:
                if isinstance(value, dict):
                    check_fields(value, kind, f"{where}{name}.")


def _models(hint: Any) -> list[type[BaseModel]]:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return [hint]
    found = [kind for part in get_args(hint) for kind in _models(part)] if get_origin(hint) else []
    return found if len(found) == 1 else []


def test_a_chat_answer_has_openais_fields(tiny: Served, client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 6, "temperature": 0, "n": 2,
                "logprobs": True, "top_logprobs": 3}  # fmt: skip
    whole = client.chat.completions.create(**ask)
    body = httpx.post(f"{tiny.url}/v1/chat/completions", json=ask).json()
    check_fields(body, ChatCompletion)
    assert whole.model == "tiny"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert whole.usage.prompt_tokens + 12 == whole.usage.total_tokens
    first, second = whole.choices
    assert first.message.content == second.message.content
    assert first.finish_reason == "length"
    assert first.logprobs is not None and first.logprobs.content is not None
    assert len(first.logprobs.content) == 6
    assert all(len(one.top_logprobs) == 3 for one in first.logprobs.content)
    raw = b"".join(bytes(one.bytes or []) for one in first.logprobs.content)
    assert (first.message.content or "").replace("\ufffd", "") in raw.decode(errors="replace").replace("\ufffd", "")


def test_streamed_text_scores_and_usage_are_those_of_the_whole_answer(tiny: Served, client: openai.OpenAI) -> None:
    ask: Any = {"model": "alias", "messages": HELLO, "max_tokens": 20, "seed": 3, "n": 2, "logprobs": True}
    whole = client.chat.completions.create(**ask)
    texts, scores, ends, usage = ["", ""], [0, 0], ["", ""], None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        assert chunk.model == "alias"
        assert usage is None
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            if choice.logprobs is not None and choice.logprobs.content is not None:
                scores[choice.index] += len(choice.logprobs.content)
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert whole.usage is not None and usage is not None
    assert sum(scores) == usage.completion_tokens == whole.usage.completion_tokens
    body = httpx.post(f"{tiny.url}/v1/chat/completions", json=ask | {"stream": True, "max_tokens": 2}).text
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        check_fields(json.loads(line), ChatCompletionChunk)


def test_usage_in_every_chunk_grows_to_that_of_the_last(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    ask: Any = {"model": "tiny", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}, "stream": True}
    for streams in (
        lambda **more: client.chat.completions.create(messages=HELLO, **ask, **more),
        lambda **more: client.completions.create(prompt=["ab", "cde"], **ask, **more),
    ):
        *chunks, last = list(streams(stream_options=options))
        assert not last.choices and last.usage is not None
        made = [chunk.usage.completion_tokens for chunk in chunks]
        assert made == sorted(made) and made[-1] == last.usage.completion_tokens and made[0] >= 1
        assert chunks[-1].usage.prompt_tokens == last.usage.prompt_tokens
        only = list(streams(stream_options={"continuous_usage_stats": True}))
        assert all(chunk.choices and chunk.usage is not None for chunk in only)
        assert all(chunk.usage is None for chunk in list(streams(stream_options={"include_usage": True}))[:-1])


def test_a_request_may_bring_its_id(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": HELLO})):
        body: Any = text | {"max_tokens": 2, "request_id": "mine-7"}
        assert httpx.post(f"{tiny.url}/v1/{path}", json=body).json()["id"] == "mine-7"
        with monkeypatch.context() as patched:
            patched.setitem(tiny.client._by_id, "mine-7", SimpleNamespace())  # one that runs
            for stream in (False, True):
                again = httpx.post(f"{tiny.url}/v1/{path}", json=body | {"stream": stream})
                assert again.status_code == 400 and "in use" in again.json()["error"]["message"]


def test_completions_take_ids_and_batches_and_give_echo_scores_and_the_best_of_many(
    tiny: Served, client: openai.OpenAI
) -> None:
    ask: Any = {"model": "tiny", "prompt": ["ab", "cd"], "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 2}
    body = httpx.post(f"{tiny.url}/v1/completions", json=ask).json()
    # A prompt's first token has no log-probability: null, as OpenAI's server wrote it, which its types leave out.
    check_fields(httpx.post(f"{tiny.url}/v1/completions", json=ask | {"echo": False}).json(), Completion)
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice, prompt in zip(body["choices"], ask["prompt"]):
        assert choice["text"].startswith(prompt)
        assert len(choice["logprobs"]["tokens"]) == 6
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["text_offset"][:3] == [0, 1, 2]
    both = [tiny.client.tokenizer(prompt)["input_ids"] for prompt in ask["prompt"]]
    ids = client.completions.create(model="tiny", prompt=both, max_tokens=4, temperature=0)
    assert [f"{p}{c.text}" for p, c in zip(ask["prompt"], ids.choices)] == [c["text"] for c in body["choices"]]
    alone = client.completions.create(model="tiny", prompt=both[0], max_tokens=4, temperature=0)
    assert alone.choices[0].text == ids.choices[0].text
    best = client.completions.create(model="tiny", prompt="ab", max_tokens=4, n=2, best_of=5, seed=1, logprobs=0)
    assert len(best.choices) == 2
    means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in best.choices]  # type: ignore[union-attr,arg-type,misc]
    assert means[0] >= means[1]
    scored = client.completions.create(model="tiny", prompt="abcd", max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "abcd"
    assert scored.choices[0].logprobs is not None
    assert len(scored.choices[0].logprobs.tokens or []) == 4
    streamed = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    texts, tokens = ["", ""], [0, 0]
    for chunk in streamed:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += len(choice.logprobs.tokens or []) if choice.logprobs else 0
    assert texts == [choice["text"] for choice in body["choices"]]
    assert tokens == [6, 6]


def test_stop_bias_seed_and_length_work_as_openai_says(tiny: Served, client: openai.OpenAI) -> None:
    plain = client.completions.create(model="tiny", prompt="ab", max_tokens=30, temperature=0).choices[0].text
    cut = plain[10]
    stopped = client.completions.create(model="tiny", prompt="ab", max_tokens=30, temperature=0, stop=[cut]).choices[0]
    assert stopped.text == plain[: plain.index(cut)]
    assert stopped.finish_reason == "stop"
    (z,) = tiny.client.tokenizer("z")["input_ids"]
    forced = client.completions.create(model="tiny", prompt="ab", max_tokens=3, logit_bias={str(z): 100})
    assert forced.choices[0].text == "zzz"
    seeded = [
        client.completions.create(model="tiny", prompt="ab", max_tokens=8, seed=seed).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert seeded[0] == seeded[1] != seeded[2]


def test_usage_counts_tokens_of_the_prefix_cache_also_where_a_stop_string_ends_it(client: openai.OpenAI) -> None:
    ask: Any = {"model": "tiny", "prompt": "a long prompt that is asked twice " * 3, "max_tokens": 30, "seed": 1}
    first = client.completions.create(**ask)
    again = client.completions.create(**ask, stop=[first.choices[0].text[3]])
    assert again.choices[0].finish_reason == "stop"
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) > 50


def test_models_health_version_tokenize_and_back(tiny: Served, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    check_fields(httpx.get(f"{tiny.url}/v1/models/alias").json(), Model)
    assert httpx.get(f"{tiny.url}/health").json()["status"] == "ok"
    assert httpx.get(f"{tiny.url}/version").status_code == 200
    found = httpx.post(f"{tiny.url}/tokenize", json={"prompt": "héllo", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == 6
    assert httpx.post(f"{tiny.url}/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "héllo"}
    chat = httpx.post(f"{tiny.url}/tokenize", json={"messages": HELLO}).json()
    assert chat["count"] > 5


BAD = [
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": HELLO, "temperature": -1}, "temperature"),
    ("chat/completions", {"messages": HELLO, "temprature": 1}, "Did you mean 'temperature'"),
    ("chat/completions", {"messages": HELLO, "n": 10**9}, "n=1000000000"),
    ("chat/completions", {"messages": HELLO, "max_tokens": 0}, "max_tokens"),
    ("chat/completions", {"messages": HELLO, "top_logprobs": 3}, "logprobs=true"),
    ("chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "0 to 20"),
    ("chat/completions", {"messages": HELLO, "stop": ["x"] * 65}, "65 strings"),
    ("chat/completions", {"messages": HELLO, "functions": []}, "use tools"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "robot"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "text only",
    ),
    ("chat/completions", {"messages": HELLO, "tool_choice": "required"}, "without tools"),
    ("chat/completions", {"messages": HELLO, "chat_template": "x"}, "trust-request-chat-template"),
    ("chat/completions", {"messages": HELLO, "logit_bias": {"99999": 1}}, "99999"),
    ("completions", {"prompt": ""}, "empty"),
    ("completions", {"prompt": []}, "at least one"),
    ("completions", {"prompt": "x" * 600}, "600 tokens"),
    ("completions", {"prompt": [5, 1000]}, "1000"),
    ("completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("completions", {"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
    ("completions", {"prompt": "x", "seed": 10**40}, "seed"),
    ("completions", {"prompt": "x", "priority": "high"}, "priority"),
    ("completions", {"prompt": "x", "priority": 5}, "--scheduling-policy priority"),
    ("embeddings", {"input": "x", "dimensions": 10**6}, "dimensions"),
]


@pytest.mark.parametrize(("path", "body", "words"), BAD, ids=lambda value: str(value)[:40])
def test_a_wrong_request_is_told_what_is_wrong(tiny: Served, path: str, body: dict[str, Any], words: str) -> None:
    answer = httpx.post(f"{tiny.url}/v1/{path}", json={"model": "tiny"} | body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]


def test_errors_arrive_as_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1, stream=True)


def test_embeddings_have_openais_fields_unit_length_and_both_encodings(tiny: Served, client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "input": ["ab", "a longer text"], "encoding_format": "float"}
    body = httpx.post(f"{tiny.url}/v1/embeddings", json=ask).json()
    check_fields(body, CreateEmbeddingResponse)
    found = client.embeddings.create(model="tiny", input=["ab", "a longer text"])  # base64 on the wire
    for one, other in zip(found.data, body["data"], strict=True):
        assert one.embedding == pytest.approx(other["embedding"], abs=1e-6)
        assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-4)
    short = client.embeddings.create(model="tiny", input=[97, 98], dimensions=8).data[0].embedding
    assert len(short) == 8
    assert sum(x * x for x in short) == pytest.approx(1, abs=1e-4)
