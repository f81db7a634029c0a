"""Images packed in tar files, as webdataset lays them out; read by their places, so that they are like a folder's."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from common.datasets import channels
from common.datasets.files import ENDINGS, ImageFiles, is_system, to_rgb
from common.distributed import UserError, gather, log, rank, world_size


def _tar_files(root: Path, split: str) -> tuple[list[Path], int]:
    """The tar files of a split, and how many images they are said to hold (0: not said)."""
    if ".tar" in split:
        from braceexpand import braceexpand

        patterns, _, count = split.partition("|")
        return [root / name for pattern in patterns.split("::") for name in braceexpand(pattern)], int(count or 0)
    if (root / "_info.json").is_file():
        about = json.loads((root / "_info.json").read_text())["splits"][split]
        return [root / name for name in about["filenames"]], about["num_samples"]
    return sorted(root.glob(f"{split}*.tar")), 0


def _members(path: Path, endings: tuple[str, ...]) -> list[tuple[str, int, int, int]]:
    """Name, first byte, number of bytes and class (-1: not given) of each image of a tar file."""
    images, classes = [], {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")  # the first dot ends a sample's key, as in webdataset
                if member.isfile() and not is_system(file) and f".{ending}".lower() in endings:
                    images.append(((folder, stem), f"{path}/{member.name}", member.offset_data, member.size))
                elif member.isfile() and ending == "cls":
                    text = tar.extractfile(member).read().strip()  # type: ignore[union-attr]
                    classes[folder, stem] = int(text) if text.isdigit() else -1
            tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
            end = tar.fileobj.read(512)  # type: ignore[union-attr]
        if end != bytes(512):
            raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        raise UserError(f"{path}: is damaged, or no uncompressed tar file ({error})") from error
    return [(*image, classes.get(key, -1)) for key, *image in images]


class TarImages(ImageFiles):
    """Images of uncompressed tar files, in their order; the class of a.jpg is the number in the a.cls beside it.

    Args:
        split: names of files in root, such as "{000..127}.tar|160000" with the number of their images if it is known
            and "::" between several; or a split of timm's _info.json; or the beginning of the files' names.
        labelled: False needs no .cls; classes are known if all images have one. endings: of the images' names.
    Raises:
        UserError: an image has no class, or there are more or fewer images than said.
    """

    def __init__(self, root: Path, split: str, labelled: bool = True, endings: tuple[str, ...] = ENDINGS):
        tars, said = _tar_files(root, split)
        log(f"{root}: looking where the images of {len(tars)} tar files are")
        own = [(i, _members(tars[i], endings)) for i in range(rank(), len(tars), world_size())]
        found = [(tars[i], *image) for i, images in sorted(sum(gather(own), [])) for image in images]
        if not found or said not in (0, len(found)):
            raise UserError(f"{root}: {len(found)} images in {len(tars)} tar files, expected {said or 'some'}")
        bare, last = next((name for _, name, *_, target in found if target < 0), ""), max(image[-1] for image in found)
        if labelled and bare:
            raise UserError(f"{bare}: has no class, expected its number in a .cls beside it")
        samples = [(name, 0 if bare else target) for _, name, *_, target in found]
        super().__init__(root, samples, None if bare else list(range(last + 1)))
        self.places = [(tar, first, size) for tar, _, first, size, _ in found]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        tar, first, size = self.places[index]
        with open(tar, "rb") as file:
            file.seek(first)
            data, (name, target) = file.read(size), self.samples[index]
        image = channels.read(data, name, self.in_chans) if self.in_chans else to_rgb(Image.open(io.BytesIO(data)))
        return image, target
