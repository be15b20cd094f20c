#!/usr/bin/env bash
# Runs a verb on a Slurm cluster, a process for each GPU, as JAX expects it there. Usage, from this checkout, after
# `bash launch/test.sh --help` or the like has made .venv on a file system that all nodes share:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 launch/slurm.sh VERB FLAGS...
#   bash launch/slurm.sh --print VERB FLAGS...
#
# Two minutes before its time is up the run is told to stop; it saves, ends with code 75, and the job is queued again.
#SBATCH --job-name=diffusion_t5x
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

print=''
[ "${1:-}" != --print ] || { print=1; shift; }
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
verb=$1
shift

# In a job the script is a copy elsewhere; SLURM_SUBMIT_DIR is where sbatch was called.
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)}
python=${DIFFUSION_T5X_VENV:-$root/.venv}/bin/python
told=$root/slurm-${SLURM_JOB_ID:-JOB}.told_to_stop
# srun ends all ranks as soon as one leaves with a code other than 0, also with 75, while others may still be saving. So a
# rank that was told to stop leaves with 0, and a file says so. Slurm signals this shell as well as python: it stays.
# shellcheck disable=SC2016 # for the shell of each rank
rank='trap : TERM HUP USR1; "$@"; code=$?; [ $code -eq 75 ] || exit $code; touch "$0"'
command=(srun --kill-on-bad-exit=1 bash -c "$rank" "$told" "$python" -m "diffusion_t5x.$verb" "$@" --distributed)
if [ -n "$print" ]; then
  echo "${command[*]@Q}"
  exit
fi
[ -x "$python" ] || { echo "error: no $python: set up the environment first (bash launch/test.sh --help)." >&2; exit 2; }

# sbatch's --cpus-per-task: since Slurm 22.05 srun takes it from this variable alone.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
rm -f "$told"
status=0
"${command[@]}" || status=$?
if [ -e "$told" ]; then
  rm -f "$told"
  [ "$status" -ne 0 ] || status=75
fi
[ "$status" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
