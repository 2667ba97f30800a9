"""KV between engines of one machine, through shared memory: ``kv_connector="shared_memory"``."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from dougong.connectors.arena import ArenaReader, ArenaWriter
from dougong.errors import ConfigError
from dougong.plugins import KVBlockName, KVConnector, KVContext, KVTransferError

__all__ = ["SharedMemoryConnector"]

log = logging.getLogger(__name__)

_OPTIONS = ("name", "size_mib", "tokens_per_block", "peers", "secret")
_RETRY_S = 0.2
"""How often a name that was not there, or a writer that went, is looked for again."""


class SharedMemoryConnector(KVConnector):
    """A producer makes the arena ``name`` and writes to it; a consumer reads the arena ``name``. Role ``both`` makes
    its own, reads it too (a second cache in host memory), and reads those of ``peers``.

    Options: ``name``; of a producer ``size_mib`` and ``tokens_per_block`` (a multiple of its KV block; consumers need
    one that is a multiple of theirs); ``peers``, names of other arenas to read, whose engines share ``secret``.
    """

    def __init__(self, context: KVContext) -> None:
        super().__init__(context)
        options = _checked(context)
        self.name: str = options["name"]
        secret = options.get("secret")
        self._key = secrets.token_bytes(32) if secret is None else blake2b(secret.encode(), digest_size=32).digest()
        self._tokens = 0
        self._writer: ArenaWriter | None = None
        self._sources: list[str] = list(options.get("peers", ()))
        self._readers: dict[str, ArenaReader] = {}
        self._refused: dict[str, int] = {}
        self._looked: dict[str, float] = {}
        if context.role.produces:
            factor = options["tokens_per_block"] // context.block_tokens
            self._tokens = options["tokens_per_block"]
            self._writer = ArenaWriter(
                _full(self.name), options["size_mib"] << 20, max(context.block_bytes) * factor, self._tokens,
                self._key, json.dumps(context.format.to_dict()).encode(),
            )  # fmt: skip
            log.info("KV arena %r: %d blocks of %d tokens", self.name, self._writer.arena.slots, self._tokens)
        else:
            self._sources.insert(0, self.name)
        for source in self._sources:
            self._attach(source, start=True)

    @property
    def block_tokens(self) -> int:
        if not self._tokens:
            self._look()
        return self._tokens

    @property
    def hash_key(self) -> bytes:
        return self._key

    def contains(self, names: Sequence[KVBlockName]) -> list[bool]:
        self._look()
        places: list[ArenaReader | ArenaWriter] = list(self._readers.values())
        if self._writer is not None:
            places.append(self._writer)
        return [any(name in place for place in places) for name in names]

    def store(self, names: Sequence[KVBlockName], blocks: Sequence[memoryview]) -> None:
        writer = self._writer
        assert writer is not None, "a consumer stores nothing"
        for name, block in zip(names, blocks):
            if name not in writer:
                writer.put(name, block)

    def load(self, names: Sequence[KVBlockName]) -> list[bytes]:
        self._look()
        found: list[bytes] = []
        for name in names:
            block = None if self._writer is None else self._writer.get(name)
            for reader in self._readers.values():
                if block is None:
                    block = reader.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def finished(self, request_id: str, num_tokens: int) -> Mapping[str, Any]:
        return {"name": self.name}

    def reset(self) -> None:
        if self._writer is not None:
            self._writer.clear()
        for reader in self._readers.values():
            reader.clear()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    # -- other engines' arenas --------------------------------------------------------------------------------

    def _look(self) -> None:
        """See what the writers have written; find those that came, or came back under the same name."""
        for source in self._sources:
            reader = self._readers.get(source)
            if reader is not None:
                if not reader.arena.closed:
                    reader.refresh()
                    self._replace_dead(source, reader)
                    continue
                self._drop(source)
            self._attach(source)

    def _due(self, source: str) -> bool:
        now = time.monotonic()
        if now < self._looked.get(source, 0.0):
            return False
        self._looked[source] = now + _RETRY_S
        return True

    def _replace_dead(self, source: str, reader: ArenaReader) -> None:
        """A writer that was killed says nothing: its successor's arena has another generation."""
        if not self._due(source):
            return
        try:
            there = ArenaReader(_full(source))
        except (FileNotFoundError, KVTransferError):
            return
        if there.arena.generation == reader.arena.generation:
            there.close()
            return
        there.close()
        self._drop(source)
        self._looked.pop(source, None)
        self._attach(source)

    def _drop(self, source: str) -> None:
        self._readers.pop(source).close()
        if self._writer is None and not self._readers:
            self._tokens = 0

    def _attach(self, source: str, *, start: bool = False) -> None:
        if not start and not self._due(source):
            return
        try:
            reader = ArenaReader(_full(source))
        except (FileNotFoundError, KVTransferError):
            return
        arena = reader.arena
        if arena.closed or self._refused.get(source) == arena.generation:
            reader.close()
            return
        problem = self._problem(reader)
        if problem:
            self._refused[source] = arena.generation
            reader.close()
            if start:
                raise ConfigError(f"KV arena {source!r} cannot be used: {problem}")
            log.error("KV arena %r is not used, its KV will be computed here: %s", source, problem)
            return
        if not self._tokens:
            self._tokens, self._key = arena.block_tokens, arena.key
        reader.refresh()
        self._readers[source] = reader
        log.info("KV arena %r: reading blocks of %d tokens", source, arena.block_tokens)

    def _problem(self, reader: ArenaReader) -> str:
        arena, context = reader.arena, self.context
        differences = context.format.differences(json.loads(arena.format))
        if differences:
            return "; ".join(differences) + ". Both engines need the same model, weights and KV dtype."
        if arena.block_tokens % context.block_tokens:
            return (
                f"its blocks hold {arena.block_tokens} tokens, this engine's {context.block_tokens}. Give the producer "
                f'kv_connector_options={{"tokens_per_block": {context.block_tokens}}}, or both the same block_size.'
            )
        if self._tokens and (arena.block_tokens != self._tokens or arena.key != self._key):
            return (
                f"its blocks hold {arena.block_tokens} tokens and its secret may differ; here it is {self._tokens}. "
                "Engines that read more than one arena need the same tokens_per_block and secret everywhere."
            )
        return ""


