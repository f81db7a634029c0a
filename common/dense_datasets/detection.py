"""Images with objects: annotations as COCO has them, and the batches of the detection recipes.

Boxes are x0, y0, x1, y1 in pixels, sizes (height, width); a target is a dict of boxes (n, 4) float, labels (n,) int64
from 0 and masks (n, H, W) uint8.
"""

import argparse
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.functional import get_image_size

from common.datasets import Loader, add_channel_flags, add_loader_flags, build_loader, read_image, statistics
from common.dense_datasets.transforms import normalize, pixels_of, to_picture
from common.distributed import UserError, flag_groups, log, rank, user_errors, world_size

Size = tuple[int, int]
SMALLEST_SIDE = 32  # of images to train on, in pixels


class ImageInfo(NamedTuple):
    """What became of an image in a batch; sizes are (height, width).

    Args:
        size: resized, without padding. padded: padded to a multiple of 32, on its own. original: of the file.
        scale: resized / original, of widths and of heights.
        image_id: as the annotations name it.
    """

    size: Size
    padded: Size
    original: Size
    scale: tuple[float, float]
    image_id: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where images and annotations come from."""
    g = flag_groups(parser)
    g.data.add_argument(
        "--data_path", default="data/coco", help="folder in which the paths below are, COCO's if not given"
    )
    for split in ("train", "val"):
        name, words = f"{split}2017", {"train": "training", "val": "validation"}[split]
        text = f"annotations of the {words} images, a json of COCO's form"
        g.data.add_argument(f"--{split}_json", default=f"annotations/instances_{name}.json", help=text)
        g.data.add_argument(f"--{split}_images", default=name, help=f"folder of the {words} images")
    add_channel_flags(parser)
    add_loader_flags(parser)


# ---- annotations


def mask_tools() -> Any:
    """pycocotools.mask; raises UserError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError("object detection needs pycocotools: pip install pycocotools") from error
    return mask


