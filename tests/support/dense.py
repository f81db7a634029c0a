"""Small images with masks, in ADE20K's folders."""

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("sky", "wall", "floor")


def masked_images(root: Path, train: int = 7, val: int = 3, layout: str = "ade20k") -> Path:
    """Images of horizontal bands in the colour of their class, 1 to 3 in the masks, 0 in a corner; sizes differ."""
    splits = {"ade20k": ("annotations", "training", "validation"), "own": ("masks", "train", "val")}
    masks, *names = splits[layout]
    rng = np.random.default_rng(0)
    for split, count in zip(names, (train, val), strict=True):
        for kind in ("images", masks):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            height, width = 40 + 4 * index, 52 - 2 * index
            mask = np.repeat(rng.integers(1, 4, (height // 8 + 1, 1)), 8, axis=0)[:height].repeat(width, axis=1)
            mask[:5, :7] = 0
            colour = 60 * mask[..., None] + rng.integers(0, 50, (height, width, 3))
            Image.fromarray(np.uint8(colour)).save(root / "images" / split / f"{index}.jpg")
            Image.fromarray(np.uint8(mask)).save(root / masks / split / f"{index}.png")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root
