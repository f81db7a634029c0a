"""The command line of a program: flags that all have, their ranges, and how main() ends."""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from common.distributed.exits import Exit, UserError, stop_signal
from common.distributed.process import rank, world_size

Ranges = dict[str, tuple[float, float]]  # smallest and largest value by flag; NaN fits nowhere


RANGES: Ranges = {  # of flags that several methods have
    **dict.fromkeys(("batch_size", "batch_size_per_gpu", "epochs", "accum_iter", "update_freq"), (1, math.inf)),
    **dict.fromkeys(("input_size", "patch_size", "save_freq", "saveckp_freq", "recount"), (1, math.inf)),
    **dict.fromkeys(("num_workers", "start_epoch", "warmup_epochs"), (0, math.inf)),
    **dict.fromkeys(("lr", "blr", "min_lr", "weight_decay", "weight_decay_end", "mixup", "cutmix"), (0, 1e9)),
    **dict.fromkeys(("drop_path", "drop_path_rate"), (0, 1 - 1e-9)),
    **dict.fromkeys(("momentum", "model_ema_decay", "smoothing", "reprob"), (0, 1)),
    **dict.fromkeys(("mixup_prob", "mixup_switch_prob"), (0, 1)),
    **dict.fromkeys(("clip_grad", "temperature"), (1e-12, math.inf)),
    "layer_decay": (1e-12, 1),
    **dict.fromkeys(("crop_min_size", "crop_max_size"), (1e-6, 1)),
    "nb_classes": (0, 1e7),
    "seed": (0, 2**32 - 1),
}


def check_ranges(args, ranges: Ranges = RANGES) -> None:
    """Raise UserError for a flag outside of its range; flags that are None are not set."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise UserError(f"--{name} {value}: expected {expected}")
    minmax = getattr(args, "cutmix_minmax", None)
    if minmax is not None and not (len(minmax) == 2 and 0 <= minmax[0] < minmax[1] <= 1):
        raise UserError(f"--cutmix_minmax {' '.join(map(str, minmax))}: expected two shares, 0 to 1, increasing")


def run(main: Callable, args) -> None:
    """Check the flags' ranges and call main(args); an `Exit` becomes one line and its exit status.

    Args:
        args: the flags, or what makes them.
    """
    try:
        args = args() if callable(args) else args
        check_ranges(args)
        main(args)
    except Exit as end:
        if rank() > 0:  # an error that all ranks share is told by rank 0, whose end takes the others along
            time.sleep(2)
        if rank() == 0 or not stop_signal():
            where = f"[rank {rank()}] " if world_size() > 1 else ""
            print(f"{where}{Path(sys.argv[0]).name}: {end}", file=sys.stderr, flush=True)
        sys.exit(end.status)
    except RuntimeError as error:
        if world_size() == 1 or "Connection closed by peer" not in str(error):
            raise
        print(f"[rank {rank()}] another process ended; see its message", file=sys.stderr, flush=True)
        sys.exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say on what a script runs."""
    parser.add_argument("--device", default="auto", help="auto: CUDA if present, else cpu")
    parser.add_argument("--local_rank", "--local-rank", default=-1, type=int, help="no effect: the environment decides")
    parser.add_argument("--dist_on_itp", action="store_true", help="no effect: OpenMPI is recognised by itself")
    parser.add_argument("--dist_url", default="env://", help="no effect: the rendezvous is env://")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say on what a training script runs, and how it resumes."""
    add_launch_flags(parser)
    parser.add_argument(
        "--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: fp32 on CPU"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--resume", default="", help="checkpoint to continue; default: that of --output_dir, if any")
    parser.add_argument("--start_epoch", default=0, type=int, help="first epoch when the checkpoint does not tell")
    parser.add_argument("--world_size", default=1, type=int, help="no effect: the launcher's environment decides")
