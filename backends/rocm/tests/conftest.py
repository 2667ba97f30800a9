"""The tests run on the CPU: in Triton's interpreter, with a twin of aiter. Triton reads the switch at import."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes with numpy, which warns of what the kernels do on purpose and of how it indexes.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")
    config.addinivalue_line(
        "filterwarnings", "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning"
    )
