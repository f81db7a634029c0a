"""One epoch of self-distillation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import distributed
from common.datasets import Loader
from udi import optim
from udi.loss import Spec, UDILoss, udi_forward_loss
from udi.udi_augmentation import expand


class Rates(NamedTuple):
    """What changes with every update."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher


def batch_losses(
    student: nn.Module, batch: tuple[dict[str, Any], Tensor], teacher: nn.Module, udi_loss: UDILoss, epoch: int = 0
) -> tuple[Tensor, Spec]:
    """Loss of one batch and its parts; the centres move.

    Args:
        batch: of `udi_augmentation.collate`, and labels that are not needed. epoch: decides the teacher's temperature.
    """
    unwrapped: Any = distributed.unwrap(student)
    views = expand(batch[0], unwrapped.backbone.backbone.patch_size)
    return udi_forward_loss(student, teacher, udi_loss, **views, epoch=epoch)


def batch_loss(student: nn.Module, batch: tuple[dict[str, Any], Tensor], **context) -> Tensor:
    """Training loss, (), of one batch; context as in `batch_losses`."""
    return batch_losses(student, batch, **context)[0]


def meters(spec: Spec, num_clt: int) -> dict[str, Tensor]:
    """The parts of the loss by upstream's names: g global, l local; cl class token, mcl second one, pch patches."""
    names = ["cl", "mcl"][:num_clt]
    values = dict(zip([f"g_{name}" for name in (*names, "pch")], spec.global_losses, strict=False))
    values |= dict(zip([f"l_{name}" for name in names], spec.local_losses, strict=False))
    return values | {"mean_entropy": spec.mean_entropy, "entropy": spec.entropy}


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float, updater: distributed.Updater) -> None:
    """Move the teacher's parameters to momentum * teacher + (1 - momentum) * student; buffers stay (as upstream)."""
    updater.move(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def train_one_epoch(
    student: nn.Module,
    teacher: nn.Module,
    udi_loss: UDILoss,
    loader: Loader,
    updater: distributed.Updater,
    rates: Callable[[int], Rates],
    epoch_log: distributed.EpochLog,
    seed: int = 0,
) -> dict[str, float]:
    """Train from the position of `epoch_log` to the end of its epoch.

    Args:
        student: `MultiCropWrapper` or DistributedDataParallel of one. teacher: `MultiCropWrapper`.
        rates: of an update, counted from the start of the run.
        seed: stochastic depth depends on (seed, rank, step) alone.
    Returns:
        means over the epoch and all ranks.
    Raises:
        distributed.Exit: a stop signal, an unreadable image or a non-finite loss.
    """
    student.train()
    teacher.train()
    updater.start_epoch()
    updates = len(loader) // updater.accum_iter
    for step, batch in epoch_log.steps(loader.batches(epoch_log.epoch, epoch_log.start)):
        now = rates(epoch_log.epoch * updates + min(step // updater.accum_iter, updates - 1))
        optim.set_rates(updater.optimizer, now.lr, now.weight_decay)
        distributed.seed_step(seed, epoch_log.epoch * len(loader) + step)
        with updater.forward(student, step):
            loss, spec = batch_losses(student, batch, teacher, udi_loss, epoch_log.epoch)
        norm = updater.backward(loss, step)
        if updater.is_last(step):
            update_teacher(teacher, distributed.unwrap(student), now.momentum, updater)
        epoch_log.update(
            step,
            updater.is_last(step),
            loss=loss,
            **meters(spec, udi_loss.num_clt),
            lr=now.lr,
            wd=now.weight_decay,
            grad_norm=norm,
        )
    return epoch_log.means()
