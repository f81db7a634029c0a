"""Pictures of reconstructions: targets, what was visible of them, predictions."""

from pathlib import Path

import numpy as np
import torch
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


def reconstruction_grid(
    rows: Tensor, in_chans: int | None = None, mean=datasets.IMAGENET_MEAN, std=datasets.IMAGENET_STD
) -> Tensor:
    """Rows of normalised images (3 n, C, H, W) as one picture (3, H', W') uint8; with in_chans as `shown` says."""
    if in_chans:
        rows, mean, std = rows[:, : 3 if in_chans > 2 else 1], (0.5,), (0.2,)
    grid = make_grid(rows.float(), nrow=len(rows) // 3, padding=2, pad_value=0)
    mean, std = (grid.new_tensor(x)[:, None, None] for x in (mean, std))
    return (255 * (grid * std + mean)).clamp(0, 255).to(torch.uint8)


# same as saim/figures.py
def shown(in_chans: int | None) -> str:
    """What `to_pixels` shows of images of --in_chans, to be printed below them; '' for photographs."""
    if not in_chans:
        return ""
    channels = "Channels 1, 2, 3 of {} as red, green, blue" if in_chans > 2 else "Channel 1 of {} as grey"
    return f"{channels.format(in_chans)}, from 2.5 deviations below the mean to 2.5 above it"


def save_reconstructions(
    path: Path, target: Tensor, pred: Tensor, mask: Tensor, title: str, in_chans: int | None = None, *statistics: tuple
) -> None:
    """Draw the rows of `reconstruction_rows`, with their names, into a PNG file; raises OSError.

    in_chans, statistics: as in `reconstruction_grid`.
    """
    from matplotlib.figure import Figure  # here, because importing it takes 0.4 s

    rows = reconstruction_rows(target, pred, mask).cpu()
    grid = reconstruction_grid(rows, in_chans, *statistics)
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.asarray(grid.permute(1, 2, 0)))
    axes.set_title(title)
    height, width = (side + 2 for side in rows.shape[-2:])  # with the gap of the grid
    axes.set_yticks([(i + 0.5) * height for i in range(3)], ["image", "visible", "predicted"])
    axes.set_xticks(
        [(i + 0.5) * width for i in range(len(rows) // 3)], [f"image {i + 1}" for i in range(len(rows) // 3)]
    )
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if in_chans:
        figure.supxlabel(shown(in_chans), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
