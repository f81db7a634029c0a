# Sourced by the row scripts, scripts/<method>_<model>_<epochs>e.sh [--dry_run] [stage ...]: launches their stages.
# Usage: DATA=<folder with train/ and val/> [OUT=... GPUS=...] bash scripts/<row>.sh [--dry_run] [stage ...]
#   --dry_run        print the commands, run nothing
#   stage ...        the stages to run, in the script's order; default: all but segmentation, detection and video, which
#                    read ADE20K, COCO and DAVIS, the folders of those data sets, in place of DATA
#   OUT              the stages' folders go here; default: runs/<row> of this checkout; nodes share it
#   GPUS             processes on this node; default: the CUDA devices that torch sees, else 1
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT    default: 1 0 127.0.0.1 29500; run the same line on every node
#   EXTRA            further flags of every training stage: EXTRA="--num_workers 16 --compile"
#   EXTRA_<STAGE>    further flags of one stage: EXTRA_PRETRAIN="--batch_size 32"; the last of equal flags wins
# The paper's images per update are kept: --accum_iter makes up for fewer GPUs, and for a smaller --batch_size in EXTRA;
# more GPUs get a smaller --batch_size.
# A stage that was stopped continues where it was, and a complete one returns at once: after a crash, run the same line.

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# value_of VARIABLE FLAG[|ALIAS] words...: set a variable to a flag's last value, as argparse reads it, or to nothing
value_of() {
    local names="|$2|" previous="" value="" word
    for word in "${@:3}"; do
        if [[ $names == *"|$previous|"* ]]; then value=$word; fi
        if [[ $word == *=* && $names == *"|${word%%=*}|"* ]]; then value=${word#*=}; fi
        previous=$word
    done
    printf -v "$1" %s "$value"
}

# show words...: print a command so that it can be pasted into a shell
show() {
    local line="" word
    for word in "$@"; do
        printf -v word %q "$word"
        if [[ $word == --* ]] && ((${#line} > 80)); then
            echo "$line\\"
            line="    "
        fi
        line+="$word "
    done
    echo "${line% }"
}

# is_chosen STAGE: whether the stage is to run
is_chosen() {
    [[ " $chosen " == *" $1 "* ]]
}

# data_variable STAGE: name of the environment variable that holds the folder of a stage's images
data_variable() {
    case $1 in
        segmentation) echo ADE20K ;;
        detection) echo COCO ;;
        video) echo DAVIS ;;
        *) echo DATA ;;
    esac
}

# is_first_node: whether files that a stage of one process makes are made here
is_first_node() {
    [[ $NNODES == 1 || $NODE_RANK == 0 ]]
}

# needs VARIABLE STAGE EXAMPLE: an environment variable with a file that a stage reads; a dry run takes the example
needs() {
    if [[ -z ${!1:-} && -z $dry_run ]] && is_chosen "$2"; then
        fail "$2: set $1, see --help: $1=$3 bash $0"
    fi
    printf -v "$1" %s "${!1:-$3}"
}

# launch STAGE MAIN IMAGES_PER_UPDATE flags...: a training stage; its flags include --batch_size, per process;
# a value 5xaccum, of a flag that counts micro-steps, stands for 5 updates
launch() {
    local stage=$1 main=$2 images=$3 flags=("${@:4}") name=EXTRA_${1^^} processes=$((GPUS * NNODES))
    local batch_size="--batch_size|--batch_per_gpu|--batch_size_per_gpu" accum_iter="--accum_iter|--accum|--update_freq"
    local extra batch own_batch accum step n works=""
    is_chosen "$stage" || return 0

    read -rd '' -a extra <<<"${EXTRA:-} ${!name:-}" || true # read "fails" at the end of the text
    value_of batch "$batch_size" "${flags[@]}" "${extra[@]}"
    [[ $batch =~ ^[1-9][0-9]*$ ]] || fail "$stage: --batch_size $batch: expected a whole number of at least 1"
    value_of accum "$accum_iter" "${extra[@]}"
    if [[ -z $accum ]]; then
        value_of own_batch "$batch_size" "${extra[@]}"
        if [[ -z $own_batch ]] &&
            ((processes * batch > images && images % processes == 0)); then
            batch=$((images / processes))
            flags+=(--batch_size "$batch")
        fi
        step=$((processes * batch))
        for ((n = 1; n * NNODES * batch <= images; n++)); do
            if ((images % (n * NNODES * batch) == 0)); then works+=" $n"; fi
        done
        ((images % step == 0)) ||
            fail "$stage: $images images per update are no multiple of GPUS x NNODES x --batch_size =" \
                "$GPUS x $NNODES x $batch = $step; GPUS that work:${works:- none}"
        accum=$((images / step))
        flags+=(--accum_iter "$accum")
    fi
    [[ $accum =~ ^[1-9][0-9]*$ ]] || fail "$stage: --accum_iter $accum: expected a whole number of at least 1"
    for n in "${!flags[@]}"; do
        if [[ ${flags[n]} =~ ^([0-9]+)xaccum$ ]]; then flags[n]=$((BASH_REMATCH[1] * accum)); fi
    done
    name=$(data_variable "$stage")
    execute "$stage" "$main" "${flags[@]}" --data_path "${!name}" --output_dir "$OUT/$stage" "${extra[@]}"
}

