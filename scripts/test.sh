#!/usr/bin/env bash
# Installs what is needed and runs the test suite: bash scripts/test.sh [pytest arguments].
# Without arguments: formatting, lint, types and the default tests. `-m slow` and `-m gpu` select the others.
set -euo pipefail
packages=(pytest pytest-timeout pytest-xdist ruff pyright setuptools braceexpand pycocotools)
source "$(dirname "$0")/lib/environment.sh"

if [ $# -eq 0 ]; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m pyright --pythonpath "$PYTHON"
fi
exec "$PYTHON" -m pytest -n 2 "$@"
