"""One epoch of masked image modelling."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from a2mim.data import normalize
from a2mim.masking_generator import fill_mean
from common import distributed
from common.datasets import Loader

Batch = tuple[list[Tensor], Tensor]


def reconstruct(model: nn.Module, batch: Batch, fills: bool, filled_target: bool) -> dict[str, Tensor]:
    """Losses and reconstruction of one batch.

    Args:
        batch: [pixels (B, 3, H, W) uint8, masks (B, h, w)], and labels that are not needed.
        fills: the network sees masked pixels in the image's mean colour. filled_target: it is also to predict them.
    Returns:
        as `MaskedImageModel`, and target: (B, 3, H, W).
    """
    pixels, mask = batch[0]
    imgs = normalize(pixels)
    seen = fill_mean(imgs, mask) if fills else imgs
    target = seen if filled_target else imgs
    return {**model(seen, mask, target), "target": target, "mask": mask}


def batch_loss(model: nn.Module, batch: Batch, **context) -> Tensor:
    """Training loss, (), of one batch; context as in `reconstruct`."""
    return reconstruct(model, batch, **context)["loss"]


def train_one_epoch(
    model: nn.Module,
    loader: Loader,
    updater: distributed.Updater,
    set_rates: Callable[[int], None],
    epoch_log: distributed.EpochLog,
    draw: Callable[[int, dict[str, Any]], None],
    seed: int = 0,
    **context,
) -> dict[str, float]:
    """Train from the position of `epoch_log` to the end of its epoch.

    Args:
        set_rates: sets the learning rates of an iteration, counted from the start of the run.
        draw: is given each iteration and its reconstruction, and may draw it.
        seed: the model's random draws depend on (seed, rank, iteration) alone. context: as in `reconstruct`.
    Returns:
        means over the epoch and all ranks.
    Raises:
        distributed.Exit: a stop signal, an unreadable image or a non-finite loss.
    """
    model.train()
    updater.start_epoch()
    for step, batch in epoch_log.steps(loader.batches(epoch_log.epoch, epoch_log.start)):
        iteration = epoch_log.epoch * len(loader) + step
        set_rates(iteration)
        distributed.seed_step(seed, iteration)
        with updater.forward(model, step):
            out = reconstruct(model, batch, **context)
        norm = updater.backward(out["loss"], step)
        epoch_log.update(
            step,
            updater.is_last(step),
            lr=updater.optimizer.param_groups[0]["lr"],
            loss=out["loss"],
            loss_spatial=out["loss_spatial"],
            loss_freq=out["loss_freq"],
            grad_norm=norm,
        )
        draw(iteration, out)
    return epoch_log.means()
