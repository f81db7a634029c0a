"""What both visualizers need: choosing and reading images, pixels for the eye, writing files."""

import argparse
import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import datasets
from common.distributed import UserError, flag_groups


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which images to draw, on what device and where to."""
    groups = flag_groups(parser)
    groups.data.add_argument("--images", nargs="+", default=[], help="image files to draw")
    groups.data.add_argument(
        "--data_path", default="", help="folder with val/<class>/<image>, or with images, in place of --images"
    )
    groups.data.add_argument(
        "--num_images", default=12, type=int, help="images to take from --data_path, spread over its classes"
    )
    groups.output.add_argument("--output_dir", default="./output_dir", help="folder of the PNG files")
    groups.process.add_argument(
        "--device", default="auto", help="auto (CUDA if present, else cpu), cpu, cuda or cuda:N"
    )


def spread(samples: list[tuple[str, int]], number: int, seed: int) -> list[str]:
    """Draw `number` paths of (path, class) samples, from every class in turn; sorted."""
    seen: Counter[int] = Counter()
    turns = []
    for path, target in random.Random(seed).sample(samples, len(samples)):
        turns.append((seen[target], path))
        seen[target] += 1
    turns.sort(key=lambda turn: turn[0])  # stable: classes in random order
    return sorted(path for _, path in turns[:number])


def chosen_images(args: argparse.Namespace, in_chans: int | None = None) -> list[str]:
    """The image files of the flags; in_chans: of the images of --data_path, as in `datasets.image_dataset`.

    Raises:
        UserError: the flags name none.
    """
    if bool(args.images) == bool(args.data_path):
        raise UserError("expected either --images FILE ... or --data_path FOLDER")
    if args.images:
        return args.images
    if args.num_images < 1:
        raise UserError(f"--num_images {args.num_images}: expected at least 1")
    dataset = datasets.image_dataset(args.data_path, train=False, labelled=False, in_chans=in_chans)
    return spread(dataset.samples, args.num_images, args.seed)


def read_images(
    paths: list[str],
    input_size: int,
    in_chans: int | None = None,
    mean=datasets.IMAGENET_MEAN,
    std=datasets.IMAGENET_STD,
) -> Tensor:
    """Images through the validation transform, (N, C, input_size, input_size); C is 3, or in_chans.

    Raises:
        UserError: a file is no image.
    """
    transform = datasets.eval_transform(input_size, None, mean, std, in_chans)
    images = []
    for path in paths:
        try:
            images.append(transform(datasets.read_image(path, in_chans)))
        except Exception as error:  # Pillow raises many types for damaged files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path}: unreadable image ({reason})") from error
    return torch.stack(images)


def to_pixels(
    imgs: Tensor, in_chans: int | None = None, mean=datasets.IMAGENET_MEAN, std=datasets.IMAGENET_STD
) -> np.ndarray:
    """Undo the normalisation: (N, C, H, W) -> (N, H, W, 3) uint8; with in_chans as `shown` says."""
    if in_chans:
        imgs, mean, std = imgs[:, : 3 if in_chans > 2 else 1], (0.5,), (0.2,)
    mean, std = (imgs.new_tensor(x)[:, None, None] for x in (mean, std))
    pixels = (imgs * std + mean).clamp(0, 1) * 255
    return pixels.round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def shown(in_chans: int | None) -> str:
    """What `to_pixels` shows of images of --in_chans, to be printed below them; '' for photographs."""
    if not in_chans:
        return ""
    channels = "Channels 1, 2, 3 of {} as red, green, blue" if in_chans > 2 else "Channel 1 of {} as grey"
    return f"{channels.format(in_chans)}, from 2.5 deviations below the mean to 2.5 above it"


def enlarge(panel: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel of (H, W, ...) factor x factor times."""
    return panel.repeat(factor, axis=0).repeat(factor, axis=1)


def save_row(path: Path, panels: list[np.ndarray], least: int = 128, gap: int = 4) -> None:
    """Write equally large panels (H, W, 3) side by side, enlarged to at least `least` pixels, white between them."""
    factor = -(-least // len(panels[0]))
    panels = [enlarge(panel, factor) for panel in panels]
    white = np.full((len(panels[0]), gap, 3), 255, np.uint8)
    Image.fromarray(np.hstack([part for panel in panels for part in (white, panel)][1:])).save(path)


@contextlib.contextmanager
def writing(folder: str) -> Iterator[Path]:
    """Create folder for the files that are written inside.

    Raises:
        UserError: it cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror})") from error
