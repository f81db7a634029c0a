"""Meters that never stall the device, progress on the console, log.txt, progress.jsonl and curves."""

import contextlib
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from common import __version__
from common.distributed.exits import Exit, NonFinite, UserError
from common.distributed.process import agree, all_sum, gather, is_main, log, main_does, rank, warnings, world_size
from common.distributed.scalars import Scalars

Batch = TypeVar("Batch")
WINDOW = 20  # steps of the running median, as upstream
FIRST_STEPS = 20  # of a run, which have a line each in progress.jsonl
TOLD_AFTER = 10  # steps of a start, after which it says how long the run takes


@dataclass
class Position:
    """Where a run stands: the epoch to train next, the images of it already seen by all ranks, each rank's meters."""

    epoch: int = 0
    images: int = 0
    meters: list[dict[str, list[float]]] = field(default_factory=list)

    def own_meters(self) -> dict[str, list[float]]:
        """This rank's meters; on another number of processes, rank 0 takes the sums of all."""
        if len(self.meters) == world_size():
            return self.meters[rank()]
        names = self.meters[0] if self.meters and is_main() else ()
        return {name: [sum(m[name][i] for m in self.meters) for i in (0, 1)] for name in names}


def hardware() -> str:
    """The GPUs of all processes, or this machine's CPU: "8 x NVIDIA H100", "AMD EPYC, 2 cores"."""
    if torch.cuda.is_initialized():
        return f"{world_size()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")][0]
    return f"{model}, {os.cpu_count()} cores"


def resident_bytes(peak: bool = False) -> int:
    """Memory of this process now, or its peak (Linux: since it was last reset)."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS counts bytes, and says the peak only; Windows does not say it
        try:
            import resource
        except ImportError:
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: on a GPU of its tensors, on a CPU of everything."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes(peak=True)


def progress_name(log: str) -> str:
    """The progress file beside a log: log.txt -> progress.jsonl, x.log.txt -> x.progress.jsonl."""
    return log.removesuffix("log.txt") + "progress.jsonl"


def duration(seconds: float) -> str:
    """A time span such as 0:05:10, or 2 d 03:15."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24:02}:{minutes:02}" if hours >= 24 else f"{hours}:{minutes:02}:{rest:02}"


