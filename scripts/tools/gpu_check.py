"""What a GPU does with the five methods: python scripts/tools/gpu_check.py [--minutes 10] [--out DIR].

Items run one after the other, the most valuable first, each in a process of its own with a limit in seconds. Each
result is a line of DIR/gpu_check.jsonl as soon as it is known, so that a run that is cut short still counts:
item, status (ok, failed, out of time, skipped), seconds, and what was measured. The exit status is 1 if an item failed.
`python scripts/tools/readme.py` makes the table of docs/speed.md from docs/gpu_check.jsonl.

Steps are timed by CUDA events after 20 steps to warm up, without a wait of the host between them.
"""

import argparse
import contextlib
import copy
import importlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm
import torch
import torchvision
from torch import Tensor

from common import distributed
from common.distributed.metrics import peak_memory
from scripts.tools import bench
from scripts.tools.flags import METHODS, Parser, writing
from scripts.tools.machine import cores

ROOT = Path(__file__).resolve().parents[2]
# The papers' networks, with the images per GPU of the authors' commands.
PAPER = {
    "saim base": ("saim", "--model saim_base --batch_size 64"),
    "semaim base": ("semaim", "--model aim_base --batch_size 64"),
    "cae base": ("cae", "--model cae_base_patch16_224_8k_vocab --batch_size 64"),
    "a2mim vit_base": ("a2mim", f"--backbone vit_base --batch_size 128 {bench.FLAGS['a2mim', 'vit']}"),
    "a2mim resnet50": ("a2mim", "--backbone resnet50 --batch_size 256"),
    "udi small": ("udi", "--arch vit_small --batch_size 128"),
}
NANO = {
    "saim": ("saim", "--model saim_nano --query_depth 4 --input_size 32 --patch_size 8"),
    "semaim": ("semaim", "--model aim_nano --query_depth 4 --input_size 32 --patch_size 8"),
    "cae": ("cae", f"--model cae_nano {bench.FLAGS['cae', 'nano']}"),
    "a2mim vit": ("a2mim", "--backbone vit_nano --input_size 64 --patch_size 8 --mask_layer 0 --mask_init 0"),
    "a2mim resnet": ("a2mim", "--backbone resnet_nano --input_size 64 --patch_size 8"),
    "udi": ("udi", "--arch vit_nano --global_size 32 --local_size 16 --patch_size 8 --out_dim 256"),
}
# What a network is built with besides its flags.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "authors' formulation": {},  # bench.REFERENCE says how
    "--compile": {},
    "--attn_impl flex": {"attn_impl": "flex"},
}


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Check a GPU")
    p.add_argument("--minutes", default=10.0, type=float, help="time in all; items that do not fit are skipped")
    p.add_argument("--out", default="runs/gpu_check", help="folder of gpu_check.jsonl and of what the items write")
    p.add_argument("--device", default="auto", help="auto (CUDA if present, else cpu), cpu, cuda or cuda:N")
    p.add_argument("--tiny", action="store_true", help="networks of four blocks and few steps: a rehearsal")
    p.add_argument("--data_path", default="", help="folder with train/ and val/ for the Imagenette recipe")
    p.add_argument("--only", default="", help="only the items that begin with this word")
    p.add_argument("--item", nargs="+", help=argparse.SUPPRESS)  # what a process of its own runs
    return p


