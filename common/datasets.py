"""Image folders and timm's data sets, transforms, and batches that depend on (seed, epoch, index) only."""

import argparse
import contextlib
import itertools
import math
import os
import random
import signal
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.dataset_factory import create_dataset
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    default_collate,
    get_worker_info,
)
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.distributed import (
    Position,
    Stopped,
    UserError,
    agree,
    catch_signals,
    log,
    on_main_first,
    rank,
    stop_signal,
    world_size,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TIMM_READERS = ("torch", "wds", "hfds", "hfids", "tfds")
MAX_BAD_IN_A_ROW = 100  # unreadable images after which even --bad_images skip gives up: the disk is gone, not an image


def add_flags(parser: argparse.ArgumentParser, pin_mem: bool = True) -> None:
    """Add the flags that say where images come from."""
    parser.add_argument("--data_path", default="../imagenet", type=str, help="folder with train/ and val/")
    parser.add_argument("--dataset", default="", help="timm data set in --data_path: torch/cifar10, wds/..., hfds/...")
    parser.add_argument("--train_split", default="train", help="its training split")
    parser.add_argument("--val_split", default="validation", help="its validation split")
    parser.add_argument("--bad_images", default="stop", choices=["stop", "skip"], help="what an unreadable image does")
    parser.add_argument("--num_workers", default=4, type=int, help="loader processes per process")
    parser.add_argument("--pin_mem", action="store_true", help="copy through pinned memory")
    if pin_mem:
        parser.add_argument("--no_pin_mem", action="store_false", dest="pin_mem")
    parser.set_defaults(pin_mem=pin_mem)


# ---- data sets: items are (PIL image, class index)


def to_rgb(image: Image.Image) -> Any:  # an image, but transforms are typed to return what they are given
    """The image in 8-bit RGB; Pillow alone would clip 16-bit greyscale, which would be white nearly everywhere."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def read_image(path: str | Path) -> Any:
    """An image file as 8-bit RGB; raises what Pillow raises."""
    with Image.open(path) as image:
        return to_rgb(image)


class UnlabelledImages(Dataset):
    """Images directly in one folder, class 0."""

    def __init__(self, root: Path):
        self.samples = [(str(p), 0) for p in sorted(root.iterdir()) if p.suffix.lower() in IMG_EXTENSIONS]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.samples[index][0]), 0


class ListedImages(Dataset):
    """Images named by the lines "<path> <class index>" of a text file, relative to one of `roots`.

    Args:
        labelled: False takes lines "<path>", class 0.
    Raises:
        UserError: a line is not of that form, there is none, or the first image is under no root.
    """

    def __init__(self, path: Path, *roots: Path, labelled: bool = True):
        form = "'<path> <class index>'" if labelled else "'<path>'"
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is no UTF-8 text, expected lines {form}") from error
        rows = [line.rsplit(maxsplit=1) if labelled else [line, "0"] for line in lines]
        bad = next((i for i, row in enumerate(rows, 1) if len(row) != 2 or not row[1].isdecimal()), None)
        if bad is not None or not rows:
            raise UserError(f"{path}: line {bad or 1}: expected {form}")
        root = next((root for root in roots if (root / rows[0][0]).is_file()), None)
        if root is None:
            raise UserError(f"{path}: {rows[0][0]} is not in {' or '.join(map(str, roots))}")
        self.root = str(path)
        self.samples = [(str(root / name), int(label)) for name, label in rows]
        self.classes = list(range(max(label for _, label in self.samples) + 1))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path), label


def image_dataset(
    data_path: str,
    train: bool,
    labelled: bool = True,
    name: str = "",
    split: str = "",
    batch_size: int = 1,
    lists: bool = False,
    direct: bool = False,
) -> Any:
    """The training or validation images of a run.

    Args:
        data_path: folder with train/ and val/, each <class>/<image>.
        labelled: False (pre-training) also takes images without class folders, and all of data_path if it has neither
            train/ nor val/.
        name: "" for folders, else a data set of timm's factory (torch/cifar10, wds/..., hfds/...) kept in data_path.
        split: the factory's split, default train or validation. batch_size: whole batches of it are streamed.
        lists: go by the files train.txt and val.txt of data_path where both exist.
        direct: data_path itself holds the class folders.
    Raises:
        UserError: something is missing or empty; the message says what was expected where.
    """
    if name:
        return _timm_dataset(name, data_path, train, split, batch_size)
    root = Path(data_path) / ("train" if train else "val")
    if not Path(data_path).is_dir():
        raise UserError(f"--data_path {data_path}: no such folder")
    if direct or not (labelled or any((Path(data_path) / split).is_dir() for split in ("train", "val"))):
        root = Path(data_path)
    if lists and all((Path(data_path) / f"{name}.txt").is_file() for name in ("train", "val")):
        return ListedImages(root.with_suffix(".txt"), root, Path(data_path))
    if not root.is_dir():
        raise UserError(f"--data_path {data_path}: has no folder {root.name}/, expected {root}/<class>/<image>")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        flat = UnlabelledImages(root)
        if labelled and len(flat):
            raise UserError(f"{root}: has {len(flat)} images but no class folders, expected {root}/<class>/<image>")
        if not len(flat):
            raise UserError(f"{root}: has no class folders and no images, expected {root}/<class>/<image>")
        return flat
    dataset = ImageFolder(str(root), loader=read_image, allow_empty=True)
    used = {target for _, target in dataset.samples}
    empty = [c for c, target in dataset.class_to_idx.items() if target not in used]
    if empty:
        raise UserError(f"{root / empty[0]}: class folder without images ({len(empty)} of {len(classes)} classes)")
    return dataset


def _timm_dataset(name: str, root: str, train: bool, split: str, batch_size: int) -> Any:
    split = split or ("train" if train else "validation")
    if name.split("/")[0] not in TIMM_READERS or "/" not in name:
        expected = ", ".join(f"{reader}/..." for reader in TIMM_READERS)
        raise UserError(f"--dataset {name}: expected one of {expected}")
    try:
        with on_main_first():
            download = name.startswith("torch/")
            return create_dataset(name, root, split, is_training=train, download=download, batch_size=batch_size)
    except Exception as error:  # the factory and its back ends raise many types
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"--dataset {name}: split {split} cannot be read from --data_path {root} ({reason})") from error


def check_classes(train: Any, val: Any, nb_classes: int) -> None:
    """Compare the class folders of two data sets with each other and with the classifier.

    Raises:
        UserError: there are more classes than outputs, or the same index would mean different classes.
    """
    classes = [getattr(dataset, "classes", None) for dataset in (train, val)]
    for images, found in zip(("training", "validation"), classes, strict=True):
        if found and len(found) > nb_classes:
            raise UserError(f"--nb_classes {nb_classes}: the {images} images have {len(found)} classes")
    if classes[0] and classes[1] and classes[0] != classes[1] and isinstance(val, ImageFolder):
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        raise UserError(f"{val.root}: its class folders differ from the training ones, first {odd[0]}")


# ---- transforms


class RandomResizedCrop(transforms.RandomResizedCrop):
    """torchvision's crop with a single attempt: a box too large is clipped to the image, never redrawn."""

    @staticmethod
    def get_params(img: Any, scale: list[float], ratio: list[float]) -> tuple[int, int, int, int]:
        width, height = img.size
        area = width * height * torch.empty(1).uniform_(scale[0], scale[1]).item()
        log_ratio = torch.log(torch.tensor(ratio))
        aspect = torch.exp(torch.empty(1).uniform_(float(log_ratio[0]), float(log_ratio[1]))).item()
        w = min(round(math.sqrt(area * aspect)), width)
        h = min(round(math.sqrt(area / aspect)), height)
        i = int(torch.randint(0, height - h + 1, (1,)))
        j = int(torch.randint(0, width - w + 1, (1,)))
        return i, j, h, w


def _posterize(img: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """Keeping 0 bits gives black, as Pillow computed before version 13 refused it."""
    return posterize(img, bits_to_keep, **kwargs) if bits_to_keep > 0 else Image.new(img.mode, img.size)


def repair_posterize(policy: Any) -> Any:
    """Let a timm augmentation policy keep 0 bits of an image; returns it."""
    for op in getattr(policy, "ops", None) or [op for part in getattr(policy, "policy", []) for op in part]:
        if isinstance(op, AugmentOp) and op.aug_fn is posterize:
            op.aug_fn = _posterize
    return policy


def tensor_and_normalize(mean=IMAGENET_MEAN, std=IMAGENET_STD) -> list[Callable]:
    return [transforms.ToTensor(), transforms.Normalize(mean, std)]


def probe_transform(input_size: int = 224) -> transforms.Compose:
    """Training transform of linear probing: one-attempt crop of 8-100 % and a flip."""
    crop = RandomResizedCrop(input_size, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *tensor_and_normalize()])


def finetune_transform(
    input_size: int,
    color_jitter: float | None = None,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    interpolation: str = "bicubic",
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
) -> Any:
    """timm's training transform: crop, flip, RandAugment, normalise, random erasing."""
    transform: Any = create_transform(
        input_size=input_size,
        is_training=True,
        color_jitter=color_jitter,  # type: ignore[arg-type]  # None: no jitter
        auto_augment=aa or None,
        interpolation=interpolation,
        re_prob=reprob,
        re_mode=remode,
        re_count=recount,
        mean=mean,
        std=std,
    )
    for step in transform.transforms:
        repair_posterize(step)
    return transform


def eval_transform(
    input_size: int = 224, crop_pct: float | None = None, mean=IMAGENET_MEAN, std=IMAGENET_STD
) -> transforms.Compose:
    """Shorter side to input_size / crop_pct, centre crop, normalise. crop_pct: default 0.875, above 224 pixels 1."""
    shorter = int(input_size / (crop_pct or (224 / 256 if input_size <= 224 else 1)))
    resize = transforms.Resize(shorter, interpolation=transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(input_size), *tensor_and_normalize(mean, std)])


