"""The table with which scripts/imagenette.sh ends.

Usage: python scripts/tools/imagenette_table.py OUT, the folder of its stages. Without OUT:
the table of the recipes for one core in the documents, from scripts/tools/imagenette.json.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import distributed
from common.distributed import UserError
from scripts.tools.flags import Parser
from scripts.tools.report import ROOT, read_stage
from scripts.tools.texts import table

# Stages by row: whose seconds are summed, and where each column's accuracy is found.
ROWS = {
    "random weights": {"k-NN": "random_knn", "linear": "random_linear"},
    "pre-trained": {"pre-training": "pretrain", "tokenizer": "tokenizer", "k-NN": "knn", "linear": "linear"},
    "supervised": {"accuracy": "supervised"},
    "pre-trained, fine-tuned": {"accuracy": "finetune"},
}
COLUMNS = ("k-NN", "linear", "accuracy")


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Imagenette's table")
    p.add_argument("folder", metavar="OUT", nargs="?", default="", help="folder of the stages")
    return p


def read(folder: Path) -> dict[str, dict[str, float]]:
    """Accuracies in percent by row and column, and the rows' seconds; what is not finished is left out.

    Raises:
        UserError: the folder holds no finished stage.
    """
    table: dict[str, dict[str, float]] = {}
    for row, stages in ROWS.items():
        for column, name in stages.items():
            try:
                stage = read_stage(folder / name)
            except UserError:
                continue  # not begun
            if not stage.is_finished:
                continue
            values = table.setdefault(row, {"seconds": 0})
            if accuracies := stage.scores.get("top-1"):
                values[column] = accuracies[-1]
            seconds = sum(start["seconds"] for start in stage.starts)
            if column == "k-NN":
                seconds = json.loads((folder / name / "knn.json").read_text())["seconds"]
            values["seconds"] += seconds
    if not table:
        raise UserError(f"{folder}: holds no finished stage of scripts/imagenette.sh")
    return table


def text(table: dict[str, dict[str, float]]) -> str:
    """The table for the console; a dash is what was not measured."""
    lines = [f"{'':25}{'k-NN':>9}{'linear':>9}{'accuracy':>10}{'seconds':>9}"]
    for row in ROWS:
        values = table.get(row, {})
        cells = [f"{values[column]:.1f}" if column in values else "-" for column in COLUMNS]
        seconds = f"{values['seconds']:.0f}" if values else "-"
        lines.append(f"{row:25}{cells[0]:>9}{cells[1]:>9}{cells[2]:>10}{seconds:>9}")
    return "\n".join([*lines, "percent of the validation images; seconds of the row's stages, the probes included"])


def measured() -> str:
    """README's table, Markdown: what was measured with --tiny; a dash is what was not."""
    results = json.loads((ROOT / "scripts" / "tools" / "imagenette.json").read_text("utf-8"))["results"]
    places = [("random weights", "k-NN"), ("pre-trained", "k-NN"), ("random weights", "linear")]
    places += [("pre-trained", "linear"), ("supervised", "accuracy"), ("pre-trained, fine-tuned", "accuracy")]
    head = ["k-NN, random", "k-NN, pre-trained", "linear, random", "linear, pre-trained"]
    lines = []
    for name, rows in results.items():
        cells = [f"{rows[row][column]:.1f}" if column in rows.get(row, {}) else "–" for row, column in places]
        minutes = sum(values["cpu_seconds"] for values in rows.values()) / 60
        lines.append([name, *cells, f"{minutes:.0f}"])
    return table(["", *head, "supervised", "fine-tuned", "minutes"], lines)


def main(args: argparse.Namespace) -> None:
    print(text(read(Path(args.folder))) if args.folder else measured())


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
