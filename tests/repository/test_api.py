"""The public names, signatures and hooks are those written down in api.txt."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def api_lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_lock", ROOT / "scripts" / "api_lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_public_names_are_the_locked_ones(api_lock: ModuleType) -> None:
    difference = api_lock.difference()
    assert not difference, (
        f"The public interface differs from tests/repository/api.txt:\n{difference}\n"
        "If that is meant: `make api-lock`, say it in a changelog.d/ fragment, and see docs/stability.md."
    )


def test_a_changed_signature_is_seen(api_lock: ModuleType) -> None:
    def before(a: int, b: int = 0, *, c: int) -> None: ...
    def after(a: int, b: int, *, c: int, d: int = 0) -> None: ...

    assert api_lock.signature(before) == "(a, b=…, *, c)"
    assert api_lock.signature(after) == "(a, b, *, c, d=…)"


def test_every_locked_module_says_what_is_public(api_lock: ModuleType) -> None:
    for name in api_lock.MODULES:
        module = importlib.import_module(name)
        missing = [public for public in module.__all__ if not hasattr(module, public)]
        assert not missing, f"{name}.__all__ names what is not there: {missing}"
