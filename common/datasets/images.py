"""Data sets of (PIL image, class index): folders, lists of files, and those of timm's factory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.dataset_factory import create_dataset
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.distributed import UserError, on_main_first

TIMM_READERS = ("torch", "wds", "hfds", "hfids", "tfds")


def to_rgb(image: Image.Image) -> Any:  # an image, but transforms are typed to return what they are given
    """The image in 8-bit RGB; Pillow alone would clip 16-bit greyscale, which would be white nearly everywhere."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def read_image(path: str | Path) -> Any:
    """An image file as 8-bit RGB; raises what Pillow raises."""
    with Image.open(path) as image:
        return to_rgb(image)


class UnlabelledImages(Dataset):
    """Images directly in one folder, class 0."""

    def __init__(self, root: Path):
        self.samples = [(str(p), 0) for p in sorted(root.iterdir()) if p.suffix.lower() in IMG_EXTENSIONS]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.samples[index][0]), 0


class ListedImages(Dataset):
    """Images named by the lines "<path> <class index>" of a text file, relative to one of `roots`.

    Args:
        labelled: False takes lines "<path>", class 0.
    Raises:
        UserError: a line is not of that form, there is none, or the first image is under no root.
    """

    def __init__(self, path: Path, *roots: Path, labelled: bool = True):
        form = "'<path> <class index>'" if labelled else "'<path>'"
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is no UTF-8 text, expected lines {form}") from error
        rows = [line.rsplit(maxsplit=1) if labelled else [line, "0"] for line in lines]
        bad = next((i for i, row in enumerate(rows, 1) if len(row) != 2 or not row[1].isdecimal()), None)
        if bad is not None or not rows:
            raise UserError(f"{path}: line {bad or 1}: expected {form}")
        root = next((root for root in roots if (root / rows[0][0]).is_file()), None)
        if root is None:
            raise UserError(f"{path}: {rows[0][0]} is not in {' or '.join(map(str, roots))}")
        self.root = str(path)
        self.samples = [(str(root / name), int(label)) for name, label in rows]
        self.classes = list(range(max(label for _, label in self.samples) + 1))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path), label


def image_dataset(
    data_path: str,
    train: bool,
    labelled: bool = True,
    name: str = "",
    split: str = "",
    batch_size: int = 1,
    lists: bool = False,
    direct: bool = False,
) -> Any:
    """The training or validation images of a run.

    Args:
        data_path: folder with train/ and val/, each <class>/<image>.
        labelled: False (pre-training) also takes images without class folders, and all of data_path if it has neither
            train/ nor val/.
        name: "" for folders, else a data set of timm's factory (torch/cifar10, wds/..., hfds/...) kept in data_path.
        split: the factory's split, default train or validation. batch_size: whole batches of it are streamed.
        lists: go by the files train.txt and val.txt of data_path where both exist.
        direct: data_path itself holds the class folders.
    Raises:
        UserError: something is missing or empty; the message says what was expected where.
    """
    if name:
        return _timm_dataset(name, data_path, train, split, batch_size)
    root = Path(data_path) / ("train" if train else "val")
    if not Path(data_path).is_dir():
        raise UserError(f"--data_path {data_path}: no such folder")
    if direct or not (labelled or any((Path(data_path) / split).is_dir() for split in ("train", "val"))):
        root = Path(data_path)
    if lists and all((Path(data_path) / f"{name}.txt").is_file() for name in ("train", "val")):
        return ListedImages(root.with_suffix(".txt"), root, Path(data_path))
    if not root.is_dir():
        raise UserError(f"--data_path {data_path}: has no folder {root.name}/, expected {root}/<class>/<image>")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        flat = UnlabelledImages(root)
        if labelled and len(flat):
            raise UserError(f"{root}: has {len(flat)} images but no class folders, expected {root}/<class>/<image>")
        if not len(flat):
            raise UserError(f"{root}: has no class folders and no images, expected {root}/<class>/<image>")
        return flat
    dataset = ImageFolder(str(root), loader=read_image, allow_empty=True)
    used = {target for _, target in dataset.samples}
    empty = [c for c, target in dataset.class_to_idx.items() if target not in used]
    if empty:
        raise UserError(f"{root / empty[0]}: class folder without images ({len(empty)} of {len(classes)} classes)")
    return dataset


def _timm_dataset(name: str, root: str, train: bool, split: str, batch_size: int) -> Any:
    split = split or ("train" if train else "validation")
    if name.split("/")[0] not in TIMM_READERS or "/" not in name:
        expected = ", ".join(f"{reader}/..." for reader in TIMM_READERS)
        raise UserError(f"--dataset {name}: expected one of {expected}")
    try:
        with on_main_first():
            download = name.startswith("torch/")
            return create_dataset(name, root, split, is_training=train, download=download, batch_size=batch_size)
    except Exception as error:  # the factory and its back ends raise many types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"--dataset {name}: split {split} cannot be read from --data_path {root} ({reason})") from error


def check_classes(train: Any, val: Any, nb_classes: int) -> None:
    """Compare the class folders of two data sets with each other and with the classifier.

    Raises:
        UserError: there are more classes than outputs, or the same index would mean different classes.
    """
    classes = [getattr(dataset, "classes", None) for dataset in (train, val)]
    for images, found in zip(("training", "validation"), classes, strict=True):
        if found and len(found) > nb_classes:
            raise UserError(f"--nb_classes {nb_classes}: the {images} images have {len(found)} classes")
    if classes[0] and classes[1] and classes[0] != classes[1] and isinstance(val, ImageFolder):
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        raise UserError(f"{val.root}: its class folders differ from the training ones, first {odd[0]}")
