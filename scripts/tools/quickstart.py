"""From images to a pre-trained encoder, pictures of what it learnt, and its use, in minutes on a CPU.

Usage: bash scripts/quickstart.sh [--data_path DIR] [--method METHOD], which installs what is needed and runs this. The
images are the user's, with or without labels, or handwritten digits. Every step is a command of the repository, printed
before it runs, that can be run by hand. Results: runs/quickstart-<name of DIR>-<method>.

The settings are those of scripts/tools/recipes/<method>.json, `laptop` on a CPU and `gpu` on a GPU, with epochs, batch
size and patches that suit the number and the size of the images.
"""

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch
from PIL import Image

from common import datasets, distributed
from common.distributed import UserError
from scripts.tools import recipe
from scripts.tools.flags import METHODS, Parser
from scripts.tools.images import classes_of
from scripts.tools.machine import cores
from scripts.tools.runs import accuracy

MOST = 2000  # images that are used
LABELS = 10  # labelled images per class in the task with few labels
# Images that pre-training sees on a CPU, over all epochs: two minutes or so on two cores.
SEEN = {"saim": 20_000, "semaim": 16_000, "cae": 16_000, "a2mim": 24_000, "udi": 5_000}
LONGEST = 300  # epochs, of very few images
# Percent of the 360 validation digits with few labels, and with all.
EXPECTED = {"pre-trained, fine-tuned": ((70, 97), (96, 100))}


@dataclass
class Images:
    """What a run of the quickstart learns from."""

    data: Path  # folder of all images: train/<class>/ and val/<class>/, or any without labels
    few: Path | None  # the same with few labels; None without labels
    number: int  # of training images
    side: int  # median of their shorter sides, pixels
    classes: int  # 0 without labels
    per_class: int = 0  # images in `few`
    are_digits: bool = False


@dataclass
class Step:
    """A command, and the file whose presence says that it is done; '' where the command itself returns at once."""

    argv: list[str]
    makes: Path | None = None


def command(script: str, *words: object) -> list[str]:
    return [sys.executable, script, *map(str, words)]


# ---- running


