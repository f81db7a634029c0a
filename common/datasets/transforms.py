"""From PIL images to normalised tensors: training and evaluation transforms that several methods share."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.transforms import MaybeToTensor
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF
from torchvision.transforms.v2.functional import resize

from common.distributed import constant, log

IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)
COLOUR_STEPS = ("RandAugment", "AutoAugment", "AugMixAugment", "ColorJitter")  # of timm's training transform


class RandomResizedCrop(transforms.RandomResizedCrop):
    """torchvision's crop with a single attempt: a box too large is clipped to the image, never redrawn."""

    @staticmethod
    def get_params(img: Any, scale: list[float], ratio: list[float]) -> tuple[int, int, int, int]:
        width, height = TF.get_image_size(img)
        area = width * height * torch.empty(1).uniform_(scale[0], scale[1]).item()
        log_ratio = torch.log(torch.tensor(ratio))
        aspect = torch.exp(torch.empty(1).uniform_(float(log_ratio[0]), float(log_ratio[1]))).item()
        w = min(round(math.sqrt(area * aspect)), width)
        h = min(round(math.sqrt(area / aspect)), height)
        i = int(torch.randint(0, height - h + 1, (1,)))
        j = int(torch.randint(0, width - w + 1, (1,)))
        return i, j, h, w


class TensorCrop(transforms.RandomResizedCrop):
    """torchvision's crop with the same draws, resized in uint8 by torch: faster than Pillow, a few values differ."""

    def forward(self, img: Image.Image) -> Tensor:
        top, left, height, width = self.get_params(img, self.scale, self.ratio)  # type: ignore[arg-type]
        pixels = torch.from_numpy(np.array(img.crop((left, top, left + width, top + height)))).permute(2, 0, 1)
        return resize(pixels, self.size, self.interpolation).contiguous()  # type: ignore[arg-type]


def _posterize(img: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """Keeping 0 bits gives black, as Pillow computed before version 13 refused it."""
    return posterize(img, bits_to_keep, **kwargs) if bits_to_keep > 0 else Image.new(img.mode, img.size)


def repair_posterize(policy: Any) -> Any:
    """Let a timm augmentation policy keep 0 bits of an image; returns it."""
    for op in getattr(policy, "ops", None) or [op for part in getattr(policy, "policy", []) for op in part]:
        if isinstance(op, AugmentOp) and op.aug_fn is posterize:
            op.aug_fn = _posterize
    return policy


class Colours:
    """A step that changes colours of Pillow's images; those in tensors pass by, after the same random draws.

    tensors: it can change tensors of three channels, too.
    """

    def __init__(self, step: Callable, tensors: bool = False):
        self.step, self.tensors = step, tensors

    def __call__(self, image: Any) -> Any:
        if isinstance(image, Image.Image) or (self.tensors and len(image) == 3):
            return self.step(image)
        self.step(Image.new("RGB", (1, 1)))
        return image


def photos_only(step: Any, in_chans: int | None = None) -> Callable:
    """A step that changes colours; with --in_chans, where images may be tensors, one that they pass by."""
    if not in_chans:
        return step
    log(f"{type(step).__name__}: left out for images of other than three 8-bit channels")
    return Colours(step)


def change_colours(step: Callable, image: Any) -> Any:
    """step(image), with the same draws and values, but without detours of `ColorJitter` for 8-bit RGB images.

    Tensors of other than three channels pass by, after the same draws.
    """
    if isinstance(image, Tensor):
        return Colours(step, tensors=True)(image)
    if isinstance(step, transforms.RandomApply) and step.p < torch.rand(1):
        return image
    if isinstance(step, (transforms.Compose, transforms.RandomApply)):
        for part in step.transforms:
            image = change_colours(part, image)
        return image
    return _jitter(step, image) if isinstance(step, transforms.ColorJitter) else step(image)


def _jitter(step: transforms.ColorJitter, image: Image.Image) -> Image.Image:
    ranges: list[Any] = [step.brightness, step.contrast, step.saturation, step.hue]
    order, brightness, contrast, saturation, hue = step.get_params(*ranges)
    for change in order.tolist():
        if change == 0 and brightness is not None:
            image = Image.blend(Image.new("RGB", image.size), image, brightness)
        elif change == 1 and contrast is not None:
            grey = int(np.asarray(image.convert("L")).mean() + 0.5)
            image = Image.blend(Image.new("RGB", image.size, (grey, grey, grey)), image, contrast)
        elif change == 2 and saturation is not None:
            image = Image.blend(image.convert("L").convert("RGB"), image, saturation)
        elif change == 3 and hue is not None:
            shift = Image.new("HSV", image.size, (int(255 * hue) % 256, 0, 0))
            image = ImageChops.add_modulo(image.convert("HSV"), shift).convert("RGB")
    return image


def floats(pixels: Tensor) -> Tensor:
    """uint8 -> float32 from 0 to 1, on any device with the bits of torchvision's `ToTensor`; floats stay."""
    # A GPU would multiply by the reciprocal of a plain number.
    return pixels if pixels.is_floating_point() else pixels.float() / constant((255.0,), pixels.device)


class Normalize:
    """What `ToTensor` and `Normalize` make of pixels (..., C, H, W), with the same bits, for batches on any device."""

    def __init__(self, mean: Any, std: Any):
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, pixels: Tensor) -> Tensor:
        mean, std = (constant(values, pixels.device)[:, None, None] for values in (self.mean, self.std))
        return (floats(pixels) - mean).div_(std)


