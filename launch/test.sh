#!/usr/bin/env bash
# Runs the tests, a file at a time on each of up to four cores (a worker takes up to 6.5 GB); sets up .venv first. Usage, from any folder:
# bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

# What takes longer than 0.1 s to compile is kept beside the environment for two weeks: the next run loads it.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$VENV/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS-0.1}
[ ! -d "$VENV/compiled" ] || find "$VENV/compiled" -type f -mtime +14 -delete

cd "$ROOT"
exec "$VENV/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
