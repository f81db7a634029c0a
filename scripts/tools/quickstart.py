"""Pre-trains, probes and fine-tunes a small SAIM on handwritten digits, or on the user's images, with figures.

Usage: bash scripts/quickstart.sh [--data_path DIR], which installs what is needed and runs this. Every step is a
command of the repository, printed before it runs. Results: runs/quickstart (or runs/quickstart-<name of DIR>).
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common import datasets, distributed

LABELS = 10  # labelled images per class for the probes
IMAGES = 1440  # training images of a folder of the user's that are used, at most
# Last-epoch accuracy on the 360 validation digits, percent. Seen on two CPU cores: 34, 60 to 62 and 81.
EXPECTED = {"random features": (20, 45), "pre-trained features": (50, 75), "fine-tuned": (70, 95)}


def command(script: str, *flags: object) -> list[str]:
    return [sys.executable, script, *map(str, flags)]


def start(argv: list[str], log: Path | None = None) -> subprocess.Popen:
    """Print a command and start it; with `log`, in the background."""
    shown = shlex.join(["python", *argv[1:]])
    print(f"\n$ {shown}" + (f"  # beside the next one, output in {log}" if log else ""), flush=True)
    output = open(log, "a") if log else None  # noqa: SIM115 - the process keeps it
    # The runs go side by side: one thread each is faster than two that share the cores.
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    env = {"OMP_NUM_THREADS": threads, **os.environ}
    return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=output, stderr=output and subprocess.STDOUT)


def together(*steps: tuple[list[str], Path | None]) -> None:
    """Run commands side by side; the first that fails ends the others and this program."""
    processes = [start(*step) for step in steps]
    try:
        for (argv, log), process in zip(steps, processes, strict=True):
            if process.wait() != 0:
                hint = f", see {log}" if log else ""
                raise distributed.UserError(f"{argv[1]} ended with status {process.returncode}{hint}")
    finally:
        for process in processes:
            process.terminate()


def accuracy(folder: Path) -> float:
    """Last epoch's top-1 accuracy, percent."""
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])["test_acc1"]


def prepare(source: str, out: Path) -> tuple[Path, Path, list[str], int]:
    """Make the image folders; returns those of all and of few labels, the size flags, the number of classes."""
    script = "scripts/tools/prepare_data.py"
    if source:
        images = datasets.image_dataset(source, train=True)
        smallest = min(Counter(target for _, target in images.samples).values())
        per_class = max(2, min(smallest, IMAGES // len(images.classes)))
        data, few = out / "images", out / f"images-{LABELS}-labels"
        size = ["--input_size", "64", "--patch_size", "16"]
        together((command(script, "subset", data, "--source", source, "--per_class", per_class), None))
        labels = min(LABELS, per_class)
    else:
        data, few, labels = ROOT / "data/digits", ROOT / f"data/digits-{LABELS}-labels", LABELS
        size = ["--input_size", "16", "--patch_size", "4"]
        together((command(script, "digits", data), None))
    together((command(script, "subset", few, "--source", data, "--per_class", labels), None))
    return data, few, size, len(datasets.image_dataset(str(data), train=True).classes)


def main(args: argparse.Namespace) -> None:
    begun = time.perf_counter()
    name = f"quickstart-{Path(args.data_path).resolve().name}" if args.data_path else "quickstart"
    out = ROOT / "runs" / name
    out.mkdir(parents=True, exist_ok=True)
    data, few, size, classes = prepare(args.data_path, out)
    images = len(datasets.image_dataset(str(data), train=True))
    epochs = max(1, round(17_000 / images))  # equally long whatever the data
    batch = min(64, images)
    common = [*size, "--num_workers", 0]
    encoder = out / "pretrain" / "checkpoint.pth"

    def pretrain(folder: str, *flags: str) -> list[str]:
        recipe = ["--model", "saim_nano", "--query_depth", 2, "--norm_pix_loss", "--lr", 3e-3, "--batch_size", batch]
        recipe += ["--epochs", epochs, "--warmup_epochs", min(2, epochs - 1)]
        files = ["--data_path", data, "--output_dir", out / folder]
        return command("saim/main_pretrain.py", *recipe, *common, *flags, *files)

    def probe(folder: str, checkpoint: Path | str) -> list[str]:
        recipe = ["--model", "vit_nano_patch16", "--global_pool", "--nb_classes", classes, "--lr", 0.5]
        recipe += ["--batch_size", min(50, 2 * classes), "--epochs", 25, "--warmup_epochs", 0]
        files = ["--data_path", few, "--finetune", checkpoint, "--output_dir", out / folder]
        return command("saim/main_linprobe.py", *recipe, *common, *files)

    raster = pretrain("pretrain_raster", "--order", "raster"), out / "pretrain_raster.out"
    together(raster, (pretrain("pretrain"), None))
    together((probe("probe_random", ""), out / "probe_random.out"), (probe("probe", encoder), None))
    finetune = ["--model", "vit_nano_patch16", "--nb_classes", classes, "--lr", 1e-3, "--drop_path", 0, "--aa", ""]
    finetune += ["--batch_size", min(16, images), "--epochs", max(3, epochs - 2), "--warmup_epochs", 1, "--reprob", 0]
    finetune += [*common, "--data_path", data, "--finetune", encoder, "--output_dir", out / "finetune"]
    shown = ["--data_path", data, "--num_images", 12, "--output_dir", out]
    attention = [*size, "--model", "vit_nano_patch16", "--query", "mean", "--names", "raster order", "SAIM"]
    attention += ["--checkpoint", encoder, "--compare", out / "pretrain_raster" / "checkpoint.pth", *shown]
    together(
        (command("saim/visualize_attention.py", *attention), out / "figures.out"),
        (command("saim/main_finetune.py", *finetune), None),
    )
    curves = [out / "pretrain", out / "pretrain_raster", out / "finetune", "--out", out / "curves.png"]
    together(
        (command("scripts/tools/plot_log.py", *curves), out / "figures.out"),
        (command("saim/visualize_prediction.py", "--checkpoint", encoder, *shown[:3], 6, *shown[4:]), None),
    )
    report(out, few, not args.data_path)
    print(f"Done in {time.perf_counter() - begun:.0f} s. Figures: {out}/attention.png, predictions.png, curves.png")


def report(out: Path, few: Path, digits: bool) -> None:
    """Print the table of accuracies."""
    folders = {"random features": "probe_random", "pre-trained features": "probe", "fine-tuned": "finetune"}
    print(f"\n{'':24}{'accuracy':>10}" + ("   to expect" if digits else ""))
    for row, folder in folders.items():
        value = accuracy(out / folder)
        low, high = EXPECTED[row]
        expected = f"   {low} - {high} %" + ("" if low <= value <= high else "   <- outside: is something wrong?")
        print(f"{row:24}{value:8.1f} %" + (expected if digits else ""))
    print(f"features: linear probe with {LABELS} labels per class ({few.name}); fine-tuned: with all labels")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("quickstart", allow_abbrev=False)
    parser.add_argument("--data_path", default="", help="folder with train/<class>/ and val/<class>/; default: digits")
    distributed.run(main, parser.parse_args())
