"""Checks a long run before it is started.

Usage: python scripts/tools/doctor.py METHOD [--stage STAGE] [flags of main_<stage>.py]

Reports versions, devices and launcher; the images; images per update and learning rate beside the published ones;
memory, speed and duration; space for the checkpoints, and what the run would continue. For that it starts the command
itself, in as many processes as planned if this machine has room for them, with its output in a temporary folder, reads
progress.jsonl, ends it by SIGTERM after some seconds of training, and evaluates the checkpoint that it left. Nothing is
written to the run's folders. Exit status: 0, also with warnings; 1 if the run would fail; 2 for a mistake in the flags
of this program.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import io
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from packaging.requirements import Requirement
from torchvision.transforms.functional import get_image_size

from common import datasets, distributed
from common.datasets.memory import available_bytes
from common.dense_datasets.detection import DetectionImages, detection_images
from common.dense_datasets.segmentation import SegmentationImages, class_names, segmentation_images
from common.distributed.process import LAUNCHERS
from scripts.tools import flags
from scripts.tools.machine import cores
from scripts.tools.measured_run import Launch, Measurement, Plan, accumulated, batch_size, measure, speed_of
from scripts.tools.texts import amount, duration

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchvision", "timm", "numpy")  # whose versions are shown; all requirements are compared
SAVES = ("save_freq", "saveckp_freq", "save_ckpt_freq", "save_every")  # epochs between the numbered checkpoints
NAMED_STAGES = ("segmentation", "detection")  # that a row's script runs only when they are named
SMALLER = "halve --batch_size and double --accum_iter, which keeps the images per update"
# Flags of the groups below that are no recipe's, or of which the report has more to say.
RECIPE = ("model", "optimizer", "augmentation")
NO_RECIPE = "batch_size batch_size_per_gpu accum_iter update_freq finetune pretrained pretrained_weights teacher_path "
NO_RECIPE += "discrete_vae_weight_path nb_classes"
CHANGED = ("bad_images", "accum_iter", "update_freq", "freeze_last_layer")  # flags that the measured run may change
ENDS = {  # by what a run's output and status say at its end: what that means, and what helps
    r"OutOfMemoryError|CUDA out of memory": ("the GPU's memory is too small", f"{SMALLER}; or --amp_dtype bf16"),
    r"Bus error|Signal 7 \(SIGBUS\)|unable to (write|open|mmap) .*shm|^status -7$": (
        "the loader's shared memory is full (/dev/shm)",
        "give the container more (docker --shm-size), or lower --num_workers",
    ),
    r"[cC]an(no|')t allocate memory|MemoryError|^status -9$": (
        "the memory of this machine is too small",
        SMALLER,
    ),
}


def get_args_parser() -> argparse.ArgumentParser:
    p = flags.Parser("doctor")
    p.usage = "%(prog)s METHOD [--stage STAGE] [flags of METHOD/main_STAGE.py]"
    p.add_argument("method", choices=flags.METHODS, help="folder of the method whose run is checked")
    p.add_argument("--stage", default="pretrain", help="which program runs: main_<stage>.py of the method's folder")
    p.add_argument("--processes", type=int, help="processes of the planned run on all nodes; by default this launch's")
    p.add_argument("--check_images", default="200", help="how many images are read one by one: a number, or all")
    p.add_argument("--no_measure", action="store_true", help="start the run, but end it before its first step")
    p.add_argument("--seconds", default=30.0, type=float, help="seconds of training to measure after warming up")
    return p


class Report:
    """Prints sections, lines and warnings, and counts."""

    def __init__(self) -> None:
        self.warnings = 0
        self.failures: list[str] = []

    def line(self, name: str, text: object) -> None:
        print(f"  {f'{name}:' if name else '':14} {text}", flush=True)

    def warn_if(self, is_so: bool, problem: str, remedy: str) -> None:
        self.warnings += is_so
        if is_so:
            print(f"  WARNING: {problem} -> {remedy}", flush=True)

    def fail(self, problem: str, remedy: str = "") -> None:
        self.failures.append(problem)
        print(f"  ERROR: {problem}" + (f" -> {remedy}" if remedy else ""), flush=True)

    def end(self) -> int:
        """Print the summary; returns the exit status."""
        count = f"{self.warnings or 'no'} warning{'s' * (self.warnings != 1)}"
        verdict = f"The run would fail: {self.failures[0]}" if self.failures else "The run can start"
        print(f"\n{verdict} ({count})")
        return 1 if self.failures else 0


# ---- the planned run


class Refused(Exception):
    """The main itself refuses the run."""


def parsed(method: str, stage: str, words: list[str]) -> tuple[argparse.Namespace, ModuleType]:
    """The flags of a main as its command line reads them, and the main; raises Refused with its message."""
    main, errors = importlib.import_module(f"{method}.main_{stage}"), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            args = flags.arguments(main, words)
        distributed.check_ranges(args)
        return args, main
    except distributed.UserError as error:
        raise Refused(f"main_{stage}.py: {error}") from error
    except SystemExit as end:
        if not end.code:  # --help, --print_config
            raise
        raise Refused(errors.getvalue().strip().splitlines()[-1]) from end


def network(args: argparse.Namespace) -> str:
    """Name of the network; A2MIM's with its method."""
    name = flags.network_of(vars(args))
    return f"{args.method} {name}" if hasattr(args, "method") else name


