#!/usr/bin/env bash
# Does pre-training help? One method on Imagenette (ten classes of ImageNet) at 128 pixels, on one GPU in an hour or so:
#   tokenizer                    CAE only: a small one of its own, in place of DALL-E's
#   pretrain                     pre-training without labels
#   linear knn                   linear probe and 20 nearest neighbours of the frozen pre-trained encoder
#   random_linear random_knn     the same of an encoder with random weights
#   supervised                   training with labels from random weights, as many epochs as pre-training
#   finetune                     training with labels from the pre-trained encoder, as many epochs again
# and a table of the results. Each method has one recipe, `gpu` in scripts/tools/recipes/<method>.json: the authors', with
# batch size, epochs, learning rate and patch size for small images. It is not tuned, and its numbers are not comparable
# with the papers'.
# Usage: DATA=/imagenette [OUT=...] bash scripts/imagenette.sh saim|semaim|cae|a2mim|udi [--tiny] [--dry_run] [stage ...]
#   DATA: a folder with ten classes in train/ and val/, such as python scripts/tools/prepare_data.py imagenette writes
#   --tiny: the recipe `laptop`: four blocks, 48 or 64 pixels, few epochs; a quarter of an hour on one core of a CPU
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
        [[ -n $accuracy ]] || fail "$1: the output has no accuracy of 20 neighbours"
        echo "{\"knn20\": $accuracy, \"seconds\": $((SECONDS - begun))}" >"$folder/knn.json"
    fi
}

if [[ -n $tiny ]]; then size=laptop; else size=gpu; fi
commands=$(python "$ROOT/scripts/tools/recipe.py" "$method" "$size" "$OUT")
eval "$commands"

if [[ -z $dry_run ]]; then echo && python "$ROOT/scripts/tools/imagenette_table.py" "$OUT"; fi
