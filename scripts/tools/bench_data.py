"""What an image costs on one core before it reaches the network: bench.py data METHOD [flags of its main_pretrain.py].

Samples of the method's training loader are made and collated by this process alone, in turn with torchvision's plain
pipeline (decode, random resized crop, flip, tensor, normalise). Parts are shares of the functions' times under Python's
profiler, applied to the time without it. What is done with whole batches on the device is timed here on the CPU.
"""

import argparse
import cProfile
import importlib
import pstats
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.datasets.folder import default_loader

from common import datasets

# Parts of the work, by names of functions of Pillow and torch, as the profiler prints them.
PARTS = {
    "decode": r"ImagingDecoder|_io\.|Image\.open|'(seek|read|tell)'|draft",
    "crop, resize, flip": r"'(resize|crop|transpose|expand|transform|reduce)' of 'ImagingCore'",
    "colour": r"'(convert|filter|gaussian_blur|point|point_transform|putband|getband|histogram)' of 'ImagingCore'|"
    r"PIL\._imaging\.(blend|merge)|'(box_blur|convert_matrix|chop_\w+)'",
    "tensor": r"'(tobytes|permute|contiguous|to|div_?|sub_|float|view|copy|reshape|transpose|clone)' of '(torch|numpy)|"
    r"from_numpy|numpy\.(array|asarray)|frombuffer|as_tensor|encode",
}


def part_of(function: str) -> str:
    """The part that a function of the profiler's table belongs to."""
    return next((part for part, names in PARTS.items() if re.search(names, function)), "Python and draws")


def shares(work: Callable[[], Any]) -> dict[str, float]:
    """Share of each part in the time of the work; their sum is 1."""
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(work)
    stats: Any = pstats.Stats(profiler)
    sums = dict.fromkeys([*PARTS, "Python and draws"], 0.0)
    for (_, _, name), (_, _, own, *_) in stats.stats.items():
        sums[part_of(name)] += own
    total = sum(sums.values())
    return {part: value / total for part, value in sums.items()}


def plain(size: int) -> Callable:
    """torchvision's plain training transform."""
    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    return transforms.Compose([*steps, transforms.Normalize(datasets.IMAGENET_MEAN, datasets.IMAGENET_STD)])


def report(method: str, args: argparse.Namespace, flags: argparse.Namespace, size: int) -> None:
    """Print milliseconds per image and core of the method's samples, their parts, and of the plain pipeline.

    Args:
        args: of bench.py: rounds. flags: of the method's main_pretrain.py. size: side of the images in pixels.
    """
    torch.set_num_threads(1)
    main = importlib.import_module(f"{method}.main_pretrain")
    flags.num_workers = 0
    loader, _ = main.build_data(flags, torch.device("cpu"))
    inner: Any = loader.loader
    count = min(len(inner.dataset.base), 128) // flags.batch_size * flags.batch_size
    keys, paths = [(0, i) for i in range(count)], [path for path, _ in inner.dataset.base.samples[:count]]
    transform = plain(size)

    def own() -> list[Any]:
        return inner.dataset.__getitems__(keys)

    def torchvision() -> list[Any]:
        return [transform(default_loader(path)) for path in paths]

    def timed(work: Callable, *values: Any) -> float:
        """Milliseconds of processor time per image."""
        begun = time.process_time()
        for value in values or ((),):
            work(*value)
        return 1e3 * (time.process_time() - begun) / count

    samples, others = own(), torchvision()
    batches = [(samples[i : i + flags.batch_size],) for i in range(0, count, flags.batch_size)]
    plain_batches = [(others[i : i + flags.batch_size],) for i in range(0, count, flags.batch_size)]
    made = [(inner.collate_fn(batch)[0], None) for (batch,) in batches]
    names = ("samples", "collate", "on the device", "plain samples", "plain collate")
    rows: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(max(5, args.rounds)):
        rows["samples"].append(timed(own))
        rows["collate"].append(timed(inner.collate_fn, *batches))
        rows["on the device"].append(timed(loader.to_device, *made))
        rows["plain samples"].append(timed(torchvision))
        rows["plain collate"].append(timed(default_collate, *plain_batches))
    median = {name: statistics.median(values) for name, values in rows.items()}
    print(f"{method}, {size} px, {count} images, batches of {flags.batch_size}; ms of one core per image, medians of")
    print(f"{len(rows['samples'])} rounds (least to most)\n")
    for name, values in rows.items():
        print(f"{name:20}{median[name]:8.3f}   ({min(values):.3f} to {max(values):.3f})")
    whole, other = (sum(median[name] for name in part) for part in (names[:3], names[3:]))
    print(f"{'all':20}{whole:8.3f}   {1e3 / whole:.0f} images/s and core; {whole / other:.2f} x the plain pipeline\n")
    for part, share in shares(own).items():
        print(f"  {part:18}{share * median['samples']:8.3f}   {share:.0%} of the samples' time")
