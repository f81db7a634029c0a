"""One epoch of SemAIM pre-training, and where the orders and the features to predict come from."""

import math
from collections.abc import Callable

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from common import distributed, lr_sched
from common.datasets import Loader
from semaim.models_semaim import AimViT, calculate_similarity


class Guide:
    """The map that the order follows and the features to predict, for each batch.

    predict_feature   map drawn from the tokens of                      features to predict
    none              the network in training, or its EMA if given      none: pixels
    inference         the network in training                           the same tokens
    ema               the EMA of the network in training                the same tokens
    clip, dino        the teacher, by `calculate_similarity`            the same tokens

    The pass runs in eval mode and without masks. No gradient flows back through it, into any of these networks: map and
    features are constants of the step (Fig. 1 of the paper: a locked encoder).
    Args:
        model: the network in training. ema: moving average of its weights, if there is one.
        teacher: maps images to tokens.
        amp: whether the pass runs under the autocast of the caller, not in float32.
    Raises:
        ValueError: predict_feature needs a teacher, or an average, that is not given.
    """

    def __init__(self, model: AimViT, ema: AimViT | None = None, teacher: nn.Module | None = None, amp: bool = False):
        if (model.predict_feature in ("clip", "dino")) != (teacher is not None):
            raise ValueError(
                f"predict_feature {model.predict_feature!r} and teacher {type(teacher).__name__} do not fit"
            )
        if model.predict_feature == "ema" and ema is None:
            raise ValueError("predict_feature 'ema' needs a moving average")
        self.source = model if ema is None or model.predict_feature == "inference" else ema
        self.teacher = teacher
        self.features = model.predict_feature != "none"
        self.needed = self.features or model.follows_map
        self.amp = amp

    @torch.no_grad()
    def __call__(self, imgs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Images (N, 3, H, W) -> tokens (N, T, O) and maps (N, L), each None where it is not needed."""
        if not self.needed:
            return None, None
        kind = imgs.device.type
        enabled = self.amp and torch.is_autocast_enabled(kind)
        # Casts of weights that are cached without autograd would cut the training pass off from its weights.
        with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=enabled, cache_enabled=False):
            if self.teacher is not None:
                tokens = self.teacher(imgs)
                return tokens, calculate_similarity(tokens)
            training = self.source.training
            self.source.eval()
            tokens, maps = self.source.semantic_pass(imgs, self.features)
            self.source.train(training)
        return tokens if self.features else None, maps


def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor], guide: Guide | None = None) -> Tensor:
    """Training loss, (), of one batch of the loader; labels are not used. guide: None orders by the model itself."""
    imgs, _ = batch
    guide = guide or Guide(distributed.unwrap(model))  # type: ignore[arg-type]
    tokens, maps = guide(imgs)
    return model(imgs, tokens=tokens, attention_maps=maps)[0]


def ema_decay(epoch: int) -> float:
    """0.999, growing linearly to 0.9999 over 100 epochs (upstream engine_pretrain.py@ade770f)."""
    return 0.9999 if epoch >= 100 else 0.999 + (0.9999 - 0.999) * epoch / 100


def train_one_epoch(
    model: nn.Module,
    loader: Loader,
    updater: distributed.Updater,
    schedule: Callable[[float], float],
    epoch_log: distributed.EpochLog,
    guide: Guide | None = None,
    ema: ModelEmaV3 | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train from the position of `epoch_log` to the end of its epoch.

    Args:
        model: an `AimViT`, or what wraps it.
        schedule: learning rate at a fractional epoch, set before each update.
        ema: moving average of the weights, made after each update.
        seed: the model's random draws depend on (seed, rank, step) alone.
    Returns:
        means over the epoch and all ranks: lr, loss, total_norm (of the gradient, before clipping).
    Raises:
        distributed.Exit: a stop signal, an unreadable image or a non-finite loss.
    """
    model.train()
    updater.start_epoch()
    groups = updater.optimizer.param_groups
    if ema is not None:
        ema.decay = ema_decay(epoch_log.epoch)
    for step, batch in epoch_log.steps(loader.batches(epoch_log.epoch, epoch_log.start)):
        if updater.is_first(step):
            lr_sched.set_lr(groups, schedule(epoch_log.epoch + step / len(loader)))
        distributed.seed_step(seed, epoch_log.epoch * len(loader) + step)
        with updater.forward(model, step):
            loss = batch_loss(model, batch, guide)
        norm = updater.backward(loss, step)
        if ema is not None and updater.is_last(step):
            updater.average(ema.module, distributed.unwrap(model), ema.decay)
        scale = updater.scaler.get_scale() if updater.scaler.is_enabled() else None
        epoch_log.update(step, updater.is_last(step), lr=groups[0]["lr"], loss=loss, total_norm=norm, fp16_scaler=scale)
    means = epoch_log.means()
    return {name: means.get(name, math.nan) for name in ("lr", "loss", "total_norm")}  # nan: no update was made
