"""Running training loops on fixed batches, mains in this process, and scripts in processes of their own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from common import distributed, lr_sched
from common.datasets import Loader
from scripts.tools import flags
from tests.support.helpers import ROOT

CPU = torch.device("cpu")
FAULTS = ROOT / "tests" / "support" / "faults.py"


# ---- training loops


class FixedLoader(Loader):
    """The same batches every epoch."""

    def __init__(self, *batches):  # nothing of a real loader
        self.data = list(zip(*batches, strict=True))
        self.batch_size = len(batches[0][0])
        self.device, self.accum_iter, self.sampler = CPU, 1, ()

    def __len__(self):
        return len(self.data)

    def batches(self, epoch=0, start=0):
        return iter(self.data[start:])


def number(value) -> float:
    return float("nan") if value is None else value.item() if isinstance(value, Tensor) else value


class RecordingLog(distributed.EpochLog):
    """Keeps every recorded value in `history`."""

    def __init__(self, history: list, epoch: int, steps: int):
        super().__init__(f"Epoch: [{epoch}]", steps, images=1, device=CPU, epoch=epoch)
        self.history = history

    def update(self, step, updated=True, **values):
        self.history.append({k: number(v) for k, v in values.items()})
        super().update(step, updated, **values)


def schedule_of(meta):
    return lambda e: lr_sched.warmup_cosine(e, meta["lr"], meta["min_lr"], meta["warmup_epochs"], meta["epochs"])


# ---- mains in this process


@contextlib.contextmanager
def kept_signals() -> Iterator[None]:
    """Put back the signal handlers that a main replaces."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def arguments(module: ModuleType, *words: str) -> Any:
    """The parsed command line of a script."""
    return flags.arguments(module, list(words))


def run_main(module: ModuleType, *words: str) -> None:
    """Call the main of a script as its command line would."""
    with kept_signals():
        distributed.run(module.main, lambda: arguments(module, *words))


def mistake(module: ModuleType, *flags: str, capsys: Any) -> str:
    """The one line on stderr with which a main ends because of its flags; the exit status must be 2."""
    with pytest.raises(SystemExit) as end:
        run_main(module, *flags)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1, error
    return error


def spoil(monkeypatch: Any, network: type, when: int, stop: bool) -> None:
    """Before the training output number `when` is computed a signal arrives, or that output is NaN."""
    plain, calls = network.forward, []  # type: ignore[attr-defined]

    def forward(self, *args, **kwargs):
        now = self.training and len(calls) == when
        calls.extend([None] * self.training)
        if now and stop:
            os.kill(os.getpid(), signal.SIGTERM)
        out = plain(self, *args, **kwargs)
        if not now or stop:
            return out
        if isinstance(out, dict):
            return {**out, "loss": out["loss"] * float("nan")}
        if isinstance(out, list):
            return [out[0] * float("nan"), *out[1:]]
        if not isinstance(out, tuple):
            return out * float("nan")
        return getattr(out, "_make", tuple)((out[0] * float("nan"), *out[1:]))  # a named tuple stays one

    monkeypatch.setattr(network, "forward", forward)
    monkeypatch.setattr("common.distributed.exits._received", [])


# ---- scripts in processes of their own


def command(processes: int, script: str, *flags: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), script, *flags]


def start(argv: list[str], log: Path, **env: str) -> subprocess.Popen:
    """A run in a process group of its own, its output in `log`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    with open(log, "w") as out:
        return subprocess.Popen(argv, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(process: Any, log: Path, text: str, timeout: float = 120) -> None:
    """Wait until a process, of subprocess or of multiprocessing, has printed a text into its log."""
    end = time.monotonic() + timeout
    while text not in log.read_text():
        assert (process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def finish(argv: list[str], log: Path) -> None:
    process = start(argv, log)
    assert process.wait(timeout=240) == 0, log.read_text()


def assert_same(a: Path, b: Path, latest: str = "checkpoint.pth", log: str = "log.txt") -> None:
    """Bit-identical states of everything in the latest checkpoints but the flags, and equal logs."""
    first, second = distributed.load(str(a / latest)), distributed.load(str(b / latest))
    assert list(first) == list(second)
    for key in [k for k in first if k != "args"]:
        flat = [tree_flatten(state[key])[0] for state in (first, second)]
        assert len(flat[0]) == len(flat[1])
        for x, y in zip(*flat, strict=True):
            assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, key
    assert (a / log).read_text() == (b / log).read_text()
