"""The vendor contract: what a backend brings, what it is asked, and the torch reference of every op.

Nothing in or above this package knows a vendor.
"""

from dougong.hal.attention import AttentionKernel, AttentionQuery, Plan, Refusal
from dougong.hal.attention_spec import AttentionSpec, LayerArgs
from dougong.hal.backend import Backend, BackendReport, find_backends, open_backend
from dougong.hal.batch import BatchView, GroupView
from dougong.hal.cache import LayerCache, RaggedKV, allocate_cache, convert_blocks, copy_blocks, quantize
from dougong.hal.collectives import Collectives, SingleRank
from dougong.hal.device import Device, MemoryInfo
from dougong.hal.embedding import attention_kernel, backend_for
from dougong.hal.graph import Graph, GraphBackend
from dougong.hal.group import KVGroup, Limits
from dougong.hal.layout import (
    HND,
    NHD,
    NZ16,
    X_PACKED,
    AnySize,
    BlockSizes,
    Exactly,
    KVLayout,
    Multiple,
    OneOf,
)
from dougong.hal.linear import LinearKernel, LinearQuery, QuantizedWeight
from dougong.hal.ops import FUNCTION_OPS, OpQuery, OpTable
from dougong.hal.rope import QKVShape, RopeTable
from dougong.hal.selection import Candidate, Choice, dtype_name

__all__ = [
    "FUNCTION_OPS",
    "HND",
    "NHD",
    "NZ16",
    "X_PACKED",
    "AnySize",
    "AttentionKernel",
    "AttentionQuery",
    "AttentionSpec",
    "Backend",
    "BackendReport",
    "BatchView",
    "BlockSizes",
    "Candidate",
    "Choice",
    "Collectives",
    "Device",
    "Exactly",
    "Graph",
    "GraphBackend",
    "GroupView",
    "KVGroup",
    "KVLayout",
    "LayerArgs",
    "LayerCache",
    "Limits",
    "LinearKernel",
    "LinearQuery",
    "MemoryInfo",
    "Multiple",
    "OneOf",
    "OpQuery",
    "OpTable",
    "Plan",
    "QKVShape",
    "QuantizedWeight",
    "RaggedKV",
    "Refusal",
    "RopeTable",
    "SingleRank",
    "allocate_cache",
    "attention_kernel",
    "backend_for",
    "convert_blocks",
    "copy_blocks",
    "dtype_name",
    "find_backends",
    "open_backend",
    "quantize",
]
