"""Every call against the libraries' schemas and rules, on fake tensors of the real device type ``xpu:0``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from xpu_cases import KERNELS, build, spec

from dougong.hal import Device, GroupView, LayerArgs, allocate_cache
from dougong.hal.batch import BatchView
from dougong_xpu.twin import TwinRefusal


class FakeXpu(Device):
    type = "xpu"

    def __init__(self) -> None:
        self.index = 0
        self.torch_device = torch.device("xpu", 0)


def step(rows: int, queries: int) -> BatchView:
    """A batch on xpu:0, under the fake mode. Host tensors are real numbers elsewhere; here shapes and dtypes count."""
    where, tokens = torch.device("xpu", 0), rows * queries
    ints = dict(dtype=torch.int32, device=where)
    view = GroupView(
        kv_len=torch.empty(rows, **ints), host_kv_len=None, max_kv_len=100, block_table=torch.empty(rows, 4, **ints),
        slots=torch.empty(tokens, dtype=torch.int64, device=where),
    )  # fmt: skip
    host = torch.arange(rows + 1, dtype=torch.int32) * queries
    return BatchView(rows, tokens, rows if queries == 1 else 0, queries, torch.empty(rows + 1, **ints), host, (view,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("library", ["vllm", "sgl"])
def test_calls_match_the_schemas(library: str, queries: int, dtype: torch.dtype) -> None:
    kernel, layout, block = KERNELS[library]
    s = spec(dtype=dtype)
    with FakeTensorMode():
        device = FakeXpu()
        one = build(kernel, s, layout, block, device)
        cache = allocate_cache(s, layout, 9, block, device.torch_device)
        batch, plan = step(3, queries), one.new_plan()
        plan.batch = batch  # working it out indexes, see plans.head
        qkv = torch.empty(batch.num_tokens, 8, 64, dtype=dtype, device=device.torch_device)
        out = torch.empty(batch.num_tokens, 4, 64, dtype=dtype, device=device.torch_device)
        if library == "vllm":
            one.write(LayerArgs(), qkv.narrow(1, 4, 2), qkv.narrow(1, 6, 2), cache, batch.groups[0].slots)
        one.run(plan, LayerArgs(), qkv.narrow(1, 0, 4), cache, out=out)
        assert out.device.type == "xpu"


def test_a_wrong_call_is_caught_on_fake_tensors() -> None:
    with FakeTensorMode():
        where = torch.device("xpu", 0)
        q = torch.empty(3, 4, 64, dtype=torch.bfloat16, device=where)
        cache = torch.empty(5, 64, 2, 64, dtype=torch.bfloat16, device=where)
        cu = torch.empty(4, dtype=torch.int32, device=where)
        good: dict[str, Any] = dict(
            seqused_k=torch.empty(3, dtype=torch.int32, device=where),
            block_table=torch.empty(3, 4, dtype=torch.int32, device=where),
        )
        from vllm_xpu_kernels.flash_attn_interface import flash_attn_varlen_func as attend

        assert attend(q, cache, cache, 1, cu, 100, **good).shape == q.shape
        for wrong, words in (
            ({"block_table": torch.empty(3, 4, dtype=torch.int64, device=where)}, "int32"),
            ({"softcap": 3.0}, "softcap"),
        ):
            with pytest.raises(TwinRefusal, match=words):
                attend(q, cache, cache, 1, cu, 100, **(good | wrong))
        with pytest.raises(TwinRefusal, match="multiples of 64"):
            attend(q, cache.narrow(1, 0, 16), cache.narrow(1, 0, 16), 1, cu, 100, **good)
