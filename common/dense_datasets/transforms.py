"""Resizes of the dense recipes, as OpenCV computes them.

Images are (3, H, W) uint8 RGB, labels (..., H, W) uint8, sizes (height, width) in pixels.
"""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from common.datasets import IMAGENET_MEAN, IMAGENET_STD

Size = tuple[int, int]


def keep_ratio_size(size: Size, scale: Size) -> Size:
    """The largest size of the same proportions whose long and short side are within those of `scale`."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def resize_image(image: Tensor, size: Size) -> Tensor:
    """Bilinear, half-pixel centres, without antialias."""
    return TF.resize(image, list(size), antialias=False)


def resize_labels(labels: Tensor, size: Size) -> Tensor:
    """Nearest in the last two dimensions: pixel i of n is that at floor(i * old / n)."""
    rows, columns = (torch.arange(new) * old // new for new, old in zip(size, labels.shape[-2:], strict=True))
    return labels[..., rows[:, None], columns]


def normalize(image: Tensor) -> Tensor:
    """Float, by ImageNet's mean and deviation."""
    return TF.normalize(TF.to_dtype(image, torch.float32, scale=True), list(IMAGENET_MEAN), list(IMAGENET_STD))
