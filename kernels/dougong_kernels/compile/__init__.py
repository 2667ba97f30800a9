"""Compiling every kernel for targets that this machine does not have, and holding what the compiler says to a table.

    python -m dougong_kernels.compile              check the kernels that matter against compiled/<target>.json
    python -m dougong_kernels.compile --all        check every kernel
    python -m dougong_kernels.compile --write      write the tables anew

Needs a Triton that brings LLVM for these targets (dougong-kernels[offline]); no GPU and no vendor's toolkit.
"""
