#!/usr/bin/env bash
# Train on several GPUs: bash tools/dist_train.sh CONFIG GPUS [flags of tools/train.py]; environment: PORT 29500
set -euo pipefail
[[ $# -ge 2 ]] || { echo "$(basename "$0"): expected CONFIG GPUS [flags]" >&2; exit 2; }
exec python -m torch.distributed.launch --nproc_per_node "$2" --master_port "${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
