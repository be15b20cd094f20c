#!/usr/bin/env bash
# Runs a verb on every host of one or several Cloud TPU VM slices. Usage:
#
#   bash launch/tpu_vm.sh [--print] --name NAME --zone ZONE [--project PROJECT] [--slices N] [--request FLAGS]
#     [--retries 10] -- VERB FLAGS...
#   bash launch/tpu_vm.sh --name slice --zone us-east5-a -- train --gin_file=recipes/paper1/pretrain.gin \
#     --gin_file=hardware/tpu_v5p_4x4x4.gin --gin.MODEL_DIR=gs://bucket/model
#
# Copies what is committed in this checkout to all hosts, installs it and runs it. A run that was told to stop (code 75) or
# whose connection or slice was lost is started again: what still runs on the hosts is told to save and end, slices are
# waited for, and hosts that are new are set up.
#
# --slices N       the slices are NAME-0 to NAME-<N-1>, as a queued resource with --node-count names them. Give
#                  MeshConfig.replica the same number
# --request FLAGS  makes the queued resource NAME with these flags, such as '--accelerator-type=v5p-128
#                  --runtime-version=v2-alpha-tpuv5 --spot', and again after it was preempted
#
# Needs gcloud, logged in. MODEL_DIR must be a folder that all hosts share. Logs: ./tpu_logs/NAME/<start>-<attempt>/.
# shellcheck disable=SC2329 # on_slices calls functions by their names
set -euo pipefail

usage() { sed -n '2,/^# shell/{/^# shell/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
say() { echo "tpu_vm: $*" >&2; }
print='' name='' zone='' project=() slices=1 request=() retries=10
while [ $# -gt 0 ]; do
  case $1 in
    --print) print=1; shift ;;
    --name) name=${2:?}; shift 2 ;;
    --zone) zone=${2:?}; shift 2 ;;
    --project) project=(--project "${2:?}"); shift 2 ;;
    --slices) slices=${2:?}; shift 2 ;;
    --request) read -rd '' -a request <<<"${2:?}" || true; shift 2 ;; # may have several lines
    --retries) retries=${2:?}; shift 2 ;;
    --) shift; break ;;
    *) usage ;;
  esac
done
[ -n "$name" ] && [ -n "$zone" ] && [[ $slices =~ ^[1-9][0-9]*$ ]] && [[ $retries =~ ^[0-9]+$ ]] && [ $# -ge 1 ] || usage

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
where=(--zone "$zone" "${project[@]}")
tpu=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)
folder=diffusion_t5x_$name
archive=${TMPDIR:-/tmp}/$folder.tar.gz
nodes=("$name") ids=(--node-id "$name")
if [ "$slices" -gt 1 ]; then
  nodes=() ids=(--node-count "$slices" --node-prefix "$name")
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
start=START
[ -n "$print" ] || start=$(date +%Y%m%d-%H%M%S).$$

do_it() {
  if [ -n "$print" ]; then echo "${*@Q}"; else "$@"; fi
}

# The state of a slice or of the queued resource; nothing where it is not there. Fails where gcloud cannot say.
slice_state() { do_it "${tpu[@]}" list "${where[@]}" --filter="name ~ \"/$1$\"" --format='value(state)'; }
queue_state() { do_it "${queue[@]}" list "${where[@]}" --filter="name ~ \"/$name$\"" --format='value(state.state)'; }
request() { do_it "${queue[@]}" create "$name" "${where[@]}" "${ids[@]}" "${request[@]}" --async || exit 2; }
withdraw() { do_it "${queue[@]}" delete "$name" "${where[@]}" --force --quiet; }

# A command on every host of a slice.
on_hosts() { do_it "${tpu[@]}" ssh "$1" "${where[@]}" --worker=all --command "$2"; }

# Makes the queued resource where there is none, and again where it was preempted. Returns whether it is active.
queue_is_active() {
  local state
  state=$(queue_state) || return 1
  case $state in
    ACTIVE) return 0 ;;
    FAILED) say "the request for $name has failed: ${queue[*]} describe $name ${where[*]}"; exit 2 ;;
    '') request ;;
    SUSPENDED) say "$name was preempted, and is requested again"; withdraw && request ;;
    *) say "the request for $name is $state" ;;
  esac
  return 1
}

