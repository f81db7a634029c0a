"""How much memory a training step takes, estimated before the first one."""

import argparse
import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from common.datasets.loader import Loader
from common.datasets.seeds import seeded
from common.distributed import UserError, amp_dtype, log


def available_bytes(device: torch.device) -> float:
    """Free memory of a GPU, or of this machine within its control group; infinity where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [math.inf]
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    with contextlib.suppress(OSError, ValueError):
        most, now = (int(Path("/sys/fs/cgroup", f"memory.{name}").read_text()) for name in ("max", "current"))
        found.append(most - now)
    return min(found)


def saved_bytes(model: nn.Module, loss_of: Callable[[nn.Module, Any], Tensor], batch: Any, *others: nn.Module) -> int:
    """Bytes that the forward pass of a batch keeps for the backward pass, weights apart.

    Random states, buffers and the training mode are afterwards what they were. others: modules whose buffers may move.
    """
    saved: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    modules = (model, *others)
    modes = [module.training for module in modules]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with seeded(0), torch.random.fork_rng(devices), saved_tensors_hooks(keep, lambda x: x):
        for module in modules:
            module.eval()  # batch norms take a single image only in evaluation
        loss = loss_of(model, batch)
    del loss
    for module, mode in zip(modules, modes, strict=True):
        module.train(mode)
    for buffer, before in buffers:
        buffer.copy_(before)
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    return sum(size for place, size in saved.items() if place not in weights)


def check_memory(
    args: argparse.Namespace,
    model: nn.Module,
    loss_of: Callable[[nn.Module, Any], Tensor],
    loader: Loader,
    *others: nn.Module,
) -> None:
    """Say how much memory a step of --batch_size images takes, by the forward pass of one image.

    Args:
        loss_of: (model, batch of the loader) -> loss. others: further networks of a step, such as a teacher.
    Raises:
        UserError: on a CPU that is more than 1.25 times what is available, and --force is not given.
    """
    batch = None if args.compile else loader.one_image()
    if batch is None:
        return
    precision = amp_dtype(args.amp_dtype, loader.device)
    with torch.autocast(loader.device.type, precision, enabled=precision != torch.float32):
        image = saved_bytes(model, loss_of, batch, *others)
    sizes = [(p.nbytes, p.requires_grad) for module in (model, *others) for p in module.parameters()]
    fixed = sum(4 * size if trained else size for size, trained in sizes)  # gradient and two moments
    need, free, size = fixed + image * args.batch_size, available_bytes(loader.device), args.batch_size
    text = f"a step of {size} images takes about {need / 1e9:.2f} GB ({fixed / 1e9:.2f} weights and optimizer, "
    text += f"{(need - fixed) / 1e9:.2f} activations), {free / 1e9:.1f} GB are available"
    if loader.device.type == "cpu" and need > 1.25 * free and not args.force:
        fit = int((free - fixed) / image)
        way = f"--batch_size {fit} fits" if fit > 0 else "a smaller network or images fit"
        raise UserError(f"--batch_size {size}: {text}; {way}, --force goes on")
    log(f"memory: {text}")
