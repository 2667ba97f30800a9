"""LangChain's and LlamaIndex's classes for OpenAI's API against a served model."""

import warnings
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from server_harness import Served

#: In `make prove`, since importing both frameworks takes longer than all that they ask.
pytestmark = [pytest.mark.prove, pytest.mark.xdist_group("clients"), pytest.mark.filterwarnings("ignore")]


class Place(BaseModel):
    """A place and what it is like."""

    city: Literal["Rome", "Bern"]
    warm: bool


def weather(city: Literal["Rome", "Bern"]) -> str:
    """The weather of a city."""
    return f"warm in {city}"


def langchain(served: Served, model: str, **options: Any) -> Any:
    langchain_openai = pytest.importorskip("langchain_openai")
    return langchain_openai.ChatOpenAI(
        base_url=f"{served.url}/v1", api_key="none", model=model, temperature=0, max_retries=0, **options
    )


def check_langchain(served: Served, model: str) -> None:
    chat = langchain(served, model, max_tokens=16)
    whole = chat.invoke("Hello")
    pieces = list(chat.stream("Hello"))
    assert "".join(piece.content for piece in pieces) == whole.content
    assert whole.usage_metadata["output_tokens"] <= 16
    roomy = langchain(served, model, max_tokens=400)
    for method in ("json_schema", "function_calling"):
        found = roomy.with_structured_output(Place, method=method).invoke("Rome is warm.")
        assert isinstance(found, Place)
    called = roomy.bind_tools([weather], tool_choice="weather").invoke("How is Rome?")
    (call,) = called.tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("Rome", "Bern")
    responses = langchain(served, model, max_tokens=16, use_responses_api=True).invoke("Hello")
    assert responses.text == whole.content


def llama_index(served: Served, model: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("llama_index.llms.openai_like")
        return module.OpenAILike(
            api_base=f"{served.url}/v1", api_key="none", model=model, temperature=0, max_retries=0, context_window=2048,
            is_chat_model=True, is_function_calling_model=True, **options,
        )  # fmt: skip


def check_llama_index(served: Served, model: str) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool

    messages = [ChatMessage(role="user", content="Hello")]
    chat = llama_index(served, model, max_tokens=16)
    whole = chat.chat(messages)
    *_, last = chat.stream_chat(messages)
    assert last.message.content == whole.message.content
    tool = FunctionTool.from_defaults(weather)
    roomy = llama_index(served, model, max_tokens=400)
    called = roomy.chat_with_tools([tool], user_msg="How is Rome?", tool_required=True, allow_parallel_tool_calls=False)
    (call,) = roomy.get_tool_calls_from_response(called)
    assert call.tool_name == "weather" and call.tool_kwargs["city"] in ("Rome", "Bern")


def test_langchain(roomy: Served) -> None:
    check_langchain(roomy, "tiny")


def test_llama_index(roomy: Served) -> None:
    check_llama_index(roomy, "tiny")


def test_frameworks_with_a_real_model(smollm2: Served) -> None:
    check_langchain(smollm2, "smollm2")
    check_llama_index(smollm2, "smollm2")