# Returns 0, or 1 where a slice is not ready, or 2 where it is not there.
are_ready() {
  local node state
  [ ${#request[@]} -eq 0 ] || queue_is_active || return 1
  for node in "${nodes[@]}"; do
    state=$(slice_state "$node") || return 1
    [ "$state" != READY ] || continue
    say "$node is ${state:-not there}"
    [ -z "$state" ] || return 1
    return 2
  done
}

await_slices() {
  local code=0
  if [ -n "$print" ]; then
    if [ ${#request[@]} -gt 0 ]; then queue_state; request; fi
    on_slices slice_state
    return
  fi
  are_ready || code=$?
  # A slice that never was there is a mistake; one that was may come back.
  [ "$code" -ne 2 ] || [ "$attempt" -gt 1 ] || [ ${#request[@]} -gt 0 ] || exit 2
  while [ "$code" -ne 0 ]; do
    sleep 60
    code=0
    are_ready || code=$?
  done
}

# Runs a function for every slice at the same time. Returns the first code that is not 0.
on_slices() {
  local node pid code status=0 started=()
  for node in "${nodes[@]}"; do
    if [ -n "$print" ]; then "$1" "$node"; continue; fi
    "$1" "$node" &
    started+=($!)
  done
  for pid in "${started[@]}"; do
    code=0
    wait "$pid" || code=$?
    while kill -0 "$pid" 2>/dev/null; do # a signal came between
      code=0
      wait "$pid" || code=$?
    done
    [ "$status" -ne 0 ] || status=$code
  done
  return "$status"
}

set_up() {
  local unpack="rm -rf $folder/new && mkdir -p $folder/new && tar -xzf $folder.tar.gz -C $folder/new"
  do_it "${tpu[@]}" scp "$archive" "$1:$folder.tar.gz" "${where[@]}" --worker=all &&
    on_hosts "$1" "$unpack && bash $folder/new/launch/tpu_vm_host.sh set_up"
}

run_verb() {
  local command="bash $folder/code/launch/tpu_vm_host.sh run $start-$attempt $verb"
  if [ -n "$print" ]; then on_hosts "$1" "$command"; else on_hosts "$1" "$command" 2>&1 | tee "$logs/$1.log"; fi
}

end() { on_hosts "$1" "bash $folder/code/launch/tpu_vm_host.sh end"; }

# True if another attempt may go better. gcloud's code is that of the first host that failed; its words name all.
is_worth_a_retry() {
  [ "$status" -eq 75 ] || [ "$status" -eq 255 ] ||
    grep -qsE 'failed with exit status 75\.|return code \[255\]' "$logs"/*.log || ! are_ready
}

# Told to stop, it tells the hosts, and leaves when they have saved.
told='' running=''
stop() {
  told=$1
  [ -n "$running" ] || exit "$told"
  say "ending the run: it saves first"
  on_slices end || true
}
trap 'stop 75' TERM HUP
trap 'stop 130' INT

verb="${*@Q}"
[ -n "$print" ] || slice_state "$name" >/dev/null || exit 2 # gcloud has said what is wrong
[ -n "$print" ] || [ -z "$(git -C "$root" status --porcelain)" ] ||
  say "changes that are not committed are not copied: see git -C $root status"
do_it git -C "$root" archive --format=tar.gz --output="$archive" HEAD
for ((attempt = 1; ; attempt++)); do
  await_slices
  logs=tpu_logs/$name/$start-$attempt
  do_it mkdir -p "$logs"
  status=0
  on_slices set_up || status=$?
  if [ "$status" -eq 0 ]; then
    running=1
    on_slices run_verb || status=$?
    running=''
  fi
  [ -z "$told" ] || exit "$told"
  [ "$status" -ne 0 ] && [ "$attempt" -le "$retries" ] && is_worth_a_retry || exit "$status"
  say "attempt $attempt ended with $status: again in 30 s"
  sleep 30
done
