"""Commands of the authors' READMEs: taken apart, and run as a user runs them, at toy size.

A launcher and its processes import torch anew, which takes most of the seconds: only saim/'s first command is run to
the letter in every test run, the other methods' by the tests marked `slow`.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path

from tests.support.processes import launch


def commands_of(readme: str, *stages: str) -> dict[str, str]:
    """Its commands by stage, an empty line between any two; one that ends in a backslash keeps its line end."""
    commands = (re.sub(r"\\$", "\\\\\n", command) for command in readme.strip().split("\n\n"))
    return dict(zip(stages, commands, strict=True))


def flags(command: str) -> list[str]:
    """The words after the script of a shell line."""
    return shlex.split(command.replace("\\\n", " ").split(".py ", 1)[1])


def processes(command: str) -> int:
    """How many processes a launcher's command starts on all nodes."""
    return prod(map(int, re.findall(r"--(?:nproc_per_node|nnodes)[ =](\d+)", command)))


def fill(command: str, paths: Mapping[str, Path]) -> str:
    """The command with 2 processes on one node and its placeholders replaced."""
    command = re.sub(r"(--nproc_per_node[ =])\d+", r"\g<1>2", command)
    command = re.sub(r"(--nnodes )\d+", r"\g<1>1", command)
    for placeholder, path in paths.items():
        command = command.replace(placeholder, shlex.quote(str(path)))
    return command


def start(command: str, cwd: Path) -> subprocess.Popen[str]:
    """A shell line, `python` being this interpreter; the port comes as the launcher's own environment variable."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PET_MASTER_PORT": port}
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", "-c", command], cwd=cwd, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; fails unless it succeeded."""
    try:
        out = process.communicate(timeout=240)[0]
    finally:
        process.kill()
    assert process.returncode == 0, out
    return out


def run(command: str, folder: Path, shell: bool) -> str:
    """What a command of a shell printed inside `folder`; or its script in processes that need no launcher."""
    if shell:
        return finish(start(command, folder))
    say = 'python() { printf \'%q \' "$@"; echo; }; torchrun() { python "$@"; }; export PYTHON=echo; '
    told = finish(start(say + command, folder))
    words = shlex.split(told.splitlines()[-1])
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    number = processes(" ".join(words[:script]))
    local = ["--local-rank=0"] if "torch.distributed.launch" in words else []  # as it adds it
    with tempfile.NamedTemporaryFile() as file:
        log = Path(file.name)
        ends = launch(log, words[script], *local, *words[script + 1 :], processes=number, cwd=folder)
        assert ends == [0] * number, log.read_text()
        return log.read_text()


def uneven_images(digits: str, folder: Path) -> Path:
    """A copy with 19 validation images, which neither 2 processes nor batches of 6 divide."""
    images = Path(shutil.copytree(digits, folder / "images"))
    next(images.glob("val/9/*.png")).unlink()
    return images
