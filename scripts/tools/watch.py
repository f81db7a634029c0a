"""Is my pre-training on track? Looks at every new checkpoint of a run: its features, its loss, the method's picture.

Usage: python scripts/tools/watch.py RUN --data_path DATA [--once]
RUN is the folder of a pre-training, here or on a shared disk. A line of RUN/watch.jsonl per look has 20-NN accuracy
(of DATA with classes) or neighbour agreement (without), RankMe, variance and loss; measures.py says what they are. The
first line is the network before training. RUN/watch has the pictures and TensorBoard events. Alarms are lines, too:
features that collapse, or a loss outside the reference band of its recipe (docs/curves). The run itself is only read.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch

from common import datasets, distributed
from common.distributed import Stopped, UserError, log
from common.distributed.metrics import finite
from scripts.tools import curves, measures, recipe
from scripts.tools.encoders import load as encoders
from scripts.tools.flags import Parser, arguments, run_quietly, writing
from scripts.tools.images import Part, Pictures, evenly, read_pictures
from scripts.tools.runs import Run, epochs_done, logs_in, read_log, read_starts

LATEST = ("checkpoint.pth", "latest.pth", "*.temp.pth")  # a pre-training's newest checkpoint, as the methods name it
COLLAPSED = {"rankme": 1.2, "variance": 1e-4}  # at most: features on a line, all images alike
SHOWN = 4  # images of the method's picture


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Watch a run", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("run", metavar="RUN", help="folder of a pre-training run")
    p.add_argument("--data_path", required=True, metavar="DATA", help="images to look at, best with classes")
    p.add_argument("--once", action="store_true", help="one look at the newest checkpoint, then end")
    p.add_argument("--poll", default=20, type=float, help="seconds from one look for a new checkpoint to the next")
    p.add_argument("--images", default=1000, type=int, help="images to look at, of training and of validation, at most")
    p.add_argument("--batch_size", default=64, type=int, help="images in one forward pass")
    datasets.add_loader_flags(p)
    distributed.add_launch_flags(p)
    p.set_defaults(device="cpu", num_workers=0)  # the run has the GPU, and needs the cores
    return p


# ---- the run's files


def folder_of(run: str) -> Path:
    """The folder of the pre-training; raises UserError if there is none."""
    folder = Path(run, "pretrain") if Path(run, "pretrain").is_dir() else Path(run)
    if not folder.is_dir():
        raise UserError(f"{run}: no such folder, expected that of a pre-training run")
    return folder


def stamp(path: Path) -> list[int]:
    """What changes when a file is replaced: its time, its number on the disk, its size."""
    about = path.stat()
    return [about.st_mtime_ns, about.st_ino, about.st_size]


def newest(folder: Path) -> tuple[Path, list[int]] | None:
    """The newest of a run's latest checkpoints and its stamp; None before the first."""
    found = []
    for path in (path for pattern in LATEST for path in folder.glob(pattern)):
        with contextlib.suppress(OSError):  # between two files
            found.append((path, stamp(path)))
    return max(found, key=lambda pair: pair[1], default=None)


def read_whole(path: Path) -> tuple[dict[str, Any], list[int]]:
    """A checkpoint's content and stamp, of one file even if it is replaced meanwhile.

    Raises:
        UserError: it is damaged, or never stays the same for as long as reading takes.
    """
    error = UserError(f"{path}: changes faster than it can be read")
    for _ in range(3):
        with contextlib.suppress(OSError):  # between two files
            before = stamp(path)
            try:
                state = distributed.load(str(path))
            except UserError as torn:
                error = torn
            else:
                if stamp(path) == before:
                    return state, before
    raise error


def read_run(folder: Path) -> Run:
    """The epochs in a run's log; none before its first."""
    with contextlib.suppress(UserError):
        return read_log(str(next(iter(logs_in(folder)), folder)))
    return {}


