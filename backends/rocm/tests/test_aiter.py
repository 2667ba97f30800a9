"""aiter's attention on its twin against the core's reference, and every documented limit as a refusal."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import aiter_twin
import pytest
import torch

from dougong.hal import (
    HND,
    AttentionQuery,
    AttentionSpec,
    BatchView,
    Device,
    KVGroup,
    LayerArgs,
    Limits,
    RaggedKV,
    allocate_cache,
)
from dougong.hal.reference.attention import ReferenceAttention
from dougong_rocm.aiter import AITER_NHD, AiterAttention
from dougong_rocm.targets import gfx_target

BF16 = torch.bfloat16


class Here(Device):
    type = "cpu"

    def __init__(self, target: str = "gfx942") -> None:
        self.index = 0
        self.torch_device = torch.device("cpu")
        self.target = gfx_target(target)


@pytest.fixture(autouse=True)
def twin() -> None:
    aiter_twin.install()
    aiter_twin.calls.clear()
    aiter_twin.workspaces.clear()
    torch.manual_seed(0)


def spec(**more: Any) -> AttentionSpec:
    return AttentionSpec(**{**dict(num_heads=4, num_kv_heads=2, head_dim=64, dtype=BF16), **more})


def build(kernel: type, spec: AttentionSpec) -> Any:
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=AITER_NHD, manager_block=16, kernel_block=16)
    return kernel(spec, group, Limits(max_rows=8, max_tokens=64, max_kv_len=128, max_blocks=8), Here())


def answers(
    spec: AttentionSpec, q_lens: list[int], kv_lens: list[int], subject: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    cache = allocate_cache(spec, AITER_NHD, 40, 16, "cpu")
    for plane in cache.planes.values():
        plane.fill_(torch.nan)
    table = torch.randperm(40)[: 8 * len(q_lens) if len(q_lens) < 5 else 40].reshape(len(q_lens), -1).int()
    whole = BatchView.build(kv_lens, kv_lens, table, 16, "cpu")
    k, v = torch.randn(2, whole.num_tokens, 2, 64).to(BF16)
    cache.write(whole.groups[0].slots, k, v)
    batch = BatchView.build(q_lens, kv_lens, table, 16, "cpu", slots=torch.arange(sum(q_lens)))
    q = torch.randn(batch.num_tokens, 8, 64).to(BF16)[:, :4]
    found = []
    for one in (subject or build(AiterAttention, spec), build(ReferenceAttention, spec)):
        plan = one.new_plan()
        one.plan(batch, plan)
        out = torch.full((batch.num_tokens, 4, 64), torch.nan, dtype=BF16)
        one.run(plan, LayerArgs(), q, cache, out=out)
        found.append(out)
    return found[0], found[1]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "called"),
    [
        ([1, 1, 1], [33, 0, 16], ["paged_attention_v1"]),
        ([20, 3], [20, 70], ["flash_attn_varlen_func"]),
        ([1, 1, 7, 0], [90, 5, 40, 12], ["paged_attention_v1", "flash_attn_varlen_func"]),
        ([5], [3], ["flash_attn_varlen_func"]),
        ([3], [0], []),
    ],
)
def test_agrees_with_the_reference(
    q_lens: list[int], kv_lens: list[int], called: list[str], softcap: float | None
) -> None:
    got, want = answers(spec(softcap=softcap), q_lens, kv_lens)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert aiter_twin.calls == called


def test_a_workspace_is_the_call_s_alone() -> None:
    """In a capture it is the graph's pool's. Were it the kernel's, a larger batch would free it under the graph."""
    kernel = build(AiterAttention, spec())
    answers(spec(), [1], [33], kernel)
    assert [found() for found in aiter_twin.workspaces] == [None]


def test_ragged_keys_and_values() -> None:
    s = spec(causal=False)
    lens = [20, 1, 5]
    batch = BatchView.build(lens, lens, torch.zeros(3, 2, dtype=torch.int32), 16, "cpu")
    kv = RaggedKV(*torch.randn(2, 26, 2, 64).to(BF16), batch.cu_q, batch.host_cu_q)
    q, found = torch.randn(26, 4, 64).to(BF16), []
    for kernel in (AiterAttention, ReferenceAttention):
        one = build(kernel, s)
        plan = one.new_plan()
        one.plan(batch, plan)
        found.append(torch.full((26, 4, 64), torch.nan, dtype=BF16))
        one.run(plan, LayerArgs(), q, kv, out=found[-1])
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("more", "query", "words"),
    [
        (dict(head_dim=80), {}, "head dim 80/80.*nearest: 64"),
        (dict(head_dim_v=128), {}, "K and V alike"),
        (dict(dtype=torch.float32), {}, "bfloat16 or float16"),
        (dict(kv_dtype=torch.float8_e4m3fnuz), {}, "a cache in torch.float8_e4m3fnuz"),
        (dict(num_heads=32, num_kv_heads=1), {}, "32 query heads per kv head: at most 16"),
        (dict(window=9), {}, "a window"),
        (dict(sinks=True), {}, "sinks"),
        (dict(alibi=True), {}, "ALiBi"),
        (dict(lse=True), {}, "LSE"),
        (dict(causal=False), {}, "no mask over a cache"),
        ({}, dict(block_size=64), "block size 64: 16 or 32.*nearest: 32"),
        ({}, dict(layout=HND), "KV layout hnd"),
        ({}, dict(batch_invariant=True), "batch invariance"),
    ],
)
def test_limits_are_refused(more: dict[str, Any], query: dict[str, Any], words: str) -> None:
    asked = AttentionQuery(**{**dict(spec=spec(**more), layout=AITER_NHD, block_size=16), **query})
    assert any(re.search(words, str(one)) for one in AiterAttention.supports(asked, Here()))


@pytest.mark.parametrize("target", ["gfx90a", "gfx1100"])
def test_other_targets_are_refused(target: str) -> None:
    asked = AttentionQuery(spec=spec(), layout=AITER_NHD, block_size=16)
    assert AiterAttention.supports(asked, Here()) == ()
    assert target in str(AiterAttention.supports(asked, Here(target))[0])


def test_an_aiter_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = AttentionQuery(spec=spec(), layout=AITER_NHD, block_size=16)
    monkeypatch.setitem(sys.modules, "aiter", SimpleNamespace())
    assert "too old" in str(AiterAttention.supports(asked, Here())[0])
    monkeypatch.setitem(sys.modules, "aiter", None)
    assert AiterAttention.supports(asked, Here())[0].nearest == "the triton provider"
