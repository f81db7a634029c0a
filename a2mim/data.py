"""A2MIM's images: list files or folders, samplers, augmentations, and pixels that become floats on the device."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from a2mim.masking_generator import BlockwiseMaskGenerator
from common import datasets, distributed

# As upstream: ImageNet's mean in the order blue, green, red fills the corners of RGB images.
RAND_AUGMENT_FILL = (104, 116, 124)


# ---- which images, in which order


def list_file(root: Path, name: str) -> Path:
    """Where upstream keeps a list of images: meta/<name of the folder of images>/<name> beside that folder."""
    return root.parent / "meta" / root.name / name


def images(args: argparse.Namespace, train: bool, labelled: bool) -> Any:
    """The images of the flags: by the list files of upstream where they exist (`list_file`), else from class folders or
    timm's data sets.

    Raises:
        UserError: as `datasets.image_dataset`.
    """
    root = Path(args.data_path)
    labels = list_file(root, "train_labeled_full.txt"), list_file(root, "val_labeled.txt")
    lists = labels[not train] if labelled or not train else list_file(root, "train_full.txt")
    # The numbers of list files need not be those of class folders: both lists, or none.
    if not args.dataset and lists.is_file() and (not labelled or args.eval or all(x.is_file() for x in labels)):
        return datasets.ListedImages(lists, root / ("train" if train else "val"), root, labelled=lists in labels)
    split = args.train_split if train else args.val_split
    return datasets.image_dataset(args.data_path, train, labelled, args.dataset, split, in_chans=args.in_chans)


class ChunkSampler(DistributedSampler):
    """Gives every rank a contiguous part of the epoch's permutation (as upstream), padded with its beginning."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        order = order.repeat(-(-self.total_size // len(order)))[: self.total_size]
        return iter(order[self.rank * self.num_samples :][: self.num_samples].tolist())


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


def train_loader(
    args: argparse.Namespace, dataset: Any, transform: Any, device: torch.device, repeated: bool = False
) -> datasets.Loader:
    """Training batches in upstream's order; the last batch of an epoch may be smaller. repeated: every image thrice."""
    world, rank = distributed.world_size(), distributed.rank()
    sampler = RepeatSampler(dataset, world, rank) if repeated else ChunkSampler(dataset, world, rank, seed=args.seed)
    return datasets.build_loader(
        args,
        dataset,
        transform,
        device,
        seed=args.seed,
        accum_iter=args.accum_iter,
        sampler=sampler,
        drop_last=False,
    )


# ---- what happens to an image


def own_statistics(args: argparse.Namespace) -> tuple:
    """`datasets.statistics` with --in_chans, --mean or --std; else (), ImageNet's of three 8-bit channels."""
    return datasets.statistics(args) if args.in_chans or args.mean or args.std else ()


def to_pixels(*statistics: Any) -> list[Any]:
    """The last steps of a transform: pixels as uint8, or with statistics of one's own normalised floats."""
    return datasets.tensor_and_normalize(*statistics) if statistics else [transforms.PILToTensor()]


class PretrainTransform:
    """Crop, flip and mask: image -> [pixels (C, H, W) for `normalize`, mask (h, w)]."""

    def __init__(
        self,
        generator: BlockwiseMaskGenerator,
        input_size: int,
        crop_scale: tuple[float, float],
        *statistics: Any,
        augment: str = "pillow",
    ):
        crop = transforms.RandomResizedCrop(input_size, crop_scale, interpolation=InterpolationMode.BILINEAR)
        if augment == "pillow":
            self.augment: Any = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *to_pixels(*statistics)])
        else:
            finish = datasets.Normalize(*statistics[:2]) if statistics else datasets.unchanged
            self.augment = datasets.crop_and_flip(crop, augment, finish)
        self._first_half, self._second_half = datasets.halves(self.augment)
        self.generator = generator

    def __call__(self, image: Any) -> list[Tensor]:
        return [self.augment(image), self._mask()]

    def halves(self) -> tuple[Callable, Callable]:
        """What loader processes do, and what happens to batches on the device."""
        return self._draw, self._finish

    def _draw(self, image: Any) -> list[Any]:
        return [self._first_half(image), self._mask()]

    def _finish(self, batch: list[Any]) -> list[Tensor]:
        return [self._second_half(batch[0]), batch[1]]

    def _mask(self) -> Tensor:
        return torch.from_numpy(self.generator.mask()).to(torch.uint8)


def normalize(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) uint8 -> float, by ImageNet's mean and deviation; floats are returned as they are."""
    if pixels.is_floating_point():
        return pixels
    mean, std = (
        255 * distributed.constant(x, pixels.device)[:, None, None]
        for x in (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD)
    )
    return (pixels - mean) / std


def finetune_transform(aug: str, size: int, ra_level: int = 7, *statistics: Any) -> Any:
    """Training augmentation by name: swin (timm's, with random erasing), rsb (RandAugment of ra_level), or plain.

    swin gives normalised floats, the others what `to_pixels` says.
    Raises:
        ValueError: an unknown name.
    """
    if aug == "swin":
        return datasets.finetune_transform(size, **dict(zip(("mean", "std", "in_chans"), statistics, strict=False)))
    if aug not in ("rsb", "plain"):
        raise ValueError(f"aug {aug}: expected swin, rsb or plain")
    steps = [
        transforms.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
    ]
    if aug == "rsb":
        options = {"img_mean": RAND_AUGMENT_FILL, "interpolation": Image.Resampling.BICUBIC}
        policy = rand_augment_transform(f"rand-m{ra_level}-mstd0.5-inc1", options)
        steps.append(datasets.photos_only(datasets.repair_posterize(policy), *statistics[2:]))
    return transforms.Compose([*steps, *to_pixels(*statistics)])


def eval_transform(resize: int, crop: int, *statistics: Any) -> transforms.Compose:
    """Shorter side to `resize`, bicubic, then the centre `crop` pixels, as `to_pixels` says."""
    resized = transforms.Resize(resize, interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([resized, transforms.CenterCrop(crop), *to_pixels(*statistics)])
