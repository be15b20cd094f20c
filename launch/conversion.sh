#!/usr/bin/env bash
# Compares routes from an autoregressive model to block diffusion; sets up .venv first. Usage, from any folder:
# bash launch/conversion.sh quickstart --output DIR   (--help says more)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

exec "$VENV/bin/python" "$ROOT/launch/conversion.py" "$@"
