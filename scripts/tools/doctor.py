"""Checks a long run before it is started.

Usage: python scripts/tools/doctor.py METHOD [--stage STAGE] [flags of main_<stage>.py]

Reports versions, devices and launcher; the images; images per update and learning rate beside the paper's; memory,
speed and duration, from a few steps of the run itself, in processes like its own; space for its checkpoints, and what
it would continue. Nothing is written to the run's folders. Exit status: 0, also with warnings; 1 if the run would fail;
2 for a mistake in this script's own flags.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from packaging.requirements import Requirement
from torchvision.datasets.folder import default_loader

from common import datasets, distributed
from common.distributed import check_ranges
from common.distributed.process import LAUNCHERS

ROOT = Path(__file__).resolve().parents[2]
MEASURED_RUN = ROOT / "scripts" / "tools" / "measured_run.py"
SAMPLED = 200  # images that are read by default
PACKAGES = ("torch", "torchvision", "timm", "numpy")  # whose versions are shown; all requirements are compared
NETWORK = ("model", "arch", "backbone")  # flags that name it
# Flags that do not belong to a recipe, or of which the report has more to say.
NO_RECIPE = {"data_path", "dataset", "train_split", "val_split", "bad_images", "num_workers", "pin_mem", "device"}
NO_RECIPE |= {"output_dir", "log_dir", "resume", "start_epoch", "seed", "world_size", "local_rank", "dist_url"}
NO_RECIPE |= {"dist_on_itp", "dist_eval", "batch_size", "batch_size_per_gpu", "accum_iter", "update_freq", "config"}
NO_RECIPE |= {"compile", "finetune", "pretrained", "pretrained_weights", "teacher_path", "discrete_vae_weight_path"}
NO_RECIPE |= {"save_freq", "saveckp_freq", "save_ckpt_freq", "save_every", "exp_name", "experiment", "cfg_options"}
NO_RECIPE |= {"save_recon_every", "recon_iters_per_epoch", "print_config", "work_dir", "auto_resume"}


def get_args_parser() -> argparse.ArgumentParser:
    usage = "%(prog)s METHOD [--stage STAGE] [flags of METHOD/main_STAGE.py]"
    p = argparse.ArgumentParser("doctor", allow_abbrev=False, usage=usage)
    p.add_argument("method", choices=sorted(path.parent.name for path in ROOT.glob("*/main_pretrain.py")))
    p.add_argument("--stage", default="pretrain", help="finetune, linprobe, ...: that of main_<stage>.py")
    p.add_argument("--processes", type=int, help="of the planned run, on all nodes; default: of this launch, else 1")
    p.add_argument("--check_images", default=str(SAMPLED), help="how many images to read: a number, or all")
    p.add_argument("--no_measure", action="store_true", help="make all that the run makes, but train nothing")
    p.add_argument("--seconds", default=30.0, type=float, help="of training that are measured, after warming up")
    return p


# ---- the report


class Report:
    """Prints sections, lines and warnings, and counts."""

    def __init__(self) -> None:
        self.warnings = 0
        self.failures: list[str] = []

    def section(self, title: str) -> None:
        print(f"\n{title}", flush=True)

    def line(self, name: str, text: object) -> None:
        print(f"  {f'{name}:' if name else '':14} {text}", flush=True)

    def warn(self, problem: str, remedy: str) -> None:
        self.warnings += 1
        print(f"  WARNING: {problem} -> {remedy}", flush=True)

    def fail(self, problem: str, remedy: str = "") -> None:
        self.failures.append(problem)
        print(f"  ERROR: {problem}" + (f" -> {remedy}" if remedy else ""), flush=True)

    def end(self) -> int:
        """Print the summary; returns the exit status."""
        count = f"{self.warnings or 'no'} warning{'' if self.warnings == 1 else 's'}"
        verdict = f"the run would fail: {self.failures[0]}" if self.failures else "the run can start"
        print(f"\n{verdict[0].upper()}{verdict[1:]} ({count})")
        return 1 if self.failures else 0


def amount(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("days", 172800), ("h", 7200), ("min", 120)):
        if seconds >= length:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.3g} s"


# ---- the planned run


class Refused(Exception):
    """The main itself refuses the run."""


def parsed(script: Path, flags: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags as the main parses them, and the main's globals; raises Refused with its message."""
    found: list[argparse.Namespace] = []

    def take(_main: Any, args: Any) -> None:
        args = args() if callable(args) else args
        check_ranges(args)
        found.append(args)

    run, argv, errors = distributed.run, sys.argv, io.StringIO()
    distributed.run, sys.argv = take, [str(script), *flags]  # type: ignore[assignment]
    try:
        with contextlib.redirect_stderr(errors):
            names = runpy.run_path(str(script), run_name="__main__")
    except distributed.UserError as error:
        raise Refused(f"{script.name}: {error}") from error
    except SystemExit as end:
        if not end.code:  # --print_config
            raise
        raise Refused(errors.getvalue().strip().splitlines()[-1]) from end
    finally:
        distributed.run, sys.argv = run, argv
    return found[0], names


