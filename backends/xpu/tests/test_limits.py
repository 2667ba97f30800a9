"""Every documented limit is a refusal with the nearest thing that works."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from xpu_cases import KERNELS, spec

from dougong.hal import HND, AttentionQuery
from dougong_xpu import sdk
from dougong_xpu.limits import ipex_refusals, sgl_refusals, vllm_refusals

ASK = {"vllm": vllm_refusals, "sgl": sgl_refusals, "ipex": ipex_refusals}


def query(library: str, more: dict[str, Any], asked: dict[str, Any]) -> AttentionQuery:
    _, layout, block = KERNELS[library]
    return AttentionQuery(**{**dict(spec=spec(**more), layout=layout, block_size=block), **asked})


@pytest.mark.parametrize("library", ASK)
def test_what_is_tested_is_not_refused(library: str, device: Any) -> None:
    kernel = KERNELS[library][0]
    assert kernel.supports(query(library, {}, {}), device) == ()


@pytest.mark.parametrize(
    ("library", "more", "asked", "words"),
    [
        ("vllm", dict(dtype=torch.float32), {}, "dtype torch.float32.*nearest: bfloat16"),
        ("vllm", dict(head_dim=80), {}, r"head dim 80/80.*nearest: 64|nearest: 96"),
        ("vllm", dict(head_dim=576, head_dim_v=512, num_kv_heads=1, latent=True), {}, "latent"),
        ("vllm", {}, dict(block_size=16), "block size 16: multiples of 64.*nearest: 64"),
        ("vllm", {}, dict(block_size=200), "nearest: 192"),
        ("vllm", {}, dict(layout=HND), "KV layout hnd.*nearest: nhd"),
        ("vllm", dict(softcap=3.0), {}, "leave it out"),
        ("vllm", dict(alibi=True), {}, "ALiBi"),
        ("vllm", dict(sinks=True), {}, "16 bits only"),
        ("vllm", dict(lse=True), {}, "decodes leave it unwritten"),
        ("vllm", dict(window=4, causal=False), {}, "without a causal mask"),
        ("vllm", dict(window=4), {}, "a window over a cache.*the triton provider"),
        ("vllm", dict(window=4), dict(ragged=True), None),
        ("sgl", dict(window=4), {}, "a window over a cache"),
        ("vllm", dict(kv_dtype=torch.int8), {}, "a cache in torch.int8"),
        ("vllm", {}, dict(batch_invariant=True), "batch invariance"),
        ("sgl", {}, dict(block_size=256), "block size 256: one of 64, 128.*nearest: 128"),
        ("sgl", dict(num_heads=40), {}, "20 query heads per kv head: at most 16"),
        ("sgl", dict(kv_dtype=torch.float8_e4m3fn), {}, "a cache in"),
        ("sgl", {}, dict(ragged=True), "without a cache"),
        ("ipex", dict(window=4), {}, "a window"),
        ("ipex", dict(causal=False), {}, "not supported yet"),
        ("ipex", {}, dict(block_size=64), None),
        ("ipex", {}, dict(block_size=100), "nearest: 64"),
    ],
)
def test_limits(library: str, more: dict[str, Any], asked: dict[str, Any], words: str | None) -> None:
    refusals = ASK[library](query(library, more, asked))
    assert (refusals == ()) if words is None else any(re.search(words, str(one)) for one in refusals), refusals


def test_ipex_is_for_torch_2_8_alone(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    monkeypatch.setattr(sdk, "torch_minor", lambda: (2, 13))
    refusals = KERNELS["ipex"][0].supports(query("ipex", {}, {}), device)
    assert "ended with 2.8, for torch 2.8; this is torch 2.13" in str(refusals[0])


@pytest.mark.parametrize(
    ("library", "module"),
    [("vllm", "vllm_xpu_kernels.flash_attn_interface"), ("sgl", "sgl_kernel.flash_attn"),
     ("ipex", "intel_extension_for_pytorch")],
)  # fmt: skip
def test_a_library_that_is_missing_or_does_not_load(
    library: str, module: str, monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (refusal,) = KERNELS[library][0].supports(query(library, {}, {}), device)
    assert module in refusal.reason and refusal.nearest == "the triton provider"

    def broken(name: str) -> Any:
        raise OSError("libsycl.so.8: cannot open shared object file")

    monkeypatch.setattr(sdk.importlib, "import_module", broken)
    (refusal,) = KERNELS[library][0].supports(query(library, {}, {}), device)
    assert "does not fit torch" in refusal.reason and "libsycl.so.8" in refusal.reason


class _Old:
    """An operator with other arguments than those that are used here."""

    class default:
        class _schema:
            arguments = (SimpleNamespace(name="q"), SimpleNamespace(name="softcap"))


def test_a_library_that_is_too_old_or_has_no_attention(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    def reason(library: str) -> str:
        (refusal,) = KERNELS[library][0].supports(query(library, {}, {}), device)
        assert refusal.nearest == "the triton provider"
        return refusal.reason

    ops = SimpleNamespace(sgl_kernel=SimpleNamespace(), _C_cache_ops=SimpleNamespace())
    with monkeypatch.context() as patch:
        patch.setattr(sdk.torch, "ops", ops)
        assert "vllm_xpu_kernels is too old: it has no reshape_and_cache_flash" in reason("vllm")
        assert "sgl_kernel was built without attention" in reason("sgl")
        ops.sgl_kernel.fwd = _Old
        assert "sgl_kernel is too old" in reason("sgl")
    module = sys.modules["vllm_xpu_kernels.flash_attn_interface"]
    monkeypatch.setattr(module, "FA2_AVAILABLE", False)
    monkeypatch.setattr(module, "FA2_UNAVAILABLE_REASON", "no libsycl", raising=False)
    assert "vllm_xpu_kernels has no attention: no libsycl" in reason("vllm")
    monkeypatch.setattr(sdk, "torch_minor", lambda: (2, 8))
    monkeypatch.setattr(sys.modules["intel_extension_for_pytorch"], "__version__", "2.7.10+xpu")
    assert "intel-extension-for-pytorch 2.7.10+xpu: only 2.8 is for torch 2.8" in reason("ipex")


def test_what_is_not_installed_says_where_it_comes_from() -> None:
    monkey = sdk.find_spec
    try:
        sdk.find_spec = lambda name: None
        assert "built from its source" in sdk.missing("sgl_kernel")
    finally:
        sdk.find_spec = monkey
    assert sdk.missing("sgl_kernel") == ""
