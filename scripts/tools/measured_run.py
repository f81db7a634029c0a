"""A run of a main as it is planned, watched for some seconds of training; what it shows of speed, memory and files.

The real command is started with its files in a temporary folder; what it says of itself is in its output and in
progress.jsonl. When enough was seen it gets SIGTERM, saves and ends.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common import distributed
from common.distributed.metrics import FIRST_STEPS
from common.distributed.process import LAUNCHERS
from scripts.tools.machine import session_bytes, usage

MIN_STEPS = 4  # that are measured, however long they take
POLL = 0.2  # seconds between two looks at a run
GRACE = 20  # seconds that processes have to end when one has failed


# ---- the plan


def batch_size(args: argparse.Namespace) -> int:
    """Images per process and micro-step."""
    return getattr(args, "batch_size", None) or args.batch_size_per_gpu


def accumulated(args: argparse.Namespace) -> int:
    """Micro-steps per update."""
    return getattr(args, "accum_iter", None) or getattr(args, "update_freq", 1)


@dataclass
class Launch:
    """How the run is started."""

    planned: int = 1  # processes of the run
    here: int = 1  # those of them on this machine
    launched: bool = False  # this program is one of them
    env: dict[str, str] = field(default_factory=dict)
    rank: int = 0
    on_gpu: bool = False


@dataclass
class Plan:
    """The run that is planned: its main, flags as words and parsed, processes and folder."""

    own: argparse.Namespace  # flags of the doctor
    script: Path
    words: list[str]
    args: argparse.Namespace
    parser: argparse.ArgumentParser
    folder: str = ""
    launch: Launch = field(default_factory=Launch)

    @property
    def counts_updates(self) -> bool:
        """Whether the run counts updates; the intervals between its evaluations take the place of epochs."""
        return hasattr(self.args, "iters")

    @property
    def epochs(self) -> float:
        """How many there are, the last interval perhaps a shorter one; 0 where only the main knows it."""
        return max(1.0, self.args.iters / self.args.eval_interval) if self.counts_updates else self.args.epochs or 0

    def steps(self, run: "Measurement") -> int:
        """Micro-steps of an epoch; 0 if no step was measured."""
        if not run.lines:
            return 0
        if self.counts_updates:
            return min(self.args.iters, self.args.eval_interval) * accumulated(self.args)
        return max(1, round(run.lines[0]["steps"] * self.launch.here / self.launch.planned))


# ---- the measurement


class Step(NamedTuple):
    """A micro-step, or the mean of those that a line of progress.jsonl is about."""

    seconds: float  # without waiting
    wait: float  # seconds, for images
    updates: float  # of the weights, 0 or 1; of several steps their share
    opens: bool = False  # whether it is the first of an epoch; False in the first epoch


@dataclass
class Measurement:
    """What was seen of a run, and how it ended."""

    status: int = 0
    output: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)  # of progress.jsonl
    images: int = 1  # per step of all processes
    accum: int = 1  # micro-steps per update
    ahead: int = 0  # batches that the loader makes before they are needed
    begun: float = 0.0  # seconds until training began
    computed: float = 1.0  # cores that the first process used while it trained
    host: int = 0  # bytes of a process at its peak
    workers: int = 0  # bytes of its loader processes
    device: tuple[int, int] = (0, 0)  # bytes in use on the GPU, and all of them
    checkpoint: int = 0  # bytes; 0: none was written
    saving: float = 0.0  # seconds
    evaluation: float = 0.0  # seconds; 0: not measured
    problem: str = ""  # last line of an evaluation that failed

    @property
    def is_complete(self) -> bool:
        """Whether it ended by itself, or because it was told to, if only without room for its checkpoint."""
        full = bool(self.lines) and "cannot be written" in self.output
        return full or self.status in (0, 128 + signal.SIGTERM, -signal.SIGTERM)

    @property
    def said(self) -> tuple[int, int, float]:
        """Images, images per update and learning rate, as every main says them; 0 where it does not."""
        text = r"(?:(\d+) (?:\w+ )?images, )?(\d+) per update(?:[^\n]*?, lr ([-+.\de]+))?"
        images, update, rate = (match := re.search(text, self.output)) and match.groups() or (None, None, None)
        return int(images or 0), int(update or 0), float(rate or 0)

    @property
    def resumed(self) -> tuple[str, int, int]:
        """The checkpoint that was continued, its epoch and how many images of it were done; '' and 0 without one."""
        found = re.search(r"resumed (.*): epoch (\d+), (\d+) images", self.output)
        return (found[1], int(found[2]), int(found[3])) if found else ("", 0, 0)

    def steps(self) -> tuple[list[Step], list[float]]:
        """All steps, those of one line alike, and the seconds between epochs."""
        steps, gaps, before = [], [], {"epoch": None, "step": 0}
        for i, line in enumerate(self.lines):
            opens = line["epoch"] != before["epoch"]
            first = 0 if opens else before["step"]
            count = 1 if i < FIRST_STEPS else line["step"] - first
            each = self.images / line["images_per_second"]
            updates = (line["step"] // self.accum - (line["step"] - count) // self.accum) / count
            steps += [Step(each - line["data"], line["data"], updates, opens and i > 0 and count == 1)] * count
            if opens and i:
                gaps.append(line["seconds"] - count * each - before["seconds"])
            before = line
        return steps, gaps

    def warm(self) -> list[Step]:
        """The steps that are like all later ones: the optimizer has its state, the allocator its blocks, and no batches
        are left that were loaded ahead while the run began. On a GPU single steps say nothing, the host runs ahead."""
        return self.steps()[0][max(FIRST_STEPS if self.device[1] else 3, self.ahead + 2) :]

    def is_full(self, seconds: float) -> bool:
        """Whether enough was seen to end the run."""

        def enough(steps: list[Step], least: float) -> bool:
            return len(steps) >= MIN_STEPS and sum(s.seconds + s.wait for s in steps) > least

        return enough(self.warm(), seconds) or enough(self.steps()[0], 4 * seconds)


def start(command: list[str], launch: Launch, out: Path) -> list[subprocess.Popen]:
    """The processes of a run, as torchrun would start them, each at the head of a session; they print into `out`."""
    ranks: list[dict[str, str]] = [{}]
    if launch.here > 1 and not launch.launched:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free.getsockname()[1]}"}
        shared |= {"WORLD_SIZE": f"{launch.here}", "OMP_NUM_THREADS": launch.env.get("OMP_NUM_THREADS", "1")}
        ranks = [{"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", **shared} for rank in range(launch.here)]
    processes = []
    for rank in ranks:
        with open(out, "a") as file:
            options = {"env": launch.env | rank, "stdout": file, "stderr": subprocess.STDOUT}
            processes.append(subprocess.Popen(command, **options, start_new_session=True))
        with contextlib.suppress(OSError):  # where memory runs out, the system is to end these processes and no others
            Path(f"/proc/{processes[-1].pid}/oom_score_adj").write_text("1000")
    return processes


def watch(run: Measurement, processes: list[subprocess.Popen], on_gpu: bool, is_enough: Callable[[], bool]) -> None:
    """Note what processes hold until they end, or until it is enough: then they are told to end."""
    told, failed, looks = False, 0.0, 0
    try:
        while any(process.poll() is None for process in processes) and not (failed and time.time() - failed > GRACE):
            time.sleep(POLL)
            looks += 1
            if not told:  # a process that ends touches libraries that training does not
                run.host = max(run.host, *(usage(process.pid)[0] for process in processes))
            if on_gpu:
                free, total = torch.cuda.mem_get_info()
                run.device = max(run.device[0], total - free), total
            if looks % 20 == 0:  # takes longer
                run.workers = max(run.workers, session_bytes(processes[0].pid))
            if not told and processes[0].poll() is None and is_enough():
                processes[0].send_signal(signal.SIGTERM)  # the other processes learn of it
                told = True
            failed = failed or time.time() * any(process.poll() for process in processes)
        run.status = min((process.returncode for process in processes if process.returncode), default=0)
    finally:  # also of Ctrl-C
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def changed(plan: Plan, accum: int, folder: Path) -> list[str]:
    """Flags that keep a run out of its folders, and with which its updates come soon."""
    args, words = plan.args, ["--output_dir", f"{folder / 'run'}", "--bad_images", "skip"]
    words += ["--log_dir", f"{folder / 'events'}"] if getattr(args, "log_dir", "") else []
    if accumulated(args) > accum:
        words += ["--accum_iter" if hasattr(args, "accum_iter") else "--update_freq", f"{accum}"]
    if 0 < getattr(args, "freeze_last_layer", 0) < args.epochs:
        words += ["--freeze_last_layer", "0"]  # after these epochs the optimizer has the state of all parameters
    return words


def measure(plan: Plan, folder: Path, evaluates: bool = True) -> Measurement:
    """Start the run with its files in `folder`, continuing what it would, and end it when enough of it was seen.

    Args:
        evaluates: the checkpoint that it left, if the main can.
    """
    args, launch, seconds = plan.args, plan.launch, 0.0 if plan.own.no_measure else plan.own.seconds
    # On a CPU updates may take minutes; two micro-steps show what more of them take.
    accum = accumulated(args) if launch.on_gpu else min(2, accumulated(args))
    run = Measurement(images=batch_size(args) * launch.here, accum=accum, ahead=2 * args.num_workers)
    files, out, begun = folder / "run", folder / "output.txt", time.time()
    files.mkdir()
    for checkpoint in Path(plan.folder).glob("*.pth") if plan.folder else ():
        (files / checkpoint.name).symlink_to(checkpoint.resolve())
    seen: list[tuple[float, float]] = []  # the time, and how long the first process has computed by then

    def is_enough() -> bool:
        run.output = out.read_text(errors="replace").replace(f"{files}", plan.folder)
        for progress in files.rglob("*progress.jsonl"):
            with contextlib.suppress(ValueError):  # the last line is being written
                run.lines = [json.loads(line) for line in progress.read_text().splitlines()]
        if not run.lines:
            return not seconds and run.said[1] > 0
        seen.append((time.time(), usage(processes[0].pid)[1]))
        run.begun = run.begun or seen[0][0] - begun - run.lines[-1]["seconds"]
        return run.is_full(seconds)

    command = [sys.executable, f"{plan.script}", *plan.words, *changed(plan, run.accum, folder)]
    processes = start(command, launch, out)
    watch(run, processes, launch.on_gpu, is_enough)
    if len(seen) > 1 and seen[-1][0] - seen[0][0] > 1:
        run.computed = (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])
    is_enough()  # reads the rest
    written = [path for path in files.rglob("*.pth") if not path.is_symlink()]
    if seconds and run.lines and written and run.is_complete:
        newest = max(written, key=lambda path: path.stat().st_mtime)
        chosen = distributed.load(f"{newest}")["args"]  # with the values that the main has chosen itself
        vars(args).update({k: chosen[k] for k, value in vars(args).items() if value is None and k in chosen})
        run.checkpoint = newest.stat().st_size
        # From the last step's line until the file got its name.
        run.saving = newest.stat().st_ctime - max(path.stat().st_mtime for path in files.rglob("*progress.jsonl"))
        flag = next((flag for flag in ("eval", "evaluate") if hasattr(args, flag)), "")
        if flag and evaluates and not launch.rank:
            evaluate(run, [*command, f"--{flag}", "--resume", f"{newest}"], launch, seconds, folder / "evaluation.txt")
    return run


def evaluate(run: Measurement, command: list[str], launch: Launch, seconds: float, out: Path) -> None:
    """Evaluate the checkpoint that a run left, in one process, for its memory and its time."""
    alone = {name: value for name, value in launch.env.items() if not any(name in names for names in LAUNCHERS)}
    test, begun = Measurement(), time.monotonic()
    report = r"Test:\s+\[\d+/(\d+)\].*time: ([.\d]+)"

    def is_enough() -> bool:
        spent = time.monotonic() - begun - run.begun
        return spent > max(60, 4 * seconds) or spent > seconds and bool(re.search(report, out.read_text()))

    watch(test, start(command, replace(launch, here=1, env=alone), out), launch.on_gpu, is_enough)
    test.output = out.read_text(errors="replace")
    run.host, run.workers = max(run.host, test.host), max(run.workers, test.workers)
    run.device = max(run.device, test.device)
    for batches, step in re.findall(report, test.output)[-1:]:
        run.evaluation = int(batches) * float(step) / launch.here
    if not test.is_complete:
        run.problem = (test.output.strip().splitlines() or [f"status {test.status}"])[-1]


# ---- the prediction


@dataclass
class Speed:
    """What steps and epochs take, in seconds."""

    step: float  # a micro-step, in the mean
    low: float  # of the middle 80 % of steps
    high: float
    count: int  # measured steps
    wait: float  # for images, per step
    rest: float  # of an epoch: saving, evaluation, its first images


def speed_of(run: Measurement, accum: int) -> Speed | None:
    """The pace of the run in the long term, with `accum` micro-steps per update; None if nothing was measured."""
    steps, gaps = run.steps()
    warm = run.warm()
    if len(warm) < MIN_STEPS:
        warm = steps[len(steps) // 2 :]
    if not warm:
        return None
    inner = [step for step in warm if not step.opens] or warm
    # The run was measured with more updates than it will have, if it accumulates more micro-steps.
    single = steps[2:FIRST_STEPS]
    kinds = [[step.seconds for step in single if bool(step.updates) == updates] for updates in (True, False)]
    update = statistics.median(kinds[0]) - statistics.median(kinds[1]) if all(kinds) and not run.device[1] else 0.0
    # Other programs disturb some steps: the slowest and fastest tenth is left out. Waiting is uneven, all of it counts.
    each, cut = sorted(step.seconds - update * step.updates for step in inner), len(inner) // 10
    wait = statistics.fmean(step.wait for step in inner)
    added = wait + update / accum
    # Where no epoch ended meanwhile: a run with evaluations saves before and after them.
    rest = statistics.median(gaps) if gaps else run.evaluation + run.saving * (2 if run.evaluation else 1)
    rest += statistics.median([step.wait for step in warm if step.opens] or [0.0])
    middle = each[cut : len(each) - cut]
    return Speed(statistics.fmean(middle) + added, middle[0] + added, middle[-1] + added, len(inner), wait, rest)
