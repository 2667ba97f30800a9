"""The backend's attention on the twin means what the contract says: compared with the core's reference on the CPU."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from ascend_cases import BATCHES, LATENT_SPEC, SPEC, Scene, agree

from dougong.errors import ConfigError, EngineError, KernelSelectionError
from dougong.hal import (
    NHD,
    AttentionKernel,
    AttentionQuery,
    Backend,
    KVGroup,
    KVLayout,
    LayerArgs,
    LayerCache,
    Limits,
    RaggedKV,
    allocate_cache,
    convert_blocks,
)
from dougong_ascend import sdk
from dougong_ascend.attention import FusedAttention, GatheredAttention
from dougong_ascend.latent import LatentAttention, TiledLatentAttention
from dougong_ascend.layouts import HND_PAGED, LATENT, LATENT_NZ, NHD_PAGED


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("layout", [NHD_PAGED, HND_PAGED], ids=lambda one: one.name)
@pytest.mark.parametrize("block", [16, 48, 128])
def test_causal(backend: Backend, batch: str, layout: KVLayout, block: int) -> None:
    spec = replace(SPEC, lse=batch in ("mixed", "blind"))
    agree(Scene(backend, FusedAttention, spec, layout, block, *BATCHES[batch]))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("window", [1, 3, 17, 130])
@pytest.mark.parametrize("block", [16, 128])
def test_window(backend: Backend, batch: str, window: int, block: int) -> None:
    agree(Scene(backend, FusedAttention, replace(SPEC, window=window, lse=True), NHD_PAGED, block, *BATCHES[batch]))


@pytest.mark.parametrize("batch", ["mixed", "blind"])
@pytest.mark.parametrize(
    "changes",
    [
        {"sinks": True}, {"sinks": True, "lse": True, "window": 17}, {"causal": False, "lse": True},
        {"causal": False, "window": 5}, {"dtype": torch.float16, "kv_dtype": torch.float16, "scale": 0.3},
        {"num_heads": 7, "num_kv_heads": 1, "head_dim": 80, "head_dim_v": 80},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("version", [1, 2])
def test_features(
    backend: Backend, batch: str, changes: dict[str, Any], version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOUGONG_ASCEND_FIA", str(version))
    assert sdk.fused_version() == version
    agree(Scene(backend, FusedAttention, replace(SPEC, **changes), NHD_PAGED, 128, *BATCHES[batch]))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("layout", "block", "kind", "changes"),
    [
        (NHD_PAGED, 128, FusedAttention, {"lse": True}), (HND_PAGED, 32, FusedAttention, {"window": 17}),
        (NHD_PAGED, 16, GatheredAttention, {"window": 3, "sinks": True}), (NHD_PAGED, 48, GatheredAttention, {}),
    ],
    ids=["nhd128", "hnd32-window", "nhd16-window-sinks", "nhd48"],
)  # fmt: skip
@pytest.mark.parametrize("version", [1, 2])
def test_int8_caches(
    backend: Backend, batch: str, layout: KVLayout, block: int, kind: type[AttentionKernel], changes: dict[str, Any],
    version: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("DOUGONG_ASCEND_FIA", str(version))
    spec = replace(SPEC, kv_dtype=torch.int8, **changes)
    query = AttentionQuery(spec=spec, layout=layout, block_size=block)
    assert backend.choose_attention(query).target is kind
    agree(Scene(backend, kind, spec, layout, block, *BATCHES[batch]))


@pytest.mark.parametrize("layout", [NHD_PAGED, HND_PAGED], ids=lambda one: one.name)
def test_int8_is_written_as_the_reference_writes_it(backend: Backend, layout: KVLayout) -> None:
    spec = replace(SPEC, kv_dtype=torch.int8)
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=layout, manager_block=32, kernel_block=32)
    cache, host = backend.device.empty_cache(group, 2), allocate_cache(spec, NHD, 2, 32, "cpu")
    for plane in (*cache.planes.values(), *host.planes.values()):
        plane.fill_(7)
    kernel = FusedAttention(spec, group, Limits(max_rows=1, max_tokens=4, max_kv_len=64, max_blocks=2), backend.device)
    k, v = torch.randn(2, 3, 2, 32).mul(3).to(torch.bfloat16)
    layer, slots = LayerArgs(k_scale=0.021, v_scale=0.05), torch.tensor([63, 0, 40])
    kernel.write(layer, k.to("npu"), v.to("npu"), cache, slots.to("npu"))
    host.write_scaled(layer, k, v, slots)
    for here, there in zip(cache.read(torch.arange(64, device="npu")), host.read(torch.arange(64))):
        assert torch.equal(here.cpu(), there)


def test_more_keys_than_one_query_may_see_are_refused(backend: Backend) -> None:
    group = KVGroup(index=0, layers=(0,), spec=SPEC, layout=NHD_PAGED, manager_block=128, kernel_block=128)
    limits = Limits(max_rows=1, max_tokens=1, max_kv_len=262145, max_blocks=2049)
    with pytest.raises(ConfigError, match="max_model_len=262144 or less"):
        FusedAttention(SPEC, group, limits, backend.device)


def test_wide_queries_go_heads_first(backend: Backend) -> None:
    spec = replace(SPEC, num_heads=144, num_kv_heads=4, head_dim=464, head_dim_v=464)  # N·D beyond 16 bits
    agree(Scene(backend, FusedAttention, spec, NHD_PAGED, 128, [1, 2], [3, 5]))


@pytest.mark.parametrize("heads", [4, 32, 128])
@pytest.mark.parametrize("block", [16, 128])
def test_latent(backend: Backend, heads: int, block: int) -> None:
    spec = replace(LATENT_SPEC, num_heads=heads)
    agree(Scene(backend, LatentAttention, spec, LATENT, block, [1, 1, 3, 3, 35, 18], [9, 0, 20, 4, 40, 15]))


@pytest.mark.parametrize("heads", [4, 64])
@pytest.mark.parametrize("version", [1, 2])
def test_latent_in_tiles(backend: Backend, heads: int, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOUGONG_ASCEND_FIA", str(version))
    spec = replace(LATENT_SPEC, num_heads=heads)
    scene = Scene(backend, TiledLatentAttention, spec, LATENT_NZ, 128, [1, 1, 3, 3, 35, 18], [9, 0, 150, 4, 40, 15])
    agree(scene)
    assert scene.cache.planes["latent"].shape[1:] == (1, 32, 128, 16)


@pytest.mark.parametrize("changes", [{}, {"causal": False, "lse": True}, {"window": 3}, {"sinks": True}], ids=str)
def test_without_a_cache(backend: Backend, changes: dict[str, Any]) -> None:
    spec = replace(SPEC, **changes)
    q_lens, kv_lens = [1, 5, 0, 4, 2], [9, 7, 2, 2, 0]
    scene = Scene(backend, FusedAttention, spec, NHD_PAGED, 128, q_lens, kv_lens)
    cu_k = torch.tensor([0, *torch.tensor(kv_lens).cumsum(0).tolist()], dtype=torch.int32)
    k, v = torch.randn(2, sum(kv_lens), 2, 32, generator=torch.Generator().manual_seed(1)).to(spec.dtype)
    results = []
    for where, kernel, layer in (("npu", scene.kernel, LayerArgs()), ("cpu", scene.reference, scene.layer)):
        out, lse = scene._outputs(where)
        plan = kernel.new_plan()
        kernel.plan(scene.batch(where), plan)
        if spec.sinks and where == "npu":
            assert scene.layer.sinks is not None
            layer = LayerArgs(sinks=scene.layer.sinks.to(where))
        ragged = RaggedKV(k.to(where), v.to(where), cu_k.to(where), cu_k)
        kernel.run(plan, layer, scene.q.to(where), ragged, out=out, lse=lse)
        results.append((out.cpu(), lse))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2**-6, atol=2**-7)
    if spec.lse:
        torch.testing.assert_close(results[0][1].cpu(), results[1][1])


def test_a_cache_with_gaps_is_refused(backend: Backend) -> None:
    scene = Scene(backend, FusedAttention, SPEC, NHD_PAGED, 128, [1], [3])
    plane = torch.zeros(2, 2, 128, 2, 32, dtype=torch.bfloat16, device="npu")[:, 0]
    scene.cache = LayerCache({"k": plane, "v": plane}, NHD_PAGED, 128, SPEC)
    with pytest.raises(KernelSelectionError, match="contiguous planes"):
        scene.answers()


@pytest.mark.parametrize(("q_lens", "kv_lens"), [([1, 1], [3, 3]), ([1], [257])])
def test_a_batch_beyond_the_limits_is_refused(backend: Backend, q_lens: list[int], kv_lens: list[int]) -> None:
    scene = Scene(backend, FusedAttention, SPEC, NHD_PAGED, 128, [1], [3])
    scene.q_lens, scene.kv_lens, scene.table = q_lens, kv_lens, torch.ones(len(q_lens), 3, dtype=torch.int32)
    with pytest.raises(EngineError, match="was made for 1 rows, 2 tokens and 256 keys"):
        scene.answers()


def test_the_operator_s_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, version in (("", 1), ("1", 1), ("2", 2)):
        monkeypatch.setenv("DOUGONG_ASCEND_FIA", text)
        assert sdk.fused_version() == version
    monkeypatch.setenv("DOUGONG_ASCEND_FIA", "v2")
    with pytest.raises(ConfigError, match="DOUGONG_ASCEND_FIA='v2': allowed are 1 and 2"):
        sdk.fused_version()


def test_an_sdk_that_does_not_load_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe has seen torch-npu and CANN; the loader finds a library of neither."""
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    monkeypatch.delitem(sys.modules, "dougong_ascend.sdk")
    with pytest.raises(ImportError, match=r"torch_npu does not load: .*source /usr/local/Ascend/.*set_env\.sh"):
        importlib.import_module("dougong_ascend.sdk")


