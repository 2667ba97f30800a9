"""A small random model with a tokenizer of bytes, and a server of it that all tests of a module share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

from e2e_harness import save_tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers; one token per byte."""
    return save_tiny("llama", tmp_path_factory.mktemp("server") / "tiny-llama")
