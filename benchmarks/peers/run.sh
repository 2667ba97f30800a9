#!/bin/bash
# dougong beside vLLM or SGLang on one GPU of 80 GB, each alone while it is measured. Four to five minutes.
#   bash benchmarks/peers/run.sh vllm|sglang PEERS_DIR CONFIGS_DIR [OUT]
# PEERS_DIR: unpacked peers (env.sh, bench_vllm.py, bench_sglang.py); CONFIGS_DIR: folders with a config.json each.
# The sizes of the KV caches are given (room for 256 requests of 640 tokens), so that engines may start side by side: one that
# measured the device's free memory would count its neighbour's. They wait, up, for their turn. Nothing else may use the GPU.
# LIMIT: seconds for a peer's engines (300); SGLang builds kernels for 100 s on a fresh machine.
set -u
peer=${1:?vllm or sglang} unpacked=${2:?peers} configs=${3:?configs} out=${4:-peer-bench}
here=$(cd "$(dirname "$0")" && pwd); mkdir -p "$out"
load=1:128:128,16:512:128,256:512:128

( # a peer's PYTHONPATH must not reach dougong
  . "$unpacked/env.sh" "$peer"; export VLLM_USE_FLASHINFER_SAMPLER=0
  limit=${LIMIT:-300}; . "$here/turns.sh"
  start() { # NAME MODEL GB_OF_CACHE
    local size=(--mem-fraction-static 0.88 --extra '{"max_total_tokens": 170000}')
    [ "$peer" = sglang ] || size=(--gpu-memory-utilization 0.25 --extra "{\"kv_cache_memory_bytes\": ${3}000000000}")
    engine "$1" "$unpacked/bench_$peer.py" --config-dir "$configs/$2" --workloads "$load" --repeats 3 "${size[@]}"
  }
  start llama llama-3.1-8b 22; start qwen qwen3-0.6b 19
  turns
)
grep -h '"engine"' "$out/llama.log" "$out/qwen.log"
for model in llama-3.1-8b qwen3-0.6b; do
  dougong bench offline --model "$configs/$model" --load-format dummy --dtype bfloat16 --workloads "$load" --repeats 3
done | tee "$out/dougong.jsonl"
