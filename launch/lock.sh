#!/usr/bin/env bash
# Writes requirements.lock: every package of the test environment, for Python 3.11 to 3.13, with its hashes. Needs uv.
# Versions in the file stay where setup.py allows them. Usage, from any folder:
# bash launch/lock.sh [--upgrade | --upgrade-package NAME]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv --version >/dev/null 2>&1 || { echo "error: the lock is made by uv. Install it: pip install uv" >&2; exit 2; }
# pyproject.toml leaves out the nightly builds that t5 asks for.
exec uv pip compile setup.py --extra test --universal --python-version 3.11 --generate-hashes --no-annotate --quiet \
  --no-emit-index-url --no-emit-find-links --custom-compile-command "bash launch/lock.sh" --output-file requirements.lock "$@"
