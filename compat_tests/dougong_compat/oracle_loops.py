"""A second oracle in plain Python loops and floats, to cross-check the first on tiny cases."""

from __future__ import annotations

import math

from dougong_compat.problem import Problem

__all__ = ["attend_loops"]


def attend_loops(problem: Problem) -> tuple[list[list[list[float]]], list[list[float]], list[list[float]]]:
    """(out [T][H][Dv], lse [T][H], terms [T][H] as ``oracle.Truth`` says), one query, head and key at a time."""
    p = problem.params
    q, k, v = problem.q.double().tolist(), problem.k.double().tolist(), problem.v.double().tolist()
    k_scale = p["k_scale"] if problem.quantised else 1.0
    v_scale = p["v_scale"] if problem.quantised else 1.0
    group = problem.H // problem.K
    out, lse, terms = [], [], []
    token = 0
    for row, q_len in enumerate(problem.q_lens):
        kv_len, start = problem.kv_lens[row], problem.kv_at[row]
        for j in range(q_len):
            position = kv_len - q_len + j
            out_heads, lse_heads, term_heads = [], [], []
            for h in range(problem.H):
                scored: list[tuple[float, int]] = []
                sizes: list[float] = []
                for key in range(kv_len):
                    if p["causal"] and key > position:
                        continue
                    if p["window"] is not None and abs(key - position) >= p["window"]:
                        continue
                    products = [a * b for a, b in zip(q[token][h], k[start + key][h // group], strict=True)]
                    score = math.fsum(products) * k_scale * problem.scale
                    sizes.append(math.fsum(map(abs, products)) * abs(k_scale * problem.scale))
                    if p["softcap"] is not None:
                        score = p["softcap"] * math.tanh(score / p["softcap"])
                    if problem.slopes is not None:
                        score += float(problem.slopes[h]) * (key - position)
                    scored.append((score, key))
                answer, value = _softmax(scored, problem, h, start, group, v, v_scale)
                out_heads.append(answer)
                lse_heads.append(value)
                shares = (math.exp(score - value) * size for (score, _), size in zip(scored, sizes, strict=True))
                term_heads.append(math.fsum(shares))
            out.append(out_heads)
            lse.append(lse_heads)
            terms.append(term_heads)
            token += 1
    return out, lse, terms


def _softmax(
    scored: list[tuple[float, int]],
    problem: Problem,
    h: int,
    start: int,
    group: int,
    v: list[list[list[float]]],
    v_scale: float,
) -> tuple[list[float], float]:
    if not scored:
        return [0.0] * problem.Dv, -math.inf
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
    return answer, lse