def batch_size(args: argparse.Namespace) -> int:
    """Images per process and micro-step."""
    return getattr(args, "batch_size", None) or args.batch_size_per_gpu


def accumulated(args: argparse.Namespace) -> int:
    """Micro-steps per update."""
    return getattr(args, "accum_iter", None) or getattr(args, "update_freq", 1)


def network(args: argparse.Namespace) -> str:
    """Name of the network; A2MIM's with its method."""
    name = next((str(getattr(args, flag)) for flag in NETWORK if hasattr(args, flag)), "")
    return f"{args.method} {name}" if hasattr(args, "method") else name


@dataclass
class Row:
    """A published row: its script, the flags of a stage and its images per update."""

    script: str
    args: argparse.Namespace
    images: int


def paper_row(method: str, stage: str, args: argparse.Namespace) -> Row | None:
    """The row of the papers' tables whose flags for this stage are most like the run's, by the rows' own scripts."""
    main, best = f"{method}/main_{stage}.py", None
    for script in sorted((ROOT / "scripts").glob("*e.sh")):
        if f" {main} " not in script.read_text():
            continue
        env = {**os.environ, "GPUS": "1", "NNODES": "1", "EXTRA": "", "DATA": "data", "OUT": "/out"}
        shown = subprocess.run(["bash", script, "--dry_run"], cwd=ROOT, env=env, capture_output=True, text=True)
        for command in shown.stdout.replace("\\\n", " ").splitlines():
            words = shlex.split(command)
            if shown.returncode or len(words) < 2 or not words[1].endswith(main):
                continue
            row = Row(script.name, parsed(ROOT / main, words[2:])[0], 0)
            row.images = batch_size(row.args) * accumulated(row.args)
            equal = sum(getattr(args, k, None) == v for k, v in vars(row.args).items())
            likeness = (network(row.args) == network(args), equal)
            if best is None or likeness > best[0]:
                best = likeness, row
    return best[1] if best else None


# ---- machine and launcher


def memory_available() -> tuple[float, float]:
    """Bytes of this machine's memory that are free, and all of them; a container's limit counts."""
    info = Path("/proc/meminfo")
    if not info.exists():
        total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return total, total
    values = dict(line.split(":", 1) for line in info.read_text().splitlines())
    total, free = (int(values[name].split()[0]) * 1024.0 for name in ("MemTotal", "MemAvailable"))
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            most, now = (int(Path("/sys/fs/cgroup", name).read_text()) for name in (limit, used))
            total, free = min(total, most), min(free, most - now)
    return free, total


