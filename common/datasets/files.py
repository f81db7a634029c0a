"""Image files: which of a folder, in which order, of which class, and how one becomes 8-bit RGB."""

import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.datasets import channels
from common.distributed import UserError, log

# What torchvision takes for images, and what Pillow reads besides.
ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jpe", ".jfif", ".jp2", ".j2k", ".avif", ".pbm", ".pnm", ".tga")
# Made by file managers, network disks and archivers beside a user's own folders; names that begin with "." are hidden.
SYSTEM = ("@eaDir", "@Recycle", "#recycle", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")


def endings(in_chans: int | None = None) -> tuple[str, ...]:
    """Of the names of images, with in_chans also of arrays and DICOM files."""
    return ENDINGS + channels.ENDINGS if in_chans else ENDINGS


def is_system(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM


def folders_in(root: Path, skip: str = "") -> list[str]:
    """Names of the folders directly in root, sorted, but for hidden ones and the folder `skip`.

    Raises:
        UserError: a link leads to no file or folder.
    """
    entries = sorted((e for e in os.scandir(root) if not is_system(e.name)), key=lambda e: e.name)
    broken = next((e for e in entries if e.is_symlink() and not os.path.exists(e.path)), None)
    if broken:
        raise UserError(f"{broken.path}: is a link to {os.readlink(broken.path)}, which does not exist")
    own = os.path.realpath(skip) if skip else ""
    return [e.name for e in entries if e.is_dir() and os.path.realpath(e.path) != own]


class Listing:
    """Lists image files in the order of torchvision's ImageFolder, each folder once however many links lead to it.

    Args:
        skip: a folder that is not read, such as a run's output. endings: of the images' names.
    Attributes:
        left_out: number of files and folders that are not read, by their ending or by the reason.
    """

    def __init__(self, skip: str = "", endings: tuple[str, ...] = ENDINGS):
        self.skip, self.endings = os.path.realpath(skip) if skip else "", endings
        self.seen: set[str] = set()
        self.left_out: Counter[str] = Counter()

    def images(self, folder: str | Path, names: list[str]) -> list[str]:
        """Paths of the images among the names of a folder's files."""
        found = []
        for name in sorted(names):
            if is_system(name):
                self.left_out["hidden"] += 1
            elif name.lower().endswith(self.endings):
                found.append(os.path.join(folder, name))
            else:
                self.left_out[os.path.splitext(name)[1].lower() or "without an ending"] += 1
        return found

    def below(self, folder: str | Path) -> list[str]:
        """Paths of the images of a folder and of all folders in it."""
        found = []
        for place, folders, files in os.walk(folder, followlinks=True):
            real = os.path.realpath(place)
            if real == self.skip or real in self.seen:
                self.left_out["folders that links lead to again"] += real in self.seen
                folders.clear()
                continue
            self.seen.add(real)
            self.left_out["hidden"] += sum(map(is_system, folders))
            folders[:] = sorted(name for name in folders if not is_system(name))
            found.append((place, self.images(place, files)))
        return [path for _, paths in sorted(found) for path in paths]

    def summary(self) -> str:
        """Such as "12 left out (10 .heic, 2 hidden)"; '' if nothing was."""
        counts = [(reason, n) for reason, n in self.left_out.most_common() if n]
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts)
        return f"{sum(n for _, n in counts)} left out ({reasons})" if counts else ""


_CONSTANT: set[str] = set()  # images of this process that a warning has named


def to_rgb(image: Image.Image) -> Any:  # an image, but transforms are typed to return what they are given
    """The image in 8-bit RGB.

    Deeper greyscale is scaled from the range that its format can hold, never stretched to what an image uses: 16 bits
    from 0 to 65535 (PGM from its header's maximum), 32-bit integers from 0 to 2**31 - 1, floats from 0 to 1.
    """
    if image.mode == "RGB" and image.format == "JPEG":
        image.load()  # `convert` would copy it
        return image
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    values = np.asarray(image)
    if image.mode == "F":
        values = (np.nan_to_num(values).clip(0, 1) * 255).round()
    else:  # Pillow scales PGM to 16 bits, which it keeps in 32, as older versions of it do with PNG
        bits = 16 if image.mode != "I" or image.format in ("PPM", "PNG") else 31
        values = values.clip(0) >> (bits - 8)
    grey = values.astype(np.uint8)
    name = getattr(image, "filename", "")
    if grey.min() == grey.max() and np.ptp(np.asarray(image)) > 0 and name not in _CONSTANT:
        _CONSTANT.add(name)
        what = f"{name or 'an image'} ({image.mode}) becomes a single grey, {grey.min()}"
        log(f"WARNING: {what}; scale its values to the range of its format")
    return Image.fromarray(grey).convert("RGB")


class Bytes(io.BytesIO):
    """What a file holds, read at once, which takes less time than Pillow's many reads; messages name the file."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name

    def __repr__(self) -> str:
        return repr(self.name)


def read_image(path: str | Path, in_chans: int | None = None) -> Any:
    """An image file as 8-bit RGB, or as `channels.to_channels` gives it; raises what Pillow raises."""
    data = Path(path).read_bytes()
    if in_chans:
        return channels.to_channels(channels.read(data, str(path), in_chans), in_chans)
    with Image.open(Bytes(data, str(path))) as image:
        image.filename = str(path)
        return to_rgb(image)


class ImageFiles(Dataset):
    """Images by path.

    Args:
        samples: (path, class index). classes: their names, or numbers; none where images have no labels.
    Attributes:
        in_chans: number of channels, of any depth; None: images become 8-bit RGB.
    """

    in_chans: int | None = None

    def __init__(self, root: Path, samples: list[tuple[str, int]], classes: list | None = None):
        self.root, self.samples, self.classes = str(root), samples, classes or []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        if self.in_chans:
            return channels.read(Path(path).read_bytes(), path, self.in_chans), target
        return read_image(path), target


class ListedImages(ImageFiles):
    """Images named by the lines "<path> <class index>" of a text file, relative to one of `roots`.

    Args:
        labelled: False takes lines "<path>", class 0.
    Raises:
        UserError: a line is not of that form, there is none, or the first image is under no root.
    """

    def __init__(self, path: Path, *roots: Path, labelled: bool = True):
        form = "'<path> <class index>'" if labelled else "'<path>'"
        try:
            lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is no UTF-8 text, expected lines {form}") from error
        rows = [line.rsplit(maxsplit=1) if labelled else [line, "0"] for line in lines]
        bad = next((i for i, row in enumerate(rows, 1) if len(row) != 2 or not row[1].isdecimal()), None)
        if bad is not None or not rows:
            raise UserError(f"{path}: line {bad or 1}: expected {form}")
        root = next((root for root in roots if (root / rows[0][0]).is_file()), None)
        if root is None:
            raise UserError(f"{path}: {rows[0][0]} is not in {' or '.join(map(str, roots))}")
        samples = [(str(root / name), int(label)) for name, label in rows]
        super().__init__(path, samples, list(range(max(label for _, label in samples) + 1)))


def split_folder(data_path: Path, name: str) -> Path:
    """The folder of a split, train or val, in whatever case it is written; that name if there is none."""
    others = [e.name for e in os.scandir(data_path) if e.is_dir() and e.name.lower() == name and e.name != name]
    return data_path / (others[0] if others and not (data_path / name).is_dir() else name)


def read_folder(
    root: Path, labelled: bool, skip: str = "", endings: tuple[str, ...] = ENDINGS
) -> tuple[ImageFiles, str]:
    """The images below a folder, and a summary of what was left out.

    Args:
        labelled: by class folders, each with its images, also if links of several classes lead to the same ones.
            Otherwise all images, each once: of a tree of nothing but class folders in the same order, else by path.
        skip, endings: as in `Listing`.
    Raises:
        UserError: there are no images, no classes, or a class has none.
    """
    classes, listing = folders_in(root, skip), Listing(skip, endings)
    loose = listing.images(root, [entry.name for entry in os.scandir(root) if entry.is_file()])
    expected = f"expected {root}/<class>/<image>" if labelled else f"expected images that end in {', '.join(endings)}"
    if labelled and not classes:
        what = f"has {len(loose)} images but no class folders" if loose else "has no class folders and no images"
        raise UserError(f"{root}: {what}, {expected}; {listing.summary() or 'nothing else is there'}")
    if not labelled and (loose or not classes):
        listing = Listing(skip, endings)
        dataset = ImageFiles(root, [(path, 0) for path in listing.below(root)])
    else:
        samples = []
        for index, name in enumerate(classes):
            found = [(path, index) for path in listing.below(root / name)]
            if labelled and not found:
                others = listing.summary() and f"{listing.summary()}, images end in {', '.join(endings)}"
                raise UserError(f"{root / name}: class folder without images; {others or 'it is empty'}")
            samples += found
            if labelled:
                listing.seen.clear()
        listing.left_out["images beside the class folders"] += len(loose)
        dataset = ImageFiles(root, samples, classes)
    if not dataset.samples:
        raise UserError(f"{root}: has no class folders and no images, {expected}; {listing.summary() or 'it is empty'}")
    return dataset, listing.summary()
