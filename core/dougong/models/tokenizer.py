"""The model's tokenizer, through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dougong.errors import ModelLoadError

__all__ = ["get_tokenizer"]

#: Names of the class that is all in its tokenizer.json: before transformers 5, and since.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def get_tokenizer(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, vocab_size: int | None = None
) -> Any:
    """A transformers tokenizer from a folder, a .gguf file, a hub id or an alias; its chat template comes with it.

    Args:
        vocab_size: the model's; a tokenizer that makes larger ids belongs to another model.

    Raises:
        ModelLoadError: there is none, or it does not fit the model.
    """
    from dougong.models.loading.source import resolve_model

    folder = resolve_model(str(name), revision=revision, weights=False).folder
    try:
        tokenizer = _loader(folder).from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelLoadError(
            f"no tokenizer can be loaded from {folder}: {type(error).__name__}: {error}. Name another with tokenizer=, "
            "or work with token ids (skip_tokenizer_init=True)."
        ) from error
    if vocab_size is not None and len(tokenizer) > vocab_size:
        vocabulary = tokenizer.get_vocab()
        beyond = [token for token, index in vocabulary.items() if index >= vocab_size]
        if beyond:
            raise ModelLoadError(
                f"the tokenizer in {folder} has {len(beyond)} tokens with ids the model does not have ({vocab_size} in "
                f"its vocabulary; e.g. {beyond[0]!r}); it belongs to another model."
            )
    return tokenizer


def _loader(folder: Path) -> Any:
    """The class that loads ``folder``'s tokenizer: the one it names where that is the plain one, since asking
    AutoTokenizer imports every model's config first (seconds)."""
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        named = {}
    if isinstance(named, dict) and named.get("tokenizer_class") in _PLAIN and "auto_map" not in named:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer
