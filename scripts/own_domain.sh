#!/usr/bin/env bash
# From one domain to another, with one, three and five channels: a small SAIM encoder of drawn shapes goes on with grey
# digits, with the same digits in RGB, and with fields in five bands. Each is compared with pre-training on those images
# alone, and with random weights. docs/own_domain.md has the results. Nothing but the packages is downloaded.
# Usage: bash scripts/own_domain.sh [OUT]
set -euo pipefail
source "$(dirname "$0")/lib/environment.sh"
out=${1:-runs/own_domain}

run() {
    echo
    echo "\$ python $*"
    "$PYTHON" "$@"
}

network=(--model saim_nano --input_size 32 --patch_size 8 --query_depth 2 --norm_pix_loss --batch_size 32)
network+=(--warmup_epochs 1 --num_workers 0)

# ---- the first domain
run scripts/tools/prepare_data.py shapes data/shapes-small --images 600 --size 48
run saim/main_pretrain.py "${network[@]}" --data_path data/shapes-small/coco/train2017 --epochs 15 --lr 2e-3 \
    --output_dir "$out/shapes"

# ---- the others: NAME, channels, epochs
run scripts/tools/prepare_data.py digits data/digits
run scripts/tools/prepare_data.py fields data/fields --images 900
run scripts/tools/prepare_data.py stats data/digits --in_chans 1
run scripts/tools/prepare_data.py stats data/fields --in_chans 5
while read -r name chans epochs; do
    channels=()
    if [[ $chans != 3 ]]; then channels=(--in_chans "$chans"); fi
    flags=("${network[@]}" ${channels[@]+"${channels[@]}"} --data_path "data/$name" --epochs "$epochs")
    run saim/main_pretrain.py "${flags[@]}" --lr 2e-3 --output_dir "$out/$name-$chans-alone"
    run saim/main_pretrain.py "${flags[@]}" --lr 2e-3 --initial_checkpoint "$out/shapes/checkpoint.pth" \
        --output_dir "$out/$name-$chans-continued"
    run scripts/tools/compare.py "data/$name" "alone=$out/$name-$chans-alone/checkpoint.pth" \
        "continued=$out/$name-$chans-continued/checkpoint.pth" --scratch --num_workers 0 \
        --output_dir "$out/$name-$chans-compare"
done <<<"digits 1 4
digits 3 4
fields 5 8"