# ---- batches


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators by key; in the main process restore them afterwards."""
    in_main = get_worker_info() is None
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if in_main else None  # noqa: NPY002
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])  # noqa: NPY002 - timm draws from the global generator
    torch.default_generator.manual_seed(words[2])
    yield
    if before:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


class Sample(NamedTuple):
    image: Any  # None: unreadable
    target: int
    problems: list[str]  # "path: reason" of unreadable images met on the way


class _Samples(Dataset):
    """Decoded, augmented samples; keys are those of `_EpochSampler`, and random draws depend on (seed, *key)."""

    def __init__(self, base: Any, transform: Callable, seed: int, replace_bad: bool):
        self.base, self.transform, self.seed, self.replace_bad = base, transform, seed, replace_bad

    def _decode(self, index: int) -> tuple[Image.Image, int]:
        reader = getattr(self.base, "reader", None)  # timm's own ImageDataset hides unreadable files
        image, target = self.base[index] if reader is None else reader[index]
        image = image if isinstance(image, Image.Image) else Image.open(image)
        return to_rgb(image), target

    def _name(self, index: int) -> str:
        samples = getattr(self.base, "samples", None)
        return samples[index][0] if samples else f"image {index} of {type(self.base).__name__}"

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        first = key[1]
        problems: list[str] = []
        for index in range(first, first + (MAX_BAD_IN_A_ROW if self.replace_bad else 1)):
            index %= len(self.base)
            try:
                image, target = self._decode(index)
            except Exception as error:  # Pillow raises many types for damaged files
                reason = " ".join(str(error).split()) or type(error).__name__
                problems.append(f"{self._name(index)}: unreadable image ({reason})")
                continue
            with seeded(self.seed, *key):
                return Sample(self.transform(image), target, problems)
        return Sample(None, -1, problems)


class _Stream(IterableDataset):
    """Augmented samples of a data set that can only be read in sequence; seeds count samples per worker."""

    def __init__(self, base: Any, transform: Callable, seed: int):
        self.base, self.transform, self.seed, self.epoch = base, transform, seed, 0

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        for count, (image, target) in enumerate(self.base):
            with seeded(self.seed, self.epoch, rank(), worker.id if worker else 0, count):
                yield Sample(self.transform(image), target, [])


class _EpochSampler(Sampler):
    """Yields (epoch, index), or (epoch, index, copy) of a sampler that tells copies; can start inside an epoch."""

    def __init__(self, sampler: Any):
        self.sampler, self.epoch, self.first = sampler, 0, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        self.sampler.set_epoch(self.epoch)
        for index in itertools.islice(self.sampler, self.first, None):
            yield (self.epoch, *index) if isinstance(index, tuple) else (self.epoch, index)


def _collate(samples: list[Sample], collate: Callable = default_collate) -> tuple[Any, Tensor, list[str]]:
    problems = [problem for sample in samples for problem in sample.problems]
    readable = [sample for sample in samples if sample.image is not None]
    images = collate([sample.image for sample in readable]) if readable else None
    return images, torch.tensor([sample.target for sample in readable]), problems


def _ignore_signals(_worker: int) -> None:
    """A Ctrl-C or a scheduler's SIGTERM reaches the whole process group; the main process ends the workers."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


