"""Fixtures: the digits data set, and scripts run as a user runs them."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.support.helpers import unregistered_files

ROOT = Path(__file__).resolve().parents[1]
os.fsync = lambda fd: None  # only a power failure would notice, and it takes a seventh of the time of saving tests
torch.set_num_threads(1)  # tiny networks wait longer for a second thread than they compute


def pytest_sessionstart(session) -> None:
    """A golden file that matches no kind ends the run before it begins."""
    unknown = unregistered_files() if not hasattr(session.config, "workerinput") else []
    if unknown:
        raise pytest.UsageError(f"no test runs {', '.join(unknown)}: tests/golden/README.md lists the kinds of files")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> str:
    """48 training and 20 validation images of handwritten digits as an ImageFolder."""
    root = tmp_path_factory.mktemp("digits")
    data: Any = load_digits()
    for split, first, last in (("train", 0, 48), ("val", 48, 68)):
        for i in range(first, last):
            # Classes are dealt in turn, so that both splits show all ten.
            folder = root / split / str(i % 10)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(data.images[i] * 255 / 16)).save(folder / f"{i:04d}.png")
    return str(root)


def _run(command: list[str], status: int | None = 0, cwd: Path = ROOT, timeout: float = 300, **env: str):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert status is None or done.returncode == status, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def run_script():
    """Run `python <script> <flags>` from the repository root and check its exit status."""
    return lambda script, *flags, **kwargs: _run([sys.executable, script, *flags], **kwargs)


@pytest.fixture(scope="session")
def launch():
    """Run `python -m torch.distributed.launch --nproc_per_node <n> <script> <flags>`."""

    def call(processes: int, script: str, *flags: str, **kwargs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher = ["-m", "torch.distributed.launch", "--nproc_per_node", str(processes), "--master_port", port]
        return _run([sys.executable, *launcher, script, *flags], **kwargs)

    return call
