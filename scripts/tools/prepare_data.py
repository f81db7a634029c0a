"""Write a data set as image folders, OUT/{train,val}/<class>/<image>, or link or shrink existing ones.

`shapes` draws a small one for segmentation, detection and video, in OUT/{ade20k,coco,davis}; `fields` one of 5 bands.

Usage: python scripts/tools/prepare_data.py digits|cifar10|cifar100|stl10|imagenette OUT
       python scripts/tools/prepare_data.py subset OUT --source DIR (--per_class N | --percent P) [--val_per_class N]
       python scripts/tools/prepare_data.py split OUT --source DIR --val 0.1
       python scripts/tools/prepare_data.py shapes|fields OUT --images 200
       python scripts/tools/prepare_data.py shrink OUT --source DIR --side 256 [--most N]
       python scripts/tools/prepare_data.py stats DIR [--in_chans N]

`stats` prints mean and deviation of each channel of DIR's training images, and stores them in DIR, where training with
--in_chans finds them.
OUT appears only when it is complete: until then the images are in a hidden folder beside it.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, STL10, Imagenette
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from common.datasets import image_dataset, read_image, to_rgb
from common.datasets.channels import STATS, read
from common.datasets.files import Listing
from common.dense_datasets.segmentation import layouts
from common.distributed import Stopped, UserError, log, run
from scripts.tools import shapes
from scripts.tools.flags import Parser

MARKER = ".prepared.json"  # in a complete OUT: {"name", "arguments", "counts"}
SPLITS = ("train", "val", "unlabeled")
DOWNLOADED = ("cifar10", "cifar100", "stl10", "imagenette")
TIMEOUT = 30  # seconds without an answer after which a download fails


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("prepare_data.py")
    names = p.add_subparsers(dest="name", required=True, metavar="NAME")
    parsers = {name: names.add_parser(name, help=text) for name, (_, text) in DATA_SETS.items()}
    for name, q in parsers.items():
        q.add_argument("out", metavar="OUT", type=os.path.realpath, help="folder to write, new or empty")
        if name in DOWNLOADED:
            q.add_argument("--keep_download", action="store_true", help="keep what is downloaded, in OUT/download")
    parsers["imagenette"].add_argument(
        "--size", default="full", choices=["full", "320px", "160px"], help="which of its archives to download"
    )
    stats = names.add_parser("stats", allow_abbrev=False, help="mean and deviation of each channel, for --in_chans")
    stats.add_argument("out", metavar="DIR", type=os.path.realpath, help="folder with images, as --data_path")
    for name, source in (("subset", "train/ and val/"), ("split", "<class>/<image>"), ("shrink", "images")):
        text = f"folder with {source}"
        parsers[name].add_argument("--source", type=os.path.realpath, required=True, metavar="DIR", help=text)
    for q in (parsers["subset"], parsers["split"], parsers["shrink"], stats):
        text = "seed of the choice, 0 if not given; a larger choice contains a smaller one"
        q.add_argument("--seed", default=0, type=int, help=text)
    q = parsers["subset"]
    number = q.add_mutually_exclusive_group(required=True)
    number.add_argument("--per_class", type=int, metavar="N", help="training images of each class")
    number.add_argument("--percent", type=float, metavar="P", help="share of each class, at least one image")
    q.add_argument("--val_per_class", type=int, metavar="N", help="validation images of each class; default: all")
    text = "share of each class for val/, 0.1 if not given"
    parsers["split"].add_argument("--val", default=0.1, type=float, metavar="SHARE", help=text)
    for name, number, side in (("shapes", 200, 128), ("fields", 600, 32)):
        q = parsers[name]
        text = f"pictures, a fifth of them for validation, {number} if not given"
        q.add_argument("--images", default=number, type=int, metavar="N", help=text)
        text = f"short side of the pictures (and videos), {side} if not given"
        q.add_argument("--size", default=side, type=int, metavar="PIXELS", help=text)
        q.add_argument("--seed", default=0, type=int, help="the same seed draws the same pictures")
    q = parsers["shrink"]
    q.add_argument("--side", type=int, required=True, metavar="S", help="longest that the shorter side becomes, pixels")
    q.add_argument("--most", type=int, metavar="N", help="images, of every folder in turn; default: all")
    stats.add_argument("--in_chans", type=int, metavar="N", help="channels; default: those of the first image")
    text = "images that are read, 10,000 if not given"
    stats.add_argument("--most", default=10_000, type=int, metavar="N", help=text)
    return p


# ---- data sets: each function fills a folder


def write(folder: Path, split: str, images: Iterable[tuple[str, Image.Image]], total: int) -> None:
    """Save (relative path, image) under folder/split."""
    for path, image in tqdm(images, split, total):
        (folder / split / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / split / path)


def digits(args: argparse.Namespace, folder: Path) -> None:
    """The 8x8 greyscale digits that come with scikit-learn; every fifth is for validation."""
    from sklearn.datasets import load_digits  # here: the other data sets do without scikit-learn

    data: Any = load_digits()
    pixels = np.rint(data.images * 255 / 16).astype(np.uint8)  # (1797, 8, 8), from 0..16
    paths = [f"{label}/{i:04d}.png" for i, label in enumerate(data.target)]
    for split, members in (("train", np.flatnonzero(np.arange(len(paths)) % 5)), ("val", range(0, len(paths), 5))):
        write(folder, split, ((paths[i], Image.fromarray(pixels[i])) for i in members), len(members))


@contextlib.contextmanager
def archive(args: argparse.Namespace, folder: Path, url: str, md5: str) -> Iterator[Path]:
    """A folder with the archive's contents; the archive is downloaded unless it is in OUT/download already.

    Raises:
        UserError: the download failed; the line says where the file can be put by hand.
    """
    file = Path(args.out, "download", url.rsplit("/", 1)[1])
    by_hand = check_integrity(file, md5)
    if not by_hand:
        file.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(TIMEOUT)
        log(f"downloading {url}")
        try:
            download_url(url, file.parent, md5=md5)
        except (OSError, RuntimeError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            where = f"put {file.name} into {file.parent} and run this again"
            raise UserError(f"{args.name}: {url} cannot be downloaded ({error}); {where}") from error
    log(f"unpacking {file}")
    extract_archive(file, folder / "unpacked")
    yield folder / "unpacked"
    shutil.rmtree(folder / "unpacked")
    if not by_hand and not args.keep_download:
        file.unlink()


def by_class(data: Any) -> Iterator[tuple[str, Image.Image]]:
    for i, (image, target) in enumerate(data):
        yield os.path.join(data.classes[target] if target >= 0 else "", f"{i:06d}.png"), image


def arrays(args: argparse.Namespace, folder: Path) -> None:
    """CIFAR and STL-10; their test images are for validation, STL-10's unlabelled ones have no class folders."""
    kind, *parts = {
        "cifar10": (CIFAR10, True, False),  # their second argument: train
        "cifar100": (CIFAR100, True, False),
        "stl10": (STL10, "train", "test", "unlabeled"),
    }[args.name]
    with archive(args, folder, kind.url, kind.tgz_md5) as root:
        for split, part in zip(SPLITS, parts, strict=False):
            data = kind(root, part)
            write(folder, split, by_class(data), len(data))


