"""Curves of one or several runs from their log.txt: losses, accuracy where there is one, learning rate.

Losses of runs that evaluate a classifier are cross entropies; the methods' own losses have an axis of their own.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
from matplotlib.figure import Figure

from common import distributed
from scripts.tools.curves import Band
from scripts.tools.flags import Parser, writing
from scripts.tools.runs import Run, read_log

SHARES = ("mlm_acc", "class_acc")  # accuracies that logs hold as shares; all others are percents
LINES = ("-", "--", ":", "-.")  # one per value of a panel; colours distinguish runs


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Plot logs")
    p.add_argument("logs", nargs="+", help="log.txt files, or folders that hold one")
    p.add_argument("--out", default="log.png", help="picture to write; its ending chooses the format")
    return p


def run_names(paths: list[str]) -> list[str]:
    """The folders' names; the paths as given if those do not differ."""
    files = [Path(path).resolve() for path in paths]
    names = [(file if file.is_dir() else file.parent).name for file in files]
    return names if len(set(names)) == len(names) else paths


def plot_progress(lines: list[dict[str, float]]) -> Figure:
    """A point for each line of a progress.jsonl: losses, images per second, wait for images, memory."""
    losses = dict.fromkeys(name for line in lines for name in line if name.endswith("loss"))
    rows = {
        "loss": {name: [line.get(name) for line in lines] for name in losses},
        "images/s": {"": [line["images_per_second"] for line in lines]},
        "wait for\nimages (s)": {"": [line["data"] for line in lines]},
        "memory (GB)": {"": [line["memory"] / 1e9 for line in lines]},
    }
    fig = Figure(figsize=(7, 6), layout="constrained", dpi=150)
    axes = fig.subplots(len(rows), sharex=True, height_ratios=[2, 1, 1, 1])
    for ax, (title, curves) in zip(axes, rows.items(), strict=True):
        for name, values in curves.items():
            points = [(line["at"], y) for line, y in zip(lines, values, strict=True) if y is not None]
            if points:
                ax.plot(*zip(*points, strict=True), ".", markersize=3, label=name)
        ax.set_ylabel(title)
        ax.grid(alpha=0.3)
        if title == "loss" and losses:
            ax.legend(fontsize=8)
        elif title != "loss":
            ax.set_ylim(bottom=0)
    axes[-1].set_xlabel("epoch")
    return fig


def panels_of(runs: dict[str, Run]) -> dict[str, dict[str, list[str]]]:
    """Names of the values of each panel, by the runs that it shows."""

    def chosen(fits: Callable[[str], bool], labels: Iterable[str]) -> dict[str, list[str]]:
        names = dict.fromkeys(n for label in labels for values in runs[label].values() for n in values if fits(n))
        return {label: list(names) for label in labels} if names else {}

    classifiers = [
        label for label, run in runs.items() if any("acc1" in n or "_top" in n for v in run.values() for n in v)
    ]
    others = [label for label in runs if label not in classifiers]
    own, entropy = ("loss", "loss") if not (classifiers and others) else ("method's own loss", "cross entropy")
    panels = {own: chosen(lambda name: name.endswith("loss"), others)} if others else {}
    panels |= {entropy: chosen(lambda name: name.endswith("loss"), classifiers)} if classifiers else {}
    panels["accuracy (%)"] = chosen(lambda name: "_acc" in name or "_top" in name, runs)
    panels["learning rate"] = chosen(lambda name: name.endswith("_lr"), runs)
    return {title: names for title, names in panels.items() if names}


def plot(runs: dict[str, Run], band: Band | None = None) -> Figure:
    """Panels over the epochs: losses, accuracy if any run has one, learning rate; raises UserError if there is none.

    Args:
        band: reference losses from the first run's first epoch on.
    """
    panels, colours = panels_of(runs), {label: f"C{i}" for i, label in enumerate(runs)}
    if not panels:
        raise distributed.UserError(f"{', '.join(runs)}: no loss, accuracy or learning rate to draw")
    ratios = [1 if title == "learning rate" else 3 for title in panels]
    fig = Figure(figsize=(7, 0.9 * sum(ratios) + 0.6), layout="constrained", dpi=150)
    axes = fig.subplots(len(panels), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for ax, (title, shown) in zip(axes, panels.items(), strict=True):
        for label, names in shown.items():
            for name, style in zip(names, LINES * len(names), strict=False):
                factor = 100 if name.endswith(SHARES) else 1
                points = [(epoch, factor * values[name]) for epoch, values in runs[label].items() if name in values]
                if points:
                    ax.plot(
                        *zip(*points, strict=True),
                        color=colours[label],
                        linestyle=style,
                        linewidth=0.8 if title == "learning rate" else 1.5,
                        marker="." if len(points) < 30 else "",
                        label=label if len(names) == 1 else f"{label}: {name}",
                    )
        if band is not None and "loss" in title:
            epochs = min(next(iter(runs.values()))) + np.arange(len(band.mean))
            mean, half = np.array(band.mean), band.half_width
            ax.fill_between(epochs, mean - half, mean + half, color="0.85", label=f"reference, {band.row}")
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
    with writing(f"--out {args.out}", ValueError):  # of an unknown format
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
