"""The checkpoints of a run: written atomically by rank 0, resumed to the exact step."""

import argparse
import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common import __version__
from common.distributed.exits import Exit, NonFinite, UserError, user_errors
from common.distributed.metrics import EpochLog, Position, RunLog
from common.distributed.process import is_main, log, main_does, world_size
from common.distributed.step import Updater
from common.distributed.weights import WEIGHT_KEYS, Stateful, flags_of, load, load_weights, restore


@dataclass(frozen=True)
class Files:
    """How a method's authors name the files of a run and the keys of its checkpoints; the defaults are MAE's."""

    latest: str = "checkpoint.pth"
    numbered: str = "checkpoint-{epoch}.pth"  # kept, with epochs counted from 0; {done}: from 1
    keep_all: bool = True  # False keeps only the last numbered one
    every: int = 0  # epochs between the numbered ones, the last epoch's comes in any case; 0 keeps none
    phase: int = 0  # epochs e with (e + phase) % every == 0 are kept
    weights: str = "model"  # key of the network's weights
    values: dict[str, Any] | Callable[[Position], dict[str, Any]] = field(default_factory=dict)  # further plain values
    epoch: int = 0  # what the key 'epoch' (or upstream's meta.epoch) holds after the first epoch
    log: str = "log.txt"
    events: str = ""  # TensorBoard's folder, if it is another one than the run's
    # (file's content, model, optimizer) -> None: brings the optimizer's state of another layout into this one's order
    adapt: Callable[[dict[str, Any], Any, torch.optim.Optimizer], None] | None = None

    def variant(self, word: str) -> str:
        """Name of a file beside the latest one, such as checkpoint-previous.pth."""
        return f"{Path(self.latest).stem}-{word}.pth"

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of the names of a run's checkpoints: the latest, the one before it, and the numbered ones."""
        return self.latest, self.variant("previous"), re.sub(r"\{.*?\}", "*", self.numbered)


def find_checkpoint(folder: str, resume: str, latest: str = Files.latest) -> str:
    """The file to continue from: the explicit `resume`, else an existing file `latest` in folder, else ''."""
    own = Path(folder) / latest
    return resume or (str(own) if folder and own.exists() else "")


class Batches(Protocol):
    """What `Checkpoint.epochs` asks of the training batches (`common.datasets.Loader`)."""

    device: torch.device
    batch_size: int

    def __len__(self) -> int: ...
    def start(self, position: Position) -> tuple[int, dict[str, list[float]]]: ...


# Flags that say where, on what and how long a run goes on, not what it learns.
ELSEWHERE = {"data_path", "eval_data_path", "output_dir", "log_dir", "resume", "auto_resume", "start_epoch", "device"}
ELSEWHERE |= {"num_workers", "pin_mem", "world_size", "local_rank", "dist_url", "verbose", "class_names", "config"}
ELSEWHERE |= {"wandb"}
STARTS = ("finetune", "pretrained", "pretrained_weights", "load_checkpoint", "teacher_path", "discrete_vae_weight_path")
STARTS += ("initial_checkpoint",)
ACT = {"weight_decay": "weight_decay", "layer_decay": "lr_scale"}  # if given, these act at a resume, too


DECAYS = ("weight_decay", "weight_decay_end", "layer_decay")
HELD = (*DECAYS, "amp_dtype")  # by a pre-training that continues


def hold_flags(args: argparse.Namespace, path: str, names: tuple[str, ...] = DECAYS) -> None:
    """Let flags that were not given be those of the run that continues from the file at path, '' for none.

    For programs that use these flags before the file is resumed: schedules, parameter groups, precision.
    """
    with contextlib.suppress(UserError):  # of a damaged file, which resuming names
        state = load(path) if path else {}
        was = flags_of(state) if "optimizer" in state else {}
        for flag in names:
            if flag in was and hasattr(args, flag) and flag not in getattr(args, "given", (flag,)):
                setattr(args, flag, was[flag])


def base_rate(optimizer: Any) -> float:
    """The largest learning rate of an optimizer's groups, before any schedule has set them; 0 without groups."""
    groups = getattr(getattr(optimizer, "optimizer", optimizer), "param_groups", [])
    return max((group.get("initial_lr", group["lr"]) for group in groups), default=0.0)


