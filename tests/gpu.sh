#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most nine minutes: tools/gpu_report.py says what, and has options.
#   bash tests/gpu.sh [PART ...]        parts: --list; packages that the machine lacks: --wheels
# PYTHON names the interpreter (default: the clone's .venv, else python3).
cd "$(dirname "$0")/.." || exit
exec "${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}" tools/gpu_report.py "$@"
