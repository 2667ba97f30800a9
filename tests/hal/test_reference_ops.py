"""The reference of the fused ops is their composition; sampling follows its distribution and its seeds."""

from __future__ import annotations

import math

import pytest
import torch

from dougong.hal import NHD, AttentionSpec, LayerArgs, QKVShape, QuantizedWeight, RopeTable, allocate_cache
from dougong.hal.reference import ops, sampling
from dougong.hal.reference.linear import quantize_weight


def table(size: int, interleaved: bool = False) -> RopeTable:
    angle = torch.arange(64)[:, None] * 0.1 ** torch.arange(size // 2)[None, :]
    return RopeTable(torch.cat((angle.cos(), angle.sin()), -1), interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_turns_each_pair_by_its_angle(interleaved: bool) -> None:
    x = torch.randn(5, 3, 16)
    positions = torch.tensor([0, 3, 9, 63, 1])
    rope = table(8, interleaved)
    out = ops.rope(x, rope, positions)
    assert torch.equal(out[..., 8:], x[..., 8:])
    for t, position in enumerate(positions.tolist()):
        for pair in range(4):
            a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 4)
            turn = complex(rope.cos_sin[position, pair], rope.cos_sin[position, pair + 4])
            for h in range(3):
                want = complex(x[t, h, a], x[t, h, b]) * turn
                assert abs(complex(out[t, h, a], out[t, h, b]) - want) < 1e-5


def test_qk_norm_rope_write_is_the_composition() -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype=torch.float32)
    cache = allocate_cache(spec, NHD, 3, 4, "cpu")
    shape = QKVShape(4, 2, 16, 16, q_norm=torch.rand(16), k_norm=torch.rand(16), eps=1e-5)
    qkv = torch.randn(5, (4 + 2 + 2) * 16)
    slots, positions = torch.tensor([11, 0, 5, 7, 2]), torch.tensor([9, 8, 1, 2, 3])
    q = ops.qk_norm_rope_write(qkv.clone(), shape, table(16), positions, LayerArgs(), cache, slots)
    raw_q, raw_k, raw_v = qkv[:, :64].view(5, 4, 16), qkv[:, 64:96].view(5, 2, 16), qkv[:, 96:].view(5, 2, 16)
    assert torch.equal(q, ops.rope(ops.rms_norm(raw_q, shape.q_norm, 1e-5), table(16), positions))
    k, v = cache.read(slots)
    assert torch.equal(k, ops.rope(ops.rms_norm(raw_k, shape.k_norm, 1e-5), table(16), positions))
    assert torch.equal(v, raw_v)


def test_merge_of_two_parts_is_attention_over_both_and_empty_parts_are_nothing() -> None:
    scores, values = torch.randn(3, 2, 10), torch.randn(10, 8)

    def part(lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
        s = scores[..., lo:hi]
        return s.softmax(-1) @ values[lo:hi], s.logsumexp(-1)

    out, lse = ops.merge_lse(*part(0, 4), *part(4, 10))
    whole, whole_lse = part(0, 10)
    assert torch.allclose(out, whole, atol=1e-6)
    assert torch.allclose(lse, whole_lse, atol=1e-6)
    nothing, none = torch.full((3, 2, 8), math.nan), torch.full((3, 2), -math.inf)
    out, lse = ops.merge_lse(nothing, none, *part(0, 10))
    assert torch.allclose(out, whole, atol=1e-6)
    out, lse = ops.merge_lse(nothing, none, nothing, none)
    assert torch.equal(out, torch.zeros(3, 2, 8))
    assert torch.equal(lse, none)


def test_a_drawn_token_depends_only_on_its_seed_and_position() -> None:
    logits = torch.randn(6, 50)
    arguments = {"top_k": None, "top_p": None, "min_p": None}
    seeds, positions = torch.arange(6) * 7919, torch.arange(6) + 3
    together = sampling.sample(logits.clone(), torch.ones(6), seeds=seeds, positions=positions, **arguments)
    for row in range(6):
        one = slice(row, row + 1)
        alone = sampling.sample(
            logits[one].clone(), torch.ones(1), seeds=seeds[one], positions=positions[one], **arguments
        )
        assert alone == together[row]


def test_draws_follow_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    count = 20_000
    drawn = sampling.sample(
        probabilities.log().expand(count, 4).clone(), torch.ones(count), None, None, None,
        torch.arange(count), torch.zeros(count, dtype=torch.int64),
    )  # fmt: skip
    share = torch.bincount(drawn, minlength=4) / count
    assert (share - probabilities).abs().max() < 4 * math.sqrt(0.25 / count)


def test_masks_keep_what_they_should() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).log_softmax(-1)
    keep = lambda masked: torch.isfinite(masked[0]).nonzero().flatten().tolist()  # noqa: E731
    assert keep(sampling.mask_top(logits.clone(), torch.tensor([2]), None, None)) == [0, 1]
    assert keep(sampling.mask_top(logits.clone(), torch.tensor([0]), None, None)) == [0, 1, 2, 3, 4]
    assert keep(sampling.mask_top(logits.clone(), None, torch.tensor([0.7]), None)) == [0, 1]
    assert keep(sampling.mask_top(logits.clone(), None, torch.tensor([1e-9]), None)) == [0]
    assert keep(sampling.mask_top(logits.clone(), None, None, torch.tensor([0.1]))) == [0, 1, 2]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0]])
    args = (None, None, None, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert sampling.sample(logits, torch.zeros(1), *args).tolist() == [1]


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rounded_weights_are_near_and_rounding_twice_changes_nothing(form: str) -> None:
    weight = torch.randn(6, 64)
    packed = quantize_weight(weight, form)
    back = packed.dequantize()
    step = packed.scale.max()
    assert (back - weight).abs().max() <= step / 2 * 1.001
    again = quantize_weight(back, form).dequantize()
    assert torch.allclose(again, back, atol=1e-5)


def test_a_weight_given_in_nibbles_is_read_low_nibble_first() -> None:
    packed = QuantizedWeight(
        "int4",
        torch.tensor([[0x21, 0x43]], dtype=torch.uint8),
        torch.tensor([[2.0]]),
        torch.tensor([[-1.0]]),
        4,
        (1, 4),
    )
    assert packed.dequantize().tolist() == [[1.0, 3.0, 5.0, 7.0]]
