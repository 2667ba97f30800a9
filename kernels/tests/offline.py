"""Compile a Triton kernel for a target that this machine does not have, and read what the compiler says of it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
    "gfx1201": GPUTarget("hip", "gfx1201", 32),
}
SHARED_LIMIT = {"sm80": 163, "sm90": 227, "sm100": 227, "gfx950": 160}
"""KiB per program; 64 for the rest."""


@dataclass
class Report:
    target: str
    registers: int
    spills: int
    shared: int
    asm: dict[str, Any]

    def has(self, pattern: str) -> int:
        text = self.asm.get("ptx") or self.asm.get("amdgcn") or ""
        return len(re.findall(pattern, text))


def compile_for(target: str, kernel: Any, args: dict[str, Any]) -> Report:
    """args: name -> a type ("*bf16", "i32", "fp32"), or a constexpr's value; None for a missing pointer.

    Pointers and the integers named stride_* are taken as divisible by 16, as the launcher finds them.
    """
    args = dict(args)
    options = {k: args.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in args}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    for at, name in enumerate(kernel.arg_names):
        value = args[name]
        if isinstance(value, str):
            signature[name] = value
            if value.startswith("*") or name.startswith("stride"):
                attrs[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(at,)] = value
    if target.startswith("gfx"):
        options.pop("maxnreg", None)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    built = triton.compile(source, target=TARGETS[target], options=options)
    registers, spills = _resources(target, built.asm)
    return Report(target, registers, spills, built.metadata.shared, built.asm)


def _resources(target: str, asm: dict[str, Any]) -> tuple[int, int]:
    if target.startswith("gfx"):
        text = asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(re.escape(name) + r":\s*(\d+)", text)
            return int(found.group(1)) if found else 0

        return field(".vgpr_count"), field(".vgpr_spill_count")
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = subprocess.run(
            [os.path.join(tools, "cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = max((int(n) for n in re.findall(r"REG:(\d+)", text)), default=0)
    return registers, max((int(n) for n in re.findall(r"STACK:(\d+)", text)), default=0)
