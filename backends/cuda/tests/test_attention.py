"""The libraries' attention on their twins against the core's reference: every kind of batch, every declared feature."""

from __future__ import annotations

from typing import Any

import cuda_twins
import pytest
import torch
from cuda_cases import BF16, Here, agree, answer, group_of, paged, spec

from dougong.hal import NHD, AttentionKernel, AttentionQuery, BatchView, LayerArgs, Limits, RaggedKV
from dougong_cuda import flash, sdk
from dougong_cuda.flash import FlashAttention, LongPromptAttention
from dougong_cuda.flash_infer import FlashInferAttention
from dougong_cuda.limits import FLASH_NHD, INFER_HND, INFER_NHD
from dougong_cuda.varlen import VarlenAttention

BATCHES = {
    "decode": ([1, 1, 1], [33, 1, 16]),
    "prefill": ([20, 3], [20, 3]),
    "mixed": ([1, 1, 7, 0], [90, 5, 40, 12]),
    "blind": ([1, 5, 2], [0, 3, 0]),
}


pytestmark = pytest.mark.usefixtures("twins")


def torch_varlen(monkeypatch: pytest.MonkeyPatch, **has: bool) -> None:
    """torch's varlen operator has CUDA kernels alone: FlashAttention's twin stands behind its signature."""

    def call(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *, is_causal: bool = False,
        scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        cuda_twins.calls.append("varlen_attn")
        cuda_twins.need(enable_gqa or q.shape[1] == k.shape[1], "equal heads without enable_gqa")
        return cuda_twins.flash_attn_varlen_func(
            q, k, v, max_q, cu_q, max_k, cu_k, softmax_scale=scale, causal=is_causal or window_size[1] == 0,
            window_size=list(window_size),
        )  # fmt: skip

    values = {"scale": True, "window": True, "gqa": True, **has}
    monkeypatch.setattr(sdk, "varlen", lambda: sdk.Varlen(call, **values))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("package", ["vllm", "flash_attn_interface"])
def test_flash_attention_agrees_with_the_reference(package: str, batch: str) -> None:
    cuda_twins.install(package)
    s = spec(lse=True, softcap=5.0 if batch == "mixed" else None)
    agree(FlashAttention, s, group_of(s, FLASH_NHD), *paged(s, FLASH_NHD, *BATCHES[batch]))
    called = "flash_attn_varlen_func 3" if package == "vllm" else "flash_attn_with_kvcache"
    assert cuda_twins.calls == [called]


def test_flash_attention_2_serves_what_has_no_3() -> None:
    cuda_twins.install("vllm")
    s = spec(causal=False)
    problem = paged(s, FLASH_NHD, *BATCHES["mixed"], block=32)
    agree(FlashAttention, s, group_of(s, FLASH_NHD, 32), *problem, device=Here((8, 0)))
    assert cuda_twins.calls == ["flash_attn_varlen_func 2"]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layout", [INFER_NHD, INFER_HND], ids=["nhd", "hnd"])
def test_flashinfer_agrees_with_the_reference(layout: Any, batch: str) -> None:
    cuda_twins.install("flashinfer")
    s = spec(lse=True, softcap=5.0 if batch == "mixed" else None)
    agree(FlashInferAttention, s, group_of(s, layout), *paged(s, layout, *BATCHES[batch]))
    wrappers = {"decode": ["decode"], "prefill": ["prefill"]}.get(batch, ["decode", "prefill"])
    assert cuda_twins.calls == [f"{one}.plan" for one in wrappers] + [f"{one}.run" for one in wrappers]


@pytest.mark.parametrize("batch", BATCHES)
def test_torchs_varlen_agrees_with_the_reference(batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_varlen(monkeypatch)
    s = spec()
    agree(VarlenAttention, s, group_of(s, NHD), *paged(s, NHD, *BATCHES[batch]))


def test_an_older_varlen_is_asked_for_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_varlen(monkeypatch, scale=False, window=False, gqa=False)
    s = spec(causal=False)
    agree(VarlenAttention, s, group_of(s, NHD), *paged(s, NHD, *BATCHES["mixed"]))
    asked = AttentionQuery(spec=spec(scale=0.5), layout=NHD, block_size=16)
    assert "1/sqrt(head dim) only" in str(VarlenAttention.supports(asked, Here())[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kernel", [FlashAttention, FlashInferAttention, VarlenAttention])
def test_ragged_keys_and_values(
    kernel: type[AttentionKernel], window: int | None, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_twins.install("vllm", "flashinfer")
    torch_varlen(monkeypatch)
    s = spec(causal=causal, window=window)
    asked = AttentionQuery(spec=s, layout=NHD, block_size=16, ragged=True)
    refused = kernel.supports(asked, Here())
    if kernel is FlashInferAttention and window and not causal:
        assert "a window without a causal mask" in str(refused[0])
        return
    assert refused == ()
    lens = [20, 1, 5]
    batch = BatchView.build(lens, lens, torch.zeros(3, 2, dtype=torch.int32), 16, "cpu")
    kv = RaggedKV(*torch.randn(2, 26, 2, 64).to(BF16), batch.cu_q, batch.host_cu_q)
    agree(kernel, s, group_of(s, FLASH_NHD), batch, torch.randn(26, 4, 64).to(BF16), kv)


def test_only_long_prompts_leave_the_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_twins.install("vllm")
    monkeypatch.setattr(flash, "LONG_PROMPT", 12)
    s = spec(lse=True)
    asked = AttentionQuery(spec=s, layout=FLASH_NHD, block_size=16)
    assert LongPromptAttention.supports(asked, Here()) == ()
    device = Here()
    limits = Limits(max_rows=4, max_tokens=32, max_kv_len=96, max_blocks=6)
    group = group_of(s, FLASH_NHD)
    kernel = LongPromptAttention(s, group, limits, device)
    plan = kernel.new_plan()
    for q_lens, kv_lens, calls in (
        ([1, 1, 14], [33, 5, 40], 1),  # the prompt leaves, the decodes stay
        ([1, 1, 7], [33, 5, 40], 0),
        ([13, 2], [13, 20], 1),
        ([1, 1], [9, 90], 0),
    ):
        cuda_twins.calls.clear()
        batch, q, cache = paged(s, FLASH_NHD, q_lens, kv_lens)
        want, want_lse = answer(FlashAttention, s, group, batch, q, cache)
        cuda_twins.calls.clear()
        out = torch.full(want.shape, torch.nan, dtype=BF16)
        lse = torch.full(want_lse.shape, torch.nan)  # type: ignore[union-attr]
        kernel.plan(batch, plan)
        kernel.run(plan, LayerArgs(), q, cache, out=out, lse=lse)
        assert len(cuda_twins.calls) == calls
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)
