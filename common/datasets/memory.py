"""How much memory a training step takes, estimated before the first one."""

import argparse
import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

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
    # Of the two versions of control groups.
    for names in ("memory.max memory.current", "memory/memory.limit_in_bytes memory/memory.usage_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            most, now = (int(Path("/sys/fs/cgroup", name).read_text()) for name in names.split())
            found.append(most - now)
    return min(found)


# Weights of a network times values of its images. Below, a pass takes under half a second of one core, and finding its
# shapes takes as long; a ViT-B at 224 pixels is three times as large.
SMALL = 5e12


class Shapes(FakeTensorMode):
    """Inside, what depends on fake tensors has shapes alone, and takes little time and no memory; the rest is computed.

    So masks, indices and random orders have the values that shapes depend on. Where a program decides by a value that
    is not there, it finds 1 or true.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self._inside = False  # an operation, whose parts have shapes alone, too

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._inside and not any(isinstance(x, FakeTensor) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        before, self._inside = self._inside, True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._inside = before

    @contextlib.contextmanager
    def stand_in(self, modules: tuple[nn.Module, ...]) -> Iterator[None]:
        """Let the modules have fake parameters and buffers for a while."""
        parts = {part for module in modules for part in module.modules()}
        tables: list[dict[str, Any]] = [table for part in parts for table in (part._parameters, part._buffers)]
        own = [dict(table) for table in tables]
        try:
            for table in tables:
                table.update({name: x if x is None else self.from_tensor(x) for name, x in table.items()})
            yield
        finally:
            for table, values in zip(tables, own, strict=True):
                table.update(values)


def saved_bytes(model: nn.Module, loss_of: Callable[[nn.Module, Any], Tensor], batch: Any, *others: nn.Module) -> int:
    """Bytes that the forward pass of a batch keeps for the backward pass, weights apart.

    The pass of a large network computes shapes alone. That of a small one, or of one whose shapes depend on the images
    (the boxes of a detector), computes all. Random states, weights, buffers and the training mode are afterwards what
    they were. others: modules whose buffers may move.
    """
    modules = (model, *others)
    weights = sum(p.numel() for module in modules for p in module.parameters())
    values = sum(x.numel() for x in tree_leaves(batch) if isinstance(x, Tensor) and x.is_floating_point())
    if weights * values < SMALL:
        return kept_bytes(modules, loss_of, batch)
    shapes = Shapes()
    try:
        with shapes.stand_in(modules), shapes:
            fake = tree_map_only(Tensor, lambda x: shapes.from_tensor(x) if x.is_floating_point() else x, batch)
            return kept_bytes(modules, loss_of, fake)
    except Exception:  # whatever shapes alone do not give; a mistake is met again
        return kept_bytes(modules, loss_of, batch)


class Kept:
    """A tensor that a graph keeps as long as its backward pass may need it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def kept_bytes(modules: tuple[nn.Module, ...], loss_of: Callable[[nn.Module, Any], Tensor], batch: Any) -> int:
    """`saved_bytes` of the first module by the pass of a batch, real or fake."""
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(x: Tensor) -> Kept:
        kept.add(one := Kept(x))
        return one

    modes = [module.training for module in modules]
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with seeded(0), torch.random.fork_rng(devices), saved_tensors_hooks(keep, lambda kept: kept.tensor):
            for module in modules:
                module.eval()  # batch norms take a single image only in evaluation
            _loss = loss_of(modules[0], batch)  # its graph has what the backward pass needs
        weights = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
        saved = {s._cdata: s.nbytes() for s in (one.tensor.untyped_storage() for one in kept)}
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)
        for buffer, before in buffers:
            buffer.copy_(before)
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