def finite(stats: dict[str, Any]) -> dict[str, Any]:
    """The values for JSON, which has no NaN and no infinity: they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in stats.items()}


@dataclass(eq=False)
class RunLog:
    """log.txt (one JSON object per epoch), progress.jsonl and TensorBoard events of a run; rank 0 writes.

    Beside log.txt, run.json has an entry for every start of the run that trained: command, processes, hardware, torch,
    time. progress.jsonl, named like the log, has a JSON object for each of the first 20 steps and then for each report.
    It says what the steps since the line before it did: epoch, step (how many are done, of `steps`), seconds since the
    start of this run, images_per_second of all processes, data (seconds per step that rank 0 waited for images),
    memory (rank 0's peak in bytes), and the means of the meters on rank 0. On a GPU the seconds of single steps are
    the host's, which runs ahead; they are right at reports. A resumed run goes on at the end of the file: its seconds
    begin at 0 again, and a step that the ended run had done but not saved has two lines, of which the later counts.

    Raises:
        UserError: a folder cannot be written.
    """

    folder: str  # of the log; '' writes none
    name: str = "log.txt"
    events: str = ""  # folder of the TensorBoard events, if another
    start: float = 0.0  # where TensorBoard's curves continue; what is there from then on is dropped
    ticks: int = 1000  # units of TensorBoard's horizontal axis per epoch
    keep: int | None = None  # bytes of an existing log to keep; None keeps all
    length: int = 0  # steps of a whole epoch; by default those of its `EpochLog`
    flags: dict[str, Any] = field(default_factory=dict)  # of the run, for run.json
    given: tuple[str, ...] = ()  # those of the command line and of files

    def __post_init__(self) -> None:
        self.writer: Scalars | None = None
        self.path = Path(self.folder) / self.name if self.folder else None
        self._earlier: list[dict[str, Any]] | None = None  # starts before this one
        self._begun, self._clock = time.time(), time.perf_counter()
        self.lines = 0  # of progress.jsonl, by this start
        self.told = False  # the time left of the run, after the first steps of this start
        if self.folder or self.events:
            main_does(self._open)

    def _open(self) -> None:
        with self._written():
            self.writer = Scalars(self.events or self.folder, self.start, self.flags)
            if self.path and self.keep is not None and self.path.exists() and self.path.stat().st_size > self.keep:
                os.truncate(self.path, self.keep)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{error.filename or self.path}: cannot be written ({error.strerror})") from error

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add points to curves, by tag."""
        if self.writer is not None:
            self.writer.write(values, step)

    def epoch(self, stats: dict[str, Any]) -> None:
        """Append one line to log.txt; numbers that JSON cannot hold become null. Collective."""

        def append() -> None:
            if self.path is not None:
                with self._written(), open(self.path, "a") as file:
                    file.write(json.dumps(finite(stats)) + "\n")
            if self.writer is not None:
                self.writer.flush()
            self.record()

        main_does(append)

    def progress(self, now: float, values: dict[str, Any]) -> None:
        """Append one line to progress.jsonl; `now`: by time.perf_counter()."""
        self.lines += 1
        if self.path is None or not is_main():
            return
        line = json.dumps(finite({"seconds": round(now - self._clock, 4), **values}))
        # A full disk ends the run where all ranks learn of it: at its log or checkpoint.
        with contextlib.suppress(OSError), open(self.path.with_name(progress_name(self.path.name)), "a") as file:
            file.write(line + "\n")

    def record(self) -> None:
        """Bring this start's entry in run.json up to date; for rank 0 alone. A damaged file is begun anew."""
        if self.path is None:
            return
        file = self.path.with_name("run.json")
        if self._earlier is None:
            self._earlier = []
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self._earlier = list(json.loads(file.read_text())["starts"])
        start = {
            "row": os.environ.get("ROW_SCRIPT", ""),  # by scripts/lib/row.sh
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "flags": self.flags,
            "given": self.given,
            "warnings": list(dict.fromkeys(warnings)),
            "processes": world_size(),
            "hardware": hardware(),
            "version": __version__,
            "torch": torch.__version__,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._begun)),
            "seconds": round(time.time() - self._begun, 1),
        }
        with self._written():
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"starts": [*self._earlier, start]}, indent=1, default=str) + "\n")
            os.replace(temporary, file)


