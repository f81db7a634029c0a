#!/usr/bin/env bash
# From a fresh clone to a pre-trained, probed and fine-tuned SAIM with figures, in minutes on a CPU.
# Usage: bash scripts/quickstart.sh [--data_path DIR]; run again, it continues where it was interrupted.
set -euo pipefail
source "$(dirname "$0")/lib/environment.sh"
exec "$PYTHON" scripts/tools/quickstart.py "$@"
