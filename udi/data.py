"""The images of the semi-supervised and transfer evaluations: subsets by lists of names, and the transfer data sets."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy.io import loadmat
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset
from torchvision.datasets import Flowers102

from common import datasets
from common.distributed import UserError, log, on_main_first

RASampler = RepeatAugSampler  # upstream's name of repeated augmentation


# same as a2mim/data.py
class RepeatSampler(RepeatAugSampler):
    """Repeated augmentation (arXiv 1901.09335): yields (index, number of the copy)."""

    def __init__(self, dataset: Any, num_replicas: int, rank: int, num_repeats: int = 3):
        # Whole rounds of 256 images, as upstream; fewer images, of which timm 1.0.26 takes none, are all one round.
        rounds = 256 if len(dataset) >= 256 else 0
        super().__init__(dataset, num_replicas, rank, num_repeats=num_repeats, selected_round=rounds)

    def __iter__(self):
        positions = range(self.rank, self.total_size, self.num_replicas)
        for index, position in zip(super().__iter__(), positions, strict=False):
            yield index, position % self.num_repeats


# ---- semi-supervised


def first_classes(dataset: Any, class_num: int) -> Any:
    """Leave out of an ImageFolder all but its first classes.

    Raises:
        UserError: there are fewer.
    """
    if class_num < 1 or class_num > len(dataset.classes):
        raise UserError(f"--class_num {class_num}: {dataset.root} has {len(dataset.classes)} classes")
    dataset.classes = dataset.classes[:class_num]
    dataset.samples = [(path, label) for path, label in dataset.samples if label < class_num]
    return dataset


def listed(dataset: Any, list_path: str) -> Any:
    """Leave out of an ImageFolder the images whose file names are no lines of a text file.

    Raises:
        UserError: the file cannot be read, or names no image of some class.
    """
    try:
        lines = Path(list_path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise UserError(f"--target_list_path {list_path}: {reason}; expected a file name per line") from error
    names = {line.strip() for line in lines if line.strip()}
    dataset.samples = [(path, label) for path, label in dataset.samples if Path(path).name in names]
    used = {label for _, label in dataset.samples}
    empty = [name for label, name in enumerate(dataset.classes) if label not in used]
    if empty:
        raise UserError(
            f"--target_list_path {list_path}: names no image of class {empty[0]} in {dataset.root} "
            f"({len(empty)} of {len(dataset.classes)} classes have none)"
        )
    if len(dataset.samples) < len(names):
        log(f"WARNING: {len(names) - len(dataset.samples)} of {len(names)} names in {list_path} were not found")
    return dataset


def semi_supervised_sets(args: argparse.Namespace) -> tuple[Any, Any]:
    """The listed training images (with --eval all validation images), and those, of the first --class_num classes.

    Raises:
        UserError: something is missing or does not fit together.
    """
    evaluates = getattr(args, "eval", False)  # which the logistic regression does not have
    splits, chans = (not evaluates, False), args.in_chans
    train, val = (datasets.image_dataset(args.data_path, split, in_chans=chans) for split in splits)
    datasets.check_classes(train, val, max(len(train.classes), len(val.classes)))
    train, val = (first_classes(dataset, args.class_num) for dataset in (train, val))
    args.class_names = list(train.classes)
    return train if evaluates else listed(train, args.target_list_path), val


# ---- transfer


class LabelledImages(Dataset):
    """Images of (path, class index) pairs.

    Args:
        where: names the data set in messages.
    Attributes:
        in_chans: as in `datasets.ImageFiles`.
    Raises:
        UserError: there is none, the first file is missing, or a label is out of range.
    """

    in_chans: int | None = None

    def __init__(self, samples: list[tuple[str, int]], classes: list[str], where: str):
        if not samples:
            raise UserError(f"{where}: lists no images")
        if not Path(samples[0][0]).is_file():
            raise UserError(f"{where}: lists {samples[0][0]}, which is missing")
        odd = next((label for _, label in samples if not 0 <= label < len(classes)), None)
        if odd is not None:
            raise UserError(f"{where}: class {odd}, counted from 0, is none of {len(classes)}")
        self.samples, self.classes = samples, classes

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        return datasets.read_image(path, self.in_chans), label


@contextlib.contextmanager
def _reading(root: Path, expected: str) -> Iterator[None]:
    """Turn what a missing or odd annotation file causes into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # readers raise many types for damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--data_path {root}: expected {expected} there ({type(error).__name__}: {reason})") from error


