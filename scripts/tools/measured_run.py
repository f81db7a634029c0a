"""The first steps of a run, written down for doctor.py.

The doctor starts it with the words ORDER MAIN [flags of MAIN].

MAIN runs as it is, with its flags. But its checkpoints and logs go to a folder of the measurement, unreadable images
are skipped, and once enough steps were measured its epoch ends, as if the images had: what it does then is measured,
too.
ORDER: JSON of `Order`. Events go to <folder>/events-<rank>.jsonl, one JSON object a line.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from common import datasets, distributed

clock = time.perf_counter  # on Linux and macOS one clock of all processes
MIN_STEPS = 4  # that are measured, however long they take
MIN_EVALUATION = 4  # batches of an evaluation that are measured
FEW_UPDATES = 64  # runs of fewer updates keep their --accum_iter: their schedules have no entries beyond


@dataclasses.dataclass
class Order:
    folder: str
    seconds: float = 30.0  # of training that are measured, after warming up; 0 ends the run before its first step


class Measured(BaseException):
    """Ends the run: everything is measured."""


def resident_bytes(peak: bool = False) -> int:
    """Memory of this process now, or its peak (Linux: since it was last reset)."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS tells bytes, and the peak only
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def workers_bytes() -> int:
    """Memory of the loader's processes; what they share with others counts in part."""
    total = 0
    for worker in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


