#!/usr/bin/env bash
# Does pre-training help? One method on Imagenette (ten classes of ImageNet) at 128 pixels, on one GPU in an hour or so:
#   tokenizer                    CAE only: a small one of its own, in place of DALL-E's
#   pretrain                     pre-training without labels
#   linear knn                   linear probe and 20 nearest neighbours of the frozen pre-trained encoder
#   random_linear random_knn     the same of an encoder with random weights
#   supervised                   training with labels from random weights, as many epochs as pre-training
#   finetune                     training with labels from the pre-trained encoder, as many epochs again
# and a table of the results. Each method has one recipe: the authors', with batch size, epochs, learning rate and patch
# size for small images. It is not tuned, and its numbers are not comparable with the papers'.
# Usage: DATA=/imagenette [OUT=...] bash scripts/imagenette.sh saim|semaim|cae|a2mim|udi [--tiny] [--dry_run] [stage ...]
#   DATA: a folder with ten classes in train/ and val/, such as python scripts/tools/prepare_data.py imagenette writes
#   --tiny: a network of four blocks, 48 or 64 pixels and few epochs, for one core of a CPU and a quarter of an hour
# After a crash run it again, it resumes by itself. Other variables are those of the rows' scripts:
set -euo pipefail

method="" tiny="" words=()
for word in "$@"; do
    case $word in
    saim | semaim | cae | a2mim | udi) method+=$word ;;
    --tiny) tiny=--tiny ;;
    *) words+=("$word") ;;
    esac
done
case "$method ${words[*]-}" in
saim\ * | semaim\ * | cae\ * | a2mim\ * | udi\ * | *\ -h* | *\ --help*) ;;
*)
    echo "imagenette.sh: name one method: saim, semaim, cae, a2mim or udi; see --help" >&2
    exit 2
    ;;
esac
leading=($method $tiny) # of the arguments, when row.sh runs this script again
stages="pretrain linear knn random_linear random_knn supervised finetune"
if [[ $method == cae ]]; then stages="tokenizer $stages"; fi
PYTHON=$(source "$(dirname "$0")/lib/environment.sh" >&2 && echo "$PYTHON")
PATH=$(dirname "$PYTHON"):$PATH
set -- ${words[@]+"${words[@]}"}
row=imagenette_$method${tiny:+_tiny}
source "$(dirname "$0")/lib/row.sh"

# ---- recipes: flags of pre-training, of the probe and of training with labels
configs=$ROOT/a2mim/configs/openmixup
checkpoint=checkpoint.pth probed=checkpoint.pth # names of the files with the weights
probe_from=--finetune train_from=--finetune     # flags of the encoder that a stage starts from
scratch=(--layer_decay 1) tuned=(--layer_decay 0.75) tokenizer=()
knn=(--pool avg --nb_knn 20)
case $method$tiny in
saim)
    images=256 epochs=200
    pretrain=(--model saim_small --input_size 128 --patch_size 8 --query_depth 12 --norm_pix_loss
        --gaussian_kernel_size 9 --gaussian_sigma 1 --blr 5e-4 --warmup_epochs 20 --weight_decay 0.05)
    model=(--model vit_small_patch16 --input_size 128 --patch_size 8 --global_pool)
    probe=("${model[@]}" --epochs 50 --blr 0.1 --warmup_epochs 0)
    train=("${model[@]}" --blr 5e-4 --warmup_epochs 10 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25
        --mixup 0.8 --cutmix 1.0)
    ;;
saim--tiny)
    images=32 epochs=5
    pretrain=(--model saim_nano --input_size 48 --patch_size 8 --query_depth 2 --norm_pix_loss --lr 2e-3
        --warmup_epochs 1)
    model=(--model vit_nano_patch16 --input_size 48 --patch_size 8 --global_pool)
    probe=("${model[@]}" --epochs 3 --lr 0.1 --warmup_epochs 0)
    train=("${model[@]}" --lr 1e-3 --warmup_epochs 1 --drop_path 0 --reprob 0 --aa "")
    ;;
semaim)
    images=256 epochs=200 checkpoint=aim_small.exp.temp.pth probed=vit_small_patch16.exp.linear.pth
    pretrain=(--model aim_small --input_size 128 --patch_size 8 --query_depth 12 --norm_pix_loss
        --gaussian_kernel_size 9 --gaussian_sigma 1 --permutation_type attention_center --blr 5e-4
        --warmup_epochs 20 --weight_decay 0.05 --clip_grad 3 --log_dir "")
    model=(--model vit_small_patch16 --input_size 128 --patch_size 8 --global_pool --log_dir "")
    probe=("${model[@]}" --epochs 50 --blr 0.1 --warmup_epochs 0)
    train=("${model[@]}" --blr 5e-4 --warmup_epochs 10 --weight_decay 0.05 --drop_path 0.1 --reprob 0.25
        --mixup 0.8 --cutmix 1.0)
    ;;
