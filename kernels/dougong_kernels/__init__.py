"""Portable op implementations for dougong in Triton. Importing this imports neither torch nor Triton."""

__version__ = "0.1.0"
__all__ = ["CONTRACT", "__version__"]

#: The contract this package was written for: a literal, so that a newer core can tell. Never import the core's own.
CONTRACT = (1, 0)