class Lane(threading.Thread):
    """Runs steps one after the other; with a log file in the background."""

    def __init__(self, steps: list[Step], log: Path | None = None):
        super().__init__(daemon=True)
        self.steps, self.log, self.error = steps, log, ""
        self.process: subprocess.Popen | None = None

    def run(self) -> None:
        # Two lanes side by side with half of the cores each are faster than one after the other.
        env = {"OMP_NUM_THREADS": str(max(1, cores() // 2)), **os.environ}
        for step in self.steps:
            if step.makes is not None and step.makes.exists():
                continue
            shown = shlex.join(["python", *(word.replace(f"{ROOT}/", "") for word in step.argv[1:])])
            beside = f"  # beside the others, output in {self.log.relative_to(ROOT)}" if self.log else ""
            print(f"\n$ {shown}{beside}", flush=True)
            output = open(self.log, "a") if self.log else None  # noqa: SIM115 - the process keeps it
            streams = {"stdout": output, "stderr": output and subprocess.STDOUT}
            self.process = subprocess.Popen(step.argv, cwd=ROOT, env=env, **streams)  # type: ignore[call-overload]
            status = self.process.wait()
            if output is not None:
                output.close()
            if status:
                where = f", see {self.log}" if self.log else ""
                self.error = f"{step.argv[1]} ended with status {status}{where}"
                return


def together(*lanes: Lane) -> None:
    """Run lanes side by side; the first that fails, Ctrl-C or SIGTERM ends the others and this program.

    Raises:
        UserError: a command failed.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the commands would go on alone
    try:
        for lane in lanes:
            lane.start()
        while any(lane.is_alive() for lane in lanes) and not any(lane.error for lane in lanes):
            for lane in lanes:
                lane.join(0.2)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command goes on from here") from None
    finally:
        for lane in lanes:
            lane.steps.clear()
            if lane.process is not None and lane.process.poll() is None:
                lane.process.terminate()
                lane.process.wait()
        signal.signal(signal.SIGTERM, before)
    for lane in lanes:
        if lane.error:
            raise UserError(lane.error)


# ---- images


def median_side(paths: list[str]) -> int:
    """Median of the images' shorter sides, by at most 100 of them."""
    sides = []
    for path in paths[:: max(1, len(paths) // 100)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except OSError:
            continue  # named where it is read
    return round(statistics.median(sides)) if sides else 0


def prepare(source: str, out: Path) -> Images:
    """Make small copies of the user's images, or the digits, in the folders that the other steps read.

    Raises:
        UserError: there are too few images.
    """
    script = "scripts/tools/prepare_data.py"
    if source:
        if not Path(source).is_dir():
            raise UserError(f"--data_path {source}: no such folder")
        split, labelled = bool(classes_of(Path(source), True)), bool(classes_of(Path(source), False))
        small = out / "images"
        together(Lane([Step(command(script, "shrink", small, "--source", source, "--side", 96, "--most", MOST))]))
        data = small
        if labelled and not split and classes_of(small, False):
            data = out / "images-split"
            together(Lane([Step(command(script, "split", data, "--source", small, "--val", 0.2))]))
        few, is_labelled = out / f"images-{LABELS}-labels", bool(classes_of(data, True))
    else:
        data, few, is_labelled = ROOT / "data/digits", ROOT / f"data/digits-{LABELS}-labels", True
        together(Lane([Step(command(script, "digits", data))]))
    train = datasets.image_dataset(str(data), train=True, labelled=is_labelled)
    if len(train) < 2:
        raise UserError(f"--data_path {source}: has {len(train)} image that can be read, expected at least 2")
    side, labels = median_side([path for path, _ in train.samples]), 0
    if is_labelled:
        labels = min(LABELS, *Counter(label for _, label in train.samples).values())
        together(Lane([Step(command(script, "subset", few, "--source", data, "--per_class", labels))]))
    kind = f"{len(train.classes)} classes" if is_labelled else "no labels (expected two or more folders, one per class)"
    print(f"{len(train)} images to train on, shorter side {side} pixels, {kind}")
    return Images(
        data, few if is_labelled else None, len(train), side, len(train.classes) * is_labelled, labels, not source
    )


# ---- settings


def sizes(method: str, stage: str, side: int, settings: recipe.Settings) -> recipe.Settings:
    """Flags for images that are much smaller than the recipe's: 8 x 8 patches of twice the image's side, or so."""
    usual = int(settings.get("input_size", settings.get("global_size", 0)))
    if method == "a2mim" or side >= 0.6 * usual:  # a CNN has no patches
        return {}
    patch = max(1, min(8, round(side / 4)))
    own = {
        "pretrain": {"input_size": 8 * patch, "patch_size": patch},
        "tokenizer": {"input_size": 64},  # a token for 8 x 8 pixels
        "cae pretrain": {"second_input_size": 64, "num_mask_patches": 32},
        "udi pretrain": {"global_size": 8 * patch, "local_size": 4 * patch, "local_sampling_window_size": 2},
    }
    if f"{method} {stage}" == "udi pretrain":
        return {"patch_size": patch, **own["udi pretrain"]}
    return {**own["tokenizer" if stage == "tokenizer" else "pretrain"], **own.get(f"{method} {stage}", {})}


def settings_of(method: str, size: str, stage: str, images: Images, number: int, seen: int) -> recipe.Settings:
    """A stage's flags in the recipe, as they suit the images.

    Args:
        number: of the stage's training images. seen: images that it is to see, over all epochs.
    """
    settings = dict(recipe.load(method, size)[stage])
    usual = int(settings["batch_size"])
    if size == "gpu":  # an image of the largest recipe keeps about 0.2 GB, by 34 bytes per token, channel and block
        usual = min(usual, int(torch.cuda.mem_get_info()[0] / 0.2e9))
    batch = 1 << (max(2, min(usual, number // 6)).bit_length() - 1)  # a power of two; six or more updates per epoch
    epochs = max(2, min(LONGEST, round(seen / number)))
    settings |= {**sizes(method, stage, images.side, settings), "batch_size": batch, "epochs": epochs}
    if "lr" in settings and (method, stage) != ("udi", "pretrain"):  # whose rate is that of 256 images
        settings["lr"] = f"{float(settings['lr']) * min(1, 2 * batch / usual) ** 0.5:.2g}"
    if "warmup_epochs" in settings:
        settings["warmup_epochs"] = max(1, round(epochs / 20))
    if "nb_classes" in settings:
        settings["nb_classes"] = images.classes
    if images.are_digits and method == "saim" and stage in ("supervised", "finetune"):
        settings |= {"crop_min_size": 0.6, "hflip": 0}  # half of a digit, and its mirror image, are other characters
    return {k: v if v is True or isinstance(v, list) else str(v) for k, v in settings.items()}


# ---- steps


class Plan:
    """The steps for one method and one set of images; `size` is `laptop` or `gpu`."""

    def __init__(self, method: str, size: str, images: Images, out: Path):
        self.method, self.size, self.images, self.out = method, size, images, out
        self.recipe = recipe.load(method, size)
        seen = SEEN[method] * (1 if images.classes else 2) * (1 if size == "laptop" else 20)
        self.pretraining = settings_of(method, size, "pretrain", images, images.number, seen)
        self.encoder = out / "pretrain" / self.recipe["weights"]["pretrain"].format(**self.pretraining)

    def train(self, folder: str, stage: str, settings: recipe.Settings, data: Path, *further: object) -> Step:
        files = ["--data_path", data, "--output_dir", self.out / folder]
        main = f"{self.method}/main_{recipe.MAINS.get(stage, stage)}.py"
        return Step(command(main, *recipe.flags(settings, str(self.out)), *further, *files))

    def pretrain(self) -> list[Step]:
        """The pre-training, after that of a tokenizer where the method needs one."""
        data, number, steps = self.images.data, self.images.number, []
        if "tokenizer" in self.recipe:
            settings = settings_of(self.method, self.size, "tokenizer", self.images, number, SEEN[self.method] // 2)
            steps.append(self.train("tokenizer", "tokenizer", settings, data))
        return [*steps, self.train("pretrain", "pretrain", self.pretraining, data)]

    def supervised(self, stage: str, encoder: Path | str) -> list[Step]:
        """Training with few labels, then with all, from an encoder or, '', from random weights."""
        images, steps = self.images, []
        for labels, data, number, seen in (
            ("few", images.few, images.per_class * images.classes, 4_000),
            ("all", images.data, images.number, 12_000),
        ):
            settings = settings_of(self.method, self.size, stage, images, number, seen)
            words = f"--{self.recipe['starts_from'][stage]}", encoder
            steps.append(self.train(f"{stage}_{labels}", stage, settings, Path(str(data)), *words))
        return steps

    def features(self) -> list[Step]:
        """Features of the images, their nearest neighbours and, with labels, a linear classifier of them."""
        images, out = self.images, self.out
        names = {split: out / "features" / f"{split}.npy" for split in ("train", "val")[: 1 + bool(images.classes)]}
        common = ["--data_path", images.data, "--num_workers", 0]
        script, pool = "scripts/tools/extract_features.py", ["--pool", "avg"] if self.method != "udi" else []
        steps = [
            Step(command(script, self.method, self.encoder, *pool, "--split", split, "--out", name, *common), name)
            for split, name in names.items()
        ]
        sheet = out / "pictures" / "neighbours.png"
        steps.append(Step(command("scripts/tools/neighbours.py", names["train"], "--out", sheet), sheet))
        if images.classes:
            words = ["--features", *names.values(), "--few", images.few, "--out", out / "probe.json"]
            steps.append(Step(command("scripts/tools/probe.py", *words), out / "probe.json"))
        return steps

    def pixels(self) -> Step:
        """What classifiers of the raw pixels get."""
        words = ["--pixels", min(16, self.images.side), "--data_path", self.images.data, "--few", self.images.few]
        out = self.out / "pixels.json"
        return Step(command("scripts/tools/probe.py", *words, "--out", out), out)

    def pictures(self) -> list[Step]:
        """What the method's own programs draw of the pre-trained encoder."""
        images = datasets.image_dataset(str(self.images.data), train=not self.images.classes, labelled=False)
        paths = [path for path, _ in images.samples]
        shown, out, settings = paths[:: max(1, len(paths) // 6)][:6], str(self.out / "pictures"), self.pretraining
        program, *words = recipe.picture(self.method, str(self.encoder), shown, out)
        further: list[str] = recipe.flags(settings, str(self.out)) if self.method == "a2mim" else []
        if self.method == "udi":
            further = ["--arch", settings["arch"], "--patch_size", settings["patch_size"]]
        steps = [Step(command(f"{self.method}/{program}.py", *further, *words))]
        if self.method == "saim":
            attention = ["--query", "mean", "--names", "attention", *words]
            steps.append(Step(command("saim/visualize_attention.py", *attention)))
        return steps

    def curves(self, *folders: str) -> Step:
        paths = [self.out / folder for folder in folders]
        return Step(command("scripts/tools/plot_log.py", *paths, "--out", self.out / "pictures" / "curves.png"))


def main(args: argparse.Namespace) -> None:
    begun = time.perf_counter()
    source = Path(args.data_path).resolve().name if args.data_path else ""
    out = ROOT / "runs" / "-".join(filter(None, ("quickstart", source, args.method if args.method != "saim" else "")))
    out.mkdir(parents=True, exist_ok=True)
    images = prepare(args.data_path, out)
    size = "gpu" if torch.cuda.is_available() else "laptop"
    plan = Plan(args.method, size, images, out)
    shown = {
        k: plan.pretraining[k]
        for k in ("epochs", "warmup_epochs", "batch_size", "input_size", "global_size", "patch_size", "lr", "blr")
        if k in plan.pretraining
    }
    print(f"settings of {args.method}.json, {size}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    if images.classes:
        together(
            Lane(plan.pretrain()), Lane([plan.pixels(), *plan.supervised("supervised", "")], out / "supervised.out")
        )
        together(
            Lane(plan.supervised("finetune", plan.encoder)),
            Lane([*plan.features(), *plan.pictures(), plan.curves("pretrain")], out / "pictures.out"),
        )
        report(out, images, not args.data_path and args.method == "saim")
    else:
        together(Lane(plan.pretrain()))
        together(Lane(plan.features()), Lane([*plan.pictures(), plan.curves("pretrain")], out / "pictures.out"))
    print(
        f"Done in {time.perf_counter() - begun:.0f} s: pictures/, features/ and checkpoints in {out.relative_to(ROOT)}"
    )


def report(out: Path, images: Images, digits: bool) -> None:
    """Print the table of accuracies: with few labels, and with all."""
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in ("pixels", "probe")}
    rows = {
        "raw pixels, nearest neighbour": [found["pixels"][k]["nearest"] for k in ("few", "all")],
        "raw pixels, logistic regression": [found["pixels"][k]["logistic"] for k in ("few", "all")],
        "frozen features, logistic regression": [found["probe"][k]["logistic"] for k in ("few", "all")],
        "trained from scratch": [accuracy(out / f"supervised_{k}") for k in ("few", "all")],
        "pre-trained, fine-tuned": [accuracy(out / f"finetune_{k}") for k in ("few", "all")],
    }
    print(f"\npercent correct of the validation images{'':5}{images.per_class} labels per class{'all labels':>14}")
    for row, (few, every) in rows.items():
        print(f"{row:44}{few:19.1f}{every:14.1f}")
    for row, ranges in EXPECTED.items() if digits else ():
        odd = [v for v, (low, high) in zip(rows[row], ranges, strict=True) if not low <= v <= high]
        shown = " and ".join(f"{low} to {high}" for low, high in ranges)
        print(f"to expect of {row}: {shown}" + ("   <- outside: is something wrong?" if odd else ""))


if __name__ == "__main__":
    parser = Parser("quickstart")
    parser.add_argument("--data_path", default="", help="folder of images, with or without classes; default: digits")
    parser.add_argument("--method", default="saim", choices=METHODS, help="how to pre-train; default: saim")
    distributed.run(main, parser.parse_args)