def imagenette(args: argparse.Namespace, folder: Path) -> None:
    """Ten classes of ImageNet, the original JPEG files."""
    url, md5 = Imagenette._ARCHIVES[args.size]
    with archive(args, folder, url, md5) as root:
        for split in ("train", "val"):
            (root / Path(url).stem / split).rename(folder / split)


def drawn(args: argparse.Namespace, members: list[str], count: int) -> list[str]:
    """The paths whose hashes with the seed are smallest: a random choice, whatever the order of the files."""
    return sorted(members, key=lambda path: hashlib.sha256(os.fsencode(f"{args.seed} {path}")).digest())[:count]


def link(args: argparse.Namespace, folder: Path, paths: dict[str, str], split: str) -> None:
    """Link images of the source: {path in folder: path in the source}."""
    for new, old in tqdm(paths.items(), split):
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / new).symlink_to(Path(args.source, old).resolve())


def by_target(args: argparse.Namespace, images: Any) -> list[list[str]]:
    """Paths of a data set of files, relative to the source, in one list per class."""
    paths = defaultdict(list)
    for path, target in images.samples:
        paths[target].append(os.path.relpath(path, args.source))
    return list(paths.values())


def positive(args: argparse.Namespace, *flags: str) -> None:
    for flag in flags:
        value = getattr(args, flag)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{flag} {value}: must be a positive number")