@dataclass(eq=False)
class EpochLog:
    """The meters and the progress display of one epoch.

    Values stay on the device until the next report: every `print_freq` steps, and every step on a CPU, where reading
    costs nothing. Reports are collective.
    """

    header: str  # such as "Epoch: [3]"
    total: int  # steps of the epoch
    images: int  # per step and process; for the rate those of each batch count
    device: torch.device
    print_freq: int = 20
    run_log: RunLog = field(default_factory=lambda: RunLog(""))
    tags: dict[str, str] = field(default_factory=dict)  # TensorBoard scalars to write per update, {value name: tag}
    epoch: int = 0
    start: int = 0  # step to continue from
    earlier: dict[str, list[float]] = field(default_factory=dict)  # the sums there (`Position`)
    later: int = 0  # steps of the epochs that follow, for the time left of the run

    def __post_init__(self) -> None:
        self._boundaries = [self.start]  # micro-steps done when an update was complete
        self._totals = {k: list(v) for k, v in self.earlier.items()}  # running sum and count by name
        self._pending: list[tuple[int, bool, dict[str, Any]]] = []  # step, whether it completed an update, values
        self._records: list[tuple[int, dict[str, float]]] = []
        self._times: list[tuple[int, float, float, float, int]] = []  # step, begin, wait, end and images of a next line

    def update(self, step: int, updated: bool = True, **values: Tensor | float | None) -> None:
        """Record micro-step `step`; None values count for nothing. `updated`: it completed an optimizer update."""
        present = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items() if v is not None}
        self._pending.append((step, updated, present))
        if updated:
            self._boundaries.append(step + 1)

    def _read(self) -> list[tuple[int, bool, dict[str, float]]]:
        """Read the pending values in one transfer, up to the first non-finite one, into records and totals."""
        pending, self._pending = self._pending, []
        tensors = [v for *_, values in pending for v in values.values() if isinstance(v, Tensor)]
        numbers = iter(torch.stack([t.double() for t in tensors]).tolist() if tensors else [])
        fresh = [
            (step, updated, {k: next(numbers) if isinstance(v, Tensor) else float(v) for k, v in values.items()})
            for step, updated, values in pending
        ]
        for step, _, values in fresh:
            self._records.append((step, values))
            _add(self._totals, values)
        return fresh

    def _flush(self) -> None:
        """Read the pending values, stop on a non-finite one of any rank, write TensorBoard. Collective."""
        fresh = self._read()
        bad = [(s, k.replace("_", " "), v) for s, _, values in fresh for k, v in values.items() if not math.isfinite(v)]
        if fresh and agree(bool(bad))[1]:
            raise NonFinite(*(bad[0] if bad else (fresh[0][0], "loss of another process", math.nan)))
        if self.tags and fresh:
            steps = [(step, values) for step, updated, values in fresh if updated]
            means = iter(all_sum([values[name] for _, values in steps for name in self.tags if name in values]))
            for step, values in steps:
                scalars = {tag: next(means) / world_size() for name, tag in self.tags.items() if name in values}
                ticks = self.run_log.ticks
                self.run_log.scalars(scalars, self.epoch * ticks + step * ticks // (self.run_log.length or self.total))

    def steps(self, batches: Iterable[Batch]) -> Iterator[tuple[int, Batch]]:
        """Number the batches from `start` on and report while they are consumed."""
        terminal = sys.stderr.isatty() and is_main()
        shape = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"
        options = {"disable": not terminal, "dynamic_ncols": True, "leave": False, "bar_format": shape}
        bar = tqdm(total=self.total, initial=self.start, desc=self.header, **options)
        begun = last = time.perf_counter()
        waited, images = 0.0, 0
        for step, batch in enumerate(self._guarded(batches), self.start):
            asked, wait = last, time.perf_counter() - last
            waited += wait
            yield step, batch
            report = (step + 1) % self.print_freq == 0 or step + 1 == self.total
            first = bool(self.later) and not self.run_log.told and step + 1 - self.start == TOLD_AFTER
            if report or first or self.device.type == "cpu":
                self._flush()
            last = time.perf_counter()
            # A last batch (images, targets) may be smaller; of other batches, what is usual counts.
            targets = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
            images += (own := len(targets) if isinstance(targets, Tensor) and targets.ndim else self.images)
            self._times.append((step, asked, wait, last, own))
            if report or self.device.type == "cpu":
                self._write_progress(report)
            if report or terminal:
                done = step + 1 - self.start
                seconds, rate = (last - begun) / done, images * world_size() / (last - begun)
                if (report and not terminal) or step + 1 == self.total:  # on a terminal a line per epoch stays
                    bar.clear()
                    log(self._describe(rate, seconds, waited / done, step))
                bar.set_postfix_str(self._short(rate, seconds, step), refresh=False)
            if first and not terminal:  # whose bar says so all the time
                self.run_log.told = True
                seconds, rate = (last - begun) / TOLD_AFTER, images * world_size() / (last - begun)
                left = duration(seconds * (self.total - step - 1 + self.later))
                log(f"by the first {TOLD_AFTER} steps, {rate:.1f} images/s: {left} left of the run")
            bar.update()
        bar.close()
        self._flush()

    def _guarded(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Read what is pending before an end that all ranks reach together: a non-finite value is named first."""
        try:
            yield from batches
        except Exit:
            self._flush()
            self._write_progress(True)
            raise

    def _write_progress(self, report: bool) -> None:
        """A line of progress.jsonl for each of the run's first steps; at a report, one for all since the last line."""
        while self._times and (report or self.run_log.lines < FIRST_STEPS):
            count = 1 if self.run_log.lines < FIRST_STEPS else len(self._times)
            done, self._times = self._times[:count], self._times[count:]
            (first, begun, *_), (last, _, _, end, _) = done[0], done[-1]
            sums: dict[str, list[float]] = {}
            for step, values in reversed(self._records):
                if step < first:
                    break
                if step <= last:
                    _add(sums, values)
            rate = sum(images for *_, images in done) * world_size() / (end - begun)
            line = {"epoch": self.epoch, "step": last + 1, "steps": self.total, "images_per_second": round(rate, 4)}
            line |= {"data": round(sum(wait for _, _, wait, *_ in done) / count, 6), "memory": peak_memory(self.device)}
            self.run_log.progress(end, line | {name: total / n for name, (total, n) in sums.items()})

    def _describe(self, rate: float, seconds: float, data: float, step: int) -> str:
        """Place, times left of the epoch and of the run where epochs follow, meters, speed and memory."""
        left = self.total - step - 1
        run = f", of the run: {duration(seconds * (left + self.later))}" if self.later else ""
        parts = [f"{self.header}  [{step + 1}/{self.total}]  eta: {duration(seconds * left)}{run}"]
        for name, (total, count) in self._totals.items():
            recent = [values[name] for _, values in self._records[-WINDOW:] if name in values]
            if recent and name == "lr":
                parts.append(f"lr: {recent[-1]:.3g}")
            elif recent:
                parts.append(f"{name}: {statistics.median(recent):.4f} ({total / count:.4f})")
        parts.append(f"{rate:.1f} images/s  time: {seconds:.4f}  data: {data:.4f}")
        return "  ".join([*parts, f"max mem: {peak_memory(self.device) / 2**20:.0f} MB"])

    def _short(self, rate: float, seconds: float, step: int) -> str:
        """What fits beside a bar of 80 columns: the first meter, the speed, and the time left of the run."""
        name, (total, count) = next(iter(self._totals.items()), ("", (0.0, 1)))
        mean = f"{name} {total / count:.4g}, " if name else ""
        left = self.total - step - 1 + self.later
        return f"{mean}{rate:.{0 if rate > 100 else 2}f} images/s, left {duration(seconds * left)}"

    def boundary(self, step: float = math.inf) -> int:
        """The last position at or before `step` (of the epoch) at which an update was complete."""
        return max(b for b in self._boundaries if b <= step)

    def sums(self, before: int) -> dict[str, list[float]]:
        """Sum and count of every value over the steps before `before`, on this rank."""
        self._read()
        totals = {k: list(v) for k, v in self.earlier.items()}
        for step, values in self._records:
            if step < before:
                _add(totals, values)
        return totals

    def position(self, step: int) -> Position:
        """The position after the epoch's first `step` steps. Collective."""
        return Position(self.epoch, step * self.images * world_size(), gather(self.sums(step)))

    def means(self) -> dict[str, float]:
        """Mean of every value over the epoch's steps and all ranks. Collective."""
        totals = all_sum([x for pair in self._totals.values() for x in pair])
        return {name: totals[2 * i] / totals[2 * i + 1] for i, name in enumerate(self._totals)}


def _add(totals: dict[str, list[float]], values: dict[str, float]) -> None:
    for name, value in values.items():
        pair = totals.setdefault(name, [0.0, 0.0])
        pair[0] += value
        pair[1] += 1
