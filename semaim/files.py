"""Names of a run's files, as the authors chose them."""

import argparse
from pathlib import Path

from common import distributed


def run_files(args: argparse.Namespace, ending: str = "temp", every: int = 0) -> distributed.Files:
    """<model>.<experiment>.<ending>.pth holds the weights under `state_dict`.

    Every `every` epochs, and of the last one, <model>.<experiment>.0020.pth is kept: after 20 epochs (0: none is kept).
    Raises:
        distributed.UserError: the experiment's name is no part of a file name.
    """
    if "/" in args.experiment:
        raise distributed.UserError(f"--experiment {args.experiment}: expected a part of file names, without /")
    name = f"{args.model}.{args.experiment}"
    return distributed.Files(
        latest=f"{name}.{ending}.pth",
        numbered=name.replace("{", "{{").replace("}", "}}") + ".{done:04d}.pth",
        every=every,
        phase=1,
        weights="state_dict",
        values={"model": args.model},
        epoch=1,
        log=f"{name}.log.txt",
        events=str(Path(args.log_dir) / name) if args.log_dir else "",
    )