def subset(args: argparse.Namespace, folder: Path) -> None:
    """Links to some images of each class; val/ is left out where the source has none.

    Raises:
        UserError: the source or a number cannot be used.
    """
    positive(args, "per_class", "percent", "val_per_class")
    for split in ("", "train"):
        if not Path(args.source, split).is_dir():
            raise UserError(f"--source {args.source}: no folder {Path(args.source, split)}")
    for split, number, percent in (("train", args.per_class, args.percent), ("val", args.val_per_class, 100)):
        if not Path(args.source, split).is_dir():
            continue
        chosen = []
        for members in by_target(args, image_dataset(args.source, split == "train")):
            count = number or max(1, round(len(members) * percent / 100))
            if count > len(members):
                name = Path(args.source, *Path(members[0]).parts[:2])
                raise UserError(f"{name}: has {len(members)} images, fewer than {count}")
            chosen += drawn(args, members, count)
        link(args, folder, {path: path for path in chosen}, split)


def halves(args: argparse.Namespace, folder: Path) -> None:
    """Links to all images of DIR/<class>/, a share of each class in val/ and the others in train/.

    Raises:
        UserError: the source has no class folders, or has train/ or val/ already; a class is too small to be shared.
    """
    if not 0 < args.val < 1:
        raise UserError(f"--val {args.val}: expected a share between 0 and 1")
    there = next((split for split in SPLITS[:2] if Path(args.source, split).is_dir()), None)
    if there:
        raise UserError(f"--source {args.source}: has a folder {there}/ already")
    splits: dict[str, dict[str, str]] = {"train": {}, "val": {}}
    for members in by_target(args, image_dataset(args.source, True, direct=True)):
        if len(members) < 2:
            raise UserError(f"{Path(args.source, members[0]).parent}: has one image, too few for train/ and val/")
        count = min(max(1, round(len(members) * args.val)), len(members) - 1)
        held = set(drawn(args, members, count))
        for path in members:
            split = "val" if path in held else "train"
            splits[split][os.path.join(split, path)] = path
    for split, paths in splits.items():
        link(args, folder, paths, split)


def drawn_images(args: argparse.Namespace, folder: Path) -> None:
    """Shapes on textures as ADE20K, COCO and DAVIS, or fields of five bands in classes.

    Raises:
        UserError: a number cannot be used.
    """
    least, smallest, write_all = {"shapes": (2, 32, shapes.write_shapes), "fields": (30, 8, shapes.write_fields)}[
        args.name
    ]
    if args.images < least or args.size < smallest or args.seed < 0:
        given = f"--images {args.images} --size {args.size} --seed {args.seed}"
        expected = f"at least {least} images of at least {smallest} pixels, and no negative seed"
        raise UserError(f"{given}: expected {expected}")
    write_all(folder, args.images, args.size, args.seed)


