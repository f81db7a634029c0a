#!/usr/bin/env bash
# CAE ViT-B/16, 800 epochs. Published: 83.8 fine-tuned, 75.9 attentive, 68.9 linear, 49.7 mIoU,
# 49.9 box AP, 43.9 mask AP.
# TOKENIZER: folder with DALL-E's encoder.pkl and decoder.pkl, from https://cdn.openai.com/dall-e/encoder.pkl and so on.
# Images per update: 2048 = 32 GPUs x 64 in pre-training, 16384 = 32 x 512 in linear and 8192 = 32 x 256 in attentive
# probing, 4096 = 32 x 128 in fine-tuning, 16 = 8 x 2 in segmentation, 32 = 16 x 2 in detection; --accum_iter makes up
# for fewer GPUs.
# Usage: DATA=/imagenet TOKENIZER=/dall-e bash scripts/cae_base_800e.sh [--dry_run] [stage ...]
# Stages: pretrain linear attentive finetune, and, only when named, segmentation with ADE20K=/ade20k and detection with
# COCO=/coco.
# After a crash run it again, it resumes by itself. All variables: --help.
set -euo pipefail
source "$(dirname "$0")/lib/row.sh"
needs TOKENIZER pretrain /path/to/dall_e_tokenizer_weight

launch pretrain cae/main_pretrain.py 2048 --batch_size 64 --epochs 800 --warmup_epochs 20 \
    --model cae_base_patch16_224_8k_vocab --discrete_vae_weight_path "$TOKENIZER" \
    --lr 1.5e-3 --clip_grad 3.0 --layer_scale_init_value 0.1 --decoder_layer_scale_init_value 0.1 \
    --imagenet_default_mean_and_std --color_jitter 0 --drop_path 0.1 \
    --mask_generator block --num_mask_patches 98 --save_ckpt_freq 100 \
    --regressor_depth 4 --decoder_depth 4 --align_loss_weight 2

launch linear cae/main_linprobe.py 16384 --batch_size 512 --epochs 90 --warmup_epochs 10 \
    --model cae_base_patch16_224 --finetune "$OUT/pretrain/checkpoint.pth" \
    --blr 0.1 --weight_decay 0.0 --enable_linear_eval --use_cls --disable_rel_pos_bias \
    --dist_eval --save_freq 50 --log_dir "$OUT/linear"

launch attentive cae/main_attentive.py 8192 --batch_size 256 --epochs 90 --warmup_epochs 10 \
    --model cae_base_patch16_224 --finetune "$OUT/pretrain/checkpoint.pth" --nb_classes 1000 \
    --opt sgd --lr 0.4 --momentum 0.9 --weight_decay 0.0 --layer_decay 1 \
    --drop_path 0 --smoothing 0 --mixup 0 --cutmix 0 --reprob 0 --color_jitter 0 --imagenet_default_mean_and_std \
    --enable_linear_eval --linear_type attentive --use_cls --dist_eval

launch finetune cae/main_finetune.py 4096 --batch_size 128 --epochs 100 --warmup_epochs 5 \
    --model cae_base_patch16_224 --finetune "$OUT/pretrain/checkpoint.pth" --nb_classes 1000 \
    --lr 8e-3 --layer_decay 0.65 --drop_path 0.1 --weight_decay 0.05 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --reprob 0.25 --imagenet_default_mean_and_std --dist_eval

launch segmentation cae/main_segmentation.py 16 --batch_size 2 --iters 160000 --warmup_iters 1500 \
    --model upernet_cae_base --finetune "$OUT/pretrain/checkpoint.pth" \
    --lr 2e-4 --layer_decay 0.65 --drop_path 0.1 --layer_scale_init_value 0.1 --weight_decay 0.05 \
    --input_size 512 --auxiliary_weight 0.4 --eval_interval 16000 --save_interval 8000

launch detection cae/main_detection.py 32 --batch_size 2 --epochs 12 --lr_drops 9 11 --warmup_iters 500 \
    --model mask_rcnn_cae_base --finetune "$OUT/pretrain/checkpoint.pth" \
    --lr 3e-4 --layer_decay 0.75 --drop_path 0.2 --layer_scale_init_value 0.1 --weight_decay 0.05