def presets(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    return NANO if args.tiny else PAPER


# ---- what is measured and checked: each returns what it found; a failure is an exception


def flags_of(args: argparse.Namespace, preset: str) -> tuple[Any, argparse.Namespace]:
    """The main_pretrain module of a preset, and its flags."""
    method, network = {**PAPER, **NANO}[preset]
    main = importlib.import_module(f"{method}.main_pretrain")
    workers = "0" if args.tiny else str(cores())
    words = [*bench.RECIPE[method].split(), *network.split(), "--num_workers", workers, "--device", args.device]
    words += ["--batch_size", "4"] * args.tiny
    return main, main.get_args_parser().parse_args(words)


def prepare(
    args: argparse.Namespace, preset: str, precision: str = "auto", compiled: bool = False, **overrides: Any
) -> tuple[bench.Training, Any]:
    """A network with its optimizer, and a batch of synthetic images on the device."""
    main, flags = flags_of(args, preset)
    device, flags.compile = distributed.init(flags.device), compiled
    with tempfile.TemporaryDirectory() as folder:
        flags.data_path = bench.synthetic_images(Path(folder), flags.batch_size)
        flags.num_workers = 0
        torch.manual_seed(0)
        loader, context = main.build_data(flags, device)
        batch = next(loader.batches())
    torch.manual_seed(0)
    return bench.Training(main, flags, device, context, precision, **overrides), batch


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Versions and the card, with its clocks and power limit."""
    device = distributed.init(args.device)
    found = {"device": bench.name_of(device), "cores": cores(), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    if device.type == "cuda":
        query = "driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            values = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()[:1]
            found |= dict(zip(query.split(","), "".join(values).split(", "), strict=False))
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def peaks(args: argparse.Namespace) -> dict[str, float]:
    """TFLOP/s of a large matrix product by precision, and GB/s of a copy on the device (read and written)."""
    device = distributed.init(args.device)
    kinds = ("bf16", "fp16", "fp32") if device.type == "cuda" else ("fp32",)
    found = {f"{kind} TFLOP/s": round(bench.matmul_peak(device, kind) / 1e12, 3) for kind in kinds}
    x = torch.zeros(2**20 if args.tiny else 2**28, device=device)
    y, best = torch.empty_like(x), math.inf
    for _ in range(5):
        begun = bench.sync(device)
        y.copy_(x)
        best = min(best, bench.sync(device) - begun)
    return found | {"copy GB/s": round(2 * x.nbytes / best / 1e9, 1)}


def speed(args: argparse.Namespace, preset: str, variant: str) -> dict[str, Any]:
    """Images per second, the parts of a step, memory, and the share of a matrix product's speed."""
    method = presets(args)[preset][0]
    overrides = bench.REFERENCE[method] if variant.startswith("authors") else VARIANTS[variant]
    bench.reset_peak(distributed.init(args.device))
    run, batch = prepare(args, preset, "auto", variant == "--compile", **overrides)
    counter = bench.flop_counter()
    with counter if variant == "default" else contextlib.nullcontext():
        run.step(0, batch)
    warm, steps = (1, 3) if args.tiny else (20, 20)
    for number in range(warm):
        run.step(number, batch)
    marks: list[Any] = []
    if run.device.type == "cuda":

        def mark() -> None:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()

        def seconds(a: Any, b: Any) -> float:
            return a.elapsed_time(b) / 1e3
    else:

        def mark() -> None:
            marks.append(time.perf_counter())

        def seconds(a: Any, b: Any) -> float:
            return b - a

    for number in range(steps):
        run.step(number, batch, mark)
    bench.sync(run.device)
    parts = [[seconds(*marks[4 * n + k : 4 * n + k + 2]) for n in range(steps)] for k in range(3)]
    whole = [seconds(marks[4 * n], marks[4 * n + 3]) for n in range(steps)]
    step, images = statistics.median(whole), run.flags.batch_size
    found: dict[str, Any] = {"batch": images, "images/s": round(images / step, 1), "ms": round(1e3 * step, 2)}
    found |= {"min ms": round(1e3 * min(whole), 2), "max ms": round(1e3 * max(whole), 2)}
    names = ("forward ms", "backward ms", "optimizer ms")
    found |= {name: round(1e3 * statistics.median(times), 2) for name, times in zip(names, parts, strict=True)}
    memory = peak_memory(run.device)
    found |= {"peak GB": round(memory / 1e9, 2), "precision": str(run.updater.dtype).removeprefix("torch.")}
    if variant == "default":
        flops = counter.get_total_flops() / images
        peak = bench.matmul_peak(run.device, "bf16" if run.updater.dtype == torch.bfloat16 else "fp32")
        found |= {"GFLOP/image": round(flops / 1e9, 3), "of peak": round(flops * images / step / peak, 3)}
    return found


def files(args: argparse.Namespace, preset: str, augment: str = "pillow") -> dict[str, Any]:
    """Images per second when they come from JPEG files, by all cores, and the share of time that a step waits.

    augment: --augment of the method, which says what makes the views.
    """
    main, flags = flags_of(args, preset)
    flags.augment = augment
    run, _ = prepare(args, preset)
    steps = 3 if args.tiny else 30
    with tempfile.TemporaryDirectory() as folder:
        flags.data_path = bench.synthetic_images(Path(folder), (steps + 10 * (not args.tiny)) * flags.batch_size)
        loader, _ = main.build_data(flags, run.device)
        waited, begun, first = 0.0, 0.0, 0 if args.tiny else 10
        asked = time.perf_counter()
        for number, batch in enumerate(loader.batches()):
            if number == first:
                begun, waited = bench.sync(run.device), 0.0
            waited += time.perf_counter() - asked
            run.step(number, batch)
            if run.device.type == "cuda" and number % 4 == 3:  # not further ahead of the device than a run
                torch.cuda.synchronize(run.device)
            asked = time.perf_counter()
        total = bench.sync(run.device) - begun
    images = (len(loader) - first) * flags.batch_size
    rate = {"images/s": round(images / total, 1), "waits for images": round(waited / total, 3)}
    return rate | {"workers": flags.num_workers, "batch": flags.batch_size}


def agreement(args: argparse.Namespace, preset: str) -> dict[str, Any]:
    """Losses of 20 steps in bf16 and in fp32 from the same weights, images and draws: within 2 %."""
    losses = {}
    for precision in ("fp32", "bf16"):
        run, batch = prepare(args, preset, precision)
        losses[precision] = torch.stack([run.step(n, batch) for n in range(3 if args.tiny else 20)]).double().cpu()
        del run
    worst = float(((losses["bf16"] - losses["fp32"]) / losses["fp32"]).abs().max())
    if not worst < 0.02:
        raise distributed.UserError(f"bf16 and fp32 differ by {worst:.1%} of the loss, expected less than 2 %")
    return {"largest difference": round(worst, 5), "last losses": [float(x[-1]) for x in losses.values()]}


def guard(args: argparse.Namespace, preset: str) -> dict[str, Any]:
    """A loss that is not a number changes no weight, on the device, and the next report ends the run."""
    run, batch = prepare(args, preset)
    run.updater.start_epoch()
    log = distributed.EpochLog("", 4, run.flags.batch_size, run.device, print_freq=2)
    before: dict[str, Tensor] = {}
    try:
        for step, _ in log.steps([None] * 4):
            if step == 1:
                before = copy.deepcopy(run.model.state_dict())
            with run.updater.forward(run.net, step):
                loss = run.loss_of(run.net, batch) * (math.nan if step else 1)
            log.update(step, loss=loss, norm=run.updater.backward(loss, step))
    except distributed.NonFinite as error:
        names = [name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])]
        if names:
            raise distributed.UserError(f"{len(names)} weights changed, such as {names[0]}") from error
        return {"guard": "on the device" if run.updater.guard_on_device else "on the host", "ended with": str(error)}
    raise distributed.UserError("a loss that is not a number did not end the run")


