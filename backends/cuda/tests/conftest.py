"""The tests run on the CPU: in Triton's interpreter, with twins of the libraries. Triton reads the switch at import."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes with numpy, which warns of what the kernels do on purpose and of how it indexes.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")
    config.addinivalue_line(
        "filterwarnings", "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"
    )


@pytest.fixture
def twins() -> Iterator[Any]:
    """The module of the twins, none of them installed yet; afterwards none is."""
    import cuda_twins
    import torch

    torch.manual_seed(0)
    cuda_twins.remove()
    cuda_twins.calls.clear()
    yield cuda_twins
    cuda_twins.remove()
