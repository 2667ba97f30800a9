"""Portable op implementations for dougong in Triton. Importing this imports neither torch nor Triton."""

__version__ = "0.1.0"
__all__ = ["__version__"]
