"""Augmentation on the device: loader processes decode and draw, batches are cropped, resized and flipped there.

Draws are those of loader processes. Resizing is Pillow's, as two matrix products with the weights of its filters, each
rounded to 8 bits, so that views differ by rounding alone.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data._utils.collate import collate, default_collate_fn_map
from torchvision import transforms

from common.datasets.transforms import TensorCrop
from common.distributed import UserError, flag_groups

STACK = 2**27  # values of images that are resized at once


def add_augment_flag(parser: argparse.ArgumentParser, *ways: str) -> None:
    """Add --augment with ways of making views: pillow, and of tensor and device those that the method has."""
    texts = {
        "pillow": "pillow: by loader processes with Pillow, as the authors' programs",
        "tensor": "tensor: the same, but resized in tensors, in less time; some values differ by a level or a few",
        "device": "device: loader processes only decode, the rest happens on --device; values differ by rounding",
    }
    text = "; ".join(texts[way] for way in ways)
    flag_groups(parser).augmentation.add_argument("--augment", default="pillow", choices=ways, help=text)


def loader_options(args: argparse.Namespace) -> dict[str, Any]:
    """What --augment asks of a `Loader`; raises UserError where it cannot make views of the images."""
    way = getattr(args, "augment", "pillow")
    if way != "pillow" and args.in_chans:
        raise UserError(f"--augment {way}: is for 8-bit RGB images, without --in_chans")
    return {"collate": collate_decoded} if way == "device" else {}


class Decoded(NamedTuple):
    """An image, (H, W, 3) in uint8, and whether it is to be mirrored."""

    pixels: Tensor
    flip: bool


def decoded(image: Image.Image, box: tuple[int, int, int, int] | None = None, flip: bool = False) -> Decoded:
    """An image, or the box (top, left, height, width) of it, for `stacks`."""
    if box:
        top, left, height, width = box
        image = image.crop((left, top, left + width, top + height))
    return Decoded(torch.from_numpy(np.array(image)), flip)


def _pack(samples: list[Decoded], **_: Any) -> dict[str, Any]:
    """Images of any sizes as one row of bytes, which is cheap to hand over."""
    return {
        "pixels": torch.cat([sample.pixels.flatten() for sample in samples]),
        "sizes": [tuple(sample.pixels.shape[:2]) for sample in samples],
        "flip": torch.tensor([sample.flip for sample in samples]),
    }


def collate_decoded(samples: list[Any]) -> Any:
    """torch's default batch, but for `Decoded`, of which `stacks` takes the batch."""
    return collate(samples, collate_fn_map={**default_collate_fn_map, Decoded: _pack})


def stacks(batch: dict[str, Any]) -> Iterator[tuple[slice, Tensor]]:
    """Images of a packed batch, padded to the largest of their stack: (b, 3, H, W) in floats from 0 to 255."""
    sizes, groups = batch["sizes"], [[0]]
    for i in range(1, len(sizes)):
        height, width = (max(sizes[k][axis] for k in (*groups[-1], i)) for axis in (0, 1))
        if 3 * height * width * (len(groups[-1]) + 1) > STACK:
            groups.append([])
        groups[-1].append(i)
    images = batch["pixels"].split([3 * height * width for height, width in sizes])
    for group in groups:
        height, width = (max(sizes[k][axis] for k in group) for axis in (0, 1))
        stack = batch["pixels"].new_zeros(len(group), height, width, 3)
        for image, k in zip(stack, group, strict=True):
            image[: sizes[k][0], : sizes[k][1]] = images[k].view(*sizes[k], 3)
        yield slice(group[0], group[-1] + 1), stack.permute(0, 3, 1, 2).float()


# ---- resizing


def _bicubic(x: Tensor) -> Tensor:
    """Cubic convolution with a = -1/2."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bilinear": lambda x: (1 - x.abs()).clamp(min=0),
    "bicubic": _bicubic,
    "lanczos": lambda x: torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3),
    "hamming": lambda x: torch.sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x)) * (x.abs() < 1),
}


def weights(first: Tensor, extent: Tensor, flip: Tensor, length: int, size: int, filter_name: str) -> Tensor:
    """Rows (B, size, length) that resize an interval of each of B lines of `length` pixels to `size` pixels.

    Args:
        first, extent: (B,), the intervals in pixels. flip: (B,) bool, lines that are turned round.
    """
    first, scale = first[:, None, None], (extent / size)[:, None, None]
    pixel = torch.arange(length, device=extent.device) - first
    centre = (torch.arange(size, device=extent.device)[:, None] + 0.5) * scale
    rows = FILTERS[filter_name]((pixel + 0.5 - centre) / scale.clamp(min=1))
    rows = rows * ((pixel >= 0) & (pixel < extent[:, None, None]))
    rows = rows / rows.sum(dim=2, keepdim=True)
    return torch.where(flip[:, None, None], rows.flip(1), rows)


def levels(x: Tensor) -> Tensor:
    """The nearest whole numbers from 0 to 255."""
    return (x + 0.5).floor_().clamp_(0, 255)


def separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images (B, C, H, W) by weights (B, H', H) and (B, W', W) -> (B, C, H', W'); columns first, as Pillow."""
    return levels(rows[:, None] @ levels(images @ columns.mT[:, None]))


@torch.no_grad()
def resize_batch(batch: dict[str, Any], size: int, filter_name: str) -> Tensor:
    """Images of a packed batch, mirrored where that was drawn -> (B, 3, size, size) in uint8."""
    views = []
    sizes = torch.tensor(batch["sizes"], dtype=torch.float32).to(batch["flip"].device, non_blocking=True)
    for part, images in stacks(batch):
        (height, width), flip = sizes[part].T, batch["flip"][part]
        first, upright = torch.zeros_like(width), torch.zeros_like(flip)
        rows = weights(first, height, upright, images.shape[2], size, filter_name)
        columns = weights(first, width, flip, images.shape[3], size, filter_name)
        views.append(separable(images, rows, columns).to(torch.uint8))
    return torch.cat(views)


class CropOnDevice:
    """A random crop, resized, and a flip: drawn as by the transforms of torchvision, done on the device.

    Args:
        crop: size, filter and ranges. finish: what becomes of the batch's pixels, (B, 3, size, size) in uint8.
    """

    def __init__(self, crop: transforms.RandomResizedCrop, finish: Callable[[Tensor], Tensor]):
        self.crop, self.finish = crop, finish

    def __call__(self, image: Image.Image) -> Tensor:
        return self._finish(collate_decoded([self._draw(image)]))[0]

    def halves(self) -> tuple[Callable, Callable]:
        return self._draw, self._finish

    def _draw(self, image: Image.Image) -> Decoded:
        box = self.crop.get_params(image, self.crop.scale, self.crop.ratio)  # type: ignore[arg-type]
        return decoded(image, box, bool(torch.rand(1) < 0.5))

    def _finish(self, batch: dict[str, Any]) -> Tensor:
        return self.finish(resize_batch(batch, self.crop.size[0], self.crop.interpolation.value))


def crop_and_flip(crop: transforms.RandomResizedCrop, augment: str, finish: Callable[[Tensor], Tensor]) -> Any:
    """A transform of one crop by --augment tensor or device; finish: as in `CropOnDevice`."""
    if augment == "device":
        return CropOnDevice(crop, finish)
    size, scale, ratio = crop.size, crop.scale, crop.ratio
    faster = TensorCrop(size, scale, ratio, crop.interpolation)  # type: ignore[arg-type]
    return transforms.Compose([faster, transforms.RandomHorizontalFlip(), finish])
