"""The mask of a video's first frame, carried on by the similarity of patches, without any training.

Legend: D width, p patch side, h x w patches of a frame, n frames of the context, C channels: background and objects.
"""

import math
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from common import datasets
from common.dense_datasets.transforms import resize_image
from common.distributed import UserError
from udi.davis_scores import VOID
from udi.models_udi import VisionTransformer

TEMPERATURE = 0.1
CHUNK = 2**22  # similarities that are held at once; more are slower on a CPU
MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)  # as upstream: 0.228


# ---- files


class Video(NamedTuple):
    """A video's frames and masks; masks may be there for the first frame alone."""

    name: str
    frames: list[Path]
    masks: list[Path]


class Mask(NamedTuple):
    """numbers: of objects, (H, W) uint8, 0 background. palette: colours as in a palette image, 3 values per number."""

    numbers: np.ndarray
    palette: list[int]


def read_videos(data_path: str) -> list[Video]:
    """The validation videos of DAVIS-2017, or of a folder like it.

    Raises:
        UserError: a list, folder or first mask is missing.
    """
    root, listing = Path(data_path), Path(data_path, "ImageSets", "2017", "val.txt")
    if not listing.is_file():
        raise UserError(
            f"--data_path {data_path}: has no file ImageSets/2017/val.txt, expected the folder of DAVIS-2017"
        )
    names, videos = listing.read_text("utf-8-sig").split(), []
    for name in names:
        frames = sorted((root / "JPEGImages" / "480p" / name).glob("*.jpg"))
        masks = [root / "Annotations" / "480p" / name / f"{frame.stem}.png" for frame in frames]
        if not frames:
            raise UserError(f"{root / 'JPEGImages' / '480p' / name}: no such folder, or no .jpg in it")
        if not masks[0].is_file():
            raise UserError(f"{masks[0]}: no such file, expected the mask of the first frame")
        videos.append(Video(name, frames, [mask for mask in masks if mask.is_file()]))
    if not videos:
        raise UserError(f"{listing}: names no video")
    return videos


def read_frame(path: Path) -> Tensor:
    """A frame (3, H, W) uint8.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return pil_to_tensor(datasets.read_image(path))
    except Exception as error:  # Pillow raises many types for damaged files
        raise UserError(f"{path}: unreadable image ({' '.join(str(error).split()) or type(error).__name__})") from error


def read_mask(path: Path) -> Mask:
    """An index mask; pixels that belong to no object count as background.

    Raises:
        UserError: it cannot be read, or is no image of indices.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # as above
        raise UserError(f"{path}: unreadable mask ({' '.join(str(error).split()) or type(error).__name__})") from error
    if image.mode not in ("P", "L"):
        raise UserError(f"{path}: is a mask in mode {image.mode}, expected numbers of objects (modes P, L)")
    numbers, palette = np.array(image), image.getpalette() or []
    return Mask(np.where(numbers == VOID, 0, numbers), palette + default_palette()[len(palette) :])


