"""Scripts in real processes that are forked from one in which their imports are done: a start takes no seconds."""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

from tests.support.helpers import ROOT

CONTEXT = multiprocessing.get_context("forkserver")
MAINS = {
    "saim": ("pretrain", "finetune", "linprobe"),
    "semaim": ("pretrain", "finetune", "linprobe", "knn"),
    "cae": ("pretrain", "finetune", "attentive", "linprobe", "segmentation"),
    "a2mim": ("pretrain", "finetune", "linprobe", "interactions", "fourier", "segmentation", "detection"),
    "udi": ("pretrain", "finetune", "linprobe", "knn", "segmentation", "detection", "video_segmentation"),
}
PRELOAD = [f"{method}.main_{name}" for method, names in MAINS.items() for name in names]
PRELOAD += ["saim.visualize_attention", "saim.visualize_prediction", "scripts.tools.knn"]
CONTEXT.set_forkserver_preload([*PRELOAD, __name__])
QUIET = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run_script(argv: list[str], log: str, env: dict[str, str], cwd: str = str(ROOT)) -> None:
    """`cd cwd && python argv...`"""
    import torch

    with open(log, "ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process that nobody forked
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # ends loader workers; processes of multiprocessing leave it out


def _lead(*args) -> None:
    os.setsid()
    run_script(*args)


def begin(log: Path, *argv: str, **env: str) -> Any:
    """A script's process that has begun, in a process group of its own, which can be killed with its workers."""
    log.touch()
    process = CONTEXT.Process(target=_lead, args=(list(argv), str(log), env | QUIET, str(ROOT)))
    process.start()
    return process


def launch(log: Path, *argv: str, processes: int = 1, cwd: Path = ROOT, **env: str) -> list[int]:
    """Exit statuses of a script's processes; negative: the signal that ended one. They print into `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env |= QUIET
    ranks = [env] if processes == 1 else []
    for rank in range(processes if processes > 1 else 0):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        ranks.append(env | own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    started = [CONTEXT.Process(target=run_script, args=(list(argv), str(log), own, str(cwd))) for own in ranks]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=120)
    late = [process for process in started if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    assert not late, log.read_text()
    return [process.exitcode or 0 for process in started]
