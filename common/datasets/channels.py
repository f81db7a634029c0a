"""Images of N channels of any depth: float32 (N, H, W) from 0 to 1, by the range of the type that is stored."""

import argparse
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import functional as TF

from common.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from common.distributed import UserError, flag_groups

ENDINGS = (".npy", ".dcm")  # besides those of Pillow
STATS = ".channel_stats.json"  # {"mean": [...], "std": [...]} of the images beside it, by `prepare_data.py stats`


def add_channel_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the images' channels."""
    group = flag_groups(parser).data
    chans = "channels of images of any number and depth, in TIFF, PNG, .npy or DICOM files; default: 3 of 8 bits"
    group.add_argument("--in_chans", type=int, help=chans)
    text = "of each channel, 0 to 1; default: as prepare_data.py stats stored it, of 3 channels the usual"
    group.add_argument("--mean", type=float, nargs="+", help=f"mean {text}")
    group.add_argument("--std", type=float, nargs="+", help=f"standard deviation {text}")


def stored_channels(flags: Mapping[str, Any]) -> tuple[int | None, tuple, tuple]:
    """--in_chans, mean and deviation of a run by its flags, as a checkpoint keeps them."""
    return flags.get("in_chans"), tuple(flags.get("mean") or IMAGENET_MEAN), tuple(flags.get("std") or IMAGENET_STD)


def follow_channels(args: argparse.Namespace, flags: Mapping[str, Any]) -> None:
    """Take what --in_chans, --mean and --std leave open from the flags of the run that wrote the encoder."""
    for name in ("in_chans", "mean", "std"):
        setattr(args, name, flags.get(name) if getattr(args, name) is None else getattr(args, name))


Statistics = tuple[tuple, tuple, int | None]  # mean and deviation of each channel, and --in_chans, for transforms


def statistics(args: argparse.Namespace, mean: tuple = IMAGENET_MEAN, std: tuple = IMAGENET_STD) -> Statistics:
    """--mean and --std, or those stored in --data_path, which become the flags, or of three channels the given ones.

    Raises:
        UserError: they are missing, or not one per channel.
    """
    chans, stored = args.in_chans or 3, Path(args.data_path, STATS)
    place = ""
    if args.mean is args.std is None and args.in_chans and stored.is_file():
        args.mean, args.std = map(json.loads(stored.read_text()).get, ("mean", "std"))
        place = f", in {stored}"
    if args.mean is args.std is None and chans == 3:
        return mean, std, args.in_chans
    for flag, values in (("--mean", args.mean), ("--std", args.std)):
        if len(values or ()) != chans or (flag == "--std" and min(values) <= 0):
            given = " ".join(map(str, [flag, *(values or ["is missing"])]))
            way = f"`python scripts/tools/prepare_data.py stats {args.data_path}` stores them"
            expected = f"{chans} numbers{' above 0' * (flag == '--std')}, one a channel{place}"
            raise UserError(f"{given}: expected {expected}; {way}")
    return tuple(args.mean), tuple(args.std), args.in_chans


def scaled(values: np.ndarray) -> Tensor:
    """Integers by the range of their type, of 32 bits by its positive half; floats have to be 0 to 1 already."""
    if values.dtype.kind in "iu":
        about = np.iinfo(values.dtype)
        low, kind = (0, np.float64) if about.bits > 16 else (about.min, np.float32)
        return torch.from_numpy(((values.astype(kind) - low) / (about.max - low)).clip(0, 1).astype(np.float32))
    values = np.nan_to_num(values.astype(np.float32), posinf=1, neginf=0)
    if values.min() < -1 or values.max() > 2:  # what overshoots a little is clipped
        raise ValueError(f"floats from {values.min():g} to {values.max():g}, expected 0 to 1")
    return torch.from_numpy(values.clip(0, 1))


