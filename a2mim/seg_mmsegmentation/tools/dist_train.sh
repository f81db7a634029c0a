#!/usr/bin/env bash
# Train on several GPUs: bash tools/dist_train.sh CONFIG GPUS [flags of tools/train.py]
exec bash "$(dirname "$0")/../../tools/dist_train.sh" "$@"
