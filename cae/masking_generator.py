"""Which patches are masked: blocks as in BEiT, or at random. Draws come from Python's and NumPy's global generators.

Legend: G side of the patch grid, N = G² patches.
"""

import math
import random

import numpy as np
from numpy.typing import NDArray

TRIES = 10  # boxes drawn per block, upstream masking_generator.py@a7fd162
MAX_BLOCKS = 10_000  # ours: a guard against settings that no mask can meet


class MaskingGenerator:
    """Block-wise masks: rectangular blocks are added until exactly `num_masking_patches` patches are masked.

    Args:
        input_size: grid, (rows, columns) or the side of a square.
        min_num_patches, max_num_patches: smallest and largest number of patches in a block; None sets no largest.
        min_aspect: smallest ratio of a block's sides; the largest is its inverse.
    Raises:
        ValueError: the numbers do not fit the grid.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int,
        min_num_patches: int = 4,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
    ):
        self.height, self.width = (input_size, input_size) if isinstance(input_size, int) else input_size
        if not 1 <= num_masking_patches < self.height * self.width:
            raise ValueError(
                f"{num_masking_patches} masked patches, expected 1 to {self.height * self.width - 1} "
                f"of {self.height} x {self.width}"
            )
        self.num_masked = num_masking_patches
        self.min_num_patches = min_num_patches
        self.max_num_patches = num_masking_patches if max_num_patches is None else max_num_patches
        self.log_aspect = (math.log(min_aspect), math.log(1 / min_aspect))

    def _add_block(self, mask: NDArray[np.int8], most: int) -> int:
        """Mask one block of at most `most` new patches; returns their number, 0 if no box fitted."""
        for _ in range(TRIES):
            area = random.uniform(self.min_num_patches, most)
            aspect = math.exp(random.uniform(*self.log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            top, left = random.randint(0, self.height - height), random.randint(0, self.width - width)
            box = mask[top : top + height, left : left + width]
            new = int(box.size - box.sum())
            if 0 < new <= most:
                box[:] = 1
                return new
        return 0

    def __call__(self) -> NDArray[np.int8]:
        """A mask (rows, columns); 1 = masked.

        Raises:
            RuntimeError: no combination of blocks was found.
        """
        mask, count = np.zeros((self.height, self.width), np.int8), 0
        for _ in range(MAX_BLOCKS):
            if count == self.num_masked:
                return mask
            count += self._add_block(mask, min(self.num_masked - count, self.max_num_patches))
        raise RuntimeError(
            f"no blocks of {self.min_num_patches} to {self.max_num_patches} patches mask exactly "
            f"{self.num_masked} of {self.height} x {self.width}"
        )


class RandomMaskingGenerator:
    """Masks a share of the patches, each equally likely.

    Args:
        input_size: grid, (rows, columns) or the side of a square.
    Raises:
        ValueError: the ratio masks no patch, or all.
    """

    def __init__(self, input_size: int | tuple[int, int], mask_ratio: float):
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.num_patches = height * width
        self.num_masked = int(mask_ratio * self.num_patches)
        if not 1 <= self.num_masked < self.num_patches:
            raise ValueError(f"mask ratio {mask_ratio} masks {self.num_masked} of {self.num_patches} patches")

    def __call__(self) -> NDArray[np.float64]:
        """A mask (N,); 1 = masked."""
        mask = np.concatenate([np.zeros(self.num_patches - self.num_masked), np.ones(self.num_masked)])
        np.random.shuffle(mask)  # noqa: NPY002 - as upstream, the global generator
        return mask
