"""dougong's attention inside transformers. Importing this registers ``attn_implementation="dougong"``.

    import dougong_transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dougong")
    model.generate(...)          # contiguous caches, dynamic and static
    model.generate_batch(...)    # continuous batching, straight over transformers' paged cache

What the kernels cannot do is refused with a ValueError, as transformers' own implementations do.
"""

from __future__ import annotations

from dougong_transformers.attention import attention_forward
from dougong_transformers.continuous import admit
from dougong_transformers.masks import dougong_mask
from dougong_transformers.versions import NAME, TRIED, check_version

__version__ = "0.1.0"
__all__ = ["NAME", "TRIED", "attention_forward", "register"]


def register() -> None:
    """Make ``attn_implementation="dougong"`` known to transformers. Called by the import; again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    check_version()
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, dougong_mask)
    admit()


register()
