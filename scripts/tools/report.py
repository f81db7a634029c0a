"""Tables of finished and unfinished runs: published and measured numbers, time, hardware, command, checkpoint, curves.

Usage: python scripts/tools/report.py RUN ... [--out DIR]; a RUN is a folder of a row's script, of one stage, or one
with such folders. Writes DIR/report.md, DIR/report.html (with everything inside) and the curves, DIR/<stage>.png.
"""

import argparse
import base64
import contextlib
import html
import json
import re
import shlex
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import distributed
from common.distributed import UserError
from scripts.tools.curves import Band, band_of
from scripts.tools.flags import Parser, network_of, writing
from scripts.tools.plot_log import plot, plot_progress
from scripts.tools.runs import CHECKPOINTS, LOGS, METRICS, Run, logs_in, read_log, read_progress, read_starts, sha256
from scripts.tools.texts import duration, table

ROOT = Path(__file__).resolve().parents[2]
KNOWN = (*LOGS, "run.json", "knn.json", "knn.log")  # files by which a stage's folder is known
PUBLISHED = {"mask AP": "mask"}  # metrics whose number in rows.json is not under the stage's name
HEAD = ("run", "stage", "method", "model", "metric", "published", "measured", "difference", "loss", "epochs")
HEAD += ("images per update", "hardware", "time", "checkpoint (SHA-256)")
# Names of stages in the folders of rows' scripts; a folder of another name is a run of its own.
STAGES = {"pretrain", "tokenizer", "finetune", "linprobe", "linear", "attentive", "knn", "supervised", "logistic"}
STAGES |= {"random_linear", "random_knn", "semi_supervised", "transfer", "segmentation", "detection", "video"}
LONG = 160  # characters of a command that is folded


@dataclass
class Stage:
    """What a stage's folder says; None and '' where it does not."""

    run: str
    name: str
    folder: Path
    method: str = ""
    model: str = ""
    published: dict[str, float] = field(default_factory=dict)  # of the row, by stage
    trains: bool = True  # k-NN does not
    log: Run = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)  # by metric: percent, of all evaluations
    note: str = ""
    epochs: int | None = None  # that the run is to have
    iters: int | None = None  # the same in updates, where those are counted
    images_per_update: int | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: str = ""  # file and hash
    progress: list[dict[str, float]] = field(default_factory=list)  # by logged step
    band: Band | None = None  # reference losses of its recipe

    @property
    def loss(self) -> float | None:
        """The last loss of training."""
        return next((v["train_loss"] for v in reversed(self.log.values()) if "train_loss" in v), None)

    @property
    def warnings(self) -> list[str]:
        return list(dict.fromkeys(str(w) for start in self.starts for w in start.get("warnings", ())))

    @property
    def verdict(self) -> str:
        """Whether the losses are inside the reference band; '' where there is none."""
        return self.band.verdict(self.log) if self.band else ""

    @property
    def done(self) -> int:
        """Epochs in the log, which A2MIM counts from 1."""
        return max(self.log) + (min(self.log) != 1) if self.log else 0

    @property
    def is_finished(self) -> bool:
        return not self.trains or (self.epochs is not None and self.done >= self.epochs)

    @property
    def length(self) -> str:
        """How far the run is, in epochs, or in updates where those are counted."""
        done, total, unit = self.done, self.epochs, ""
        if self.iters and self.log:
            done, total, unit = round(max(line.get("iter", 0) for line in self.log.values())), self.iters, " updates"
        return f"{done}{unit}" if self.is_finished else f"{done} of {total or '?'}{unit}, unfinished"

    def cells(self) -> list[str]:
        """The columns of `HEAD`."""
        published, measured, differences = [], [], []
        for metric, values in (self.scores or {"": []}).items():
            known = self.published.get(PUBLISHED.get(metric, self.name))
            published.append("" if known is None else f"{known:g}")
            best = f" (best {max(values):.1f})" if values and max(values) - values[-1] >= 0.05 else ""
            measured.append(f"{values[-1]:.1f}{self.note}{best}" if values else "")
            compared = known is not None and values and self.is_finished
            differences.append(f"{values[-1] - known:+.1f}" if compared else "")  # type: ignore[operator]
        seconds = sum(start.get("seconds", 0) for start in self.starts)
        machines = dict.fromkeys(str(start.get("hardware", "")) for start in self.starts)
        return [
            self.run,
            self.name,
            self.method,
            self.model,
            *(" / ".join(cell).strip(" /") for cell in (self.scores, published, measured, differences)),
            "" if self.loss is None else f"{self.loss:.4g}",
            self.length if self.trains else "",
            "" if self.images_per_update is None else f"{self.images_per_update}",
            "; ".join(machine for machine in machines if machine),
            duration(seconds) if self.starts else "",
            self.checkpoint,
        ]


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Report runs")
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder of a row's script, of a stage, or of several")
    p.add_argument("--out", default="report", help="folder to write")
    return p


