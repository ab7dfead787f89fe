#!/usr/bin/env bash
# Sets up <clone>/.venv where that is still to be done and runs every test that this machine can run.
#   bash tests/run.sh [pytest options]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/launchers/setup.sh" test
cd "$root"
export PATH="$root/.venv/bin:$PATH" OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
# Two workers; tests/conftest.py keeps the integration tests, which start processes of their own, on one of them.
exec python -m pytest -n 2 --dist loadgroup "$@"
