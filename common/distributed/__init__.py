"""Running on one or many processes. Stairs, each file uses only those before it:

exits (one-line errors, stop signals), process (the group and its ranks), sync_bn (batch norm over all processes),
step (precision, the guarded update), scalars (TensorBoard, Weights & Biases), metrics (meters, progress, logs),
weights (reading files), initial (weights to start from), checkpoint (exact resume), command (flags, run).
"""

from common.distributed.checkpoint import HELD, Checkpoint, Files, find_checkpoint, hold_flags
from common.distributed.command import (
    NOT_IN_FILES,
    add_flags,
    add_launch_flags,
    check_default_file,
    check_ranges,
    flag_groups,
    is_given,
    new_parser,
    preset,
    run,
)
from common.distributed.exits import (
    SIGNALS,
    Exit,
    NonFinite,
    Stopped,
    UserError,
    catch_signals,
    stop_signal,
    user_errors,
)
from common.distributed.initial import fitted_vit, initial_weights, take_weights
from common.distributed.metrics import EpochLog, Position, RunLog
from common.distributed.process import (
    agree,
    all_sum,
    gather,
    gather_to_main,
    init,
    is_main,
    log,
    main_does,
    on_main_first,
    rank,
    recompute_blocks,
    seed_step,
    sync_buffers,
    unwrap,
    world_size,
    wrap,
)
from common.distributed.step import Updater, amp_dtype, bf16_advice, constant
from common.distributed.weights import (
    FOREIGN_KEYS,
    WEIGHT_KEYS,
    adapt_channels,
    fitted,
    flags_of,
    kind_of,
    load,
    load_report,
    load_weights,
    local_file,
    part_of,
    prefix_of,
    weights_of,
)
