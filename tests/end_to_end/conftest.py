"""Small models on disk, and what transformers makes of the prompts, once per session."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from e2e_harness import TINY, Reference, save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small random models, by name in `TINY`."""
    return {name: save_tiny(name, tmp_path_factory.mktemp(name)) for name in TINY}


@pytest.fixture(scope="session")
def references(tiny: dict[str, Path]) -> dict[str, Reference]:
    """transformers' own models of the same files."""
    return {name: Reference(folder) for name, folder in tiny.items()}
