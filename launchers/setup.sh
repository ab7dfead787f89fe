#!/usr/bin/env bash
# Makes <clone>/.venv with the versions of launchers/constraints.txt and every optional feature that needs no further
# download; returns at once when that is done.
#   bash launchers/setup.sh [test]          "test" adds what tests/run.sh needs
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$root/.venv
flavor=${1:-base}
# A changed pin, another Python and a moved clone need a new installation.
key="$(cat "$root/setup.py" "$root/launchers/constraints.txt" "$root/launchers/setup.sh" | cksum) $root"

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 2; }
is_done() { [ "$(cat "$venv/.setup-$1" 2>/dev/null)" = "$key" ] && "$venv/bin/python" -c "" 2>/dev/null; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if is_new_enough "$candidate"; then echo "$candidate"; return; fi
    done
    fail "Python 3.11 or newer is needed; python3 here is $(python3 --version 2>&1 || true). Debian, Ubuntu: apt-get install -y python3.12"
}

make_venv() {
    local python
    python=$(find_python)
    say "virtual environment in $venv ($("$python" --version))"
    # Debian ships venv without ensurepip: there, the system's pip installs another one into the environment.
    "$python" -m venv --clear "$venv" >/dev/null 2>&1 && return
    "$python" -m venv --clear --without-pip "$venv" >/dev/null 2>&1 &&
        "$python" -m pip --python "$venv/bin/python" install -q pip && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get install -y -q python3-venv || { apt-get update -q && apt-get install -y -q python3-venv; }; } >/dev/null 2>&1 &&
            "$python" -m venv --clear "$venv" && return
    fi
    fail "$python cannot make a virtual environment. Debian, Ubuntu: apt-get install -y python3-venv"
}

install() {
    local extras="[all]"
    [ "$flavor" = base ] || extras="[all,$flavor]"
    local pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input -c "$root/launchers/constraints.txt")
    [ -t 1 ] || pip+=(-q)
    export PIP_USER=0
    unset PYTHONHOME PYTHONPATH
    say "torch (the largest part, some minutes where it has to be downloaded)"
    "${pip[@]}" torch setuptools
    say "everything else$([ "$flavor" = base ] || echo ", and what the tests need")"
    # Without isolation DeepSpeed's own setup sees the torch that it is going to run with.
    (cd "$root" && "${pip[@]}" --no-build-isolation -e ".$extras")
    # DeepSpeed's command names its interpreter in a way that a path with spaces breaks.
    case $venv in *" "*) printf '#!/bin/sh\nexec "%s/bin/python" -m deepspeed.launcher.runner "$@"\n' "$venv" >"$venv/bin/deepspeed" ;; esac
}

case $flavor in base | test) ;; *) fail "unknown argument '$flavor'; allowed: test" ;; esac
if is_done "$flavor" || is_done test; then exit 0; fi
if command -v flock >/dev/null; then
    exec 9>"$root/.setup-lock"
    flock -n 9 || { say "waiting for another setup of this clone"; flock 9; }
    if is_done "$flavor" || is_done test; then exit 0; fi
fi
start=$SECONDS
{ is_new_enough "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; } || make_venv
install
echo "$key" >"$venv/.setup-$flavor"
say "done in $((SECONDS - start)) s"
