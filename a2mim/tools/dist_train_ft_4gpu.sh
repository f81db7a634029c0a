#!/usr/bin/env bash
# Fine-tune an encoder by a configuration on 4 GPUs: bash tools/dist_train_ft_4gpu.sh CONFIG PRETRAIN [flags]
# Environment: PORT 29500, NNODES 1, NODE_RANK 0, MASTER_ADDR 127.0.0.1, PYTHON python
set -euo pipefail
source "$(dirname "$0")/launch.sh"
finetune 4 "$@"
