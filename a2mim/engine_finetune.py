"""Supervised training for fine-tuning and linear probing: one epoch, the evaluation, the whole run."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from a2mim import mix, optim
from a2mim.data import normalize
from a2mim.openmixup import load_openmixup_state_dict
from common import distributed
from common.datasets import Loader


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, mix.Target | Tensor], Tensor],
    loader: Loader,
    updater: distributed.Updater,
    set_rates: Callable[[int], None],
    epoch_log: distributed.EpochLog,
    mixing: mix.Mix | None = None,
    ema: optim.EMA | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Train from the position of `epoch_log` to the end of its epoch.

    Args:
        model: maps images (B, 3, H, W) to logits (B, K).
        criterion: (logits, targets) -> (); targets are classes (B,), or what `mixing` makes of them.
        set_rates: sets the learning rates of an iteration, counted from the start of the run.
        ema: average of the weights, moved after updates.
        seed: random draws (mixing, stochastic depth) depend on (seed, rank, iteration) alone.
    Returns:
        means over the epoch and all ranks.
    Raises:
        distributed.Exit: a stop signal, an unreadable image or a non-finite loss.
    """
    updater.start_epoch()
    for step, (pixels, classes) in epoch_log.steps(loader.batches(epoch_log.epoch, epoch_log.start)):
        iteration = epoch_log.epoch * len(loader) + step
        set_rates(iteration)
        distributed.seed_step(seed, iteration)
        imgs, targets = normalize(pixels), classes
        if mixing is not None:
            imgs, targets = mixing(imgs, classes)
        with updater.forward(model, step):
            loss = criterion(model(imgs), targets)
        norm = updater.backward(loss, step)
        if ema is not None and updater.is_last(step) and (step + 1) % ema.update_interval == 0:
            ema.update(iteration, updater)
        epoch_log.update(
            step,
            updater.is_last(step),
            lr=updater.optimizer.param_groups[0]["lr"],
            loss=loss,
            grad_norm=norm,
        )
    return epoch_log.means()


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, updater: distributed.Updater) -> dict[str, float]:
    """Accuracy of a classifier over all ranks' images.

    Args:
        loader: yields (images, classes). updater: has the device and the precision.
    Returns:
        head0_top1, head0_top5 (percent; the best min(5, K) classes).
    """
    model.eval()
    distributed.sync_buffers(model)  # rank 0's, which the checkpoint holds
    totals = torch.zeros(3, dtype=torch.float64, device=updater.device)  # top-1, top-5, images
    test_log = distributed.EpochLog("Test:", len(loader), loader.batch_size, updater.device, print_freq=10)
    for _, (pixels, classes) in test_log.steps(loader.batches()):
        with updater.autocast():
            logits = model(normalize(pixels))
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == classes[:, None]
        totals += torch.stack([hits[:, 0].sum(), hits.sum(), totals.new_tensor(len(classes))])
    top1, top5, images = distributed.all_sum(totals.tolist())
    stats = {"head0_top1": 100 * top1 / images, "head0_top5": 100 * top5 / images}
    distributed.log("head0_top1: {head0_top1:.3f}, head0_top5: {head0_top5:.3f}".format(**stats))
    return stats


def evaluate_checkpoint(path: str, model: nn.Module, loader: Loader, updater: distributed.Updater) -> None:
    """Load the (averaged) weights of a fine-tuned or probed model, evaluate and print the accuracy.

    Raises:
        distributed.UserError: no checkpoint was named, or it does not fit the model.
    """
    if not path:
        raise distributed.UserError("--eval: name the checkpoint to evaluate with --resume")
    state = distributed.load(path)
    loader.match_classes(state, path)
    weights = distributed.weights_of(state, path)
    with distributed.user_errors(path):
        load_openmixup_state_dict(model, weights)  # type: ignore[arg-type]
    evaluate(model, loader, updater)


def fit(
    args: argparse.Namespace,
    model: nn.Module,
    train: Callable[[], None],
    criterion: Callable[[Tensor, mix.Target | Tensor], Tensor],
    loader: Loader,
    val_loader: Loader,
    updater: distributed.Updater,
    checkpoint: distributed.Checkpoint,
    resume: str,
    mixing: mix.Mix | None = None,
    ema: optim.EMA | None = None,
) -> None:
    """Train from the checkpoint `resume` ('': anew) to the last epoch, evaluating, logging and saving each.

    Args:
        train: puts the model's parts into training mode.
    """
    plain = distributed.unwrap(model)
    schedule = optim.lr_config(args)
    optim.check_schedule(schedule)
    position = checkpoint.resume(resume, args.start_epoch)
    tags = {name: f"train/{name}" for name in ("loss", "lr", "grad_norm")}
    for epoch, epoch_log in checkpoint.epochs(loader, position, tags, "Epoch: [{done}]"):
        train()
        with checkpoint.on_exit(epoch_log, updater):
            stats = train_one_epoch(
                model,
                criterion,
                loader,
                updater,
                lambda it: optim.set_rates(updater.optimizer.param_groups, schedule, it, len(loader), args.epochs),
                epoch_log,
                mixing,
                ema,
                args.seed,
            )
        checkpoint.save(epoch_log.position(len(loader)))  # an evaluation may be stopped: it is repeated from here
        test = evaluate(ema.averaged() if ema is not None else plain, val_loader, updater)
        epoch_log.run_log.scalars({f"val/{k}": v for k, v in test.items()}, (epoch + 1) * len(loader))
        line = {f"train_{k}": v for k, v in stats.items()} | {f"val_{k}": v for k, v in test.items()}
        epoch_log.run_log.epoch(line | {"epoch": epoch + 1})
        checkpoint.save(distributed.Position(epoch + 1))
    distributed.log(f"{args.epochs} epochs done; latest.pth is in {args.output_dir or 'no folder'}")
