#!/usr/bin/env python3
"""Try every setting of the attention kernels on this GPU and put the best into its table in the repository.

The table is what serving reads; nothing is tuned while it serves. The few rows' settings ("few") are chosen by hand
from the printed lists: they trade the last percent of bandwidth for the latency of merging.

    python benchmarks/tune_attention.py [--only decode|prefill] [--budget SECONDS]
"""

import sys

import attention

if __name__ == "__main__":
    path = attention.Path(attention.__file__).resolve().parents[1] / "kernels/dougong_kernels/tuning"
    sys.argv[1:] = ["--tune", "--write", str(path / f"{attention.target()}.json"), *sys.argv[1:]]
    attention.main()