def default_palette() -> list[int]:
    """Colours of 256 numbers, three values each, as in VOC: a number's bits in turn go to red, green and blue."""
    colours, numbers = np.zeros((256, 3), np.uint8), np.arange(256)
    for bit in range(8):
        colours[:, bit % 3] |= ((numbers >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours.flatten().tolist()


def write_mask(mask: Mask, path: Path) -> None:
    """Write an index mask as PNG."""
    image = Image.fromarray(mask.numbers.astype(np.uint8), "P")
    image.putpalette(mask.palette)
    image.save(path)


# ---- sizes, masks and features


def scaled_size(height: int, width: int, short_side: int = 480) -> tuple[int, int]:
    """Height and width of a frame as the network sees it: the longer side is cut to a multiple of 64 pixels."""
    if height > width:
        return short_side * height // width // 64 * 64, short_side
    return short_side, short_side * width // height // 64 * 64


def color_normalize(frame: Tensor) -> Tensor:
    """A frame (3, H, W) with values from 0 to 1, normalised."""
    return (frame - frame.new_tensor(MEAN)[:, None, None]) / frame.new_tensor(STD)[:, None, None]


def to_one_hot(labels: Tensor) -> Tensor:
    """Numbers (1, h, w) of objects -> (1, C, h, w) float, C being one more than the highest."""
    return F.one_hot(labels.long()).permute(0, 3, 1, 2).float()


def norm_mask(mask: Tensor) -> Tensor:
    """Channels (C, H, W) stretched to 0 ... 1 each; what has one value only stays."""
    low, high = mask.flatten(1).aminmax(dim=1)
    stretched = (mask - low[:, None, None]) / (high - low)[:, None, None]
    return torch.where(((high > low) & (high > 0))[:, None, None], stretched, mask)


def nearest(numbers: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask resized without mixing its numbers."""
    return np.asarray(Image.fromarray(numbers).resize((width, height), Image.Resampling.NEAREST))


def patch_features(model: VisionTransformer, frame: Tensor) -> Tensor:
    """Normalised patch tokens (h w, D) of the last block, of a normalised frame (3, H, W)."""
    return model.get_intermediate_layers(frame[None])[0][0, model.num_class_token :]


# ---- propagation


def neighborhood(h: int, w: int, size: int, rows: Tensor) -> Tensor:
    """Which patches are at most `size` rows and columns away from some patches: (len(rows), h w) bool.

    rows: numbers of those, in raster order.
    """
    every = torch.arange(h * w, device=rows.device)
    far = [(rows.div(w, rounding_mode="floor")[:, None] - every // w).abs(), (rows[:, None] % w - every % w).abs()]
    return (far[0] <= size) & (far[1] <= size)


def label_propagation(
    feat_tar: Tensor,
    list_frame_feats: list[Tensor],
    list_segs: list[Tensor],
    h: int,
    w: int,
    size_mask_neighborhood: int = 12,
    topk: int = 5,
) -> Tensor:
    """The mask of a frame from those of others: each patch takes over what the patches most similar to it are.

    Args:
        feat_tar: (h w, D), the frame's features. list_frame_feats: n of (D, h w), of the context.
        list_segs: n of (1, C, h, w), soft masks of the context.
        size_mask_neighborhood: how many rows and columns away patches may be; 0: any number.
        topk: how many patches of the whole context count, and those that tie with the last.
    Returns:
        (1, C, h, w)
    """
    n, hw = len(list_frame_feats), h * w
    keys = F.normalize(torch.stack(list_frame_feats), dim=1).transpose(0, 1).flatten(1)  # (D, n h w)
    values = torch.cat([seg[0].flatten(1) for seg in list_segs], dim=1).T  # (n h w, C)
    queries, parts = F.normalize(feat_tar, dim=1), []
    for rows in torch.arange(hw, device=queries.device).split(max(1, CHUNK // (n * hw))):
        similarities = queries[rows] @ keys  # (m, n h w) of m patches
        if size_mask_neighborhood:
            far = ~neighborhood(h, w, size_mask_neighborhood, rows)
            similarities.unflatten(1, (n, hw)).masked_fill_(far[:, None], -math.inf)
        last = similarities.topk(min(topk, n * hw), dim=1).values[:, -1:]
        similarities.masked_fill_(similarities < last, -math.inf)
        parts.append(similarities.div_(TEMPERATURE).softmax(dim=1) @ values)
    return torch.cat(parts).T.unflatten(1, (h, w))[None]


@torch.inference_mode()
def propagate(
    model: VisionTransformer,
    video: Video,
    device: torch.device,
    n_last_frames: int = 7,
    size_mask_neighborhood: int = 12,
    topk: int = 5,
    short_side: int = 480,
) -> Iterator[Mask]:
    """The masks of a video's frames, the first one being given.

    Args:
        n_last_frames: frames of the context besides the first one. short_side: of the frames, in pixels.
    Raises:
        UserError: a file cannot be read, or the first mask does not fit.
    """
    first, p = read_mask(video.masks[0]), model.patch_size
    height, width = original = first.numbers.shape
    frame = read_frame(video.frames[0])
    if frame.shape[1:] != original:
        shapes = ["{1} x {0}".format(*shape) for shape in (original, tuple(frame.shape[1:]))]
        raise UserError(f"{video.masks[0]}: has {shapes[0]} pixels, its frame {shapes[1]}")
    if not first.numbers.any():
        raise UserError(f"{video.masks[0]}: shows no object, expected numbers from 1 to 254")
    size = scaled_size(height, width, short_side)
    h, w = size[0] // p, size[1] // p

    def features(image: Tensor) -> Tensor:
        small = resize_image(image, size).float() / 255
        return patch_features(model, color_normalize(small).to(device)).T  # (D, h w)

    seg = to_one_hot(torch.from_numpy(nearest(first.numbers, h, w).copy())[None]).to(device)
    start, queue = (features(frame), seg), deque(maxlen=n_last_frames)
    yield first
    for path in video.frames[1:]:
        found = features(read_frame(path))
        feats, segs = zip(start, *queue, strict=True)
        seg = label_propagation(found.T, list(feats), list(segs), h, w, size_mask_neighborhood, topk)
        queue.append((found, seg))
        full = F.interpolate(seg, scale_factor=p, mode="bilinear", align_corners=False)[0]
        numbers = norm_mask(full).argmax(dim=0).byte().cpu().numpy()
        yield Mask(nearest(numbers, height, width), first.palette)
