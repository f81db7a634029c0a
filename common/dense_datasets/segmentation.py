"""Images with masks of class indices, in the folders of ADE20K, Cityscapes, Pascal VOC, or one's own."""

import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import get_image_size

from common.datasets import Loader, add_channel_flags, add_loader_flags, build_loader, endings, read_image
from common.datasets.files import Listing
from common.dense_datasets.iterations import IterationLoader
from common.dense_datasets.transforms import IGNORED, EvalTransform, TrainTransform
from common.distributed import UserError, flag_groups, log


class Layout(NamedTuple):
    """Where images and masks are; a mask is named like its image, but for their endings."""

    images: str
    masks: str
    image_ending: str = ""
    mask_ending: str = ""
    list_file: str = ""  # names of the split's images
    zero_is_class: bool = True  # False: label 0 means none of the classes


def layouts(train: bool) -> list[Layout]:
    """The known layouts of a split, in the order in which they are looked for."""
    split, ade20k = ("train", "training") if train else ("val", "validation")
    return [
        Layout(f"images/{ade20k}", f"annotations/{ade20k}", zero_is_class=False),
        Layout(f"images/{split}", f"masks/{split}"),
        Layout(f"leftImg8bit/{split}", f"gtFine/{split}", "_leftImg8bit", "_gtFine_labelTrainIds"),
        Layout("JPEGImages", "SegmentationClass", list_file=f"ImageSets/Segmentation/{split}.txt"),
    ]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where images and masks come from."""
    g = flag_groups(parser)
    shape = "images/training and annotations/training (ADE20K), images/train and masks/train, Cityscapes or VOC"
    g.data.add_argument("--data_path", default="data/ade/ADEChallengeData2016", help=f"folder with {shape}")
    zero = "label 0 means none of the classes, class k has label k + 1; default: in ADE20K's folders"
    g.data.add_argument("--reduce_zero_label", action=argparse.BooleanOptionalAction, default=None, help=zero)
    names = "number of classes; default: as many as classes.txt in --data_path has lines, else ADE20K's 150"
    g.model.add_argument("--nb_classes", type=int, help=names)
    add_channel_flags(parser)
    add_loader_flags(parser)


def class_names(args: argparse.Namespace) -> list[str]:
    """Names of the classes, from classes.txt or ADE20K's objectInfo150.txt, else numbers; sets args.nb_classes.

    Raises:
        UserError: there are more or fewer names than --nb_classes, or more than 8-bit labels can tell apart.
    """
    own, ade20k = (Path(args.data_path) / name for name in ("classes.txt", "objectInfo150.txt"))
    names: list[str] = []
    if own.is_file():
        names = [line.strip() for line in own.read_text("utf-8-sig").splitlines() if line.strip()]
    elif ade20k.is_file():  # a table with a title line, the names and their synonyms in the last column
        names = [line.split("\t")[-1].split(",")[0].strip() for line in ade20k.read_text().splitlines()[1:]]
    if names and args.nb_classes not in (None, len(names)):
        raise UserError(f"--nb_classes {args.nb_classes}: --data_path {args.data_path} names {len(names)} classes")
    args.nb_classes = args.nb_classes or len(names) or 150
    if not 2 <= args.nb_classes <= IGNORED:
        raise UserError(f"--nb_classes {args.nb_classes}: expected 2 to {IGNORED}")
    return names or [str(index) for index in range(args.nb_classes)]


def _by_name(root: Path, ending: str, skip: str = "", in_chans: int | None = None) -> dict[str, str]:
    """Paths of the images below a folder, by their path in it without `ending` and type, one of `datasets.endings`."""
    paths = Listing(skip, endings(in_chans)).below(root)
    stems = [os.path.splitext(os.path.relpath(path, root))[0] for path in paths]
    return {s.removesuffix(ending): path for s, path in zip(stems, paths, strict=True) if s.endswith(ending)}


class SegmentationImages(Dataset):
    """Items (image as of `read_image`, (H, W) uint8 class indices, 255 where a pixel has none).

    Args:
        samples: (path of the image, path of its mask). zero_is_class: False takes 1 off the labels, 0 becomes 255.
        in_chans: channels of the images, of any depth; None: they become 8-bit RGB.
    """

    def __init__(
        self, samples: list[tuple[str, str]], nb_classes: int, zero_is_class: bool, in_chans: int | None = None
    ):
        self.samples, self.nb_classes, self.zero_is_class = samples, nb_classes, zero_is_class
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray]:
        """Raises ValueError: the mask is no mask of this image and these classes."""
        path, mask = self.samples[index]
        image = read_image(path, self.in_chans)
        size = tuple(get_image_size(image))
        with Image.open(mask) as file:
            if len(file.getbands()) > 1:
                raise ValueError(f"its mask {mask} is {file.mode}, expected one channel of class indices")
            raw = np.asarray(file).astype(np.int64)
        if raw.shape[::-1] != size:
            raise ValueError(f"its mask {mask} has {raw.shape[1]} x {raw.shape[0]} pixels, the image {size}")
        first = 0 if self.zero_is_class else 1
        ignored = (raw == IGNORED) | (raw < first)
        bad = raw[~ignored & (raw >= self.nb_classes + first)]
        if bad.size:
            limits = f"{first} to {self.nb_classes + first - 1}{'' if self.zero_is_class else ', 0'} or {IGNORED}"
            raise ValueError(f"its mask {mask} has the label {bad[0]}, expected {limits}")
        return image, np.where(ignored, IGNORED, raw - first).astype(np.uint8)


def segmentation_images(args: argparse.Namespace, train: bool) -> SegmentationImages:
    """The training or validation images of the flags.

    Raises:
        UserError: the folders are not there, there are no images, or one has no mask; says what was expected where.
    """
    root = Path(args.data_path)
    known = layouts(train)
    found = [x for x in known if (root / x.images).is_dir() and (root / x.masks).is_dir()]
    found = [x for x in found if not x.list_file or (root / x.list_file).is_file()]
    if not found:
        pairs = ", or ".join(f"{x.images} and {x.masks}" for x in known)
        raise UserError(f"--data_path {root}: expected its folders {pairs}")
    layout = found[0]
    images = _by_name(root / layout.images, layout.image_ending, args.output_dir, args.in_chans)
    masks = _by_name(root / layout.masks, layout.mask_ending, args.output_dir)
    if layout.list_file:
        names = (root / layout.list_file).read_text("utf-8-sig").split()
        absent = next((name for name in names if name not in images), None)
        if absent:
            raise UserError(f"{root / layout.list_file}: {absent} is not in {root / layout.images}")
        images = {name: images[name] for name in names}
    missing = [name for name in images if name not in masks]
    if missing:
        expected = root / layout.masks / f"{missing[0]}{layout.mask_ending}.png"
        raise UserError(f"{images[missing[0]]}: has no mask {expected} ({len(missing)} of {len(images)} such)")
    if not images:
        raise UserError(
            f"{root / layout.images}: has no images, expected names that end in {', '.join(endings(args.in_chans))}"
        )
    zero = layout.zero_is_class if args.reduce_zero_label is None else not args.reduce_zero_label
    log(
        f"{root / layout.images}: {len(images)} images, masks in {layout.masks}; label 0: {'a' if zero else 'no'} class"
    )
    return SegmentationImages([(images[name], masks[name]) for name in images], args.nb_classes, zero, args.in_chans)


def segmentation_loaders(
    args: argparse.Namespace, device: torch.device, transform: TrainTransform, val_transform: EvalTransform
) -> tuple[IterationLoader | None, Loader]:
    """Training batches of the flags, or None with --eval; validation batches of one image each.

    Sets args.nb_classes and args.class_names.
    """
    args.class_names = class_names(args)
    val = segmentation_images(args, train=False)
    val_loader = build_loader(args, val, val_transform, device, train=False, batch_size=1, joint=True)
    if args.eval:
        return None, val_loader
    if args.in_chans:
        log("photometric distortion: left out for images of other than three 8-bit channels")
    passes = build_loader(args, segmentation_images(args, train=True), transform, device, seed=args.seed, joint=True)
    return IterationLoader(passes, args.iters, args.eval_interval, args.accum_iter), val_loader
