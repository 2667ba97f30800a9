"""From a case to a request: ``own`` becomes the backend's first dtype, layout and block size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dougong_compat.case import Case
from dougong_compat.crew import is_heavy
from dougong_compat.manifest import Manifest

__all__ = ["Resolver"]


class Resolver:
    """What ``own`` means for a backend. ``guard``: closed pages behind every tensor, not only where a case asks."""

    def __init__(self, facts: Mapping[str, Any], manifest: Manifest, *, guard: bool = False) -> None:
        self.guard = guard and facts["device_type"] == "cpu"
        layouts = [layout for layout in facts["layouts"] if layout["planes"]]
        self.layouts = {layout["name"]: layout for layout in layouts}
        first = next((one for one in layouts if manifest.declares(f"layout:{one['name']}")), layouts[0])
        self.layout = first["name"]
        sizes = [size for size in first["blocks"] if manifest.declares(f"block:{size}")]
        self.block = first["default"] if first["default"] in sizes or not sizes else sizes[0]
        dtypes = [name for name in facts["dtypes"] if manifest.declares(f"dtype:{name}")] or facts["dtypes"]
        # what is mandatory off the CPU is a 16-bit type, so its cases are asked in one
        halves = [name for name in dtypes if name in ("bfloat16", "float16")] if facts["device_type"] != "cpu" else []
        self.dtype = (halves or dtypes)[0]

    def params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Resolved parameters (``base`` inside variants too)."""
        out = dict(params)
        if "base" in out:
            out["base"] = self.params(out["base"])
        if out.get("dtype", "own") == "own":
            out["dtype"] = self.dtype
        if out.get("layout", "own") == "own":
            out["layout"] = self.layout
        named = self.layouts.get(out["layout"])
        if named is not None and out["layout"] not in ("nhd", "hnd", "nz16", "x_packed"):
            out["planes"] = named["planes"]
        if not out.get("block"):
            out["block"] = self.block if out["layout"] == self.layout else (named["default"] if named else 16)
        if self.guard and ("H" in out or "op" in out) and out.get("stride", "plain") == "plain":
            out["guard"] = True
        rows = out.get("rows")
        if rows is not None:
            out["rows"] = [[length(q, out["block"]), length(kv, out["block"])] for q, kv in rows]
        return out

    def request(self, case: Case, *, declared: bool) -> dict[str, Any]:
        request = {**case.to_json(), "params": self.params(case.params), "declared": declared}
        if case.kind == "engine":  # loads a model, and the first one all that an engine imports
            request["timeout"] = 300.0
        if is_heavy(request):
            request["heavy"] = True
        return request


def length(value: int | str, block: int) -> int:
    """A length in tokens: a number, or ``"b"``, ``"2b+1"``, ``"3b-1"`` in blocks."""
    if isinstance(value, int):
        return value
    head, _, tail = value.partition("b")
    return max(0, int(head or 1) * block + int(tail or 0))