def test_write_into_tiles(backend: Backend) -> None:
    group = KVGroup(
        index=0, layers=(0,), spec=LATENT_SPEC, layout=LATENT_NZ, manager_block=128, kernel_block=128
    )  # fmt: skip
    cache = backend.device.empty_cache(group, 3)
    for plane in cache.planes.values():
        plane.fill_(7)
    limits = Limits(max_rows=1, max_tokens=4, max_kv_len=384, max_blocks=3)
    kernel = TiledLatentAttention(LATENT_SPEC, group, limits, backend.device)
    k = torch.randn(3, 1, 576).to(torch.bfloat16)
    slots = torch.tensor([383, 0, 130])
    kernel.write(LayerArgs(), k.to("npu"), k[..., :512].to("npu"), cache, slots.to("npu"))
    found, _ = cache.read(torch.arange(384, device="npu"))
    assert torch.equal(found.cpu()[slots], k)
    others = torch.ones(384, dtype=torch.bool)
    others[slots] = False
    assert (found.cpu()[others] == 7).all()


@pytest.mark.parametrize("layout", [NHD_PAGED, HND_PAGED], ids=lambda one: one.name)
def test_write_changes_only_its_slots(backend: Backend, layout: KVLayout) -> None:
    group = KVGroup(index=0, layers=(0,), spec=SPEC, layout=layout, manager_block=16, kernel_block=16)
    cache = backend.device.empty_cache(group, 4)
    for plane in cache.planes.values():
        plane.fill_(7)
    kernel = FusedAttention(SPEC, group, Limits(max_rows=1, max_tokens=4, max_kv_len=64, max_blocks=4), backend.device)
    packed = torch.randn(3, 3, 2, 32).to(torch.bfloat16).to("npu")
    slots = torch.tensor([63, 0, 17])
    kernel.write(LayerArgs(), packed[:, 1], packed[:, 2], cache, slots.to("npu"))  # strided, as from a packed QKV
    k, v = cache.read(torch.arange(64, device="npu"))
    assert torch.equal(k.cpu()[slots], packed.cpu()[:, 1]) and torch.equal(v.cpu()[slots], packed.cpu()[:, 2])
    others = torch.ones(64, dtype=torch.bool)
    others[slots] = False
    assert (k.cpu()[others] == 7).all() and (v.cpu()[others] == 7).all()


