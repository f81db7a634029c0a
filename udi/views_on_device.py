"""UDI's views made on the device, for a whole batch: draws and correspondence maps are those of `udi_augmentation`.

Values are whole numbers from 0 to 255, rounded as Pillow rounds them.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import datasets
from common.datasets.device import levels, separable, stacks, weights
from udi import udi_augmentation
from udi.udi_augmentation import Array, DataAugmentation, Matches, Photometric, RandomCropCoord, Sample

# What is drawn for a view, as columns of an array: box i, j, h, w and flips; the order of brightness 0, contrast 1,
# saturation 2 and hue 3 (-1: none), and how much of each; greyscale, radius of the blur, solarisation.
FLIP, ORDER, AMOUNT, GREY, RADIUS, SOLARIZE = 4, 6, 10, 14, 15, 16


class DrawnCrop(RandomCropCoord):
    """Draws a view without making it."""

    def __call__(self, img: Any, ref_crop: Array | None = None) -> tuple[list[float], Array]:
        box, flips, crop = self.draw(img, ref_crop)
        return [*box, *flips], crop


class DrawnPhotometric(Photometric):
    """Draws the colours of a view; in place of its image it takes, and prolongs, what is drawn already."""

    def __call__(self, img: list[float]) -> list[float]:
        steps: list[Any] = self.colour.transforms
        (apply, grey), jitter = steps, steps[0].transforms[0]
        order, amounts = [-1] * 4, [0.0] * 4
        if not apply.p < torch.rand(1):
            found, *amounts = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
            order = found.tolist()
        to_grey = bool(torch.rand(1) < grey.p)
        if random.random() < 0.5:
            return [*img, *order, *amounts, to_grey, self.radius(0.5 if random.random() < 0.5 else 1.0), False]
        return [*img, *order, *amounts, to_grey, self.radius(0.1), random.random() < 0.2]


class AugmentationOnDevice(DataAugmentation):
    """Loader processes decode an image and draw its views; `halves` makes those of a batch on the device.

    Args:
        as `DataAugmentation`.
    """

    CROP, PHOTOMETRIC = DrawnCrop, DrawnPhotometric

    def sample(self, img: Any, views: list[Any], matches: list[Matches]) -> Sample:
        return Sample([datasets.decoded(img), np.array(views)], matches)

    def halves(self) -> tuple[Callable, Callable]:
        return self, self.finish

    @torch.no_grad()
    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of `collate_on_device` with its views: crops as `udi_augmentation.collate` has them."""
        images, draws = batch["crops"]
        views: list[list[Tensor]] = [[] for _ in draws[0]]
        for part, stack in stacks(images):
            for k, crops in enumerate(views):
                crops.append(cropped(stack, draws[part, k], (self.crop_g if k < 2 else self.crop_l).size))
        crops: list[Tensor] = []
        for group in (slice(0, 2), slice(2, None)):
            if views[group]:
                joined = torch.cat([torch.cat(parts) for parts in views[group]])
                numbers = draws[:, group].swapaxes(0, 1).reshape(len(joined), -1)
                crops += photometric(joined, numbers).to(torch.uint8).chunk(len(views[group]))
        if self.statistics:
            crops = [datasets.Normalize(*self.statistics[:2])(crop) for crop in crops]
        return {**batch, "crops": crops}


def collate_on_device(samples: list[Sample]) -> dict[str, Any]:
    """As `udi_augmentation.collate`, but crops are the packed images and what was drawn for their views (B, V, 17)."""
    draws = np.stack([sample.views[1] for sample in samples])
    batch = udi_augmentation.collate([sample._replace(views=sample.views[:1]) for sample in samples])
    return {**batch, "crops": [batch["crops"][0], draws]}


