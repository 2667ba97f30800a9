#!/bin/bash
# On a machine with a GPU, SGLang 0.5.17 and dougong: tokens beside FlashAttention 3, then speed beside it. Writes JSON.
#   bash plugins/sglang/bench/run.sh CONFIG_DIR [OUT]
set -eu
config=${1:?a folder with config.json, e.g. configs/qwen3-0.6b}
out=${2:-sglang-bench}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
python3 -c 'import dougong_sglang' 2>/dev/null || python3 -m pip install --no-deps "$here/.."
for backend in fa3 dougong; do
  for eager in "" --disable-cuda-graph; do
    python3 "$here/offline.py" --config-dir "$config" --attention-backend "$backend" $eager \
      --json "$out/$backend${eager:+-eager}.json"
  done
done
python3 "$here/offline.py" --compare "$out/fa3.json" "$out/dougong.json"
python3 "$here/offline.py" --compare "$out/fa3-eager.json" "$out/dougong-eager.json"