@pytest.mark.parametrize("layout", [NHD_PAGED, HND_PAGED, LATENT, LATENT_NZ], ids=lambda one: one.name)
def test_blocks_go_to_the_host_and_back_bit_exact(backend: Backend, layout: KVLayout) -> None:
    spec = LATENT_SPEC if "latent" in layout.planes else SPEC
    group = KVGroup(index=0, layers=(0,), spec=spec, layout=layout, manager_block=128, kernel_block=128)
    here = backend.device.empty_cache(group, 3)
    for plane in here.planes.values():
        plane.copy_(torch.randint(-(2**15), 2**15, plane.shape, dtype=torch.int16).view(spec.dtype))  # any bits
    there = allocate_cache(spec, KVLayout("host", LATENT.planes) if spec.latent else NHD, 48, 16, "cpu")
    convert_blocks(here, torch.tensor([2, 0], device="npu"), there, torch.arange(16) + 5)
    back = backend.device.empty_cache(group, 3)
    convert_blocks(there, torch.arange(16) + 5, back, torch.tensor([2, 0], device="npu"))
    for name, plane in here.planes.items():
        for block in (0, 2):
            assert torch.equal(plane[block].cpu().view(torch.int16), back.planes[name][block].cpu().view(torch.int16))


def test_the_backend_offers_these(backend: Backend) -> None:
    for spec, layout, target in ((SPEC, NHD_PAGED, FusedAttention), (LATENT_SPEC, LATENT, LatentAttention)):
        query = AttentionQuery(spec=spec, layout=layout, block_size=128)
        assert backend.choose_attention(query).target is target
    assert [layout.name for layout in backend.layouts()][:3] == ["nhd", "hnd", "latent_rope"]
