#!/usr/bin/env bash
# What a GPU does with the five methods, in ten minutes: the tests that need one, speed and memory of the papers' networks,
# bf16 against fp32, the guard against non-finite numbers, resuming, and the Imagenette recipe if DATA is given.
# Usage: [DATA=/imagenette] bash scripts/gpu_check.sh [--minutes 10] [--out DIR]; other flags: --help. It installs nothing.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/tools/gpu_check.py" ${DATA:+--data_path "$DATA"} "$@"
