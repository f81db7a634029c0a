"""Views of images with objects, for training and evaluation; boxes and masks move with their image.

Images are (3, H, W) uint8 RGB, or (N, H, W) float where they have other channels; targets and sizes as in `detection`.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.datasets import IMAGENET_MEAN, IMAGENET_STD
from common.dense_datasets.detection import ImageInfo, Size
from common.dense_datasets.transforms import keep_ratio_size, normalize, pixels_of, resize_image, resize_labels

STRIDE = 32  # sides of padded images are multiples of this many pixels


def resized(image: Tensor, target: dict[str, Any], size: Size) -> tuple[Tensor, dict[str, Any]]:
    """The image (N, H, W) in another size, with its boxes and masks, where the target has them."""
    if "boxes" in target:
        scale = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]]).repeat(2)
        limits = torch.tensor([size[1], size[0]]).repeat(2)
        boxes = torch.minimum((target["boxes"] * scale).clamp(min=0), limits)
        target = {**target, "boxes": boxes, "masks": resize_labels(target["masks"], size)}
    return resize_image(image, size), target


def flipped(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Image, boxes and masks with left and right exchanged."""
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    boxes = torch.stack([image.shape[2] - x1, y0, image.shape[2] - x0, y1], 1)
    return image.flip(-1), {**target, "boxes": boxes, "masks": target["masks"].flip(-1)}


def cropped(image: Tensor, target: dict[str, Any], first: Size, size: Size) -> tuple[Tensor, dict[str, Any]]:
    """A part of the image; boxes are clipped to it, and objects without a box there go."""
    (top, left), (height, width) = first, size
    limits = torch.tensor([width, height]).repeat(2)
    boxes = torch.minimum((target["boxes"] - torch.tensor([left, top]).repeat(2)).clamp(min=0), limits)
    there = (boxes[:, 2:] > boxes[:, :2]).all(1)
    window = (..., slice(top, top + height), slice(left, left + width))
    return image[window], {
        **target,
        "boxes": boxes[there],
        "labels": target["labels"][there],
        "masks": target["masks"][there][window],
    }


def finished(
    image: Tensor, target: dict[str, Any], original: Size, statistics: Sequence[Sequence[float]]
) -> tuple[Tensor, tuple[ImageInfo, dict[str, Any]]]:
    """A normalised image and what `collate` needs of it; statistics: mean and deviation of each channel."""
    height, width = image.shape[1:]
    padded = (math.ceil(height / STRIDE) * STRIDE, math.ceil(width / STRIDE) * STRIDE)
    scale = (width / original[1], height / original[0])
    info = ImageInfo((height, width), padded, original, scale, target["image_id"])
    objects = {key: target[key] for key in ("boxes", "labels", "masks") if key in target}
    return normalize(image, *statistics), (info, objects)


class TrainTransform:
    """A random view of an image with its objects: flip and resize, sometimes of a part.

    Args:
        short_sides: one of these is drawn; the long side is at most `long_side`.
        crop_short_sides: half of the images are first resized to one of these and cropped (as DETR does); none: never.
        crop_range: smallest and largest side of that crop, if the image is so large.
        statistics: mean and deviation of each channel.
    """

    def __init__(
        self,
        short_sides: Sequence[int],
        long_side: int = 1333,
        crop_short_sides: Sequence[int] = (400, 500, 600),
        crop_range: tuple[int, int] = (384, 600),
        statistics: Sequence[Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD),
    ):
        self.short_sides, self.long_side, self.statistics = list(short_sides), long_side, statistics
        self.crop_short_sides, self.crop_range = list(crop_short_sides), crop_range

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Tensor, tuple[ImageInfo, dict[str, Any]]]:
        pixels = pixels_of(image)
        original = (pixels.shape[1], pixels.shape[2])
        if random.random() < 0.5:
            pixels, target = flipped(pixels, target)
        if self.crop_short_sides and random.random() < 0.5:
            pixels, target = self._resized(pixels, target, self.crop_short_sides)
            sides = [random.randint(*(min(side, limit) for limit in self.crop_range)) for side in pixels.shape[1:]]
            first = [random.randint(0, side - new) for side, new in zip(pixels.shape[1:], sides, strict=True)]
            pixels, target = cropped(pixels, target, (first[0], first[1]), (sides[0], sides[1]))
        pixels, target = self._resized(pixels, target, self.short_sides)
        return finished(pixels, target, original, self.statistics)

    def _resized(self, image: Tensor, target: dict[str, Any], short_sides: list[int]) -> tuple[Tensor, dict[str, Any]]:
        size = keep_ratio_size((image.shape[1], image.shape[2]), (self.long_side, random.choice(short_sides)))
        return resized(image, target, size)


class EvalTransform:
    """The whole image; short side `short_side`, or smaller where the long one would be above `long_side`.

    Args:
        statistics: mean and deviation of each channel.
    """

    def __init__(
        self,
        short_side: int = 800,
        long_side: int = 1333,
        statistics: Sequence[Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD),
    ):
        self.short_side, self.long_side, self.statistics = short_side, long_side, statistics

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Tensor, tuple[ImageInfo, dict[str, Any]]]:
        pixels = pixels_of(image)
        original = (pixels.shape[1], pixels.shape[2])
        size = keep_ratio_size(original, (self.long_side, self.short_side))
        return finished(*resized(pixels, target, size), original, self.statistics)
