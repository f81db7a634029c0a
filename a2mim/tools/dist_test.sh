#!/usr/bin/env bash
# Evaluate a checkpoint on several GPUs: bash tools/dist_test.sh CONFIG GPUS CHECKPOINT [flags of tools/test.py]
# Environment: PORT 29500, NNODES 1, NODE_RANK 0, MASTER_ADDR 127.0.0.1, PYTHON python
set -euo pipefail
source "$(dirname "$0")/launch.sh"
[[ $# -ge 3 ]] || fail "expected CONFIG GPUS CHECKPOINT [flags]"
launch "$2" test.py "$1" "$3" --work_dir "$(dirname "$3")" --launcher pytorch "${@:4}"