def earlier(file: Path) -> list[dict[str, Any]]:
    """The lines of a watch.jsonl; torn ones are left out."""
    lines = []
    for text in file.read_text("utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


# ---- one look


class Watch:
    """What stays the same from look to look: the images, which are read at the first one, and where things are."""

    pictures: Pictures
    train: np.ndarray  # numbers of images, of known classes; without labels there are none
    val: np.ndarray

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.folder, self.is_open = args, device, folder_of(args.run), False
        if not Path(args.data_path).is_dir():
            raise UserError(f"--data_path {args.data_path}: no such folder")

    def open(self, in_chans: int | None) -> None:
        """Choose the images, of as many channels as the run's."""
        if self.is_open:
            return
        self.pictures = read_pictures(self.args.data_path, in_chans)
        numbers, labels = self.pictures.train, self.pictures.labels
        parts = self.pictures.split(0, 1) if self.pictures.classes else (numbers[:0], numbers)
        self.train, self.val = (
            part[evenly(labels[part].tolist(), self.args.images)] if len(part) else part for part in parts
        )
        self.is_open = True

    def features(self, backbone: encoders.Backbone, rows: np.ndarray, zoom: float = 1.0) -> np.ndarray:
        part = Part(self.pictures.base, rows.tolist())
        return measures.features(backbone, part, self.args, self.device, zoom)

    def measure(self, backbone: encoders.Backbone) -> dict[str, float]:
        """The numbers of one encoder."""
        backbone.to(self.device)
        val = self.features(backbone, self.val)
        if self.pictures.classes:
            labels, known = self.pictures.labels, self.features(backbone, self.train)
            quality = measures.knn_accuracy(known, labels[self.train], val, labels[self.val])
        else:
            quality = measures.agreement(val, self.features(backbone, self.val, measures.ZOOM)).mean()
        name = "knn20" if self.pictures.classes else "agreement"
        return {name: float(quality), "rankme": measures.rankme(val), "variance": measures.variance(val)}

    def look(self, path: Path, first: bool) -> list[dict[str, Any]]:
        """The lines of a checkpoint, before it that of the network before training, if none was written yet.

        Raises:
            UserError: the checkpoint cannot be read or holds no encoder.
        """
        state, found = read_whole(path)
        flags = distributed.flags_of(state)
        self.open(flags.get("in_chans"))
        method = encoders.method_of(str(path), state)
        pool, lines = recipe.load(method, "laptop")["knn"].get("pool", ""), []
        if first:
            torch.manual_seed(flags.get("seed", 0))
            fresh = encoders.load_backbone(method, str(path), pool=pool, state=state, fresh=True)
            lines.append({"epochs": 0, "checkpoint": "", **self.measure(fresh)})
        backbone = encoders.load_backbone(method, str(path), pool=pool, state=state)
        epochs = epochs_done(state) or 0
        line = {"epochs": epochs, "of": flags.get("epochs"), "checkpoint": path.name, "stamp": found}
        line |= self.measure(backbone)
        run = read_run(self.folder)
        losses = [values.get(curves.LOSS) for values in run.values()][:epochs]
        line |= {"loss": losses[-1]} if losses else {}
        band = self.band(flags, state)
        line |= {"band": band.verdict(dict(list(run.items())[:epochs]))} if band else {}
        line["alarms"] = alarms(line)
        line["picture"] = self.picture(method, str(path), flags, epochs)
        return [*lines, line]

    def band(self, flags: dict[str, Any], state: dict[str, Any]) -> curves.Band | None:
        starts = read_starts(self.folder)
        images = (state.get("origin") or {}).get("images")
        return curves.band_of(starts[-1]["flags"] if starts and "flags" in starts[-1] else flags, images)

    def picture(self, method: str, path: str, flags: dict[str, Any], epochs: int) -> str:
        """Draw what the method predicts, or attends to, with its own program; '' where that cannot."""
        chosen = self.val[np.linspace(0, len(self.val) - 1, min(SHOWN, len(self.val))).astype(int)]
        images = [self.pictures.base.samples[row][0] for row in chosen]
        out = self.folder / "watch" / f"epoch-{epochs:04}"
        try:
            draw(method, path, flags, images, out)
        except (UserError, OSError) as error:  # such as a tokenizer that is not on this machine
            log(f"no picture: {error}")
            return ""
        found = sorted(out.rglob("*.png"), key=lambda file: (len(file.parts), -file.stat().st_size))
        return str(found[0].relative_to(self.folder)) if found else ""


def draw(method: str, path: str, flags: dict[str, Any], images: list[str], out: Path) -> None:
    """Call the method's program for pictures."""
    program, *words = recipe.picture(method, path, images, str(out))
    main = importlib.import_module(f"{method}.{program}")
    args = arguments(main, words)
    if method == "a2mim":  # takes the run's own flags
        kept = ("resume", "images", "output_dir", "num_images", "device")
        vars(args).update({k: v for k, v in flags.items() if k in vars(args) and k not in kept})
    if method == "udi":
        size = flags.get("global_size", 224)
        vars(args).update(arch=flags["arch"], patch_size=flags["patch_size"], image_size=[2 * size, 2 * size])
    if hasattr(args, "device"):
        args.device = "cpu"
    run_quietly(main, args)


def alarms(line: dict[str, Any]) -> list[str]:
    """What is wrong, a sentence each."""
    found = [
        f"features collapse: {name} {line[name]:.3g}, at most {floor:g} is collapsed"
        for name, floor in COLLAPSED.items()
        if line[name] <= floor
    ]
    return found + ([line["band"]] if "outside" in line.get("band", "") else [])


# ---- what is written


def write(watch: Watch, lines: list[dict[str, Any]]) -> None:
    """Append lines to watch.jsonl and TensorBoard; raises UserError if the folder cannot be written."""
    from torch.utils.tensorboard.writer import SummaryWriter  # takes a second to import

    with writing(str(watch.folder)):
        with open(watch.folder / "watch.jsonl", "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(finite({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **line})) + "\n")
        writer = SummaryWriter(str(watch.folder / "watch"))
    for line in lines:
        for name in ("knn20", "agreement", "rankme", "variance"):
            if name in line:
                writer.add_scalar(f"watch/{name}", line[name], line["epochs"])
        if line.get("picture"):
            picture = np.asarray(datasets.read_image(watch.folder / line["picture"]))
            writer.add_image("watch/picture", picture, line["epochs"], dataformats="HWC")
    writer.close()


def say(line: dict[str, Any]) -> None:
    names = {"knn20": "20-NN {:.1f} %", "agreement": "neighbour agreement {:.1f} %", "rankme": "RankMe {:.1f}"}
    names |= {"variance": "variance {:.3g}", "loss": "loss {:.4g}"}
    parts = [text.format(line[name]) for name, text in names.items() if line.get(name) is not None]
    log(f"{line['epochs']} epochs: {', '.join(parts)}" if line["epochs"] else f"before training: {', '.join(parts)}")
    if line.get("band") and "inside" in line["band"]:
        log(line["band"])
    for alarm in line.get("alarms", ()):
        log(f"ALARM: {alarm}")


def wait(seconds: float) -> None:
    """Raises Stopped when a signal arrives."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not distributed.stop_signal():
        time.sleep(min(0.2, seconds))
    if distributed.stop_signal():
        raise Stopped(distributed.stop_signal())


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    distributed.check_ranges(args, {"poll": (0.01, 1e6), "images": (2, 1e9)})
    watch = Watch(args, device)
    distributed.catch_signals()
    lines = earlier(watch.folder / "watch.jsonl")
    seen = lines[-1].get("stamp") if lines else None
    while True:
        found = newest(watch.folder)
        if found is None and args.once:
            raise UserError(f"{watch.folder}: has no {' or '.join(LATEST)} yet")
        if found is not None and found[1] != seen:
            seen = found[1]
            try:
                new = watch.look(found[0], first=not lines)
            except UserError as error:
                if args.once:
                    raise
                log(f"{error}; waiting for the next one")
            else:
                write(watch, new)
                lines, seen = [*lines, *new], new[-1]["stamp"]
                for line in new:
                    say(line)
        elif args.once:
            log(f"nothing new, {lines[-1]['epochs']} epochs were looked at")
        if lines and lines[-1]["epochs"] == lines[-1].get("of"):
            log("the run is finished")
            return
        if args.once:
            return
        wait(args.poll)


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(10)  # the run goes first
    distributed.run(main, get_args_parser().parse_args)
