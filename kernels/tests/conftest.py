"""Kernels run in Triton's interpreter on CPU tensors unless there is a GPU; Triton reads the switch at import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes with numpy, which warns of what the kernels do on purpose (log of 0, casts of NaN) and of
    # how the interpreter indexes.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")
    config.addinivalue_line(
        "filterwarnings", "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"
    )
