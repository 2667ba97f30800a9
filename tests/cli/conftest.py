"""A small model for the commands."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

from e2e_harness import save_tiny

from tests.cli.shell import command

__all__ = ["command"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama."""
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))
