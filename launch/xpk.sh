#!/usr/bin/env bash
# Runs a verb as a JobSet on a GKE cluster with TPU slices, by XPK (pip install xpk). Usage:
#
#   bash launch/xpk.sh [--print] [--pathways] --cluster CLUSTER --zone ZONE --tpu-type v5p-128 --workload NAME [XPK FLAGS] \
#     -- VERB FLAGS...
#
# XPK builds an image of this checkout on --base-docker-image, by default Python's own, and pushes it to the project's
# registry; --docker-image takes one that is there. A run that was told to stop (exit code 75) is started again, up to
# --max-restarts times. With --num-slices give MeshConfig.replica the same number. MODEL_DIR must be a bucket.
#
# --pathways  one process that sees the devices of all slices (`xpk workload create-pathways`, on a cluster that
#             `xpk cluster create-pathways` made). XPK does not start such a run again: repeat the command with another
#             --workload
set -euo pipefail

print='' pathways=''
flags=()
while [ $# -gt 0 ]; do
  case $1 in
    --print) print=1; shift ;;
    --pathways) pathways=1; shift ;;
    --) shift; break ;;
    *) flags+=("$1"); shift ;;
  esac
done
[ ${#flags[@]} -gt 0 ] && [ $# -ge 1 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
verb=$1
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [ -n "$pathways" ]; then
  command=(xpk workload create-pathways)
  extra=pathways together=''
else
  command=(xpk workload create --max-restarts 10 --restart-on-exit-codes 75 --termination-grace-period-seconds 300)
  extra=tpu together=' --distributed'
fi
image=(--base-docker-image python:3.12 --script-dir "$root")
install="pip install -q -e '.[$extra]' && "
for flag in "${flags[@]}"; do
  [[ $flag != --docker-image* ]] || { image=() install=''; } # it has the package already
done
# XPK runs this in a shell of its own and hands SIGTERM to that alone: with `exec`, python takes its place.
run="${install}exec python -m diffusion_t5x.$verb ${*@Q}$together"
command+=("${image[@]}" "${flags[@]}" --command "$run")
if [ -n "$print" ]; then echo "${command[*]@Q}"; else "${command[@]}"; fi
