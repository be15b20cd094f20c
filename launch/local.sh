#!/usr/bin/env bash
# Runs a verb as several processes of one run on this machine: what a cluster does, to try it out. A host's GPUs need no
# more than one process. Usage, from any folder:
#
#   bash launch/local.sh [--print] NUMBER VERB FLAGS...
#   bash launch/local.sh 2 train --gin_file=recipes/quickstart/pretrain_ar.gin --gin.MODEL_DIR=/tmp/two
#
# Each line of the output begins with the number of its process. When one process fails, the others are ended, and its
# code is the exit code. Told to stop (SIGTERM, SIGHUP, SIGUSR1), all save and end, and the exit code is 75: run it again.
# After Ctrl-C it is 130.
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
pipes=$(mktemp -d)
pids=() filters=() told='' interrupted=''
trap 'rm -rf "$pipes"; [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true' EXIT

# Makes a pipe with the ends `reader` and `writer`. Opened like this, neither waits for the other.
make_pipe() {
  local both
  mkfifo "$pipes/$1"
  exec {both}<>"$pipes/$1"
  exec {reader}<"$pipes/$1"
  exec {writer}>"$pipes/$1" {both}>&-
}

# Marks what process $1 says. A signal to the whole group does not end it before the process has said all. Once nobody
# reads the marked lines, as when the terminal was closed, it reads on: the process could fail before it has saved.
mark() {
  trap '' TERM INT HUP USR1
  exec {writer}>&-
  sed -u "s/^/$1: /" || cat >/dev/null
}

# Passed on below, when all processes are there to get it.
trap 'told=1' TERM HUP USR1
trap 'told=1 interrupted=1' INT
for ((i = 0; i < number; i++)); do
  make_pipe "$i.out"
  out=$writer
  mark "$i" <&"$reader" &
  filters+=($!)
  exec {reader}<&-
  make_pipe "$i.err"
  mark "$i" <&"$reader" >&2 &
  filters+=($!)
  JAX_PROCESS_ID=$i "${command[@]}" 1>&"$out" 2>&"$writer" &
  pids+=($!)
  exec {reader}<&- {writer}>&- {out}>&-
done

# Looks at each process: `wait -n` misses those that a signal has ended before it is called.
mkfifo "$pipes/never"
exec {never}<>"$pipes/never"
status=0
while [ ${#pids[@]} -gt 0 ]; do
  if [ -n "$told" ]; then
    told=''
    kill -TERM "${pids[@]}" 2>/dev/null || true
  fi
  left=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    # Being told to stop (75) is no failure: the others have been told, too, and are saving.
    if [ "$status" -eq 0 ] || { [ "$status" -eq 75 ] && [ "$code" -ne 0 ]; }; then status=$code; fi
  done
  pids=("${left[@]}")
  [ "$status" -eq 0 ] || [ "$status" -eq 75 ] || kill -KILL "${pids[@]}" 2>/dev/null || true
  read -rt 0.2 -u "$never" || true # a pause
done
# Their last lines. A process left behind may hold a pipe open: do not wait forever.
for ((i = 0; i < 20; i++)); do
  kill -0 "${filters[@]}" 2>/dev/null || break
  sleep 0.1
done
[ "$status" -ne 75 ] || [ -z "$interrupted" ] || status=130
exit "$status"
