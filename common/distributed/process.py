"""The process group and its ranks, what all ranks agree on, and a model on all of them."""

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from common.distributed.exits import UserError, stop_signal


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


warnings: list[str] = []  # that this run has printed, for run.json


def log(*words) -> None:
    """Print a time-stamped line on rank 0; one that begins with WARNING is kept, too."""
    text = " ".join(map(str, words))
    if text.startswith("WARNING: "):
        warnings.append(text.removeprefix("WARNING: "))
    if is_main():
        print(time.strftime("[%H:%M:%S]"), text, flush=True)


@contextlib.contextmanager
def on_main_first() -> Iterator[None]:
    """Let rank 0 go first (a download, say), then the others."""
    if not is_main():
        dist.barrier()
    try:
        yield
    finally:
        if is_main() and world_size() > 1:
            dist.barrier()


def main_does(action: Callable[[], None]) -> None:
    """Call action on rank 0; a UserError there ends the other ranks, too. Collective."""
    error = None
    if is_main():
        try:
            action()
        except UserError as problem:
            error = problem
    if agree(error is not None)[1]:
        raise error or UserError("process 0 could not go on")


# Rank, world size and local rank as set by torchrun and torch.distributed.launch, OpenMPI (--dist_on_itp) and SLURM,
# whose SLURM_NTASKS is the whole job's: a shell or step with fewer tasks sets SLURM_STEP_NUM_TASKS, too.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


MOST = 10**6  # processes of a job
ALONE = "(a single one is started by RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 python ...)"


def _number(name: str, low: int, high: int) -> int:
    """A whole number of the environment, which a launcher or the user has set."""
    text = os.environ[name].strip()
    if not text.isdecimal() or not low <= int(text) <= high:
        raise UserError(f"{name}={text}: expected a whole number, {low} to {high}")
    return int(text)


def _first_node() -> str:
    """The address of the first node of a SLURM job; this machine without one."""
    nodes = os.environ.get("SLURM_JOB_NODELIST", "localhost")
    names = nodes
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        names = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True)
    first = names.split()[0] if names.split() else ""
    if not first or "[" in first:
        raise UserError(f"SLURM_JOB_NODELIST={nodes}: its first node is not known; set MASTER_ADDR to that node's name")
    return first


def _rendezvous() -> tuple[int, int, int]:
    """Rank, world size and local rank; sets MASTER_ADDR and MASTER_PORT where they are missing.

    Raises:
        UserError: a variable of the launcher is no number, or out of range.
    """
    env = os.environ
    if env.get("RANK") and env.get("WORLD_SIZE") and "LOCAL_RANK" not in env:  # set by hand, or by a cluster's operator
        env["LOCAL_RANK"] = str(_number("RANK", 0, MOST) % max(1, torch.cuda.device_count()))
    for names in LAUNCHERS:
        if all(name in env for name in names):
            world = _number(names[1], 1, MOST)
            own_rank, local = _number(names[0], 0, world - 1), _number(names[2], 0, world - 1)
            if world > 1 and not env.get("MASTER_ADDR"):
                env["MASTER_ADDR"] = _first_node()
            if not env.get("MASTER_PORT"):
                job = _number("SLURM_JOB_ID", 0, MOST**2) if env.get("SLURM_JOB_ID") else 0
                env["MASTER_PORT"] = str(29500 + job % 1000)
            _number("MASTER_PORT", 1, 65535)
            # A batch script sees the variables that are meant for srun's processes, too.
            if world > 1 and own_rank == 0 and names[0] != "RANK":
                where = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
                log(f"{names[1]}={world}: waiting for {world - 1} more processes at {where}", ALONE)
            return own_rank, world, local
    return 0, 1, 0


def init(device: str = "auto", deterministic: bool = False) -> torch.device:
    """Join the process group, if there is one, and return this process's device.

    Args:
        device: "auto" (CUDA where present, else CPU), "cpu", "cuda" or "cuda:<index>".
        deterministic: cuDNN's deterministic kernels instead of the fastest.
    Raises:
        UserError: the device is unknown or absent, or the processes do not meet.
    """
    cuda = torch.cuda.is_available()
    try:
        chosen = torch.device(("cuda" if cuda else "cpu") if device == "auto" else device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError(chosen.type)
    except RuntimeError as error:
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:<index>") from error
    if chosen.type == "cuda" and not cuda:
        raise UserError(f"--device {device}: no CUDA device is available here; use --device cpu or auto")
    own_rank, world, local = _rendezvous()
    warnings.clear()  # of an earlier run in this process
    if chosen.type == "cuda":
        index = local if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise UserError(f"--device cuda:{index}: this machine has {torch.cuda.device_count()} CUDA devices")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.deterministic = deterministic
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, rank=own_rank, world_size=world)
        except RuntimeError as error:  # the port is taken, the address unknown, or others did not come
            where = " ".join(f"{name}={os.environ.get(name, '')}" for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise UserError(f"{where}: {world} processes did not meet ({str(error).splitlines()[0]})") from error
    return chosen


def agree(problem: bool = False) -> tuple[int, bool]:
    """The stop signal that any rank received (0: none) and whether any rank has a problem. Collective, on the host."""
    state = [stop_signal(), int(problem)]
    if world_size() > 1:
        shared = torch.tensor(state)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        state = shared.tolist()
    return state[0], bool(state[1])


def all_sum(values: Sequence[float]) -> list[float]:
    """Sum of each value over all ranks, float64. Collective, on the host."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank. Collective, on the host."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def gather_to_main(value: Any) -> list[Any]:
    """Every rank's value, by rank, on rank 0; an empty list on the others. Collective, on the host."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values or []


def seed_step(seed: int, step: int) -> None:
    """Seed every generator of this rank for one step, so that its draws depend on (seed, rank, step) alone."""
    words = np.random.SeedSequence([seed, rank(), step, 1]).generate_state(3)  # 1: unlike any sample's seed
    random.seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002 - timm's Mixup draws from the global generator
    torch.manual_seed(int(words[2]))


def recompute_blocks(model: nn.Module) -> None:
    """Let the transformer blocks forget what is inside them, and compute it again in the backward pass.

    Numbers stay the same: draws are repeated. Blocks are the members of lists whose names end in "blocks".
    Raises:
        UserError: the network has none, or they have batch norms, whose statistics would move twice.
    """
    lists = [(name, part) for name, part in model.named_modules() if name.endswith("blocks")]
    blocks = {id(block): block for _, part in lists for block in part.children()}.values()
    if not blocks or any(isinstance(part, _BatchNorm) for block in blocks for part in block.modules()):
        raise UserError(f"--use_checkpoint: {type(model).__name__} has no transformer blocks to compute again")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def wrap(model: nn.Module, device: torch.device, compile_model: bool = False, find_unused: bool = False) -> nn.Module:
    """Compile the model in place if asked for and, with several processes, average its gradients over them."""
    if compile_model:
        model.compile()
    if world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=ids, find_unused_parameters=find_unused, gradient_as_bucket_view=True
    )


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def sync_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0 (batch norm statistics), as DDP does before a training step. Collective."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
