# shellcheck shell=bash
# Sourced by the scripts beside it: sets ROOT and VENV, and makes the environment in VENV ready for the checkout in ROOT.
#
# VENV is .venv of the checkout (another folder: DIFFUSION_T5X_VENV). All commands share it, so it always holds the
# `test` extra as well: 100 MB on top of 3.6 GB, and no command takes away what another one installed. The versions are
# those of requirements.lock, each checked against its hash (launch/lock.sh makes that file).
# The interpreter is $PYTHON, else the first of python3, python3.13, python3.12, python3.11 that fits.
# `.ready` inside holds what it was built from; `.unfinished` marks an installation that was cut off. Both name the
# checkout, whose code the environment runs: it is not installed anew for another one.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=${DIFFUSION_T5X_VENV:-$ROOT/.venv}
VENV=${VENV%/}

say() { echo "setup: $*" >&2; }
die() { echo "error: $*" >&2; exit 2; }
has_uv() { uv --version >/dev/null 2>&1; }
version() { "$1" -c 'import sys; print(sys.version)' 2>/dev/null; }
name_of() { "$1" --version 2>/dev/null || echo "not working"; }
fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }
can_make_venv() { has_uv || "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }
as_wanted() { [ -z "${PYTHON:-}" ] || [ "$(version "$PYTHON")" = "$(version "$VENV/bin/python")" ]; }

key() {
  cat "$ROOT/setup.py" "$ROOT/pyproject.toml" "$ROOT/requirements.lock" | cksum
  echo "$ROOT"
  version "$VENV/bin/python"
}

is_ready() { [ -f "$VENV/.ready" ] && [ "$(cat "$VENV/.ready")" = "$(key)" ] && as_wanted; }

refuse_of_another() {
  local owner
  owner=$(sed -n 2p "$VENV/.ready" 2>/dev/null || cat "$VENV/.unfinished" 2>/dev/null || true)
  [ -z "$owner" ] || [ "$owner" = "$ROOT" ] || [ ! -d "$owner" ] || die "$VENV belongs to the checkout $owner," \
    "and would run the code of $ROOT from now on. Name another folder: DIFFUSION_T5X_VENV=$ROOT/.venv-own bash $0 ..." \
    "(or remove $VENV, if nothing uses it)."
}

is_reusable() {
  [ ! -e "$VENV/.unfinished" ] && fits "$VENV/bin/python" && as_wanted &&
    { has_uv || "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }
}

find_python() {
  local candidate incomplete=
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11, 3.12 or 3.13: it is $(name_of "$PYTHON")."
    set -- "$PYTHON"
  else
    set -- python3 python3.13 python3.12 python3.11 "$(uv python find --system '>=3.11,<3.14' 2>/dev/null || true)"
  fi
  for candidate; do
    fits "$candidate" || continue
    if can_make_venv "$candidate"; then
      BASE_PYTHON=$candidate
      return
    fi
    incomplete=$candidate
  done
  [ -z "$incomplete" ] || die "$incomplete has no venv module. Install it (Debian, Ubuntu: apt install python3-venv) or uv."
  die "no Python 3.11, 3.12 or 3.13 found (python3 is $(name_of python3))." \
    "Install one, or name it: PYTHON=/path/to/python bash $0"
}

create() {
  local output
  if [ -e "$VENV" ]; then
    [ "$VENV" = "$ROOT/.venv" ] || [ -f "$VENV/pyvenv.cfg" ] || die "$VENV is not a virtual environment; not replacing it."
    say "replacing $VENV, which is broken, unfinished or made for another Python"
    rm -rf "$VENV"
  fi
  say "creating $VENV with $BASE_PYTHON ($("$BASE_PYTHON" --version))"
  if has_uv; then
    output=$(uv venv --python "$BASE_PYTHON" "$VENV" 2>&1) || die "cannot create $VENV: $output"
  else
    output=$("$BASE_PYTHON" -m venv "$VENV" 2>&1) || die "cannot create $VENV: $output"
  fi
}

# Installs into VENV, with uv if it is there; paths are relative to ROOT.
pip_install() (
  cd "$ROOT" || exit
  if has_uv; then
    uv pip install --python "$VENV/bin/python" "$@"
  else
    PIP_USER=0 "$VENV/bin/python" -m pip install "$@"
  fi
)

install() {
  local log=$VENV/setup.log
  rm -f "$VENV/.ready"
  echo "$ROOT" >"$VENV/.unfinished"
  say "installing diffusion_t5x and what it needs (3.6 GB, some minutes; log: $log)"
  # --no-deps: the lock is complete, and leaves out the nightly builds that t5 asks for.
  {
    pip_install --no-deps --require-hashes -r requirements.lock &&
      pip_install --no-deps --no-build-isolation -e .
  } >"$log" 2>&1 || explain_failure "$log"
  key >"$VENV/.ready"
  rm "$VENV/.unfinished"
  say "done in ${SECONDS} s"
}

explain_failure() {
  local status=$?
  local unreachable='connection (refused|broken|error|timed)|NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError'
  unreachable+='|SSLError|error sending request|failed to fetch|dns error|name resolution|Network is unreachable'
  [ "$status" -ge 128 ] || rm "$VENV/.unfinished" # not cut off by a signal: the next run may go on with what is there
  if grep -qiE "$unreachable" "$1"; then
    die "the package registry cannot be reached. Check the network, the proxy and the index settings of pip and uv. Log: $1"
  fi
  tail -n 5 "$1" >&2
  die "the installation failed. Log: $1"
}

# Of two commands that start together, of this checkout or of two, one installs; the other waits and looks again.
if ! is_ready && command -v flock >/dev/null; then
  mkdir -p "$(dirname "$VENV")"
  exec 9>>"$VENV.lock" # open for writing, as NFS requires
  flock --nonblock 9 || { say "waiting for another command that sets up $VENV" && flock 9; } ||
    say "cannot lock $VENV.lock: do not start another command until this one has set up $VENV"
fi
refuse_of_another

if is_ready; then
  say "$VENV is ready"
else
  if ! is_reusable; then
    find_python
    create
  fi
  install
fi
exec 9>&- # what runs in the environment does not hold the lock
