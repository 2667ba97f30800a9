"""Which transformers this was run with, and what happens with another."""

from __future__ import annotations

import warnings

__all__ = ["NAME", "TRIED", "check_version"]

#: The name to give to ``attn_implementation``.
NAME = "dougong"

#: Versions of transformers that the tests of this package were run with.
TRIED = ("5.23",)


def check_version() -> None:
    """Warn of a transformers that was not tried.

    The registries of attention and mask functions are transformers' public interface, so a neighbour is expected to
    work; the closed list of continuous batching is not, and is refused where it looks different (``admit``).
    """
    import transformers

    version = str(transformers.__version__)
    if ".".join(version.split(".")[:2]) not in TRIED:
        warnings.warn(
            f"dougong_transformers was run with transformers {', '.join(TRIED)}; this is {version}. "
            "Compare a few answers with attn_implementation='sdpa' before you rely on it.",
            stacklevel=3,
        )