class Row(NamedTuple):
    """A published row: its script, and the flags of a stage."""

    script: str
    args: argparse.Namespace

    @property
    def images(self) -> int:
        """Images per update; the scripts make up for one process."""
        return batch_size(self.args) * accumulated(self.args)


@functools.cache
def row_commands(script: Path, *stages: str) -> list[list[str]]:
    """The commands that a row's script would run, as words."""
    env = {**os.environ, "GPUS": "1", "NNODES": "1", "EXTRA": "", "OUT": "/out"}
    env |= dict.fromkeys(("DATA", "ADE20K", "COCO"), "data")
    shown = subprocess.run(["bash", script, "--dry_run", *stages], cwd=ROOT, env=env, capture_output=True, text=True)
    lines = shown.stdout.replace("\\\n", " ").splitlines() if not shown.returncode else []
    return [words for words in map(shlex.split, lines) if len(words) > 1]


def paper_row(method: str, stage: str, args: argparse.Namespace) -> Row | None:
    """The row of the papers' tables whose flags for this stage are most like the run's, by the rows' own scripts."""
    main, rows = f"{method}/main_{stage}.py", []
    for script in (path for path in sorted((ROOT / "scripts").glob("*e.sh")) if f" {main} " in path.read_text()):
        commands = row_commands(script, *(name for name in NAMED_STAGES if name == stage))
        found = (parsed(method, stage, words[2:])[0] for words in commands if words[1].endswith(main))
        rows += [Row(script.name, theirs) for theirs in found]

    def likeness(row: Row) -> tuple[bool, int]:
        return network(row.args) == network(args), sum(getattr(args, k, None) == v for k, v in vars(row.args).items())

    return max(rows, key=likeness, default=None)


def make_plan(own: argparse.Namespace, words: list[str]) -> Plan:
    """The plan of a command line; raises Refused where the main refuses it."""
    args, main = parsed(own.method, own.stage, words)
    if not (hasattr(args, "epochs") or hasattr(args, "iters")):
        raise distributed.UserError(f"--stage {own.stage}: trains nothing")
    if hasattr(main, "default_folder"):
        with contextlib.redirect_stdout(io.StringIO()):
            main.default_folder(args, own.stage)
    folder = main.output_dir(args) if hasattr(main, "output_dir") else args.output_dir
    if hasattr(main, "results_folder") and not folder:  # UDI's evaluations write beside the weights unless told
        folder = str(Path(args.finetune or args.pretrained_weights).parent / main.results_folder(args))
    return Plan(own, ROOT / own.method / f"main_{own.stage}.py", words, args, main.get_args_parser(), folder)


# ---- machine and launcher


