#!/usr/bin/env bash
# Evaluate on several GPUs: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [flags of tools/test.py]; environment: PORT 29500
set -euo pipefail
[[ $# -ge 3 ]] || { echo "$(basename "$0"): expected CONFIG CHECKPOINT GPUS [flags]" >&2; exit 2; }
exec python -m torch.distributed.launch --nproc_per_node "$3" --master_port "${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
