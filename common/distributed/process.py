"""The process group and its ranks, orderly exits, precision and the guarded optimizer step."""

import argparse
import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

# ---- exits


class Exit(Exception):
    """Ends the program with one line on stderr and `status`; training saves its position first."""

    status = 1


class UserError(Exit):
    """A mistake in the command line, the data or a file: the line names the value and what was expected."""

    status = 2


@contextlib.contextmanager
def user_errors(flag: str) -> Iterator[None]:
    """Turn a complaint about a value (ValueError, or what libraries raise for one) into a UserError on `flag`."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, AssertionError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or "not understood"
        raise UserError(f"{flag}: {reason}") from error


class NonFinite(Exit):
    """A loss or gradient norm is not finite; no update was made from `step` (of the epoch) on."""

    def __init__(self, step: int, name: str, value: float):
        super().__init__(f"{name} is {value}, stopping training before the update of step {step}")
        self.step = step


class Stopped(Exit):
    """A signal asked for the end of the program."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.status = 128 + signum


_received: list[int] = []  # the first stop signal, if any


def _on_signal(signum: int, _frame) -> None:
    if signum == signal.SIGINT and _received:
        raise KeyboardInterrupt
    _received[:] = _received or [signum]
    if rank() == 0:
        name = signal.Signals(signum).name
        print(f"{name}: saving after this step (Ctrl-C again quits at once)", file=sys.stderr, flush=True)


def catch_signals() -> None:
    """Let SIGTERM, SIGINT and SIGUSR1 wait until a loader's next batch (`stop_signal`, `agree`)."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, _on_signal)


def stop_signal() -> int:
    """The stop signal that this process received, 0 if none."""
    return _received[0] if _received else 0


Ranges = dict[str, tuple[float, float]]  # smallest and largest value by flag; NaN fits nowhere

RANGES: Ranges = {  # of flags that several methods have
    **dict.fromkeys(("batch_size", "batch_size_per_gpu", "epochs", "accum_iter", "update_freq"), (1, math.inf)),
    **dict.fromkeys(("input_size", "patch_size", "save_freq", "saveckp_freq", "recount"), (1, math.inf)),
    **dict.fromkeys(("num_workers", "start_epoch", "warmup_epochs"), (0, math.inf)),
    **dict.fromkeys(("lr", "blr", "min_lr", "weight_decay", "weight_decay_end", "mixup", "cutmix"), (0, 1e9)),
    **dict.fromkeys(("drop_path", "drop_path_rate"), (0, 1 - 1e-9)),
    **dict.fromkeys(("momentum", "model_ema_decay", "smoothing", "reprob"), (0, 1)),
    **dict.fromkeys(("mixup_prob", "mixup_switch_prob"), (0, 1)),
    **dict.fromkeys(("clip_grad", "temperature"), (1e-12, math.inf)),
    "layer_decay": (1e-12, 1),
    **dict.fromkeys(("crop_min_size", "crop_max_size"), (1e-6, 1)),
    "nb_classes": (0, 1e7),
    "seed": (0, 2**32 - 1),
}


def check_ranges(args, ranges: Ranges = RANGES) -> None:
    """Raise UserError for a flag outside of its range; flags that are None are not set."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise UserError(f"--{name} {value}: expected {expected}")
    minmax = getattr(args, "cutmix_minmax", None)
    if minmax is not None and not (len(minmax) == 2 and 0 <= minmax[0] < minmax[1] <= 1):
        raise UserError(f"--cutmix_minmax {' '.join(map(str, minmax))}: expected two shares, 0 to 1, increasing")


