"""The oracle mutated: the second oracle, in plain loops, must see each bug on tiny cases."""

from __future__ import annotations

import sys
import types
from importlib import resources
from typing import Any

import torch

from dougong_compat.oracle_loops import attend_loops
from dougong_compat.problem import build

__all__ = ["BUGS", "agrees", "survivors", "tiny_problems"]

#: Name -> (line of the oracle, what it becomes).
BUGS: dict[str, tuple[str, str]] = {
    "strict-causal": ("visible &= distance <= 0", "visible &= distance < 0"),
    "window-plus-one": ('visible &= distance.abs() < p["window"]', 'visible &= distance.abs() <= p["window"]'),
    "top-left": ("errors, v, kv_len - q_len)", "errors, v, 0)"),
    "softcap-dropped": ('scores = p["softcap"] * torch.tanh(scores / p["softcap"])', "pass"),
    "alibi-sign": (
        "problem.slopes.double()[None, :, None] * distance",
        "problem.slopes.double()[None, :, None] * -distance",
    ),
    "sink-in-lse": (
        "    truth.lse[where] = torch.log(total) + top\n",
        (
            "    if problem.sinks is not None:\n        total = total + torch.exp(problem.sinks.double() - top)\n"
            "    truth.lse[where] = torch.log(total) + top\n"
        ),
    ),
    "sink-dropped": ("        total = total + torch.exp(problem.sinks.double() - top)\n", "        pass\n"),
    "heads-interleaved": (
        "head = torch.arange(problem.H) // (problem.H // problem.K)",
        "head = torch.arange(problem.H) % problem.K",
    ),
    "scale-dropped": ('torch.einsum("qhd,shd->qhs", q, k) * problem.scale', 'torch.einsum("qhd,shd->qhs", q, k)'),
    "k-scale-dropped": ("(problem.k[span].double() * k_scale)", "(problem.k[span].double())"),
    "v-scale-dropped": ("(problem.v[span].double() * v_scale)", "(problem.v[span].double())"),
    "room-of-sums": ('torch.einsum("qhd,shd->qhs", q**2, k**2) * problem.scale**2', "scores**2"),
    "room-without-the-score": ("torch.sqrt(scores**2 + squares / 2)", "torch.sqrt(squares / 2)"),
    "room-not-weighed": ("(weights * errors).sum(-1) / torch", "errors.sum(-1) / torch"),
    "room-not-squared": ("((weights * errors) ** 2 * apart", "((weights * errors) * apart"),
    "room-by-size-of-v": ('- 2 * torch.einsum("qhd,shd->qhs", out, v) ', ""),
    "cap-without-room": ('problem.params["softcap"] or 0.0', "0.0"),
    "scale-on-plain": ("    if not problem.quantised:\n        return 1.0, 1.0\n", ""),
}


def tiny_problems() -> list[Any]:
    """Problems small enough for loops, every feature among them."""
    base = {
        "dtype": "float32",
        "layout": "nhd",
        "block": 4,
        "D": 4,
        "H": 4,
        "K": 2,
        "rows": [[1, 5], [3, 7], [2, 1], [1, 0]],
    }
    changes: list[dict[str, Any]] = [
        {}, {"window": 2}, {"window": 3, "causal": False}, {"softcap": 1.5}, {"alibi": True}, {"sinks": True},
        {"causal": False}, {"scale": 0.7}, {"sinks": True, "alibi": True, "softcap": 2.0, "window": 4},
        {"kv": "int8", "k_scale": 0.05, "v_scale": 0.1}, {"k_scale": 3.0, "v_scale": 2.0}, {"Dv": 2}, {"H": 6, "K": 2},
    ]  # fmt: skip
    return [build({**base, **change}, 100 + index) for index, change in enumerate(changes)]


def agrees(attend: Any) -> bool:
    """Whether an oracle agrees with the loops on every tiny problem, to 1e-11."""
    for problem in tiny_problems():
        truth = attend(problem)
        for got, loops in zip(
            (truth.out, truth.lse, truth.out_room, truth.lse_room), attend_loops(problem), strict=True
        ):
            want = torch.tensor(loops, dtype=torch.float64).reshape(got.shape)
            if not torch.allclose(got, want, rtol=1e-6, atol=1e-9):
                return False
    return True


def survivors() -> list[str]:
    """Planted bugs that the loops do not see (and ``honest`` if the oracle itself disagrees)."""
    whole = resources.files("dougong_compat").joinpath("oracle.py").read_text(encoding="utf-8")
    text, cut, rest = whole.partition("\ndef eager")
    left = []
    for name, (old, new) in {"honest": ("", ""), **BUGS}.items():
        if old and text.count(old) != 1:
            raise ValueError(f"oracle bug {name}: {text.count(old)} places read {old!r}, expected one")
        module = types.ModuleType("oracle_mutant")
        sys.modules["oracle_mutant"] = module
        source = (text.replace(old, new) if old else text) + cut + rest
        exec(compile(source, f"<oracle {name}>", "exec"), module.__dict__)
        if agrees(module.attend) is not (name == "honest"):
            left.append(name)
    return left
