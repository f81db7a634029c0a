#!/usr/bin/env bash
# SimMIM ConvNeXt-S, 300 epochs. Published: 83.2 fine-tuned by AdamW, the linked configuration (the authors' table says RSB A2), 300 epochs.
# Images per update: 2048 in pre-training, 4096 in fine-tuning; with fewer GPUs --accum_iter makes up for them.
# Usage: DATA=/imagenet [OUT=... GPUS=8] bash scripts/simmim_convnext_small_300e.sh [--dry_run] [stage ...]
# Stages: pretrain extract finetune. After a crash run it again, it resumes by itself. All variables: --help.
set -euo pipefail
source "$(dirname "$0")/lib/row.sh"
configs=$ROOT/a2mim/configs/openmixup

launch pretrain a2mim/main_pretrain.py 2048 "$configs/pretrain/simmim/imagenet/convnext_small_sz224_8xb256_fp16_ep300.py" \
    --batch_size 256

convert extract a2mim/tools/model_converters/extract_backbone_weights.py \
    "$OUT/pretrain/latest.pth" "$OUT/extract/encoder.pth"

launch finetune a2mim/main_finetune.py 4096 "$configs/finetune/imagenet/convnext_s_spark_ft_sz224_8xb256_cos_fp16_ep300.py" \
    --batch_size 256 --pretrained "$OUT/extract/encoder.pth" \
    --ema_warmup_iters 6260xaccum --ema_update_interval 1xaccum
