#!/usr/bin/env bash
# Runs the main job; sets up .venv first. Usage, from any folder: bash launch/quickstart.sh [--smoke | --full | --help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

exec "$VENV/bin/python" "$ROOT/launch/quickstart.py" "$@"
