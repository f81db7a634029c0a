#!/usr/bin/env bash
# SAIM ViT-B/16, 800 epochs: the three commands of the authors' README. Published: 83.9 fine-tuned, 62.5 linear.
# Images per update: 2048, 1024 and 2048 = 32 GPUs x 64, 32 and 64; with fewer GPUs --accum_iter makes up for them.
# weight_decay: the authors' README 0.5, their code's default 0.05; see README "Differences".
# Usage: DATA=/imagenet [OUT=... GPUS=8] bash scripts/saim_vit_base_800e.sh [--dry_run] [stage ...]
# Stages: pretrain finetune linprobe. After a crash run it again, it resumes by itself. All variables: --help.
set -euo pipefail
source "$(dirname "$0")/lib/row.sh"

launch pretrain saim/main_pretrain.py 2048 --batch_size 64 --epochs 800 \
    --model saim_base --query_depth 12 --prediction_head_type MLP \
    --gaussian_kernel_size 9 --gaussian_sigma 1 --norm_pix_loss \
    --blr 2e-4 --warmup_epochs 30 --weight_decay 0.5

launch finetune saim/main_finetune.py 1024 --batch_size 32 --epochs 100 \
    --model vit_base_patch16 --cls_token --finetune "$OUT/pretrain/checkpoint.pth" \
    --blr 5e-4 --layer_decay 0.65 --warmup_epochs 20 --weight_decay 0.05 \
    --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval

launch linprobe saim/main_linprobe.py 2048 --batch_size 64 --epochs 90 \
    --model vit_base_patch16 --cls_token --finetune "$OUT/pretrain/checkpoint.pth" \
    --blr 0.1 --warmup_epochs 0 --weight_decay 0.0 --dist_eval
