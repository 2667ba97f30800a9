"""The SDK's operators as torch knows them: real schemas, real shape functions, no shared library."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dougong_ascend.twin.wheel import VERSION

__all__ = ["define_operators", "fake_sdk"]

# ATB's operators are declared in a shared library; these are the two that the backend calls, as torch prints them
# where that library is loaded.
_ATB = (
    (
        "_npu_paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, int num_kv_heads, int num_heads,"
        " float scale_value, Tensor block_table, Tensor context_lens, Tensor(a!) out, *, Tensor? workspace=None) -> ()"
    ),
    (
        "_npu_reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
        " Tensor slot_indices) -> ()"
    ),
)

_kept: list[Any] = []
"""Libraries and modules whose registrations end with them."""


class _AnyName:
    """Error codes: any name is a code."""

    def __getattr__(self, name: str) -> str:
        return name


def fake_sdk(npu: ModuleType, soc: str) -> ModuleType:
    """Put a ``torch_npu`` into ``sys.modules`` that has what the backend and the wheel's shape functions import."""

    def module(name: str, **contents: Any) -> Any:
        made: Any = ModuleType(name)
        made.__dict__.update(contents)
        made.__spec__ = ModuleSpec(name, None)  # other libraries ask importlib whether the SDK is there
        sys.modules[name] = made
        return made

    def weak_ref_tensor(tensor: torch.Tensor) -> torch.Tensor:
        return torch.ops.dougong_sim.unowned(tensor)  # type: ignore[no-any-return]

    native = module("torch_npu._C", _weak_ref_tensor=weak_ref_tensor)
    # Numbers of dtypes that torch itself has not: compared with, never used here.
    numbers = dict(hifloat8=290, int4=285, float4_e2m1fn_x2=296, float4_e1m2fn_x2=297, float8_e8m0fnu=293)
    sdk = module("torch_npu", __version__=VERSION, npu=npu, _C=native, is_dougong_twin=True, **numbers)

    def missing(name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0

    sdk.__getattr__ = missing
    module("torch_npu.utils")
    module("torch_npu.utils._error_code", ErrCode=_AnyName(), ops_error=lambda code: f" [{code}]")
    module("torch_npu.npu", **{name: value for name, value in vars(npu).items() if not name.startswith("__")})
    module("torch_npu.npu.utils", get_cann_version=lambda *args, **kwargs: "8.5.0")
    module("torch_npu.npu._backends", get_soc_version=lambda: 200 if "310P" in soc else 223)
    return sdk  # type: ignore[no-any-return]


def define_operators(folder: Path) -> None:
    """Define every operator that the wheel's list names, and run its shape functions' registrations."""
    library = torch.library.Library("npu", "DEF")
    atb = torch.library.Library("atb", "DEF")
    _kept.extend((library, atb))
    seen = set()
    text = (folder / "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml").read_text("utf-8")
    for line in text.splitlines():
        match = re.match(r"\s*-?\s*func:\s*(.+?)\s*$", line)
        if match is None:
            continue
        schema = match.group(1).strip("'\"")
        name = schema.split("(")[0]
        if name in seen:
            continue
        seen.add(name)
        try:
            library.define(schema)
        except RuntimeError:  # a type that this torch does not know: no operator of ours
            continue
    for schema in _ATB:
        atb.define(schema)
    path = folder / "torch_npu/op_plugin/meta/_meta_registrations.py"
    spec = importlib.util.spec_from_file_location("dougong_ascend_twin_meta", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _kept.append(module)
