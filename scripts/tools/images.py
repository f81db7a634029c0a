"""The images that a user gives to a tool: labelled by folders or not, with or without a split."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import datasets, distributed
from common.datasets import ImageFiles
from common.distributed import UserError


def classes_of(folder: Path, split: bool, in_chans: int | None = None) -> list[str]:
    """Names of a folder's classes if its images are labelled: at least two, of two or more images each; else none.

    Args:
        split: into train/ and val/, with the same classes. in_chans: of images of any depth, as in `image_dataset`.
    """
    kind: dict[str, Any] = {"direct": not split, "in_chans": in_chans}
    try:
        sets = [datasets.image_dataset(str(folder), train, **kind) for train in (True, False)[: 1 + split]]
    except UserError:
        return []
    classes = sets[0].classes
    enough = len(classes) > 1 and min(Counter(label for _, label in sets[0].samples).values()) > 1
    every = datasets.image_dataset(str(folder), True, labelled=False, in_chans=in_chans)
    loose = not split and len(sets[0]) < len(every)
    return classes if enough and not loose and all(s.classes == classes for s in sets) else []


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
        if Path(folder).is_dir() and (classes := classes_of(Path(folder), split, in_chans)):
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


def evenly(labels: list[int], number: int) -> list[int]:
    """Numbers of at most `number` images, in order: of every class as many, spread over it."""
    rows = np.asarray(labels)
    members = [np.flatnonzero(rows == label) for label in np.unique(rows)]
    share = max(1, number // len(members))
    chosen = [m[np.linspace(0, len(m) - 1, min(share, len(m))).round().astype(int)] for m in members]
    return sorted(np.concatenate(chosen).tolist())[:number]
