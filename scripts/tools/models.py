"""The small encoders of docs/models: pre-trained on Imagenette, exported, compared with the same networks from scratch.

Usage: python scripts/tools/models.py DATA [METHOD ...] [--epochs N] [--out runs/models], of all methods by default.
DATA is the folder that `prepare_data.py imagenette` writes. Without it: the tables of docs/models.md, from models.json.

Each method pre-trains as `scripts/imagenette.sh METHOD --tiny` does, and compare.py compares the exported file, whose
weights are 16-bit floats. Everything is a command that is printed; those that are done are not repeated.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch

from common import distributed
from common.distributed import UserError
from common.distributed.metrics import hardware
from scripts.tools import recipe
from scripts.tools.flags import METHODS, Parser
from scripts.tools.runs import sha256
from scripts.tools.texts import table

ROOT = recipe.ROOT
FOLDER = ROOT / "docs" / "models"
LABELS, SEEDS = 200, 3  # labelled images of each class; repetitions of everything but the pre-training
SCRATCH = "from scratch"


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Small encoders")
    p.add_argument(
        "data_path", metavar="DATA", nargs="?", default="", help="folder with ten classes in train/ and val/"
    )
    p.add_argument("methods", metavar="METHOD", nargs="*", help=f"{', '.join(METHODS)}; default: all")
    p.add_argument("--epochs", type=int, help="of pre-training; default: the recipe's")
    p.add_argument("--out", default=str(ROOT / "runs" / "models"), help="folder of the runs")
    return p


# ---- making them


def run(*words: object, **env: str) -> None:
    """A command of the checkout, printed; raises UserError if it fails."""
    command = [str(word) for word in words]
    print(f"\n{shlex.join([*(f'{name}={value}' for name, value in env.items()), *command])}", flush=True)
    command[:1] = [sys.executable] if command[0] == "python" else command[:1]
    if status := subprocess.run(command, cwd=ROOT, env={**os.environ, **env}).returncode:
        raise UserError(f"{shlex.join(command[1:3])}: ended with exit status {status}; the same command continues")


def make(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Pre-train, export and compare; what is known of the file then."""
    plan, out, file = recipe.load(method, "laptop"), Path(args.out, method), FOLDER / f"{method}.safetensors"
    epochs = args.epochs or int(plan["pretrain"]["epochs"])
    flags = {"DATA": args.data_path, "OUT": str(out), "GPUS": "1", "EXTRA_PRETRAIN": f"--epochs {epochs}"}
    stages = ["tokenizer", "pretrain"] if "tokenizer" in plan else ["pretrain"]
    run("bash", "scripts/imagenette.sh", method, "--tiny", *stages, **flags)
    encoder = out / "pretrain" / plan["weights"]["pretrain"].format(**plan["pretrain"])
    words = ["--format", "safetensors", "--half", "--overwrite", "--pool", plan["knn"].get("pool", "")]
    run("python", "scripts/tools/export.py", method, encoder, file, *words)
    labelled, found = Path(args.out, "labelled"), out / "compare" / "compare.json"
    subset = ["subset", labelled, "--source", args.data_path, "--per_class", LABELS]
    run("python", "scripts/tools/prepare_data.py", *subset)
    if not found.exists():
        words = ["--scratch", "--labels_per_class", LABELS, "--seeds", SEEDS, "--finetune", "--num_workers", 0]
        run("python", "scripts/tools/compare.py", labelled, f"{method}={file}", *words, "--output_dir", found.parent)
    record = json.loads(found.read_text("utf-8"))
    return {
        "network": record["starts"][method]["network"].split(" of ")[0],
        "epochs": epochs,
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "machine": f"{hardware()}, torch {torch.__version__}, float32",
        "date": time.strftime("%Y-%m-%d"),
        "accuracy": {
            name: {start: [round(x, 2) for x in values] for start, values in by_count[str(LABELS)].items()}
            for name, by_count in record["accuracy"].items()
        },
    }


# ---- what came out


def read() -> dict[str, Any]:
    """models.json by method; empty where there is none."""
    path = FOLDER / "models.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def better(own: list[float], scratch: list[float]) -> bool:
    """Whether means differ by more than two standard deviations, the larger of the two."""
    return bool(np.mean(own) - np.mean(scratch) > 2 * max(np.std(own, ddof=1), np.std(scratch, ddof=1)))


def tables(models: dict[str, Any]) -> str:
    """Markdown: accuracies against the same network from scratch, then the files."""
    rows = []
    for method, about in models.items():
        cells = []
        for values in about["accuracy"].values():
            own, scratch = values[method], values[SCRATCH]
            text = [f"{np.mean(x):.1f} ± {np.std(x, ddof=1):.1f}" for x in (scratch, own)]
            cells += [text[0], f"**{text[1]}**" if better(own, scratch) else text[1]]
        rows.append([method, about["network"], str(about["epochs"]), *cells])
    measures = next(iter(models.values()))["accuracy"]
    begun = {"fine-tuned": SCRATCH}  # the features of the others are those of a network that has not learnt
    heads = [f"{name}, {start}" for name in measures for start in (begun.get(name, "random"), "pre-trained")]
    files = [
        [f"[{m}.safetensors](models/{m}.safetensors)", f"{a['bytes']:,}", f"`{a['sha256']}`"] for m, a in models.items()
    ]
    accuracies = table(["", "network", "epochs", *heads], rows)
    return f"{accuracies}\n\n{table(['file', 'bytes', 'SHA-256'], files)}"


def main(args: argparse.Namespace) -> None:
    models = read()
    if not args.data_path:
        print(tables(models))
        return
    unknown = next((method for method in args.methods if method not in METHODS), "")
    if unknown:
        raise UserError(f"METHOD {unknown}: expected one of {', '.join(METHODS)}")
    if not Path(args.data_path, "train").is_dir():
        raise UserError(f"DATA {args.data_path}: has no folder train/")
    args.data_path, args.out = (os.path.abspath(path) for path in (args.data_path, args.out))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for method in args.methods or METHODS:
        models[method] = make(method, args)
        models = {name: models[name] for name in METHODS if name in models}
        (FOLDER / "models.json").write_text(json.dumps(models, indent=1) + "\n", "utf-8")
    print(tables(models))


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