def _end_workers(iterators: list[Any]) -> None:
    """Workers that ignore SIGTERM must be told to end before the interpreter waits for them."""
    for iterator in iterators:
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


class Loader:
    """Batches (images, targets) on the device, for training or evaluation.

    Training: order and augmentation of an epoch depend on (seed, epoch, index) alone, not on workers or history.
    Evaluation: in order; each image exactly once over all ranks, rank r of R taking
    images r, r + R, ...
    Args:
        batch_size: per process.
        bad_images: "stop" raises on an unreadable image; "skip" takes the next one (training) or leaves it out
            (evaluation), and counts.
        accum_iter: a stop signal waits for the end of an update of that many batches.
        sampler: of the training images, in place of a `DistributedSampler`; yields indices, or (index, copy).
        drop_last: leave out an epoch's last batch where it is smaller.
        collate: makes a batch of what `transform` returns.
    Raises:
        UserError: the training images do not fill one batch.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable,
        batch_size: int,
        device: torch.device,
        train: bool = True,
        seed: int = 0,
        num_workers: int = 4,
        pin_mem: bool = True,
        bad_images: str = "stop",
        accum_iter: int = 1,
        sampler: Any = None,
        drop_last: bool = True,
        collate: Callable = default_collate,
    ):
        self.device, self.train, self.bad_images, self.accum_iter = device, train, bad_images, accum_iter
        self.batch_size = batch_size
        self.drop_last = drop_last or not train or isinstance(dataset, IterableDataset)
        streamed = isinstance(dataset, IterableDataset)
        if streamed:  # its reader shares the images out to ranks and workers
            dataset.set_loader_cfg(num_workers=num_workers)  # type: ignore[attr-defined]
        size: int = len(dataset)  # type: ignore[arg-type]
        self.images = size * (world_size() if streamed else 1)
        self.bad: list[str] = []  # unreadable images met so far, by this rank
        if streamed:
            sampler = None
            samples: Dataset = _Stream(dataset, transform, seed)
        else:
            samples = _Samples(dataset, transform, seed, replace_bad=train and bad_images == "skip")
            if train:
                sampler = _EpochSampler(sampler or DistributedSampler(dataset, world_size(), rank(), seed=seed))
            else:
                sampler = [(0, index) for index in range(rank(), self.images, world_size())]
        self.sampler = sampler
        self.loader = DataLoader(
            samples,
            batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=partial(_collate, collate=collate),
            pin_memory=pin_mem and device.type == "cuda",
            drop_last=train and self.drop_last,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # keeps the loader's own draws out of the model's
            persistent_workers=num_workers > 0 and sampler is not None,
        )
        catch_signals()
        self._running: list[Any] = []  # the iterator whose workers are alive
        weakref.finalize(self, _end_workers, self._running)
        if train and len(self) == 0:
            raise UserError(
                f"--batch_size {batch_size}: {self.images} training images do not fill one batch on each of "
                f"{world_size()} processes"
            )
        if train and len(self) < accum_iter:
            raise UserError(f"--accum_iter {accum_iter}: an epoch has only {len(self)} batches, no update would happen")

    def __len__(self) -> int:
        """Batches per epoch and rank."""
        own = self.images // world_size() if self.sampler is None else len(self.sampler)
        return own // self.batch_size if self.train and self.drop_last else -(-own // self.batch_size)

    def _full(self, step: int) -> int:
        """Images that training batch `step` must have."""
        return self.batch_size if self.drop_last else min(self.batch_size, len(self.sampler) - step * self.batch_size)

    def start(self, position: Position) -> tuple[int, dict[str, list[float]]]:
        """The batch at which a run continues, and the meters there; none where the steps of the epoch changed."""
        step, rest = divmod(position.images, self.batch_size * world_size())
        if step == len(self) and not rest:  # all of the epoch, also when its last update was incomplete
            return step, position.own_meters()
        rest += step % self.accum_iter
        if self.sampler is None and position.images:
            log("a streamed data set cannot be entered inside an epoch; starting the epoch anew")
            return 0, {}
        if rest:
            log(f"{position.images} images are no whole number of updates of this run; continuing at the one before")
        rest += step > len(self)
        step = min(step, len(self) - 1 if rest else len(self))  # at least one batch, for the epoch's means
        step -= step % self.accum_iter
        return step, {} if rest or not step else position.own_meters()

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Any, Tensor]]:
        """The batches of an epoch from number `start` on; images are a list where the transform gives several.

        Raises:
            UserError: an image is unreadable and bad_images is "stop".
            Stopped: a stop signal arrived; raised where an update is complete.
        """
        if isinstance(self.sampler, _EpochSampler):
            self.sampler.epoch = epoch
            self.sampler.first = start * self.batch_size
        elif isinstance(self.loader.dataset, _Stream):
            self.loader.dataset.epoch = epoch
            if hasattr(self.loader.dataset.base, "set_epoch"):
                self.loader.dataset.base.set_epoch(epoch)
        self._running[:] = [iter(self.loader)]
        for step, (images, targets, problems) in enumerate(self._running[0], start):
            fatal = bool(problems) and (self.bad_images == "stop" or (self.train and len(targets) < self._full(step)))
            if self.train:
                signum, anywhere = agree(fatal)
                if signum and step % self.accum_iter == 0:
                    raise Stopped(signum)
                if anywhere and not fatal:
                    raise UserError("another process met an unreadable image")
            elif stop_signal():  # nothing to save in an evaluation
                raise Stopped(stop_signal())
            if fatal:
                raise UserError(f"{problems[-1]}; --bad_images skip goes on without it")
            for problem in problems:
                if problem not in self.bad:
                    self.bad.append(problem)
                    log(f"{problem}: skipped, {len(self.bad)} so far")
            if images is not None:
                yield tree_map(lambda x: x.to(self.device, non_blocking=True), (images, targets))


def build_loader(args: argparse.Namespace, dataset: Any, transform: Callable, device: torch.device, **kwargs) -> Loader:
    """Batches of a data set by the flags; kwargs: of `Loader`."""
    options = {"num_workers": args.num_workers, "pin_mem": args.pin_mem, "bad_images": args.bad_images}
    return Loader(dataset, transform, device=device, **{"batch_size": args.batch_size, **options, **kwargs})


def pretrain_loader(args: argparse.Namespace, transform: Callable, device: torch.device, **kwargs) -> Loader:
    """Training batches of the flags; labels are not needed. kwargs: of `Loader`."""
    images = image_dataset(args.data_path, True, False, args.dataset, args.train_split, args.batch_size)
    return build_loader(args, images, transform, device, seed=args.seed, accum_iter=args.accum_iter, **kwargs)


def supervised_loaders(
    args: argparse.Namespace,
    transform: Callable,
    val_transform: Callable,
    device: torch.device,
    val_path: str = "",
    val_batch_size: int = 0,
    **kwargs,
) -> tuple[Loader, Loader]:
    """Training and validation batches of the flags, whose classes agree.

    Args:
        val_path: folder of the validation images, if not --data_path. val_batch_size: if not --batch_size.
        kwargs: `lists` and `direct` as in `image_dataset`.
    """
    train = image_dataset(args.data_path, True, True, args.dataset, args.train_split, args.batch_size, **kwargs)
    path = val_path or args.data_path
    val = image_dataset(path, False, True, args.dataset, args.val_split, args.batch_size, **kwargs)
    check_classes(train, val, args.nb_classes)
    return (
        build_loader(args, train, transform, device, seed=args.seed, accum_iter=args.accum_iter),
        build_loader(args, val, val_transform, device, train=False, batch_size=val_batch_size or args.batch_size),
    )