# evaluate STAGE MAIN flags...: a stage that trains nothing and prints its result; EXTRA_<STAGE> is for it, EXTRA is not
evaluate() {
    local name=EXTRA_${1^^} extra
    is_chosen "$1" || return 0
    read -rd '' -a extra <<<"${!name:-}" || true
    name=$(data_variable "$1")
    execute "$@" --data_path "${!name}" "${extra[@]}"
}

# convert STAGE SCRIPT words...: a stage of one process that makes a file of another; the other nodes wait in the next
convert() {
    if ! is_chosen "$1" || ! is_first_node; then return 0; fi
    GPUS=1 NNODES=1 execute "$@"
}

# execute STAGE MAIN flags...: show the command of a stage and, unless this is a dry run, run it
execute() {
    local stage=$1 main=$ROOT/$2 command=(python) flag encoder writer
    if ((GPUS * NNODES > 1)); then
        command+=(-m torch.distributed.launch --nproc_per_node "$GPUS" --nnodes "$NNODES" --node_rank "$NODE_RANK")
        command+=(--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    fi
    command+=("${main#"$PWD/"}" "${@:3}")
    show "${command[@]}"
    [[ -z $dry_run ]] || return 0

    # On the other nodes a file that is still being made is waited for: their processes start with the first node's.
    for flag in --finetune --pretrained --pretrained_weights; do
        value_of encoder "$flag" "$@"
        # A stage that has a checkpoint of its own continues from that.
        if is_first_node && [[ $encoder == "$OUT/"* && ! -f $encoder ]] && ! ls "$OUT/$stage/"*.pth &>/dev/null; then
            writer=${encoder#"$OUT/"}
            writer=${writer%%/*}
            fail "$stage: $encoder does not exist; run the stage $writer first, or set EXTRA_${stage^^}=\"$flag FILE\""
        fi
    done
    "${command[@]}"
}

# A signal for the whole job step (SLURM's before its time limit) is for the run, which saves: the shell waits for it, and
# the launcher passes on SIGUSR1, too.
trap : TERM USR1
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}

# ---- arguments; the stages are those of the script's lines "launch ...", "evaluate ..." and "convert ...", unless it
# ---- has set `stages`; arguments that it took for itself are in `leading`
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
stages=${stages:-$(sed -nE 's/^(launch|evaluate|convert) ([a-z0-9_]+) .*/\2/p' "$0" | xargs)}
chosen="" dry_run=""
for argument in "$@"; do
    if [[ $argument == --dry_run ]]; then
        dry_run=yes
    elif [[ $argument == -h || $argument == --help ]]; then
        awk 'FNR == 1 { on = 1 } !/^#/ { on = 0 } on && !/^#!/ { sub(/^# /, ""); print }' "$0" "${BASH_SOURCE[0]}"
        exit
    elif [[ " $stages " == *" $argument "* ]]; then
        chosen+=" $argument"
    else
        fail "'$argument' is neither --dry_run nor a stage ($stages)"
    fi
done
if [[ -z $chosen ]]; then
    for stage in $stages; do
        if [[ $(data_variable "$stage") == DATA ]]; then chosen+=" $stage"; fi
    done
fi

# ---- environment
if [[ -z ${GPUS:-} ]]; then
    GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
fi
NNODES=${NNODES:-1}
for name in GPUS NNODES; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: expected a whole number of at least 1"
done
if [[ -z $dry_run ]]; then
    for stage in $chosen; do
        name=$(data_variable "$stage")
        if [[ $name == DATA ]]; then
            [[ -n ${DATA:-} ]] || fail "set DATA to the folder with train/ and val/: DATA=/imagenet bash $0"
            [[ -d $DATA/train || ${EXTRA:-} == *--dataset* ]] || fail "DATA=$DATA: has no folder train/"
        else
            [[ -n ${!name:-} ]] || fail "$stage: set $name to the folder of the data set: $name=/${name,,} bash $0 $stage"
            [[ -d ${!name} ]] || fail "$name=${!name}: is no folder"
        fi
    done
    [[ $NNODES == 1 || (-n ${NODE_RANK:-} && -n ${MASTER_ADDR:-}) ]] ||
        fail "NNODES=$NNODES: on every node set NODE_RANK, 0 to $((NNODES - 1)), and MASTER_ADDR, the address of node 0"
    # A mistake in a later stage shall not wait until the earlier ones are done.
    GPUS=$GPUS bash "$0" ${leading[@]+"${leading[@]}"} --dry_run "$@" >/dev/null
fi
DATA=${DATA:-/path/to/imagenet} ADE20K=${ADE20K:-/path/to/ade20k} COCO=${COCO:-/path/to/coco} DAVIS=${DAVIS:-/path/to/davis}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
export ROW_SCRIPT=${row:-$(basename "$0" .sh)} # run.json of every stage keeps it
OUT=${OUT:-$ROOT/runs/$ROW_SCRIPT}
OUT=${OUT#"$PWD/"}