def read_annotations(path: Path) -> dict[str, Any]:
    """A json of COCO's form. Annotations are numbered anew; area and iscrowd are filled in, boxes stand in for masks.

    Raises:
        UserError: there is no such file, it is of another form, or an annotation is of no known image or category.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file of annotations") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as json ({error})") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise UserError(f"{path}: expected the lists {', '.join(lists)}, as COCO has them")
    boxes_only = 0
    with user_errors(f"{path}: an entry lacks a value or has a wrong one"):
        images = {
            image["id"]: (image["file_name"], int(image["height"]), int(image["width"])) for image in content["images"]
        }
        categories = {category["id"]: category["name"] for category in content["categories"]}
        for number, entry in enumerate(content["annotations"], 1):
            for key, known in (("image_id", images), ("category_id", categories)):
                if entry[key] not in known:
                    raise UserError(f"{path}: annotation {entry.get('id', number)} has the unknown {key} {entry[key]}")
            x, y, w, h = map(float, entry["bbox"])
            entry |= {"id": number, "iscrowd": int(entry.get("iscrowd", 0)), "area": float(entry.get("area", w * h))}
            if not entry.get("segmentation"):
                entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                boxes_only += 1
    if not categories or not images:
        raise UserError(f"{path}: has {len(images)} images and {len(categories)} categories")
    if boxes_only:
        log(f"{path}: {boxes_only} annotations have no segmentation; their boxes are taken for masks")
    return content


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(H, W) uint8 of polygons or run lengths.

    Raises:
        ValueError: run lengths are of another size.
    """
    tools = mask_tools()
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]  # fewer numbers enclose nothing
        if not polygons:
            return np.zeros((height, width), np.uint8)
        segmentation = tools.merge(tools.frPyObjects(polygons, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = tools.frPyObjects(segmentation, *segmentation["size"])
    mask = tools.decode(segmentation)
    if mask.shape != (height, width):
        raise ValueError(f"a mask has {mask.shape[1]} x {mask.shape[0]} pixels, its image {width} x {height}")
    return mask


def has_object(entry: dict[str, Any], height: int, width: int) -> bool:
    """Whether an annotation can be trained on: it has an area and a box of a pixel or more that meets the image."""
    x, y, w, h = entry["bbox"]
    meets = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
    return meets and entry["area"] > 0 and w >= 1 and h >= 1


class DetectionImages(Dataset):
    """Items (image of `read_image`, target with image_id), for training also boxes, labels, masks at the file's size.

    Training leaves out images without annotations and those with a side below 32 pixels, crowds, and objects that
    `has_object` refuses. Images whose objects were all left out stay: they are background.
    Attributes:
        samples: (path, image id). sizes: of the images. classes: names by label. category_ids: of COCO by label.
        object_count: objects of all images.
        in_chans: channels of the images, of any depth; None: they become 8-bit RGB.
        statistics: mean and deviation of each channel, for `picture`.
    Raises:
        UserError: as `read_annotations`; an image file is missing; there is nothing to train on.
    """

    in_chans: int | None = None
    statistics: tuple = ()

    def __init__(self, path: Path, folder: Path, train: bool):
        mask_tools()
        content = read_annotations(path)
        self.path, self.train = path, train
        categories = {category["id"]: category["name"] for category in content["categories"]}
        self.category_ids = sorted(categories)
        self.classes = [str(categories[number]) for number in self.category_ids]
        labels = {number: label for label, number in enumerate(self.category_ids)}
        entries: dict[Any, list[dict]] = {image["id"]: [] for image in content["images"]}
        for entry in content["annotations"]:
            entries[entry["image_id"]].append(entry)
        images = content["images"]
        if train:
            images = [image for image in images if min(image["height"], image["width"]) >= SMALLEST_SIDE]
            small = len(content["images"]) - len(images)
            images = [image for image in images if entries[image["id"]]]
            empty = len(content["images"]) - small - len(images)
        self.samples = [(str(folder / image["file_name"]), image["id"]) for image in images]
        self.sizes = [(int(image["height"]), int(image["width"])) for image in images]
        kept: list[bytes] = []  # one buffer for all: workers would copy objects that they only read
        self.object_count = crowds = refused = 0
        for image, size in zip(images, self.sizes, strict=True):
            own = entries[image["id"]]
            single = [entry for entry in own if not entry["iscrowd"]]
            fit = [entry for entry in single if has_object(entry, *size)]
            self.object_count += len(fit)
            crowds, refused = crowds + len(own) - len(single), refused + len(single) - len(fit)
            kept.append(pickle.dumps([(e["bbox"], labels[e["category_id"]], e["segmentation"]) for e in fit]))
        self._ends = np.cumsum([len(part) for part in kept])
        self._data = np.frombuffer(b"".join(kept), np.uint8)
        self._check_files(folder)
        if train:
            left = f"{empty} images without annotations, {small} smaller than {SMALLEST_SIDE} pixels, {crowds} crowds"
            log(
                f"{path}: {len(images)} images; left out: {left}, {refused} objects without area or outside their image"
            )
        if not images:
            raise UserError(f"{path}: has no image to {'train on' if train else 'evaluate'}")

    def _check_files(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of images")
        names = {str(entry) for entry in folder.iterdir()}
        missing = [path for path, _ in self.samples if path not in names and not Path(path).is_file()]
        if missing:
            raise UserError(f"{missing[0]}: no such image ({len(missing)} of {len(self.samples)} named by {self.path})")

    def __len__(self) -> int:
        return len(self.samples)

    def objects(self, index: int) -> dict[str, Tensor]:
        """Boxes, labels and masks of an image, at the size of its file."""
        end = self._ends[index]
        entries = pickle.loads(self._data[self._ends[index - 1] if index else 0 : end].tobytes())
        boxes = torch.tensor([box for box, *_ in entries], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [torch.from_numpy(decode_mask(segmentation, *self.sizes[index])) for *_, segmentation in entries]
        stacked = torch.stack(masks) if masks else torch.zeros(0, *self.sizes[index], dtype=torch.uint8)
        return {"boxes": boxes, "labels": torch.tensor([label for _, label, _ in entries]).long(), "masks": stacked}

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        """Raises ValueError: the file is not of the size that the annotations say."""
        path, image_id = self.samples[index]
        image, (height, width) = read_image(path, self.in_chans), self.sizes[index]
        found = get_image_size(image)
        if found != [width, height]:
            raise ValueError(f"has {found[0]} x {found[1]} pixels, {self.path} says {width} x {height}")
        return image, {"image_id": image_id, **(self.objects(index) if self.train else {})}

    def picture(self, index: int) -> Tensor:
        """An image as (3, H, W) uint8, other than RGB as `to_picture` shows it."""
        image = pixels_of(self[index][0])
        if image.dtype == torch.uint8:
            return image
        return (255 * to_picture(normalize(image, *self.statistics), *self.statistics)).round().to(torch.uint8)


# ---- batches


def collate(samples: list[tuple[Tensor, tuple[ImageInfo, dict]]]) -> tuple[Tensor, list[tuple[ImageInfo, dict]]]:
    """Images (B, N, H, W) and masks, padded at right and bottom to the largest height and width."""
    height, width = (max(info.padded[side] for _, (info, _) in samples) for side in (0, 1))

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))

    images, targets = zip(*samples, strict=True)
    padded = [(info, {k: pad(v) if k == "masks" else v for k, v in objects.items()}) for info, objects in targets]
    return torch.stack([pad(image) for image in images]), padded


class GroupedSampler(Sampler):
    """Indices whose batches hold either wide images or others, of this process and epoch.

    Each group is shuffled, filled up to whole batches for all processes by its first images, and the batches shuffled;
    process r of R takes batches r, r + R, ...
    Args:
        sizes: (height, width) of the images. batch_size: per process.
    """

    def __init__(self, sizes: list[Size], batch_size: int, seed: int = 0):
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        wide = [w > h for h, w in sizes]
        self.groups = [[i for i, x in enumerate(wide) if x == kind] for kind in (False, True) if kind in wide]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole = self.batch_size * world_size()
        return sum(math.ceil(len(group) / whole) * self.batch_size for group in self.groups)

    def __iter__(self) -> Iterator[int]:
        generator, whole = torch.Generator().manual_seed(self.seed + self.epoch), self.batch_size * world_size()
        order: list[int] = []
        for group in self.groups:
            shuffled = [group[i] for i in torch.randperm(len(group), generator=generator)]
            total = math.ceil(len(group) / whole) * whole
            order += (shuffled * math.ceil(total / len(shuffled)))[:total]
        batches = torch.tensor(order).view(-1, self.batch_size)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        return iter(batches[rank() :: world_size()].flatten().tolist())


def detection_images(args: argparse.Namespace, train: bool) -> DetectionImages:
    """The training or validation images of the flags."""
    root, split = Path(args.data_path), "train" if train else "val"
    images = DetectionImages(root / getattr(args, f"{split}_json"), root / getattr(args, f"{split}_images"), train)
    images.in_chans, images.statistics = args.in_chans, statistics(args)[:2]
    return images


def detection_loaders(
    args: argparse.Namespace, device: torch.device, transform: Callable, val_transform: Callable
) -> tuple[Loader | None, Loader, DetectionImages]:
    """Training batches of the flags, or None with --eval; validation batches of one image each, and their data set.

    Sets args.class_names.
    Raises:
        UserError: as `DetectionImages`; the categories of training and validation differ.
    """
    val = detection_images(args, False)
    args.class_names = val.classes
    options: dict[str, Any] = {"joint": True, "collate": collate}
    val_loader = build_loader(args, val, val_transform, device, train=False, batch_size=1, **options)
    if args.eval:
        return None, val_loader, val
    train = detection_images(args, True)
    if (train.category_ids, train.classes) != (val.category_ids, val.classes):
        odd = set(zip(train.category_ids, train.classes, strict=True)) ^ set(
            zip(val.category_ids, val.classes, strict=True)
        )
        raise UserError(f"{val.path}: its categories are not those of {train.path}, first {min(odd)}")
    options |= {"sampler": GroupedSampler(train.sizes, args.batch_size, args.seed), "seed": args.seed}
    return build_loader(args, train, transform, device, accum_iter=args.accum_iter, **options), val_loader, val
