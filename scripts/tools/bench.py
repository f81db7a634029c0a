"""Speed and memory of pre-training steps: python scripts/tools/bench.py METHOD [flags of its main_pretrain.py], or all,
or data METHOD, or start.

METHOD: rows are variants of the same step, measured in turn in one run: the reference formulation in fp32, then what
trains by default in fp32 and, where the device has fast bf16, in bf16. Times are medians over all rounds.
all: a row for each network of each method, in a process of its own, in the precision that it trains in by default, and
for small segmentation networks and detectors.
data METHOD: what an image costs on one core before it reaches the network, part by part (bench_data.py).
start: what programs compute before they work (bench_start.py).
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common import datasets, distributed
from common.datasets.memory import available_bytes
from common.distributed.metrics import peak_memory, resident_bytes
from scripts.tools import bench_data, bench_dense, bench_start
from scripts.tools.flags import METHODS, NETWORK, Parser, network_of
from scripts.tools.texts import amount

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
PHASES = ("data", "forward", "backward", "optimizer")
# Images per step of a network in the table of all: on a CPU such that a step takes seconds, and on a GPU.
BATCHES = {
    "nano": (32, 512),
    "tiny|resnet18|resnet34": (8, 256),
    "small|resnet50|resnet101": (4, 128),
    "base|resnet152|resnet200": (2, 64),
    "large": (1, 32),
    "huge": (1, 16),
}
VIEWS = 2  # by which UDI's images per step are divided: each has two large views and ten small ones
# What a network needs besides its name; those for small machines get small images.
FLAGS = {
    ("saim", "nano"): "--query_depth 4 --input_size 64 --patch_size 8",
    ("semaim", "nano"): "--query_depth 4 --input_size 64 --patch_size 8",
    ("semaim", "huge"): "--query_depth 16",
    ("cae", "nano"): "--input_size 64 --patch_size 8 --second_input_size 64 --num_mask_patches 32 "
    "--decoder_embed_dim 96 --decoder_num_heads 3 --batch_size 8",
    ("cae", "large"): "--decoder_embed_dim 1024 --decoder_num_heads 16",
    ("a2mim", "vit"): "--mask_layer 0 --mask_init 0 --loss l1 --fft_weight 0.1 --fft_unmask_weight 0",
    ("a2mim", "nano"): "--input_size 64 --patch_size 8",
    ("udi", "nano"): "--global_size 64 --local_size 32 --patch_size 8",
}


@dataclass
class Variant:
    """One row of the table: model keywords and precision in, measurements out."""

    name: str
    overrides: dict[str, Any]
    precision: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    memory: float = 0.0  # bytes at the peak
    flops: float = 0.0  # of matrix products, forward and backward, per image
    parameters: int = 0

    def median(self, *phases: str) -> float:
        """Median seconds of the phases' sum (default: the whole step)."""
        return statistics.median(sum(t) for t in zip(*(self.seconds[p] for p in phases or PHASES), strict=True))


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Benchmark", usage="%(prog)s METHOD [flags], listed by --help")
    p.add_argument(
        "method", choices=[*METHODS, "all", "data", "start"], help="one method; all networks; data METHOD; or start"
    )
    p.add_argument("--steps", default=3, type=int, help="timed steps per variant and round, after one to warm up")
    p.add_argument("--rounds", default=2, type=int, help="passes over all variants")
    p.add_argument(
        "--seconds", default=0.0, type=float, help="seconds after which a round takes no more steps; with all: 6"
    )
    p.add_argument("--markdown", action="store_true", help="with all: print the table for docs/speed.md")
    p.add_argument(
        "--only", default="", help="with all: measure only rows 'method network' that this regular expression matches"
    )
    p.add_argument("--json", action="store_true", help="print a row of the table as JSON")
    p.add_argument(
        "--profile", action="store_true", help="also print the operators that take the default variant's time"
    )
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


