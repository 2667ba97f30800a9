"""Bugs that an engine case must see by its tokens alone, in bfloat16 (honest-split's first dtype)."""

from __future__ import annotations

from dougong_compat.selftest.mutants.mutant import Mutant

__all__ = ["MUTANTS"]

_SPLIT = "honest-split"
_L3 = "L3/engine/"

MUTANTS = [
    Mutant(
        "engine-newest-key-unseen", _SPLIT, f"{_L3}length/33-chunk64-own",
        "        into.lens = view.kv_len.tolist()\n",
        "        into.lens = [max(1, n - 1) for n in view.kv_len.tolist()]\n",
    ),
    Mutant(
        "engine-tables-of-other-rows", _SPLIT, f"{_L3}batch/3-chunk64-own",
        "        into.table = view.block_table\n", "        into.table = view.block_table.roll(1, 0)\n",
    ),
    Mutant(
        "engine-chunk-sees-only-itself", _SPLIT, f"{_L3}chunks/chunk7-cold-step-own",
        "        if window is None:\n            return 0\n",
        "        if window is None:\n            return kv_len - q_len if q_len > 1 else 0\n",
    ),
    Mutant("engine-freed-while-held", _SPLIT, f"{_L3}preempt/blocks14-cold-step-own", manager="free_early"),
    Mutant("engine-hit-of-one-block", _SPLIT, f"{_L3}warm/2-chunk64-own", manager="hit_repeated"),
]  # fmt: skip
