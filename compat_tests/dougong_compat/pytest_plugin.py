"""pytest options of the suite (entry point ``pytest11``)."""

from __future__ import annotations

import pytest

__all__ = ["pytest_addoption"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dougong-compat")
    group.addoption("--dougong-backend", help="backend under test")
    group.addoption("--dougong-profile", help="smoke, core (default), full or certified")
    group.addoption("--dougong-jobs", type=int, default=1, help="workers that share the cases on one device")
    group.addoption("--dougong-plugin", action="append", help="a plugin module that is not installed")
