"""Speed and memory of a method's pre-training step: python scripts/bench.py METHOD [flags of its main_pretrain.py].

Rows are variants of the same step, measured in turn in one run: the reference formulation in fp32, then what trains by
default in fp32 and, where the device has fast bf16, in bf16. Times are medians over all rounds.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from common import datasets, distributed

# The authors' formulation as keyword arguments of build_model(args, ...): what a method's speed-up is measured against.
REFERENCE: dict[str, dict[str, Any]] = {"saim": {"attn_impl": "mask"}, "semaim": {"attn_impl": "authors"}}
# The paper's flags at a batch size for one machine; flags of the command line come later and win.
RECIPE = {
    "saim": "--batch_size 8 --gaussian_kernel_size 9 --gaussian_sigma 1 --norm_pix_loss",
    "semaim": "--model aim_base --batch_size 8 --gaussian_kernel_size 9 --gaussian_sigma 1 --norm_pix_loss "
    "--permutation_type attention_center --clip_grad 3",
    "cae": "--model cae_base_patch16_224_8k_vocab --discrete_vae_weight_path random --batch_size 8 --clip_grad 3 "
    "--drop_path 0.1 --imagenet_default_mean_and_std",
    "a2mim": "--batch_size 8 --mask_layer 3 --mask_init 1e-6 --loss focal_l1 --fft_weight 0.5 --fft_unmask_weight 1e-3",
    "udi": "--batch_size 4 --local_crops_number 10 --norm_last_layer false",
}
METHODS = sorted(p.parent.name for p in Path(__file__).resolve().parents[1].glob("*/main_pretrain.py"))
PHASES = ("data", "forward", "backward", "optimizer")


@dataclass
class Variant:
    """One row of the table: model keywords and precision in, measurements out."""

    name: str
    overrides: dict[str, Any]
    precision: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    memory: float = 0.0  # bytes at the peak
    flops: float = 0.0  # of matrix products, forward and backward, per image

    def median(self, *phases: str) -> float:
        """Median seconds of the phases' sum (default: the whole step)."""
        return statistics.median(sum(t) for t in zip(*(self.seconds[p] for p in phases or PHASES), strict=True))


def get_args_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("Benchmark", allow_abbrev=False, usage="%(prog)s METHOD [flags], listed by --help")
    p.add_argument("method", choices=METHODS)
    p.add_argument("--steps", default=3, type=int, help="timed steps per variant and round, after one to warm up")
    p.add_argument("--rounds", default=2, type=int, help="passes over all variants")
    p.add_argument("--profile", action="store_true", help="also print the operators that the default variant spends on")
    p.add_argument("--data_path", default="", help="image folder; default: synthetic 500x375 JPEGs")
    return p


def synthetic_images(folder: Path, count: int) -> str:
    """Write noise images of a photograph's size and compressibility; returns the data path."""
    (folder / "train").mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (38, 50, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / "train" / f"{i}.jpg", quality=90)
    return str(folder)


