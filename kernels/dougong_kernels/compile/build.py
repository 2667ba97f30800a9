"""Compile one kernel for a target and read what the compiler says of it."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

from dougong_kernels.compile.targets import Target

__all__ = ["Resources", "compile_for", "described"]


@dataclass(frozen=True)
class Resources:
    """``registers`` per thread, ``spills`` (registers on AMD, bytes of stack on NVIDIA), ``shared`` bytes of memory."""

    registers: int
    spills: int
    shared: int


def compile_for(target: Target, kernel: Any, args: dict[str, Any]) -> Resources:
    """args: name -> a type ("*bf16", "i32", "fp32"), or a constexpr's value; None for a missing pointer."""
    import triton
    from triton.compiler import ASTSource

    options = {k: args[k] for k in ("num_warps", "num_stages", "maxnreg") if k in args}
    if "EARLY" in kernel.arg_names and target.early:
        options["launch_pdl"] = True
    source = ASTSource(fn=kernel, **described(kernel, args, early=target.early))
    built = triton.compile(source, target=target.triton(), options=options)
    registers, spills = _amd(built.asm) if target.backend == "hip" else _nvidia(built.asm)
    return Resources(registers, spills, int(built.metadata.shared))


def described(kernel: Any, args: dict[str, Any], *, early: bool = False) -> dict[str, Any]:
    """The arguments of a kernel as Triton's ``ASTSource`` takes them; early: whether it may begin before the last ends.

    Pointers and the integers named stride_* are taken as divisible by 16, as the launcher finds them.
    """
    args = args | {"EARLY": early}
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
    return {"signature": signature, "constexprs": constants, "attrs": attrs}


def _amd(asm: dict[str, Any]) -> tuple[int, int]:
    def field(name: str) -> int:
        found = re.search(re.escape(name) + r":\s*(\d+)", asm["amdgcn"])
        return int(found.group(1)) if found else 0

    return field(".vgpr_count"), field(".vgpr_spill_count")


def _nvidia(asm: dict[str, Any]) -> tuple[int, int]:
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: [int(n) for n in re.findall(rf"{name}:(\d+)", text)] for name in ("REG", "STACK")}
    return max(numbers["REG"], default=0), max(numbers["STACK"], default=0)
