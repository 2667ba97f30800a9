#!/bin/bash
# dougong beside vLLM or SGLang on one GPU, each alone while it is measured.
#   bash benchmarks/peers/run.sh vllm|sglang PEERS_DIR CONFIGS_DIR [OUT]
# PEERS_DIR: unpacked peers (env.sh, bench_vllm.py, bench_sglang.py); CONFIGS_DIR: folders with a config.json each.
# An engine's KV cache must be sized while no other comes up: they profile the whole device's memory. So engines start one
# after another, and all but the first wait, up, for their turn.
set -u
peer=${1:?vllm or sglang}; peers=${2:?peers}; configs=${3:?configs}; out=${4:-peer-bench}
here=$(cd "$(dirname "$0")" && pwd); mkdir -p "$out"; rm -f /tmp/ready.* /tmp/go.*
load=1:128:128,16:512:128,256:512:128

up() { # NAME SECONDS SCRIPT ARGUMENTS…: start, wait until it is up
  local name=$1 limit=$2; shift 2
  ( . "$peers/env.sh" "$peer"; export VLLM_USE_FLASHINFER_SAMPLER=0; exec python3 "$here/barrier.py" "$name" "$@" > "$out/$name.log" 2>&1 ) &
  pids[$name]=$!
  for _ in $(seq $(( limit * 5 ))); do [ -e "/tmp/ready.$name" ] && return; kill -0 "${pids[$name]}" 2>/dev/null || break; sleep 0.2; done
  echo "$name did not come up:"; tail -15 "$out/$name.log"; kill "${pids[$name]}" 2>/dev/null
}
measure() { [ -e "/tmp/ready.$1" ] && { touch "/tmp/go.$1"; wait "${pids[$1]}"; grep -h '"engine"' "$out/$1.log"; }; }
declare -A pids
if [ "$peer" = vllm ]; then memory=--gpu-memory-utilization; ours=CUSTOM; else memory=--mem-fraction-static; ours=; fi

up llama 240 "$peers/bench_$peer.py" --config-dir "$configs/llama-3.1-8b" --workloads "$load" "$memory" 0.55; measure llama
up qwen 240 "$peers/bench_$peer.py" --config-dir "$configs/qwen3-0.6b" --workloads "$load" "$memory" 0.40; measure qwen
if [ -n "$ours" ]; then
  up inside 240 "$peers/bench_$peer.py" --config-dir "$configs/qwen3-0.6b" --workloads "$load" "$memory" 0.40 --attention-backend "$ours"; measure inside
fi
for model in llama-3.1-8b qwen3-0.6b; do
  dougong bench offline --model "$configs/$model" --load-format dummy --dtype bfloat16 --workloads "$load" --repeats 3
done | tee "$out/dougong.jsonl"
