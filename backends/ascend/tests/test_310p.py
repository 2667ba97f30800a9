"""310P: tiled cache, ATB's operators, every query a row of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import dougong_ascend
from dougong.hal import (
    NHD,
    AttentionQuery,
    AttentionSpec,
    Backend,
    BatchView,
    KVGroup,
    LayerArgs,
    Limits,
    allocate_cache,
    convert_blocks,
    open_backend,
)
from dougong.hal.reference.attention import ReferenceAttention
from dougong.plugins import load_plugins
from dougong_ascend.attention_310p import PagedAttention310P
from dougong_ascend.layouts import NZ
from dougong_ascend.twin import TwinRefusal, plugin
from dougong_ascend.twin.settings import settings

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float16)
BLOCK, BLOCKS = 16, 12


@pytest.fixture
def backend() -> Iterator[Backend]:
    before, settings.soc = settings.soc, "Ascend310P3"
    yield open_backend("ascend-twin", plugins=load_plugins(entries=(), extra=[("a", dougong_ascend), ("t", plugin)]))
    settings.soc = before


@pytest.mark.parametrize("causal", [True, False])
def test_attention(backend: Backend, causal: bool) -> None:
    spec = replace(SPEC, causal=causal)
    q_lens, kv_lens = [1, 1, 0, 5, 3], [17, 0, 4, 20, 2]
    query = AttentionQuery(spec=spec, layout=NZ, block_size=BLOCK)
    assert backend.choose_attention(query).target is PagedAttention310P
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=NZ, manager_block=BLOCK, kernel_block=BLOCK)
    limits = Limits(max_rows=8, max_tokens=16, max_kv_len=32, max_blocks=3)
    kernel = PagedAttention310P(spec, group, limits, backend.device)
    cache = backend.device.empty_cache(group, BLOCKS)
    host = allocate_cache(spec, NHD, BLOCKS, BLOCK, "cpu")
    for plane in host.planes.values():
        plane.fill_(torch.nan)
    convert_blocks(host, torch.arange(BLOCKS), cache, torch.arange(BLOCKS, device="npu"))
    generator = torch.Generator().manual_seed(0)
    table = torch.full((5, 3), 2**30, dtype=torch.int32)
    free = iter(range(1, BLOCKS))
    for row, kv_len in enumerate(kv_lens):
        for place in range(-(-kv_len // BLOCK)):
            table[row, place] = next(free)
        places = torch.arange(kv_len)
        slots = table[row].long()[places // BLOCK] * BLOCK + places % BLOCK
        k, v = torch.randn(2, kv_len, 2, 32, generator=generator).to(torch.float16)
        host.write(slots, k, v)
        kernel.write(LayerArgs(), k.to("npu"), v.to("npu"), cache, slots.to("npu"))
    q = torch.randn(sum(q_lens), 4, 32, generator=generator).to(torch.float16)
    answers = []
    for where, one, kv in (
        ("npu", kernel, cache),
        ("cpu", ReferenceAttention(spec, group, limits, backend.device), host),
    ):
        batch = BatchView.build(
            q_lens, kv_lens, table, BLOCK, where, slots=torch.zeros(10, dtype=torch.int64, device=where)
        )
        out = torch.full((10, 4, 32), torch.nan, dtype=torch.float16, device=where)
        plan = one.new_plan()
        one.plan(batch, plan)
        one.run(plan, LayerArgs(), q.to(where), kv, out=out)
        answers.append(out.cpu())
    torch.testing.assert_close(*answers, rtol=2**-9, atol=2**-10)


def test_blocks_go_to_the_host_and_back_bit_exact(backend: Backend) -> None:
    group = KVGroup(index=0, layers=(0,), spec=SPEC, layout=NZ, manager_block=BLOCK, kernel_block=BLOCK)
    here, back = (backend.device.empty_cache(group, 2) for _ in range(2))
    for plane in here.planes.values():
        plane.copy_(torch.randint(-(2**15), 2**15, plane.shape, dtype=torch.int16).view(torch.float16))
    there = allocate_cache(SPEC, NHD, 2, BLOCK, "cpu")
    ids = torch.arange(2)
    convert_blocks(here, ids.to("npu"), there, ids)
    convert_blocks(there, ids, back, ids.to("npu"))
    assert torch.equal(here.k.cpu().view(torch.int16), back.k.cpu().view(torch.int16))
    assert torch.equal(here.v.cpu().view(torch.int16), back.v.cpu().view(torch.int16))


def test_what_the_chip_has(backend: Backend) -> None:
    assert backend.device.dtypes == (torch.float16,) and backend.device.graphs is None
    assert backend.layouts()[0].name == "nz16"
    assert set(backend.candidates) == {"attention", "qk_norm_rope_write"}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"q": torch.zeros(2, 4, 32, dtype=torch.bfloat16)}, "float16 only"),
        ({"lens": torch.tensor([0, 1], dtype=torch.int32)}, "above 0"),
        ({"lens": torch.tensor([1, 1])}, "int32 on the host"),
        ({"lens": torch.tensor([1, 99], dtype=torch.int32)}, "beyond the table"),
        ({"table": torch.zeros(2, 3, dtype=torch.int64)}, "int32 table"),
        ({"table": torch.full((2, 3), 7, dtype=torch.int32)}, "leaves the cache"),
        ({"cache": torch.zeros(3, 4, 24, 16, dtype=torch.float16)}, "multiples of 16 up to 128"),
        ({"cache": torch.zeros(3, 16, 2, 32, dtype=torch.float16)}, "K·D/16"),
        ({"cache": torch.zeros(3, 32, 128, 16, dtype=torch.float16), "q": torch.zeros(2, 4, 256, dtype=torch.float16)},
         "at most 16384"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_refusals(backend: Backend, change: dict[str, torch.Tensor], rule: str) -> None:
    q = change.get("q", torch.zeros(2, 4, 32, dtype=torch.float16)).to("npu")
    cache = change.get("cache", torch.zeros(3, 4, 16, 16, dtype=torch.float16)).to("npu")
    table = change.get("table", torch.zeros(2, 3, dtype=torch.int32)).to("npu")
    lens = change.get("lens", torch.ones(2, dtype=torch.int32))
    with pytest.raises(TwinRefusal, match=rule):
        torch.ops.atb._npu_paged_attention(q, cache, cache, 2, 4, 1.0, table, lens, torch.empty_like(q))


def test_the_fused_operators_are_refused(backend: Backend) -> None:
    x = torch.zeros(1, 2, 1, 16, dtype=torch.float16, device="npu")
    with pytest.raises(TwinRefusal, match="not on 310P"):
        torch.ops.npu.npu_fused_infer_attention_score(x, x, x, num_heads=2, input_layout="BNSD")
    with pytest.raises(TwinRefusal, match="not documented for 310P"):
        torch.ops.npu.npu_rms_norm(x, x[0, 0, 0], 1e-6)
