#!/usr/bin/env bash
# Evaluate on several GPUs: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [flags of tools/test.py]
exec bash "$(dirname "$0")/../../tools/dist_test.sh" "$1" "$3" "$2" "${@:4}"