def published_numbers() -> dict[str, dict[str, float]]:
    """Published numbers by row (the name of its script) and stage, from rows.json, but for unknown ones."""
    tables = json.loads((ROOT / "scripts" / "tools" / "rows.json").read_text("utf-8"))
    rows = [row for table in tables.values() for row in table["rows"]]
    return {
        Path(row["script"]).stem: {k: v for k, v in row["published"].items() if not isinstance(v, str)} for row in rows
    }


def stage_folders(run: Path) -> list[Path]:
    """The folders of stages in a folder, itself included, in the order in which they were begun."""
    found = {path.parent for pattern in KNOWN for path in run.rglob(pattern)}
    return sorted(found, key=lambda folder: (folder.parent, _begun(folder), folder.name))


def _begun(folder: Path) -> str:
    starts = read_starts(folder)
    if starts:
        return str(starts[0].get("started", ""))
    oldest = min(path.stat().st_mtime for pattern in KNOWN for path in folder.glob(pattern))
    return f"{datetime.fromtimestamp(oldest).astimezone():%Y-%m-%dT%H:%M:%S}"


def read_flags(folder: Path, starts: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The flags of a stage, and its checkpoint's name and hash; those of the command if that is unreadable."""
    path = next((path for pattern in CHECKPOINTS for path in sorted(folder.glob(pattern))), None)
    words = shlex.split(str(starts[-1].get("command", ""))) if starts else []
    given = {a[2:]: int(b) for a, b in zip(words, words[1:], strict=False) if a.startswith("--") and b.isdecimal()}
    if path is None:
        return given, ""
    try:
        flags = distributed.load(str(path)).get("args")
    except UserError as error:
        distributed.log(f"WARNING: {error}")
        return given, f"{path.name} is damaged"
    return flags if isinstance(flags, dict) else given, f"{path.name} {sha256(path)[:12]}"


def read_neighbours(folder: Path) -> tuple[float, str]:
    """k-NN accuracy in percent of the best k, and which that is.

    Raises:
        UserError: there is no result.
    """
    try:
        if (folder / "knn.json").exists():
            found = {20: float(json.loads((folder / "knn.json").read_text("utf-8"))["knn20"])}
        else:
            text = (folder / "knn.log").read_text("utf-8", "replace")
            found = {int(k): float(top1) for k, top1 in re.findall(r"(\d+)-NN classifier result: Top1: ([\d.]+)", text)}
        k = max(found, key=lambda k: found[k])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: holds no k-NN result") from error
    return found[k], f" (k = {k})"


def read_stage(folder: Path) -> Stage:
    """What a stage's folder says, but for the published number.

    Raises:
        UserError: its log cannot be read or is not a run's.
    """
    starts = read_starts(folder)
    row = str(starts[-1].get("row", "")) if starts else ""
    if folder.name.startswith("knn-"):  # UDI's, beside the weights
        stage = Stage(folder.resolve().parents[1].name, "knn", folder)
    elif folder.name.startswith("topk-"):  # UDI's masks of videos, named by the settings
        stage = Stage(folder.resolve().parents[1].name, "video", folder, trains=False)
    else:
        stage = Stage(row or folder.resolve().parent.name, folder.resolve().name, folder, starts=starts)
    log = next(iter(logs_in(folder)), None)
    if log is not None:
        stage.log, stage.progress = read_log(str(log)), read_progress(str(log))
    elif not starts:
        stage.trains = False
        accuracy, stage.note = read_neighbours(folder)
        stage.scores["top-1"] = [accuracy]
        return stage
    for name, metric in METRICS.items():
        if values := [line[name] for line in stage.log.values() if name in line]:
            stage.scores[metric] = values
    flags, stage.checkpoint = read_flags(folder, starts)
    main = re.search(r"(\w+)[/.]main_(\w+)", str(starts[-1].get("command", ""))) if starts else None
    stage.method = main[1] if main else ""
    stage.model = network_of(flags)
    if main and not row and stage.name not in STAGES:  # a run of its own, wherever its folder is
        stage.run, stage.name = stage.name, main[2]
    stage.band = band_of(starts[-1].get("flags", {})) if starts else None
    epochs, batch = flags.get("epochs"), flags.get("batch_size", flags.get("batch_size_per_gpu"))
    stage.epochs = epochs if isinstance(epochs, int) else None
    stage.iters = flags.get("iters")
    accum = flags.get("accum_iter", flags.get("update_freq", 1))
    processes = starts[-1].get("processes") if starts else 0
    if isinstance(batch, int) and isinstance(accum, int) and isinstance(processes, int) and processes:
        stage.images_per_update = batch * accum * processes
    return stage


def read_stages(runs: list[str]) -> list[Stage]:
    """All stages of the runs; what cannot be read is named and left out.

    Raises:
        UserError: a path is no folder.
    """
    numbers, stages, seen = published_numbers(), [], set()
    for run in runs:
        if Path(run).is_file():  # beside the runs, as in runs/*
            continue
        if not Path(run).is_dir():
            raise UserError(f"{run}: is no folder, expected one of a run")
        folders = stage_folders(Path(run))
        if not folders:
            print(f"left out: {run}: holds no {', '.join(KNOWN)}", file=sys.stderr)
        for folder in (folder for folder in folders if folder.resolve() not in seen):
            seen.add(folder.resolve())
            try:
                stage = read_stage(folder)
            except UserError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            stages.append(stage)
    # A stage that trains nothing does not keep its row: it is that of the stages beside it.
    rows = {stage.folder.resolve().parent: stage.run for stage in stages if any(s.get("row") for s in stage.starts)}
    for stage in stages:
        stage.run = rows.get(stage.folder.resolve().parent, stage.run)
        stage.published = numbers.get(stage.run, {})
    return stages


def draw(stages: list[Stage], out: Path) -> dict[int, list[str]]:
    """Write the curves of every stage that has a log, by epoch and by step; the pictures by the stage's position."""
    names: dict[int, list[str]] = {}
    for i, stage in enumerate(stages):
        name = re.sub(r"[^\w.-]", "_", f"{i + 1}-{stage.run}-{stage.name}")
        figures = {}
        with contextlib.suppress(UserError):  # a log without a loss
            figures[f"{name}.png"] = plot({stage.name: stage.log}, stage.band) if stage.log else None
        figures[f"{name}-steps.png"] = plot_progress(stage.progress) if stage.progress else None
        for file, figure in figures.items():
            if figure is not None:
                figure.savefig(out / file)
                names.setdefault(i, []).append(file)
    return names


def commands(stage: Stage) -> str:
    """Every different command of a stage, in order."""
    return "\n".join(dict.fromkeys(str(start.get("command", "")) for start in stage.starts))


def title(i: int, stage: Stage) -> str:
    resumed = f", {len(stage.starts)} starts" if len(stage.starts) > 1 else ""
    return f"{i + 1}. {stage.run}: {stage.name}{resumed}"


def markdown(stages: list[Stage], pictures: dict[int, list[str]]) -> str:
    lines = ["# Runs", "", table(HEAD, [stage.cells() for stage in stages])]
    for i, stage in enumerate(stages):
        lines += ["", f"## {title(i, stage)}"]
        lines += [line for warning in stage.warnings for line in ("", f"**Warning: {warning}**")]
        lines += ["", f"{stage.verdict}."] if stage.verdict else []
        if stage.starts:
            shown = ["", "```", commands(stage), "```"]
            folded = ["", "<details><summary>command</summary>", *shown, "", "</details>"]
            lines += folded if len(commands(stage)) > LONG else shown
        lines += [line for name in pictures.get(i, ()) for line in ("", f"![{stage.run} {stage.name}]({name})")]
    return "\n".join(lines) + "\n"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Runs</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #222; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9em; }}
th, td {{ padding: 0.35rem 0.7rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }}
th {{ border-bottom: 2px solid #888; vertical-align: bottom; }}
.unfinished td {{ color: #777; font-style: italic; }}
section {{ margin-top: 2rem; }}
h2 {{ font-size: 1.1em; }}
pre {{ background: #f5f5f5; padding: 0.7rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
img {{ max-width: 100%; width: 44rem; }}
</style>
</head>
<body>
<h1>Runs</h1>
<div class="table">
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
{sections}
</body>
</html>
"""


def page(stages: list[Stage], pictures: dict[int, list[str]], out: Path) -> str:
    rows, sections = [], []
    for i, stage in enumerate(stages):
        kind = "" if stage.is_finished else ' class="unfinished"'
        rows.append(f"<tr{kind}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in stage.cells()) + "</tr>")
        parts = [f"<h2>{html.escape(title(i, stage))}</h2>"]
        parts += [f"<p><strong>Warning: {html.escape(warning)}</strong></p>" for warning in stage.warnings]
        parts += [f"<p>{html.escape(stage.verdict)}.</p>"] if stage.verdict else []
        if stage.starts:
            shown, folded = f"<pre>{html.escape(commands(stage))}</pre>", len(commands(stage)) > LONG
            parts.append(f"<details><summary>command</summary>{shown}</details>" if folded else shown)
        for name in pictures.get(i, ()):
            data = base64.b64encode((out / name).read_bytes()).decode()
            text = html.escape(f"curves of {stage.run}, {stage.name}")
            parts.append(f'<img src="data:image/png;base64,{data}" alt="{text}">')
        if len(parts) > 1:
            sections.append("\n".join(["<section>", *parts, "</section>"]))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEAD)
    return PAGE.format(head=head, rows="\n".join(rows), sections="\n".join(sections))


def main(args: argparse.Namespace) -> None:
    stages = read_stages(args.runs)
    if not stages:
        raise distributed.Exit("nothing to report")
    out = Path(args.out)
    with writing(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
        pictures = draw(stages, out)
        (out / "report.md").write_text(markdown(stages, pictures), "utf-8")
        (out / "report.html").write_text(page(stages, pictures, out), "utf-8")
    unfinished = sum(not stage.is_finished for stage in stages)
    print(f"wrote {out}/report.md and report.html: {len(stages)} stages, {unfinished} of them unfinished")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