def resume(args: argparse.Namespace, preset: str) -> dict[str, Any]:
    """Weights of a run that was stopped and continued, against those of one that was not."""
    method, network = NANO[preset]
    folder = Path(args.out, "resume", preset.replace(" ", "_"))
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data"
    if not data.exists():
        data.mkdir()
        bench.synthetic_images(data, 48)
    words = f"{bench.RECIPE[method]} {network} --batch_size 8 --epochs 2 --num_workers 1 --device {args.device}"
    command = [sys.executable, str(ROOT / method / "main_pretrain.py"), *words.split(), "--data_path", str(data)]
    weights = []
    for name in ("whole", "stopped"):
        out = Path(tempfile.mkdtemp(dir=folder))
        started = subprocess.Popen([*command, "--output_dir", str(out)], stdout=subprocess.DEVNULL)
        if name == "stopped":
            while started.poll() is None and not any(path.stat().st_size for path in out.glob("*progress.jsonl")):
                time.sleep(0.02)
            started.send_signal(signal.SIGTERM)
            started.wait()
            started = subprocess.Popen([*command, "--output_dir", str(out)], stdout=subprocess.DEVNULL)
        if started.wait():
            raise distributed.UserError(f"{name} run: exit status {started.returncode}")
        latest = max(out.glob("*.pth"), key=lambda path: path.stat().st_mtime)
        state = distributed.load(str(latest))
        weights.append(state.get("model", state.get("state_dict", state.get("student"))))
    difference = max(float((weights[0][k].double() - weights[1][k].double()).abs().max()) for k in weights[0])
    return {"largest difference of a weight": difference, "equal": difference == 0}


