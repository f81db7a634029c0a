"""CAE's pre-training augmentation: one crop of an image seen twice, by the encoder and by the tokenizer, and a mask."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF

from common import datasets

Mode = transforms.InterpolationMode
INTERPOLATIONS = {"bicubic": Mode.BICUBIC, "lanczos": Mode.LANCZOS, "hamming": Mode.HAMMING, "bilinear": Mode.BILINEAR}
HALF = (0.5, 0.5, 0.5)
RANGES: dict[str, tuple[float, float]] = {  # of flags, shares of an image's area
    "crop_min_size": (1e-6, 1.0),
    "crop_max_size": (1e-6, 1.0),
}


def interpolation_of(name: str) -> Mode:
    """A resampling by name; `random` draws bilinear or bicubic at each call.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "random":
        return random.choice((Mode.BILINEAR, Mode.BICUBIC))
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation {name}: expected one of {', '.join(INTERPOLATIONS)}, random")
    return INTERPOLATIONS[name]


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """A random box of the given share of the area and aspect ratio; after ten misses the central one.

    Returns:
        top, left, height, width. Draws come from Python's generator.
    """
    for _ in range(10):
        area = random.uniform(*scale) * width * height
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            top = random.randint(0, height - h)
            return top, random.randint(0, width - w), h, w
    shape = width / height
    w = round(height * ratio[1]) if shape > ratio[1] else width
    h = round(width / ratio[0]) if shape < ratio[0] else height
    return (height - h) // 2, (width - w) // 2, h, w


def of_tensors(mode: Mode) -> Mode:
    """The resampling itself, or the sharpest that tensors have in place of one that only Pillow has."""
    return mode if mode in (Mode.BILINEAR, Mode.BICUBIC) else Mode.BICUBIC


class PretrainAugmentation:
    """An image -> (image for the encoder, image for the tokenizer, mask): one crop of it, resized twice.

    It is a PIL image, or a tensor of any number of channels.

    Args:
        input_size, interpolation: side in pixels and resampling of the encoder's image, (3, input_size, input_size).
        second_size, second_interpolation: the same of the tokenizer's image.
        tokenizer_view: maps pixels in [0, 1] to what the tokenizer takes.
        masking: a masking generator; its mask comes as (N,) bool, True = masked.
        scale: smallest and largest share of the image's area that the crop covers.
        color_jitter: strength of changes in brightness, contrast and saturation; 0 leaves colours alone.
        mean, std: statistics by which the encoder's image is normalised.
        on_device: loader processes only change colours, flip and cut the crop out; batches are resized on the device.
    """

    def __init__(
        self,
        input_size: int,
        second_size: int,
        tokenizer_view: Callable[[Tensor], Tensor],
        masking: Callable,
        interpolation: str = "bicubic",
        second_interpolation: str = "lanczos",
        scale: tuple[float, float] = (0.08, 1.0),
        color_jitter: float = 0.0,
        mean=datasets.IMAGENET_MEAN,
        std=datasets.IMAGENET_STD,
        on_device: bool = False,
    ):
        for name in (interpolation, second_interpolation):
            interpolation_of(name)  # complain now
            if on_device and name == "random":
                raise ValueError("interpolation random: expected another one with --augment device")
        self.on_device = on_device
        self.sizes = ((input_size, interpolation), (second_size, second_interpolation))
        self.scale = scale
        jitter = [transforms.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter > 0 else []
        self.before = transforms.Compose([*jitter, transforms.RandomHorizontalFlip()])
        self.normalize = datasets.Normalize(mean, std)
        self.tokenizer_view = tokenizer_view
        self.masking = masking

    def __call__(self, img: Any) -> tuple[Tensor, Tensor, Tensor]:
        if self.on_device:
            view, token_view, mask = self._finish(datasets.collate_decoded([self._pixels(img)]))
            return view[0], token_view[0], mask[0]
        return self._finish(self._pixels(img))

    def halves(self) -> tuple[Callable, Callable]:
        """What loader processes do, and what happens to batches on the device."""
        return self._pixels, self._finish

    def _pixels(self, img: Any) -> tuple[Any, ...]:
        """The views before they are normalised, (C, s, s) in uint8, or of tensors in floats from 0 to 1, and the mask;
        `on_device` the crop and the mask."""
        for step in self.before.transforms:
            colours = isinstance(step, transforms.ColorJitter)
            img = datasets.change_colours(step, img) if colours else step(img)
        width, height = TF.get_image_size(img)
        top, left, height, width = crop_box(width, height, self.scale)
        if self.on_device:
            return datasets.decoded(img, (top, left, height, width)), self._mask()
        views = []
        for size, name in self.sizes:
            mode = of_tensors(interpolation_of(name)) if isinstance(img, Tensor) else interpolation_of(name)
            view = TF.resized_crop(img, top, left, height, width, [size, size], mode)
            views.append(view if isinstance(view, Tensor) else TF.pil_to_tensor(view))
        return *views, self._mask()

    def _mask(self) -> Tensor:
        return torch.from_numpy(self.masking()).flatten().bool()

    def _finish(self, made: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The views and the mask, of an image or of a batch, as network and tokenizer take them."""
        *views, mask = made
        if self.on_device:
            views = [datasets.resize_batch(views[0], size, name) for size, name in self.sizes]
        view, token_view = views
        return self.normalize(view), self.tokenizer_view(datasets.floats(token_view)), mask
