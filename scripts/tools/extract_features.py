"""Features, labels and names of a split's images, by the encoder of any method's checkpoint.

Usage: python scripts/tools/extract_features.py METHOD CHECKPOINT --data_path DATA --split val --out OUT
OUT is FILE.npy, beside which go FILE.labels.npy and FILE.json; FILE.safetensors, which holds all; or a folder for
<split>.npy. Rows are the images in their order. `read` gives it all back.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch.utils.data import Dataset

from common import datasets, distributed
from common.datasets.files import split_folder
from common.distributed import UserError, log
from scripts.tools.encoders import load as encoders
from scripts.tools.flags import Parser, writing

CHUNK = 2**14  # rows that are copied at once


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Features", usage="%(prog)s METHOD CHECKPOINT [flags], see --help")
    encoders.add_flags(p)
    p.add_argument("--split", default="train", choices=["train", "val"], help="which images of the data set")
    p.add_argument("--out", required=True, help="FILE.npy, FILE.safetensors, or a folder/ for <split>.npy")
    p.add_argument("--dtype", default="float16", choices=["float16", "float32"], help="of the features in the file")
    p.add_argument("--batch_size", default=64, type=int, help="images per process")
    datasets.add_flags(p, channels=False)
    p.add_argument("--amp_dtype", default="fp32", choices=["auto", "bf16", "fp16", "fp32"], help="of the encoder")
    distributed.add_launch_flags(p)
    return p


def out_file(out: str, split: str) -> Path:
    """The features' file of --out; raises UserError if that names no kind of file."""
    path = Path(out)
    if path.suffix in (".npy", ".safetensors") and not path.is_dir():
        return path
    if path.suffix and not (path.is_dir() or out.endswith(os.sep)):
        raise UserError(f"--out {out}: expected FILE.npy, FILE.safetensors, or a folder that ends in {os.sep}")
    return path / f"{split}.npy"


class Numbered(Dataset):
    """Images of a data set with (number, label) as their target; label -1 where there are no class folders."""

    def __init__(self, base: Any):
        self.base = base
        self.labelled = not isinstance(base, datasets.ImageFiles) or bool(base.classes)
        if hasattr(base, "samples"):
            self.samples = base.samples  # names the unreadable ones

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Any, tuple[int, int]]:
        reader = getattr(self.base, "reader", None)  # timm's own ImageDataset hides unreadable files
        image, label = self.base[index] if reader is None else reader[index]
        return image, (index, label if self.labelled else -1)


# ---- files


def part(path: Path, ending: str) -> Path:
    """A file beside that of the features."""
    return path.with_name(path.name.removesuffix(".npy") + ending)


