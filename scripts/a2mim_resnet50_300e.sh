#!/usr/bin/env bash
# A2MIM ResNet-50, 300 epochs. Published: 80.4 fine-tuned by RSB A2, 300 epochs.
# Images per update: 2048 in pre-training, 2048 in fine-tuning; 16 in detection and segmentation.
# With fewer GPUs --accum_iter makes up for them.
# Published for COCO: 39.8 box and 34.9 mask AP, for ADE20K: 38.3 mIoU; the authors do not say which of their
# configurations made them.
# Usage: DATA=/imagenet [OUT=... GPUS=8] bash scripts/a2mim_resnet50_300e.sh [--dry_run] [stage ...]
# Stages: pretrain extract finetune, and when named detection (needs COCO=) and segmentation (needs ADE20K=). After a
# crash run it again, it resumes by itself. All variables: --help.
set -euo pipefail
source "$(dirname "$0")/lib/row.sh"
configs=$ROOT/a2mim/configs/openmixup

launch pretrain a2mim/main_pretrain.py 2048 "$configs/pretrain/a2mim/imagenet/r50_l3_sz224_init_8xb256_cos_ep300.py" \
    --batch_size 256

convert extract a2mim/tools/model_converters/extract_backbone_weights.py \
    "$OUT/pretrain/latest.pth" "$OUT/extract/encoder.pth"

launch finetune a2mim/main_finetune.py 2048 "$configs/finetune/imagenet/r50_rsb_a2_ft_sz224_8xb256_cos_fp16_ep300.py" \
    --batch_size 256 --pretrained "$OUT/extract/encoder.pth" \
    --ema_warmup_iters 12520xaccum

launch detection a2mim/main_detection.py 16 --recipe r50_c4_2x --batch_size 2 --pretrained "$OUT/extract/encoder.pth"

launch segmentation a2mim/main_segmentation.py 16 "$ROOT/a2mim/seg_mmsegmentation/configs/ade20k/fcn_r50_d8_4x4_512x512_160k.py" \
    --batch_size 4 --pretrained "$OUT/extract/encoder.pth"
