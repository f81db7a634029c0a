"""Supervised training for fine-tuning and probing: one epoch, the evaluation, the whole run."""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from common import distributed, lr_sched
from common.datasets import Loader


# same as cae/engine_pretrain.py
def set_rates(groups: list[dict], lr: float, weight_decay: float) -> None:
    """Write learning rate (times the group's lr_scale) and weight decay (where there is any) to the groups."""
    lr_sched.set_lr(groups, lr)
    for group in groups:
        if group["weight_decay"] > 0:
            group["weight_decay"] = weight_decay


# same as cae/engine_pretrain.py
def current_rates(groups: list[dict]) -> dict[str, float]:
    """Largest and smallest learning rate, and the weight decay, of the groups."""
    rates = [group["lr"] for group in groups]
    return {"lr": max(rates), "min_lr": min(rates), "weight_decay": max(group["weight_decay"] for group in groups)}


# same as cae/engine_finetune.py
def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loader: Loader,
    updater: distributed.Updater,
    rates: Callable[[int, int], tuple[float, float]],
    epoch_log: distributed.EpochLog,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ema: ModelEmaV3 | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train from the position of `epoch_log` to the end of its epoch.

    Args:
        model: maps images (B, 3, H, W) to logits (B, K).
        criterion: (logits, targets) -> (); targets are class indices (B,), or what `mixup` makes of them (B, K).
        rates: (epoch, micro-step) -> learning rate and weight decay, set before each update.
        ema: moving average of the weights, made after each update.
        seed: random draws (Mixup, stochastic depth) depend on (seed, rank, step) alone.
    Returns:
        means over the epoch and all ranks, in upstream's order.
    Raises:
        distributed.Exit: a stop signal, an unreadable image or a non-finite loss.
    """
    model.train()
    updater.start_epoch()
    groups = updater.optimizer.param_groups
    for step, (imgs, targets) in epoch_log.steps(loader.batches(epoch_log.epoch, epoch_log.start)):
        if updater.is_first(step):
            set_rates(groups, *rates(epoch_log.epoch, step))
        distributed.seed_step(seed, epoch_log.epoch * len(loader) + step)
        classes = targets
        if mixup is not None:
            imgs, targets = mixup(imgs, targets)
        with updater.forward(model, step):
            logits = model(imgs)
            loss = criterion(logits, targets)
        norm = updater.backward(loss, step)
        if ema is not None and updater.is_last(step):
            updater.average(ema.module, distributed.unwrap(model), ema.decay)
        right = (logits.detach().argmax(dim=1) == classes).float().mean() if targets.ndim == 1 else None
        now = current_rates(groups)
        epoch_log.update(
            step,
            updater.is_last(step),
            lr=now["lr"],
            min_lr=now["min_lr"],
            loss=loss,
            class_acc=right,
            loss_scale=updater.scaler.get_scale(),
            weight_decay=now["weight_decay"] or None,
            grad_norm=norm,
        )
    return epoch_log.means()


# same as semaim/engine_finetune.py
@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, updater: distributed.Updater) -> dict[str, float]:
    """Accuracy over all ranks' images, and the plain mean of the batches' cross entropies (as upstream).

    Args:
        loader: of (images or whatever the model takes, class indices). updater: says device and precision.
    Returns:
        loss, acc1, acc5 (percent; the best min(5, K) classes).
    """
    model.eval()
    distributed.sync_buffers(model)  # rank 0's, which the checkpoint holds
    totals = torch.zeros(5, dtype=torch.float64, device=updater.device)  # loss, batches, top-1, top-5, images
    test_log = distributed.EpochLog("Test:", len(loader), loader.batch_size, updater.device, print_freq=10)
    for _, (imgs, targets) in test_log.steps(loader.batches()):
        with updater.autocast():
            logits = model(imgs)
            loss = F.cross_entropy(logits, targets)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == targets[:, None]
        totals += torch.stack([loss, loss.new_ones(()), hits[:, 0].sum(), hits.sum(), loss.new_tensor(len(targets))])
    loss, batches, top1, top5, images = distributed.all_sum(totals.tolist())
    stats = {"loss": loss / batches, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images}
    distributed.log("* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}".format(**stats))
    distributed.log(f"Accuracy of the network on the {images:.0f} test images: {stats['acc1']:.1f}%")
    return stats


# same as semaim/engine_finetune.py
def evaluate_checkpoint(path: str, model: nn.Module, loader: Loader, updater: distributed.Updater) -> None:
    """Load the weights of a fine-tuned or probed model, evaluate and print the accuracy.

    Raises:
        distributed.UserError: no checkpoint was named, or it does not fit the model.
    """
    if not path:
        raise distributed.UserError("--eval: name the checkpoint to evaluate with --resume")
    loader.match_classes(distributed.load_weights(model, path), path)
    evaluate(model, loader, updater)


TAGS = {"loss": "loss/loss", "class_acc": "loss/class_acc"}
TAGS |= {name: f"opt/{name}" for name in ("loss_scale", "lr", "min_lr", "weight_decay", "grad_norm")}


def report(
    epoch_log: distributed.EpochLog, _stats: dict[str, float], test: dict[str, float], best: float
) -> dict[str, float]:
    """Print and log an evaluation.

    Args:
        _stats: of the epoch's training. test: of `evaluate`. best: accuracy so far.
    Returns:
        further entries of the epoch's line in log.txt.
    """
    distributed.log(f"Max accuracy: {best:.2f}%")
    epoch_log.run_log.scalars({f"perf/test_{k}": test[k] for k in ("acc1", "acc5", "loss")}, epoch_log.epoch)
    return {}


def fit(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loader: Loader,
    val_loader: Loader | None,
    updater: distributed.Updater,
    rates: Callable[[int, int], tuple[float, float]],
    checkpoint: distributed.Checkpoint,
    resume: str,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ema: ModelEmaV3 | None = None,
    tags: dict[str, str] = TAGS,
    report: Callable[..., dict[str, float]] = report,
) -> None:
    """Train from the checkpoint `resume` ('': anew) to the last epoch, evaluating, logging and saving each.

    As upstream, the moving average is kept and saved, but it is the model itself that is evaluated.
    Args:
        val_loader: None evaluates nothing. tags: of TensorBoard's training curves. report: as `report`.
    """
    plain = distributed.unwrap(model)
    n_parameters = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    position = checkpoint.resume(resume, args.start_epoch)
    if ema is not None and "model_ema" in checkpoint.missing:
        ema.set(plain)
    for epoch, epoch_log in checkpoint.epochs(loader, position, tags):
        with checkpoint.on_exit(epoch_log):
            stats = train_one_epoch(model, criterion, loader, updater, rates, epoch_log, mixup, ema, args.seed)
        line = {f"train_{k}": v for k, v in stats.items()}
        if val_loader is not None:
            checkpoint.save(epoch_log.position(len(loader)))  # an evaluation may be stopped: it is repeated from here
            test = evaluate(plain, val_loader, updater)
            improved = test["acc1"] > checkpoint.best
            checkpoint.best = max(checkpoint.best, test["acc1"])
            line |= {f"test_{k}": v for k, v in test.items()} | report(epoch_log, stats, test, checkpoint.best)
            if improved:
                checkpoint.save(distributed.Position(epoch + 1), checkpoint.files.variant("best"))
        epoch_log.run_log.epoch(line | {"epoch": epoch, "n_parameters": n_parameters})
        checkpoint.save(distributed.Position(epoch + 1))
    distributed.log(
        f"{args.epochs} epochs done; {checkpoint.files.latest} is in {checkpoint.log_folder or 'no folder'}"
    )
