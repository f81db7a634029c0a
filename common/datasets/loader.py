"""Batches that depend on (seed, epoch, index) only, can start inside an epoch, and stop in order."""

import argparse
import itertools
import os
import re
import signal
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate
from torchvision.transforms.functional import get_image_size

from common import distributed
from common.datasets.channels import to_channels
from common.datasets.device import loader_options
from common.datasets.files import to_rgb
from common.datasets.images import follow_classes, image_dataset
from common.datasets.seeds import seed_all, seeded
from common.datasets.transforms import halves
from common.distributed import Position, Stopped, UserError, agree, log, rank, stop_signal, world_size

THINNEST = 1000  # the longer side of an image over the shorter one, at most
MAX_BAD_IN_A_ROW = 100  # unreadable images after which even --bad_images skip gives up: the disk is gone, not an image


class Sample(NamedTuple):
    image: Any  # None: unreadable
    target: Any  # class index, or what a joint transform makes of the target
    problems: list[str]  # "path: reason" of unreadable images met on the way


class _Samples(Dataset):
    """Decoded, augmented samples; keys are those of `_EpochSampler`, and random draws depend on (seed, *key)."""

    def __init__(self, base: Any, transform: Callable, seed: int, replace_bad: bool, joint: bool, turn: bool):
        self.base, self.transform, self.seed = base, transform, seed
        self.replace_bad, self.joint, self.turn = replace_bad, joint, turn

    def _decode(self, index: int) -> tuple[Any, Any]:
        reader = getattr(self.base, "reader", None)  # timm's own ImageDataset hides unreadable files
        image: Any
        image, target = self.base[index] if reader is None else reader[index]
        image = image if isinstance(image, Image.Image | Tensor) else Image.open(image)
        if self.turn and isinstance(image, Image.Image):
            image = ImageOps.exif_transpose(image)
        chans = getattr(self.base, "in_chans", None)
        image = to_channels(image, chans) if chans else to_rgb(image)
        size = get_image_size(image)
        if max(size) > THINNEST * min(size):  # resizing the shorter side would fill the memory
            raise ValueError("{} x {} pixels are too thin".format(*size))
        return image, target

    def _name(self, index: int) -> str:
        samples = getattr(self.base, "samples", None)
        return samples[index][0] if samples else f"image {index} of {type(self.base).__name__}"

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, ...]]) -> list[Sample]:
        """The samples of a batch."""
        with seeded():
            return [self._sample(key) for key in keys]

    def _sample(self, key: tuple[int, ...]) -> Sample:
        first = key[1]
        problems: list[str] = []
        for index in range(first, first + (MAX_BAD_IN_A_ROW if self.replace_bad else 1)):
            index %= len(self.base)
            what = "unreadable image"
            try:
                image, target = self._decode(index)
                what = "{} x {} pixels, which a transform cannot take".format(*get_image_size(image))
                seed_all(self.seed, *key)
                image, target = self.transform(image, target) if self.joint else (self.transform(image), target)
                return Sample(image, target, problems)
            except Exception as error:  # Pillow and transforms raise many types
                reason = " ".join(str(error).split()) or type(error).__name__
                problems.append(f"{self._name(index)}: {what} ({reason})")
        return Sample(None, -1, problems)


class _EpochSampler(Sampler):
    """Yields (epoch, index), or (epoch, index, copy) of a sampler that numbers copies; can start inside an epoch."""

    def __init__(self, sampler: Any):
        self.sampler, self.epoch, self.first = sampler, 0, 0
        self.last: int | None = None  # None: to the end

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        self.sampler.set_epoch(self.epoch)
        for index in itertools.islice(self.sampler, self.first, self.last):
            yield (self.epoch, *index) if isinstance(index, tuple) else (self.epoch, index)


