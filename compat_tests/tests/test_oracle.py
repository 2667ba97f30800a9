"""The oracle agrees with plain loops, and the loops see every bug planted in it."""

from __future__ import annotations

import torch

from dougong_compat.oracle import Truth, attend
from dougong_compat.problem import Problem, build
from dougong_compat.selftest.oracle_bugs import BUGS, agrees, survivors
from dougong_compat.tolerance import CLASSES, judge_attention


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


def truth_of(want: torch.Tensor, lse: float = 0.0) -> Truth:
    """What the oracle would say of rows whose scores are all 0 and whose largest value is 1."""
    truth = Truth.empty(*want.shape)
    truth.out, truth.lse, truth.max_value = want, torch.full(want.shape[:2], lse).double(), truth.max_value + 1
    return truth


def test_tolerance_is_a_matter_of_units_of_the_output() -> None:
    want = torch.randn(4, 3, 64, dtype=torch.float64)
    for dtype, u in ((torch.float32, 2.0**-24), (torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)):
        for units, ok in ((1.0, True), (60.0, False)):
            if dtype == torch.float32 and units == 1.0:
                units = 20.0  # float32 has room for 32 units of accumulation
            off = (want * (1 + units * u)).to(dtype)
            verdict = judge_attention(off, None, truth_of(want), None, CLASSES["strict"])
            assert verdict.ok is ok, (dtype, units, verdict)


def test_relaxed_allows_more_and_only_that() -> None:
    want = torch.randn(2, 2, 64, dtype=torch.float64)
    off = (want * (1 + 8 * 2.0**-8)).to(torch.bfloat16)
    assert not judge_attention(off, None, truth_of(want), None, CLASSES["strict"]).ok
    assert judge_attention(off, None, truth_of(want), None, CLASSES["relaxed"]).ok


def test_mean_rule_catches_what_every_row_hides() -> None:
    want = torch.randn(64, 4, 64, dtype=torch.float64)
    biased = (want * (1 + 3.2 * 2.0**-8)).to(torch.bfloat16)
    assert judge_attention(biased, None, truth_of(want), None, CLASSES["strict"]).ok
    verdict = judge_attention(biased, None, truth_of(want), want.to(torch.bfloat16), CLASSES["strict"])
    assert not verdict.ok and "mean" in verdict.message


def test_lse_must_be_minus_infinity_exactly_where_nothing_is_seen() -> None:
    truth = truth_of(torch.zeros(1, 1, 8, dtype=torch.float64), -torch.inf)
    for value, ok in ((-torch.inf, True), (-1e30, False), (float("nan"), False), (0.0, False)):
        got = torch.full((1, 1), value)
        assert judge_attention(torch.zeros(1, 1, 8), got, truth, None, CLASSES["strict"]).ok is ok, value


def cancelling(keys: int) -> Problem:
    """Queries and keys of size 10 at right angles, nearly: scores near 0, out of products that are not."""
    params = {"dtype": "float32", "layout": "nhd", "block": 16, "H": 1, "K": 1, "D": 128, "rows": [[1, keys]] * 64}
    problem = build(params, 3)
    q, k = problem.q.double() * 10, problem.k.double().view(64, keys, 128) * 10
    k = k - q * (q * k).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True)
    problem.q, problem.k = q.float(), k.view(64 * keys, 1, 128).float()
    return problem


def answers(problem: Problem, keys: int, cut: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in float32, of q and k without their last ``cut`` bits (13: what TF32 products keep)."""
    q, k = (((x.contiguous().view(torch.int32) + (1 << cut >> 1)) & -(1 << cut)).view(torch.float32)
            for x in (problem.q, problem.k))  # fmt: skip
    score = (q * k.view(64, keys, 128)).sum(-1) * problem.scale
    out = torch.einsum("ts,tsd->td", score.softmax(-1), problem.v.view(64, keys, 128))
    return out[:, None], score.logsumexp(-1)[:, None]


def test_bounds_follow_what_scores_are_summed_from_and_not_what_comes_out() -> None:
    """Large products that cancel: a float32 kernel is right, one with TF32 products is not."""
    for keys in (1, 5):
        problem = cancelling(keys)
        truth = attend(problem)
        out, lse = answers(problem, keys, 0)
        verdict = judge_attention(out, lse, truth, None, CLASSES["strict"])
        assert verdict.ok and 0.02 < (verdict.margin or 0) < 0.9, verdict
        near = (lse.double() - truth.lse).abs() / (2.0**-20 * (1 + truth.lse.abs()))
        assert float(near.max()) > 1, "without the room honest kernels fail"
        coarse_out, coarse_lse = answers(problem, keys, 13)
        assert "lse" in judge_attention(out, coarse_lse, truth, None, CLASSES["strict"]).message
        if keys > 1:
            assert "out" in judge_attention(coarse_out, lse, truth, None, CLASSES["strict"]).message


def test_a_softcap_gives_room_for_its_tanh() -> None:
    params = {"dtype": "float32", "layout": "nhd", "block": 16, "rows": [[1, 1]], "values": "flat"}
    free, capped = (attend(build({**params, "softcap": cap}, 1)).lse_room for cap in (None, 30.0))
    assert float(free.max()) == 0 and float(capped.min()) == float(capped.max()) == 120
