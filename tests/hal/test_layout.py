"""Layouts: one description gives shape, reading, writing and conversion."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dougong.hal import (
    HND,
    NHD,
    NZ16,
    X_PACKED,
    AttentionSpec,
    Exactly,
    KVLayout,
    Multiple,
    OneOf,
    allocate_cache,
    convert_blocks,
    copy_blocks,
)
from dougong.hal.layout import PlaneLayout

LAYOUTS = [NHD, HND, NZ16, X_PACKED, KVLayout("tiled_n", {"k": "b n/4 (h d) 4", "v": "b h n/4 d 4"})]


def spec(dtype: torch.dtype = torch.float16, **more: object) -> AttentionSpec:
    return AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, dtype=dtype, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("b n h d", (5, 16, 2, 32)),
        ("b h n d", (5, 2, 16, 32)),
        ("b (h d/16) n 16", (5, 4, 16, 16)),
        ("b h d/x n x", (5, 2, 4, 16, 8)),
        ("b h d n", (5, 2, 32, 16)),
        ("b n (h d)", (5, 16, 64)),
    ],
)
def test_shape(text: str, shape: tuple[int, ...]) -> None:
    assert PlaneLayout.parse(text).shape(5, 16, 2, 32, itemsize=2) == shape


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("b n h", "'d'"),
        ("b n h d d", "'d'"),
        ("b n h d/16", "'d'"),
        ("b n h d/16 8", "'8'"),
        ("b (n (h d))", "nest"),
        ("b (n h d", "unbalanced"),
        ("b n h d é", "cannot read"),
    ],
)
def test_wrong_descriptions_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match="layout") as error:
        PlaneLayout.parse(text)
    assert problem in str(error.value)


def test_a_size_that_is_no_multiple_of_its_tile_is_named() -> None:
    with pytest.raises(ValueError, match="d=40 is not a multiple of its tile 16"):
        PlaneLayout.parse("b (h d/16) n 16").shape(1, 16, 2, 40, 2)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(LAYOUTS), st.integers(0, 40), st.randoms(use_true_random=False))
def test_what_is_written_is_read_and_nothing_else_changes(layout: KVLayout, count: int, random: object) -> None:
    cache = allocate_cache(spec(), layout, 3, 16, "cpu")
    for plane in cache.planes.values():
        plane.fill_(7.0)
    slots = torch.tensor(random.sample(range(48), count), dtype=torch.int64)  # type: ignore[attr-defined]
    k, v = torch.randn(count, 2, 32).half(), torch.randn(count, 2, 32).half()
    cache.write(slots, k, v)
    got_k, got_v = cache.read(slots)
    assert torch.equal(got_k, k)
    assert torch.equal(got_v, v)
    rest = torch.tensor([slot for slot in range(48) if slot not in set(slots.tolist())], dtype=torch.int64)
    assert all(bool((part == 7.0).all()) for part in cache.read(rest))
    assert sum(int((plane != 7.0).sum()) for plane in cache.planes.values()) <= 2 * k.numel()


@pytest.mark.parametrize("source", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("target", LAYOUTS, ids=lambda layout: layout.name)
def test_conversion_is_bit_exact_between_layouts_and_block_sizes(source: KVLayout, target: KVLayout) -> None:
    big = 32 if target.block_sizes.allows(32) else 16
    a = allocate_cache(spec(), source, 6, 16, "cpu")
    b = allocate_cache(spec(), target, 6, big, "cpu")
    slots = torch.arange(96)
    k, v = torch.randn(96, 2, 32).half(), torch.randn(96, 2, 32).half()
    a.write(slots, k, v)
    from_blocks = torch.tensor([4, 1, 3, 0])
    to_blocks = torch.tensor([5, 2] if big == 32 else [5, 2, 0, 3])
    convert_blocks(a, from_blocks, b, to_blocks)
    got, _ = b.read((to_blocks[:, None] * big + torch.arange(big)).flatten())
    want, _ = a.read((from_blocks[:, None] * 16 + torch.arange(16)).flatten())
    assert torch.equal(got, want)


def test_conversion_refuses_another_dtype_and_another_count() -> None:
    a = allocate_cache(spec(), NHD, 4, 16, "cpu")
    b = allocate_cache(spec(torch.float32), NHD, 4, 16, "cpu")
    with pytest.raises(ValueError, match="bit-exact"):
        convert_blocks(a, torch.tensor([0]), b, torch.tensor([0]))
    with pytest.raises(ValueError, match="16 tokens cannot fill 32 slots"):
        convert_blocks(a, torch.tensor([0]), a, torch.tensor([1, 2]))


def test_copy_blocks_copies_every_plane() -> None:
    cache = allocate_cache(spec(), X_PACKED, 4, 16, "cpu")
    for plane in cache.planes.values():
        plane.copy_(torch.randn(plane.shape))
    before = {name: plane.clone() for name, plane in cache.planes.items()}
    copy_blocks([cache], torch.tensor([3, 0]), torch.tensor([1, 2]))
    for name, plane in cache.planes.items():
        assert torch.equal(plane[1], before[name][3])
        assert torch.equal(plane[2], before[name][0])
        assert torch.equal(plane[[0, 3]], before[name][[0, 3]])


def test_block_sizes_say_what_is_near() -> None:
    assert Multiple(16).nearest(20) == 16
    assert Multiple(128, 512).nearest(1000) == 512
    assert not Multiple(128, 512).allows(640)
    assert OneOf((16, 32)).nearest(40) == 32
    assert Exactly(128).allows(128)
    assert not Exactly(128).allows(64)
    assert "nearest is 128" in KVLayout("x", block_sizes=Exactly(128)).refusal(16, [(2, 32), (2, 32)], 2)
    assert "multiple of its tile" in NZ16.refusal(16, [(2, 40), (2, 40)], 2)
    assert NHD.refusal(7, [(2, 40), (2, 40)], 2) == ""


def test_the_allocator_obeys_a_layouts_element_bound() -> None:
    with pytest.raises(ValueError, match="allows at most"):
        allocate_cache(spec(), KVLayout("small", max_elements=16 * 2 * 32 * 3), 4, 16, "meta")


def test_a_latent_cache_has_its_value_inside_its_key() -> None:
    latent = AttentionSpec(num_heads=8, num_kv_heads=1, head_dim=72, head_dim_v=64, latent=True, dtype=torch.float32)
    for layout in (KVLayout("one", {"k": "b n h d"}), KVLayout("two", {"latent": "b n h d", "rope": "b n h d"})):
        cache = allocate_cache(latent, layout, 2, 4, "cpu")
        k = torch.randn(8, 1, 72)
        cache.write(torch.arange(8), k, k[..., :64])
        got_k, got_v = cache.read(torch.arange(8))
        assert torch.equal(got_k, k)
        assert torch.equal(got_v, k[..., :64])
