"""How the operators want the cache to lie, and the sizes that they allow."""

from __future__ import annotations

from dougong.hal import Exactly, KVLayout, Multiple, OneOf

__all__ = ["HND_PAGED", "LATENT", "LATENT_NZ", "MAX_MERGED", "NHD_PAGED", "NZ", "NZ_BLOCK_TIMES_DIM"]

_INT32_MAX = 2**31 - 1

#: Widest K·D of a cache whose heads lie inside a token: an instruction counts it in 16 bits.
MAX_MERGED = 65535
#: Largest block·D on 310P.
NZ_BLOCK_TIMES_DIM = 16384

# Multiples of 16 serve decoding alone; other rows page through blocks in multiples of 128 and are gathered before the
# call elsewhere. The operator counts a plane's elements in 32 bits.
_BLOCKS = Multiple(16, 512)
_HEADS_IN = {"k": "b n h d", "v": "b n h d"}
_HEADS_OUT = {"k": "b h n d", "v": "b h n d"}

#: Heads inside a token: written by the cache operator as it stands, and what vllm-ascend runs in production.
NHD_PAGED = KVLayout("nhd", _HEADS_IN, _BLOCKS, 128, _INT32_MAX)
#: Heads outside: preferred by the operator's document, needed beyond ``MAX_MERGED``.
HND_PAGED = KVLayout("hnd", _HEADS_OUT, _BLOCKS, 128, _INT32_MAX)
#: MLA: latent and rope parts in planes of their own.
LATENT = KVLayout("latent_rope", {"latent": "b n h d", "rope": "b n h d"}, OneOf((16, 128)), 128, _INT32_MAX)
#: The same in tiles of 16 dimensions, which the operator reads without turning them.
LATENT_NZ = KVLayout(
    "latent_rope_nz16", {"latent": "b h d/16 n 16", "rope": "b h d/16 n 16"}, Exactly(128), 128, _INT32_MAX
)
#: 310P: tiles of 16 dimensions outermost.
NZ = KVLayout("nz16", {"k": "b (h d/16) n 16", "v": "b (h d/16) n 16"}, Multiple(16, 128), 128, _INT32_MAX)