def _collate(samples: list[Sample], collate: Callable, joint: bool) -> tuple[Any, Any, list[str]]:
    problems = [problem for sample in samples for problem in sample.problems]
    readable = [sample for sample in samples if sample.image is not None]
    if joint:
        images, targets = collate([sample[:2] for sample in readable]) if readable else (None, [])
        return images, targets, problems
    images = collate([sample.image for sample in readable]) if readable else None
    return images, torch.tensor([sample.target for sample in readable]), problems


def _ignore_signals(_worker: int) -> None:
    """A Ctrl-C or a scheduler's SIGTERM reaches the whole process group; the main process ends the workers."""
    for signum in distributed.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def _end_workers(iterators: list[Any]) -> None:
    """Workers that ignore SIGTERM must be asked to end before the interpreter waits for them."""
    for iterator in iterators:
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


class Loader:
    """Batches (images, targets) on the device, for training or evaluation.

    Training: order and augmentation of an epoch depend on (seed, epoch, index) alone, not on workers or history.
    Evaluation: in order, each image once over all ranks; rank r of R takes images r, r + R, ...
    Args:
        transform: its second half (`transforms.halves`) is applied to batches on the device.
        batch_size: per process.
        bad_images: "stop" raises on an unreadable image; "skip" takes the next one (training) or leaves it out
            (evaluation), and counts.
        accum_iter: a stop signal waits for the end of an update of that many batches.
        sampler: of the training images, in place of a `DistributedSampler`; yields indices, or (index, copy).
        drop_last: leave out an epoch's last batch where it is smaller.
        whole_updates: leave out the batches beyond images // (batch size * accum_iter * processes) updates, as BEiT.
        collate: makes a batch of what `transform` returns.
        joint: `transform` takes and returns (image, target), such as an image with its mask; targets of a batch are
            then what `collate` makes of a list of such pairs, and have its length.
        order: evaluation: number of images -> their indices in another order, of whose batches rank r of R takes whole
            ones, r, r + R, ..., so that the batches are the same on any number of processes.
        exif_transpose: turn images as their EXIF orientation says.
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
        whole_updates: bool = False,
        order: Callable[[int], list[int]] | None = None,
        joint: bool = False,
        exif_transpose: bool = False,
    ):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = min(num_workers, cores)
        self.device, self.train, self.bad_images, self.accum_iter = device, train, bad_images, accum_iter
        self.batch_size, self.whole_updates, self.processes = batch_size, whole_updates, world_size()
        self.drop_last = drop_last or not train
        self.images = len(dataset)
        self.classes = list(getattr(dataset, "classes", None) or [])
        self._labels: Tensor | None = None  # replace the targets of the data set
        self.bad: list[str] = []  # unreadable images met so far, by this rank
        transform, self._finish = halves(transform)
        if train:
            self.sampler: Any = _EpochSampler(sampler or DistributedSampler(dataset, world_size(), rank(), seed=seed))
        elif order is None:
            self.sampler = [(0, index) for index in range(rank(), self.images, world_size())]
        else:
            indices, firsts = order(self.images), range(rank() * batch_size, self.images, world_size() * batch_size)
            self.sampler = [(0, index) for first in firsts for index in indices[first : first + batch_size]]
        self.loader = DataLoader(
            _Samples(dataset, transform, seed, train and bad_images == "skip", joint, exif_transpose),
            batch_size,
            sampler=self.sampler,
            num_workers=num_workers,
            collate_fn=partial(_collate, collate=collate, joint=joint),
            pin_memory=pin_mem and device.type == "cuda",
            drop_last=train and self.drop_last,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # keeps the loader's own draws out of the model's
            persistent_workers=num_workers > 0,
        )
        distributed.catch_signals()
        self._running: list[Any] = []  # the iterator whose workers are alive
        weakref.finalize(self, _end_workers, self._running)
        if train and len(self) == 0:
            few = f"{self.images} training images do not fill one batch on each of {world_size()} processes"
            raise UserError(f"--batch_size {batch_size}: {few}")
        if isinstance(self.sampler, _EpochSampler) and whole_updates:
            self.sampler.last = len(self) * batch_size
        if train and len(self) < accum_iter:
            raise UserError(f"--accum_iter {accum_iter}: an epoch has only {len(self)} batches, no update would happen")

    def __len__(self) -> int:
        """Batches per epoch and rank."""
        whole, rest = divmod(len(self.sampler), self.batch_size)
        batches = whole + (rest > 0 and not (self.train and self.drop_last))
        if not self.whole_updates or batches < self.accum_iter:
            return batches
        # Processes may share out a few images twice, which upstream does not count.
        return self.accum_iter * max(1, self.images // (self.batch_size * self.accum_iter * self.processes))

    @property
    def left_out(self) -> int:
        """Images that fill no batch of an epoch."""
        return max(0, self.images - len(self) * self.batch_size * self.processes)

    def one_image(self) -> Any:
        """A batch of the first image alone; None where it cannot be read."""
        images, targets, _ = self.loader.collate_fn([self.loader.dataset[(0, 0)]])
        return None if images is None else self.to_device(images, targets)

    def match_classes(self, state: dict[str, Any], path: str) -> None:
        """Let targets be the class indices of a checkpoint read from path, by the names of the classes.

        Raises:
            UserError: a class here is none of the checkpoint's.
        """
        names = distributed.flags_of(state).get("class_names")
        if not names or names == self.classes or not all(isinstance(name, str) for name in self.classes):
            return
        unknown = [name for name in self.classes if name not in names]
        if unknown:
            odd = f"class folder {unknown[0]} ({len(unknown)} of {len(self.classes)} such)"
            raise UserError(f"{path}: {odd} is none of its {len(names)} classes {', '.join(names[:3])} ...")
        self._labels = torch.tensor([names.index(name) for name in self.classes])
        log(f"{len(self.classes)} of the checkpoint's {len(names)} classes are here, matched by name")

    def start(self, position: Position) -> tuple[int, dict[str, list[float]]]:
        """The batch at which a run continues, and the meters there; none where the steps of the epoch changed."""
        step, rest = divmod(position.images, self.batch_size * world_size())
        epoch_is_done = step == len(self) and rest == 0  # also when its last update was incomplete
        if epoch_is_done:
            return step, position.own_meters()
        whole_updates = rest == 0 and step % self.accum_iter == 0
        if whole_updates and step <= len(self):
            return step, position.own_meters() if step else {}
        if not whole_updates:
            log(f"{position.images} images are no whole number of updates of this run; continuing at the one before")
        step = min(step, len(self) - 1)  # the epoch's means need at least one batch
        return step - step % self.accum_iter, {}

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Any, Any]]:
        """The batches of an epoch from number `start` on; images are a list where the transform gives several.

        Raises:
            UserError: an image is unreadable and bad_images is "stop", or a loader process ended.
            Stopped: a stop signal arrived; raised where an update is complete.
        """
        if isinstance(self.sampler, _EpochSampler):
            self.sampler.epoch = epoch
            self.sampler.first = start * self.batch_size
        for step, (images, targets, problems) in enumerate(self._read(), start):
            rest = self.batch_size if self.drop_last else len(self.sampler) - step * self.batch_size
            lost = targets is None
            is_full = not lost and len(targets) >= min(self.batch_size, rest)
            fatal = lost or bool(problems) and (self.bad_images == "stop" or (self.train and not is_full))
            if self.train:
                signum, anywhere = agree(fatal)
                if signum and step % self.accum_iter == 0:
                    raise Stopped(signum)
                if anywhere and not fatal:
                    raise UserError("another process met an unreadable image, or lost a loader process")
            elif stop_signal():  # nothing to save in an evaluation
                raise Stopped(stop_signal())
            if fatal:
                raise UserError(problems[-1] if lost else f"{problems[-1]}; --bad_images skip goes on without it")
            for problem in problems:
                if problem not in self.bad:
                    self.bad.append(problem)
                    log(f"{problem}: skipped, {len(self.bad)} so far")
            if self._labels is not None:
                targets = self._labels[targets]
            if images is not None:
                yield self.to_device(images, targets)

    def _read(self) -> Iterator[tuple[Any, Any, list[str]]]:
        """Images, targets and problems of each batch; after the end of a loader process one without targets."""
        self._running[:] = [iter(self.loader)]
        if hasattr(signal, "SIGCHLD"):  # torch would raise inside whatever runs; here it is seen at the next batch
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield from self._running[0]
        except RuntimeError as error:
            reason = re.search(r"DataLoader worker [^.]*exited unexpectedly|.*shared memory.*", str(error))
            if reason is None:
                raise
            way = "memory or /dev/shm is full, or it was killed; a smaller --num_workers needs less, 0 no /dev/shm"
            yield None, None, [f"{reason[0].strip()}: {way}"]

    def to_device(self, *batch: Any) -> tuple[Any, Any]:
        """A collated batch (images, targets) on the device, after the second half of the transform."""
        move = lambda x: x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x  # noqa: E731
        images, targets = tree_map(move, batch)
        return self._finish(images), targets


def build_loader(args: argparse.Namespace, dataset: Any, transform: Callable, device: torch.device, **kwargs) -> Loader:
    """Batches of a data set by the flags; kwargs: of `Loader`."""
    if getattr(args, "in_chans", None):
        dataset.in_chans = args.in_chans
    options = {"num_workers": args.num_workers, "pin_mem": args.pin_mem, "bad_images": args.bad_images}
    options["exif_transpose"] = getattr(args, "exif_transpose", False)  # not where a mask belongs to the image
    options |= loader_options(args)
    return Loader(dataset, transform, device=device, **{"batch_size": args.batch_size, **options, **kwargs})


def pretrain_loader(args: argparse.Namespace, transform: Callable, device: torch.device, **kwargs) -> Loader:
    """Training batches of the flags; labels are not needed. kwargs: of `Loader`."""
    skip, in_chans = args.output_dir, args.in_chans
    images = image_dataset(args.data_path, True, False, args.dataset, args.train_split, skip=skip, in_chans=in_chans)
    return build_loader(args, images, transform, device, seed=args.seed, accum_iter=args.accum_iter, **kwargs)


def supervised_loaders(
    args: argparse.Namespace,
    transform: Callable,
    val_transform: Callable,
    device: torch.device,
    val_path: str = "",
    val_batch_size: int = 0,
    whole_updates: bool = False,
    val_order: Callable[[int], list[int]] | None = None,
    **kwargs,
) -> tuple[Loader, Loader]:
    """Training and validation batches of the flags, whose classes agree; with --eval both are the validation's.

    Args:
        val_path: folder of the validation images, if not --data_path. val_batch_size: if not --batch_size.
        whole_updates: of training, as `Loader`. val_order: `Loader`'s order of the validation images.
        kwargs: `lists` and `direct` as in `image_dataset`.
    """
    kwargs |= {"skip": args.output_dir, "in_chans": args.in_chans}
    train = None if args.eval else image_dataset(args.data_path, True, True, args.dataset, args.train_split, **kwargs)
    path = val_path or args.data_path
    val = image_dataset(path, False, True, args.dataset, args.val_split, **kwargs)
    follow_classes(args, train, val)
    own = {"seed": args.seed, "accum_iter": args.accum_iter, "whole_updates": whole_updates}
    loader = None if args.eval else build_loader(args, train, transform, device, **own)
    view = {"train": False, "batch_size": val_batch_size or args.batch_size, "order": val_order}
    val_loader = build_loader(args, val, val_transform, device, **view)
    return val_loader if loader is None else loader, val_loader
