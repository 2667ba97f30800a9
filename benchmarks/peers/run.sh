#!/bin/bash
# dougong beside vLLM or SGLang on one GPU of 80 GB, each alone while it is measured. Four to five minutes.
#   bash benchmarks/peers/run.sh vllm|sglang PEERS_DIR CONFIGS_DIR [OUT]
# PEERS_DIR: unpacked peers (env.sh, bench_vllm.py, bench_sglang.py); CONFIGS_DIR: folders with a config.json each.
# The sizes of the KV caches are given (room for 256 requests of 640 tokens), so that engines may start side by side: one that
# measured the device's free memory would count its neighbour's. They wait, up, for their turn. Nothing else may use the GPU.
set -u
peer=${1:?vllm or sglang}; peers=${2:?peers}; configs=${3:?configs}; out=${4:-peer-bench}
here=$(cd "$(dirname "$0")" && pwd); mkdir -p "$out"; rm -f /tmp/ready.* /tmp/go.*
load=1:128:128,16:512:128,256:512:128
declare -A pids

start() { # NAME MODEL GB_OF_CACHE
  local size
  if [ "$peer" = vllm ]; then size=(--gpu-memory-utilization 0.25 --extra "{\"kv_cache_memory_bytes\": ${3}000000000}")
  else size=(--mem-fraction-static 0.88 --extra '{"max_total_tokens": 170000}'); fi
  ( . "$peers/env.sh" "$peer"; export VLLM_USE_FLASHINFER_SAMPLER=0
    exec python3 "$here/barrier.py" "$1" "$peers/bench_$peer.py" --config-dir "$configs/$2" --workloads "$load" --repeats 3 "${size[@]}" > "$out/$1.log" 2>&1 ) &
  pids[$1]=$!
}
up() { # NAME SECONDS
  for _ in $(seq $(( $2 * 5 ))); do [ -e "/tmp/ready.$1" ] && return; kill -0 "${pids[$1]}" 2>/dev/null || break; sleep 0.2; done
  echo "$1 did not come up:"; tail -15 "$out/$1.log"; kill "${pids[$1]}" 2>/dev/null
}
measure() { [ -e "/tmp/ready.$1" ] && { touch "/tmp/go.$1"; wait "${pids[$1]}"; grep -h '"engine"' "$out/$1.log"; }; }

start llama llama-3.1-8b 22; start qwen qwen3-0.6b 19
up llama 240; up qwen 240  # SGLang builds kernels for 100 s on a fresh machine
measure llama; measure qwen
for model in llama-3.1-8b qwen3-0.6b; do
  dougong bench offline --model "$configs/$model" --load-format dummy --dtype bfloat16 --workloads "$load" --repeats 3
done | tee "$out/dougong.jsonl"