class Recorder:
    """What is known about the run so far; collective where the run is."""

    def __init__(self, order: Order):
        self.order = order
        self.file: Any = None
        self.updater: Any = None
        self.train: Any = None  # the training loader
        self.epochs = 0  # of the run as it was asked for
        self.alone: float | None = None  # images/s of the loader without training
        self.steps = self.updates = 0
        self.warm: tuple[float, int, int] | None = None  # time, steps and updates when warming up was over
        self.begun = self.worked = 0.0
        self.ended = False
        self.device_events: list[Any] = []

    def write(self, event: str, **values: Any) -> None:
        if self.file is None:
            self.file = open(Path(self.order.folder) / f"events-{distributed.rank()}.jsonl", "a")  # noqa: SIM115
        values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
        told = {"event": event, "time": clock(), "cpu": time.process_time(), **values}
        self.file.write(json.dumps(told) + "\n")
        self.file.flush()

    # ---- what the run is

    def loader(self, loader: datasets.Loader, dataset: Any) -> None:
        """A loader was made."""
        name = "train" if loader.train else "val"
        if loader.train:
            self.train = loader
        samples = getattr(dataset, "samples", None)
        classes = getattr(dataset, "classes", None)
        if samples and distributed.is_main():
            with open(Path(self.order.folder) / f"{name}.txt", "w") as file:
                file.writelines(f"{target}\t{path}\n" for path, target in samples)
        self.write(
            "loader",
            name=name,
            images=loader.images,
            steps=len(loader),
            batch_size=loader.batch_size,
            num_workers=loader.loader.num_workers,
            drop_last=loader.drop_last,
            accum_iter=loader.accum_iter,
            classes=len(classes) if classes else 0,
            root=str(getattr(dataset, "root", "")),
            kind=type(dataset).__name__,
            device=str(loader.device),
        )

    def start(self, args: Any, epoch: int) -> None:
        """Everything is made, the loop over epochs is next."""
        plain = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str | bool | None)}
        self.epochs = args.epochs
        self.write("start", args=plain, epochs=args.epochs, world_size=distributed.world_size())
        if epoch >= args.epochs or not self.order.seconds:
            raise Measured
        args.epochs += 1_000_000  # a short run goes on until enough is measured; `clamp` keeps its schedules
        args.output_dir = str(Path(self.order.folder) / "run")  # pictures
        if "udi.files" in sys.modules:
            sys.modules["udi.files"].TextLog.write = lambda self, line: distributed.log(line)

    def clamp(self, epoch: int) -> int:
        """The epoch that schedules are asked for."""
        return min(epoch, self.epochs - 1) if self.epochs else epoch

    # ---- what it does

    def mark(self) -> float:
        """Now; on a GPU also a mark between its kernels, for `finish`."""
        if self.train is not None and self.train.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.device_events.append(event)
        return clock()

    def memory(self) -> dict[str, int]:
        """Peaks of this process, in bytes."""
        peaks = {"host": resident_bytes(peak=True)}
        if self.train is not None and self.train.device.type == "cuda":
            device = self.train.device
            peaks["allocated"] = torch.cuda.max_memory_allocated(device)
            peaks["reserved"] = torch.cuda.max_memory_reserved(device)
            free, total = torch.cuda.mem_get_info(device)
            peaks["in_use"], peaks["total"] = total - free, total
        return peaks

    def loader_alone(self, loader: datasets.Loader) -> float:
        """Images/s of this process's loader when nothing is trained; in an order of images that training does not
        begin with, so that it does not find them in memory."""
        source, workers = loader.loader, max(1, loader.loader.num_workers)
        limit = min(20.0, self.order.seconds)
        begun, times, images, epoch = clock(), [], [], 10**6
        while True:
            loader.sampler.epoch, loader.sampler.first = epoch, 0
            for _, targets, _ in source:
                times.append(clock())
                images.append(len(targets))
                if len(times) >= 5 * workers and times[-1] - begun > limit / 4 or times[-1] - begun > limit:
                    if len(times) >= 2 * workers:  # the first wave includes the workers' start
                        return sum(images[workers:]) / max(1e-9, times[-1] - times[workers - 1])
                    return sum(images) / max(1e-9, times[-1] - begun)
            epoch += 1

    def is_warm(self, loader: datasets.Loader, now: float) -> bool:
        """Whether the steps from here on are like all later ones: the optimizer has its state, the allocator its
        blocks, and no batches are left that were loaded ahead while the run began."""
        if self.steps < 3 or self.updates < 2:
            return now - self.worked > 4 * self.order.seconds and self.steps >= 2
        ahead = 2 * loader.loader.num_workers  # batches
        if self.steps >= ahead + 2 or not self.alone:
            return True
        images = ahead * loader.batch_size
        faster = self.alone > 1.5 * self.steps * loader.batch_size / (now - self.worked)
        return faster and now - self.begun > 3 * images / self.alone

    def is_full(self, loader: datasets.Loader) -> bool:
        """Whether enough steps were measured. Collective, after each step."""
        now, full = clock(), False
        if self.steps == 1:
            self.accumulate_less(loader, now - self.begun)
        if self.warm is None:
            if self.is_warm(loader, now):
                self.warm = now, self.steps, self.updates
        else:
            since, steps, updates = self.warm
            seconds, steps, updates = now - since, self.steps - steps, self.updates - updates
            full = seconds > self.order.seconds and steps >= MIN_STEPS and updates >= 2
            full = full or (seconds > 4 * self.order.seconds and steps >= 2)
        return distributed.agree(full)[1]

    def accumulate_less(self, loader: datasets.Loader, step: float) -> None:
        """Two micro-steps per update have all that many have: where updates are slow, measure those."""
        if self.updater is None:
            return
        accum = self.updater.accum_iter
        enough = self.epochs * (len(loader) // accum) >= FEW_UPDATES
        slow = 4 * accum * step > self.order.seconds
        if distributed.agree(accum > 2 and enough and slow)[1]:
            loader.accum_iter = self.updater.accum_iter = 2

    def finish(self) -> None:
        """Write what only the end tells. Collective."""
        if self.device_events:
            torch.cuda.synchronize()
            first = self.device_events[0]
            self.write("device", seconds=[first.elapsed_time(event) / 1e3 for event in self.device_events])
        self.write("memory", ranks=distributed.gather(self.memory()), workers=workers_bytes())
        self.write("done", bad=self.train.bad if self.train is not None else [])


def hook(recorder: Recorder) -> None:
    """Let the run tell the recorder what it does."""
    loader_init, batches = datasets.Loader.__init__, datasets.Loader.batches
    checkpoint = distributed.Checkpoint
    checkpoint_init, write, resume, run_log = (
        checkpoint.__init__,
        checkpoint._write,
        checkpoint.resume,
        checkpoint.run_log,
    )
    log_init, updater_init, run = distributed.EpochLog.__init__, distributed.Updater.__init__, distributed.run
    folder = Path(recorder.order.folder)

    def make_loader(self, dataset, *args, **kwargs):
        loader_init(self, dataset, *args, **kwargs)
        recorder.loader(self, dataset)

    def make_updater(self, *args, **kwargs):
        updater_init(self, *args, **kwargs)
        recorder.updater = self

    def make_log(self, *args, **kwargs):
        log_init(self, *args, **kwargs)
        self.epoch = recorder.clamp(self.epoch)

    def make_checkpoint(self, into, args, model, files=None, **parts):
        files = files or distributed.Files()
        names = ("latest", "numbered", "keep_all", "every", "phase", "log")
        recorder.write("files", folder=into, **{name: getattr(files, name) for name in names})
        events = str(folder / "events") if files.events else ""
        files = dataclasses.replace(files, events=events)
        checkpoint_init(self, str(folder / "run") if into else "", args, model, files, **parts)

    def write_checkpoint(self, *args):
        inodes = {path.stat().st_ino for path in self.folder.iterdir()}
        begun = clock()
        try:
            write(self, *args)
        except distributed.UserError as error:
            recorder.write("save", seconds=clock() - begun, error=str(error))
            return
        new = [p.stat() for p in self.folder.glob("*.pth*") if p.stat().st_ino not in inodes]
        recorder.write("save", seconds=clock() - begun, files=len(new), bytes=max((s.st_size for s in new), default=0))

    def restore(self, path, *args):
        position = resume(self, path, *args)
        recorder.write("resume", path=path, epoch=position.epoch, images=position.images)
        return position

    def open_log(self, epoch, *args, **kwargs):
        logs = run_log(self, epoch, *args, **kwargs)
        recorder.start(self.args, epoch)
        return logs

    def train(self, epoch, start):
        recorder.write("begin", epoch=epoch)
        if recorder.ended:
            raise Measured
        if recorder.alone is None and self.sampler is not None:
            recorder.alone = recorder.loader_alone(self)
            recorder.write("alone", images_per_second=recorder.alone)
        inner: Any = batches(self, epoch, start)
        recorder.begun = clock()
        recorder.worked = recorder.worked or recorder.begun
        step = start
        while True:
            asked = recorder.mark()
            batch = None if recorder.ended else next(inner, None)
            got = clock()
            if not recorder.steps and batch is not None:
                tensors = [x for x in tree_leaves(batch) if isinstance(x, Tensor)]
                recorder.write("batch", bytes=sum(x.numel() * x.element_size() for x in tensors))
            last = recorder.updater is None or recorder.updater.is_last(step)
            warm = recorder.warm is not None
            recorder.write("ask", asked=asked, got=got, more=batch is not None, last=last, warm=warm)
            if batch is None:
                inner.close()
                return
            yield batch
            step += 1
            recorder.steps += 1
            recorder.updates += last
            if recorder.is_full(self):
                recorder.write("full", workers=workers_bytes())
                recorder.ended = True

    def evaluate(self):
        limit = max(MIN_EVALUATION, recorder.steps // 2)
        recorder.write("evaluation", batches=len(self), batch_size=self.batch_size)
        for done, batch in enumerate(batches(self)):
            recorder.write("evaluated", done=done)
            if done == limit:  # all ranks see equally many, or an incomplete batch less
                break
            yield batch
        recorder.write("evaluated", done=None)

    def any_batches(self, epoch=0, start=0):
        return train(self, epoch, start) if self.train else evaluate(self)

    def prepared(args):
        args = args() if callable(args) else args
        if hasattr(args, "bad_images"):
            args.bad_images = "skip"
        if 0 < getattr(args, "freeze_last_layer", 0) < args.epochs:
            args.freeze_last_layer = 0  # from that epoch on the optimizer has state of all parameters
        return args

    def run_main(main, args):
        run(main, lambda: prepared(args))

    for owner, name, method in (
        (datasets.Loader, "__init__", make_loader),
        (datasets.Loader, "batches", any_batches),
        (checkpoint, "__init__", make_checkpoint),
        (checkpoint, "_write", write_checkpoint),
        (checkpoint, "resume", restore),
        (checkpoint, "run_log", open_log),
        (distributed.EpochLog, "__init__", make_log),
        (distributed.Updater, "__init__", make_updater),
        (distributed, "run", run_main),
    ):
        setattr(owner, name, method)


def main() -> None:
    order, script = Order(**json.loads(sys.argv[1])), sys.argv[2]
    with contextlib.suppress(OSError):  # where memory runs out, the system is to end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    recorder = Recorder(order)
    hook(recorder)
    sys.argv = sys.argv[2:]
    with contextlib.suppress(Measured):
        runpy.run_path(script, run_name="__main__")
    recorder.finish()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
