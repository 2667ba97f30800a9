"""Norms, rotation, activation and the fused write agree with the references that define them."""

from __future__ import annotations

import pytest
import torch

from dougong.hal import AttentionSpec, Backend, KVGroup, LayerArgs, QKVShape, RopeTable
from dougong.hal.reference import ops as reference
from dougong_ascend import ops
from dougong_ascend.layouts import HND_PAGED, NHD_PAGED

DTYPES = (torch.bfloat16, torch.float16)


def near(got: torch.Tensor, right: torch.Tensor) -> None:
    unit = 2**-8 if right.dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(got.cpu(), right, rtol=4 * unit, atol=4 * unit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("rows", [0, 3])
def test_norms(backend: Backend, dtype: torch.dtype, offset: float, rows: int) -> None:
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((rows, 48), (rows, 48), (48,)))
    on = [t.to("npu") for t in (x, residual, weight)]
    near(ops.rms_norm(on[0], on[2], 1e-5, offset), reference.rms_norm(x, weight, 1e-5, offset))
    got, right = ops.add_rms_norm(*on, 1e-5, offset), reference.add_rms_norm(x, residual, weight, 1e-5, offset)
    near(got[0], right[0])
    near(got[1], right[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(backend: Backend, dtype: torch.dtype) -> None:
    for rows in (0, 3):
        x = torch.randn(rows, 64).to(dtype)
        near(ops.silu_mul(x.to("npu")), reference.silu_mul(x))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [32, 16])
def test_rope(backend: Backend, interleaved: bool, rotary: int) -> None:
    angles = torch.outer(torch.arange(64.0), 10000 ** -torch.linspace(0, 1, rotary // 2))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    x, positions = torch.randn(5, 3, 32).to(torch.bfloat16), torch.tensor([0, 63, 7, 7, 20])
    right = reference.rope(x, RopeTable(cos_sin, interleaved), positions)
    near(ops.rope(x.to("npu"), RopeTable(cos_sin.to("npu"), interleaved), positions.to("npu")), right)


@pytest.mark.parametrize("layout", [NHD_PAGED, HND_PAGED], ids=lambda one: one.name)
def test_split_and_write(backend: Backend, layout: object) -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32)
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=layout, manager_block=16, kernel_block=16)  # type: ignore[arg-type]
    caches = [backend.device.empty_cache(group, 2) for _ in range(2)]
    for cache in caches:
        for plane in cache.planes.values():
            plane.zero_()
    angles = torch.outer(torch.arange(8.0), 10000 ** -torch.linspace(0, 1, 16))
    table = RopeTable(torch.cat((angles.cos(), angles.sin()), dim=-1).to("npu"))
    weights = [torch.randn(32).to(torch.bfloat16).to("npu") for _ in range(2)]
    shape = QKVShape(4, 2, 32, 32, *weights)
    qkv = torch.randn(3, 8 * 32).to(torch.bfloat16).to("npu")
    positions, slots = (torch.tensor(values, device="npu") for values in ([0, 5, 7], [31, 4, 16]))
    results = [
        function(qkv.clone(), shape, table, positions, LayerArgs(), cache, slots).cpu()
        for function, cache in zip((ops.qk_norm_rope_write, reference.qk_norm_rope_write), caches)
    ]
    near(*results)
    for name, plane in caches[0].planes.items():
        near(plane, caches[1].planes[name].cpu())
    assert ops.qk_norm_rope_write(qkv, shape, table, positions, LayerArgs(), None, slots).shape == (3, 4, 32)


def test_the_table_of_ops(backend: Backend) -> None:
    table = backend.op_table(torch.bfloat16, NHD_PAGED)
    chosen = {op for op, choice in table.choices.items() if choice.spec.provider == "npu"}
    assert chosen == {"rms_norm", "add_rms_norm", "silu_mul", "rope", "qk_norm_rope_write"}
