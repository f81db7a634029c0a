"""Data sets of (PIL image, class index): folders, lists of files, and those of timm's factory."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.dataset_factory import create_dataset
from torch.utils.data import Dataset

from common.datasets.folders import ClassFolders, read_folder, split_folder
from common.distributed import UserError, log, on_main_first

_CONSTANT: set[str] = set()  # images of this process that a warning has named
TIMM_READERS = ("torch", "wds", "hfds", "hfids", "tfds")


def to_rgb(image: Image.Image) -> Any:  # an image, but transforms are typed to return what they are given
    """The image in 8-bit RGB.

    Deeper greyscale is scaled from the range that its format can hold, never stretched to what an image uses: 16 bits
    from 0 to 65535 (PGM from its header's maximum), 32-bit integers from 0 to 2**31 - 1, floats from 0 to 1.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    values = np.asarray(image)
    if image.mode == "F":
        values = (np.nan_to_num(values).clip(0, 1) * 255).round()
    else:  # Pillow scales PGM to 16 bits, which it keeps in 32, as older versions of it do with PNG
        bits = 16 if image.mode != "I" or image.format in ("PPM", "PNG") else 31
        values = values.clip(0) >> (bits - 8)
    grey = values.astype(np.uint8)
    name = getattr(image, "filename", "")
    if grey.min() == grey.max() and np.ptp(np.asarray(image)) > 0 and name not in _CONSTANT:
        _CONSTANT.add(name)
        what = f"{name or 'an image'} ({image.mode}) becomes a single grey, {grey.min()}"
        log(f"WARNING: {what}; scale its values to the range of its format")
    return Image.fromarray(grey).convert("RGB")


def read_image(path: str | Path) -> Any:
    """An image file as 8-bit RGB; raises what Pillow raises."""
    with Image.open(path) as image:
        return to_rgb(image)


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
            lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
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
    skip: str = "",
) -> Any:
    """The training or validation images of a run.

    Args:
        data_path: folder with train/ and val/, each <class>/<image>.
        labelled: False (pre-training) takes all images below train/, or below data_path if it has neither train/ nor
            val/, whatever the folders in it.
        name: "" for folders, else a data set of timm's factory (torch/cifar10, wds/..., hfds/...) kept in data_path.
        split: the factory's split, default train or validation. batch_size: whole batches of it are streamed.
        lists: go by the files train.txt and val.txt of data_path where both exist.
        direct: data_path itself holds the class folders. skip: a folder that is not read, such as the run's output.
    Raises:
        UserError: something is missing or empty; the message says what was expected where.
    """
    if name:
        return _timm_dataset(name, data_path, train, split, batch_size)
    folder = Path(data_path)
    if not folder.is_dir():
        raise UserError(f"--data_path {data_path}: no such folder")
    root = split_folder(folder, "train" if train else "val")
    if direct or not (labelled or any(split_folder(folder, split).is_dir() for split in ("train", "val"))):
        root = folder
    if lists and all((folder / f"{split}.txt").is_file() for split in ("train", "val")):
        return ListedImages(folder / ("train.txt" if train else "val.txt"), root, folder)
    if not root.is_dir():
        raise UserError(f"--data_path {data_path}: has no folder {root.name}/, expected {root}/<class>/<image>")
    dataset, listing = read_folder(root, labelled, read_image, skip)
    if listing.summary():
        log(f"{root}: {len(dataset)} images, {listing.summary()}")
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
    if classes[0] and classes[1] and classes[0] != classes[1] and isinstance(val, ClassFolders):
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        raise UserError(f"{val.root}: its class folders differ from the training ones, first {odd[0]}")
