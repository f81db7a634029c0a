"""Images with masks: the resizes, crops and colours of the segmentation recipes, as OpenCV computes them.

Images are (3, H, W) uint8 RGB, or (N, H, W) float where they have other channels; labels (H, W) uint8 class indices,
sizes (height, width) in pixels.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from common.datasets import IMAGENET_MEAN, IMAGENET_STD

Size = tuple[int, int]
IGNORED = 255  # label of pixels that count in no loss and no score
ADE20K_SCALE = (2048, 512)  # longest long and short side


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


def _to_hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue 0 to 179, saturation and value 0 to 255, in the fixed-point arithmetic of OpenCV's 8-bit conversion."""
    r, g, b = image.int()
    value = image.amax(0).int()
    span = value - image.amin(0).int()
    sectors = torch.where(value == r, g - b, torch.where(value == g, b - r + 2 * span, r - g + 4 * span))
    levels = torch.arange(1, 256, dtype=torch.float64)
    per_value = torch.cat([torch.zeros(1), 255 * 4096 / levels]).round().int()
    per_span = torch.cat([torch.zeros(1), 180 * 4096 / (6 * levels)]).round().int()
    saturation = (span * per_value[value] + 2048) >> 12
    hue = (sectors * per_span[span] + 2048) >> 12
    return torch.where(hue < 0, hue + 180, hue), saturation, value


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    sector = hue / 30
    part, v, s = sector % 1, value / 255, saturation / 255
    p, q, t = v * (1 - s), v * (1 - s * part), v * (1 - s * (1 - part))
    by_sector = torch.stack([v, q, p, p, t, v])  # of red; green and blue run two and four sectors behind
    channels = [by_sector.gather(0, (sector.long() - shift)[None] % 6)[0] for shift in (0, 2, 4)]
    return (torch.stack(channels) * 255).round().to(torch.uint8)


def _scaled(values: Tensor, factor: float = 1.0, shift: float = 0.0) -> Tensor:
    """factor * values + shift, clipped to 8 bits and truncated."""
    return (values.float() * factor + shift).clamp(0, 255).to(torch.uint8)


def distort(image: Tensor, steps: list[tuple[str, float]]) -> Tensor:
    """Photometric distortion: (name, amount) in order; brightness is added, contrast and saturation are factors, hue is
    a whole number of half circles / 180."""
    for name, amount in steps:
        if name == "brightness":
            image = _scaled(image, shift=amount)
        elif name == "contrast":
            image = _scaled(image, amount)
        else:
            hue, saturation, value = _to_hsv(image)
            if name == "saturation":
                saturation = _scaled(saturation, amount)
            else:
                hue = (hue + int(amount)) % 180
            image = _to_rgb(hue, saturation, value)
    return image


def draw_distortion() -> list[tuple[str, float]]:
    """Each step with probability 1/2; contrast is changed before the colours or after them."""

    def sometimes(name: str, amount: float) -> list[tuple[str, float]]:
        return [(name, amount)] if random.random() < 0.5 else []

    brightness = sometimes("brightness", random.uniform(-32, 32))
    contrast = sometimes("contrast", random.uniform(0.5, 1.5))
    colours = sometimes("saturation", random.uniform(0.5, 1.5)) + sometimes("hue", random.randint(-18, 17))
    return brightness + (contrast + colours if random.random() < 0.5 else colours + contrast)


def draw_crop(labels: Tensor, size: Size, cat_max_ratio: float = 0.75) -> tuple[slice, slice]:
    """Rows and columns of a crop, at most `size`.

    Redrawn up to ten times while one class has at least `cat_max_ratio` of the valid pixels; the last draw counts.
    """
    for attempt in range(11):
        firsts = [random.randint(0, max(old - new, 0)) for old, new in zip(labels.shape, size, strict=True)]
        rows, columns = (slice(first, first + new) for first, new in zip(firsts, size, strict=True))
        counts = torch.bincount(labels[rows, columns].flatten(), minlength=IGNORED + 1)[:IGNORED]
        if cat_max_ratio == 1 or attempt == 10 or (counts.max() < counts.sum() * cat_max_ratio):
            break
    return rows, columns


def pixels_of(image: Image.Image | Tensor) -> Tensor:
    """An RGB image as uint8; floats as they are."""
    return image if isinstance(image, Tensor) else TF.pil_to_tensor(image)


def normalize(image: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Float, by the mean and deviation of each channel."""
    return TF.normalize(TF.to_dtype(image, torch.float32, scale=True), list(mean), list(std))


def to_picture(image: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """A normalised image (N, H, W) as (3, H, W) from 0 to 1.

    By other statistics than ImageNet's it is shown from 2.5 deviations below the mean to 2.5 above it: the first three
    channels as red, green and blue, of fewer the first as grey.
    """
    if tuple(mean) != IMAGENET_MEAN:
        image, mean, std = image[: 3 if len(image) > 2 else 1].expand(3, -1, -1), (0.5,), (0.2,)
    scale, shift = (image.new_tensor(x)[:, None, None] for x in (std, mean))
    return (image * scale + shift).clamp(0, 1)


class TrainTransform:
    """A random view of an image with its labels: resize, crop, flip, colours, normalise, pad at right and bottom.

    Args:
        size: of the result. scale: longest long and short side at ratio 1. ratio: range of the random factor on it.
        cat_max_ratio: largest share of one class in a crop. statistics: mean and deviation of each channel.
    """

    def __init__(
        self,
        size: Size,
        scale: Size = ADE20K_SCALE,
        ratio: tuple[float, float] = (0.5, 2),
        cat_max_ratio: float = 0.75,
        statistics: Sequence[Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD),
    ):
        self.size, self.scale, self.ratio, self.cat_max_ratio = size, scale, ratio, cat_max_ratio
        self.statistics = statistics

    def __call__(self, image: Image.Image | Tensor, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels, classes = pixels_of(image), torch.from_numpy(labels)
        ratio = random.uniform(*self.ratio)
        size = keep_ratio_size(labels.shape, (int(self.scale[0] * ratio), int(self.scale[1] * ratio)))
        pixels, classes = resize_image(pixels, size), resize_labels(classes, size)
        rows, columns = draw_crop(classes, self.size, self.cat_max_ratio)
        pixels, classes = pixels[:, rows, columns], classes[rows, columns]
        if random.random() < 0.5:
            pixels, classes = pixels.flip(-1), classes.flip(-1)
        steps = draw_distortion()  # of RGB
        pixels = normalize(distort(pixels, steps) if pixels.dtype == torch.uint8 else pixels, *self.statistics)
        pad = [0, 0, self.size[1] - classes.shape[1], self.size[0] - classes.shape[0]]
        return TF.pad(pixels, pad), TF.pad(classes[None], pad, fill=IGNORED)[0]


class EvalTransform:
    """The whole image, resized and normalised, once per ratio; labels keep their size.

    Args:
        scale: longest long and short side at ratio 1. statistics: mean and deviation of each channel.
    """

    def __init__(
        self,
        scale: Size = ADE20K_SCALE,
        ratios: tuple[float, ...] = (1.0,),
        statistics: Sequence[Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD),
    ):
        self.scale, self.ratios, self.statistics = scale, ratios, statistics

    def __call__(self, image: Image.Image | Tensor, labels: np.ndarray) -> tuple[list[Tensor], Any]:
        pixels = pixels_of(image)
        sizes = [keep_ratio_size(labels.shape, (int(self.scale[0] * r), int(self.scale[1] * r))) for r in self.ratios]
        views = [normalize(resize_image(pixels, size), *self.statistics) for size in sizes]
        return views, torch.from_numpy(labels)
