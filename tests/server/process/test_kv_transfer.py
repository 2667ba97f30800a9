"""Prefill on one server, decode on another: ``kv_transfer_params`` over HTTP, and what /metrics tells of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_harness import Served, served

PROMPT = "Once upon a time there was a roof that needed no nail. " * 3


def totals(server: Served) -> dict[str, float]:
    lines = [line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if "kv_transfer" in line]
    return {line.partition("{")[0][20:]: float(line.split()[-1]) for line in lines if line[0] != "#"}


@pytest.mark.prove
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_prefill_here_decode_there(tiny_model: Path, path: str) -> None:
    name = f"http-{os.getpid()}-{len(path)}"
    common: Any = {"kv_connector": "shared_memory", "dtype": "float32"}
    producer = common | {"kv_role": "producer", "kv_connector_options": {"name": name, "size_mib": 8}}
    consumer = common | {"kv_role": "consumer", "kv_connector_options": {"name": name}}
    body: Any = {"temperature": 0, "max_tokens": 12}
    body |= {"messages": [{"role": "user", "content": PROMPT}]} if "chat" in path else {"prompt": PROMPT}
    with served(tiny_model, producer) as prefill, served(tiny_model, consumer) as decode:
        first = httpx.post(f"{prefill.url}/v1/{path}", json=body | {"max_tokens": 1}, timeout=60).json()
        params = first["kv_transfer_params"]
        assert params["name"] == name and params["num_tokens"] >= 128
        right = httpx.post(f"{prefill.url}/v1/{path}", json=body, timeout=60).json()
        answer = httpx.post(f"{decode.url}/v1/{path}", json=body | {"kv_transfer_params": params}, timeout=60).json()
        assert "kv_transfer_params" not in answer
        for one in (right, answer):
            one["choices"][0].pop("kv_transfer_params", None)
        assert answer["choices"] == right["choices"]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == params["num_tokens"]
        found = totals(decode)
        assert found == {"stored_blocks_total": 0, "loaded_tokens_total": params["num_tokens"], "failures_total": 0}
        assert totals(prefill)["stored_blocks_total"] >= params["num_tokens"] // 16
        broken = body | {"kv_transfer_params": {"num_tokens": 128, "wait_s": 0.01}, "cache_salt": "other"}
        assert httpx.post(f"{decode.url}/v1/{path}", json=broken, timeout=60).json()["choices"] == right["choices"]
        assert totals(decode)["failures_total"] == 1


@pytest.mark.xdist_group("server")
def test_a_server_that_takes_no_kv_says_so(tiny: Served) -> None:
    asked = {"prompt": "a", "kv_transfer_params": {"num_tokens": 16}}
    answer = httpx.post(f"{tiny.url}/v1/completions", json=asked)
    assert answer.status_code == 400 and "--kv-connector" in answer.json()["error"]["message"]
