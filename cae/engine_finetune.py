"""Supervised training for fine-tuning and both probes: one epoch, the evaluation, the whole run."""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from cae.engine_pretrain import current_rates, set_rates
from common import distributed
from common.datasets import Loader


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


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, updater: distributed.Updater, **kwargs) -> dict[str, float]:
    """Accuracy over all ranks' images, and the plain mean of the batches' cross entropies (as upstream).

    Args:
        loader: batches of (images (B, 3, H, W), class indices (B,)). updater: says device and precision.
        kwargs: arguments of the model's forward pass.
    Returns:
        loss, acc1, acc5 (percent; the best min(5, K) classes).
    """
    model.eval()
    distributed.sync_buffers(model)  # rank 0's, which the checkpoint holds
    totals = torch.zeros(5, dtype=torch.float64, device=updater.device)  # loss, batches, top-1, top-5, images
    test_log = distributed.EpochLog("Test:", len(loader), loader.batch_size, updater.device, print_freq=10)
    for _, (imgs, targets) in test_log.steps(loader.batches()):
        with updater.autocast():
            logits = model(imgs, **kwargs)  # (B, K)
            loss = F.cross_entropy(logits, targets)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == targets[:, None]  # (B, 5)
        totals += torch.stack([loss, loss.new_ones(()), hits[:, 0].sum(), hits.sum(), loss.new_tensor(len(targets))])
    loss, batches, top1, top5, images = distributed.all_sum(totals.tolist())
    stats = {"loss": loss / batches, "acc1": 100 * top1 / images, "acc5": 100 * top5 / images}
    distributed.log("* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}".format(**stats))
    distributed.log(f"Accuracy of the network on the {images:.0f} test images: {stats['acc1']:.1f}%")
    return stats


def evaluate_checkpoint(path: str, model: nn.Module, loader: Loader, updater: distributed.Updater, **kwargs) -> None:
    """Load the weights of a fine-tuned or probed model, evaluate and print the accuracy; kwargs as in `evaluate`.

    Raises:
        distributed.UserError: no checkpoint was named, or it does not fit the model.
    """
    if not path:
        raise distributed.UserError("--eval: name the checkpoint to evaluate with --resume")
    loader.match_classes(distributed.load_weights(model, path), path)
    evaluate(model, loader, updater, **kwargs)


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
    logged: tuple[str, ...] | None = None,
    best_name: str = "",
    **kwargs,
) -> None:
    """Train from the checkpoint `resume` ('': anew) to the last epoch, evaluating, logging and saving each.

    Args:
        val_loader: None evaluates nothing.
        logged: training statistics that log.txt gets; None: all.
        best_name: name of the file that keeps the epoch of the best accuracy; '' keeps none. kwargs: as in `evaluate`.
    """
    plain = distributed.unwrap(model)
    n_parameters = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    position = checkpoint.resume(resume, args.start_epoch)
    if ema is not None and "model_ema" in checkpoint.missing:
        ema.set(plain)
    tags = {"loss": "loss/loss", "class_acc": "loss/class_acc"}
    tags |= {name: f"opt/{name}" for name in ("loss_scale", "lr", "min_lr", "weight_decay", "grad_norm")}
    for epoch, epoch_log in checkpoint.epochs(loader, position, tags):
        with checkpoint.on_exit(epoch_log):
            stats = train_one_epoch(model, criterion, loader, updater, rates, epoch_log, mixup, ema, args.seed)
        line = {f"train_{k}": v for k, v in stats.items() if logged is None or k in logged}
        if val_loader is not None:
            checkpoint.save(epoch_log.position(len(loader)))  # an evaluation may be stopped: it is repeated from here
            test = evaluate(plain, val_loader, updater, **kwargs)
            improved = test["acc1"] > checkpoint.best
            checkpoint.best = max(checkpoint.best, test["acc1"])
            distributed.log(f"Max accuracy: {checkpoint.best:.2f}%")
            epoch_log.run_log.scalars({f"perf/test_{k}": test[k] for k in ("acc1", "acc5", "loss")}, epoch)
            line |= {f"test_{k}": v for k, v in test.items()}
            if improved and best_name:
                checkpoint.save(distributed.Position(epoch + 1), best_name)
        epoch_log.run_log.epoch(line | {"epoch": epoch, "n_parameters": n_parameters})
        checkpoint.save(distributed.Position(epoch + 1))
    distributed.log(f"{args.epochs} epochs done; {checkpoint.files.latest} is in {args.output_dir or 'no folder'}")
