"""Running on one or many processes: the group and its ranks, checkpoints, meters and logs."""

from common.distributed.checkpoint import Checkpoint, Position, find_checkpoint, load, load_report, load_weights
from common.distributed.metrics import EpochLog, RunLog
from common.distributed.process import (
    Exit,
    NonFinite,
    Stopped,
    Updater,
    UserError,
    add_flags,
    agree,
    all_sum,
    amp_dtype,
    barrier,
    catch_signals,
    gather,
    init,
    is_main,
    log,
    main_does,
    on_main_first,
    rank,
    run,
    seed_step,
    stop_signal,
    sync_buffers,
    unwrap,
    user_errors,
    world_size,
    wrap,
)
