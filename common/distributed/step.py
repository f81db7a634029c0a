"""One optimizer step: precision, accumulation, clipping, and a guard that lets no non-finite update happen."""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from common.distributed.exits import NonFinite, UserError
from common.distributed.process import agree, log


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


def bf16_instructions() -> list[str]:
    """What this processor has for products of bf16, by Linux's names: avx512_bf16, amx_bf16; none on other systems."""
    with contextlib.suppress(OSError):
        return sorted(set(re.findall(r"\b(?:avx512_bf16|amx_bf16)\b", Path("/proc/cpuinfo").read_text())))
    return []


def bf16_advice(precision: str) -> str:
    """What to say about --amp_dtype on this processor, '' for nothing.

    A run never takes bf16 on a CPU by itself: the same command would give other results on another machine.
    """
    found = " and ".join(bf16_instructions())
    if precision == "bf16" and not found:
        return "--amp_dtype bf16: slower than fp32 on this processor, which has neither avx512_bf16 nor amx_bf16"
    if precision == "auto" and found:
        return f"this processor has {found}: --amp_dtype bf16 may be faster than fp32, with slightly other results"
    return ""


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values, (n,), on a device, where they stay: every copy from the host's memory would make it wait."""
    return torch.tensor(values, device=device)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


@dataclass(eq=False)
class Updater:
    """One optimizer's step: autocast, loss scaling, accumulation, clipping, and a guard against non-finite numbers.

    The guard lets no update with a non-finite loss or gradient norm happen. Where reading the norm would stall the
    GPU, a flag on the device makes a fused optimizer skip this and every later update; `EpochLog` reads the values at
    its next report and stops the run. Elsewhere the guard raises at once.
    """

    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str = "auto"  # as --amp_dtype
    accum_iter: int = 1  # micro-steps per update; each micro-step's loss counts 1/accum_iter
    clip_grad: float | None = None  # largest gradient norm; None only measures it
    # That forward passes move (batch statistics, centres); `restore` puts back those of the last update.
    buffers: Iterable[Tensor] = ()
    on_gradients: Callable[[], None] | None = None  # called before an update, with complete and unscaled gradients

    def __post_init__(self) -> None:
        optimizer, device, buffers = self.optimizer, self.device, list(self.buffers)
        self.dtype = amp_dtype(self.precision, device)
        if device.type == "cpu" and (advice := bf16_advice(self.precision)):
            log(advice)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self.guard_on_device = device.type == "cuda" and fused and not self.scaler.is_enabled()
        inner = getattr(optimizer, "_base_optimizer", optimizer)  # of Lookahead, which does not say it in timm 1.0.26
        self.second_order = getattr(inner, "is_second_order", False)  # such as timm's Adahessian
        self._frozen = torch.zeros((), device=device)  # 1 from the first non-finite norm on
        self._losses: list[tuple[int, Tensor]] = []
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
        # After the exchange of gradients all ranks see the same norm; under loss scaling only the losses show it.
        if self.scaler.is_enabled() and agree(bool(bad))[1] and not bad:
            bad.append((self._losses[0][0], "loss on another rank", math.nan))
        if bad:
            raise NonFinite(*bad[0])
        return not math.isfinite(norm.item())