def run(main: Callable, args) -> None:
    """Check the flags' ranges and call main(args); an `Exit` becomes one line and its exit status.

    Args:
        args: the flags, or what makes them.
    """
    try:
        args = args() if callable(args) else args
        check_ranges(args)
        main(args)
    except Exit as end:
        if rank() > 0:  # an error that all ranks share is told by rank 0, whose end takes the others along
            time.sleep(2)
        if rank() == 0 or not _received:
            where = f"[rank {rank()}] " if world_size() > 1 else ""
            print(f"{where}{Path(sys.argv[0]).name}: {end}", file=sys.stderr, flush=True)
        sys.exit(end.status)
    except RuntimeError as error:
        if world_size() == 1 or "Connection closed by peer" not in str(error):
            raise
        print(f"[rank {rank()}] another process ended; see its message", file=sys.stderr, flush=True)
        sys.exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say on what a script runs."""
    parser.add_argument("--device", default="auto", help="auto: CUDA if present, else cpu")
    parser.add_argument("--local_rank", "--local-rank", default=-1, type=int, help="no effect: the environment decides")
    parser.add_argument("--dist_on_itp", action="store_true", help="no effect: OpenMPI is recognised by itself")
    parser.add_argument("--dist_url", default="env://", help="no effect: the rendezvous is env://")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say on what a training script runs, and how it resumes."""
    add_launch_flags(parser)
    parser.add_argument(
        "--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: fp32 on CPU"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--resume", default="", help="checkpoint to continue; default: that of --output_dir, if any")
    parser.add_argument("--start_epoch", default=0, type=int, help="first epoch when the checkpoint does not tell")
    parser.add_argument("--world_size", default=1, type=int, help="no effect: the launcher's environment decides")


# ---- group and ranks


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def log(*words) -> None:
    """Print a time-stamped line on rank 0."""
    if is_main():
        print(time.strftime("[%H:%M:%S]"), *words, flush=True)


@contextlib.contextmanager
def on_main_first() -> Iterator[None]:
    """Let rank 0 go first (a download, say), then the others."""
    if not is_main():
        barrier()
    try:
        yield
    finally:
        if is_main():
            barrier()


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


# Rank, world size and local rank as told by torchrun and torch.distributed.launch, OpenMPI (--dist_on_itp) and SLURM,
# whose SLURM_NTASKS is the whole job's: a shell or step with fewer tasks tells so by SLURM_STEP_NUM_TASKS.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)
ALONE = "(a single one is started by RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 python ...)"


def _rendezvous() -> tuple[int, int, int]:
    """Rank, world size and local rank; sets MASTER_ADDR and MASTER_PORT where they are missing."""
    env = os.environ
    for names in LAUNCHERS:
        if all(name in env for name in names):
            own_rank, world, local = (int(env[name]) for name in names)
            if world > 1 and "MASTER_ADDR" not in env:
                nodes = env.get("SLURM_JOB_NODELIST", "localhost")
                with contextlib.suppress(OSError, subprocess.CalledProcessError):
                    nodes = subprocess.check_output(["scontrol", "show", "hostnames", nodes], text=True)
                env["MASTER_ADDR"] = nodes.split()[0]
            env.setdefault("MASTER_PORT", str(29500 + int(env.get("SLURM_JOB_ID", 0)) % 1000))
            if (
                world > 1 and own_rank == 0 and names[0] != "RANK"
            ):  # a batch script's variables tell of srun's processes
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


# ---- model and optimizer step


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


def amp_dtype(name: str, device: torch.device) -> torch.dtype:
    """Autocast type of --amp_dtype; auto: bf16 where the GPU has it, else fp16; fp32 (no autocast) on CPU.

    Raises:
        UserError: fp16 was asked for on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise UserError("--amp_dtype fp16: needs a GPU; on a CPU use bf16 or fp32")
    if name == "auto" and device.type == "cpu":
        name = "fp32"
    elif name == "auto":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


class Updater:
    """One optimizer's step: autocast, loss scaling, accumulation, clipping, and a guard against non-finite numbers.

    The guard lets no update with a non-finite loss or gradient norm happen. Where reading the norm would stall the
    GPU, a fused optimizer is told on the device to skip this and every later update; `EpochLog` reads the values at its
    next report and stops the run. Elsewhere the guard raises at once.
    Args:
        precision: as --amp_dtype.
        accum_iter: micro-steps per update; each micro-step's loss counts 1/accum_iter.
        clip_grad: largest gradient norm; None only measures it.
        buffers: that forward passes move (batch statistics, centres); `restore` puts back those of the last update.
        on_gradients: called before an update, when the gradients are complete and unscaled.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        precision: str = "auto",
        accum_iter: int = 1,
        clip_grad: float | None = None,
        buffers: Iterable[Tensor] = (),
        on_gradients: Callable[[], None] | None = None,
    ):
        self.optimizer = optimizer
        self.device = device
        self.dtype = amp_dtype(precision, device)
        self.accum_iter = accum_iter
        self.clip_grad = clip_grad
        self.on_gradients = on_gradients
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self.guard_on_device = device.type == "cuda" and fused and not self.scaler.is_enabled()
        self.second_order = getattr(optimizer, "is_second_order", False)  # such as timm's Adahessian
        self._frozen = torch.zeros((), device=device)  # 1 from the first non-finite norm on
        self._losses: list[tuple[int, Tensor]] = []
        buffers = list(buffers)
        self._buffers = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype: None for b in buffers}]
        self._kept = [_flat(group) for group in self._buffers]
        optimizer.zero_grad(set_to_none=True)

    def is_first(self, step: int) -> bool:
        """Whether micro-step `step` of the epoch begins an update."""
        return step % self.accum_iter == 0

    def is_last(self, step: int) -> bool:
        """Whether micro-step `step` of the epoch completes an update."""
        return (step + 1) % self.accum_iter == 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def forward(self, model: nn.Module, step: int) -> Iterator[None]:
        """Context of a micro-step's forward pass: autocast, and no gradient exchange before the update's last one."""
        exchange = self.is_last(step) or not isinstance(model, DistributedDataParallel)
        # The fused attention kernels have no second derivative.
        kernels = sdpa_kernel(SDPBackend.MATH) if self.second_order else contextlib.nullcontext()
        with contextlib.nullcontext() if exchange else model.no_sync(), self.autocast(), kernels:  # type: ignore[operator]
            yield

    def start_epoch(self) -> None:
        """Forget the gradients of an incomplete update, as upstream does between epochs."""
        self.optimizer.zero_grad(set_to_none=True)
        self._losses.clear()
        self._keep()

    @torch.no_grad()
    def _keep(self) -> None:
        """Remember the buffers, unless updates are frozen."""
        for i, group in enumerate(self._buffers):
            self._kept[i] = torch.where(self._frozen > 0, self._kept[i], _flat(group))

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the buffers of the last update: a non-finite step may have damaged them for good."""
        for kept, group in zip(self._kept, self._buffers, strict=True):
            for part, live in zip(kept.split([b.numel() for b in group]), group, strict=True):
                live.copy_(part.view_as(live))

    def backward(self, loss: Tensor, step: int) -> Tensor | None:
        """Add the micro-step's gradient and, on the update's last one, update.

        Returns:
            the gradient norm before clipping, (); None where no update was made (accumulating, fp16 overflow).
        Raises:
            NonFinite: before the update, where the values can be read without stalling the device.
        """
        self._losses.append((step, loss.detach()))
        self.scaler.scale(loss / self.accum_iter).backward(create_graph=self.second_order)
        if not self.is_last(step):
            return None
        self.scaler.unscale_(self.optimizer)
        params = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.clip_grad is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        else:
            norm = torch.nn.utils.clip_grad_norm_(params, self.clip_grad)
        if self.on_gradients is not None:
            self.on_gradients()
        skipped = False
        if self.guard_on_device:
            self._frozen = torch.maximum(self._frozen, (~norm.isfinite()).float())
            inner = getattr(self.optimizer, "base_optimizer", self.optimizer)  # of Lookahead
            inner.found_inf = self._frozen  # type: ignore[attr-defined]  # read by fused optimizers
        else:
            skipped = self._check(norm)
        self._losses.clear()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._keep()
        return None if skipped else norm

    @torch.no_grad()
    def average(self, average: nn.Module, model: nn.Module, decay: float) -> None:
        """Move the whole state of `average` to decay * average + (1 - decay) * model; frozen where updates are."""
        pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
        for own, new in (pair for pair in pairs if not pair[0].is_floating_point()):
            own.copy_(new)
        own, new = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        self.move(own, new, 1 - decay)

    @torch.no_grad()
    def move(self, own: Sequence[Tensor], new: Sequence[Tensor], share: float) -> None:
        """Move tensors by a share of the way to new ones; not at all where updates are frozen."""
        factor = (share * (1 - self._frozen)).to(own[0].device)
        torch._foreach_mul_(own, 1 - factor)  # type: ignore[reportPrivateImportUsage]
        moved = torch._foreach_mul([x.to(factor.device) for x in new], factor)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_add_(own, moved)  # type: ignore[reportPrivateImportUsage]

    def _check(self, norm: Tensor) -> bool:
        """Raise on a non-finite number; True if only the scaled gradients overflowed: the scaler skips the update."""
        bad = [(step, "loss", loss.item()) for step, loss in self._losses if not math.isfinite(loss.item())]
        if not math.isfinite(norm.item()) and not self.scaler.is_enabled():
            bad.append((self._losses[0][0], "gradient norm", norm.item()))
        # After the exchange of gradients all ranks see the same norm; under loss scaling only the losses tell.
        if self.scaler.is_enabled() and agree(bool(bad))[1] and not bad:
            bad.append((self._losses[0][0], "loss on another rank", math.nan))
        if bad:
            raise NonFinite(*bad[0])
        return not math.isfinite(norm.item())
