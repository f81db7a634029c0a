"""Which files below a folder are images, and of which class."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.distributed import UserError

# What torchvision takes for images, and what Pillow reads besides.
ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jpe", ".jfif", ".jp2", ".j2k", ".avif", ".pbm", ".pnm", ".tga")
# Made by file managers, network disks and archivers beside a user's own folders; names that begin with "." are hidden.
SYSTEM = ("@eaDir", "@Recycle", "#recycle", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")


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
        skip: a folder that is not read, such as a run's output.
    Attributes:
        left_out: number of files and folders that are not read, by their ending or by the reason.
    """

    def __init__(self, skip: str = ""):
        self.skip = os.path.realpath(skip) if skip else ""
        self.seen: set[str] = set()
        self.left_out: Counter[str] = Counter()

    def images(self, folder: str | Path, names: list[str]) -> list[str]:
        """Paths of the images among the names of a folder's files."""
        found = []
        for name in sorted(names):
            if is_system(name):
                self.left_out["hidden"] += 1
            elif name.lower().endswith(ENDINGS):
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


class ClassFolders(ImageFolder):
    """The images of <root>/<class>/, in the order of torchvision's ImageFolder.

    Args:
        read: makes an image of a path.
        share: what links of several classes lead to is read for each of them; otherwise once.
    """

    def __init__(self, root: Path, read: Callable[[str], Any], listing: Listing, classes: list[str], share: bool):
        self.listing, self.names, self.share = listing, classes, share
        super().__init__(str(root), loader=read, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        return self.names, {name: i for i, name in enumerate(self.names)}

    def make_dataset(self, directory, class_to_idx, *_args, **_kwargs) -> list[tuple[str, int]]:  # type: ignore[override]
        samples = []
        for name, index in class_to_idx.items():
            samples += [(path, index) for path in self.listing.below(Path(directory, name))]
            if self.share:
                self.listing.seen.clear()
        return samples


class UnlabelledImages(Dataset):
    """All images of a folder and of the folders in it, class 0."""

    def __init__(self, root: Path, read: Callable[[str], Any], listing: Listing):
        self.root, self.read = str(root), read
        self.samples = [(path, 0) for path in listing.below(root)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(self.samples[index][0]), 0


def split_folder(data_path: Path, name: str) -> Path:
    """The folder of a split, train or val, in whatever case it is written; that name if there is none."""
    others = [e.name for e in os.scandir(data_path) if e.is_dir() and e.name.lower() == name and e.name != name]
    return data_path / (others[0] if others and not (data_path / name).is_dir() else name)


def read_folder(root: Path, labelled: bool, read: Callable[[str], Any], skip: str = "") -> tuple[Any, Listing]:
    """The images below a folder, and the listing that says what was left out.

    Args:
        labelled: by class folders, each with its images. Otherwise a tree of nothing but class folders is read in the
            same order, and any other folder in the order of its paths.
        read, skip: as in `ClassFolders` and `Listing`.
    Raises:
        UserError: there are no images, no classes, or a class has none.
    """
    classes = folders_in(root, skip)
    listing = Listing(skip)
    loose = listing.images(root, [entry.name for entry in os.scandir(root) if entry.is_file()])
    expected = f"expected {root}/<class>/<image>" if labelled else f"expected images that end in {', '.join(ENDINGS)}"
    if labelled and not classes:
        what = f"has {len(loose)} images but no class folders" if loose else "has no class folders and no images"
        raise UserError(f"{root}: {what}, {expected}")
    if not labelled and (loose or not classes):
        listing = Listing(skip)
        dataset: Any = UnlabelledImages(root, read, listing)
    elif not labelled:
        dataset = ClassFolders(root, read, listing, classes, share=False)
    else:
        listing.left_out["images beside the class folders"] += len(loose)
        dataset = ClassFolders(root, read, listing, classes, share=True)
        used = {target for _, target in dataset.samples}
        empty = [name for name, target in dataset.class_to_idx.items() if target not in used]
        if empty:
            what = f"class folder without images ({len(empty)} of {len(classes)} classes)"
            raise UserError(f"{root / empty[0]}: {what}; {listing.summary() or 'nothing was left out'}")
    if not dataset.samples:
        raise UserError(f"{root}: has no class folders and no images, {expected}; {listing.summary() or 'it is empty'}")
    return dataset, listing
