"""vLLM's general plugin: puts dougong's attention backend in the place that vLLM keeps for others (``CUSTOM``).

vLLM calls `register` in every process at start-up; nothing here imports torch, vLLM's engine or a kernel until then.
"""

from __future__ import annotations

import warnings

__version__ = "0.1.0"
__all__ = ["WRITTEN_AGAINST", "register"]

#: The vLLM that this was written against and run inside of: see the README.
WRITTEN_AGAINST = ("0.26",)
_BACKEND = "dougong_vllm.backend.DougongAttentionBackend"


def register() -> None:
    """Make ``--attention-backend CUSTOM`` mean dougong. Called any number of times.

    Another plugin that holds the place keeps it, and an unknown vLLM without such a place is left as it is; both with
    a warning that says so. vLLM then refuses ``CUSTOM``, or takes the other plugin's.
    """
    import vllm

    version = str(getattr(vllm, "__version__", "unknown"))
    if ".".join(version.split(".")[:2]) not in WRITTEN_AGAINST:
        warnings.warn(
            f"dougong_vllm was written against vLLM {', '.join(WRITTEN_AGAINST)}; this is {version}. Its attention "
            "backend is offered as CUSTOM all the same: compare a few answers with another backend's.",
            stacklevel=2,
        )
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        place = AttentionBackendEnum.CUSTOM
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"dougong_vllm: vLLM {version} has no place for an attention backend of others ({error}); not registered.",
            stacklevel=2,
        )
        return
    if place.is_overridden() and place.get_path() != _BACKEND:
        warnings.warn(
            f"dougong_vllm: {place.get_path()} is registered as CUSTOM already and stays. To have dougong's, leave the "
            "other plugin out of VLLM_PLUGINS.",
            stacklevel=2,
        )
        return
    register_backend(place, _BACKEND)
