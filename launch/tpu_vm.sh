#!/usr/bin/env bash
# Runs a verb on every host of a Cloud TPU VM slice: copies this checkout there, installs it, runs it, collects what was
# said, and starts it again where it was told to stop (exit code 75) or the connection was lost. Usage:
#
#   bash launch/tpu_vm.sh [--print] --name NAME --zone ZONE [--project PROJECT] [--retries 10] -- VERB FLAGS...
#   bash launch/tpu_vm.sh --name slice --zone us-east5-a -- train --gin_file=recipes/paper1/pretrain.gin \
#     --gin_file=hardware/tpu_v5p_4x4x4.gin --gin.MODEL_DIR=gs://bucket/model
#
# Needs gcloud, logged in, and a slice that is there (gcloud compute tpus tpu-vm create). MODEL_DIR must be a folder that
# all hosts share. Logs: ./tpu_logs/NAME/<attempt>/.
set -euo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
print='' name='' zone='' project=() retries=10
while [ $# -gt 0 ]; do
  case $1 in
    --print) print=1; shift ;;
    --name) name=${2:?}; shift 2 ;;
    --zone) zone=${2:?}; shift 2 ;;
    --project) project=(--project "${2:?}"); shift 2 ;;
    --retries) retries=${2:?}; shift 2 ;;
    --) shift; break ;;
    *) usage ;;
  esac
done
[ -n "$name" ] && [ -n "$zone" ] && [ $# -ge 1 ] || usage
verb=$1
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
at=("$name" --zone "$zone" "${project[@]}" --worker=all)
tpu=(gcloud compute tpus tpu-vm)
folder=diffusion_t5x_$name
archive=$folder.tar.gz

do_it() {
  if [ -n "$print" ]; then echo "${*@Q}"; else "$@"; fi
}

do_it git -C "$root" archive --format=tar.gz --output="/tmp/$archive" HEAD # what is committed
do_it "${tpu[@]}" scp "/tmp/$archive" "$name:" --zone "$zone" "${project[@]}" --worker=all
do_it "${tpu[@]}" ssh "${at[@]}" --command "mkdir -p $folder && tar -xzf $archive -C $folder && cd $folder &&
  { test -x .venv/bin/python || python3 -m venv .venv; } && .venv/bin/pip install -q -e '.[tpu]'"

# A host that fails ends the others': JAX's coordination service sees it.
run="cd $folder && .venv/bin/python -m diffusion_t5x.$verb ${*@Q} --distributed"
for ((attempt = 1; attempt <= retries + 1; attempt++)); do
  logs=tpu_logs/$name/$attempt
  do_it mkdir -p "$logs"
  status=0
  do_it "${tpu[@]}" ssh "${at[@]}" --command "$run" --output-directory "$logs" || status=$?
  [ "$status" -eq 75 ] || [ "$status" -eq 255 ] || exit "$status"
  echo "attempt $attempt ended with $status: again in 30 s" >&2
  sleep 30
done
exit "$status"