def shrink(args: argparse.Namespace, folder: Path) -> None:
    """Copies of images in folders of the same names, the larger ones resized; unreadable ones are left out.

    Raises:
        UserError: a number cannot be used, or there is no image that can be read.
    """
    positive(args, "side", "most")
    if not Path(args.source).is_dir():
        raise UserError(f"--source {args.source}: no such folder")
    listing, folders = Listing(args.out), defaultdict(list)
    for path in listing.below(args.source):
        folders[os.path.dirname(path)].append(os.path.relpath(path, args.source))
    turns = [turn for members in folders.values() for turn in enumerate(drawn(args, members, len(members)))]
    chosen = [path for _, path in sorted(turns)[: args.most]]

    def copy(path: str) -> str:
        try:
            with Image.open(Path(args.source, path)) as file:
                file.draft(None, (2 * args.side, 2 * args.side))  # a JPEG is decoded at an eighth, fourth or half
                image = to_rgb(file)
        except Exception as error:  # Pillow raises many types for damaged files
            return f"{path}: unreadable image ({error})"
        factor = args.side / min(image.size)
        if factor < 1:
            size = [max(args.side, round(factor * side)) for side in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
        new = folder / (path if path.lower().endswith((".jpg", ".jpeg", ".png")) else f"{path}.png")
        new.parent.mkdir(parents=True, exist_ok=True)
        image.save(new, quality=95)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bad = [problem for problem in tqdm(pool.map(copy, chosen), "images", len(chosen)) if problem]
    if len(bad) == len(chosen):
        found = bad[0] if bad else listing.summary() or "it is empty"
        raise UserError(f"--source {args.source}: has no image that can be read ({found})")
    if bad:
        log(f"{bad[0]}; {len(bad)} such left out")


def count(image: Any) -> int:
    """Channels of an image of `read`."""
    if isinstance(image, Tensor):
        return len(image)
    return 3 if image.mode == "P" else len(image.getbands())


def sums(args: argparse.Namespace, path: str) -> np.ndarray | str:
    """Pixels, sum and sum of squares of each channel of an image, (3, N); a text if it cannot be read."""
    try:
        image = read_image(path, args.in_chans)
        values = (image if isinstance(image, Tensor) else to_tensor(image)).flatten(1).double().numpy()
    except Exception as error:  # of many types
        return f"{path}: unreadable image ({error})"
    return np.stack([np.full(len(values), values.shape[1]), values.sum(axis=1), np.square(values).sum(axis=1)])


def stats(args: argparse.Namespace) -> None:
    """Print mean and deviation of each channel over all pixels, and store them in the folder.

    Raises:
        UserError: there is no image that can be read.
    """
    positive(args, "in_chans", "most")
    beside = [(x.images, x.masks) for x in layouts(train=True)] + [("train2017", "annotations")]  # of dense tasks
    dense = [os.path.join(args.out, x) for x, y in beside if all(Path(args.out, name).is_dir() for name in (x, y))]
    folder = dense[0] if dense else args.out
    paths = [path for path, _ in image_dataset(folder, True, labelled=False, in_chans=args.in_chans or 1).samples]
    if args.in_chans is None:
        try:
            args.in_chans = count(read(Path(paths[0]).read_bytes(), paths[0], 0))
        except Exception as error:  # of many types
            raise UserError(f"{paths[0]}: unreadable image ({error}); give --in_chans, or take it out") from error
    args.source = args.out
    chosen = drawn(args, paths, args.most)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(tqdm(pool.map(partial(sums, args), chosen), "images", len(chosen)))
    bad, good = [x for x in found if isinstance(x, str)], [x for x in found if not isinstance(x, str)]
    if not good:
        raise UserError(f"{bad[0]}; none of {len(bad)} images has --in_chans {args.in_chans}")
    pixels, total, squares = np.sum(good, axis=0)
    mean = total / pixels
    deviation = np.sqrt((squares / pixels - mean**2).clip(0))
    if not deviation.all():
        log(f"WARNING: channel {1 + int(deviation.argmin())} has one value in all images; its deviation is stored as 1")
    rounded = [[float(f"{x:.6g}") for x in values] for values in (mean, np.where(deviation > 0, deviation, 1))]
    Path(args.out, STATS).write_text(json.dumps({"mean": rounded[0], "std": rounded[1], "images": len(good)}) + "\n")
    left_out = f"; left out: {bad[0]}" + f" and {len(bad) - 1} more" * (len(bad) > 1) if bad else ""
    log(f"{args.out}: {args.in_chans} channels of {len(good)} images{left_out}")
    for flag, values in zip(("--mean", "--std"), rounded, strict=True):
        print(flag, *values)


DATA_SETS = {
    "digits": (digits, "1,797 greyscale digits of 8x8 pixels, part of scikit-learn: no download"),
    "cifar10": (arrays, "60,000 images of 32x32 pixels in 10 classes"),
    "cifar100": (arrays, "60,000 images of 32x32 pixels in 100 classes"),
    "stl10": (arrays, "13,000 images of 96x96 pixels in 10 classes, and 100,000 without labels"),
    "imagenette": (imagenette, "13,394 images of 10 ImageNet classes"),
    "subset": (subset, "few labels: links to some images of each class of another folder"),
    "shapes": (drawn_images, "drawn shapes for segmentation, detection and video: no download"),
    "fields": (drawn_images, "drawn fields of five bands in six classes: no download"),
    "split": (halves, "links to class folders without train/ and val/, a share of each class in val/"),
    "shrink": (shrink, "small copies of large images, which are read faster"),
}


# ---- the folder as a whole


def counts(out: Path) -> dict[str, int]:
    """Images of each split; of videos, all frames."""
    splits = [split for split in (*SPLITS, *shapes.FOLDERS) if (out / split).is_dir()]
    if not splits:  # of a folder without splits
        return {"images": sum(name not in (MARKER, STATS) for *_, files in os.walk(out) for name in files)}
    return {split: sum(len(files) for *_, files in os.walk(out / split)) for split in splits}


def is_complete(out: Path, wanted: dict) -> bool:
    """True if OUT holds this data set already, False if it is free.

    Raises:
        UserError: it holds something else.
    """
    downloads = {"download"} if wanted["name"] in DOWNLOADED else set()
    if not out.exists() or {entry.name for entry in out.iterdir()} <= downloads:
        if out.is_mount():
            raise UserError(f"{out}: is a mount point, name a folder inside it")
        return False
    try:
        found = json.loads((out / MARKER).read_text())
    except (FileNotFoundError, ValueError):
        raise UserError(f"{out}: is not empty and was not written by this script; name a new folder") from None
    if found != {**wanted, "counts": counts(out)}:
        raise UserError(f"{out}: has {counts(out)} of {json.dumps(found)}; name a new folder or remove it")
    return True


def prepare(args: argparse.Namespace, out: Path, wanted: dict) -> None:
    """Fill a folder beside OUT and rename it; a killed run's is removed first."""
    partial = out.with_name(f".{out.name}.prepare_data")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        DATA_SETS[args.name][0](args, partial)
        (partial / MARKER).write_text(json.dumps({**wanted, "counts": counts(partial)}))
        if (out / "download").exists():
            (out / "download").rename(partial / "download")
        partial.rename(out)
        with contextlib.suppress(OSError):  # not empty: something is to be kept
            (out / "download").rmdir()
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(args: argparse.Namespace) -> None:
    if args.name == "stats":
        stats(args)
        return
    out = Path(args.out)
    arguments = {key: value for key, value in vars(args).items() if key not in ("name", "out", "keep_download")}
    wanted = {"name": args.name, "arguments": arguments}
    try:
        there = is_complete(out, wanted)
        if not there:
            prepare(args, out, wanted)
    except OSError as error:  # disk full, no permission, ...
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None
    images = counts(out)
    listed = ", ".join(f"{split} {number:,}" for split, number in images.items())
    log(f"{out}: {'already there, ' if there else ''}{listed}, total {sum(images.values()):,} images")
    if "unlabeled" in images:
        log(f"pre-train on the unlabelled images with --data_path {out / 'unlabeled'}")


if __name__ == "__main__":
    run(main, get_args_parser().parse_args)
