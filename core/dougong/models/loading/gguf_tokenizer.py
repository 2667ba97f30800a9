"""The tokenizer inside a GGUF file, written as the files that transformers reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dougong.errors import ModelLoadError

__all__ = ["write_tokenizer"]

_CONTROL, _USER_DEFINED = 3, 4
#: Pre-tokenizers that are GPT-2's byte-level one, True: with digits split off one by one before it.
_BYTE_LEVEL = {"gpt-2": False, "default": False, "smollm": True, "starcoder": True, "refact": True, "command-r": True}


def write_tokenizer(path: Path, metadata: Mapping[str, Any], folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into ``folder``.

    Byte-level BPE is written straight from the metadata; other kinds go through transformers' own converters, which
    take several seconds.

    Raises:
        ModelLoadError: the file holds no tokenizer, or one that cannot be converted.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None or "tokenizer.ggml.tokens" not in metadata:
        raise ModelLoadError(f"{path} holds no tokenizer; name one with tokenizer=.")
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if model == "gpt2" and pre in _BYTE_LEVEL:
        _write_byte_level(path, metadata, folder, digits=_BYTE_LEVEL[pre])
        return
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise ModelLoadError(
            f"the tokenizer of {path} ({model}, {pre}) cannot be converted: {type(error).__name__}: {error}. Name "
            "another with tokenizer=."
        ) from error


def _write_byte_level(path: Path, metadata: Mapping[str, Any], folder: Path, *, digits: bool) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(line.split(" ", 1)) for line in metadata.get("tokenizer.ggml.merges", ())]
    try:
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    except Exception as error:
        raise ModelLoadError(f"the tokenizer of {path} is corrupt: {error}.") from error
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(metadata.get("tokenizer.ggml.add_space_prefix", False)), use_regex=True
    )
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]) if digits else byte_level
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, its in zip(tokens, kinds, strict=True)
            if its == kind
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    tokenizer.save(str(folder / "tokenizer.json"))

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
    }
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if length:
        config["model_max_length"] = length
    for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None and 0 <= index < len(tokens):
            config[f"{ours}_token"] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
