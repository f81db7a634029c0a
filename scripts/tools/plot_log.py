"""Curves of one or several runs from their log.txt: loss, accuracy where there is one, learning rate."""

import argparse
import json
import math
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from matplotlib.figure import Figure

from common import distributed

Run = dict[int, dict[str, float]]  # values by epoch and name
LINES = ("-", "--", ":", "-.")  # one per value of a panel; colours distinguish runs


def get_args_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("Plot logs", allow_abbrev=False)
    p.add_argument("logs", nargs="+", help="log.txt files, or folders that hold one")
    p.add_argument("--out", default="log.png", help="picture to write; its ending chooses the format")
    return p


def read_log(path: str) -> Run:
    """The finite numbers of a log.txt by epoch; torn lines are skipped, and of an epoch's lines the last one counts.

    Raises:
        UserError: the file cannot be read or has no line of a run.
    """
    file = Path(path)
    if file.is_dir():
        named = sorted(file.glob("*.log.txt"))  # SemAIM's are named after model and experiment
        file = named[0] if len(named) == 1 and not (file / "log.txt").exists() else file / "log.txt"
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError as error:
        raise distributed.UserError(f"{file}: cannot be read ({error.strerror})") from error
    run: Run = {}
    for line in lines:
        try:
            values = json.loads(line)
            run[int(values["epoch"])] = {
                k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # torn, or no object with an epoch
    if not run:
        raise distributed.UserError(f"{file}: has no line with an epoch, expected the log.txt of a run")
    return dict(sorted(run.items()))


def run_names(paths: list[str]) -> list[str]:
    """The folders' names; the paths as given if those do not differ."""
    files = [Path(path).resolve() for path in paths]
    names = [(file if file.is_dir() else file.parent).name for file in files]
    return names if len(set(names)) == len(names) else paths


def plot(runs: dict[str, Run]) -> Figure:
    """Panels over the epochs: loss, accuracy if any run has one, learning rate; raises UserError if there is none."""
    known = {name: None for run in runs.values() for values in run.values() for name in values}  # ordered
    panels = {
        "loss": [name for name in known if name.endswith("loss")],
        "accuracy (%)": [name for name in known if "_acc" in name or "_top" in name],
        "learning rate": [name for name in known if name.endswith("_lr")],
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        raise distributed.UserError(f"{', '.join(runs)}: no loss, accuracy or learning rate to draw")
    ratios = [1 if title == "learning rate" else 3 for title in panels]
    fig = Figure(figsize=(7, 0.9 * sum(ratios) + 0.6), layout="constrained", dpi=150)
    axes = fig.subplots(len(panels), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for ax, (title, names) in zip(axes, panels.items(), strict=True):
        for i, (label, run) in enumerate(runs.items()):
            for name, style in zip(names, LINES * len(names), strict=False):
                points = [(epoch, values[name]) for epoch, values in run.items() if name in values]
                if points:
                    ax.plot(
                        *zip(*points, strict=True),
                        color=f"C{i}",
                        linestyle=style,
                        linewidth=0.8 if title == "learning rate" else 1.5,
                        marker="." if len(points) < 30 else "",
                        label=label if len(names) == 1 else f"{label}: {name}",
                    )
        ax.set_ylabel(title)
        ax.grid(alpha=0.3)
        if title != "learning rate":
            ax.legend(fontsize=8)
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return fig


def main(args: argparse.Namespace) -> None:
    runs = dict(zip(run_names(args.logs), map(read_log, args.logs), strict=True))
    figure = plot(runs)
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out)
    except (OSError, ValueError) as error:  # ValueError: an unknown format
        raise distributed.UserError(f"--out {args.out}: cannot be written ({error})") from error
    print(f"wrote {args.out}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
