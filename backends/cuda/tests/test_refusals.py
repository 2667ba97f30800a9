"""Every limit as a refusal, the specs on offer, and which of them is chosen."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cuda_twins
import pytest
import torch
from cuda_cases import Here, spec

from dougong.hal import HND, NHD, AttentionQuery
from dougong.hal.backend import Backend
from dougong.hal.selection import Candidate
from dougong.plugins import KernelSpec, load_plugins, resolve_target
from dougong_cuda import dougong_kernels, sdk
from dougong_cuda.flash import FlashAttention, LongPromptAttention
from dougong_cuda.flash_infer import FlashInferAttention
from dougong_cuda.providers import kernel_specs
from dougong_cuda.varlen import VarlenAttention

LIBRARIES = ("vllm", "flash_attn_interface", "flashinfer")


pytestmark = pytest.mark.usefixtures("twins")


def query(more: dict[str, Any], **asked: Any) -> AttentionQuery:
    return AttentionQuery(**{**dict(spec=spec(**more), layout=NHD, block_size=16), **asked})


def specs(*installed: str) -> dict[str, KernelSpec]:
    cuda_twins.install(*installed)
    return {one.provider: one for one in kernel_specs(Here()) if one.op == "attention"}  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", [FlashAttention, LongPromptAttention, FlashInferAttention, VarlenAttention])
@pytest.mark.parametrize(
    ("more", "asked", "words"),
    [
        (dict(head_dim=80), {}, "head dim 80/80.*nearest: 64"),
        (dict(head_dim_v=128), {}, "K and V alike"),
        (dict(dtype=torch.float32), {}, "bfloat16 or float16"),
        (dict(kv_dtype=torch.float8_e4m3fn), {}, "a cache in torch.float8_e4m3fn"),
        (dict(window=9), {}, "a window over a cache"),
        (dict(sinks=True), {}, "sinks"),
        (dict(alibi=True), {}, "ALiBi"),
        (dict(num_kv_heads=1, head_dim=576, head_dim_v=512, latent=True), {}, "a latent cache"),
        ({}, dict(batch_invariant=True), "batch invariance"),
        ({}, dict(strided=True), "a cache with gaps"),
    ],
)
def test_what_no_library_does(kernel: Any, more: dict[str, Any], asked: dict[str, Any], words: str) -> None:
    cuda_twins.install(*LIBRARIES)
    refused = kernel.supports(query(more, **asked), Here())
    assert any(re.search(words, str(one)) for one in refused), refused


@pytest.mark.parametrize(
    ("kernel", "more", "asked", "words"),
    [
        (FlashAttention, {}, dict(layout=HND), "KV layout hnd.*nearest: nhd"),
        (FlashAttention, {}, dict(block_size=64), "block size 64.*nearest: 32"),
        (FlashInferAttention, {}, dict(block_size=128), "block size 128.*nearest: 64"),
        (FlashInferAttention, dict(head_dim=96), {}, "one of 64, 128, K"),
        (FlashAttention, dict(head_dim=256), {}, "one of 64, 96, 128.*nearest: 128"),
        (VarlenAttention, dict(softcap=5.0), {}, "softcap"),
        (VarlenAttention, dict(lse=True), {}, "LSE"),
    ],
)
def test_what_one_library_does_not(kernel: Any, more: dict[str, Any], asked: dict[str, Any], words: str) -> None:
    cuda_twins.install(*LIBRARIES)
    refused = kernel.supports(query(more, **asked), Here())
    assert any(re.search(words, str(one)) for one in refused), refused


def test_an_old_card_and_one_without_flash_attention_3_say_so() -> None:
    cuda_twins.install("flash_attn_interface")
    assert "9.x, not 8.0" in str(FlashAttention.supports(query({}), Here((8, 0)))[0])
    cuda_twins.install("vllm")
    sdk.flash.cache_clear()
    assert FlashAttention.supports(query({}), Here((8, 0))) == ()
    assert "measured ahead on 9.0 only" in str(LongPromptAttention.supports(query({}), Here((8, 0)))[0])
    assert "compute capability 7.5" in str(FlashAttention.supports(query({}), Here((7, 5)))[0])


def test_a_library_that_is_too_old_or_does_not_load_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_twins.remove()
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    assert "0.6 has" in str(FlashInferAttention.supports(query({}), Here())[0])

    def broken(name: str) -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file")

    sdk.flash.cache_clear()
    sdk.flashinfer.cache_clear()
    monkeypatch.setattr(sdk.importlib, "import_module", broken)
    for kernel in (FlashAttention, FlashInferAttention):
        (refused,) = kernel.supports(query({}), Here())
        assert "does not fit torch" in str(refused) and "libcudart" in str(refused)


def test_vllms_flash_attention_is_loaded_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_twins.remove()
    folder = tmp_path / "vllm" / "vllm_flash_attn"
    folder.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('takes 20 seconds')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "no FlashAttention" in str(FlashAttention.supports(query({}), Here())[0])
    (folder / "flash_attn_interface.py").write_text(
        "FA2_AVAILABLE, FA3_AVAILABLE, FA2_UNAVAILABLE_REASON = False, True, 'not built'\n"
        "def flash_attn_varlen_func(*arguments, **options): ...\n"
    )
    sdk.flash.cache_clear()
    assert FlashAttention.supports(query({}), Here()) == ()
    assert sdk.flash((9, 0)).generation == 3 and "vllm" not in sys.modules
    assert "8.0 (not built)" in str(FlashAttention.supports(query({}), Here((8, 0)))[0])
    for name in [name for name in sys.modules if name.startswith("dougong_cuda._vllm_flash_attn")]:
        monkeypatch.delitem(sys.modules, name)


def test_nothing_installed_leaves_the_portable_kernels_and_says_what_to_install() -> None:
    found = specs()
    assert "vllm, or FlashAttention 3" in found["flash-attention"].unavailable
    assert found["triton + flash-attention"].unavailable == found["flash-attention"].unavailable
    assert "pip install flashinfer-python" in found["flashinfer"].unavailable
    assert not found["torch varlen"].unavailable and not found["triton"].unavailable


def test_every_target_is_there_and_every_class_reads_the_layouts_of_its_spec() -> None:
    for one in specs(*LIBRARIES).values():
        target = resolve_target(one.target)
        assert {layout.name for layout in target.layouts} <= set(one.layouts or ("nhd",)), one.provider


def test_the_order_of_choice() -> None:
    backend = Backend("cuda", "cuda", Here(), load_plugins("", entries=()))
    backend.candidates["attention"] = [Candidate("cuda", one) for one in specs(*LIBRARIES).values()]
    choice = backend.choose_attention(query({}))
    assert choice.spec.provider == "triton" and choice.spec.graph == "capture"
    reasons = {one.spec.provider: why for one, why in choice.refused}
    assert reasons["triton + flash-attention"] == "priority -5 below 0"
    assert reasons["flashinfer"] == "priority -20 below 0"
    for provider in ("triton + flash-attention", "flash-attention", "flashinfer"):
        assert backend.choose_attention(query({}), provider).spec.provider == provider


def test_another_vendors_device_is_offered_nothing() -> None:
    device = Here()
    assert dougong_kernels(device) == []  # a CPU
    device.is_nvidia = False
    device.torch_device = torch.device("cpu")
    assert dougong_kernels(type("Amd", (Here,), {"type": "cuda", "is_nvidia": False})()) == []