def halves(transform: Any) -> tuple[Callable, Callable]:
    """A transform as two: of an image, to pixels in uint8, and of their batch on its device, to what the network takes.

    It says how by a method `halves`, or is a `Compose` that ends with our `Normalize`, or with torchvision's after
    `ToTensor`; any other one is returned as it is, with a second half that does nothing.
    """
    if hasattr(transform, "halves"):
        return transform.halves()
    steps = getattr(transform, "transforms", [])
    if steps and isinstance(steps[-1], Normalize):
        return transforms.Compose(steps[:-1]), steps[-1]
    if [type(step) for step in steps[-2:]] == [transforms.ToTensor, transforms.Normalize]:
        return transforms.Compose([*steps[:-2], transforms.PILToTensor()]), Normalize(steps[-1].mean, steps[-1].std)
    return transform, unchanged


def unchanged(batch: Any) -> Any:
    return batch


def tensor_and_normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD, in_chans: int | None = None) -> list[Callable]:
    """in_chans: given where images may be tensors already."""
    return [MaybeToTensor() if in_chans else transforms.ToTensor(), transforms.Normalize(mean, std)]


def probe_transform(
    input_size: int = 224, mean=IMAGENET_MEAN, std=IMAGENET_STD, in_chans: int | None = None
) -> transforms.Compose:
    """Training transform of linear probing: one-attempt crop of 8-100 % and a flip."""
    crop = RandomResizedCrop(input_size, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *tensor_and_normalize(mean, std, in_chans)])


def finetune_transform(
    input_size: int,
    color_jitter: float | None = None,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    interpolation: str = "bicubic",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    crop_min_size: float = 0.08,
    hflip: float = 0.5,
    in_chans: int | None = None,
) -> Any:
    """timm's training transform: crop, flip, RandAugment, normalise, random erasing.

    in_chans: given where images may be tensors, whose colours stay.
    """
    if in_chans and interpolation == "lanczos":
        interpolation = "bicubic"  # the sharpest one of tensors
    if (in_chans or 3) != 3 and (aa or color_jitter):
        log("augmentation policy and colour jitter: left out, they are for three channels")
        aa = color_jitter = None
    transform: Any = create_transform(
        input_size=input_size,
        is_training=True,
        scale=(crop_min_size, 1.0),
        hflip=hflip,
        color_jitter=color_jitter,  # type: ignore[arg-type]  # None: no jitter
        auto_augment=aa or None,
        interpolation=interpolation,
        re_prob=reprob,
        re_mode=remode,
        re_count=recount,
        mean=mean,
        std=std,
    )
    for i, step in enumerate(transform.transforms):
        repair_posterize(step)
        if type(step).__name__ in COLOUR_STEPS:
            transform.transforms[i] = photos_only(step, in_chans)
    return transform


def eval_transform(
    input_size: int = 224,
    crop_pct: float | None = None,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    in_chans: int | None = None,
) -> transforms.Compose:
    """Shorter side to input_size / crop_pct, centre crop, normalise. crop_pct: default 0.875, above 224 pixels 1."""
    shorter = int(input_size / (crop_pct or (224 / 256 if input_size <= 224 else 1)))
    resize = transforms.Resize(shorter, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(input_size), *tensor_and_normalize(mean, std, in_chans)])
