#!/usr/bin/env bash
# Measures one accelerator, without network, TensorFlow or SeqIO, in parts that are meant to take less than ten minutes each
# on an H200. Usage, from any folder: bash launch/accelerator.sh [--rehearse] PACK OUTPUT PART...
#
# --rehearse  tiny sizes, to try everything on a CPU
# PACK        the folder that launch/accelerator_pack.sh made
# OUTPUT      gets the results: JSON, logs, and checkpoints in OUTPUT/runs
# PART        smoke    every objective and decoder, compared with the CPU
#             attention  the fused attention of a GPU against XLA's
#             train    speed of training steps: Base, Large, XL of the paper, and SmolLM2-135M
#             decode   decode times of Figure 3
#             convert  SmolLM2-135M on books: the start fine-tuned autoregressively, and converted in three ways, with equal tokens
#
# PYTHON names the interpreter (default: python3). It is not changed: the wheels go to OUTPUT/site.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
rehearse=
[ "${1:-}" != --rehearse ] || { rehearse=yes; shift; }
[ $# -ge 3 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 2; }
pack=$(cd "$1" && pwd -P)
mkdir -p "$2"
out=$(cd "$2" && pwd -P)
shift 2
python=${PYTHON:-python3}
if [ ! -d "$out/site" ] && [ -n "$(ls "$pack/wheels" 2>/dev/null)" ] && [ -z "$rehearse" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$out/site" "$pack"/wheels/*.whl
fi
export PYTHONPATH=$root:$out/site${PYTHONPATH:+:$PYTHONPATH}
diffusion_t5x=("$python" -m diffusion_t5x)
hardware=(--gin_file=hardware/gpu_1.gin)
[ -z "$rehearse" ] || hardware=(--gin_file=hardware/cpu.gin)

smoke() { "$python" "$root/launch/accelerator_smoke.py" --output "$out/smoke.json"; }

attention() { (cd "$root" && "$python" -m pytest -q -p no:cacheprovider tests/models/test_attention_kernels.py); }

train_size() { # NAME ROWS FLAGS...
  local name=$1 rows=$2
  shift 2
  [ -z "$rehearse" ] || { rows=2; set -- --gin.REPEATS=1 --gin.NUM_STEPS=1 --gin.INPUT_LENGTH=8 --gin.TARGET_LENGTH=24 --gin.VOCABULARY_SIZE=512; }
  "${diffusion_t5x[@]}" benchmark train --gin_file=recipes/train_speed.gin "$@" "${hardware[@]}" \
    --gin.BATCH_SIZE="$rows" --gin.BENCHMARK_OUTPUT_DIR="$out/train_$name"
}

train() {
  local paper=(--gin.INPUT_LENGTH=512 --gin.TARGET_LENGTH=512 --gin.VOCABULARY_SIZE=256000)
  train_size base 64 --gin_file=sizes/base.gin "${paper[@]}"
  train_size large 32 --gin_file=sizes/large.gin "${paper[@]}"
  train_size xl 8 --gin_file=sizes/xl.gin "${paper[@]}"
  train_size smollm2 64 --gin.INPUT_LENGTH=64 --gin.TARGET_LENGTH=448 --gin.VOCABULARY_SIZE=49152 \
    --gin.ModelConfig.embed_dim=576 --gin.ModelConfig.num_layers=30 --gin.ModelConfig.num_heads=9 \
    --gin.ModelConfig.num_kv_heads=3 --gin.ModelConfig.head_dim=64 --gin.ModelConfig.mlp_dim=1536 \
    --gin.ModelConfig.activation="'silu'" --gin.ModelConfig.position="'rotary'"
}

decode() {
  local sizes=(--gin_file=sizes/base.gin)
  [ -z "$rehearse" ] || sizes=(--gin_file=sizes/tiny.gin --gin.LENGTHS='(8, 16)' --gin.INPUT_LENGTH=8
    --gin.MAX_BATCH_SIZE=None --gin.VOCABULARY_SIZE=512)
  "${diffusion_t5x[@]}" benchmark decode --gin_file=recipes/paper1/figure3.gin "${sizes[@]}" "${hardware[@]}" \
    --gin.BENCHMARK_OUTPUT_DIR="$out/decode"
}

convert() {
  local rows=64 steps=640 route settings write
  write='import sys, diffusion_t5x as dt
model = dt.load(sys.argv[1], vocabulary=sys.argv[2])
print(model.generate("In the year 1815, after the battle of", length=48))'
  [ -z "$rehearse" ] || { rows=1; steps=2; }
  if [ ! -d "$out/start" ]; then
    cat "$pack"/model.?? > "$out/model.gguf"
    "${diffusion_t5x[@]}" convert from_gguf "$out/model.gguf" --output "$out/start"
  fi
  for route in autoregressive shifted in_place off_policy; do
    settings=(--gin_file="recipes/ar2diff/$route.gin")
    [ $route != autoregressive ] || settings=(--gin_file=objectives/autoregressive.gin --gin_file=runs/adapt.gin
      --gin_file=recipes/ar2diff/shared/training.gin)
    "${diffusion_t5x[@]}" train --gin_file="$out/start/model.gin" "${settings[@]}" --gin_file=data/cached_pretrain.gin \
      "${hardware[@]}" --gin.CACHE_DIR="$pack/tokens" --gin.MIXTURE_OR_TASK_NAME=local \
      --gin.TASK_FEATURE_LENGTHS='{"inputs": 64, "targets": 448}' --gin.INITIAL_CHECKPOINT_PATH="$out/start" \
      --gin.MODEL_DIR="$out/runs/$route" --gin.BATCH_SIZE=$rows --gin.TRAIN_STEPS=$steps \
      --gin.EVAL_PERIOD=$((steps / 2)) --gin.EVAL_STEPS=$((steps > 8 ? 8 : 1))
    "$python" -c "$write" "$out/runs/$route" "$out/start/tokenizer.json" | tee "$out/runs/$route.txt"
  done
}

for part; do
  case $part in
    smoke | attention | train | decode | convert) "$part" 2>&1 | tee "$out/$part.log" ;;
    *) echo "error: there is no part $part; run $0 without arguments for the list" >&2; exit 2 ;;
  esac
done