def cores() -> int:
    """Processor cores that this process may use; a container's quota counts."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    return count


def check_versions(report: Report) -> None:
    """Installed packages against requirements.txt."""
    versions, lines = {}, (ROOT / "requirements.txt").read_text().splitlines()
    for requirement in (Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()):
        try:
            versions[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            report.warn(f"{requirement} is not installed", "pip install -r requirements.txt")
            continue
        if not requirement.specifier.contains(versions[requirement.name].split("+")[0], prereleases=True):
            problem = (
                f"{requirement.name} {versions[requirement.name]} is installed, requirements.txt has {requirement}"
            )
            report.warn(problem, "pip install -r requirements.txt")
    shown = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    report.line("versions", f"python {sys.version.split()[0]}, {shown}")


def check_devices(report: Report, args: argparse.Namespace) -> str:
    """Devices, memory and cores; returns the type of the device that the run will take."""
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    smi = shutil.which("nvidia-smi")
    query = [smi or "", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split() if smi else []
    if torch.cuda.is_available():
        report.line("CUDA", f"{torch.version.cuda}, driver {driver[0] if driver else 'unknown'}")
        for index in range(torch.cuda.device_count()):
            name, (free, total) = torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)
            report.line(f"cuda:{index}", f"{name}, {amount(total)}, {amount(free)} free")
            if free < 0.9 * total and on_gpu:
                remedy = "end it (nvidia-smi shows it), or hide this GPU by CUDA_VISIBLE_DEVICES"
                report.warn(f"cuda:{index}: another program holds {amount(total - free)}", remedy)
        if not on_gpu:
            report.warn("the run takes the CPU, and there is a GPU", "leave --device out")
        elif args.amp_dtype == "fp32":
            report.warn("--amp_dtype fp32 on a GPU is slow", "leave --amp_dtype out, if the recipe allows")
    elif driver:
        cuda = torch.version.cuda or "no CUDA"
        report.warn(f"torch ({cuda}) sees no GPU, but driver {driver[0]} does", "install torch for this driver")
    free, total = memory_available()
    report.line("memory", f"{amount(total)}, {amount(free)} available")
    name = "CUDA" if on_gpu else "CPU"
    report.line("cores", f"{cores()}; the run takes the {name}")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 * cores():
        problem = f"other programs are running (load {os.getloadavg()[0]:.1f} on {cores()} cores)"
        report.warn(problem, "end them before you trust the times below")
    return "cuda" if on_gpu else "cpu"


@dataclass
class Launch:
    """Processes of the run: planned, and here; whether this script was started as one of them."""

    planned: int
    here: int
    launched: bool
    env: dict[str, str] = field(default_factory=dict)
    rank: int = 0


def check_launcher(report: Report, own: argparse.Namespace, args: argparse.Namespace, device: str) -> Launch:
    """What the launcher's variables mean for the run, and how many processes it is measured with."""
    env = dict(os.environ)
    names = next((names for names in LAUNCHERS if all(name in env for name in names)), None)
    rank, world = (int(env[name]) for name in names[:2]) if names else (0, 1)
    kind = {"RANK": "torchrun", "OMPI_COMM_WORLD_RANK": "OpenMPI", "SLURM_PROCID": "SLURM"}[names[0]] if names else ""
    interactive = kind == "SLURM" and (sys.stdin.isatty() or "SLURM_STEP_NUM_TASKS" not in env)
    launched = world > 1 and not interactive
    if launched and own.processes not in (None, world):
        raise distributed.UserError(f"--processes {own.processes}: this is a launch of {world}")
    if kind:
        report.line(
            "launcher", f"{kind}: process {rank} of {world}, by {', '.join(f'{n}={env[n]}' for n in names or ())}"
        )
    else:
        report.line("launcher", "none: python starts one process, torchrun several")
        for stray in ("WORLD_SIZE", "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
            if stray in env:
                problem = f"{stray}={env[stray]} is set, but not all of the launcher's variables: the run ignores it"
                report.warn(problem, f"start it by torchrun or srun, or unset {stray}")
    if interactive and world > 1:
        problem = f"SLURM's variables in this shell make a plain python wait for {world} processes"
        report.warn(problem, f"start it by srun, or unset {' '.join(names or ())} and use torchrun")
    if interactive:
        env = {k: v for k, v in env.items() if k not in (names or ())}
    planned = world if launched else own.processes or 1
    room = max(1, torch.cuda.device_count()) if device == "cuda" else cores()
    here = world if launched else min(planned, room)
    units = "GPUs" if device == "cuda" else "cores"
    more = f"; measured with {here}: this machine has {room} {units}" if here < planned else ""
    report.line("processes", f"{planned}{more}")
    if device == "cuda" and planned == 1 and room > 1:
        report.warn(
            f"one process uses one of {room} GPUs", f"torchrun --nproc_per_node {room} ..., here: --processes {room}"
        )
    # ---- threads
    local, workers = min(here, room), args.num_workers
    set_to = env.get("OMP_NUM_THREADS", "")
    threads = int(set_to) if set_to.isdecimal() else 1 if here > 1 else cores()
    report.line(
        "threads", f"OMP_NUM_THREADS={set_to or f'not set, which means {threads}'}; {workers} loader processes each"
    )
    if device == "cpu" and threads * local > cores():
        problem = f"{local} x {threads} threads on {cores()} cores"
        report.warn(problem, f"OMP_NUM_THREADS={max(1, cores() // local)}")
    elif device == "cpu" and threads * local <= cores() // 2:
        problem = f"{local} x {threads} threads use half of {cores()} cores or less"
        report.warn(problem, f"OMP_NUM_THREADS={cores() // local}")
    if workers * local > max(cores(), 1):
        problem = f"--num_workers {workers}: {workers * local} loader processes on {cores()} cores"
        report.warn(problem, f"--num_workers {max(1, cores() // local)}")
    if workers == 0 and device == "cuda":
        report.warn("--num_workers 0: the GPU waits for every image", f"--num_workers {max(1, cores() // local)}")
    return Launch(planned, here, launched, env, rank)


# ---- the measurement


@dataclass
class Epoch:
    """Training steps of an epoch, or the part of it that was measured."""

    asked: list[float] = field(default_factory=list)  # times at which a batch was asked for, the last in vain
    marks: list[int] = field(default_factory=list)  # their numbers
    got: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)  # seconds that the process had computed by then
    last: list[bool] = field(default_factory=list)  # whether the step completes an update
    warm: list[bool] = field(default_factory=list)
    gap: float | None = None  # seconds from here to the next epoch


@dataclass
class Measurement:
    """What a measured run wrote, and how it ended."""

    status: int
    output: str
    events: list[dict[str, Any]]
    started: float

    def first(self, event: str, **values: Any) -> dict[str, Any]:
        """The first event of a kind; empty if there is none."""
        fits = (e for e in self.events if e["event"] == event and all(e[k] == v for k, v in values.items()))
        return next(fits, {})

    def all(self, event: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event]


