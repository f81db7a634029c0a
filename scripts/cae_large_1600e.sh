#!/usr/bin/env bash
# CAE ViT-L/16, 1600 epochs. Published: 86.2 fine-tuned, 81.2 attentive, 77.8 linear, 54.9 mIoU,
# 54.5 box AP, 47.5 mask AP.
# The authors' script loses its last line to a missing backslash: as published it ran with the decoder's defaults, width
# 768, 12 heads and no --fix_init_weight. Here the lost flags are in force; to run as published:
#   EXTRA_PRETRAIN="--decoder_embed_dim 768 --decoder_num_heads 12", and delete --fix_init_weight below.
# TOKENIZER: folder with DALL-E's encoder.pkl and decoder.pkl, from https://cdn.openai.com/dall-e/encoder.pkl and so on.
# Images per update: 2048 = 32 GPUs x 64 in pre-training, 16384 = 32 x 512 in linear and 8192 = 32 x 256 in attentive
# probing, 4096 = 32 x 64 x 2 in fine-tuning, 16 = 8 x 2 in segmentation, 32 = 16 x 2 in detection; --accum_iter
# makes up for fewer GPUs.
# Usage: DATA=/imagenet TOKENIZER=/dall-e bash scripts/cae_large_1600e.sh [--dry_run] [stage ...]
# Stages: pretrain linear attentive finetune, and, only when named, segmentation with ADE20K=/ade20k and detection with
# COCO=/coco.
# After a crash run it again, it resumes by itself. All variables: --help.
set -euo pipefail
source "$(dirname "$0")/lib/row.sh"
needs TOKENIZER pretrain /path/to/dall_e_tokenizer_weight

launch pretrain cae/main_pretrain.py 2048 --batch_size 64 --epochs 1600 --warmup_epochs 40 \
    --model cae_large_patch16_224_8k_vocab --discrete_vae_weight_path "$TOKENIZER" \
    --lr 1.5e-3 --clip_grad 3.0 --layer_scale_init_value 1e-5 --decoder_layer_scale_init_value 1e-5 \
    --imagenet_default_mean_and_std --color_jitter 0 --drop_path 0.1 \
    --mask_generator block --num_mask_patches 98 --save_ckpt_freq 100 \
    --regressor_depth 4 --decoder_depth 4 --align_loss_weight 2 \
    --decoder_embed_dim 1024 --decoder_num_heads 16 --fix_init_weight

launch linear cae/main_linprobe.py 16384 --batch_size 512 --epochs 90 --warmup_epochs 10 \
    --model cae_large_patch16_224 --finetune "$OUT/pretrain/checkpoint.pth" --layer_scale_init_value 1e-5 \
    --blr 0.1 --weight_decay 0.0 --enable_linear_eval --use_cls --disable_rel_pos_bias \
    --dist_eval --save_freq 90 --log_dir "$OUT/linear"

launch attentive cae/main_attentive.py 8192 --batch_size 256 --epochs 90 --warmup_epochs 10 \
    --model cae_large_patch16_224 --finetune "$OUT/pretrain/checkpoint.pth" --layer_scale_init_value 1e-5 \
    --nb_classes 1000 --opt sgd --lr 0.4 --momentum 0.9 --weight_decay 0.0 --layer_decay 1 \
    --drop_path 0 --smoothing 0 --mixup 0 --cutmix 0 --reprob 0 --color_jitter 0 --imagenet_default_mean_and_std \
    --enable_linear_eval --linear_type attentive --use_cls --dist_eval

launch finetune cae/main_finetune.py 4096 --batch_size 64 --epochs 50 --warmup_epochs 5 \
    --model cae_large_patch16_224 --finetune "$OUT/pretrain/checkpoint.pth" --layer_scale_init_value 1e-5 \
    --nb_classes 1000 --lr 2e-3 --layer_decay 0.75 --drop_path 0.2 --weight_decay 0.05 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --reprob 0.25 --imagenet_default_mean_and_std --dist_eval

launch segmentation cae/main_segmentation.py 16 --batch_size 2 --iters 160000 --warmup_iters 1500 \
    --model upernet_cae_large --finetune "$OUT/pretrain/checkpoint.pth" \
    --lr 4e-5 --layer_decay 0.95 --drop_path 0.15 --layer_scale_init_value 1e-5 --weight_decay 0.05 \
    --input_size 512 --auxiliary_weight 0.4 --eval_interval 16000 --save_interval 32000

launch detection cae/main_detection.py 32 --batch_size 2 --epochs 12 --lr_drops 9 11 --warmup_iters 500 \
    --model mask_rcnn_cae_large --finetune "$OUT/pretrain/checkpoint.pth" \
    --lr 2e-4 --layer_decay 0.85 --drop_path 0.2 --layer_scale_init_value 1e-5 --weight_decay 0.05
