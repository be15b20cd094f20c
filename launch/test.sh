#!/usr/bin/env bash
# Runs the tests, a file at a time on each core; sets up .venv first. Usage, from any folder:
# bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

cd "$ROOT"
exec "$VENV/bin/python" -m pytest -n auto --dist loadfile "$@"
