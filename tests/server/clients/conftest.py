"""A small random model with room for tools in its prompt, and SmolLM2, served for the clients."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from e2e_harness import edit_config, save_tiny
from server_harness import Served, served


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The small random model (one token per byte) with a context of 2,048."""
    folder: Path = save_tiny("llama", tmp_path_factory.mktemp("clients") / "tiny-llama")
    edit_config(folder, max_position_embeddings=2048)
    with served(folder) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Served]:
    """SmolLM2-135M-Instruct, as ``smollm2``."""
    engine = {"num_kv_blocks": 400, "max_model_len": 4096, "warm_up": False}
    with served("smollm2-135m", engine, served_model_name=("smollm2",)) as server:
        yield server