semaim--tiny)
    images=32 epochs=5 checkpoint=aim_nano.exp.temp.pth probed=vit_nano_patch16.exp.linear.pth
    pretrain=(--model aim_nano --input_size 48 --patch_size 8 --query_depth 2 --norm_pix_loss
        --permutation_type attention_center --lr 2e-3 --warmup_epochs 1 --clip_grad 3 --log_dir "")
    model=(--model vit_nano_patch16 --input_size 48 --patch_size 8 --global_pool --log_dir "")
    probe=("${model[@]}" --epochs 3 --lr 0.1 --warmup_epochs 0)
    train=("${model[@]}" --lr 1e-3 --warmup_epochs 1 --drop_path 0 --reprob 0 --aa "")
    ;;
cae)
    images=256 epochs=200
    tokenizer=(--epochs 20 --input_size 128 --num_tokens 1024)
    pretrain=(--model cae_small_patch16_224_8k_vocab --input_size 128 --patch_size 8 --second_input_size 128
        --decoder_num_classes 1024 --decoder_embed_dim 384 --decoder_num_heads 6 --num_mask_patches 128
        --imagenet_default_mean_and_std --lr 5e-4 --warmup_epochs 20 --clip_grad 3 --drop_path 0.1)
    model=(--model cae_small_patch16_224 --input_size 128 --patch_size 8)
    probe=("${model[@]}" --epochs 50 --lr 1 --warmup_epochs 5)
    train=("${model[@]}" --imagenet_default_mean_and_std --lr 5e-4 --warmup_epochs 10 --weight_decay 0.05
        --drop_path 0.1 --mixup 0.8 --cutmix 1.0)
    ;;
cae--tiny)
    images=32 epochs=5
    tokenizer=(--epochs 1 --input_size 48 --num_tokens 256 --hidden_dim 32 --codebook_dim 64)
    pretrain=(--model cae_nano --input_size 48 --patch_size 8 --second_input_size 48
        --decoder_num_classes 256 --decoder_embed_dim 96 --decoder_num_heads 3 --regressor_depth 2 --decoder_depth 2
        --num_mask_patches 18 --min_mask_patches_per_block 4 --crop_min_size 0.2
        --imagenet_default_mean_and_std --lr 1.5e-3 --warmup_epochs 1 --clip_grad 3)
    model=(--model cae_nano --input_size 48 --patch_size 8)
    probe=("${model[@]}" --epochs 3 --lr 10 --warmup_epochs 0)
    train=("${model[@]}" --imagenet_default_mean_and_std --lr 1e-3 --warmup_epochs 1 --drop_path 0 --reprob 0 --aa "")
    ;;
a2mim)
    images=256 epochs=200 checkpoint=latest.pth probed=latest.pth
    probe_from=--pretrained train_from=--pretrained scratch=() tuned=()
    pretrain=("$configs/pretrain/a2mim/imagenet/r50_l3_sz224_init_8xb256_cos_ep300.py" --input_size 128
        --mask_patch_size 16 --lr 6e-4)
    probe=("$configs/finetune/imagenet/r50_linear_sz224_4xb64_step_ep100.py" --input_size 128 --val_resize 146
        --val_crop 128 --epochs 50 --steps 30 40)
    train=("$configs/finetune/imagenet/r50_rsb_a3_ft_sz160_4xb512_cos_fp16_ep100.py" --input_size 128
        --val_resize 146 --val_crop 128 --lr 3e-3)
    ;;
a2mim--tiny)
    images=32 epochs=4 checkpoint=latest.pth probed=latest.pth
    probe_from=--pretrained train_from=--pretrained scratch=() tuned=()
    pretrain=(--backbone resnet_nano --input_size 64 --mask_layer 3 --mask_init 1e-6 --mask_patch_size 16 --loss l1
        --fft_weight 0.5 --fft_unmask_weight 1e-3 --crop_scale 0.3 1 --lr 5e-3 --warmup_epochs 1)
    model=(--backbone resnet_nano --input_size 64 --val_resize 73 --val_crop 64)
    probe=("${model[@]}" --epochs 3 --lr 0.1 --sched CosineAnnealing)
    train=("${model[@]}" --aug plain --lr 2e-3 --warmup_epochs 1)
    ;;
