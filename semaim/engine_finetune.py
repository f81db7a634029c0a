# same as saim/engine_finetune.py
"""Supervised training for fine-tuning and linear probing: one epoch, the evaluation, the whole run."""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed, lr_sched
from common.datasets import Loader


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loader: Loader,
    updater: distributed.Updater,
    schedule: Callable[[float], float],
    epoch_log: distributed.EpochLog,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train from the position of `epoch_log` to the end of its epoch.

    Args:
        model: maps images (N, 3, H, W) to logits (N, K).
        criterion: (logits, targets) -> (); targets are class indices (N,), or what `mixup` makes of them (N, K).
        schedule: learning rate at a fractional epoch, set before each update, times each group's lr_scale.
        seed: random draws (Mixup, stochastic depth) depend on (seed, rank, step) alone.
    Returns:
        means over the epoch and all ranks: lr (of the largest group), loss.
    Raises:
        distributed.Exit: a stop signal, an unreadable image or a non-finite loss.
    """
    model.train()
    updater.start_epoch()
    groups = updater.optimizer.param_groups
    for step, (imgs, targets) in epoch_log.steps(loader.batches(epoch_log.epoch, epoch_log.start)):
        if updater.is_first(step):
            lr_sched.set_lr(groups, schedule(epoch_log.epoch + step / len(loader)))
        distributed.seed_step(seed, epoch_log.epoch * len(loader) + step)
        if mixup is not None:
            imgs, targets = mixup(imgs, targets)
        with updater.forward(model, step):
            loss = criterion(model(imgs), targets)
        norm = updater.backward(loss, step)
        lr = max(group["lr"] for group in groups)
        epoch_log.update(step, updater.is_last(step), lr=lr, loss=loss, total_norm=norm)
    means = epoch_log.means()
    return {"lr": means["lr"], "loss": means["loss"]}  # upstream logs no norm here


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


def evaluate_checkpoint(path: str, model: nn.Module, loader: Loader, updater: distributed.Updater) -> None:
    """Load the weights of a fine-tuned or probed model, evaluate and print the accuracy.

    Raises:
        distributed.UserError: no checkpoint was named, or it does not fit the model.
    """
    if not path:
        raise distributed.UserError("--eval: name the checkpoint to evaluate with --resume")
    loader.match_classes(distributed.load_weights(model, path), path)
    evaluate(model, loader, updater)


def fit(
    args: argparse.Namespace,
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    loader: Loader,
    val_loader: Loader,
    updater: distributed.Updater,
    schedule: Callable[[float], float],
    checkpoint: distributed.Checkpoint,
    resume: str,
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Train from the checkpoint `resume` ('': anew) to the last epoch, evaluating, logging and saving each."""
    plain = distributed.unwrap(model)
    n_parameters = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    position = checkpoint.resume(resume, args.start_epoch)
    for epoch, epoch_log in checkpoint.epochs(loader, position, {"loss": "loss", "lr": "lr"}, ticks=1000):
        with checkpoint.on_exit(epoch_log):
            stats = train_one_epoch(model, criterion, loader, updater, schedule, epoch_log, mixup, args.seed)
        checkpoint.save(epoch_log.position(len(loader)))  # an evaluation may be stopped: it is repeated from here
        test = evaluate(plain, val_loader, updater)
        checkpoint.best = max(checkpoint.best, test["acc1"])
        distributed.log(f"Max accuracy: {checkpoint.best:.2f}%")
        epoch_log.run_log.scalars({f"perf/test_{k}": test[k] for k in ("acc1", "acc5", "loss")}, epoch)
        epoch_log.run_log.epoch(
            {f"train_{k}": v for k, v in stats.items()}
            | {f"test_{k}": v for k, v in test.items()}
            | {"epoch": epoch, "n_parameters": n_parameters}
        )
        checkpoint.save(distributed.Position(epoch + 1))
    distributed.log(f"{args.epochs} epochs done; {checkpoint.files.latest} is in {args.output_dir or 'no folder'}")
