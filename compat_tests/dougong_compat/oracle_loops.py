"""A second oracle in plain Python loops and floats, to cross-check the first on tiny cases."""

from __future__ import annotations

import math

from dougong_compat.problem import Problem

__all__ = ["attend_loops"]


_Rows = list[list[float]]


def attend_loops(problem: Problem) -> tuple[list[_Rows], _Rows, _Rows, _Rows]:
    """(out [T][H][Dv]; lse, out_room and lse_room [T][H]) as ``oracle.Truth`` says, a query, head and key at a time."""
    p = problem.params
    q, k, v = problem.q.double().tolist(), problem.k.double().tolist(), problem.v.double().tolist()
    k_scale = p["k_scale"] if problem.quantised else 1.0
    v_scale = p["v_scale"] if problem.quantised else 1.0
    group = problem.H // problem.K
    out: list[_Rows] = []
    lse: _Rows = []
    out_room: _Rows = []
    lse_room: _Rows = []
    token = 0
    for row, q_len in enumerate(problem.q_lens):
        kv_len, start = problem.kv_lens[row], problem.kv_at[row]
        for j in range(q_len):
            position = kv_len - q_len + j
            heads: list[tuple[list[float], float, float, float]] = []
            for h in range(problem.H):
                scored: list[tuple[float, int]] = []
                errors: list[float] = []
                for key in range(kv_len):
                    if p["causal"] and key > position:
                        continue
                    if p["window"] is not None and abs(key - position) >= p["window"]:
                        continue
                    products = [a * b for a, b in zip(q[token][h], k[start + key][h // group], strict=True)]
                    products = [product * k_scale * problem.scale for product in products]
                    score = math.fsum(products)
                    spread = score**2 + math.fsum(product**2 for product in products) / 2
                    errors.append(2 * math.sqrt(problem.D * spread) + 4 * (p["softcap"] or 0.0))
                    if p["softcap"] is not None:
                        score = p["softcap"] * math.tanh(score / p["softcap"])
                    if problem.slopes is not None:
                        score += float(problem.slopes[h]) * (key - position)
                    scored.append((score, key))
                answer, value, shares = _softmax(scored, problem, h, start, group, v, v_scale)
                seen = [[x * v_scale for x in v[start + key][h // group]] for _, key in scored]
                moved = (
                    (share * error * math.dist(value_of_key, answer)) ** 2
                    for share, error, value_of_key in zip(shares, errors, seen, strict=True)
                )
                weighed = (math.exp(score - value) * error for (score, _), error in zip(scored, errors, strict=True))
                heads.append((answer, value, math.sqrt(math.fsum(moved)), math.fsum(weighed)))
            out.append([answer for answer, _, _, _ in heads])
            lse.append([value for _, value, _, _ in heads])
            out_room.append([room for _, _, room, _ in heads])
            lse_room.append([room for _, _, _, room in heads])
            token += 1
    return out, lse, out_room, lse_room


def _softmax(
    scored: list[tuple[float, int]],
    problem: Problem,
    h: int,
    start: int,
    group: int,
    v: list[list[list[float]]],
    v_scale: float,
) -> tuple[list[float], float, list[float]]:
    """(out, lse, each key's share of out)."""
    if not scored:
        return [0.0] * problem.Dv, -math.inf, []
    sink = None if problem.sinks is None else float(problem.sinks[h])
    top = max(score for score, _ in scored)
    highest = top if sink is None else max(top, sink)
    visible = math.fsum(math.exp(score - highest) for score, _ in scored)
    total = visible + (0.0 if sink is None else math.exp(sink - highest))
    lse = top + math.log(math.fsum(math.exp(score - top) for score, _ in scored))
    answer = []
    for d in range(problem.Dv):
        parts = (math.exp(score - highest) * v[start + key][h // group][d] for score, key in scored)
        answer.append(math.fsum(parts) * v_scale / total)
    return answer, lse, [math.exp(score - highest) / total for score, _ in scored]
