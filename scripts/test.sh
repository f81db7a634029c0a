#!/usr/bin/env bash
# Installs what is needed and runs the test suite: bash scripts/test.sh [pytest arguments].
# Without arguments: formatting, lint, types and the default tests. `-m slow` and `-m gpu` select the others.
# --matrix [3.11:oldest ...] [pytest arguments]: with the oldest and the newest packages and Pythons, see lib/matrix.sh.
set -euo pipefail
if [ "${1:-}" = --matrix ]; then exec bash "$(dirname "$0")/lib/matrix.sh" "${@:2}"; fi
packages=(pytest pytest-timeout pytest-xdist ruff pyright setuptools braceexpand pycocotools)
source "$(dirname "$0")/lib/environment.sh"

if [ $# -eq 0 ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m pyright --pythonpath "$PYTHON"
fi
exec "$PYTHON" -m pytest -n 2 "$@"
