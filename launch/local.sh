#!/usr/bin/env bash
# Runs a verb as several processes of one run on this machine: what a cluster does, to try it out. A host's GPUs need no
# more than one process. Usage, from any folder:
#
#   bash launch/local.sh [--print] NUMBER VERB FLAGS...
#   bash launch/local.sh 2 train --gin_file=recipes/quickstart/pretrain_ar.gin --gin.MODEL_DIR=/tmp/two
#
# Each line of the output begins with the number of its process. When one process fails, the others are ended. The exit
# code is the first that is not 0.
set -euo pipefail

print=
[ "${1:-}" != --print ] || { print=1; shift; }
[ $# -ge 2 ] && [[ $1 =~ ^[1-9][0-9]*$ ]] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
number=$1 verb=$2
shift 2

command=(-m "diffusion_t5x.$verb" "$@" --distributed)
if [ -n "$print" ]; then
  for ((i = 0; i < number; i++)); do
    echo "JAX_COORDINATOR_ADDRESS=localhost:PORT JAX_NUM_PROCESSES=$number JAX_PROCESS_ID=$i python ${command[*]@Q}"
  done
  exit
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
command=("$VENV/bin/python" "${command[@]}")

port=$("$VENV/bin/python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$number
pids=()
trap '[ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true' EXIT
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < number; i++)); do
  JAX_PROCESS_ID=$i "${command[@]}" > >(sed -u "s/^/$i: /") 2> >(sed -u "s/^/$i: /" >&2) &
  pids+=($!)
done

status=0
while [ ${#pids[@]} -gt 0 ]; do
  code=0
  wait -n -p ended "${pids[@]}" || code=$?
  [ -n "${ended:-}" ] || continue # a signal, handed on
  left=()
  for pid in "${pids[@]}"; do [ "$pid" = "$ended" ] || left+=("$pid"); done
  pids=("${left[@]}")
  [ "$status" -ne 0 ] || status=$code
  # Being told to stop (75) is no failure: the others have been told, too, and are saving.
  [ "$code" -eq 0 ] || [ "$code" -eq 75 ] || kill -KILL "${pids[@]}" 2>/dev/null || true
done
exit "$status"
