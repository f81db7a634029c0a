"""Pictures of reconstructions: targets, what was visible of them, predictions."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from a2mim.masking_generator import mask_to_pixels
from common import datasets


def reconstruction_rows(target: Tensor, pred: Tensor, mask: Tensor, n: int = 4) -> Tensor:
    """The first n targets, the same with masked pixels in the mean colour, and their predictions.

    Args:
        target, pred: (B, 3, H, W), normalised. mask: (B, h, w), 1 = masked.
    Returns:
        (3 min(n, B), 3, H, W).
    """
    pixels = mask_to_pixels(mask[:n], target.shape[-2:])
    return torch.cat([target[:n], target[:n] * (1 - pixels), pred[:n].to(target.dtype)])


def reconstruction_grid(rows: Tensor) -> Tensor:
    """Rows of normalised images (3 n, 3, H, W) as one picture (3, H', W') uint8."""
    grid = make_grid(rows.float(), nrow=len(rows) // 3, padding=2, pad_value=0)
    mean, std = (grid.new_tensor(x)[:, None, None] for x in (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD))
    return (255 * (grid * std + mean)).clamp(0, 255).to(torch.uint8)


def save_reconstructions(path: Path, target: Tensor, pred: Tensor, mask: Tensor, title: str) -> None:
    """Draw the rows of `reconstruction_rows` into a PNG file; raises OSError."""
    grid = reconstruction_grid(reconstruction_rows(target, pred, mask).cpu())
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.asarray(grid.permute(1, 2, 0)))
    axes.set_title(title)
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
