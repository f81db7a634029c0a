#!/usr/bin/env bash
# Train by a configuration on several GPUs: bash tools/dist_train.sh CONFIG GPUS [flags of tools/train.py]
# Environment: PORT 29500, NNODES 1, NODE_RANK 0, MASTER_ADDR 127.0.0.1, PYTHON python
set -euo pipefail
source "$(dirname "$0")/launch.sh"
[[ $# -ge 2 ]] || fail "expected CONFIG GPUS [flags]"
launch "$2" train.py "$1" --work_dir "$(work_dir "$1")/" --seed 0 --launcher pytorch "${@:3}"
