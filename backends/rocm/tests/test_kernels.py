"""The kernels with each target's own settings, in the interpreter on small shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dougong_kernels.config import configs_for
from dougong_kernels.paged import PagedAttention, Shape
from dougong_kernels.target import fp8_mode
from dougong_kernels.testing import make_problem, reference, relative_error
from dougong_rocm.targets import COMPILED

SHAPE = Shape(
    num_heads=4, num_kv_heads=2, head_dim=64, head_dim_v=64, block_size=16, scale=0.125, lse=True, upcast=True
)


@pytest.mark.parametrize("target", COMPILED)
def test_settings_of_every_target_are_right(target: str) -> None:
    settings = configs_for(target, 64)
    assert settings.extend.max_registers == 0, "HIP's compiler has no such option"
    attention = PagedAttention(
        SHAPE, max_rows=2, max_tokens=32, max_kv_len=128, cores=1, device="cpu", settings=settings
    )
    problem = make_problem(SHAPE, [1, 20], [40, 33], dtype=torch.float16, device="cpu")
    out, lse = problem.run(attention)
    want, want_lse = reference(problem)
    assert relative_error(out, want) < 2e-3
    assert lse is not None and relative_error(lse, want_lse) < 1e-5


@pytest.mark.parametrize(
    ("target", "ocp", "fnuz"),
    [("gfx90a", 2, 3), ("gfx942", 2, 1), ("gfx950", 1, 3), ("gfx1100", 2, 3), ("gfx1201", 1, 3)],
)
def test_either_kind_of_fp8_is_read_everywhere(target: str, ocp: int, fnuz: int) -> None:
    assert fp8_mode(target, torch.float8_e4m3fn) == ocp and fp8_mode(target, torch.float8_e4m3fnuz) == fnuz
    assert fp8_mode(target, torch.bfloat16) == 0


def test_every_byte_of_fnuz_is_decoded_as_torch_does() -> None:
    """256 keys hold one byte value each as V; a query that sees a single key gives that V back."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fnuz).float()
    s = replace(SHAPE, num_heads=1, num_kv_heads=1, head_dim=16, head_dim_v=16, scale=0.25, fp8=3, lse=False)
    attention = PagedAttention(
        s, max_rows=16, max_tokens=16, max_kv_len=16, cores=1, device="cpu", settings=configs_for("gfx942", 16)
    )
    k = torch.zeros(16, 16, 1, 16, dtype=torch.float8_e4m3fnuz)
    v = codes.reshape(16, 1, 1, 16).expand(16, 16, 1, 16).contiguous().view(torch.float8_e4m3fnuz)
    plan = attention.new_plan()
    cu, ones = torch.arange(17, dtype=torch.int32), torch.ones(16, dtype=torch.int32)
    table = torch.arange(16, dtype=torch.int32)[:, None].contiguous()
    attention.plan(plan, cu, ones, table, num_rows=16, num_tokens=16, max_q_len=1, host_cu_q=cu)
    out = torch.empty(16, 1, 16, dtype=torch.float16)
    attention.run(plan, torch.zeros(16, 1, 16, dtype=torch.float16), k, v, out)
    assert torch.equal(out.flatten().nan_to_num(1e4), values.half().nan_to_num(1e4))