def sync(device: torch.device) -> float:
    """Wait for the device; returns the time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def resident_bytes(peak: bool = False) -> float:
    """Memory of this process now, or its peak since `reset_peak`."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def reset_peak(device: torch.device) -> float:
    """Start a new peak of memory; returns the memory in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory would hide the next variant's
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes()


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product: the ceiling of the step on this device, now."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=distributed.amp_dtype(precision, device)) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = sync(device)
        torch.mm(a, b)
        best = min(best, sync(device) - start)
    return 2 * n**3 / best


def measure(
    variant: Variant, args: argparse.Namespace, method: str, loader: datasets.Loader, context: dict, steps: int
) -> None:
    """Add one round of steps to the variant's measurements; context: of `batch_loss`."""
    main = importlib.import_module(f"{method}.main_pretrain")
    engine = importlib.import_module(f"{method}.engine_pretrain")
    device = loader.device
    before = reset_peak(device)
    torch.manual_seed(args.seed)
    model = main.build_model(args, **variant.overrides).to(device)
    net = distributed.wrap(model, device, args.compile)
    optimizer = main.build_optimizer(args, model, 1e-4)
    updater = distributed.Updater(optimizer, device, variant.precision, clip_grad=args.clip_grad)
    epoch, batches = 0, loader.batches()
    for step in range(steps + 1):
        times = [sync(device)]
        batch = next(batches, None)
        if batch is None:
            epoch += 1
            batches = loader.batches(epoch)
            batch = next(batches)
        times.append(sync(device))
        with updater.forward(net, step):
            loss = engine.batch_loss(net, batch, **context)
        times.append(sync(device))
        loss.backward()
        times.append(sync(device))
        updater.optimizer.step()
        updater.optimizer.zero_grad()
        times.append(sync(device))
        if step:  # the first one warms up
            for phase, start, end in zip(PHASES, times, times[1:], strict=False):
                variant.seconds[phase].append(end - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes(peak=True)
    variant.memory = max(variant.memory, peak - before)
    if not variant.flops:
        with FlopCounterMode(display=False) as counter:
            engine.batch_loss(model, batch, **context).backward()
        variant.flops = counter.get_total_flops() / args.batch_size


def profile(args: argparse.Namespace, method: str, loader: datasets.Loader, context: dict, precision: str) -> str:
    """Table of the operators of one default step, most expensive first."""
    main = importlib.import_module(f"{method}.main_pretrain")
    engine = importlib.import_module(f"{method}.engine_pretrain")
    model = main.build_model(args).to(loader.device)
    optimizer = main.build_optimizer(args, model, 1e-4)
    updater = distributed.Updater(optimizer, loader.device, precision)
    batch = next(loader.batches())
    for step in range(2):
        with torch.profiler.profile() if step else torch.autograd.profiler.record_function("warm-up") as profiler:
            with updater.forward(model, step):
                loss = engine.batch_loss(model, batch, **context)
            updater.backward(loss, step)
    key = f"self_{loader.device.type}_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60)  # type: ignore[union-attr]


def main(args: argparse.Namespace, rest: list[str]) -> None:
    module = importlib.import_module(f"{args.method}.main_pretrain")
    flags = module.get_args_parser().parse_args([*RECIPE.get(args.method, "").split(), *rest])
    device = distributed.init(flags.device)
    with tempfile.TemporaryDirectory() as folder:
        flags.data_path = args.data_path or synthetic_images(Path(folder), 4 * flags.batch_size)
        loader, context = module.build_data(flags, device)
        variants = [Variant("default, fp32", {}, "fp32")]
        if args.method in REFERENCE:
            reference = REFERENCE[args.method]
            name = ", ".join(f"{k}={v}" for k, v in reference.items())
            variants.insert(0, Variant(f"reference ({name}), fp32", reference, "fp32"))
        if flags.amp_dtype in ("bf16", "fp16") or (device.type == "cuda" and flags.amp_dtype == "auto"):
            precision = flags.amp_dtype if flags.amp_dtype != "auto" else "bf16"
            variants.append(Variant(f"default, {precision}", {}, precision))
        for _ in range(args.rounds):
            for variant in variants:
                measure(variant, flags, args.method, loader, context, args.steps)
        report(variants, flags, device)
        if args.profile:
            print(profile(flags, args.method, loader, context, variants[-1].precision))


def report(variants: list[Variant], flags: argparse.Namespace, device: torch.device) -> None:
    """Print the table; ratios are to the first row."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    compiled = ", compiled" if flags.compile else ""
    network = next(v for k, v in vars(flags).items() if k in ("model", "arch", "backbone"))
    size = getattr(flags, "input_size", 0) or flags.global_size
    what = f"{network}, {size} px, batch {flags.batch_size}{compiled}"
    print(f"{what}; {name}; torch {torch.__version__}")
    print(
        f"{'':34}{'images/s':>9}{'ratio':>7}{'ms/step':>9}"
        + "".join(f"{phase:>10}" for phase in PHASES)
        + f"{'peak GB':>9}{'GFLOP/img':>11}{'TFLOP/s':>9}{'of peak':>9}"
    )
    peaks = {precision: matmul_peak(device, precision) for precision in {v.precision for v in variants}}
    slowest = variants[0].median()
    for v in variants:
        total, busy = v.median(), v.median("forward", "backward", "optimizer")
        rate = v.flops * flags.batch_size / busy
        print(
            f"{v.name:34}{flags.batch_size / total:9.2f}{slowest / total:6.2f}x{1e3 * total:9.1f}"
            + "".join(f"{1e3 * v.median(phase):10.1f}" for phase in PHASES)
            + f"{v.memory / 1e9:9.2f}{v.flops / 1e9:11.1f}{rate / 1e12:9.3f}{rate / peaks[v.precision]:9.0%}"
        )
    print("GFLOP/img: matrix products, forward and backward; of peak: of a large matrix product measured in this run")


if __name__ == "__main__":
    known, unknown = get_args_parser().parse_known_args()
    distributed.run(lambda args: main(args, unknown), known)
