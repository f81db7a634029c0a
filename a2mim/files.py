"""Names of the files of a run, what its checkpoints hold (both as upstream), and which of them a run continues."""

import argparse
from pathlib import Path
from typing import Any

from common import distributed

STARTS = ("pretrained", "load_checkpoint", "initial_checkpoint")  # flags that name the weights a run begins with


def run_files(args: argparse.Namespace, iters_per_epoch: int) -> distributed.Files:
    """Names and contents: latest.pth, and epoch_<n>.pth every --save_every epochs, of which the newest stays. They hold
    {meta, state_dict, optimizer} as upstream, and what resuming to the step needs."""
    images_per_step = args.batch_size * distributed.world_size()

    def values(position: distributed.Position) -> dict[str, Any]:
        done = position.epoch * iters_per_epoch + position.images // images_per_step
        meta = {"epoch": position.epoch, "iter": done, "seed": args.seed, "exp_name": Path(args.config).name}
        return {"meta": meta}

    return distributed.Files(
        latest="latest.pth",
        numbered="epoch_{done}.pth",
        keep_all=False,
        every=args.save_every,
        phase=1,
        weights="state_dict",
        values=values,
        epoch=1,
    )


def resume_path(args: argparse.Namespace) -> str:
    """The file of --resume; else latest.pth of --work_dir, if there is one; else ''.

    Raises:
        distributed.UserError: the run in --work_dir started from other weights than this one is to.
    """
    path = distributed.find_checkpoint(args.output_dir, args.resume, "latest.pth")
    if not path or args.resume:
        return path
    stored = distributed.flags_of(distributed.load(path, ("latest*.pth", "epoch_*.pth")))
    for flag in STARTS:
        given = getattr(args, flag, "")
        began = stored.get(flag, given)
        if given and Path(began).resolve() != Path(given).resolve():
            raise distributed.UserError(
                f"--{flag} {given}: the run in --work_dir {args.output_dir} began with "
                f"{began or 'random weights'}; name another --work_dir, or continue it by --resume {path}"
            )
    return path