def convolution_backward_flops(
    grad_shape: list[int],
    x_shape: list[int],
    weight_shape: list[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: list[bool],
    **_kwargs: Any,
) -> int:
    """FLOPs of a convolution's gradients, each as many as the forward pass; torch's own formula forgets groups."""
    outputs = x_shape if transposed else grad_shape
    return 2 * math.prod(outputs) * math.prod(weight_shape[1:]) * sum(output_mask[:2])


def flop_counter() -> FlopCounterMode:
    """Counts matrix products and convolutions."""
    formulas = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    return FlopCounterMode(display=False, custom_mapping=formulas)


class Training:
    """A method's network in training: the steps of its pre-training, without their checks and logs.

    Args:
        main: the method's main_pretrain. context: of `batch_loss`. overrides: keywords of `build_model`.
    Raises:
        UserError: the device has too little memory.
    """

    def __init__(
        self,
        main: Any,
        flags: argparse.Namespace,
        device: torch.device,
        context: dict,
        precision: str,
        **overrides: Any,
    ):
        self.flags, self.device = flags, device
        self.loss_of = partial(importlib.import_module(main.__name__.replace("main", "engine")).batch_loss, **context)
        self.model = main.build_model(flags, **overrides).to(device)
        if flags.use_checkpoint:
            distributed.recompute_blocks(self.model)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        least = 16 * self.parameters  # weights, gradients and two moments in float32
        if least - 4 * self.parameters > 0.9 * available_bytes(device):
            raise distributed.UserError(f"needs more than {amount(least)} of memory")
        self.net = distributed.wrap(self.model, device, flags.compile)
        optimizer = main.build_optimizer(flags, self.model, 1e-4)
        self.updater = distributed.Updater(optimizer, device, precision, clip_grad=flags.clip_grad or None)

    def step(self, number: int, batch: Any, on_phase: Callable[[], None] = lambda: None) -> Tensor:
        """One update; calls on_phase before it, between its three phases and after it. Returns the loss."""
        distributed.seed_step(0, number)
        on_phase()
        with self.updater.forward(self.net, number):
            loss = self.loss_of(self.net, batch)
        on_phase()
        loss.backward()
        on_phase()
        self.updater.optimizer.step()
        self.updater.optimizer.zero_grad()
        on_phase()
        return loss.detach()


def measure(
    variant: Variant,
    args: argparse.Namespace,
    method: str,
    loader: datasets.Loader,
    context: dict,
    steps: int,
    seconds: float = 0.0,
) -> None:
    """Add one round of steps to the variant's measurements.

    Args:
        context: of `batch_loss`. steps, seconds: that are timed at most; 0 seconds: no limit.
    Raises:
        UserError: the device has too little memory.
    """
    main = importlib.import_module(f"{method}.main_pretrain")
    device = loader.device
    before = reset_peak(device)
    torch.manual_seed(args.seed)
    training = Training(main, args, device, context, variant.precision, **variant.overrides)
    variant.parameters = training.parameters
    batches = itertools.chain.from_iterable(map(loader.batches, itertools.count()))  # of one epoch after the other
    counter, begun = flop_counter(), sync(device)
    for step in range(steps + 1):
        if step > 1 and seconds and sync(device) - begun > seconds:
            break
        times = [sync(device)]
        batch = next(batches)
        with contextlib.nullcontext() if step or variant.flops else counter:
            training.step(step, batch, lambda times=times: times.append(sync(device)))
        if step:  # the first one warms up
            for phase, start, end in zip(PHASES, times, times[1:], strict=False):
                variant.seconds[phase].append(end - start)
        else:
            begun = sync(device)
    variant.memory = max(variant.memory, peak_memory(device) - before)
    variant.flops = variant.flops or counter.get_total_flops() / args.batch_size


def profile(args: argparse.Namespace, method: str, loader: datasets.Loader, context: dict, precision: str) -> str:
    """Table of the operators of one default step, most expensive first."""
    main = importlib.import_module(f"{method}.main_pretrain")
    training, batch = Training(main, args, loader.device, context, precision), next(loader.batches())
    for step in range(2):
        with torch.profiler.profile() if step else torch.autograd.profiler.record_function("warm-up") as profiler:
            training.step(step, batch)
    key = f"self_{loader.device.type}_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60)  # type: ignore[union-attr]


def main(args: argparse.Namespace, rest: list[str]) -> None:
    if args.method == "all":
        table(args, rest)
        return
    if args.method == "data":
        data(args, rest)
        return
    if args.method == "start":
        start()
        return
    module = importlib.import_module(f"{args.method}.main_pretrain")
    flags = module.get_args_parser().parse_args([*RECIPE.get(args.method, "").split(), *rest])
    device = distributed.init(flags.device)
    with tempfile.TemporaryDirectory() as folder:
        flags.data_path = args.data_path or synthetic_images(Path(folder), 4 * flags.batch_size)
        loader, context = module.build_data(flags, device)
        variants = variants_of(args.method, training_precision(flags, device), args.json)
        try:
            for _ in range(args.rounds):
                for variant in variants:
                    measure(variant, flags, args.method, loader, context, args.steps, args.seconds)
        except torch.OutOfMemoryError as error:
            raise distributed.UserError("needs more memory than this GPU has") from error
        if args.json:
            print(json.dumps(row(variants, flags, device)))
            return
        report(variants, flags, device)
        if args.profile:
            print(profile(flags, args.method, loader, context, variants[-1].precision))


def data(args: argparse.Namespace, rest: list[str]) -> None:
    """Print what the images of a method cost on one core."""
    method, *words = rest or [""]
    if method not in METHODS:
        raise distributed.UserError(f"data {method}: expected data and one of {', '.join(sorted(METHODS))}")
    module = importlib.import_module(f"{method}.main_pretrain")
    flags = module.get_args_parser().parse_args([*RECIPE[method].split(), *words])
    with tempfile.TemporaryDirectory() as folder:
        flags.data_path = args.data_path or synthetic_images(Path(folder), 4 * flags.batch_size)
        bench_data.report(method, args, flags, describe(flags)[1])


def start() -> None:
    """Print what the programs compute before they work, and the small networks before their first step."""
    chosen = [
        (method, name, [*RECIPE[method].split(), *flags, "--batch_size", "4"])
        for method, name, flags in networks()
        if "nano" in name
    ]
    with tempfile.TemporaryDirectory() as folder:
        bench_start.report(chosen, synthetic_images(Path(folder), 8))


def training_precision(flags: argparse.Namespace, device: torch.device) -> str:
    """The precision of the flags: by default fp32 on a CPU, bf16 on a GPU."""
    if flags.amp_dtype != "auto":
        return flags.amp_dtype
    return "bf16" if device.type == "cuda" else "fp32"


def variants_of(method: str, precision: str, same_precision: bool) -> list[Variant]:
    """The reference formulation, where there is one, and the default one; in fp32 and, if it differs, in `precision`.

    Args:
        same_precision: both in `precision` alone.
    """
    first = precision if same_precision else "fp32"
    variants = []
    if method in REFERENCE:
        name = ", ".join(f"{k}={v}" for k, v in REFERENCE[method].items())
        variants.append(Variant(f"reference ({name}), {first}", REFERENCE[method], first))
    variants.append(Variant(f"default, {first}", {}, first))
    if precision != first:
        variants.append(Variant(f"default, {precision}", {}, precision))
    return variants


def describe(flags: argparse.Namespace) -> tuple[str, int]:
    """Name of the network and side of its images."""
    return network_of(vars(flags)), getattr(flags, "input_size", 0) or flags.global_size


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def cells_of(variant: Variant, batch: int, peak: float) -> dict[str, str]:
    """What was measured of a variant in batches of this size, by column; peak: FLOP/s of a large matrix product."""
    total, busy = variant.median(), variant.median("forward", "backward", "optimizer")
    found = {"images/s": f"{batch / total:.3g}", "ms/step": f"{1e3 * total:.0f}"}
    found |= {phase: f"{1e3 * variant.median(phase):.0f}" for phase in PHASES}
    found |= {"peak GB": f"{variant.memory / 1e9:.2f}", "GFLOP/image": f"{variant.flops / 1e9:.3g}"}
    return found | {"of peak": f"{variant.flops * batch / busy / peak:.0%}"}


def report(variants: list[Variant], flags: argparse.Namespace, device: torch.device) -> None:
    """Print the variants; ratios are to the first row."""
    network, size = describe(flags)
    compiled = ", compiled" if flags.compile else ""
    print(f"{network}, {size} px, batch {flags.batch_size}{compiled}; {name_of(device)}; torch {torch.__version__}")
    peaks = {precision: matmul_peak(device, precision) for precision in {v.precision for v in variants}}
    rows = [cells_of(v, flags.batch_size, peaks[v.precision]) for v in variants]
    head = ["variant", "ratio", *rows[0]]
    print(line(dict(zip(head, head, strict=True)), head, False))
    for v, row in zip(variants, rows, strict=True):
        print(line({"variant": v.name, "ratio": f"{variants[0].median() / v.median():.2f}x", **row}, head, False))
    print(
        "times in ms; GFLOP/image: matrix products, forward and backward; of peak: of a large one measured in this run"
    )


# ---- the table of all networks


def row(variants: list[Variant], flags: argparse.Namespace, device: torch.device) -> dict[str, str]:
    """A row of the table: its cells by column."""
    default, (network, size) = variants[-1], describe(flags)
    found = {"network": network, "px": f"{size}", "batch": f"{flags.batch_size}"}
    found |= {"param. M": f"{default.parameters / 1e6:.1f}"}
    found |= cells_of(default, flags.batch_size, matmul_peak(device, default.precision))
    ratio = f"{variants[0].median() / default.median():.2f}" if len(variants) > 1 else ""
    return found | {"reference/default": ratio}


def networks() -> Iterator[tuple[str, str, list[str]]]:
    """Method, name and flags of every network that pre-trains; a name of another one is left out."""
    for method in sorted(METHODS):
        module = importlib.import_module(f"{method}.main_pretrain")
        flag = next(a.dest for a in module.get_args_parser()._actions if a.dest in NETWORK)
        seen = []
        for name, maker in (getattr(module, "BACKBONES", None) or module.MODELS).items():
            # Some are only fine-tuned, some have two names.
            if not name.startswith(("mae_", "deit_")) and maker not in seen:
                seen.append(maker)
                further = [flags for (of, word), flags in FLAGS.items() if of == method and word in name]
                yield method, name, [f"--{flag}", name, *" ".join(further).split()]


def table(args: argparse.Namespace, rest: list[str]) -> None:
    """Print the table, row by row; a network that fails has a note instead."""
    device = distributed.init("cpu" if "cpu" in rest else "auto")
    gpu = device.type == "cuda"
    precision = "bf16" if gpu else "fp32"
    print(
        f"{name_of(device)}, {precision}; torch {torch.__version__}. Times of a step and its parts in ms.\n", flush=True
    )
    header: list[str] = []
    notes = []
    chosen = [network for network in networks() if re.search(args.only, " ".join(network[:2]))]
    if not chosen and not bench_dense.chosen(args.only):
        raise distributed.UserError(f"--only {args.only}: no network has that in its name")

    def show(method: str, cells: dict[str, str]) -> None:
        cells = {"method": method, **cells}
        if not header:
            header.extend(cells)
            print(line(dict(zip(header, header, strict=True)), header, args.markdown))
            if args.markdown:
                print("|" + "---|" * len(header))
        print(line(cells, header, args.markdown), flush=True)

    for method, name, flags in chosen:
        batch = next(sizes[gpu] for words, sizes in BATCHES.items() if re.search(words, name))
        batch = max(1, batch // VIEWS) if method == "udi" else batch
        command = [sys.executable, __file__, method, "--json", "--rounds", "1", "--steps", f"{args.steps}"]
        command += ["--seconds", f"{args.seconds or 6}", "--batch_size", f"{batch}", *flags, "--num_workers", "2"]
        command += ["--data_path", args.data_path] * bool(args.data_path) + rest
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            error = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
            notes.append(f"{method} {name}: {error.removeprefix('bench.py: ')}")
            continue
        show(method, json.loads(done.stdout.splitlines()[-1]))
    for case, found in bench_dense.rows(args.only, args.seconds or 6, device.type):
        if isinstance(found, distributed.UserError):
            notes.append(f"{case}: {found}")
        else:
            show(case.split()[0], found)
    print("\n" + "".join(f"{'- ' * args.markdown}not measured: {note}\n" for note in notes))
    print(
        "peak GB: memory beyond what the process had before, of dense tasks all of it; GFLOP/image: matrix products"
        "\nand convolutions, forward and backward; of peak: of a large matrix product's speed; reference/default: their"
        "\nstep times"
    )


def line(cells: dict[str, str], header: list[str], markdown: bool) -> str:
    """Cells of a row in the header's columns, as text or Markdown."""
    values = [cells.get(column, "") for column in header]
    if markdown:
        return "| " + " | ".join(values) + " |"
    widths = [max(len(column), {"network": 30, "variant": 34}.get(column, 6)) for column in header]
    return " ".join(f"{v:{'<' if i < 2 else '>'}{w}}" for i, (v, w) in enumerate(zip(values, widths, strict=True)))


if __name__ == "__main__":
    distributed.run(lambda known: main(*known), get_args_parser().parse_known_args)
