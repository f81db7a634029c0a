"""One epoch of SAIM pre-training."""

from collections.abc import Callable

from torch import Tensor, nn

from common import distributed, lr_sched
from common.datasets import Loader


def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Training loss, (), of one batch of the loader; labels are not used."""
    imgs, _ = batch
    return model(imgs)


def train_one_epoch(
    model: nn.Module,
    loader: Loader,
    updater: distributed.Updater,
    schedule: Callable[[float], float],
    epoch_log: distributed.EpochLog,
    seed: int = 0,
) -> dict[str, float]:
    """Train from the position of `epoch_log` to the end of its epoch.

    Args:
        model: maps images (N, 3, H, W) to the loss, ().
        schedule: learning rate at a fractional epoch, set before each update.
        seed: the model's random draws depend on (seed, rank, step) alone.
    Returns:
        means over the epoch and all ranks: lr, loss, total_norm (of the gradient, before clipping).
    Raises:
        distributed.Exit: a stop signal, an unreadable image or a non-finite loss.
    """
    model.train()
    updater.start_epoch()
    groups = updater.optimizer.param_groups
    for step, batch in epoch_log.steps(loader.batches(epoch_log.epoch, epoch_log.start)):
        if updater.is_first(step):
            lr_sched.set_lr(groups, schedule(epoch_log.epoch + step / len(loader)))
        distributed.seed_step(seed, epoch_log.epoch * len(loader) + step)
        with updater.forward(model, step):
            loss = batch_loss(model, batch)
        norm = updater.backward(loss, step)
        epoch_log.update(step, updater.is_last(step), lr=groups[0]["lr"], loss=loss, total_norm=norm)
    return epoch_log.means()
