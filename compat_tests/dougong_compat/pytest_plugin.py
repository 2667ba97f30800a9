"""pytest options of the suite (entry point ``pytest11``)."""

from __future__ import annotations

import pytest

__all__ = ["pytest_addoption"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dougong-compat")
    group.addoption("--dougong-backend", help="backend under test")
    group.addoption("--dougong-profile", help="smoke, core (default), full or certified")
    group.addoption("--dougong-plugin", action="append", help="a plugin module that is not installed")