def _checked(context: KVContext) -> dict[str, Any]:
    """The options, with defaults that depend on the engine.

    Raises:
        ConfigError: an option is unknown or out of range.
    """
    options = dict(context.options)
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise ConfigError(f"kv_connector_options has {unknown}; shared_memory knows {', '.join(_OPTIONS)}.")
    names = [options["name"], *options.get("peers", ())]
    if any(not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,20}", name) for name in names):
        raise ConfigError(f"kv_connector_options names {names}: letters, digits, '_', '-' and '.', at most 20 of them.")
    if len(set(names)) != len(names) or (context.role.produces and options["name"] in options.get("peers", ())):
        raise ConfigError(f"kv_connector_options names an arena twice: {names}.")
    size = options["size_mib"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"kv_connector_options: size_mib={size!r}; allowed is an integer >= 1.")
    step = context.block_tokens
    tokens = options.setdefault("tokens_per_block", step)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1 or tokens % step:
        raise ConfigError(
            f"kv_connector_options: tokens_per_block={tokens!r}; allowed are multiples of {step}, this engine's block."
        )
    secret = options.get("secret")
    if secret is not None and (not isinstance(secret, str) or not secret):
        raise ConfigError("kv_connector_options: secret must be a text that is not empty.")
    if context.role.produces and options.get("peers") and secret is None:
        raise ConfigError('kv_connector_options: peers need a common "secret", so that all name blocks alike.')
    return options


def _full(name: str) -> str:
    """The name of the shared memory: short, as some systems allow 31 characters."""
    return f"dougong-{name}"