udi)
    images=128 epochs=200
    probe_from=--pretrained_weights
    pretrain=(--arch vit_small --global_size 96 --local_size 48 --patch_size 8 --out_dim 8192 --norm_last_layer false
        --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 --warmup_epochs 10)
    model=(--arch vit_small --input_size 128 --patch_size 8)
    probe=("${model[@]}" --lr 0.02 --epochs 50)
    knn=("${model[@]}" --nb_classes 10 --nb_knn 20)
    model=(--model vit_small --input_size 128 --patch_size 8)
    train=("${model[@]}" --disable_rel_pos_bias --abs_pos_emb --use_cls --layer_scale_init_value 0
        --imagenet_default_mean_and_std --lr 5e-4 --warmup_epochs 10 --drop_path 0.1 --mixup 0.8 --cutmix 1.0)
    ;;
udi--tiny)
    images=32 epochs=2
    probe_from=--pretrained_weights
    pretrain=(--arch vit_nano --global_size 48 --local_size 24 --patch_size 8 --local_crops_number 2
        --local_sampling_window_size 3 --out_dim 1024 --lr 4e-3 --warmup_epochs 1 --momentum_teacher 0.99
        --warmup_teacher_temp_epochs 1 --teacher_temp 0.04 --drop_path_rate 0 --freeze_last_layer 0)
    model=(--arch vit_nano --input_size 48 --patch_size 8)
    probe=("${model[@]}" --lr 0.04 --epochs 3)
    knn=("${model[@]}" --nb_classes 10 --nb_knn 20)
    model=(--model vit_nano --input_size 48 --patch_size 8)
    train=("${model[@]}" --disable_rel_pos_bias --abs_pos_emb --use_cls --layer_scale_init_value 0
        --imagenet_default_mean_and_std --lr 1e-3 --warmup_epochs 1 --drop_path 0 --reprob 0 --aa "")
    ;;
esac

# neighbours STAGE SCRIPT flags...: keeps the 20-NN accuracy that the script prints in STAGE/knn.json
neighbours() {
    local folder=$OUT/$1 begun=$SECONDS accuracy
    is_chosen "$1" || return 0
    if [[ -n $dry_run ]]; then
        evaluate "$@"
    elif [[ ! -f $folder/knn.json ]]; then
        mkdir -p "$folder"
        evaluate "$@" | tee "$folder/output"
        accuracy=$(sed -nE 's/.* 20-NN classifier result: Top1: ([0-9.]+).*/\1/p' "$folder/output" | tail -n 1)
        [[ -n $accuracy ]] || fail "$1: the accuracy of 20 neighbours was not told"
        echo "{\"knn20\": $accuracy, \"seconds\": $((SECONDS - begun))}" >"$folder/knn.json"
    fi
}

# ---- stages
encoder=$OUT/pretrain/$checkpoint
tokenizer+=(--batch_size $images)
pretrain+=(--batch_size $images --epochs $epochs)
probe+=(--batch_size $images --nb_classes 10)
train+=(--batch_size $images --epochs $epochs --nb_classes 10)
for name in tokenizer pretrain probe train knn; do
    if [[ -n $tiny ]]; then declare -n flags=$name && flags+=(--num_workers 0); fi # all on one core
done

if [[ $method == cae ]]; then
    pretrain+=(--discrete_vae_type customized --discrete_vae_weight_path "$OUT/tokenizer/checkpoint.pth")
    launch tokenizer cae/main_tokenizer.py $images "${tokenizer[@]}"
fi

launch pretrain $method/main_pretrain.py $images "${pretrain[@]}"

launch linear $method/main_linprobe.py $images "${probe[@]}" $probe_from "$encoder"

launch random_linear $method/main_linprobe.py $images "${probe[@]}" $probe_from ""

if [[ $method == udi ]]; then # whose probe keeps no encoder
    neighbours knn udi/main_knn.py "${knn[@]}" --pretrained_weights "$encoder" --output_dir "$OUT/knn"
    neighbours random_knn udi/main_knn.py "${knn[@]}" --pretrained_weights "" --output_dir "$OUT/random_knn"
else
    neighbours knn scripts/tools/knn.py $method "$encoder" "${knn[@]}"
    neighbours random_knn scripts/tools/knn.py $method "$OUT/random_linear/$probed" "${knn[@]}"
fi

launch supervised $method/main_finetune.py $images "${train[@]}" "${scratch[@]}" $train_from ""

launch finetune $method/main_finetune.py $images "${train[@]}" "${tuned[@]}" $train_from "$encoder"

if [[ -z $dry_run ]]; then echo && python "$ROOT/scripts/tools/imagenette_table.py" "$OUT"; fi
