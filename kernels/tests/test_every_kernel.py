"""The list is whole: each Triton kernel is compiled for every target, and run in the interpreter by a test."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import dougong_kernels.triton
from dougong_kernels.compile.launches import launches
from dougong_kernels.compile.targets import TARGETS

HERE = Path(__file__).parent

#: Kernel -> the test that runs its semantics on small shapes.
RUN_BY = {
    "choose_kernel": ("test_ops", "test_sample_draws_what_the_reference_draws"),
    "threshold_kernel": ("test_ops", "test_sample_draws_what_the_reference_draws"),
    "plan_kernel": ("test_paged", "test_mixed_batch"),
    "split_kernel": ("test_paged", "test_mixed_batch"),
    "extend_kernel": ("test_paged", "test_mixed_batch"),
    "rotate_write_kernel": ("test_ops", "test_qk_norm_rope_write"),
    "rms_norm_kernel": ("test_ops", "test_rms_norm"),
    "gated_kernel": ("test_ops", "test_gated_activations_at_all_magnitudes"),
    "merge_kernel": ("test_ops", "test_merge_of_empty_and_poisoned_parts"),
    "gemv_kernel": ("test_ops", "test_skinny_products"),
    "skinny_kernel": ("test_ops", "test_skinny_products"),
}


def kernels() -> set[str]:
    found = set()
    for module in pkgutil.iter_modules(dougong_kernels.triton.__path__):
        names = vars(importlib.import_module(f"dougong_kernels.triton.{module.name}"))
        found |= {name for name, value in names.items() if name.endswith("_kernel") and hasattr(value, "arg_names")}
    return found


def test_every_kernel_has_a_test_in_the_interpreter() -> None:
    assert set(RUN_BY) == kernels()
    for module, test in set(RUN_BY.values()):
        tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{module}.{test}"


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_compiled_for_every_target(target: str) -> None:
    compiled = {launch.kernel.__name__ for launch in launches(TARGETS[target])}
    core = {launch.kernel.__name__ for launch in launches(TARGETS[target]) if launch.core}
    assert compiled == core == kernels()
