"""The oracle agrees with plain loops, and the loops see every bug planted in it."""

from __future__ import annotations

import torch

from dougong_compat.oracle import attend
from dougong_compat.problem import build
from dougong_compat.selftest.oracle_bugs import BUGS, agrees, survivors
from dougong_compat.tolerance import CLASSES, judge_attention, lse_bound


def test_two_oracles_agree() -> None:
    assert agrees(attend)


def test_every_bug_in_the_oracle_is_seen() -> None:
    assert len(BUGS) >= 10
    assert survivors() == []


def test_a_row_that_sees_nothing_is_zero_and_minus_infinity() -> None:
    problem = build({"dtype": "float32", "layout": "nhd", "block": 16, "rows": [[1, 0], [3, 2]]}, 1)
    truth = attend(problem)
    assert float(truth.out[0].abs().max()) == 0 and torch.isneginf(truth.lse[0]).all()
    assert float(truth.out[1].abs().max()) == 0 and torch.isneginf(truth.lse[1]).all()
    assert float(truth.out[2].abs().max()) > 0


def test_tolerance_is_a_matter_of_units_of_the_output() -> None:
    want = torch.randn(4, 3, 64, dtype=torch.float64)
    zeros = torch.zeros(4, 3, dtype=torch.float64)
    for dtype, u in ((torch.float32, 2.0**-24), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        for units, ok in ((1.0, True), (60.0, False)):
            if dtype == torch.float32 and units == 1.0:
                units = 20.0  # float32 has room for 32 units of accumulation
            off = (want * (1 + units * u)).to(dtype)
            verdict = judge_attention(off, None, want, zeros, zeros, zeros + 1, None, CLASSES["strict"])
            assert verdict.ok is ok, (dtype, units, verdict)


def test_relaxed_allows_more_and_only_that() -> None:
    want = torch.randn(2, 2, 64, dtype=torch.float64)
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    off = (want * (1 + 8 * 2.0**-8)).to(torch.bfloat16)
    args = (off, None, want, zeros, zeros, zeros + 1, None)
    assert not judge_attention(*args, CLASSES["strict"]).ok
    assert judge_attention(*args, CLASSES["relaxed"]).ok


def test_mean_rule_catches_what_every_row_hides() -> None:
    want = torch.randn(64, 4, 64, dtype=torch.float64)
    zeros = torch.zeros(64, 4, dtype=torch.float64)
    biased = (want * (1 + 3.2 * 2.0**-8)).to(torch.bfloat16)
    eager = want.to(torch.bfloat16)
    assert judge_attention(biased, None, want, zeros, zeros, zeros + 1, None, CLASSES["strict"]).ok
    verdict = judge_attention(biased, None, want, zeros, zeros, zeros + 1, eager, CLASSES["strict"])
    assert not verdict.ok and "mean" in verdict.message


def test_lse_must_be_minus_infinity_exactly_where_nothing_is_seen() -> None:
    want = torch.zeros(1, 1, 8, dtype=torch.float64)
    lse = torch.full((1, 1), -torch.inf, dtype=torch.float64)
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    out = torch.zeros(1, 1, 8)
    for value, ok in ((-torch.inf, True), (-1e30, False), (float("nan"), False), (0.0, False)):
        got = torch.full((1, 1), value)
        assert judge_attention(
            out, got, want, lse, zeros, zeros, None, CLASSES["strict"], lse_bound(lse, zeros, 64, None)
        ).ok is ok, value  # fmt: skip


def test_the_bound_on_lse_follows_what_was_summed_and_not_what_came_out() -> None:
    """Large products that cancel: a float32 kernel is right, one with TF32 products is not, though |LSE| is below 1."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(64, 1, 128, generator=generator) * 10 for _ in range(2))
    k = k - q * (q * k).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True)  # one key a query, nearly at right angles
    score = (q.double() * k.double()).sum(-1) / 128**0.5
    terms = (q.double() * k.double()).abs().sum(-1) / 128**0.5
    assert float(score.abs().max()) < 1 and float(terms.min()) > 50
    bound = lse_bound(score, terms, 128, None)
    honest = ((q * k).sum(-1) / 128**0.5).double()
    coarse, other = (((x.view(torch.int32) + 4096) & -8192).view(torch.float32) for x in (q, k))
    tf32 = ((coarse * other).sum(-1) / 128**0.5).double()
    assert float(((honest - score).abs() / bound).max()) < 0.5
    assert float(((honest - score).abs() / (2.0**-20 * (1 + score.abs()))).max()) > 1, "what the old bound failed"
    assert float(((tf32 - score).abs() / bound).max()) > 5


def test_a_softcap_gives_room_for_its_tanh() -> None:
    zero = torch.zeros(1, 1, dtype=torch.float64)
    assert float(lse_bound(zero, zero, 64, 30.0)) == 2.0**-20 + 120 * 2.0**-24
    assert float(lse_bound(zero - torch.inf, zero, 64, None)) == 2.0**-20
