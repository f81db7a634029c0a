"""The data set of a command line: folders, lists of files, or those of timm's factory; items (PIL image, class)."""

import argparse
from pathlib import Path
from typing import Any

from timm.data.dataset_factory import create_dataset

from common.datasets.channels import add_channel_flags
from common.datasets.files import ListedImages, endings, read_folder, split_folder
from common.datasets.tars import TarImages
from common.distributed import UserError, flag_groups, flags_of, is_given, load, log, on_main_first

READERS = ("torch", "wds", "hfds")  # images by number; what timm only streams has no order that could be resumed


def add_flags(parser: argparse.ArgumentParser, pin_mem: bool = True, channels: bool = True) -> None:
    """Add the flags that say where images come from; channels: also those that a checkpoint cannot tell."""
    group = flag_groups(parser).data
    where = "folder with train/ and val/; pre-training takes any images"
    group.add_argument("--data_path", default="../imagenet", type=str, help=where)
    timm = "data set of timm's in --data_path (torch/cifar10, wds/... for tar files, hfds/...); default: folders"
    group.add_argument("--dataset", default="", help=timm)
    group.add_argument("--train_split", default="train", help="name of that data set's training split")
    group.add_argument("--val_split", default="validation", help="name of that data set's validation split")
    turn = "turn images as their EXIF orientation says, which the authors' programs do not"
    group.add_argument("--exif_transpose", action="store_true", help=turn)
    if channels:
        add_channel_flags(parser)
    add_loader_flags(parser, pin_mem)


def add_loader_flags(parser: argparse.ArgumentParser, pin_mem: bool = True) -> None:
    """Add the flags that say how images are read."""
    group = flag_groups(parser).data
    unreadable = "what to do at an image that cannot be read"
    group.add_argument("--bad_images", default="stop", choices=["stop", "skip"], help=unreadable)
    group.add_argument("--num_workers", default=4, type=int, help="loader processes per training process")
    group.add_argument("--pin_mem", action="store_true", help="copy images to the GPU through pinned memory")
    if pin_mem:
        group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="do not use pinned memory")
    parser.set_defaults(pin_mem=pin_mem)


def image_dataset(
    data_path: str,
    train: bool,
    labelled: bool = True,
    name: str = "",
    split: str = "",
    lists: bool = False,
    direct: bool = False,
    skip: str = "",
    in_chans: int | None = None,
) -> Any:
    """The training or validation images of a run.

    Args:
        data_path: folder with train/ and val/, each <class>/<image>.
        labelled: False (pre-training) takes all images below train/, or below data_path if it has neither train/ nor
            val/, whatever the folders in it.
        name: "" for folders, else a data set of timm's factory (torch/cifar10, wds/..., hfds/...) kept in data_path.
        split: the factory's split, default train or validation; of wds/, see `TarImages`.
        lists: go by the files train.txt and val.txt of data_path where both exist.
        direct: data_path itself holds the class folders. skip: a folder that is not read, such as the run's output.
        in_chans: channels of the images, which may be of any depth, and .npy and .dcm files, too.
    Raises:
        UserError: something is missing or empty; the message says what was expected where.
    """
    types = endings(in_chans)
    if name:
        return _timm_dataset(name, data_path, train, split or ("train" if train else "validation"), labelled, types)
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
    dataset, left_out = read_folder(root, labelled, skip, types)
    if left_out:
        log(f"{root}: {len(dataset)} images, {left_out}")
    return dataset


def _timm_dataset(name: str, root: str, train: bool, split: str, labelled: bool, types: tuple[str, ...]) -> Any:
    reader = name.split("/")[0]
    if reader not in READERS or "/" not in name:
        raise UserError(f"--dataset {name}: expected one of {', '.join(f'{reader}/...' for reader in READERS)}")
    try:
        if reader == "wds":
            return TarImages(Path(root), split, labelled, types)
        with on_main_first():
            return create_dataset(name, root, split, is_training=train, download=reader == "torch")
    except UserError:
        raise
    except Exception as error:  # the factory and its back ends raise many types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"--dataset {name}: split {split} cannot be read from --data_path {root} ({reason})") from error


def check_classes(train: Any, val: Any, nb_classes: int) -> list[str]:
    """Compare the class folders of two data sets with each other and with the classifier.

    Returns:
        names of the classes by index, for the checkpoint; empty where they have none.
    Raises:
        UserError: there are more classes than outputs, or the same index would mean different classes.
    """
    classes = [getattr(dataset, "classes", None) for dataset in (train, val)]
    for images, found in zip(("training", "validation"), classes, strict=True):
        if found and len(found) > nb_classes:
            raise UserError(f"--nb_classes {nb_classes}: the {images} images have {len(found)} classes")
    if classes[0] and classes[1] and classes[0] != classes[1] and isinstance(classes[1][0], str):
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        raise UserError(f"{val.root}: its class folders differ from the training ones, first {odd[0]}")
    names = classes[0] or classes[1] or []
    return list(names) if all(isinstance(name, str) for name in names) else []


def follow_classes(args: argparse.Namespace, train: Any, val: Any, flag: str = "nb_classes") -> None:
    """Set args.class_names and, unless it is given, the number of classes: the checkpoint's that --eval reads, else the
    class folders'. Raises as `check_classes`."""
    found = getattr(train, "classes", None) or getattr(val, "classes", None)
    if found and not (is_given(args, flag) and getattr(args, flag)):
        evaluates = getattr(args, "eval", False) or getattr(args, "evaluate", False)
        stored = flags_of(load(args.resume)).get(flag) if evaluates and Path(args.resume).is_file() else None
        setattr(args, flag, stored or len(found))
    args.class_names = check_classes(train, val, getattr(args, flag))
