"""Each library's attention on its twin against the core's reference, cache writes included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from xpu_cases import KERNELS, build, run, spec

from dougong.hal import BatchView, LayerArgs, RaggedKV
from dougong.hal.reference.attention import ReferenceAttention
from dougong_xpu.twin import TwinRefusal

BATCHES = {
    "decode": ([1, 1, 1], [33, 0, 130]),
    "prefill": ([20, 3], [20, 3]),
    "extend": ([5, 17], [90, 40]),
    "mixed": ([1, 1, 7, 0], [200, 5, 40, 12]),
    "drafts": ([4, 4], [70, 64]),
    "blind queries": ([5, 1], [3, 9]),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("library", KERNELS)
def test_agrees_with_the_reference(library: str, name: str, device: Any) -> None:
    got, want = run(library, spec(), *BATCHES[name], device)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("library", "more"),
    [
        ("vllm", dict(causal=False)), ("vllm", dict(kv_dtype=torch.float8_e4m3fn)), ("sgl", dict(causal=False)),
        ("ipex", dict(dtype=torch.float16)),
    ],
)  # fmt: skip
def test_features(library: str, more: dict[str, Any], device: Any) -> None:
    got, want = run(library, spec(**more), *BATCHES["mixed"], device)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("window", [None, 4])
def test_keys_and_values_without_a_cache(window: int | None, device: Any) -> None:
    torch.manual_seed(0)
    kernel, layout, block = KERNELS["vllm"]
    where, lens = device.torch_device, [20, 1, 5]
    batch = BatchView.build(lens, lens, torch.zeros(3, 2, dtype=torch.int32), block, where)
    k, v, q = torch.randn(3, 26, 2, 64).to(torch.bfloat16).to(where)
    kv, answers = RaggedKV(k, v, batch.cu_q, batch.host_cu_q), []
    s = spec(num_heads=2, window=window)
    for one in (build(kernel, s, layout, block, device), build(ReferenceAttention, s, layout, block, device)):
        plan = one.new_plan()
        one.plan(batch, plan)
        answers.append(torch.full((26, 2, 64), torch.nan, dtype=torch.bfloat16).to(where))
        one.run(plan, LayerArgs(), q, kv, out=answers[-1])
    torch.testing.assert_close(answers[0].cpu(), answers[1].cpu(), rtol=2e-2, atol=2e-2)


def test_an_empty_step(device: Any) -> None:
    for library in KERNELS:
        got, _ = run(library, spec(), [0], [0], device)
        assert got.shape[0] == 0


def test_the_twin_refuses_what_the_library_refuses(device: Any) -> None:
    """The limits keep these from ever being asked; the twin would not let them pass."""
    for library, more in (
        ("vllm", dict(dtype=torch.float32)),
        ("sgl", dict(num_heads=40)),
        ("ipex", dict(causal=False)),
    ):
        with pytest.raises(TwinRefusal):
            run(library, spec(**more), [3], [20], device)
