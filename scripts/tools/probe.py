"""Accuracy of plain classifiers of fixed vectors, of features in files or of the pixels themselves.

Usage: python scripts/tools/probe.py --features TRAIN VAL [--few DATA], files that extract_features.py wrote
       python scripts/tools/probe.py --pixels SIDE --data_path DATA [--in_chans N] [--few DATA]

Fits a logistic regression and one nearest neighbour (Euclidean distance) on the training images, and prints how many
percent of the validation images each gets right.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from common import datasets, distributed
from common.distributed import UserError
from scripts.tools import extract_features
from scripts.tools.flags import Parser


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Probe")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--features", nargs=2, metavar=("TRAIN", "VAL"), help="files with features and labels")
    what.add_argument("--pixels", type=int, metavar="SIDE", help="images of --data_path, resized to SIDE x SIDE pixels")
    p.add_argument("--data_path", default="", help="folder with train/ and val/, for --pixels")
    p.add_argument(
        "--in_chans", type=int, metavar="N", help="channels of those images, of any depth; default: 3 of 8 bits"
    )
    p.add_argument("--few", default="", metavar="DATA", help="also fit on the training images of this folder alone")
    p.add_argument("--out", default="", metavar="FILE.json", help="file to write the accuracies to")
    return p


Split = tuple[np.ndarray, np.ndarray, list[str]]  # vectors (n, D), labels (n,), names <class>/<file>


def read_features(path: str) -> Split:
    """Vectors of a file; raises UserError if its images have no labels."""
    features, labels, about = extract_features.read(path)
    if not len(labels) or labels.min() < 0:
        raise UserError(f"--features {path}: its images have no class folders")
    return np.asarray(features, np.float32), labels, ["/".join(Path(name).parts[-2:]) for name in about["names"]]


def pixels(path: str, side: int, in_chans: int | None) -> np.ndarray:
    """An image's N x side x side numbers, 0 to 1; raises UserError where it cannot be read."""
    try:
        image = datasets.read_image(path, in_chans)
    except Exception as error:  # of many types
        raise UserError(f"{path}: unreadable image ({' '.join(str(error).split()) or type(error).__name__})") from error
    if isinstance(image, Image.Image):
        return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32).ravel() / 255
    return F.interpolate(image[None], (side, side), mode="area").flatten().numpy()


def read_pixels(data_path: str, train: bool, side: int, in_chans: int | None) -> Split:
    """The images' numbers; without --in_chans grey and coloured ones alike as three channels."""
    samples = datasets.image_dataset(data_path, train, in_chans=in_chans).samples
    vectors = [pixels(path, side, in_chans) for path, _ in samples]
    names = ["/".join(Path(path).parts[-2:]) for path, _ in samples]
    return np.stack(vectors), np.array([label for _, label in samples]), names


def accuracies(train: np.ndarray, labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray) -> dict[str, float]:
    """Percent of the validation vectors that each classifier gets right."""
    models = {"logistic": LogisticRegression(max_iter=1000), "nearest": KNeighborsClassifier(1)}
    scores = {"nearest": models["nearest"].fit(train, labels).score(val, val_labels)}
    # Not each number by its own deviation alone: pixels of the margin are dark but for noise.
    mean, scale = train.mean(axis=0), train.std(axis=0) + train.std(axis=0).mean() + 1e-12
    scores["logistic"] = models["logistic"].fit((train - mean) / scale, labels).score((val - mean) / scale, val_labels)
    return {name: round(100 * float(score), 2) for name, score in scores.items()}


def main(args: argparse.Namespace) -> None:
    if args.features:
        train, val = map(read_features, args.features)
    else:
        train, val = (read_pixels(args.data_path, split, args.pixels, args.in_chans) for split in (True, False))
    results = {"all": accuracies(*train[:2], *val[:2])}
    if args.few:
        samples = datasets.image_dataset(args.few, train=True, in_chans=args.in_chans).samples
        chosen = {"/".join(Path(path).parts[-2:]) for path, _ in samples}
        rows = [i for i, name in enumerate(train[2]) if name in chosen]
        if len(rows) != len(chosen):
            raise UserError(
                f"--few {args.few}: {len(chosen) - len(rows)} of its images are none of the training images"
            )
        results["few"] = accuracies(train[0][rows], train[1][rows], *val[:2])
    for name, found in results.items():
        number = len(train[0]) if name == "all" else len(rows)
        shown = ", ".join(f"{classifier} {value:.1f} %" for classifier, value in found.items())
        print(f"{number} training images: {shown} of {len(val[0])} validation images")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
