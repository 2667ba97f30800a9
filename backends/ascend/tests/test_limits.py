"""What the operators cannot do is refused before they are chosen, with the nearest thing that works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dougong.hal import NHD, AttentionQuery, AttentionSpec, KVLayout, Refusal
from dougong_ascend.layouts import HND_PAGED, LATENT, LATENT_NZ, NHD_PAGED, NZ
from dougong_ascend.limits import fused_refusals, gathered_refusals, latent_refusals, nz_refusals

SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)
HALF = replace(SPEC, dtype=torch.float16, kv_dtype=torch.float16)
MLA = AttentionSpec(num_heads=32, num_kv_heads=1, head_dim=576, head_dim_v=512, latent=True)


def ask(rule: Any, spec: AttentionSpec, layout: KVLayout, block: int = 128, **options: Any) -> tuple[Refusal, ...]:
    found: tuple[Refusal, ...] = rule(AttentionQuery(spec=spec, layout=layout, block_size=block, **options))
    return found


@pytest.mark.parametrize("layout", [NHD_PAGED, HND_PAGED])
def test_what_the_fused_operator_does(layout: KVLayout) -> None:
    for spec in (SPEC, HALF, replace(SPEC, window=9, lse=True, sinks=True), replace(SPEC, causal=False)):
        for block in (16, 48, 128, 512):
            assert ask(fused_refusals, spec, layout, block) == ()
    assert ask(fused_refusals, SPEC, NHD, ragged=True) == ()


@pytest.mark.parametrize(
    ("changes", "reason", "nearest"),
    [
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, "float32", "bfloat16"),
        ({"kv_dtype": torch.float8_e4m3fn}, "float8", "or int8"),
        ({"softcap": 30.0}, "softcap", "no softcap"),
        ({"alibi": True}, "ALiBi", "no ALiBi"),
        ({"head_dim": 40, "head_dim_v": 40}, "head_dim=40", "head_dim=48"),
        ({"head_dim": 528, "head_dim_v": 528}, "head_dim=528", "head_dim=512"),
        ({"head_dim_v": 64}, "head_dim_v=64", "head_dim_v=128"),
        ({"num_heads": 258}, "258 query heads", "256"),
        ({"num_heads": 130}, "65 query heads per kv head", "64"),
        ({"num_heads": 256, "num_kv_heads": 256, "head_dim": 256, "head_dim_v": 256}, "65536 elements", "hnd"),
    ],
)
def test_what_it_does_not(changes: dict[str, Any], reason: str, nearest: str) -> None:
    refusals = ask(fused_refusals, replace(SPEC, **changes), NHD_PAGED)
    assert any(reason in one.reason and nearest in one.nearest for one in refusals), refusals


def test_the_longest_row() -> None:
    assert ask(fused_refusals, SPEC, NHD_PAGED, max_kv_len=262144) == ()
    (refusal,) = ask(fused_refusals, SPEC, NHD_PAGED, max_kv_len=262145)
    assert "262145 keys" in refusal.reason and refusal.nearest == "262144"


def test_int8_caches() -> None:
    spec = replace(SPEC, kv_dtype=torch.int8)
    assert ask(fused_refusals, spec, NHD_PAGED, 32) == () == ask(gathered_refusals, spec, NHD_PAGED, 16)
    assert "multiples of 32" in ask(fused_refusals, spec, NHD_PAGED, 48)[0].reason
    assert ask(fused_refusals, spec, NHD, ragged=True) and ask(gathered_refusals, SPEC, NHD_PAGED)
    assert ask(latent_refusals, replace(MLA, kv_dtype=torch.int8), LATENT)
    assert ask(nz_refusals, replace(HALF, kv_dtype=torch.int8), NZ)


@pytest.mark.parametrize(("block", "nearest"), [(8, "16"), (40, "32"), (544, "512"), (1, "16")])
def test_block_sizes(block: int, nearest: str) -> None:
    (refusal,) = ask(fused_refusals, SPEC, NHD, block)
    assert nearest in refusal.nearest


def test_wide_caches_fit_with_heads_outside() -> None:
    wide = replace(SPEC, num_heads=256, num_kv_heads=256, head_dim=256, head_dim_v=256)
    assert ask(fused_refusals, wide, HND_PAGED) == ()


def test_other_layouts_and_promises_are_refused() -> None:
    assert ask(fused_refusals, SPEC, NZ)
    assert ask(fused_refusals, SPEC, NHD_PAGED, batch_invariant=True)
    assert ask(fused_refusals, MLA, NHD_PAGED)


@pytest.mark.parametrize(
    ("changes", "block", "reason"),
    [
        ({"num_heads": 24}, 128, "24 query heads"),
        ({"lse": True}, 128, "LSE"),
        ({"sinks": True}, 128, "sinks"),
        ({"window": 5}, 128, "window"),
        ({"causal": False}, 128, "no mask"),
        ({"head_dim": 320, "head_dim_v": 256}, 128, "latent 256"),
        ({}, 64, "block size 64"),
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, 128, "float32"),
    ],
)
def test_latent(changes: dict[str, Any], block: int, reason: str) -> None:
    assert ask(latent_refusals, MLA, LATENT, 16) == () == ask(latent_refusals, MLA, LATENT, 128)
    assert any(reason in one.reason for one in ask(latent_refusals, replace(MLA, **changes), LATENT, block))


def test_latent_in_tiles() -> None:
    def ask_tiled(spec: AttentionSpec, layout: KVLayout, block: int) -> str:
        query = AttentionQuery(spec=spec, layout=layout, block_size=block)
        return "; ".join(one.reason for one in latent_refusals(query, tiled=True))

    assert ask_tiled(MLA, LATENT_NZ, 128) == ""
    assert "block size 16" in ask_tiled(MLA, LATENT_NZ, 16)
    assert "up to 64" in ask_tiled(replace(MLA, num_heads=128), LATENT_NZ, 128)
    assert "latent_rope_nz16" in ask_tiled(MLA, LATENT, 128)


@pytest.mark.parametrize(
    ("changes", "block", "reason"),
    [
        ({"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16}, 128, "bfloat16"),
        ({"lse": True}, 128, "LSE"),
        ({"sinks": True}, 128, "sinks"),
        ({"window": 5}, 128, "window"),
        ({"head_dim": 256, "head_dim_v": 256}, 128, "multiples of 16 up to 64"),
        ({"head_dim": 40, "head_dim_v": 40}, 128, "head_dim=40"),
        ({}, 24, "block size 24"),
        ({}, 256, "block size 256"),
    ],
)
def test_310p(changes: dict[str, Any], block: int, reason: str) -> None:
    assert ask(nz_refusals, HALF, NZ) == () == ask(nz_refusals, replace(HALF, causal=False), NZ, 16)
    assert any(reason in one.reason for one in ask(nz_refusals, replace(HALF, **changes), NZ, block))
    assert ask(nz_refusals, HALF, NHD_PAGED)
