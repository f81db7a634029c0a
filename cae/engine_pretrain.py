"""One epoch of CAE pre-training."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from cae.models_cae import cae_loss, split_patches
from common import distributed, lr_sched
from common.datasets import Loader


class Tokenizer(Protocol):
    def get_codebook_indices(self, images: Tensor) -> Tensor: ...


def set_rates(groups: list[dict], lr: float, weight_decay: float) -> None:
    """Write learning rate (times the group's lr_scale) and weight decay (where there is any) to the groups."""
    lr_sched.set_lr(groups, lr)
    for group in groups:
        if group["weight_decay"] > 0:
            group["weight_decay"] = weight_decay


def current_rates(groups: list[dict]) -> dict[str, float]:
    """Largest and smallest learning rate, and the weight decay, of the groups."""
    rates = [group["lr"] for group in groups]
    return {"lr": max(rates), "min_lr": min(rates), "weight_decay": max(group["weight_decay"] for group in groups)}


def batch_losses(
    model: nn.Module,
    batch: tuple[list[Tensor], Tensor],
    tokenizer: Tokenizer,
    align_weight: float,
    num_masked: int | None = None,
) -> dict[str, Tensor]:
    """Losses of one batch, decoding + λ alignment (`cae_loss`); class labels are not used.

    Args:
        model: a `ContextAutoencoderViT`, or what wraps it.
        batch: (images, the tokenizer's images, masks (B, N) bool with True = masked), and labels.
        align_weight: λ. num_masked: M, alike in all masks; None counts it, which makes a GPU wait.
    Returns:
        loss, loss_main (tokens), loss_align (latents, weighted), and mlm_acc, the share of tokens predicted right.
    """
    (imgs, token_imgs, masks), _ = batch
    with torch.no_grad(), torch.autocast(imgs.device.type, enabled=False):
        ids = tokenizer.get_codebook_indices(token_imgs).flatten(1)  # (B, N)
    num_masked = int(masks[0].sum()) if num_masked is None else num_masked
    _, masked = split_patches(masks, num_masked)  # (B, M)
    labels = ids.gather(1, masked).flatten()  # (B M,), in the order of the logits
    logits, predicted, target = model(imgs, masks, num_masked=num_masked)
    with torch.autocast(imgs.device.type, enabled=False):
        loss, main, align = cae_loss(logits, predicted, target, labels, align_weight)
    accuracy = (logits.detach().argmax(dim=1) == labels).float().mean()
    return {"loss": loss, "loss_main": main, "loss_align": align, "mlm_acc": accuracy}


def batch_loss(model: nn.Module, batch: tuple[list[Tensor], Tensor], **context) -> Tensor:
    """Training loss, (), of one batch, for tools that time any method's step; context as in `batch_losses`."""
    return batch_losses(model, batch, **context)["loss"]


def train_one_epoch(
    model: nn.Module,
    loader: Loader,
    updater: distributed.Updater,
    rates: Callable[[int], tuple[float, float]],
    epoch_log: distributed.EpochLog,
    tokenizer: Tokenizer,
    align_weight: float,
    num_masked: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train from the position of `epoch_log` to the end of its epoch.

    Args:
        rates: learning rate and weight decay of an update, counted from the start of the run.
        seed: the model's random draws depend on (seed, rank, step) alone. Others as in `batch_losses`.
    Returns:
        means over the epoch and all ranks, in upstream's order.
    Raises:
        distributed.Exit: a stop signal, an unreadable image or a non-finite loss.
    """
    model.train()
    updater.start_epoch()
    groups = updater.optimizer.param_groups
    for step, batch in epoch_log.steps(loader.batches(epoch_log.epoch, epoch_log.start)):
        if updater.is_first(step):
            updates = len(loader) // updater.accum_iter  # of an epoch
            set_rates(groups, *rates(epoch_log.epoch * updates + min(step // updater.accum_iter, updates - 1)))
        distributed.seed_step(seed, epoch_log.epoch * len(loader) + step)
        with updater.forward(model, step):
            losses = batch_losses(model, batch, tokenizer, align_weight, num_masked)
        norm = updater.backward(losses["loss"], step)
        now = current_rates(groups)
        epoch_log.update(
            step,
            updater.is_last(step),
            lr=now["lr"],
            min_lr=now["min_lr"],
            mlm_acc=losses["mlm_acc"],
            loss=losses["loss"],
            loss_main=losses["loss_main"],
            loss_align=losses["loss_align"],
            loss_scale=updater.scaler.get_scale(),
            weight_decay=now["weight_decay"],
            grad_norm=norm,
        )
    return epoch_log.means()