def inat(root: Path, train: bool, year: int, category: str) -> LabelledImages:
    """iNaturalist 2018 or 2019 from its json files, with a class per different `category` of its species.

    Classes are numbered as the training annotations first show them.
    """
    split = f"{'train' if train else 'val'}{year}.json"
    with _reading(root, f"train{year}.json, val{year}.json and categories.json"):
        species = json.loads((root / "categories.json").read_text("utf-8"))
        names = {int(entry.get("id", i)): entry[category] for i, entry in enumerate(species)}
        shown = json.loads((root / f"train{year}.json").read_text("utf-8"))["annotations"]
        classes: dict[str, int] = {}
        for annotation in shown:
            classes.setdefault(names[int(annotation["category_id"])], len(classes))
        samples = []
        for image in json.loads((root / split).read_text("utf-8"))["images"]:
            _, _, number, _ = image["file_name"].split("/")  # <folder>/<group>/<category id>/<file>
            samples.append((str(root / image["file_name"]), classes[names[int(number)]]))
        return LabelledImages(samples, list(map(str, classes)), str(root / split))


def flowers(root: Path, train: bool, download: bool = False) -> LabelledImages:
    """Oxford Flowers-102 from its files, in root or where torchvision puts them; trains on its train and val parts."""
    if download:
        with _reading(root, "room for a download"), on_main_first():
            Flowers102(str(root), download=True)
    home = root / "flowers-102" if (root / "flowers-102").is_dir() else root
    with _reading(home, "jpg/, imagelabels.mat and setid.mat (--download fetches them)"):
        labels = loadmat(home / "imagelabels.mat")["labels"].ravel()
        parts = loadmat(home / "setid.mat")
        numbers = [n for part in (("trnid", "valid") if train else ("tstid",)) for n in parts[part].ravel().tolist()]
        samples = [(str(home / "jpg" / f"image_{n:05d}.jpg"), int(labels[n - 1]) - 1) for n in numbers]
        return LabelledImages(samples, list(Flowers102.classes), str(home / "setid.mat"))


def cars(root: Path, train: bool) -> LabelledImages:
    """Stanford Cars from cars_annos.mat; its labels count from 1."""
    with _reading(root, "cars_annos.mat and the images that it names"):
        found = loadmat(root / "cars_annos.mat", squeeze_me=True)
        samples = []
        for row in found["annotations"].ravel():
            if bool(row["test"]) != train:
                samples.append((str(root / str(row["relative_im_path"])), int(row["class"]) - 1))
        classes = [str(name) for name in found["class_names"].ravel()] if "class_names" in found else []
        return LabelledImages(samples, classes or [str(i) for i in range(196)], str(root / "cars_annos.mat"))


DATA_SETS = ("CIFAR", "CIFAR100", "Cars", "CIFAR10", "IMNET", "INAT19", "INAT", "flowers", "image_folder")


def transfer_set(args: argparse.Namespace, train: bool) -> Any:
    """The training or test images of --data_set.

    Raises:
        UserError: a file is missing or not what it should be.
    """
    root = Path(args.data_path)
    if not root.is_dir():
        raise UserError(f"--data_path {root}: no such folder")
    if args.data_set in ("CIFAR", "CIFAR100", "CIFAR10"):
        name = "torch/cifar10" if args.data_set == "CIFAR10" else "torch/cifar100"
        return datasets.image_dataset(args.data_path, train, name=name)
    if args.data_set in ("INAT", "INAT19"):
        return inat(root, train, 2018 if args.data_set == "INAT" else 2019, args.inat_category)
    if args.data_set == "flowers":
        return flowers(root, train, args.download)
    if args.data_set == "Cars":
        return cars(root, train)
    return datasets.image_dataset(args.data_path, train, in_chans=args.in_chans)
