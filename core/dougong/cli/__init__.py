"""The command line: ``dougong generate | chat | doctor | bench``, and what plugins add."""

from dougong.cli.app import main

__all__ = ["main"]
