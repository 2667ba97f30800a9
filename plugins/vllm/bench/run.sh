#!/bin/bash
# dougong's attention beside vLLM's own, inside vLLM 0.26 on one GPU: tokens, and speed alone with equal KV caches.
#   bash plugins/vllm/bench/run.sh CONFIG_DIR [OUT] [BACKEND…]
# CONFIG_DIR: a folder with config.json, e.g. configs/qwen3-0.6b. BACKEND: what the first is compared with; FLASH_ATTN
# CUSTOM by default, CUSTOM being dougong's. A backend with ":eager" behind it runs without compilation and graphs.
# Environment: KV_GIB per engine (18.5: three such engines of Qwen3-0.6B fit 80 GB, and 256 x 640 tokens fit one),
# LIMIT seconds for all (250), WORKLOADS, REPEATS, MODEL (a folder with weights; random ones by default, of
# LAYERS layers: few layers make few near ties). Engines come up side by side and are measured one after another; the
# second goes along the first one's tokens, then.
set -u
config=${1:?a folder with config.json, e.g. configs/qwen3-0.6b}
out=${2:-vllm-bench}
[ $# -gt 2 ] && backends=("${@:3}") || backends=(FLASH_ATTN CUSTOM)
limit=${LIMIT:-250} workloads=${WORKLOADS:-1:128:128,16:512:128,256:512:128}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
python3 -c 'import dougong_vllm' 2> /dev/null || python3 -m pip install --no-deps "$here/.." || exit 1
. "$here/../../../benchmarks/peers/turns.sh"
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$peers
export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0}

# Weights with which tokens show attention; the engines' own dummy ones do not.
model=${MODEL:-$out/weights-$(basename "$config")-${LAYERS:-all}}
python3 "$peers/random_weights.py" "$config" "$model" ${LAYERS:+--layers "$LAYERS"} || exit 1

results=() follow=()
for backend in "${backends[@]}"; do
  name=${backend/:/-} options=()
  [ "${backend%:eager}" = "$backend" ] || options=(--enforce-eager)
  rm -f "$out/$name.json"
  results+=("$out/$name.json")
  # vLLM wants --memory's share free at its start, and takes --kv-gib for its cache.
  engine "vllm-$name" "$here/offline.py" --model "$model" --attention-backend "${backend%:eager}" \
    --memory 0.25 --kv-gib "${KV_GIB:-18.5}" --workloads "$workloads" --repeats "${REPEATS:-3}" \
    --json "$out/$name.json" "${options[@]}" "${follow[@]}"
  follow=(--follow "${results[0]}")
done
turns; failed=$?
for result in "${results[@]:1}"; do
  if [ -e "${results[0]}" ] && [ -e "$result" ]; then
    python3 "$here/offline.py" --compare "${results[0]}" "$result" || failed=1
  fi
done
exit $failed