def origin(args: argparse.Namespace, loader: Any, rate: float) -> dict[str, Any]:
    """What a finished run shares with one that may return at once from its folder: images, rate, starting weights."""
    paths = {f"--{name}": getattr(args, name, None) for name in STARTS}
    found = {"images": getattr(loader, "images", None), "lr": f"{rate:.3g}"}
    return found | {flag: os.path.abspath(path) for flag, path in paths.items() if path}


def check_states(optimizer: torch.optim.Optimizer, model: Any) -> None:
    """Compare each state's shape with its parameter's: fused kernels would not notice, and write beyond it.

    Raises:
        ValueError: they differ, as where a file's parameters stand in another order.
    """
    names = {id(p): name for name, p in model.named_parameters()} if isinstance(model, nn.Module) else {}
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state.get(p, {}).items():
            reduced = "row" in key or "col" in key  # Adafactor keeps sums over rows and columns
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != p.shape and not reduced:
                name = names.get(id(p), "a parameter")
                raise ValueError(f"{key} of {name} is {tuple(value.shape)}, expected {tuple(p.shape)}")


class Checkpoint:
    """The checkpoint files of a run: the latest, the one that it replaced, and the numbered ones.

    A file is written under another name, flushed and renamed, so an interrupted write costs nothing.
    Args:
        args: the run's flags, stored as a dict.
        parts: further objects with state_dict(), by the key under which upstream stores them (optimizer, ...).
    """

    def __init__(
        self, folder: str, args: argparse.Namespace, model: Stateful, files: Files | None = None, **parts: Stateful
    ):
        self.folder = Path(folder)
        self.log_folder = folder  # '' writes no log
        self.args = args
        self.model = model
        self.files = files or Files()
        self.parts = parts
        self._rate = base_rate(parts.get("optimizer"))
        self.missing: list[str] = []  # parts that the resumed file did not hold
        self.best = 0.0  # best accuracy so far, kept over a resume
        self._log_bytes: int | None = None  # of the log, when the resumed file was written
        self._origin: dict[str, Any] = {}  # as `origin`, of the run that was found in the folder, then of this one
        self.writes = bool(folder)
        if not folder:
            log("WARNING: --output_dir is empty: neither checkpoints nor logs are written")
        if folder:
            main_does(self._open)

    def _open(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / f".{self.files.latest}.lock", "w")  # noqa: SIM115 - held while this exists
        except OSError as error:
            raise UserError(f"--output_dir {self.folder}: cannot be written ({error.strerror})") from error
        with contextlib.suppress(ImportError, OSError):  # systems and disks without locks
            import fcntl

            try:  # ends with the process, and its children do not inherit it
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise UserError(f"{self.folder / self.files.latest}: another run is writing it") from error

    def save(self, position: Position, name: str = "") -> None:
        """Write the run's state as the latest file, or under another name; nothing without a folder.

        Where an epoch begins it is also kept under its number, if that is due. Collective; rank 0 writes.
        Raises:
            UserError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        if self.writes:
            main_does(lambda: self._write(position, name))

    def _write(self, position: Position, name: str) -> None:
        files, done = self.files, position.epoch
        parts = {key: part.state_dict() for key, part in self.parts.items()}
        state: dict[str, Any] = {key: own for key, own in parts.items() if own}  # an enabled GradScaler refuses {}
        state |= {files.weights: self.model.state_dict(), "epoch": done - 1 + files.epoch, "args": vars(self.args)}
        state |= {"version": __version__, "origin": self._origin, "best": self.best}
        state |= {"images": position.images, "meters": position.meters}
        state |= files.values(position) if callable(files.values) else files.values
        log_file = self.folder / files.log
        state["log_bytes"] = log_file.stat().st_size if log_file.exists() else 0
        names = [name or files.latest]
        due = files.every and ((done - 1 + files.phase) % files.every == 0 or done == self.args.epochs)
        if due and done and not name and not position.images:
            names.append(files.numbered.format(epoch=done - 1, done=done))
        for target in (self.folder / n for n in names):
            temporary = target.with_suffix(".tmp")
            try:
                with open(temporary, "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                if target.name == files.latest:
                    self._keep_previous(target)
                os.replace(temporary, target)
            except (OSError, RuntimeError) as error:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                disk = next((e for e in (error, error.__context__) if isinstance(e, OSError)), None)  # torch hides it
                why = disk.strerror if disk else str(error).splitlines()[0]
                raise UserError(f"{target}: cannot be written ({why}); earlier checkpoints are intact") from error
        if len(names) > 1 and not files.keep_all:
            for path in self.folder.glob(files.patterns[-1]):
                if path.name not in names:
                    path.unlink()

    def _keep_previous(self, target: Path) -> None:
        """Give the file that is about to be replaced a second name; without hard links nothing is kept."""
        link = self.folder / "previous.tmp"
        with contextlib.suppress(OSError):
            link.unlink(missing_ok=True)
            os.link(target, link)
            os.replace(link, self.folder / self.files.variant("previous"))

    @contextlib.contextmanager
    def on_exit(self, epoch_log: EpochLog, updater: Updater | None = None) -> Iterator[None]:
        """Save the position inside an epoch when an `Exit` ends it; resuming redoes nothing but the last update.

        updater: its buffers are put back to the last update; later steps, such as a non-finite one, leave no trace.
        """
        try:
            yield
        except Exit as end:
            bad = isinstance(end, NonFinite)
            step = epoch_log.boundary(end.step if bad else math.inf)
            if isinstance(end, UserError) and not (epoch_log.epoch or step):
                raise  # nothing was trained: the corrected command is to begin in this folder
            name = self.files.variant("nonfinite") if bad else ""
            if updater is not None:
                updater.restore()
            self.save(epoch_log.position(step), name)
            if is_main():
                epoch_log.run_log.record()
            if self.writes:
                path = self.folder / (name or self.files.latest)
                log(f"saved epoch {epoch_log.epoch}, step {step} as {path}; --resume continues from this step")
            raise

    def resume(self, path: str, start_epoch: int = 0) -> Position:
        """Restore model and parts from a file of ours or of upstream; an empty path starts anew at start_epoch.

        Raises:
            UserError: the file is damaged or does not fit the model.
        """
        if not path:
            return Position(start_epoch)
        optimizer = self.parts.get("optimizer")
        keys = tuple(dict.fromkeys((self.files.weights, *WEIGHT_KEYS)))
        is_here = Path(path).resolve().parent == self.folder.resolve()
        state = load_weights(self.model, path, keys, self.files.patterns if is_here else ())
        epoch = state.get("epoch", state["meta"].get("epoch") if isinstance(state.get("meta"), dict) else None)
        complete = "optimizer" in state and isinstance(epoch, int)
        settings = set(getattr(optimizer, "defaults", ()))  # before loading, which adds some
        acting = {flag: key for flag, key in ACT.items() if flag in getattr(self.args, "given", ())}
        if complete and isinstance(optimizer, torch.optim.Optimizer):  # the implementation is this run's choice
            for group, own in zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=False):
                keys = ("foreach", "fused", "capturable", *acting.values())
                group |= {key: own[key] for key in keys if key in own}
            if self.files.adapt is not None:
                with user_errors(f"{path}: 'optimizer' does not fit this run"):
                    self.files.adapt(state, self.model, optimizer)
        for key, part in self.parts.items():
            if complete and state.get(key):  # a scaler that was off has no state, in earlier files an empty one
                restore(part, state[key], path, key)
            else:
                self.missing.append(key)
        if complete and isinstance(optimizer, torch.optim.Optimizer):
            with user_errors(f"{path}: 'optimizer' does not fit this run"):
                check_states(optimizer, self.model)
            lost = settings.difference(*optimizer.param_groups)
            if lost:
                raise UserError(f"{path}: 'optimizer' does not fit this run: it lacks {', '.join(sorted(lost))}")
        if not complete or epoch is None:
            log(f"resumed weights only from {path}")
            return Position(start_epoch)
        names, kept = getattr(self.args, "class_names", None), flags_of(state).get("class_names")
        if names and kept and names != kept:
            odd = next(iter(set(names) ^ set(kept)), "their order")
            raise UserError(f"{path}: its classes are not this run's, first {odd}; start in another --output_dir")
        self.best = state.get("best", 0.0)
        was, now = flags_of(state), vars(self.args)
        compared = [k for k in now if k in was and k not in ELSEWHERE and (k not in ACT or k in acting)]
        changed = [f"{k} {now[k]} (was {was[k]})" for k in compared if was[k] != now[k]]
        if changed:
            log(f"flags that differ from the resumed run's: {', '.join(changed)}")
        if is_here and "initial_sha256" in was:  # of weights that acted when this run began
            self.args.initial_sha256 = was["initial_sha256"]
        if is_here and not getattr(self.args, "resume", ""):
            self._origin = state.get("origin", {})
        if is_here:
            self._log_bytes = state.get("log_bytes")
        done = epoch + 1 - self.files.epoch
        position = Position(done, state.get("images", 0), state.get("meters", []))
        log(f"resumed {path}: epoch {position.epoch}, {position.images} images of it done, {world_size()} processes")
        return position

    def epochs(
        self,
        loader: Batches,
        position: Position,
        tags: dict[str, str],
        header: str = "Epoch: [{epoch}]",
        print_freq: int = 20,
        ticks: int = 0,
        total: int = 0,
    ) -> Iterator[tuple[int, EpochLog]]:
        """The epochs from a position to the last one, and the log of each.

        Args:
            tags: TensorBoard scalars to write per update, {value name: tag}.
            header: of progress lines, with {epoch} counted from 0 or {done} from 1.
            ticks: units of TensorBoard's horizontal axis per epoch, default one per step.
            total: steps of the run, where they are less than all epochs': the last one is then shorter.
        """
        updates = len(loader) // getattr(self.args, "accum_iter", 1)
        warmups = {  # the length of the run in the same unit, the flag that says it, what a warm-up of that length does
            "warmup_epochs": (self.args.epochs, "epochs", "only rises"),
            "warmup_steps": (self.args.epochs * updates, "epochs", "only rises"),
            "warmup_iters": (getattr(self.args, "iters", math.inf), "iters", "stays low"),
        }
        for name, (most, flag, course) in warmups.items():
            if (warmup := getattr(self.args, name, 0)) >= most:
                log(f"WARNING: --{name} {warmup} of --{flag} {getattr(self.args, flag)}: the learning rate {course}")
        own = origin(self.args, loader, self._rate)
        was = self._origin or own
        odd = [f"{k} {own.get(k)} (was {was.get(k)})" for k in {**was, **own} if own.get(k) != was.get(k)]
        if odd and position.epoch >= self.args.epochs:
            found = f"--output_dir {self.folder}: holds a finished run of other {', '.join(odd)}"
            raise UserError(f"{found}; name another --output_dir, or give more --epochs")
        self._origin = own
        start, sums = loader.start(position)
        files, length = self.files, len(loader)
        ticks, total = ticks or length, total or self.args.epochs * length
        first = (position.epoch + start / length) * ticks  # what the resumed run wrote later is cut off
        given = tuple(sorted(getattr(self.args, "given", ())))
        options = first, ticks, self._log_bytes, length, vars(self.args), given
        run_log = RunLog(self.log_folder, files.log, files.events, *options)
        left = getattr(loader, "left_out", 0)
        log(
            f"{self.args.epochs} epochs of {length} steps{f', {left} images of each fill no batch' * (left > 0)}; "
            f"results go to {self.log_folder or 'no folder'}"
        )
        for epoch in range(position.epoch, self.args.epochs):
            title, images = header.format(epoch=epoch, done=epoch + 1), loader.batch_size
            steps = min(length, total - epoch * length)
            place = epoch, start, sums, total - epoch * length - steps
            yield epoch, EpochLog(title, steps, images, loader.device, print_freq, run_log, tags, *place)
            start, sums = 0, {}
        if self.writes and is_main():
            (self.folder / f".{files.latest}.lock").unlink(missing_ok=True)
