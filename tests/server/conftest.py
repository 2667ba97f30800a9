"""A small random model with a tokenizer of bytes, and a server of it that all tests share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

from e2e_harness import save_tiny
from server_harness import Served, served


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers; one token per byte."""
    return save_tiny("llama", tmp_path_factory.mktemp("server") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> Iterator[Served]:
    """The small model, as ``tiny`` and ``alias``, with limits that a test can reach."""
    with served(tiny_model, max_body_bytes=20_000, body_timeout_s=1.0) as server:
        yield server
