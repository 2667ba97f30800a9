"""Paged KV cache accounting: which block holds whose tokens. Pure Python: imports no torch and no numpy.

A device tensor is cut into blocks of ``block_size`` tokens. This package hands block ids out, shares them
between requests whose tokens agree, frees them, and never touches the tensor itself. `KVCacheManager` is the
door; `BlockPool` and `BlockHasher` are its parts and useful alone. The handbook page is docs/kv-cache.md.
"""

from dougong.kv.group import BlockGroup, GroupSpec
from dougong.kv.hashing import BlockHasher
from dougong.kv.manager import BlockCopy, FreedEntries, KVCacheManager, KVCacheStats
from dougong.kv.pool import BlockPool, IntegrityError
from dougong.kv.prefix import PrefixHit
from dougong.kv.sequence import KVSequence, MultimodalSpan

__all__ = [
    "BlockCopy",
    "BlockGroup",
    "BlockHasher",
    "BlockPool",
    "FreedEntries",
    "GroupSpec",
    "IntegrityError",
    "KVCacheManager",
    "KVCacheStats",
    "KVSequence",
    "MultimodalSpan",
    "PrefixHit",
]
