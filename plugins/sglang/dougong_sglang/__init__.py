"""SGLang's general plugin: registers dougong's attention backend under the name ``dougong``.

SGLang calls `register` in every process at start-up; nothing here imports torch, SGLang's runtime or a kernel before.
"""

from __future__ import annotations

import warnings
from typing import Any

__version__ = "0.1.0"
__all__ = ["NAME", "WRITTEN_AGAINST", "register"]

#: What ``--attention-backend`` calls it.
NAME = "dougong"
#: The SGLang that this was written against and run inside of: see the README.
WRITTEN_AGAINST = ("0.5.17",)


def register() -> None:
    """Make ``--attention-backend dougong`` known. Called any number of times.

    In an SGLang without this registry nothing is registered, with a warning; ``--attention-backend dougong`` is then
    refused by SGLang's own list of choices.
    """
    import sglang

    version = str(getattr(sglang, "__version__", "unknown"))
    if version not in WRITTEN_AGAINST:
        warnings.warn(
            f"dougong_sglang was written against SGLang {', '.join(WRITTEN_AGAINST)}; this is {version}. Its attention "
            "backend is offered all the same: compare a few answers with another backend's.",
            stacklevel=2,
        )
    try:
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
        from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
    except ImportError as error:
        warnings.warn(
            f"dougong_sglang: SGLang {version} has no registry of attention backends that is known here ({error}); not "
            "registered.",
            stacklevel=2,
        )
        return
    if NAME not in ATTENTION_BACKENDS:
        register_attention_backend(NAME)(_create)
    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])


def _create(runner: Any) -> Any:
    """Make the backend for a model runner; what it cannot serve is refused here, before anything runs."""
    from dougong_sglang.backend import DougongAttnBackend

    return DougongAttnBackend(runner)