def on(device: torch.device, values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of the host on a device, without a wait."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def cropped(images: Tensor, draws: Any, size: int) -> Tensor:
    """One view (B, 3, size, size) of each image (B, 3, H, W)."""
    top, left, height, width = on(images.device, draws[:, :4].T)
    horizontal, vertical = on(images.device, draws[:, FLIP : FLIP + 2].T, torch.bool)
    rows = weights(top, height, vertical, images.shape[2], size, "bicubic")
    columns = weights(left, width, horizontal, images.shape[3], size, "bicubic")
    return separable(images, rows, columns)


# ---- colours: of images x (n, 3, H, W), by amounts (n, 1, 1, 1)


def luma(x: Tensor) -> Tensor:
    """Pillow's grey, (n, 1, H, W)."""
    red, green, blue = x.split(1, dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor()


def blend(base: Any, x: Tensor, amount: Tensor) -> Tensor:
    return (base + amount * (x - base)).clamp(0, 255).floor()


def contrast(x: Tensor, amount: Tensor) -> Tensor:
    return blend((luma(x).mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor(), x, amount)


def hue(x: Tensor, amount: Tensor) -> Tensor:
    """Turn the hue by a share of the circle, in 8 bits each of hue, saturation and value."""
    value, least = x.amax(dim=1), x.amin(dim=1)
    chroma = value - least
    red, green, blue = ((value[:, None] - x) / chroma.clamp(min=1)[:, None]).unbind(1)
    angle = torch.where(x[:, 0] == value, blue - green, torch.where(x[:, 1] == value, 2 + red - blue, 4 + green - red))
    angle = (angle % 6 * 42.5).floor() * (chroma > 0)
    saturation = (chroma / value.clamp(min=1) * 255).floor() / 255
    angle = (angle + (255 * amount[:, 0]).trunc()) % 256 * 6 / 255
    sector = angle.floor()
    rest = angle - sector
    p, q, t = ((value * (1 - saturation * share) + 0.5).floor() for share in (torch.ones_like(rest), rest, 1 - rest))
    found = []
    for turn in (0, 4, 2):  # red, green, blue
        k = (sector + turn) % 6
        low = torch.where(k == 1, q, torch.where(k == 4, t, p))
        found.append(torch.where((k == 0) | (k == 5), value, low))
    return torch.stack(found, dim=1)


CHANGES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, amount: blend(0, x, amount),
    contrast,
    lambda x, amount: blend(luma(x), x, amount),
    hue,
]


def blur(x: Tensor, radius: Any) -> Tensor:
    """Pillow's Gaussian blur: three times the mean over a box, along rows, then along columns; radius (n,), numpy."""
    variance = np.asarray(radius) ** 2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    side, reach = x.shape[-1], int(whole.max()) + 1
    place = torch.arange(side, device=x.device)
    rows = x.new_zeros(len(x), side, side)
    for step in range(-reach, reach + 1):
        share = np.clip(whole + part + 1 - abs(step), 0, 1) / (2 * (whole + part) + 1)
        shown = ((place + step).clamp(0, side - 1)[:, None] == place).float()
        rows += on(x.device, share)[:, None, None] * shown
    rows = rows[:, None]
    for _ in range(3):
        x = levels(x @ rows.mT)
    for _ in range(3):
        x = levels(rows @ x)
    return x


def photometric(x: Tensor, draws: Any) -> Tensor:
    """Views (n, 3, H, W) in colours that were drawn for them, (n, 17)."""

    def change(chosen: Any, of: Callable[[Tensor, Any], Tensor]) -> None:
        """Change the views that are chosen, (n,) bool on the host."""
        if chosen.any():
            index = on(x.device, np.flatnonzero(chosen), torch.int64)
            x.index_copy_(0, index, of(x.index_select(0, index), draws[chosen]))

    for slot in range(4):
        for which, step in enumerate(CHANGES):
            amounts = lambda d, which=which: on(x.device, d[:, AMOUNT + which])[:, None, None, None]  # noqa: E731
            change(draws[:, ORDER + slot] == which, lambda y, d, f=step, amounts=amounts: f(y, amounts(d)))
    change(draws[:, GREY] > 0, lambda y, _: luma(y).expand_as(y))
    change(draws[:, RADIUS] > 0, lambda y, d: blur(y, d[:, RADIUS]))
    change(draws[:, SOLARIZE] > 0, lambda y, _: torch.where(y < 128, y, 255 - y))
    return x
