"""Lower every Triton kernel to SPIR-V with triton-xpu's own compiler: run with that Triton first on the path.

No device and no ``ocloc`` is needed: the one function that would ask the driver for the device's name is answered here.
Prints one JSON line per kernel.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

_ARCH: dict[str, Any] = {
    "name": "Battlemage", "architecture": 0, "gpu_eu_count": 160, "gpu_subslice_count": 20, "max_work_group_size": 1024,
    "max_num_sub_groups": 64, "sub_group_sizes": [16, 32], "has_fp64": True,
    "has_subgroup_matrix_multiply_accumulate": True, "has_subgroup_matrix_multiply_accumulate_tensor_float32": False,
    "has_subgroup_2d_block_io": True, "has_bfloat16_conversions": True,
}  # fmt: skip
_MAGIC = 0x07230203


def main() -> None:
    import triton
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dougong_kernels.compile.launches import launches
    from dougong_kernels.compile.targets import Target

    # Triton loads its backends by path: the class's own globals are the ones to change.
    namespace = backends["intel"].compiler.__init__.__globals__
    namespace["compile_module_from_src"] = lambda source, name: SimpleNamespace(parse_device_arch=lambda number: "")
    for launch in launches(Target("xpu", "xpu", 32, 128 << 10, 256)):
        if not launch.core:
            continue
        line: dict[str, Any] = {"name": launch.name, "error": ""}
        try:
            built = lower(triton, GPUTarget("xpu", _ARCH, 32), ASTSource, launch)
            binary = built.asm["spv"]
            if int.from_bytes(binary[:4], "little") != _MAGIC:
                line["error"] = "no SPIR-V came out"
            line |= {"bytes": len(binary), "shared": int(built.metadata.shared)}
        except Exception as caught:  # whatever the compiler throws is the answer for this kernel
            error: BaseException = caught
            while error.__cause__ is not None:  # the innermost function's own error
                error = error.__cause__
            line["error"] = f"{type(error).__name__}: {str(error)[-500:]}"
        print(json.dumps(line), flush=True)


def lower(triton: Any, target: Any, source_type: Any, launch: Any) -> Any:
    from dougong_kernels.compile.build import described

    options = {name: launch.args[name] for name in ("num_warps", "num_stages") if name in launch.args}
    source = source_type(fn=launch.kernel, **described(launch.kernel, launch.args))
    return triton.compile(source, target=target, options=options)


if __name__ == "__main__":
    sys.exit(main())
