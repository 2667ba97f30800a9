"""Names for the contents of full blocks: equal names mean equal KV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b, shake_256
from typing import TYPE_CHECKING

from dougong.kv.sequence import KVSequence, MultimodalSpan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DIGEST_SIZE", "BlockHasher", "HashJob", "pack_fields"]

#: Lanes of 64 bits in a block hash. Each contributes 32 bits to the bound on collisions.
_LANES = 4
#: Bytes of a block hash.
DIGEST_SIZE = 8 * _LANES
#: A sequence's chain of names, the sequence, and how many of its full blocks are to be named.
HashJob = tuple[list[bytes], KVSequence, int]


def pack_fields(*fields: bytes | None) -> bytes:
    """An injective encoding: each field is preceded by its length, and None differs from empty."""
    parts: list[bytes] = []
    for field in fields:
        parts.append(b"\xff" * 8 if field is None else len(field).to_bytes(8, "little"))
        parts.append(field or b"")
    return b"".join(parts)


class BlockHasher:
    """Chained, keyed hashes of full blocks of ``block_size`` tokens.

    A name is four lanes of 64 bits. A chain starts from a root: blake2b, keyed with ``key``, of what all of the
    sequence's blocks depend on (model identity, block size, adapter, cache salt), each field length-prefixed. Every
    following link adds to each lane the sum of (token + 1) times a secret random word that belongs to the token's
    position and the lane, and, where multimodal content overlaps the block, a keyed blake2b of it.

    That is multilinear hashing (Carter and Wegman 1979; Lemire and Kaser, "Strongly universal string hashing is
    fast", 2014): for any two different prefixes, of equal length or not, a lane's names agree with probability at most
    2^-32, four independent lanes with 2^-128, over the choice of the words, which nobody without ``key`` knows. No
    work shifts that bound, as it would a short cryptographic hash's; and a whole prompt is named by one product of
    NumPy's, at a quarter of the time of one blake2b per block.

    Equal keys give equal names in every process of the same byte order.
    """

    __slots__ = ("_key", "_model", "_plain_root", "_words", "block_size")

    def __init__(self, block_size: int, key: bytes, model_id: str = "") -> None:
        self.block_size = block_size
        # Longer keys than blake2b takes are hashed first, so that any bytes will do.
        self._key = key if len(key) <= 64 else blake2b(key).digest()
        self._model = model_id.encode()
        self._words: NDArray[np.uint64] | None = None
        self._plain_root = self._root(None, None)

    def root(self, adapter: str | None = None, cache_salt: str | None = None) -> bytes:
        """The chain's start for this model, adapter and salt."""
        return self._plain_root if adapter is None and cache_salt is None else self._root(adapter, cache_salt)

    def _root(self, adapter: str | None, cache_salt: str | None) -> bytes:
        fields = pack_fields(
            self._model,
            self.block_size.to_bytes(8, "little"),
            None if adapter is None else adapter.encode(),
            None if cache_salt is None else cache_salt.encode(),
        )
        return blake2b(fields, digest_size=DIGEST_SIZE, key=self._key).digest()

    def extend(self, chain: list[bytes], sequence: KVSequence, num_blocks: int) -> None:
        """Append the missing links to ``chain`` (root first) until it names ``num_blocks`` full blocks."""
        self.extend_all(((chain, sequence, num_blocks),))

    def extend_all(self, jobs: Iterable[HashJob]) -> None:
        """`extend` for many sequences, in one go: a call costs about as much as ten blocks."""
        size = self.block_size
        packed: list[bytes] = []
        wanted: list[tuple[list[bytes], KVSequence, int, int]] = []  # chain, sequence, first and number of blocks
        for chain, sequence, num_blocks in jobs:
            done = len(chain) - 1
            if done < num_blocks:
                wanted.append((chain, sequence, done, num_blocks - done))
                packed.append(sequence.packed(done * size, num_blocks * size))
        if not wanted:
            return
        import numpy as np  # not at the top: a scheduler without a prefix cache does without it

        data = packed[0] if len(packed) == 1 else b"".join(packed)
        tokens = np.frombuffer(data, np.uint32).astype(np.uint64)
        tokens += np.uint64(1)  # no token counts for nothing: a block more is another name
        words = self._words_of([(first, count) for _, _, first, count in wanted])
        lanes = np.matmul(tokens.reshape(-1, 1, size), words)[:, 0]
        row = 0
        for chain, sequence, first, count in wanted:
            part = lanes[row : row + count]
            if sequence.multimodal:
                self._add_multimodal(part, sequence.multimodal, first)
            part[0] += np.frombuffer(chain[-1], np.uint64)
            if count > 1:
                np.add.accumulate(part, axis=0, out=part)
            row += count
        names: list[bytes] = lanes.view(f"V{DIGEST_SIZE}").ravel().tolist()
        row = 0
        for chain, _, _, count in wanted:
            chain += names[row : row + count]
            row += count

    def _words_of(self, runs: list[tuple[int, int]]) -> NDArray[np.uint64]:
        """The secret words of runs (first, count) of blocks, one after the other. ``[blocks, block_size, lanes]``."""
        import numpy as np

        end = max(first + count for first, count in runs)
        if self._words is None or end > len(self._words):
            total = max(64, 1 << (end - 1).bit_length())
            stream = shake_256(self._key + b"dougong block words").digest(total * self.block_size * DIGEST_SIZE)
            self._words = np.frombuffer(stream, "<u8").astype(np.uint64).reshape(total, self.block_size, _LANES)
        if len(runs) == 1:
            first, count = runs[0]
            return self._words[first : first + count]
        return self._words[[block for first, count in runs for block in range(first, first + count)]]

    def _add_multimodal(self, lanes: NDArray[np.uint64], spans: Sequence[MultimodalSpan], first: int) -> None:
        """Add to each block's lanes a keyed hash of its place and of the items that overlap it."""
        import numpy as np

        size = self.block_size
        for row, block in enumerate(range(first, first + len(lanes))):
            items = _overlaps(spans, block * size, size)
            if items:
                content = blake2b(block.to_bytes(8, "little") + items, digest_size=DIGEST_SIZE, key=self._key).digest()
                lanes[row] += np.frombuffer(content, np.uint64)


def _overlaps(spans: Sequence[MultimodalSpan], start: int, size: int) -> bytes:
    """What multimodal content adds to the name of the block at ``start``: hash, offset, length of each item."""
    fields: list[bytes] = []
    for position, length, content in spans:
        if position < start + size and start < position + length:
            fields += [content, (position - start).to_bytes(8, "little", signed=True), length.to_bytes(8, "little")]
    return pack_fields(*fields)
