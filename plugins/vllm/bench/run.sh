#!/bin/bash
# On a machine with a GPU, vLLM 0.26 and dougong: tokens beside FlashAttention's, then speed beside it. Writes JSON.
#   bash plugins/vllm/bench/run.sh CONFIG_DIR [OUT]
set -eu
config=${1:?a folder with config.json, e.g. configs/qwen3-0.6b}
out=${2:-vllm-bench}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
python3 -c 'import dougong_vllm' 2>/dev/null || python3 -m pip install --no-deps "$here/.."
for backend in FLASH_ATTN CUSTOM; do
  for eager in "" --enforce-eager; do
    python3 "$here/offline.py" --config-dir "$config" --attention-backend "$backend" $eager \
      --json "$out/$backend${eager:+-eager}.json"
  done
done
python3 "$here/offline.py" --compare "$out/FLASH_ATTN.json" "$out/CUSTOM.json"
python3 "$here/offline.py" --compare "$out/FLASH_ATTN-eager.json" "$out/CUSTOM-eager.json"