def tests(args: argparse.Namespace) -> dict[str, Any]:
    """The tests marked gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise distributed.UserError("; ".join([*failed, lines[-1]])[:2000])
    return {"pytest": lines[-1]}


def recipe(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Start of the Imagenette recipe, as far as time allows: its last line of progress."""
    out = Path(args.out, "imagenette", method)
    words = ["bash", str(ROOT / "scripts" / "imagenette.sh"), method, *["--tiny"] * args.tiny, "pretrain"]
    stages = ["tokenizer"] * (method == "cae")
    environment = {**os.environ, "DATA": args.data_path, "OUT": str(out), "GPUS": "1", "PYTHON": sys.executable}
    done = subprocess.run([*words, *stages], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise distributed.UserError((done.stderr.strip().splitlines() or ["failed"])[-1])
    return progress_of(out)


def progress_of(out: Path) -> dict[str, Any]:
    """The last lines of progress of a recipe's stages."""
    return {
        path.parent.name: json.loads(lines[-1])
        for path in sorted(out.rglob("*progress.jsonl"))
        if (lines := path.read_text().splitlines())
    }


# ---- one after the other


def items(args: argparse.Namespace) -> list[tuple[int, list[str]]]:
    """Limit in seconds and words of each item, the most valuable first."""
    networks, methods = presets(args), {name: method for name, (method, _) in presets(args).items()}
    compared = [name for name, method in methods.items() if method in bench.REFERENCE]
    flex = [name for name, method in methods.items() if method == "semaim"]
    return [
        (60, ["machine"]),
        (60, ["peaks"]),
        *((120, ["tests"]) for _ in range(args.device != "cpu")),
        *((90, ["speed", name, "default"]) for name in networks),
        *((60, ["agreement", name]) for name in NANO),
        *((60, ["guard", name]) for name in NANO),
        *((90, ["speed", name, "authors' formulation"]) for name in compared),
        *((120, ["speed", name, "--attn_impl flex"]) for name in flex if args.device != "cpu"),
        *((150, ["speed", name, "--compile"]) for name in networks if not args.tiny),
        *((90, ["files", name]) for name in networks),
        *((90, ["files", name, "device"]) for name in networks if not args.tiny),
        *((120, ["resume", name]) for name in NANO),
        *((3600, ["recipe", name]) for name in METHODS if args.data_path),
    ]


ITEMS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (machine, peaks, tests, speed, agreement, guard, files, resume, recipe)
}


def run_item(args: argparse.Namespace, words: list[str], limit: float) -> dict[str, Any]:
    """The line of an item, run in a process of its own."""
    command = [sys.executable, __file__, "--out", args.out, "--device", args.device, *["--tiny"] * args.tiny]
    command += ["--data_path", args.data_path, "--item", *[word.replace("--", "=", 1) for word in words]]
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=limit)
        status, lines = "ok" if process.returncode == 0 else "failed", output.splitlines()
        found = {"result": json.loads(lines[-1])} if status == "ok" else {"error": errors.strip()[-500:]}
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        status, found = "out of time", {}
        if words[0] == "recipe":
            found = {"result": progress_of(Path(args.out, "imagenette", words[1]))}
    return {"item": words, "status": status, "seconds": round(time.perf_counter() - begun, 1), **found}


def main(args: argparse.Namespace) -> None:
    if args.minutes <= 0:
        raise distributed.UserError(f"--minutes {args.minutes}: expected more than 0")
    if args.item:
        name, *words = [word.replace("=", "--", 1) for word in args.item]
        print(json.dumps(ITEMS[name](args, *words)))
        return
    deadline = time.perf_counter() + 60 * args.minutes
    lines: list[dict[str, Any]] = []
    path = Path(args.out, "gpu_check.jsonl")
    with writing(f"--out {args.out}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for limit, words in items(args):
        if args.only and words[0] != args.only:
            continue
        left = deadline - time.perf_counter()
        lines.append(run_item(args, words, min(limit, left)) if left > 5 else {"item": words, "status": "skipped"})
        with path.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        found = lines[-1].get("result", lines[-1].get("error", ""))
        print(f"{' '.join(words)}: {lines[-1]['status']} {found}", flush=True)
    counts = Counter(line["status"] for line in lines)
    print(f"{path}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    if counts["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
