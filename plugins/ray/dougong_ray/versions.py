"""Which Ray this was run with, and what happens with another."""

from __future__ import annotations

import warnings

__all__ = ["TRIED", "check_version"]

#: Versions of Ray that the fleet was run with.
TRIED = ("2.60",)


def check_version() -> None:
    """Warn of a Ray that was not tried: routing by prefixes stands on Serve's request-router interface."""
    import ray

    version = str(ray.__version__)
    if ".".join(version.split(".")[:2]) not in TRIED:
        warnings.warn(
            f"dougong_ray was run with Ray {', '.join(TRIED)}; this is {version}. The fleet is started all the same: "
            "see whether requests with a common prefix go to one replica before you rely on it.",
            stacklevel=3,
        )
