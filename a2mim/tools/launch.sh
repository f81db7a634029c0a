# Sourced by the scripts beside it: processes on this machine and folders for their runs.

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# work_dir CONFIG: the configuration's path under work_dirs/ instead of configs/, without its ending
work_dir() {
    local path=${1%.*}
    echo "${path//configs/work_dirs}"
}

# launch GPUS SCRIPT words...: run a script of this folder, one process per GPU
launch() {
    local gpus=$1 script
    script=$(dirname "$0")/$2
    [[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "GPUS $gpus: expected a whole number of at least 1"
    [[ -f $3 ]] || fail "$3: no such configuration"
    set -x
    "${PYTHON:-python}" -m torch.distributed.launch --nproc_per_node "$gpus" --master_port "${PORT:-29500}" \
        --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}" \
        "$script" "${@:3}"
}

# finetune GPUS CONFIG PRETRAIN [flags]: the run's folder is named after that of the checkpoint and its file
finetune() {
    local folder name
    [[ $# -ge 3 ]] || fail "expected CONFIG PRETRAIN [flags]"
    folder=$(basename "$(dirname "$3")")
    name=$(basename "$3")
    [[ $folder == . ]] || name=$folder/$name
    launch "$1" train.py "$2" --pretrained "$3" --work_dir "$(work_dir "$2")/$name" --seed 0 --launcher pytorch "${@:4}"
}
