"""An attention problem from a case's parameters and a seed: the same in the parent and in the worker.

K and V are made contiguous per row, already rounded to the cache's dtype. The oracle reads them so; only the worker's
harness puts them into a paged cache. Nothing here imports the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dougong_compat.numbers import dtype_of, quantise

__all__ = ["DEFAULTS", "Problem", "build", "layout_text"]

#: Every parameter of an attention case and what it is when the case does not say.
DEFAULTS: dict[str, Any] = {
    "dtype": "own",
    "kv": "",
    "layout": "own",
    "block": 0,
    "H": 4,
    "K": 2,
    "D": 64,
    "Dv": 0,
    "window": None,
    "softcap": None,
    "alibi": False,
    "sinks": False,
    "causal": True,
    "lse": True,
    "latent": False,
    "scale": 0.0,
    "k_scale": 1.0,
    "v_scale": 1.0,
    "scale_tensor": False,
    "rows": [[1, 17], [1, 5]],
    "ragged": False,
    "values": "normal",
    "tail": "nan",
    "table_tail": "huge",
    "dead": "zero",
    "width": 2,
    "shared": 0,
    "identity": False,
    "q_pack": False,
    "stride": "plain",
    "host_len": True,
    "slack": 0,
    "write": False,
    "guard": False,
    "spare": 3,
    "page_seed": 0,
    "manager": 1,
}

#: Contents of table entries that are not addresses.
TABLE_TAILS = {"huge": [2**31 - 1, 10**9, 2**30 + 7, 65536 * 3], "negative": [-1, -(2**31), -7], "zero": [0]}

_LAYOUTS = {
    "nhd": ("b n h d", "b n h d"),
    "hnd": ("b h n d", "b h n d"),
    "nz16": ("b (h d/16) n 16", "b (h d/16) n 16"),
    "x_packed": ("b h d/x n x", "b h d n"),
}


def layout_text(params: Mapping[str, Any]) -> tuple[str, str]:
    """The axes of the case's K and V planes; a vendor's own layout brings them as ``planes``."""
    if params.get("planes"):
        k, v = params["planes"]
        return k, v
    return _LAYOUTS[params["layout"]]


@dataclass
class Problem:
    """One call's inputs on the host.

    q [T, H, D] in ``dtype``; k [S, K, D] and v [S, K, Dv] in ``kv_dtype``, rows one after another (row r owns
    ``kv_at[r]`` to ``kv_at[r+1]``); table [B, W] int32; slots [T] int64 of the new tokens; sinks, slopes [H].
    """

    params: dict[str, Any]
    dtype: torch.dtype
    kv_dtype: torch.dtype
    H: int
    K: int
    D: int
    Dv: int
    scale: float
    block: int
    q_lens: list[int]
    kv_lens: list[int]
    kv_at: list[int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor
    num_blocks: int
    first_live: list[int]
    """Per row the first table entry that any of its queries can see."""
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    new_k: torch.Tensor | None = None
    new_v: torch.Tensor | None = None
    scratch: int = 1
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(self.q_lens)

    @property
    def window(self) -> int | None:
        window: int | None = self.params["window"]
        return window

    @property
    def quantised(self) -> bool:
        return self.kv_dtype != self.dtype

    @property
    def q_at(self) -> list[int]:
        at = [0]
        for length in self.q_lens:
            at.append(at[-1] + length)
        return at

    def row_slots(self, row: int) -> torch.Tensor:
        """Slots [kv_len] of a row's positions; -1 where the block is dead (behind the window)."""
        n, first = self.block, self.first_live[row] * self.block
        positions = torch.arange(self.kv_lens[row])
        slots = self.table[row, positions // n].long() * n + positions % n
        return torch.where(positions < first, -1, slots) if positions.numel() else slots


def build(params: Mapping[str, Any], seed: int) -> Problem:
    """Make the inputs. ``params`` must be resolved: no ``own`` and no block 0 left."""
    p = {**DEFAULTS, **params}
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype_of(p["dtype"])
    kv_dtype = dtype_of(p["kv"]) if p["kv"] else dtype
    H, K, D = p["H"], p["K"], p["D"]
    Dv = p["Dv"] or D
    q_lens = [row[0] for row in p["rows"]]
    kv_lens = [row[1] for row in p["rows"]]
    kv_at = [0]
    for length in kv_lens:
        kv_at.append(kv_at[-1] + length)
    scale = p["scale"] or D**-0.5
    q, k, v = _values(p, generator, (sum(q_lens), H, D), (kv_at[-1], K, D), (kv_at[-1], K, Dv))
    if p["latent"]:
        v = k[..., :Dv]
    q = q.to(dtype)
    if kv_dtype == dtype:
        k, v = k.to(dtype), v.to(dtype)
    else:
        # what the model hands to `write` is in its own dtype
        k, v = k.to(dtype).float(), v.to(dtype).float()
        k, v = quantise(k, p["k_scale"], kv_dtype), quantise(v, p["v_scale"], kv_dtype)
    if p["latent"]:
        v = k[..., :Dv]
    problem = Problem(
        p, dtype, kv_dtype, H, K, D, Dv, scale, p["block"], q_lens, kv_lens, kv_at, q, k, v,
        torch.zeros(0, 0, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), 0, [],
    )  # fmt: skip
    if p["sinks"]:
        problem.sinks = torch.randn(H, generator=generator) * 2
    if p["alibi"]:
        problem.slopes = 2.0 ** -(torch.arange(1, H + 1) * (8.0 / H)) * (0.75 + torch.rand(H, generator=generator) / 2)
    if not p["ragged"]:
        # a stream of its own: other blocks for the same values
        _page(problem, torch.Generator().manual_seed((seed ^ 0x5DEECE66D) + p["page_seed"]))
    return problem


def _values(
    p: Mapping[str, Any], generator: torch.Generator, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float32 q, k, v of the asked kind."""
    kind = p["values"]
    draw = [torch.randn(shape, generator=generator) for shape in (q, k, v)]
    if kind == "sharp":  # one key takes nearly all weight
        draw[0] *= 8
    elif kind == "flat":  # all keys weigh the same: the mean of V
        draw[0] *= 0
    elif kind == "cold":  # every logit far below any finite sentinel: about -2e5 (with scale 1), exact in float32
        draw[0] = torch.round(draw[0] * 0.5) / 8 - 40
        draw[1] = (draw[1] > 2).float() / 8 + 78
    elif kind == "cold_half":  # about -6e4 to -5e4, reachable in float16
        draw[0] = draw[0] * 0.01 - 60.0
        draw[1] = draw[1] * 0.01 + 60000.0 / 60.0 / p["D"]
    elif kind == "huge_v":  # sums of V overflow float16, their mean does not
        draw[2] = 2.0e4 + 500 * draw[2]
    elif kind == "huge_qk":  # q·k overflows float16 before the scale
        draw[0] = 40 + draw[0]
        draw[1] = 40 + draw[1] * 0.5
    elif kind == "fp8_edge":  # values up to the top of e4m3fn, where the other e4m3 saturates
        draw[1] = draw[1] * 0.5
        draw[2] = 100 + 340 * torch.rand(v, generator=generator)
    elif kind == "tiny":
        draw[2] *= 1e-3
    elif kind == "loud_first":  # the first key of every row outweighs the others
        draw[1] *= 0.1
    elif kind != "normal":
        raise ValueError(f"unknown kind of values {kind!r}")
    return draw[0], draw[1], draw[2]


def _page(problem: Problem, generator: torch.Generator) -> None:
    """Draw a block table: physical blocks in random order, garbage past each row's end, dead entries as asked."""
    p, n = problem.params, problem.block
    counts = [-(-length // n) for length in problem.kv_lens]
    width = max(counts, default=0) + p["width"]
    shared = min(p["shared"], min(counts, default=0))
    used = sum(counts) - shared * (len(counts) - 1 if counts else 0)
    # scratch blocks at the start cover every token of the batch
    problem.scratch = max(1, -(-max(problem.tokens, 1) // n))
    if problem.params["stride"] in ("giant", "wide") or n >= 128:
        problem.scratch = 1
    problem.num_blocks = problem.scratch + used + p["spare"]
    free = torch.randperm(used + p["spare"], generator=generator) + problem.scratch
    if p["identity"]:
        free = torch.arange(used + p["spare"]) + problem.scratch
    tail = torch.tensor(TABLE_TAILS[p["table_tail"]], dtype=torch.int64)
    table = tail[torch.randint(len(tail), (len(counts), width), generator=generator)]
    at = 0
    prefix = free[:shared]
    for row, count in enumerate(counts):
        own = count
        if shared and row:
            table[row, :shared] = prefix
            own = count - shared
        table[row, count - own : count] = free[at : at + own]
        at += own
    if shared:
        _share_values(problem, shared * n)
    problem.first_live = [_first_live(problem, row) for row in range(len(counts))]
    for row, first in enumerate(problem.first_live):
        if p["dead"] == "zero":
            table[row, :first] = 0
        elif p["dead"] == "keep":
            problem.first_live[row] = 0
    problem.table = table.to(torch.int32)
    problem.slots = _slots(problem, table)


def _share_values(problem: Problem, tokens: int) -> None:
    """Rows that share blocks hold the same K and V there."""
    for row in range(1, len(problem.kv_lens)):
        for plane in (problem.k, problem.v):
            plane[problem.kv_at[row] : problem.kv_at[row] + tokens] = plane[:tokens]


def _first_live(problem: Problem, row: int) -> int:
    window = problem.window
    if window is None or not problem.q_lens[row]:
        return 0
    first = problem.kv_lens[row] - problem.q_lens[row] - window + 1
    return min(max(0, first), problem.kv_lens[row]) // problem.block


def _slots(problem: Problem, table: torch.Tensor) -> torch.Tensor:
    """Where each new token goes; tokens that stand before position 0 (q_len > kv_len) go to scratch slots."""
    n, places, index = problem.block, [], 0
    for row, (q_len, kv_len) in enumerate(zip(problem.q_lens, problem.kv_lens, strict=True)):
        positions = torch.arange(kv_len - q_len, kv_len)
        real = positions.clamp_min(0)
        slot = table[row, real // n] * n + real % n if table.shape[1] else real
        scratch = torch.arange(index, index + q_len)
        places.append(torch.where(positions < 0, scratch, slot))
        index += q_len
    return torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