@contextlib.contextmanager
def shared_rows(path: Path, shape: tuple[int, int], dtype: str) -> Iterator[np.ndarray]:
    """An array in a temporary file beside `path`, that all processes write to; it is gone afterwards. Collective."""
    temporary = part(path, ".tmp.npy")

    def create() -> None:
        with writing(f"--out {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # claim the space: a full disk must not end a process by SIGBUS
                with open(temporary, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, rows.offset + rows.nbytes)  # type: ignore[attr-defined]

    try:
        distributed.main_does(create)
        try:
            rows = np.load(temporary, mmap_mode="r+")
        except OSError as error:
            raise UserError(f"--out {path}: process {distributed.rank()} does not share this folder") from error
        yield rows
    finally:
        if distributed.is_main():
            temporary.unlink(missing_ok=True)


def compact(rows: np.ndarray, numbers: np.ndarray, path: Path) -> None:
    """Write the rows of these numbers to `path`, a part at a time."""
    kept = np.lib.format.open_memmap(path, "w+", rows.dtype, (len(numbers), rows.shape[1]))
    for start in range(0, len(numbers), CHUNK):
        kept[start : start + CHUNK] = rows[numbers[start : start + CHUNK]]
    kept.flush()


def write(path: Path, rows: np.ndarray, targets: np.ndarray, about: dict[str, Any], names: list[str] | None) -> None:
    """Put features, labels and the rest in place; the features' file comes last and complete.

    Args:
        rows: (images, D). targets: (n, 2), numbers and labels of those that were read, in order. names: of all images;
            None: their numbers.
    """
    numbers, labels = (np.ascontiguousarray(column) for column in targets.T)  # safetensors writes others wrongly
    read_names = [names[i] if names else str(i) for i in numbers]
    temporary = part(path, ".new.npy")
    with writing(f"--out {path}"):
        try:
            compact(rows, numbers, temporary)
            if path.suffix == ".safetensors":
                joined = np.frombuffer(json.dumps(read_names).encode(), np.uint8)
                tensors = {"features": np.load(temporary, mmap_mode="r"), "labels": labels, "names": joined}
                save_file(tensors, part(path, ".new.safetensors"), {"about": json.dumps(about)})
                shutil.copymode(temporary, part(path, ".new.safetensors"))  # safetensors lets nobody else read it
                os.replace(part(path, ".new.safetensors"), path)
                return
            np.save(part(path, ".labels.new.npy"), labels)
            part(path, ".json.new").write_text(json.dumps({**about, "names": read_names}, indent=1))
            os.replace(part(path, ".labels.new.npy"), part(path, ".labels.npy"))
            os.replace(part(path, ".json.new"), part(path, ".json"))
            os.replace(temporary, path)
        finally:
            for ending in (".new.npy", ".new.safetensors", ".labels.new.npy", ".json.new"):
                part(path, ending).unlink(missing_ok=True)


def read(name: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Features (n, D), labels (n,) and the rest (names, classes, skipped, ...) of a file that this script wrote.

    Raises:
        UserError: it is missing, damaged or incomplete.
    """
    path = Path(name)
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            with safe_open(path, "numpy") as file:
                about = json.loads(file.metadata()["about"])
            features, labels, about["names"] = (tensors[key] for key in ("features", "labels", "names"))
            about["names"] = json.loads(about["names"].tobytes())
        else:
            features, labels = np.load(path, mmap_mode="r"), np.load(part(path, ".labels.npy"))
            about = json.loads(part(path, ".json").read_text())
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(about["names"]) != len(labels):
            raise ValueError(f"features {features.shape}, labels {labels.shape}, {len(about['names'])} names")
    except Exception as error:  # NumPy and safetensors report a damaged file by many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: expected a file of scripts/tools/extract_features.py ({reason})") from error
    return features, labels, about


# ---- extraction


@torch.inference_mode()
def extract(backbone: encoders.Backbone, loader: datasets.Loader, rows: np.ndarray, amp_dtype: str) -> np.ndarray:
    """Write the features of this process's images to their rows; returns numbers and labels, (n, 2).

    Raises:
        UserError: a feature is not finite, or too large for the rows' type.
    """
    precision = distributed.amp_dtype(amp_dtype, loader.device)
    autocast = torch.autocast(loader.device.type, precision, enabled=precision != torch.float32)
    targets = [np.empty((0, 2), np.int64)]
    steps = distributed.EpochLog("Features:", len(loader), loader.batch_size, loader.device)
    for _, (imgs, target) in steps.steps(loader.batches()):
        # Whole batches only: how a product is rounded depends on its size, and shares of processes end differently.
        imgs = torch.cat([imgs, imgs.new_zeros(loader.batch_size - len(imgs), *imgs.shape[1:])])
        with autocast:
            features = backbone(imgs)[: len(target)].float().cpu().numpy()
        own = target.cpu().numpy()
        with np.errstate(over="ignore"):
            rows[own[:, 0]] = features
        if not np.isfinite(rows[own[:, 0]]).all():
            kind = f"too large for {rows.dtype}; use --dtype float32" if np.isfinite(features).all() else "not finite"
            raise UserError(f"features of the encoder are {kind}")
        targets.append(own)
    return np.concatenate(targets)


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    path = out_file(args.out, args.split)
    # ---- model and data
    train = args.split == "train"
    name = args.train_split if train else args.val_split
    backbone = encoders.from_flags(args).to(device)
    images = datasets.image_dataset(args.data_path, train, False, args.dataset, name, in_chans=args.in_chans)
    images.in_chans = args.in_chans
    if not args.dataset and not split_folder(Path(args.data_path), args.split).is_dir():
        log(f"{args.data_path} has no folder {args.split}/: all {len(images)} images below it are read")
    transform = encoders.eval_transform(backbone)
    loader = datasets.build_loader(args, Numbered(images), transform, device, train=False)
    log(
        f"{backbone.model_name}, {backbone.input_size} pixels, {backbone.pool or 'own'} pooling: {loader.images} images"
    )
    # ---- features
    about = {key: getattr(args, key) for key in ("method", "checkpoint", "key", "data_path", "dataset", "split")}
    about |= {key: getattr(backbone, key) for key in ("model_name", "input_size", "pool", "in_chans", "mean", "std")}
    about["classes"] = [str(c) for c in getattr(images, "classes", None) or []]
    names = [os.path.relpath(p, args.data_path) for p, _ in getattr(images, "samples", ())] or None
    with shared_rows(path, (loader.images, backbone.embed_dim), args.dtype) as rows:
        own = extract(backbone, loader, rows, args.amp_dtype)
        rows.flush()  # type: ignore[attr-defined]
        shares = distributed.gather_to_main((own, loader.bad))

        def finish() -> None:
            targets = np.concatenate([targets for targets, _ in shares])
            targets = targets[targets[:, 0].argsort(kind="stable")]
            about["skipped"] = sorted(problem for _, bad in shares for problem in bad)
            write(path, rows, targets, about, names)
            skipped = f", {len(about['skipped'])} unreadable ones left out" if about["skipped"] else ""
            log(f"{path}: {len(targets)} x {rows.shape[1]} {rows.dtype}{skipped}")

        distributed.main_does(finish)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
