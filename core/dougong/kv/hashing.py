"""Names for the contents of full blocks: equal names mean equal KV."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from struct import Struct, calcsize, error, pack

from dougong.errors import InvalidRequestError
from dougong.kv.sequence import KVSequence, MultimodalSpan

__all__ = ["DIGEST_SIZE", "BlockHasher", "pack_fields", "token_bytes"]

#: Bytes of a block hash. 16 leave 2^64 work for a collision, to someone who knew the key.
DIGEST_SIZE = 16
_TOKEN_SIZE = calcsize("i")


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as int32, native byte order (hashes live in one process).

    Raises:
        InvalidRequestError: an id is not an integer or does not fit into int32.
    """
    try:
        return pack(f"{len(tokens)}i", *tokens)  # three times as fast as array("i", tokens)
    except error as cause:
        bad = next((t for t in tokens if not isinstance(t, int) or not -(1 << 31) <= t < 1 << 31), None)
        raise InvalidRequestError(f"token id {bad!r}: token ids are integers from 0 to 2^31 - 1.") from cause


def pack_fields(*fields: bytes | None) -> bytes:
    """An injective encoding: each field is preceded by its length, and None differs from empty."""
    parts: list[bytes] = []
    for field in fields:
        parts.append(b"\xff" * 8 if field is None else len(field).to_bytes(8, "little"))
        parts.append(field or b"")
    return b"".join(parts)


class BlockHasher:
    """Chained, keyed hashes of full blocks of ``block_size`` tokens.

    A chain starts from a root: blake2b, keyed with ``key``, of what all of the sequence's blocks depend on
    (model identity, block size, adapter, cache salt), each field length-prefixed. Every following link is
    blake2b of the previous link, the block's tokens and, where multimodal content overlaps the block, each
    overlapping item's hash and place. The first two have a fixed length within one chain, so no two different
    inputs give the same bytes. Nobody without the key can compute a root, and so no later link either: the
    whole chain is keyed, while a link costs one compression of 128 bytes instead of two.
    """

    __slots__ = ("_empty", "_key", "_model", "_pack", "block_size")

    def __init__(self, block_size: int, key: bytes, model_id: str = "") -> None:
        self.block_size = block_size
        # Longer keys than blake2b takes are hashed first, so that any bytes will do.
        self._key = key if len(key) <= 64 else blake2b(key).digest()
        self._model = model_id.encode()
        # Copying an empty hash object is faster than making one, and packing one block faster than an array.
        self._empty = blake2b(digest_size=DIGEST_SIZE, person=b"dougong block")
        self._pack = Struct(f"{block_size}i").pack

    def root(self, adapter: str | None = None, cache_salt: str | None = None) -> bytes:
        """The chain's start for this model, adapter and salt."""
        fields = pack_fields(
            self._model,
            self.block_size.to_bytes(8, "little"),
            None if adapter is None else adapter.encode(),
            None if cache_salt is None else cache_salt.encode(),
        )
        return blake2b(fields, digest_size=DIGEST_SIZE, key=self._key).digest()

    def extend(self, chain: list[bytes], sequence: KVSequence, num_blocks: int) -> None:
        """Append the missing links to ``chain`` (root first) until it names ``num_blocks`` full blocks."""
        done = len(chain) - 1
        if done >= num_blocks:
            return
        size = self.block_size
        tokens = sequence.token_slice(done * size, num_blocks * size)
        if sequence.multimodal:
            self._extend_multimodal(chain, sequence.multimodal, tokens)
            return
        link, copy = chain[-1], self._empty.copy
        if len(tokens) == size:
            state = copy()
            state.update(link + self._pack(*tokens))
            chain.append(state.digest())
            return
        data = token_bytes(tokens)
        step = size * _TOKEN_SIZE
        append = chain.append
        for at in range(0, len(data), step):
            state = copy()
            state.update(link + data[at : at + step])
            link = state.digest()
            append(link)

    def _extend_multimodal(self, chain: list[bytes], spans: Sequence[MultimodalSpan], tokens: list[int]) -> None:
        size = self.block_size
        for at in range(0, len(tokens), size):
            state = self._empty.copy()
            state.update(chain[-1] + token_bytes(tokens[at : at + size]))
            state.update(_overlaps(spans, (len(chain) - 1) * size, size))
            chain.append(state.digest())


def _overlaps(spans: Sequence[MultimodalSpan], start: int, size: int) -> bytes:
    """What multimodal content adds to the name of the block at ``start``: hash, offset, length of each item."""
    fields: list[bytes] = []
    for position, length, content in spans:
        if position < start + size and start < position + length:
            fields += [content, (position - start).to_bytes(8, "little", signed=True), length.to_bytes(8, "little")]
    return pack_fields(*fields)