def measure(script: Path, flags: list[str], launch: Launch, seconds: float, folder: Path) -> Measurement:
    """Run the first steps of a main as planned; its files, and what is measured, go to a temporary folder."""
    order = json.dumps({"folder": str(folder), "seconds": seconds})
    command = [sys.executable]
    if launch.here > 1 and not launch.launched:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(launch.here)]
    command += [str(MEASURED_RUN), order, str(script), *flags]
    started, out = time.perf_counter(), folder / "output.txt"
    with open(out, "w") as file:
        child = subprocess.Popen(command, env=launch.env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = child.wait()
        finally:  # also of Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    events, lines = [], folder / f"events-{launch.rank}.jsonl"
    for line in lines.read_text().splitlines() if lines.exists() else []:
        with contextlib.suppress(ValueError):  # torn where the process was killed
            events.append(json.loads(line))
    return Measurement(status, out.read_text(errors="replace"), events, started)


def explain(report: Report, run: Measurement, script: Path) -> None:
    """Say why a measured run failed."""
    told = re.findall(rf"^(?:\[rank \d+\] )?({re.escape(script.name)}: .*)", run.output, re.MULTILINE)
    killed = run.status in (-9, 137) or "Signal 9 (SIGKILL)" in run.output
    batch = "halve --batch_size and double --accum_iter, which keeps the images per update"
    if re.search(r"Bus error|Signal 7 \(SIGBUS\)|unable to (write|open|mmap) .*shm", run.output) or run.status == -7:
        free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
        remedy = "give the container more (docker --shm-size), or lower --num_workers"
        report.fail(f"the loader's shared memory is full ({amount(free)} free in /dev/shm)", remedy)
    elif re.search(r"OutOfMemoryError|CUDA out of memory", run.output):
        report.fail("the GPU's memory is too small", f"{batch}; or --amp_dtype bf16")
    elif killed or re.search(r"can't allocate memory|MemoryError|Cannot allocate memory", run.output):
        report.fail(f"the memory of this machine is too small ({amount(memory_available()[1])})", batch)
    elif told:
        report.fail(told[-1])
    else:
        tail = [line for line in run.output.strip().splitlines() if line.strip()][-12:]
        last = next((x for x in reversed(tail) if re.match(r"\w*(Error|Exception)\b", x)), f"status {run.status}")
        report.fail(f"the run ended: {last}")
        print("\n".join(f"    {line}" for line in tail))


# ---- images


def check_images(report: Report, path: Path, name: str, how_many: str, size: int, skips: bool) -> None:
    """Read images of a list that a loader has: are they readable, how large are they?"""
    paths = [line.partition("\t")[2] for line in path.read_text().splitlines()]
    count = len(paths) if how_many == "all" else min(int(how_many), len(paths))
    if not count:
        return
    chosen = paths if count == len(paths) else random.Random(0).sample(paths, count)
    with ThreadPoolExecutor(cores()) as pool:
        results = list(pool.map(read_image, chosen))
    bad = [f"{path}: {result}" for path, result in zip(chosen, results, strict=True) if isinstance(result, str)]
    sides = [min(result) for result in results if not isinstance(result, str)]
    which = "all" if count == len(paths) else f"{count} of {len(paths)}, sampled"
    report.line(f"{name} images", f"{which}: {count - len(bad)} readable" + shorter_sides(sides))
    if bad:
        others = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        problem = f"{len(bad)} unreadable: {'; '.join(bad[:3])}{others}"
        if skips:
            report.warn(problem, "delete or replace them; --bad_images skip goes on without them")
        else:
            report.fail(problem, "delete or replace them, or add --bad_images skip")
    if sides and size and statistics.median(sides) < size:
        problem = f"half of the images are smaller than the run's {size} pixels and are enlarged"
        report.warn(problem, "a smaller --input_size (UDI: --global_size), with a smaller --patch_size, costs less")


def shorter_sides(sides: list[int]) -> str:
    return f"; shorter side {min(sides)} to {max(sides)} pixels, median {statistics.median(sides):g}" if sides else ""


def read_image(path: str) -> tuple[int, int] | str:
    """Width and height, or why it cannot be read."""
    try:
        return default_loader(path).size
    except Exception as error:  # Pillow raises many types for damaged files
        return " ".join(str(error).split())[:100] or type(error).__name__


def check_data(
    report: Report,
    run: Measurement,
    own: argparse.Namespace,
    args: argparse.Namespace,
    launch: Launch,
    folder: Path,
) -> None:
    """The images of the run's loaders."""
    size = getattr(args, "input_size", 0) or getattr(args, "global_size", 0)
    for loader in run.all("loader"):
        name, samples = loader["name"], folder / f"{loader['name']}.txt"
        text = f"{loader['images']} images"
        if samples.exists():
            counts = sorted(Counter(line.split("\t")[0] for line in samples.read_text().splitlines()).values())
            if loader["classes"]:
                each = f"{counts[0]} to {counts[-1]} each (median {statistics.median(counts):g})"
                text += f" in {len(counts)} classes, {each}"
            else:
                text += " without classes"
        report.line(name, f"{text}, {loader['kind']} {loader['root']}".rstrip())
        if name == "train" and loader["images"] < loader["batch_size"] * launch.planned:
            problem = (
                f"{loader['images']} images do not fill a batch of {loader['batch_size']} on {launch.planned} processes"
            )
            report.fail(problem, "a smaller --batch_size, or fewer processes")
        elif name == "train" and loader["drop_last"]:
            used = loader["steps"] * loader["batch_size"] * run.first("start").get("world_size", 1)
            lost = 1 - used / loader["images"]
            if lost > 0.05:
                problem = f"an epoch leaves out {lost:.0%} of the images, which fill no batch"
                report.warn(problem, f"a --batch_size that divides {loader['images']} better")
        if name == "train" and own.stage == "pretrain":
            check_layout(report, loader, args)
        if samples.exists():
            check_images(report, samples, name, own.check_images, size, args.bad_images == "skip")
        else:
            report.line(f"{name} images", "not read one by one: the data set has no list of files")
    for problem in run.first("done").get("bad", [])[:3]:
        report.warn(problem, "delete or replace it")


def check_layout(report: Report, loader: dict[str, Any], args: argparse.Namespace) -> None:
    """Images for pre-training need no classes; so folders may be taken for classes that are none."""
    root = Path(loader["root"])
    if loader["kind"] == "ClassFolders":
        nested = [p for p in sorted(root.iterdir()) if p.is_dir() and any((p / s).is_dir() for s in ("train", "val"))]
        if nested:
            problem = f"{nested[0]} is taken for a class, but holds train/ or val/"
            report.warn(problem, f"--data_path {nested[0]}")
    if not args.dataset:
        try:
            val = len(datasets.image_dataset(args.data_path, train=False))
            report.line("val", f"{val} images; pre-training does not use them")
        except distributed.UserError:
            report.line("val", f"none in {args.data_path}; fine-tuning and probes need them")


# ---- recipe


def check_recipe(
    report: Report,
    run: Measurement,
    own: argparse.Namespace,
    args: argparse.Namespace,
    launch: Launch,
    parser: argparse.ArgumentParser,
) -> None:
    """Images per update, learning rate and warm-up beside the paper's."""
    step, accum = batch_size(args), accumulated(args)
    images = step * accum * launch.planned
    report.line(
        "per update", f"{images} images = --batch_size {step} x --accum_iter {accum} x {launch.planned} processes"
    )
    row = paper_row(own.method, own.stage, args)
    same = row is not None and network(row.args) == network(args)
    if row is not None:
        like = "" if same else f"; no row has {network(args)}, this is the most similar one"
        report.line("paper", f"{row.images} images per update (scripts/{row.script}{like})")
        total = run.first("loader", name="train").get("images", 0)
        if same and images != row.images:
            fits = row.images % (step * launch.planned) == 0
            other = (
                f"--accum_iter {row.images // (step * launch.planned)}"
                if fits
                else f"--batch_size that divides {row.images}"
            )
            if total >= row.images:
                report.warn(f"{images} images per update, the paper has {row.images}", f"{other} keeps the paper's")
    help_of_lr = next((a.help or "" for a in parser._actions if a.dest == "lr"), "")
    check_rate(report, run, args, help_of_lr, images, row)
    if row is not None and same:
        theirs = vars(row.args)
        differing = [
            f"{k} {v} ({theirs[k]})" for k, v in vars(args).items() if theirs.get(k, v) != v and k not in NO_RECIPE
        ]
        shown = ", ".join(differing[:12]) + (", ..." if len(differing) > 12 else "")
        report.line("other flags", f"differ from the paper's in {shown}" if differing else "as the paper's")
    start = run.first("start")
    warmup, epochs = start.get("args", {}).get("warmup_epochs"), start.get("epochs")
    if warmup is not None and epochs:
        theirs = (
            f"; paper {row.args.warmup_epochs} of {row.args.epochs}"
            if row is not None and hasattr(row.args, "warmup_epochs")
            else ""
        )
        report.line("warm-up", f"{warmup:g} of {epochs} epochs{theirs}")
        if warmup > 0.25 * epochs:
            share = row.args.warmup_epochs / row.args.epochs if theirs and row is not None else 0.05
            report.warn(
                f"the warm-up takes {warmup / epochs:.0%} of the run", f"--warmup_epochs {round(share * epochs)}"
            )


def check_rate(
    report: Report, run: Measurement, args: argparse.Namespace, help_of_lr: str, images: int, row: Row | None
) -> None:
    """The learning rate that the main computed; of other numbers of processes, by its rule."""
    told = re.search(r"(\d+) per update.*?, lr ([-+.\de]+)", run.output)
    if told is None:
        return
    rate, given = float(told[2]), getattr(args, "lr", None)
    if given is None or "absolute" not in help_of_lr:
        rule = f"--blr {args.blr:g} x {images} / 256" if given is None else f"--lr {given:g} {help_of_lr}"
        report.line("learning rate", f"{rate * images / int(told[1]):.2e}: {rule}")
        return
    report.line("learning rate", f"{rate:.2e}: --lr, absolute")
    if row is not None and images != row.images and getattr(row.args, "lr", None) == given and given:
        problem = (
            f"--lr {given:g} is absolute and the paper's for {row.images} images per update, this run has {images}"
        )
        report.warn(problem, f"--lr {given * images / row.images:.3g} is in proportion")


# ---- speed and memory


@dataclass
class Speed:
    """What steps and epochs take, in seconds."""

    step: float  # a micro-step, in the mean
    low: float  # of the middle 80 % of steps
    high: float
    count: int  # measured steps
    wait: float  # for images, per step
    computed: float  # by the process, all threads, per step
    rest: float  # of an epoch: saving, evaluation, its first images
    start: float  # until the first epoch begins


def epochs_of(run: Measurement) -> list[Epoch]:
    """The epochs that were seen, in order."""
    epochs: list[Epoch] = []
    mark = 0
    for event in run.events:
        if event["event"] == "begin":
            if epochs and epochs[-1].asked:
                epochs[-1].gap = event["time"] - epochs[-1].asked[-1]
            epochs.append(Epoch())
        elif event["event"] == "ask":
            epoch = epochs[-1]
            epoch.asked.append(event["asked"])
            epoch.cpu.append(event["cpu"])
            epoch.marks.append(mark)
            mark += 1
            if event["more"]:
                epoch.got.append(event["got"])
                epoch.last.append(event["last"])
                epoch.warm.append(event["warm"])
    return epochs


def evaluation_excess(run: Measurement) -> float:
    """Seconds by which whole evaluations after an epoch take longer than what was seen of them, in the mean."""
    excess, begun = [], []
    for event in run.events:
        if event["event"] == "evaluation":
            begun = [event["time"]]
            batches = event["batches"]
        elif event["event"] == "evaluated" and event["done"] is not None:
            begun.append(event["time"])
        elif event["event"] == "evaluated":
            pace = [b - a for a, b in zip(begun[1:], [*begun[2:], event["time"]], strict=True)]
            done = len(begun) - 1
            if done > 1 and batches > done:  # the last one that was asked for was not evaluated
                excess.append((batches - done + 1) * statistics.median(pace[:-1]))
            elif pace:
                excess.append(0.0)
    epochs = len([e for e in epochs_of(run) if e.gap is not None])
    return sum(excess) / epochs if epochs else 0.0


def speed_of(run: Measurement, args: argparse.Namespace) -> Speed | None:
    """The pace of the run in the long term; None if nothing was measured."""
    epochs = epochs_of(run)
    device = run.first("device").get("seconds", [])
    steps: list[tuple[float, float, bool, bool]] = []  # seconds, of them waiting, completes an update, opens an epoch
    computed = []
    for epoch in epochs:
        for i, (asked, got, last, warm) in enumerate(zip(epoch.asked, epoch.got, epoch.last, epoch.warm, strict=False)):
            if not warm or i + 1 >= len(epoch.asked):
                continue
            ends = epoch.asked[i + 1]
            # On a GPU between marks among the kernels: the host runs ahead of them.
            took = device[epoch.marks[i + 1]] - device[epoch.marks[i]] if device else ends - asked
            steps.append((took, got - asked, last, i == 0 and epoch is not epochs[0]))
            computed.append(epoch.cpu[i + 1] - epoch.cpu[i])
    if not steps:
        return None
    inner = [s for s in steps if not s[3]] or steps
    wait = statistics.fmean(s[1] for s in inner)
    took = [s[0] if device else s[0] - s[1] for s in inner]
    accum = accumulated(args)

    def typical(values: list[tuple[float, float, bool, bool]], times: list[float]) -> float:
        """Per micro-step: those that complete an update take longer."""
        last = [t for t, s in zip(times, values, strict=True) if s[2]]
        others = [t for t, s in zip(times, values, strict=True) if not s[2]]
        if not last or not others or accum == 1:
            return statistics.median(last or others)
        return (statistics.median(last) + (accum - 1) * statistics.median(others)) / accum

    if device and wait > 0.05 * statistics.fmean(took):
        step = statistics.fmean(took)  # batches come in bursts
    else:
        step = typical(inner, took) + (0 if device else wait)
    whole = sorted(s[0] for s in inner)
    low, high = whole[len(whole) // 10], whole[-1 - len(whole) // 10]
    gaps = [epoch.gap for epoch in epochs if epoch.gap is not None]
    first = [s[1] for s in steps if s[3]]
    rest = (statistics.median(gaps) if gaps else 0.0) + (statistics.median(first) if first else 0.0)
    rest += evaluation_excess(run)
    begin = run.first("begin")
    started = begin["time"] - run.started if begin else 0.0
    return Speed(step, low, high, len(inner), wait, statistics.median(computed), rest, started)


def check_speed(report: Report, run: Measurement, args: argparse.Namespace, launch: Launch) -> None:
    """Steps, epochs, the whole run; the loader beside the step."""
    speed = speed_of(run, args)
    if speed is None:
        report.line("speed", "no training steps were measured")
        return
    size, loader, start = batch_size(args), run.first("loader", name="train"), run.first("start")
    rate = size / speed.step * launch.here
    report.line(
        "step",
        f"{speed.step:.4g} s ({speed.count} measured, the middle 80 % {speed.low:.4g} to {speed.high:.4g} s), "
        f"{rate:.4g} images/s with {launch.here} process{'es' * (launch.here > 1)}",
    )
    own = speed.step - speed.wait
    if loader["device"] == "cpu" and speed.computed < 0.7 * own:
        problem = f"other programs held the cores: the process computed {speed.computed / own:.0%} of the time"
        report.warn(problem, "repeat this when they have ended")
    elif speed.high - speed.low > 0.3 * speed.step and speed.wait < 0.1 * speed.step:
        report.warn("steps take unequally long", "repeat this when nothing else runs, or with --seconds 120")
    # ---- loader
    alone = run.first("alone").get("images_per_second")
    if alone:
        need = size / max(1e-9, own)
        text = f"{alone:.4g} images/s alone with --num_workers {args.num_workers}; training could take {need:.4g}"
        report.line("loader", f"{text} and waits {speed.wait / speed.step:.0%} of the time")
    if speed.wait > 0.1 * speed.step:
        spare = max(1, cores() // launch.here)
        if args.num_workers < spare:
            remedy = f"--num_workers {spare}"
        else:
            remedy = (
                f"shrink the images once to about {2 * (getattr(args, 'input_size', 0) or 224)} pixels, or more cores"
            )
        report.warn(f"training waits for images {speed.wait / speed.step:.0%} of the time", remedy)
    # ---- duration
    steps = loader["steps"]
    if launch.here != launch.planned:
        steps = max(1, round(steps * launch.here / launch.planned))
    epoch = steps * speed.step + speed.rest
    done = run.first("resume")
    left = start["epochs"] - done.get("epoch", 0) - done.get("images", 0) / max(1, loader["images"])
    text = f"{duration(epoch)} ({steps} steps, {duration(speed.rest)} for saving and evaluation)"
    report.line("epoch", text)
    continued = f", {left:.4g} of them left" if done.get("epoch") or done.get("images") else ""
    total = speed.start + left * epoch
    report.line("whole run", f"{duration(total)} for {start['epochs']} epochs{continued}")
    if launch.here != launch.planned:
        how = f"extrapolated from {launch.here} to {launch.planned} processes on machines like this one"
        report.line("", f"{how}: {rate * launch.planned / launch.here:.4g} images/s, without the exchange of gradients")


def check_memory(report: Report, run: Measurement, args: argparse.Namespace, launch: Launch) -> None:
    """Peaks per process, and whether they fit."""
    memory = run.first("memory")
    if not memory:
        return
    host = max(rank["host"] for rank in memory["ranks"])
    workers = max(run.first("full").get("workers", 0), memory["workers"])
    report.line("memory", f"{amount(host)} per process at the peak, {amount(workers)} more in its loader processes")
    free, total = memory_available()
    need = (host + workers) * launch.here
    if need > 0.9 * free:
        remedy = "halve --batch_size and double --accum_iter, or lower --num_workers"
        report.warn(f"{amount(need)} of {amount(free)} available memory would be used", remedy)
    if "allocated" in memory["ranks"][0]:
        allocated, reserved = (max(rank[name] for rank in memory["ranks"]) for name in ("allocated", "reserved"))
        in_use, card = memory["ranks"][0]["in_use"], memory["ranks"][0]["total"]
        report.line(
            "GPU memory", f"{amount(allocated)} per process at the peak, {amount(reserved)} reserved, of {amount(card)}"
        )
        if in_use > 0.95 * card:
            remedy = "halve --batch_size and double --accum_iter to be safe"
            report.warn(f"{amount(in_use)} of the GPU's {amount(card)} are in use", remedy)
    batch, shm = run.first("batch").get("bytes", 0), Path("/dev/shm")
    ahead = 2 * args.num_workers * batch * launch.here
    if shm.exists() and ahead > 0.8 * shutil.disk_usage(shm).free:
        problem = f"batches made ahead need {amount(ahead)} of /dev/shm, {amount(shutil.disk_usage(shm).free)} are free"
        report.warn(problem, "give the container more (docker --shm-size), or lower --num_workers")


# ---- files


def numbered(files: dict[str, Any], first: int, epochs: int) -> int:
    """Numbered checkpoints that the run leaves."""
    every, phase = files["every"], files["phase"]
    count = sum(bool(every) and ((e + phase) % every == 0 or e + 1 == epochs) for e in range(first, epochs))
    return count if files["keep_all"] else min(1, count)


def existing(folder: Path) -> Path:
    """The folder, or what exists of its path."""
    return next(p for p in (folder, *folder.parents) if p.exists())


def check_files(report: Report, run: Measurement) -> None:
    """Space for checkpoints, and what would be continued."""
    files, resumed, start = run.first("files"), run.first("resume"), run.first("start")
    if not start:
        report.line("folder", files["folder"] or "none")
        return
    if not files["folder"]:
        report.line("folder", "none: the run writes nothing")
        report.warn("neither checkpoints nor logs are written", "--output_dir DIR")
        return
    folder = Path(files["folder"]).absolute()
    report.line("folder", folder)
    parent = existing(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        report.fail(f"--output_dir {files['folder']}: cannot be written", f"make {parent} writable, or name another")
    # ---- what is there
    if resumed.get("path"):
        at = f"epoch {resumed['epoch']} of {start['epochs']}"
        at += f", {resumed['images']} images of it done" if resumed["images"] else ""
        report.line("continues", f"{resumed['path']}, {at}")
        check_continued(report, resumed, start)
    elif folder.is_dir() and any(folder.iterdir()):
        some = ", ".join(sorted(p.name for p in folder.iterdir())[:4])
        report.warn(f"{folder} is not empty ({some}), but nothing in it is continued", "name a new --output_dir")
    # ---- space
    saves = [save for save in run.all("save") if save.get("files")]
    failed = next((save["error"] for save in run.all("save") if "error" in save), "")
    if failed:
        report.warn(f"no checkpoint could be measured: {failed}", "TMPDIR=<folder with more space>")
    if not saves:
        report.line("checkpoints", "size not measured")
        return
    size, count = max(save["bytes"] for save in saves), numbered(files, resumed["epoch"], start["epochs"])
    seconds = statistics.median(save["seconds"] / save["files"] for save in saves)
    need = size * (count + 3)  # the latest, the one before, and one that is being written
    free = shutil.disk_usage(parent).free
    text = f"{amount(size)} each, written in {duration(seconds)}; {count} numbered ones, the latest and the one before"
    report.line("checkpoints", text)
    report.line("space", f"{amount(need)} at most, {amount(free)} free")
    if need > free:
        flag = "the flag of the interval between numbered checkpoints (--save_freq or the like)"
        report.warn(
            f"{folder} has {amount(free)}, the run needs up to {amount(need)}", f"another --output_dir, or raise {flag}"
        )
    elif need > 0.8 * free:
        report.warn(
            f"the checkpoints fill {need / free:.0%} of the free space", "make room, or name another --output_dir"
        )


def check_continued(report: Report, resumed: dict[str, Any], start: dict[str, Any]) -> None:
    """Whether the run in the folder is complete, and had these flags."""
    if resumed["epoch"] >= start["epochs"]:
        remedy = "more --epochs, or a new --output_dir"
        report.warn(f"it has all of its {start['epochs']} epochs: the run would end at once", remedy)
    stored = distributed.load(resumed["path"]).get("args")
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else stored or {}
    skipped = {
        "output_dir",
        "log_dir",
        "resume",
        "data_path",
        "num_workers",
        "device",
        "world_size",
        "local_rank",
        "bad_images",
    }
    changed = [
        f"{k} {v} (was {stored[k]})" for k, v in start["args"].items() if stored.get(k, v) != v and k not in skipped
    ]
    if changed:
        problem = f"it continues a run with other flags: {', '.join(changed[:8])}"
        report.warn(problem, "a new --output_dir for a new run, or the old flags")


# ---- main


def check_own_flags(own: argparse.Namespace) -> None:
    """Raise UserError for a mistake in this script's flags."""
    script = ROOT / own.method / f"main_{own.stage}.py"
    if not script.exists():
        known = sorted(p.stem.removeprefix("main_") for p in script.parent.glob("main_*.py"))
        raise distributed.UserError(f"--stage {own.stage}: {own.method} has {', '.join(known)}")
    if own.processes is not None and own.processes < 1:
        raise distributed.UserError(f"--processes {own.processes}: expected at least 1")
    if not own.seconds > 0:
        raise distributed.UserError(f"--seconds {own.seconds:g}: expected more than 0")
    if own.check_images != "all" and not own.check_images.isdecimal():
        raise distributed.UserError(f"--check_images {own.check_images}: expected a number of images, or all")


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that goes even if this script is ended."""

    def end(signum: int, _frame: Any) -> NoReturn:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        with tempfile.TemporaryDirectory(prefix="doctor-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def examine(own: argparse.Namespace, flags: list[str]) -> int:
    """Print the report; returns the exit status."""
    check_own_flags(own)
    report, script = Report(), ROOT / own.method / f"main_{own.stage}.py"
    print(f"{own.method}/{script.name} {shlex.join(flags)}")
    try:
        args, names = parsed(script, flags)
    except Refused as refusal:
        report.section("Flags")
        report.fail(str(refusal))
        return report.end()
    if not hasattr(args, "epochs"):
        raise distributed.UserError(f"--stage {own.stage}: trains nothing")
    report.section("Machine")
    check_versions(report)
    device = check_devices(report, args)
    report.section("Launch")
    launch = check_launcher(report, own, args, device)
    with temporary_folder() as folder:
        begun = datetime.datetime.now().strftime("%H:%M:%S")
        print(f"\n[{begun}] {'making' if own.no_measure else 'measuring'} the run ...", file=sys.stderr, flush=True)
        run = measure(script, flags, launch, 0.0 if own.no_measure else own.seconds, folder)
        if launch.rank:
            return 0 if run.first("done") else 1
        if run.all("loader"):
            report.section("Data")
            check_data(report, run, own, args, launch, folder)
    report.section("Recipe")
    check_recipe(report, run, own, args, launch, names["get_args_parser"]())
    if not run.first("done"):
        report.section("Run")
        explain(report, run, script)
    elif not own.no_measure:
        report.section("Speed and memory")
        check_speed(report, run, args, launch)
        check_memory(report, run, args, launch)
    if run.first("files"):
        report.section("Files")
        check_files(report, run)
    return report.end()


if __name__ == "__main__":
    known, unknown = get_args_parser().parse_known_args()
    distributed.run(lambda args: sys.exit(examine(args, unknown)), known)
