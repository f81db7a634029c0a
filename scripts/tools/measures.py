"""What features of images say about their encoder: with labels accuracy, without them agreement, rank and variance.

Legend: n images, D width of the features.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms

from common import datasets, distributed
from common.datasets import ImageFiles
from common.distributed import UserError
from scripts.tools import quickstart
from scripts.tools.encoders import knn
from scripts.tools.encoders import load as encoders
from scripts.tools.neighbours import nearest

NEIGHBOURS = 20  # that vote
TEMPERATURE = 0.07  # of the votes, as in the methods' main_knn.py
CLOSEST = 10  # neighbours that two views are to share
ZOOM = 0.8  # side of the second view, as a share of the first one's


# ---- images


@dataclass
class Pictures:
    """Images with their labels (n,), and which of them are for training and validation; classes: none unlabelled."""

    base: ImageFiles
    labels: np.ndarray
    train: np.ndarray
    val: np.ndarray  # empty: every seed holds out another part of `train`
    classes: list[str]

    def split(self, seed: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
        """A seed's training and validation images; no two seeds share one of the latter. Files are sorted by class."""
        if len(self.val):
            return self.train, self.val[seed::seeds]
        held = self.train[seed :: max(seeds, 5)]
        return np.setdiff1d(self.train, held), held

    def labelled(self, rows: np.ndarray, per_class: str, seed: int) -> np.ndarray:
        """So many of the images of each class, "all" or a number; larger choices of a seed contain smaller ones."""
        if per_class == "all":
            return rows
        mixed = np.random.default_rng(seed).permutation(rows)
        return np.concatenate([mixed[self.labels[mixed] == c][: int(per_class)] for c in range(len(self.classes))])


def read_pictures(folder: str, in_chans: int | None = None) -> Pictures:
    """The images of a folder, labelled if it has classes.

    Args:
        in_chans: as an encoder takes them; None: 8-bit RGB.
    Raises:
        UserError: there are no images.
    """
    for split in (True, False):
        if Path(folder).is_dir() and (classes := quickstart.classes_of(Path(folder), split, in_chans)):
            kind: dict[str, Any] = {"direct": not split, "in_chans": in_chans}
            sets = [datasets.image_dataset(folder, train, **kind) for train in (True, False)[: 1 + split]]
            base = ImageFiles(Path(folder), [sample for images in sets for sample in images.samples], classes)
            base.in_chans = in_chans
            numbers = np.arange(len(base))
            labels, first = np.array([label for _, label in base.samples]), len(sets[0])
            return Pictures(base, labels, numbers[:first], numbers[first:], classes)
    base = datasets.image_dataset(folder, True, labelled=False, in_chans=in_chans)
    base.in_chans = in_chans
    if len(base) < 2:
        raise UserError(f"{folder}: has {len(base)} image, expected at least 2")
    distributed.log(f"{folder}: {len(base)} images without labels (expected two or more folders, one per class)")
    numbers = np.arange(len(base))
    return Pictures(base, np.zeros(len(base), int), numbers, numbers[:0], [])


class Part:
    """Images of a data set by their numbers, in a given order."""

    def __init__(self, base: Any, numbers: list[int]):
        self.base, self.numbers, self.in_chans = base, numbers, base.in_chans
        self.samples = [base.samples[i] for i in numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.base[self.numbers[index]]


def spread(labels: list[int], number: int) -> list[int]:
    """Numbers of at most `number` images, in order: of every class as many, spread over it."""
    rows = np.asarray(labels)
    members = [np.flatnonzero(rows == label) for label in np.unique(rows)]
    share = max(1, number // len(members))
    chosen = [m[np.linspace(0, len(m) - 1, min(share, len(m))).round().astype(int)] for m in members]
    return sorted(np.concatenate(chosen).tolist())[:number]


# ---- features


@torch.inference_mode()
def features(
    backbone: encoders.Backbone, images: Any, args: argparse.Namespace, device: torch.device, zoom: float = 1.0
) -> np.ndarray:
    """Features (n, D) of images, float32, in their order.

    Args:
        args: the flags of `common.datasets.add_loader_flags`, and batch_size.
        zoom: below 1 only the middle of each image is seen, of that share of the side.
    Raises:
        UserError: an image is unreadable, or a feature is not finite.
    """
    transform = encoders.eval_transform(backbone)
    if zoom < 1:  # the middle of the usual view, resized to it
        size, mode = backbone.input_size, transforms.InterpolationMode(backbone.interpolation)
        resize, crop, *rest = transform.transforms
        middle = [transforms.CenterCrop(max(1, round(zoom * size))), transforms.Resize(size, interpolation=mode)]
        transform = transforms.Compose([resize, crop, *middle, *rest])
    loader = datasets.build_loader(args, images, transform, device, train=False)
    found = [backbone(imgs).float().cpu() for imgs, _ in loader.batches()]
    rows = torch.cat([torch.empty(0, backbone.embed_dim), *found]).numpy()
    if not np.isfinite(rows).all():
        raise UserError("the encoder's features are not finite")
    if len(rows) != len(images):  # later rows would be taken for other images
        raise UserError(f"{len(images) - len(rows)} of the images cannot be read; take them out")
    return rows


# ---- measures


def unit(rows: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(np.asarray(rows, np.float32)), dim=1)


def knn_accuracy(train: np.ndarray, labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray) -> float:
    """Percent that the votes of the 20 nearest training images get right; of fewer, where there are fewer."""
    k = min(NEIGHBOURS, len(train))
    known, asked = (torch.from_numpy(np.asarray(x, np.int64)) for x in (labels, val_labels))
    return knn.vote(unit(train), known, unit(val), asked, [k], TEMPERATURE)[k][0]


def rankme(rows: np.ndarray) -> float:
    """Effective rank of features: exp of the entropy of their singular values' shares, 1 (all on a line) to min(n, D).

    The estimate of RankMe ("RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations
    by Their Rank", ICML 2023): share = singular value / sum of them + 1e-7, features as they are, not centred.
    """
    values = np.linalg.svd(np.asarray(rows, np.float64), compute_uv=False)
    shares = values / max(values.sum(), 1e-300) + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def variance(rows: np.ndarray) -> float:
    """Total variance of the features scaled to unit length, 0 (all images alike) to 1 (directions cancel out)."""
    return float(unit(rows).double().var(dim=0, correction=0).sum())


def agreement(rows: np.ndarray, zoomed: np.ndarray) -> np.ndarray:
    """By image (n,), the percentage of its 10 nearest images that its middle part has for neighbours, too.

    Says how far features go by content rather than by place and size; chance is 1000 / (n - 1). Features that are all
    alike have arbitrary neighbours, see `variance`.
    Args:
        rows, zoomed: (n, D), features of the images and of their middle parts.
    """
    k = min(CLOSEST, len(rows) - 1)
    pairs = [nearest(x, list(range(len(x))), k)[0] for x in (rows, zoomed)]
    shared = [len(np.intersect1d(a, b)) for a, b in zip(*pairs, strict=True)]
    return 100 * np.array(shared) / k
