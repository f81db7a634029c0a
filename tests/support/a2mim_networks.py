"""Small networks of A2MIM with weights by seed, and those of full size without numbers."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from a2mim.backbones import insertion_stride
from a2mim.losses import MIMLoss
from a2mim.models_a2mim import (
    MaskedImageModel,
    build_classifier,
    build_masked,
)
from tests.support.helpers import ROOT, assert_close
from tests.support.recipes import without_numbers

CONFIGS = ROOT / "a2mim" / "configs" / "openmixup"
NANO = ("vit_nano", "resnet_nano", "convnext_nano")


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build()


def masked(backbone: str = "resnet_nano", loss: MIMLoss | None = None, img_size: int = 64, **keywords) -> Any:
    """A small pre-training network; the same weights for the same keywords."""
    return seeded(lambda: build_masked(backbone, loss or MIMLoss(), img_size, **keywords))


def classifier(backbone: str = "resnet_nano", num_classes: int = 7, img_size: int = 64, **keywords) -> Any:
    return seeded(lambda: build_classifier(backbone, num_classes, img_size, **keywords))


def randomised(model: Any) -> Any:
    """Every parameter and running statistic off its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape, generator=generator))
    return model


def encoder_of(model: Any) -> Any:
    return model.encoder if isinstance(model, MaskedImageModel) else model.net


def on_meta(build: Callable[[], Any]) -> Any:
    """A network of full size without numbers."""
    with without_numbers():
        return build()


@functools.cache
def full_encoder(name: str) -> Any:
    """A pre-training network of full size and without a mask token, on the meta device."""
    return on_meta(lambda: build_masked(name, MIMLoss(), mask_token="none"))


@functools.cache
def full_classifier(name: str) -> Any:
    """A classifier of ImageNet on the meta device."""
    return on_meta(lambda: build_classifier(name, 1000))


def shapes(state: dict[str, Tensor]) -> list[list]:
    return [[name, list(value.shape)] for name, value in state.items()]


DEPTHS = {"vit_nano": 4, "resnet_nano": 4, "convnext_nano": 4, "resnet18": 4, "resnet50": 4}
PLACES = [(name, depth) for name in NANO for depth in range(DEPTHS[name])]


def grid_of(name: str, depth: int, img_size: int = 64) -> int:
    return img_size // insertion_stride(name, depth)


def some_mask(name: str, depth: int, batch: int = 2) -> Tensor:
    side = grid_of(name, depth)
    mask = torch.zeros(batch, side * side, dtype=torch.long)
    for i in range(batch):
        mask[i, torch.randperm(side * side)[: max(1, side * side // 2)]] = 1
    return mask.view(batch, side, side)


def cells(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, C, h, w), or of a ViT (B, N or 1 + N, D), as (cells, C), and which of those are masked."""
    if x.ndim == 3:
        return x[:, -mask[0].numel() :].flatten(0, 1), mask.flatten().bool()
    return x.permute(0, 2, 3, 1).flatten(0, 2), mask.flatten().bool()


# ---- initial weights


def assert_normal(value: Tensor, std: float, what: str) -> None:
    """A normal distribution that is cut nowhere near (at 100 deviations, or not at all)."""
    n = value.numel()
    assert value.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n) + 0.01), what
    assert abs(value.mean().item()) < 5 * std / math.sqrt(n), what
    if n > 10_000:
        assert value.abs().max() > 3 * std, what


def assert_uniform(value: Tensor, bound: float, what: str) -> None:
    assert value.abs().max().item() <= bound * 1.0001, what
    if value.numel() >= 100:
        assert value.abs().max().item() > 0.9 * bound, what
        assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2), what


def assert_constant(value: Tensor, constant: float, what: str) -> None:
    assert_close(value, torch.full_like(value, constant), rtol=1e-6, atol=0, what=what)
