"""The conformance suite for attention backends: a wrong kernel cannot pass it.

``dougong compat run --backend NAME`` runs it; ``docs/conformance.md`` says what it asks and how to adopt it.
"""

__version__ = "0.1.0"

#: Part of every case's seed: a new suite version draws new inputs for every case.
SUITE_VERSION = "1"

__all__ = ["SUITE_VERSION", "__version__"]
