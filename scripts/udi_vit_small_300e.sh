#!/usr/bin/env bash
# UDI ViT-S/16, 300 epochs. Published: 75.6 k-NN, 77.6 linear; no fine-tuned accuracy.
# The commands of the authors' README.
# Images per update: 1024 = 8 GPUs x 128 in pre-training, 2048 = 8 x 256 in linear probing, 1024 = 4 x 256 in fine-tuning;
# with fewer GPUs --accum_iter makes up for them: the loss's centres then move with every micro-step.
# Usage: DATA=/imagenet [OUT=... GPUS=8 IMAGE=photo.jpg] bash scripts/udi_vit_small_300e.sh [--dry_run] [stage ...]
# Stages: pretrain knn linear extract finetune attention, and when named segmentation (needs ADE20K=), detection
# (COCO=) and video (DAVIS=), of which no figures were published. After a crash run it again, it resumes by itself. All
# variables: --help; IMAGE is the picture whose attention is drawn.
set -euo pipefail
source "$(dirname "$0")/lib/row.sh"
needs IMAGE attention /path/to/photo.jpg

launch pretrain udi/main_pretrain.py 1024 --batch_size 128 --epochs 300 \
    --arch vit_small --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 --warmup_epochs 10 \
    --local_crops_number 10 --norm_last_layer false

evaluate knn udi/main_knn.py --arch vit_small --batch_size_per_gpu 256 \
    --pretrained_weights "$OUT/pretrain/checkpoint.pth"

launch linear udi/main_linprobe.py 2048 --batch_size 256 --epochs 100 --arch vit_small --lr 0.02 \
    --pretrained_weights "$OUT/pretrain/checkpoint.pth"

convert extract udi/eval_finetuning/extract_backbone_weights_for_finetuning.py \
    --checkpoint "$OUT/pretrain/checkpoint.pth" --output "$OUT/extract/backbone.pth" --checkpoint_key teacher

launch finetune udi/main_finetune.py 1024 --batch_size 256 --epochs 200 --warmup_epochs 20 --model vit_small \
    --finetune "$OUT/extract/backbone.pth" --drop_path 0.1 --lr 0.001 --layer_decay 0.55 \
    --mixup 0.8 --cutmix 1.0 --layer_scale_init_value 0.0 \
    --disable_rel_pos_bias --abs_pos_emb --use_cls --imagenet_default_mean_and_std

convert attention udi/visualize_attention.py --arch vit_small --image_path "$IMAGE" \
    --pretrained_weights "$OUT/pretrain/checkpoint.pth" --output_dir "$OUT/attention"

# The authors' configuration semfpn_vit-s16_512x512_40k_ade20k: 4 images per GPU; that there were 4 GPUs is inferred.
launch segmentation udi/main_segmentation.py 16 --batch_size 4 --arch vit_small --iters 40000 --lr 6e-5 \
    --pretrained_weights "$OUT/pretrain/checkpoint.pth"

# The authors' configuration mask_rcnn_vit_small_12_p16_1x_coco: 1 image per GPU; how many there were is not said.
launch detection udi/main_detection.py 8 --batch_size 1 --arch vit_small --epochs 12 --lr 5e-5 \
    --pretrained_weights "$OUT/pretrain/checkpoint.pth"

evaluate video udi/main_video_segmentation.py --arch vit_small --n_last_frames 7 --size_mask_neighborhood 12 --topk 5 \
    --pretrained_weights "$OUT/pretrain/checkpoint.pth" --output_dir "$OUT/video"
