"""Optimizers and their groups, per-parameter clipping, schedules, and Mixup."""

import argparse
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.mixup import Mixup
from timm.optim._optim_factory import create_optimizer_v2
from torch import Tensor, nn

from common import distributed, lr_decay, lr_sched
from udi.lars import LARS


def get_params_groups(model: nn.Module) -> list[dict]:
    """Two optimizer groups of the trained parameters: those with weight decay, then biases and norms without."""
    plain, decayed = lr_decay.decay_groups(model, 0.0)
    del decayed["weight_decay"]  # by the schedule
    return [decayed, plain]


def cosine_scheduler(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0.0,
    warmup_steps: int = -1,
) -> NDArray[np.float64]:
    """One value per iteration: linear from start_warmup_value to base_value, then half a cosine to final_value."""
    return lr_sched.cosine_table(
        base_value, final_value, epochs, niter_per_ep, warmup_epochs, start_warmup_value, warmup_steps
    )


def ramp_table(start: float, end: float, length: int, total: int) -> NDArray[np.float64]:
    """start to end inclusive over the first `length` entries, then end; cut at `total` (teacher temperature)."""
    return np.concatenate([np.linspace(start, end, length), np.full(max(total - length, 0), end)])[:total]


@torch.no_grad()
def clip_gradients(model: nn.Module, clip: float) -> Tensor:
    """Scale every parameter's gradient down to a norm of at most `clip`, each by itself; returns the norms (n,)."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))  # type: ignore[reportPrivateImportUsage]
    factors = (clip / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, list(factors.unbind()))  # type: ignore[reportPrivateImportUsage]
    return norms


def cancel_gradients_last_layer(epoch: int, model: nn.Module, freeze_last_layer: int) -> None:
    """Drop the gradients of the prototypes in the first epochs: no update, no decay."""
    if epoch < freeze_last_layer:
        for name, param in model.named_parameters():
            if "last_layer" in name:
                param.grad = None


def build_optimizer(name: str, groups: Iterable[dict]) -> torch.optim.Optimizer:
    """adamw, sgd or lars; rates and weight decay come from the schedules."""
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)  # fused fails when frozen parameters join later
    return LARS(groups)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Write the learning rate to both groups and the weight decay to the first."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


# ---- evaluations that train


def create_optimizer(args: argparse.Namespace, groups: Iterable, lr: float) -> torch.optim.Optimizer:
    """--opt over parameter groups: torch's AdamW, or timm's optimizer of that name.

    Raises:
        distributed.UserError: the name is unknown, or a value does not suit the optimizer.
    """
    kwargs = {"lr": lr, "weight_decay": args.weight_decay, "eps": args.opt_eps}
    if args.opt_betas is not None:
        kwargs["betas"] = tuple(args.opt_betas)
    name = args.opt.lower()
    with distributed.user_errors(f"--opt {args.opt} and its flags"):
        if name == "adamw":
            return torch.optim.AdamW(groups, **kwargs, fused=True)
        if "sgd" in name or name.endswith(("momentum", "nesterov")):
            del kwargs["eps"]
        return create_optimizer_v2(groups, name, momentum=args.momentum, **kwargs)  # type: ignore[arg-type]


# same as cae/main_finetune.py
def build_mixup(args: argparse.Namespace) -> Mixup | None:
    """timm's Mixup and CutMix; None if both are off, or nothing is trained."""
    if args.eval or not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    if args.batch_size % 2:
        raise distributed.UserError(f"--batch_size {args.batch_size}: Mixup and CutMix need an even number")
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.nb_classes,
    )