def check_versions(report: Report) -> None:
    """Installed packages against requirements.txt."""
    installed, lines = {}, (ROOT / "requirements.txt").read_text().splitlines()
    for needed in (Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()):
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[needed.name] = metadata.version(needed.name)
        found = installed.get(needed.name, "")
        fits = bool(found) and needed.specifier.contains(found.split("+")[0], prereleases=True)
        problem = f"{needed.name} {found or 'not'} is installed, requirements.txt has {needed}"
        report.warn_if(not fits, problem, "pip install -r requirements.txt")
    shown = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    report.line("versions", f"python {sys.version.split()[0]}, {shown}")


def check_devices(report: Report, args: argparse.Namespace) -> str:
    """Devices, memory and cores; returns the type of the device that the run will take."""
    count = torch.cuda.device_count()
    on_gpu = count > 0 and args.device != "cpu"
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        report.line(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {amount(total)}, {amount(free)} free")
        problem = f"cuda:{index}: another program holds {amount(total - free)}"
        report.warn_if(on_gpu and free < 0.9 * total, problem, "end it, or hide this GPU by CUDA_VISIBLE_DEVICES")
    report.warn_if(count > 0 and not on_gpu, "the run takes the CPU, and there is a GPU", "leave --device out")
    report.line("memory", f"{amount(available_bytes(torch.device('cpu')))} available")
    report.line("cores", f"{cores()}; the run takes the {'GPU' if on_gpu else 'CPU'}")
    if not on_gpu and (advice := distributed.bf16_advice(getattr(args, "amp_dtype", "fp32"))):
        report.line("precision", advice)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    problem = f"other programs are running (load {load:.1f} on {cores()} cores)"
    report.warn_if(load > 0.5 * cores(), problem, "end them before you trust the times below")
    return "cuda" if on_gpu else "cpu"


def check_launcher(report: Report, own: argparse.Namespace, args: argparse.Namespace, device: str) -> Launch:
    """What the launcher's variables mean for the run, and how many processes it is measured with."""
    env = dict(os.environ)
    names = next((names for names in LAUNCHERS if all(name in env for name in names)), ())
    values = ", ".join(f"{name}={env[name]}" for name in names)
    with distributed.user_errors(values):
        rank, world = (int(env[name]) for name in names[:2]) if names else (0, 1)
    kind = {"RANK": "torchrun", "OMPI_COMM_WORLD_RANK": "OpenMPI", "SLURM_PROCID": "SLURM"}[names[0]] if names else ""
    interactive = kind == "SLURM" and (sys.stdin.isatty() or "SLURM_STEP_NUM_TASKS" not in env)
    launched = world > 1 and not interactive
    if launched and own.processes not in (None, world):
        raise distributed.UserError(f"--processes {own.processes}: this is a launch of {world}")
    shown = f"{kind}: process {rank} of {world}, by {values}" if kind else "none: python starts one, torchrun several"
    report.line("launcher", shown)
    for stray in ("WORLD_SIZE", "RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        problem = f"{stray}={env.get(stray)} is set, but not all of the launcher's variables: the run ignores it"
        report.warn_if(stray in env and not kind, problem, f"start it by torchrun or srun, or unset {stray}")
    problem = f"SLURM's variables in this shell make a plain python wait for {world} processes"
    remedy = f"start it by srun, or unset {' '.join(names)} and use torchrun"
    report.warn_if(interactive and world > 1, problem, remedy)
    env = {k: v for k, v in env.items() if not (interactive and k in names)}
    planned = world if launched else own.processes or 1
    room, units = (max(1, torch.cuda.device_count()), "GPUs") if device == "cuda" else (cores(), "cores")
    here = world if launched else min(planned, room)
    more = f"; measured with {here}: this machine has {room} {units}" if here < planned else ""
    report.line("processes", f"{planned}{more}")
    remedy = f"torchrun --nproc_per_node {room} ..., here: --processes {room}"
    report.warn_if(device == "cuda" and planned == 1 < room, f"one process uses one of {room} GPUs", remedy)
    check_threads(report, env.get("OMP_NUM_THREADS", ""), min(here, room), here > 1, args.num_workers, device)
    return Launch(planned, here, launched, env, rank, device == "cuda")


def check_threads(report: Report, set_to: str, processes: int, several: bool, workers: int, device: str) -> None:
    """Whether the threads and loader processes of the processes on this machine fit its cores."""
    threads = int(set_to) if set_to.isdecimal() else 1 if several else cores()
    each = max(1, cores() // processes)
    shown = set_to or f"not set, which means {threads}"
    report.line("threads", f"OMP_NUM_THREADS={shown}; {workers} loader processes each")
    used, remedy = f"{processes} x {threads} threads", f"OMP_NUM_THREADS={each}"
    report.warn_if(device == "cpu" and threads * processes > cores(), f"{used} on {cores()} cores", remedy)
    idle = device == "cpu" and threads * processes <= cores() // 2
    report.warn_if(idle, f"{used} use half of {cores()} cores or less", remedy)
    problem = f"--num_workers {workers}: {workers * processes} loader processes on {cores()} cores"
    report.warn_if(workers * processes > cores(), problem, f"--num_workers {each}")
    alone = workers == 0 and device == "cuda"
    report.warn_if(alone, "--num_workers 0: the GPU waits for every image", f"--num_workers {each}")


def explain(report: Report, plan: Plan, run: Measurement) -> None:
    """Say why a measured run failed."""
    text = f"{run.output}\nstatus {run.status}"
    if known := [words for pattern, words in ENDS.items() if re.search(pattern, text, re.MULTILINE)]:
        report.fail(*known[0])
    elif said := re.findall(rf"^(?:\[rank \d+\] )?({re.escape(plan.script.name)}: .*)", text, re.MULTILINE):
        report.fail(said[-1])
    else:
        tail = [line for line in text.splitlines() if line.strip()][-12:]
        last = next((line for line in reversed(tail) if re.match(r"\w*(Error|Exception)\b", line)), tail[-1])
        report.fail(f"the run ended: {last}")
        print("\n".join(f"    {line}" for line in tail))


# ---- images


def image_sets(args: argparse.Namespace, labelled: bool, count: int) -> dict[str, Any]:
    """Training and validation images as the run reads them, by "train" and "val"; what is not found is left out.

    Args:
        count: of the training images, as the run says it; 0: unknown.
    """

    def read(train: bool, **form: bool) -> Any:
        if hasattr(args, "train_json"):
            return detection_images(args, train)
        if hasattr(args, "reduce_zero_label"):
            class_names(args)
            return segmentation_images(args, train)
        path = args.data_path if train else getattr(args, "eval_data_path", None) or args.data_path
        split = getattr(args, "train_split" if train else "val_split", "")
        name, skip = getattr(args, "dataset", ""), getattr(args, "output_dir", "")
        chans = getattr(args, "in_chans", None)
        images = datasets.image_dataset(path, train, labelled, name, split, skip=skip, in_chans=chans, **form)
        images.in_chans = chans
        return images

    for form in ({}, {"lists": True}, {"direct": True}):
        sets = {}
        for name in ("train", "val"):
            with contextlib.suppress(distributed.UserError), contextlib.redirect_stdout(io.StringIO()):
                sets[name] = read(name == "train", **form)
        if "train" in sets and count in (0, len(sets["train"])):
            return sets
    return {}


def described(images: Any) -> str:
    """How many images a data set has, and what belongs to them."""
    text, classes = f"{len(images)} images", getattr(images, "classes", None)
    if isinstance(images, SegmentationImages):
        text += f" with masks of {images.nb_classes} classes"
    elif isinstance(images, DetectionImages):
        text += f" with {images.object_count} objects of {len(images.classes)} classes"
    elif hasattr(images, "samples"):
        counts = sorted(Counter(target for _, target in images.samples).values())
        each = f"{counts[0]} to {counts[-1]} each (median {statistics.median(counts):g})"
        text += f" in {len(counts)} classes, {each}" if classes else " without classes"
    return f"{text}, {type(images).__name__} {getattr(images, 'root', '')}".rstrip()


def check_images(report: Report, images: Any, name: str, how_many: str, size: int, skips: bool) -> None:
    """Read images, with their masks: are they readable, how large are they?"""
    count = len(images) if how_many == "all" else min(int(how_many), len(images))
    if not count:
        return
    chosen = range(len(images)) if count == len(images) else random.Random(0).sample(range(len(images)), count)
    with ThreadPoolExecutor(cores()) as pool:
        results = list(pool.map(functools.partial(size_of, images), chosen))
    bad = [f"{images.samples[i][0]}: {x}" for i, x in zip(chosen, results, strict=True) if isinstance(x, str)]
    sides = [min(result) for result in results if not isinstance(result, str)]
    which = "all" if count == len(images) else f"{count} of {len(images)}, sampled"
    shown = f"; shorter side {min(sides)} to {max(sides)} pixels, median {statistics.median(sides):g}" if sides else ""
    report.line(f"{name} images", f"{which}: {count - len(bad)} readable{shown}")
    problem = f"{len(bad)} unreadable: {'; '.join(bad[:3])}{f' and {len(bad) - 3} more' * (len(bad) > 3)}"
    report.warn_if(bool(bad) and skips, problem, "delete or replace them; --bad_images skip goes on without them")
    if bad and not skips:
        report.fail(problem, "delete or replace them, or add --bad_images skip")
    problem = f"half of the images are smaller than the run's {size} pixels and are enlarged"
    remedy = "a smaller --input_size (UDI: --global_size), with a smaller --patch_size, costs less"
    report.warn_if(bool(sides) and statistics.median(sides or [0]) < size, problem, remedy)


def size_of(images: Any, index: int) -> tuple[int, int] | str:
    """Width and height of an image, or why it cannot be read."""
    try:
        image, chans = images[index][0], getattr(images, "in_chans", None)
        width, height = get_image_size(datasets.to_channels(image, chans) if chans else image)
        return width, height
    except Exception as error:  # of many types
        return " ".join(str(error).split())[:200] or type(error).__name__


def check_data(report: Report, plan: Plan, run: Measurement) -> None:
    """The images of the run, and what its batches leave out."""
    args, pretrains = plan.args, plan.own.stage in ("pretrain", "tokenizer")
    sets = image_sets(args, not pretrains, run.said[0])
    for name, images in sets.items() if not pretrains else list(sets.items())[:1]:
        report.line(name, described(images))
        if hasattr(images, "samples"):
            size = getattr(args, "input_size", 0) or getattr(args, "global_size", 0)
            check_images(report, images, name, plan.own.check_images, size, args.bad_images == "skip")
        else:
            report.line(f"{name} images", "not read one by one: the data set has no list of files")
    if "train" not in sets:
        report.line("train", f"{run.said[0] or 'unknown'} images, not read one by one")
    elif pretrains:
        check_layout(report, args, Path(getattr(sets["train"], "root", "")))
    check_batches(report, plan, run, run.said[0] or len(sets.get("train", ())))
    for problem in re.findall(r"\] (.*: unreadable image \(.*\)): skipped", run.output)[:3]:
        report.warn_if(True, problem, "delete or replace it")


def check_batches(report: Report, plan: Plan, run: Measurement, images: int) -> None:
    """Whether an epoch has enough batches, and uses its images."""
    size, accum, processes = batch_size(plan.args), accumulated(plan.args), plan.launch.planned
    steps = plan.steps(run)
    if images and images < size * processes:
        problem = f"{images} images do not fill a batch of {size} on {processes} processes"
        report.fail(problem, "a smaller --batch_size, or fewer processes")
    elif steps and not plan.counts_updates:
        if steps < accum:
            problem = f"an epoch has {steps} batches, fewer than the {accum} of an update"
            report.fail(problem, f"a smaller --accum_iter, at most {steps}")
        lost = 1 - steps * size * processes / images
        problem = f"an epoch leaves out {lost:.0%} of the images, which fill no batch"
        report.warn_if(lost > 0.05, problem, f"a --batch_size that divides {images} better")


def check_layout(report: Report, args: argparse.Namespace, root: Path) -> None:
    """Images for pre-training need no classes: all below the folder are read, another one's val/, too."""
    if inside := sorted(path for name in ("train", "val") for path in root.glob(f"*/{name}") if path.is_dir()):
        problem = f"{inside[0].parent} holds train/ or val/, and all images of both are read"
        report.warn_if(True, problem, f"--data_path {inside[0].parent}")
    if not args.dataset:
        try:
            val = len(datasets.image_dataset(args.data_path, train=False))
            report.line("val", f"{val} images; pre-training does not use them")
        except distributed.UserError:
            report.line("val", f"none in {args.data_path}; fine-tuning and probes need them")


# ---- recipe


def check_recipe(report: Report, plan: Plan, run: Measurement) -> None:
    """Images per update, learning rate and warm-up beside the published ones."""
    args, own = plan.args, plan.own
    size, accum, processes = batch_size(args), accumulated(args), plan.launch.planned
    images, step = size * accum * processes, size * processes
    report.line("per update", f"{images} images = --batch_size {size} x --accum_iter {accum} x {processes} processes")
    row = paper_row(own.method, own.stage, args)
    same = row is not None and network(row.args) == network(args)
    if row is not None:
        like = "" if same else f"; no row has {network(args)}, this is the most similar one"
        report.line("published", f"{row.images} images per update (scripts/{row.script}{like})")
        fits = row.images % step == 0
        other = f"--accum_iter {row.images // step}" if fits else f"--batch_size that divides {row.images}"
        problem = f"{images} images per update, the published row has {row.images}"
        differs = same and images != row.images and run.said[0] >= row.images
        report.warn_if(differs, problem, f"{other} keeps the published number")
    check_rate(report, plan, run, images, row)
    if row is not None and same:
        groups, theirs = vars(distributed.flag_groups(plan.parser)), vars(row.args)
        recipe = {action.dest for name in RECIPE for action in groups[name]._group_actions} - {*NO_RECIPE.split()}
        other = [f"{k} {v} ({theirs[k]})" for k, v in vars(args).items() if k in recipe and theirs.get(k, v) != v]
        shown = ", ".join(other[:12]) + (", ..." if len(other) > 12 else "")
        report.line("other flags", f"differ from the published in {shown}" if other else "as published")
    for flag, of in (("warmup_epochs", "epochs"), ("warmup_iters", "iters")):
        if not (hasattr(args, flag) and hasattr(args, of)):
            continue
        warmup, total = getattr(args, flag), getattr(args, of)
        usual = (getattr(row.args, flag, None), getattr(row.args, of, 0)) if row is not None else (None, 0)
        theirs = f"; published {usual[0]} of {usual[1]}" if usual[0] is not None else ""
        report.line("warm-up", f"{warmup:g} of {total} {of}{theirs}")
        share = usual[0] / usual[1] if usual[0] is not None else 0.05
        problem = f"the warm-up takes {warmup / total:.0%} of the run"
        report.warn_if(warmup > 0.25 * total, problem, f"--{flag} {round(share * total)}")


def check_rate(report: Report, plan: Plan, run: Measurement, images: int, row: Row | None) -> None:
    """The learning rate that the main computed; of another number of images per update, by its rule."""
    (_, measured, rate), given = run.said, getattr(plan.args, "lr", None)
    if not rate:
        return
    flag, value = ("--blr", plan.args.blr) if given is None else ("--lr", given)
    help_of_lr = next((action.help or "" for action in plan.parser._actions if action.dest == "lr"), "")
    # It grows with the images where the main says so, or has made another value of it.
    if given is None or re.search(r"per \d+ images", help_of_lr) or abs(rate / given - 1) > 0.01:
        rule = f"{flag} {value:g} x {images} / {measured * value / rate:.0f}"
        report.line("learning rate", f"{rate * images / measured:.2e}: {rule}")
        return
    report.line("learning rate", f"{rate:.2e}: --lr, absolute")
    if row is not None and getattr(row.args, "lr", None) == given:
        problem = f"--lr {given:g} is absolute and published for {row.images} images per update, this run has {images}"
        report.warn_if(images != row.images, problem, f"--lr {given * images / row.images:.3g} is in proportion")


# ---- speed and memory


def check_speed(report: Report, plan: Plan, run: Measurement) -> None:
    """Steps, epochs, the whole run; what holds them up."""
    args, launch = plan.args, plan.launch
    speed = speed_of(run, accumulated(args))
    if speed is None:
        report.line("speed", "no training steps were measured")
        return
    rate, busy = run.images / speed.step, 1 - speed.wait / speed.step
    spread = f"{speed.count} measured, the middle 80 % {speed.low:.4g} to {speed.high:.4g} s"
    with_processes = f"{rate:.4g} images/s with {launch.here} process{'es' * (launch.here > 1)}"
    report.line("step", f"{speed.step:.4g} s ({spread}), {with_processes}")
    problem = f"other programs held the cores: the process computed {run.computed / busy:.0%} of the time"
    disturbed = not launch.on_gpu and run.computed < 0.7 * busy
    report.warn_if(disturbed, problem, "repeat this when they have ended")
    waits = f"training waits for images {1 - busy:.0%} of the time"
    report.line("loader", f"{waits} with --num_workers {args.num_workers}")
    spare, side = max(1, cores() // launch.here), 2 * (getattr(args, "input_size", 0) or 224)
    smaller = f"shrink the images once to about {side} pixels, or more cores"
    report.warn_if(busy < 0.9, waits, f"--num_workers {spare}" if args.num_workers < spare else smaller)
    # ---- duration
    steps, unit = plan.steps(run), "interval" if plan.counts_updates else "epoch"
    epoch = steps * speed.step + speed.rest
    report.line(unit, f"{duration(epoch)} ({steps} steps, {duration(speed.rest)} for saving and evaluation)")
    if run.evaluation:
        report.line("evaluation", duration(run.evaluation))
    problem = f"the evaluation of its checkpoint ended: {run.problem}"
    report.warn_if(bool(run.problem), problem, "see what --eval says of a checkpoint")
    left = plan.epochs - run.resumed[1] - run.resumed[2] / (steps * batch_size(args) * launch.planned)
    total, what = (args.iters, "updates") if plan.counts_updates else (args.epochs, "epochs")
    continued = f", {left * total / plan.epochs:.4g} of them left" if left < plan.epochs else ""
    report.line("whole run", f"{duration(run.begun + left * epoch)} for {total} {what}{continued}")
    if launch.here != launch.planned:
        how = f"extrapolated from {launch.here} to {launch.planned} processes on machines like this one"
        report.line("", f"{how}: {rate * launch.planned / launch.here:.4g} images/s, without the exchange of gradients")


def check_memory(report: Report, plan: Plan, run: Measurement) -> None:
    """Peaks per process, and whether they fit."""
    workers = f"{amount(run.workers)} more in its loader processes"
    report.line("memory", f"{amount(run.host)} per process at the peak, {workers}")
    launch, free = plan.launch, available_bytes(torch.device("cpu"))
    need = (run.host + run.workers) * launch.here
    problem = f"{amount(need)} of {amount(free)} available memory would be used"
    report.warn_if(need > 0.9 * free, problem, f"{SMALLER}, or lower --num_workers")
    if launch.on_gpu and run.lines:
        in_use, card = run.device
        report.line("GPU memory", f"{amount(run.lines[-1]['memory'])} per process at the peak, of {amount(card)}")
        problem = f"{amount(in_use)} of the GPU's {amount(card)} are in use"
        report.warn_if(in_use > 0.95 * card, problem, f"{SMALLER}, to be safe")


# ---- files


def numbered(plan: Plan, first: int) -> int:
    """Numbered checkpoints that the run keeps from an epoch on, at most."""
    unused = [action.dest for action in distributed.flag_groups(plan.parser).unused._group_actions]
    name = next((name for name in SAVES if hasattr(plan.args, name) and name not in unused), "")
    every, epochs = getattr(plan.args, name, 0), math.ceil(plan.epochs)
    count = sum(bool(every) and (epoch % every == 0 or epoch + 1 == epochs) for epoch in range(first, epochs))
    return min(1, count) if name == "save_every" else count  # A2MIM's authors keep the last one


def check_files(report: Report, plan: Plan, run: Measurement) -> None:
    """Space for checkpoints, and what would be continued."""
    if not plan.folder:
        report.line("folder", "none: the run writes nothing")
        report.warn_if(True, "neither checkpoints nor logs are written", "--output_dir DIR")
        return
    folder = Path(plan.folder).absolute()
    report.line("folder", folder)
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        report.fail(f"--output_dir {plan.folder}: cannot be written", f"make {parent} writable, or name another")
    if run.resumed[0]:
        check_continued(report, plan, run)
    elif folder.is_dir():
        some = ", ".join(sorted(p.name for p in folder.iterdir())[:4])
        problem = f"{folder} is not empty ({some}), but nothing in it is continued"
        report.warn_if(bool(some), problem, "name a new --output_dir")
    # ---- space
    if failed := re.search(r": (.*: cannot be written \(.*\))", run.output):
        report.warn_if(True, f"no checkpoint could be measured: {failed[1]}", "TMPDIR=<folder with more space>")
    if not run.checkpoint:
        report.line("checkpoints", "size not measured")
        return
    size, count, free = run.checkpoint, numbered(plan, run.resumed[1]), shutil.disk_usage(parent).free
    need = size * (count + 3)  # the latest, the one before, and one that is being written
    text = f"{amount(size)} each, written in {duration(run.saving)}"
    report.line("checkpoints", f"{text}; {count} numbered ones, the latest and the one before")
    report.line("space", f"{amount(need)} at most, {amount(free)} free")
    problem = f"{folder} has {amount(free)}, the run needs up to {amount(need)}"
    remedy = "another --output_dir, or keep fewer numbered checkpoints (--save_freq or the like)"
    report.warn_if(need > 0.8 * free, problem, remedy)


def check_continued(report: Report, plan: Plan, run: Measurement) -> None:
    """Whether the run in the folder is complete, and what the measured run says of its flags."""
    path, epoch, images = run.resumed
    done = f", {images} images of it done" if images else ""
    report.line("continues", f"{path}, epoch {epoch} of {math.ceil(plan.epochs)}{done}")
    problem = f"it has all of its {math.ceil(plan.epochs)} epochs: the run would end at once"
    report.warn_if(0 < plan.epochs <= epoch, problem, "more --epochs, or a new --output_dir")
    said = re.search(r"flags that differ from the resumed run's: (.*)", run.output)
    changed = [part for part in (said[1] if said else "").split(", ") if part and not part.startswith(CHANGED)]
    problem = f"it continues a run with other flags: {', '.join(changed[:8])}"
    report.warn_if(bool(changed), problem, "a new --output_dir for a new run, or the old flags")


# ---- main


def check_own_flags(own: argparse.Namespace) -> None:
    """Raise UserError for a mistake in this script's flags."""
    known = sorted(path.stem.removeprefix("main_") for path in (ROOT / own.method).glob("main_*.py"))
    if own.stage not in known:
        raise distributed.UserError(f"--stage {own.stage}: {own.method} has {', '.join(known)}")
    distributed.check_ranges(own, {"processes": (1, math.inf), "seconds": (0.1, math.inf)})
    if own.check_images != "all" and not own.check_images.isdecimal():
        raise distributed.UserError(f"--check_images {own.check_images}: expected a number of images, or all")


def examine(own: argparse.Namespace, words: list[str]) -> int:
    """Print the report; returns the exit status."""
    check_own_flags(own)
    report = Report()
    print(f"{own.method}/main_{own.stage}.py {shlex.join(words)}")
    try:
        plan = make_plan(own, words)
    except Refused as refusal:
        print("\nFlags")
        report.fail(str(refusal))
        return report.end()
    print("\nMachine")
    check_versions(report)
    device = check_devices(report, plan.args)
    print("\nLaunch")
    plan.launch = check_launcher(report, own, plan.args, device)
    now, what = datetime.datetime.now().strftime("%H:%M:%S"), "starting" if own.no_measure else "measuring"
    print(f"\n[{now}] {what} the run ...", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and remove the folder
    with tempfile.TemporaryDirectory(prefix="doctor-", ignore_cleanup_errors=True) as folder:
        run = measure(plan, Path(folder))
    if plan.launch.rank:
        return 0 if run.is_complete else 1
    sections = {"Data": check_data, "Recipe": check_recipe}
    if not run.is_complete:
        sections["Run"] = explain
    elif not own.no_measure:
        sections |= {"Speed": check_speed, "Memory": check_memory}
    for title, check in {**sections, "Files": check_files}.items():
        print(f"\n{title}", flush=True)
        check(report, plan, run)
    return report.end()


if __name__ == "__main__":
    distributed.run(lambda known: sys.exit(examine(*known)), get_args_parser().parse_known_args)
