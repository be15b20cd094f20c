#!/usr/bin/env bash
# Runs the tests, a file at a time on each of up to four cores (a worker takes up to 6.5 GB); sets up .venv first. Usage, from any folder:
# bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

cd "$ROOT"
exec "$VENV/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
