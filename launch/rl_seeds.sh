#!/usr/bin/env bash
# Reinforcement learning's quickstart with several seeds from one start: trains them, and scores start and results, greedily
# and as rollouts sample (pass@k of 4 samples). docs/rl.md has the figures. Sets up .venv first; repeat the command to
# resume after an interruption. Usage, from any folder: bash launch/rl_seeds.sh DIR [SEED...]
#
# DIR   folder for all output; report.html in it shows all runs
# SEED  RANDOM_SEED of each run (default: 1 2 3)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

out=${1:?the folder for all output is missing}
shift
[ $# -gt 0 ] || set -- 1 2 3
run() { "$VENV/bin/python" -m diffusion_t5x "$@"; }
sampled=("--gin.in_block/MaskedDecoder.order='random'" --gin.in_block/MaskedDecoder.temperature=1.0)
sampled+=(--gin.SAMPLES_PER_EXAMPLE=4)
score() {
  run eval --gin_file=recipes/rl/eval_quickstart.gin --gin.CHECKPOINT_PATH="$1" --gin.EVAL_OUTPUT_DIR="$1/greedy"
  run eval --gin_file=recipes/rl/eval_quickstart.gin --gin.CHECKPOINT_PATH="$1" --gin.EVAL_OUTPUT_DIR="$1/sampled" \
    "${sampled[@]}"
}

run train --gin_file=recipes/rl/sft.gin --gin.MODEL_DIR="$out/sft"
score "$out/sft"
runs=("$out/sft")
for seed; do
  runs+=("$out/rl_$seed")
  run train --gin_file=recipes/rl/quickstart.gin --gin.INITIAL_CHECKPOINT_PATH="$out/sft" \
    --gin.MODEL_DIR="$out/rl_$seed" --gin.RANDOM_SEED="$seed"
  score "$out/rl_$seed"
done
run report "${runs[@]}" --output "$out/report.html"
