"""Which replica has computed which prompt prefixes, by the names of their blocks. Knows nothing of Ray."""

from __future__ import annotations

import os
import random
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from dougong.kv.hashing import BlockHasher
from dougong.kv.sequence import KVSequence

__all__ = ["PrefixIndex", "choose"]

R = TypeVar("R", bound=Hashable)


class PrefixIndex(Generic[R]):
    """Block names -> the replicas that were sent a prompt with them. A guess: replicas evict without telling.

    Names are those of the KV manager (`dougong.kv.hashing`), with a key of this index's own: nobody who sends prompts
    can make two of them look alike.
    """

    def __init__(self, block_size: int = 16, capacity: int = 1 << 18) -> None:
        self._hasher = BlockHasher(block_size, os.urandom(32))
        self._capacity = capacity
        self._replicas: OrderedDict[bytes, set[R]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replicas)

    def names(self, prompt: Sequence[int], cache_salt: str | None = None) -> list[bytes]:
        """Names of the prompt's full blocks, each standing for all that precedes it."""
        chain = [self._hasher.root(cache_salt=cache_salt)]
        self._hasher.extend(chain, KVSequence(prompt), len(prompt) // self._hasher.block_size)
        return chain[1:]

    def matched(self, names: Sequence[bytes], replicas: Iterable[R]) -> dict[R, int]:
        """Leading blocks that each replica was sent before."""
        found = dict.fromkeys(replicas, 0)
        still = set(found)
        for count, name in enumerate(names, 1):
            still &= self._replicas.get(name, set())
            if not still:
                break
            for replica in still:
                found[replica] = count
        return found

    def record(self, names: Sequence[bytes], replica: R) -> None:
        """``replica`` computes a prompt of these blocks now."""
        for name in reversed(names):  # the first block is the last to be forgotten
            self._replicas.setdefault(name, set()).add(replica)
            self._replicas.move_to_end(name)
        while len(self._replicas) > self._capacity:
            self._replicas.popitem(last=False)

    def forget(self, replica: R) -> None:
        """It is gone, and its cache with it."""
        for name in [name for name, replicas in self._replicas.items() if replica in replicas]:
            replicas = self._replicas[name]
            replicas.discard(replica)
            if not replicas:
                del self._replicas[name]


def choose(matched: dict[R, int], loads: dict[R, int], imbalance: int) -> list[R]:
    """Replicas, best first: the longest known prefix, unless its replica has ``imbalance`` requests more than the
    idlest; among equals the idlest, and any of these."""
    idlest = min(loads.values(), default=0)

    def rank(replica: R) -> tuple[int, int]:
        crowded = loads[replica] - idlest >= imbalance if imbalance else loads[replica] > idlest
        return (0 if crowded else -matched.get(replica, 0), loads[replica])

    order = list(loads)
    random.shuffle(order)
    return sorted(order, key=rank)
