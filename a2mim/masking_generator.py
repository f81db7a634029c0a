"""Random masks in blocks of pixels, and masked pixels that take the mean colour of their image.

A2MIM (arXiv 2205.13943), Fig. 3: masked pixels are filled with the image's mean RGB. Training draws masks where it
reads images (`BlockwiseMaskGenerator.mask`) and fills on the device (`fill_mean`).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def mask_to_pixels(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """A mask of cells (..., h, w) repeated to pixels (..., 1, H, W), of the same type.

    Args:
        size: (H, W) in pixels, multiples of h, w.
    Raises:
        ValueError: they are not.
    """
    if size[0] % mask.shape[-2] or size[1] % mask.shape[-1]:
        raise ValueError(f"a mask of {tuple(mask.shape[-2:])} cells does not divide an image of {tuple(size)} pixels")
    rows, columns = size[0] // mask.shape[-2], size[1] // mask.shape[-1]
    return mask.repeat_interleave(rows, -2).repeat_interleave(columns, -1).unsqueeze(-3)


def fill_mean(imgs: Tensor, mask: Tensor) -> Tensor:
    """Set masked pixels to the mean colour of their image, over all its pixels, the masked ones included.

    Args:
        imgs: (..., C, H, W) float. mask: (..., h, w), 1 = masked; H, W are multiples of h, w.
    """
    return torch.where(mask_to_pixels(mask.bool(), imgs.shape[-2:]), imgs.mean(dim=(-2, -1), keepdim=True), imgs)


class BlockwiseMaskGenerator:
    """Draws masks of square blocks from NumPy's global generator, one permutation per image.

    Args:
        input_size: image side in pixels. mask_patch_size: side of a block in pixels.
        model_patch_size: pixels per cell of the mask, the stride of the features that it meets.
        mask_ratio: share of the blocks to mask, rounded up.
        mask_only: leave the image as it is.
        mask_color: mean fills the masked pixels with the image's mean colour, zero leaves the image as it is.
    Raises:
        ValueError: the sizes do not divide each other, or the colour is unknown.
    """

    def __init__(
        self,
        input_size: int = 224,
        mask_patch_size: int = 32,
        model_patch_size: int = 16,
        mask_ratio: float = 0.6,
        mask_only: bool = False,
        mask_color: str = "zero",
    ):
        if input_size % mask_patch_size or mask_patch_size % model_patch_size:
            raise ValueError(
                f"input_size {input_size}, mask_patch_size {mask_patch_size} and model_patch_size {model_patch_size}: "
                "expected each to be a multiple of the next"
            )
        if mask_color not in ("mean", "zero"):
            raise ValueError(f"mask_color {mask_color}: expected mean or zero")
        self.side = input_size // mask_patch_size
        self.scale = mask_patch_size // model_patch_size
        self.num_masked = int(np.ceil(self.side**2 * mask_ratio))
        self.fills = mask_color == "mean" and not mask_only

    def mask(self, perm: np.ndarray | None = None) -> np.ndarray:
        """A mask (h, w) int64, 1 = masked. perm: a permutation of the blocks, else drawn."""
        if perm is None:
            perm = np.random.permutation(self.side**2)  # noqa: NPY002 - the sample's seeded generator, as upstream
        mask = np.zeros(self.side**2, np.int64)
        mask[perm[: self.num_masked]] = 1
        return mask.reshape(self.side, self.side).repeat(self.scale, axis=0).repeat(self.scale, axis=1)

    def __call__(self, img: Any = None, perm: np.ndarray | None = None) -> tuple[Any, Any]:
        """The image, filled where it is masked, and its mask.

        Args:
            img: (C, H, W) float tensor, or what NumPy sees as (H, W, C) uint8, of which the visible pixels are filled.
                None: only a mask is drawn.
        Returns:
            image of the same kind, and mask (h, w) int64.
        """
        mask = torch.from_numpy(self.mask(perm))
        if img is None or not self.fills:
            return img, mask
        if isinstance(img, Tensor):
            return fill_mean(img, mask), mask
        pixels = torch.from_numpy(np.array(img)).permute(2, 0, 1).double()
        filled = fill_mean(pixels, 1 - mask)  # as upstream: an image of uint8 loses its visible pixels
        return filled.permute(1, 2, 0).numpy().astype(np.uint8), mask
