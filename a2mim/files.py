"""Names of a run's files and what its checkpoints hold, as upstream's."""

import argparse
from pathlib import Path
from typing import Any

from common import distributed


def run_files(args: argparse.Namespace, iters_per_epoch: int) -> distributed.Files:
    """latest.pth, and epoch_<n>.pth every --save_every epochs, of which the last one is kept: {meta, state_dict,
    optimizer} as upstream, and what resuming to the step needs."""
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
