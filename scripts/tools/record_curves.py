"""Record a reference band of losses: pre-train on the digits as the quickstart does, once per seed.

Usage: python scripts/tools/record_curves.py METHOD [--seeds 3] [--out runs/curves]
Writes docs/curves/digits_METHOD.json, which watch.py and report.py compare runs with. Seeds that are done are kept.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

from common import distributed
from common.distributed.metrics import hardware
from scripts.tools import curves, quickstart
from scripts.tools.flags import METHODS, Parser
from scripts.tools.runs import read_log, read_starts


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Record reference losses")
    p.add_argument("method", metavar="METHOD", choices=METHODS, help=", ".join(METHODS))
    p.add_argument("--seeds", default=3, type=int, help="runs, with seeds from 0")
    p.add_argument("--out", default=str(quickstart.ROOT / "runs" / "curves"), help="folder of the runs")
    return p


def steps(method: str, images: quickstart.Images, out: Path, seed: int) -> list[quickstart.Step]:
    """The quickstart's commands of pre-training, with a seed."""
    plan = quickstart.Plan(method, "laptop", images, out)
    return [quickstart.Step([*step.argv, "--seed", f"{seed}"]) for step in plan.pretrain()]


def band(row: str, folders: list[Path], seeds: list[int]) -> dict:
    """The band of finished runs of one recipe; raises UserError if one has no log."""
    logs = [[values[curves.LOSS] for values in read_log(str(folder)).values()] for folder in folders]
    start = read_starts(folders[0])[-1]
    return {
        "row": row,
        "command": f"python scripts/tools/record_curves.py {row.removeprefix('digits_')}",
        "machine": f"{hardware()}, torch {torch.__version__}, float32",
        "date": time.strftime("%Y-%m-%d"),
        "images": int(distributed.load(str(next(folders[0].glob("*.pth"))))["origin"]["images"]),
        "seeds": seeds,
        "mean": [round(statistics.fmean(losses), 6) for losses in zip(*logs, strict=True)],
        "std": [round(statistics.stdev(losses), 6) for losses in zip(*logs, strict=True)],
        "flags": curves.learnt(start["flags"]),
    }


def main(args: argparse.Namespace) -> None:
    distributed.check_ranges(args, {"seeds": (2, 100)})
    row, out = f"digits_{args.method}", Path(args.out).resolve()
    images = quickstart.prepare("", out)
    folders = [out / f"{row}-{seed}" for seed in range(args.seeds)]
    for seed, folder in enumerate(folders):
        quickstart.together(quickstart.Lane(steps(args.method, images, folder, seed)))
    record = band(row, [folder / "pretrain" for folder in folders], list(range(args.seeds)))
    path = curves.FOLDER / f"{row}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(f"wrote {path}: {len(record['mean'])} epochs of {args.seeds} seeds")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
