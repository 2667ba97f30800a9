"""The one place that imports torch_npu, and the fused attention operator under its two sets of names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dougong.errors import ConfigError

# Registers torch's device type "npu" and the operators. Installed without CANN it breaks even `import torch`, unless
# TORCH_DEVICE_BACKEND_AUTOLOAD=0; the probe has looked before anything imports this module.
try:
    import torch_npu
except (ImportError, OSError) as _error:
    raise ImportError(
        f"torch_npu does not load: {_error}. CANN's libraries are found through `source "
        "/usr/local/Ascend/ascend-toolkit/set_env.sh`; torch-npu must be of torch's minor version and fit the "
        "CANN that is installed."
    ) from _error

__all__ = ["FRACTAL_NZ", "INT_MAX", "FusedCall", "fused_version", "unowned"]

INT_MAX = 2**31 - 1
#: ``aclFormat`` of the tiled layout that 310P's operators read.
FRACTAL_NZ = 29

_V2_NAMES = {
    "actual_seq_lengths": "actual_seq_qlen",
    "actual_seq_lengths_kv": "actual_seq_kvlen",
    "num_heads": "num_query_heads",
    "scale": "softmax_scale",
    "softmax_lse_flag": "return_softmax_lse",
    "key_antiquant_scale": "dequant_scale_key",
    "value_antiquant_scale": "dequant_scale_value",
}


def fused_version() -> int:
    """Which fused attention operator to call: 1, or 2 with ``DOUGONG_ASCEND_FIA=2``.

    Raises:
        ConfigError: the variable has another value.
    """
    asked = os.environ.get("DOUGONG_ASCEND_FIA") or "1"
    if asked not in ("1", "2"):
        raise ConfigError(f"DOUGONG_ASCEND_FIA={asked!r}: allowed are 1 and 2, the versions of the fused operator.")
    return int(asked)


def unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without a claim on it: what a captured task keeps of tensors in the graph's pool."""
    return torch_npu._C._weak_ref_tensor(tensor)  # type: ignore[no-any-return]


@dataclass(slots=True)
class FusedCall:
    """One call of the fused attention operator, in the first version's names.

    ``arguments`` hold all but the outputs. ``out`` and ``lse`` have the operator's shapes; ``lse`` is a placeholder of
    one element where the flag is off.
    """

    version: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    arguments: dict[str, Any]
    out: torch.Tensor
    lse: torch.Tensor
    workspace: torch.Tensor | None = None

    def _named(self) -> dict[str, Any]:
        if self.version == 1:
            return self.arguments
        return {_V2_NAMES.get(name, name): value for name, value in self.arguments.items()}

    def reserve(self) -> None:
        """Take the workspace that the largest lengths need: a captured call must own it."""
        name = "_npu_fused_infer_attention_score_get_max_workspace"
        if self.version == 2:
            name = "_npu_fused_infer_attention_score_v2_get_max_workspace"
        self.workspace = getattr(torch.ops.npu, name)(self.query, self.key, self.value, **self._named())

    def launch(self) -> None:
        ops = torch.ops.npu
        packet = ops.npu_fused_infer_attention_score if self.version == 1 else ops.npu_fused_infer_attention_score_v2
        packet.out(
            self.query, self.key, self.value, **self._named(),
            workspace=self.workspace, attention_out=self.out, softmax_lse=self.lse,
        )  # fmt: skip

    def with_lengths(self, kv_lens: Sequence[int]) -> FusedCall:
        """The same call on other kv lengths."""
        arguments = {**self.arguments, "actual_seq_lengths_kv": list(kv_lens)}
        return FusedCall(self.version, self.query, self.key, self.value, arguments, self.out, self.lse, self.workspace)

    def unowned(self) -> FusedCall:
        """The same call without a claim on the memory that a graph's pool gave, its workspace included: the pool may
        give that to the next layer's call, which runs behind this one. Cache, mask and tables outlive the graph and are
        kept as they are."""
        arguments = dict(self.arguments)
        if arguments.get("query_rope") is not None:
            arguments["query_rope"] = unowned(arguments["query_rope"])
        return FusedCall(
            self.version, unowned(self.query), self.key, self.value, arguments, unowned(self.out), unowned(self.lse),
            None if self.workspace is None else unowned(self.workspace),
        )  # fmt: skip
