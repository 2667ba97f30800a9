"""Stands where vLLM stands: the modules, names and fields of vLLM 0.26 that the plugin touches, and nothing else."""

from __future__ import annotations

import sys
import threading
from abc import ABC
from dataclasses import dataclass
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

__all__ = ["Common", "Group", "config", "here", "install"]

#: ``here.group``: the ranks that this thread's sequences are shared by, where there are any.
here = threading.local()


class AttentionType(str, Enum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class AttentionCGSupport(Enum):
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class MultipleOf:
    def __init__(self, base: int) -> None:
        self.base = base


class Backend(ABC):
    """validate_configuration as vLLM asks it, in the order of its questions."""

    supported_dtypes: Any
    supported_kv_cache_dtypes: Any

    supports_non_causal = supports_mm_prefix = is_mla = is_sparse = staticmethod(lambda: False)
    supports_batch_invariance = supports_pcp = supports_per_head_quant_scales = staticmethod(lambda: False)

    @classmethod
    def validate(cls, **ask: Any) -> list[str]:
        found = []
        if not cls.supports_head_size(ask["head_size"]):  # type: ignore[attr-defined]
            found.append("head_size not supported")
        if ask["dtype"] not in cls.supported_dtypes:
            found.append("dtype not supported")
        if ask["kv_cache_dtype"] not in (None, *cls.supported_kv_cache_dtypes):
            found.append("kv_cache_dtype not supported")
        for name in ("non_causal", "mm_prefix", "batch_invariance"):
            if ask.get(name) and not getattr(cls, f"supports_{name}")():
                found.append(f"{name} not supported")
        if ask.get("use_mla") and not cls.is_mla():
            found.append("MLA not supported")
        if not cls.supports_attn_type(ask.get("attn_type", AttentionType.DECODER)):  # type: ignore[attr-defined]
            found.append("attention type not supported")
        reason = cls.supports_combination(  # type: ignore[attr-defined]
            ask["head_size"], ask["dtype"], ask["kv_cache_dtype"], ask["block_size"], False, False, False, False, None
        )
        return [*found, reason] if reason else found


class Place(Enum):
    CUSTOM = None

    def is_overridden(self) -> bool:
        return self in OVERRIDES

    def get_path(self) -> str:
        return OVERRIDES[self]


OVERRIDES: dict[Place, str] = {}


class Builder:
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kv_cache_spec, self.layer_names, self.vllm_config = kv_cache_spec, layer_names, vllm_config
        self.device = device


@dataclass
class Common:
    """CommonAttentionMetadata's fields that the plugin reads."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: Any = True
    mm_req_doc_ranges: Any = None
    rswa_prefix_lens: Any = None
    seq_lens_cpu_upper_bound: Any = None


class Group:
    """A rank of a group whose ranks are threads. Those that do not do the same hang, and the barrier breaks."""

    def __init__(self, world_size: int, rank: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.world_size, self.rank_in_group, self._barrier, self._board = world_size, rank, barrier, board
        self.gathers = 0

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        self.gathers += 1
        self._board[self.rank_in_group] = tensor
        self._barrier.wait()
        found = torch.cat(self._board, dim)
        self._barrier.wait()
        return found


def get_dcp_group() -> Group:
    group: Group | None = getattr(here, "group", None)
    assert group is not None, "decode context model parallel group is not initialized"
    return group


def get_dcp_local_seq_lens(
    seq_lens: torch.Tensor, dcp_size: int = 1, dcp_rank: int | None = None, cp_kv_cache_interleave_size: int = 1
) -> torch.Tensor:
    """How many of a sequence's tokens are the rank's, one by one: runs of the given size are dealt out in turn."""
    assert dcp_rank is not None
    owners = [torch.arange(int(n)) // cp_kv_cache_interleave_size % dcp_size for n in seq_lens]
    return torch.tensor([int((one == dcp_rank).sum()) for one in owners], dtype=torch.int32)


def cp_lse_ag_out_rs(
    out: torch.Tensor, lse: torch.Tensor, group: Group, ctx: Any = None, return_lse: bool = False,
    is_lse_base_on_e: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [T, H, D] and lse [T, H] over all of the group's heads -> merged over ranks, this rank's heads."""
    assert return_lse and is_lse_base_on_e
    outs = group.all_gather(out[None].double(), 0)
    lses = group.all_gather(lse[None].double(), 0)
    total = lses.logsumexp(0)
    weights = torch.where(lses == -torch.inf, 0.0, (lses - total).exp())
    heads = out.shape[1] // group.world_size
    mine = slice(heads * group.rank_in_group, heads * (group.rank_in_group + 1))
    return (outs * weights[..., None]).sum(0)[:, mine].to(out.dtype), total[:, mine].float()


def config(layers: dict[str, Any], block_size: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(vllm_config, kv_cache_spec) of a model whose attention layers are ``layers``."""
    vllm = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=128),
        model_config=SimpleNamespace(max_model_len=256, dtype=dtype),
        parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=1, dcp_comm_backend="ag_rs"),
        layers={name: SimpleNamespace(impl=impl) for name, impl in layers.items()},
    )
    spec = SimpleNamespace(block_size=block_size, num_kv_heads=2, head_size=32, dtype=dtype)
    return vllm, spec


def install(
    monkeypatch: Any, version: str = "0.26.0", dtype: torch.dtype = torch.float32, **changes: Any
) -> dict[str, ModuleType]:
    """Put the modules in place; ``changes`` remove (None) or replace names of the registry."""
    current = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": version},
        "vllm.config": {
            "get_layers_from_vllm_config": lambda config, kind, names: {n: config.layers[n] for n in names},
            "get_current_vllm_config": lambda: current,
        },
        "vllm.distributed": {},
        "vllm.distributed.parallel_state": {"get_dcp_group": get_dcp_group},
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type="cpu")},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.attention_layer_base": {"AttentionLayerBase": object},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionBackend": Backend,
            "AttentionCGSupport": AttentionCGSupport,
            "AttentionImpl": object,
            "AttentionMetadata": object,
            "AttentionMetadataBuilder": Builder,
            "AttentionType": AttentionType,
            "MultipleOf": MultipleOf,
        },
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.utils": {
            "get_kv_cache_layout": lambda: "NHD",
            "get_dcp_local_seq_lens": get_dcp_local_seq_lens,
        },
        "vllm.v1.attention.ops": {},
        "vllm.v1.attention.ops.common": {"cp_lse_ag_out_rs": cp_lse_ag_out_rs},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": Place,
            "register_backend": lambda place, path: OVERRIDES.__setitem__(place, path),
        },
    }
    contents["vllm.v1.attention.backends.registry"] |= {k: v for k, v in changes.items() if v is not None}
    for name in [name for name, value in changes.items() if value is None]:
        del contents["vllm.v1.attention.backends.registry"][name]
    OVERRIDES.clear()
    modules = {}
    for name, values in contents.items():
        module = modules[name] = ModuleType(name)
        module.__path__ = []
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.startswith("dougong_vllm.") and name != "dougong_vllm.batch"]:
        monkeypatch.delitem(sys.modules, name)
    return modules
