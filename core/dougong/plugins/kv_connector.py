"""How KV leaves an engine and enters another: what a connector is told, and what it must do.

The engine names each full block of a prompt (and of its answer) by a chain of hashes, turns it into plain bytes that do
not depend on how a backend lays out its cache, and gives both to a connector. On the other side an engine asks for the
names that its request needs, and gets the bytes back. A connector moves bytes and keeps names apart; it never sees a
tensor, a layout or a device, so any two backends can meet through it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, NamedTuple

__all__ = ["KVBlockName", "KVConnector", "KVContext", "KVFormat", "KVGroupFormat", "KVRole", "KVTransferError"]


class KVRole(str, Enum):
    """Which way KV goes: a prefill engine produces, a decode engine consumes, a shared cache does both."""

    PRODUCER = "producer"
    CONSUMER = "consumer"
    BOTH = "both"

    @property
    def produces(self) -> bool:
        return self is not KVRole.CONSUMER

    @property
    def consumes(self) -> bool:
        return self is not KVRole.PRODUCER


class KVTransferError(Exception):
    """Blocks could not be moved; the message says why. The engine computes them instead, and logs it."""


class KVBlockName(NamedTuple):
    """A block of one KV group. ``digest``, 16 bytes, names its tokens and all that comes before them, the model and the
    tenant: equal ones mean equal KV."""

    group: int
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class KVGroupFormat:
    """The bytes of one token in one KV group: per layer in order, K [heads, dim] and then, unless ``latent``, V
    [heads, dim_v], in ``dtype`` (torch's name)."""

    layers: tuple[int, ...]
    heads: int
    dim: int
    dim_v: int
    dtype: str
    latent: bool = False
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """What two engines must have in common before one may use the other's KV.

    ``model`` is a digest of config and weights, ``quantization`` how the weights were stored: both change KV. Which
    backend, layout or block size an engine has is not in it.
    """

    model: str
    quantization: str
    groups: tuple[KVGroupFormat, ...]
    version: int = 1
    """Of the format itself."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values: tuples become lists, so that it equals its own JSON read back."""
        plain = asdict(self)
        plain["groups"] = [{**group, "layers": list(group["layers"])} for group in plain["groups"]]
        return plain

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What differs from another engine's ``to_dict()``, in words; empty if KV may be shared."""
        mine, found = self.to_dict(), []
        for name in ("version", "model", "quantization"):
            if mine[name] != other.get(name):
                found.append(f"{name} is {mine[name]!r} here and {other.get(name)!r} there")
        theirs = other.get("groups") or []
        if len(theirs) != len(mine["groups"]):
            found.append(f"{len(mine['groups'])} KV groups here and {len(theirs)} there")
        for index, (here, there) in enumerate(zip(mine["groups"], theirs)):
            for name, value in here.items():
                if value != there.get(name):
                    found.append(f"group {index}: {name} is {value!r} here and {there.get(name)!r} there")
        return found


@dataclass(frozen=True, kw_only=True)
class KVContext:
    """What a connector is made with.

    ``block_tokens`` is the least number of tokens that this engine can give or take at once; what it transfers is a
    multiple. ``block_bytes`` are the bytes of so many tokens, by group.
    """

    role: KVRole
    format: KVFormat
    block_tokens: int
    block_bytes: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    """``kv_connector_options`` as the user gave them, over the defaults of the plugin's record."""


class KVConnector(ABC):
    """Moves blocks between engines. All methods are called on the engine's thread; none may wait for long.

    A connector may forget blocks, lose them or refuse them: the engine then computes what it lacks. What it may never
    do is give bytes under a name that they were not stored under; guard what another process can overwrite.

    Args:
        context: the engine's side of it.

    Raises:
        ConfigError: the options cannot be used, or the other side is there and its format differs.
    """

    def __init__(self, context: KVContext) -> None:
        self.context = context

    @property
    @abstractmethod
    def block_tokens(self) -> int:
        """Tokens of a transferred block: a multiple of the context's. 0 while it is not known (no producer yet)."""

    @property
    @abstractmethod
    def hash_key(self) -> bytes:
        """Key of the names' hash chain, equal on both sides; asked for while ``block_tokens`` is not 0."""

    @abstractmethod
    def contains(self, names: Sequence[KVBlockName]) -> list[bool]:
        """Which blocks could be loaded now (a consumer), or are stored already (a producer)."""

    @abstractmethod
    def store(self, names: Sequence[KVBlockName], blocks: Sequence[memoryview]) -> None:
        """Keep these blocks, oldest of the request first. The memory is the engine's again when this returns.

        Raises:
            KVTransferError: some could not be kept.
        """

    @abstractmethod
    def load(self, names: Sequence[KVBlockName]) -> list[bytes]:
        """The blocks' bytes. Fewer than asked for: the rest is not there (any more).

        Raises:
            KVTransferError: what was found cannot be trusted or reached.
        """

    def prefetch(self, names: Sequence[KVBlockName]) -> None:  # noqa: B027 — nothing is a good default
        """A request that wants these blocks is here: begin to fetch them, if that takes time."""

    def finished(self, request_id: str, num_tokens: int) -> Mapping[str, Any]:
        """A request of a producer has ended and ``num_tokens`` of its positions were stored: what to add to its
        output's ``kv_transfer_params`` (plain values; the router hands them to the consumer)."""
        return {}

    def reset(self) -> None:  # noqa: B027 — nothing is right for what remembers nothing
        """The weights have changed: blocks stored before this, here or by others, must never be loaded again."""

    def close(self) -> None:  # noqa: B027 — nothing is a good default
        """The engine stops."""
