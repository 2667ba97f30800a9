"""What the KV manager knows of one sequence of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dougong.kv.tokens import TOKEN_SIZE, token_bytes

__all__ = ["NEVER", "KVSequence", "MultimodalSpan"]

#: A position no sequence reaches.
NEVER = 1 << 62


class MultimodalSpan(NamedTuple):
    """Placeholder tokens ``position … position + length - 1`` stand for the content with this hash."""

    position: int
    length: int
    hash: bytes


class KVSequence:
    """Tokens, what else changes their KV, and the blocks that hold it. Mutable; one owner, not thread-safe.

    The manager reads the token lists and writes the rest. `dougong.scheduling.Request` is a subclass; a
    framework with its own request type can keep one of these beside it.
    """

    __slots__ = (
        "adapter",
        "block_ids",
        "cache_salt",
        "capacity",
        "confirm_at",
        "generation",
        "hash_chains",
        "multimodal",
        "num_dropped",
        "num_tagged",
        "output_token_ids",
        "prompt_bytes",
        "prompt_token_ids",
    )

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
        multimodal: Iterable[tuple[int, int, bytes]] = (),
    ) -> None:
        self.prompt_token_ids: list[int] = list(prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.prompt_bytes: bytes | None = None
        """The prompt as `token_bytes`, once somebody has asked for it."""
        self.adapter = adapter
        """Name of the adapter (LoRA) that the tokens run through: it changes KV."""
        self.cache_salt = cache_salt
        """Sequences share cached blocks only with those of the same salt (a tenant's secret)."""
        self.multimodal: tuple[MultimodalSpan, ...] = tuple(MultimodalSpan(*span) for span in multimodal)
        self.block_ids: list[list[int]] = []
        """One list per group, entry i holding positions i*block_size …; 0 where freed behind a window."""
        self.capacity = 0
        """Positions that ``block_ids`` covers in every group."""
        self.hash_chains: list[list[bytes]] = []
        """One chain per block size: its root, then each full block's hash. Kept for the sequence's whole life,
        so that nothing is hashed twice, a preemption included."""
        self.num_tagged: list[int] = []
        self.num_dropped: list[int] = []
        self.confirm_at = NEVER
        """`KVCacheManager.confirm` has nothing to do for a number of tokens <= this."""
        self.generation = 0

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def packed(self, start: int, stop: int) -> bytes:
        """Token ids at positions ``start`` … ``stop - 1`` as `token_bytes`.

        Raises:
            InvalidRequestError: an id is not an integer or does not fit into int32.
        """
        if stop > len(self.prompt_token_ids):
            return token_bytes(self.token_slice(start, stop))
        if self.prompt_bytes is None:
            self.prompt_bytes = token_bytes(self.prompt_token_ids)
        return self.prompt_bytes[start * TOKEN_SIZE : stop * TOKEN_SIZE]

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Token ids at positions ``start`` … ``stop - 1`` of prompt and output together."""
        prompt = self.prompt_token_ids
        split = len(prompt)
        if stop <= split:
            return prompt[start:stop]
        if start >= split:
            return self.output_token_ids[start - split : stop - split]
        return prompt[start:] + self.output_token_ids[: stop - split]