def arranged(values: np.ndarray, chans: int) -> Tensor:
    """Stored values (H, W), (H, W, N) or (N, H, W) as (chans, H, W) from 0 to 1; chans 0: all channels that there are.

    Grey is repeated for three channels, colours become grey by their luma.
    Raises:
        ValueError: it has another number of channels.
    """
    image = scaled(values)
    if image.ndim == 2:
        image = image[None]
    elif image.shape[2] == chans or (image.shape[0] != chans and image.shape[2] < image.shape[0]):
        image = image.permute(2, 0, 1)
    if (len(image), chans) == (3, 1):
        return TF.rgb_to_grayscale(image)
    if chans and len(image) != chans and (len(image), chans) != (1, 3):
        raise ValueError(f"{len(image)} channel{'s' * (len(image) > 1)}, expected --in_chans {chans}")
    return image.expand(chans or -1, -1, -1).contiguous()


def _dicom(file: io.BytesIO) -> np.ndarray:
    """Grey from 0 to 1 through its window, without one by the bits that are stored; colours as they are stored."""
    import pydicom  # type: ignore[reportMissingImports]  # optional

    about = pydicom.dcmread(file)
    values = about.pixel_array
    if about.get("SamplesPerPixel", 1) > 1:
        return values
    low, width = -(2 ** (about.BitsStored - 1)) * about.PixelRepresentation, 2**about.BitsStored - 1
    if "WindowCenter" in about:
        values = values * float(about.get("RescaleSlope", 1)) + float(about.get("RescaleIntercept", 0))
        centre, width = (float(np.atleast_1d(about.get(name))[0]) for name in ("WindowCenter", "WindowWidth"))
        low = centre - width / 2
    values = ((values.astype(np.float32) - low) / width).clip(0, 1)
    return 1 - values if about.PhotometricInterpretation == "MONOCHROME1" else values


def _values(image: Image.Image) -> np.ndarray:
    """What an image of Pillow holds, deep greyscale in the type that its file says."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode != "I":  # which is 32 bits with a sign, whatever the file has
        return values
    bits = tags.get(258, (16 if image.format in ("PPM", "PNG") else 32,))[0]
    unsigned = tags.get(339, (1,))[0] == 1 if tags else bits == 16
    return values.astype(f"{'u' * unsigned}int{bits}")


def read(data: bytes, name: str, chans: int) -> Any:
    """A file as an 8-bit image of Pillow, else as `arranged`; raises what Pillow, NumPy, tifffile and pydicom raise."""
    file, image = io.BytesIO(data), None
    if name.lower().endswith(ENDINGS):
        return arranged(np.load(file) if name.lower().endswith(".npy") else _dicom(file), chans)
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        if data[:2] not in (b"II", b"MM"):  # of TIFF
            raise
    bands, tags = len(image.getbands()) if image else 0, getattr(image, "tag_v2", {})
    if not image or (tags.get(277, 1) > 1 and (tags[258][0] > 8 or tags[277] != bands)):
        import tifffile  # type: ignore[reportMissingImports]  # optional: Pillow reads no such TIFF, or not all of it

        return arranged(tifffile.imread(io.BytesIO(data)), chans)
    if image.format == "TIFF" and bands == 1 and getattr(image, "n_frames", 1) > 1:  # its pages are channels
        return arranged(np.stack([_values(page) for page in ImageSequence.Iterator(image)]), chans)
    if image.format == "PNG" and ";16" in str(image.tile):  # of colours Pillow would keep 8 bits
        mode = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}.get(chans, ImageReadMode.UNCHANGED)
        return arranged(decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode).numpy(), chans)
    image.load()
    return image


def to_channels(image: Any, chans: int) -> Any:
    """What `read` gives, as `arranged`; three channels of 8 bits stay an RGB image of Pillow."""
    if isinstance(image, Tensor):
        return image
    is_deep = image.mode[0] in "IF"
    if chans == 3 and not is_deep:
        return image.convert("RGB")
    return arranged(_values(image.convert("L") if chans == 1 and not is_deep else image), chans)
