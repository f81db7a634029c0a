"""The training recipe of the semi-supervised and transfer evaluations, DeiT's: network, transforms, optimizer, loop."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler_factory import create_scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torchvision import transforms

from common import datasets, distributed, lr_decay
from udi.backbone import load_backbone
from udi.engine_finetune import evaluate, fit
from udi.files import TextLog, folder_beside
from udi.flags import SCHEDULES
from udi.models_eval import EvaluationViT, build_evaluation_vit
from udi.optim import build_mixup, create_optimizer


def build_model(args: argparse.Namespace, path: str, key: str) -> EvaluationViT:
    """The network of the flags without a head, with a checkpoint's weights; '' takes random ones."""
    weights = None
    if path:
        weights = load_backbone(path, key, args.class_tokens)
    else:
        distributed.log("WARNING: no --pretrained_weights, training from scratch")
    return build_evaluation_vit(
        args.arch,
        args.patch_size,
        weights,
        args.input_size,
        avgpool_patchtokens=args.avgpool_patchtokens,
        drop_rate=args.drop,
        attn_drop_rate=args.attn_drop_rate,
        drop_path_rate=args.drop_path,
        in_chans=args.in_chans or 3,
    )


def build_transforms(args: argparse.Namespace) -> tuple[Any, Any]:
    """Training and evaluation transforms of the flags."""
    mean, std, in_chans = datasets.statistics(args)
    with distributed.user_errors(f"--aa {args.aa} --remode {args.remode} --train-interpolation"):
        augment = datasets.finetune_transform(
            args.input_size,
            args.color_jitter,
            None if args.aa in ("", "none") else args.aa,
            args.reprob,
            args.remode,
            args.recount,
            args.train_interpolation,
            mean,
            std,
            in_chans=in_chans,
        )
    if args.input_size <= 32:  # as upstream, but for images that are not of that size yet
        resize = transforms.Resize(args.input_size, interpolation=transforms.InterpolationMode.BICUBIC)
        crop = transforms.RandomCrop(args.input_size, padding=4)
        augment.transforms[:1] = [resize, crop]
    return augment, datasets.eval_transform(args.input_size, 224 / 256, mean, std, in_chans)


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """--opt; biases and norms take no weight decay, class tokens and positions do."""
    return create_optimizer(args, lr_decay.decay_groups(model, args.weight_decay), lr)


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> Any:
    """timm's scheduler of the flags; None for a constant rate."""
    if args.sched not in SCHEDULES:
        raise distributed.UserError(f"--sched {args.sched}: expected one of {', '.join(SCHEDULES)}")
    with distributed.user_errors(f"--sched {args.sched} and its flags"):
        return create_scheduler(args, optimizer)[0]


def set_lr(scheduler: Any, epoch: int) -> None:
    """Set the learning rate of an epoch.

    As upstream: a schedule is stepped with an epoch's number after that epoch, so the second epoch repeats the first
    one's rate and the last value is never used.
    """
    if scheduler is not None and epoch > 0:
        scheduler.step(epoch - 1)


def rates(
    args: argparse.Namespace, scheduler: Any, optimizer: torch.optim.Optimizer, epoch: int, _step: int
) -> tuple[float, float]:
    """Learning rate, as the scheduler sets it, and weight decay of an epoch."""
    set_lr(scheduler, epoch)
    return optimizer.param_groups[0]["lr"], args.weight_decay


# ---- the loop


class DeitFiles(distributed.Files):
    """Names with an underscore. A newest checkpoint that is not checkpoint.pth leaves this name to the one before."""

    def variant(self, word: str) -> str:
        if word == "previous" and self.latest != "checkpoint.pth":
            return "checkpoint.pth"
        return f"checkpoint_{word}.pth"


def report(
    text_log: TextLog, epoch_log: distributed.EpochLog, stats: dict[str, float], test: dict[str, float], best: float
) -> dict[str, float]:
    """As `udi.engine_finetune.report`, into text_log, too."""
    epoch_log.run_log.scalars({f"test/{k}": v for k, v in test.items()}, (epoch_log.epoch + 1) * epoch_log.total)
    text_log(
        f"epoch {epoch_log.epoch}: train loss {stats['loss']:.4f}, test loss {test['loss']:.4f}, "
        f"Acc@1 {test['acc1']:.3f}, Acc@5 {test['acc5']:.3f}, max accuracy {best:.3f}"
    )
    return {"max_accuracy": best}


def run_key(
    args: argparse.Namespace,
    device: torch.device,
    path: str,
    key: str,
    folder: str,
    add_head: Callable[[EvaluationViT, str, str], None],
    sets: tuple[Any, Any],
    files: DeitFiles,
    sampler: Callable[[], Any],
) -> None:
    """Train and evaluate the network `key` of the checkpoint `path`, with results in a folder; the rest as `run`."""
    torch.manual_seed(args.seed)
    found = (distributed.find_checkpoint(folder, args.resume, name) for name in (files.latest, "checkpoint.pth"))
    resume = next(filter(None, found), "")
    distributed.hold_flags(args, resume)
    if args.eval and not resume:
        raise distributed.UserError(f"--eval: {folder} has no checkpoint; name one with --resume")
    # ---- data
    train, val = sets
    transform, val_transform = build_transforms(args)
    args.nb_classes = len(train.classes)
    with distributed.user_errors("--mixup, --cutmix and their options"):
        mixup = build_mixup(args)
    own = {"seed": args.seed, "accum_iter": args.accum_iter}
    loader = None if args.eval else datasets.build_loader(args, train, transform, device, sampler=sampler(), **own)
    view = {"train": False, "batch_size": int(1.5 * args.batch_size)}
    val_loader = datasets.build_loader(args, val, val_transform, device, **view)
    loader = val_loader if loader is None else loader
    # ---- model
    model = build_model(args, path, key)
    add_head(model, path, key)
    model.to(device)
    if not args.eval:
        datasets.check_memory(args, model, lambda net, batch: net(batch[0]), loader)
    net = distributed.wrap(model, device, args.compile)
    place = torch.device("cpu") if args.model_ema_force_cpu else None
    ema = ModelEmaV3(model, args.model_ema_decay, device=place) if args.model_ema else None
    # ---- optimizer
    images_per_update = args.batch_size * args.accum_iter * distributed.world_size()
    lr = args.lr * images_per_update / 512
    optimizer = build_optimizer(args, model, lr)
    scheduler = build_scheduler(args, optimizer)
    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, args.clip_grad)
    distributed.log(
        f"{args.arch} ({key}): {sum(p.numel() for p in model.parameters()):,} parameters on {device}, "
        f"{updater.dtype}; {loader.images} images, {images_per_update} per update, lr {lr:.2e}"
    )
    # ---- loop
    if args.eval:
        val_loader.match_classes(distributed.load_weights(model, resume), resume)
        evaluate(model, val_loader, updater)
        return
    parts: dict[str, Any] = {"optimizer": optimizer, "scaler": updater.scaler, "lr_scheduler": scheduler}
    parts = {name: part for name, part in {**parts, "model_ema": ema and ema.module}.items() if part is not None}
    checkpoint = distributed.Checkpoint(folder, args, model, files, **parts)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else args.smoothing)  # mixup's targets hold it
    by_step, tags = partial(rates, args, scheduler, optimizer), {"loss": "train/loss", "lr": "train/lr"}
    told: dict[str, Any] = {"tags": tags, "report": partial(report, TextLog(folder, "train.log"))}
    fit(args, net, criterion, loader, val_loader, updater, by_step, checkpoint, resume, mixup, ema, **told)


def run(
    args: argparse.Namespace,
    device: torch.device,
    folder: str,
    add_head: Callable[[EvaluationViT, str, str], None],
    sets: tuple[Any, Any],
    files: DeitFiles,
    sampler: Callable[[], Any] = lambda: None,
) -> None:
    """Train and evaluate as the flags say, once per --checkpoint_key.

    Args:
        folder: of the results, under the folder of the weights, unless --output_dir is given.
        add_head: gives a model its head, from the weights of (path, key) if it can use them.
        sets: training and test images. files: names of the checkpoints.
        sampler: of the training images.
    Raises:
        distributed.UserError: flags do not fit together, or a file is not what it should be.
    """
    if args.distillation_type != "none":
        raise distributed.UserError(f"--distillation-type {args.distillation_type}: only none is supported")
    path = args.finetune or args.pretrained_weights
    keys = [key.strip() for key in args.checkpoint_key.split(",") if key.strip()]
    if not keys:
        raise distributed.UserError("--checkpoint_key: expected teacher, student or both, with a comma")
    folder = args.output_dir or folder_beside(path, folder)
    if args.resume == "checkpoint.pth" and not Path(args.resume).exists():
        args.resume = ""  # upstream's switch: what is in the run's folder
    if args.resume and len(keys) > 1:
        raise distributed.UserError(f"--resume: expected one --checkpoint_key, not {args.checkpoint_key}")
    for key in keys:
        own = folder if len(keys) == 1 else str(Path(folder) / key)
        run_key(args, device, path, key, own, add_head, sets, files, sampler)


def scale_classifier(classifier: nn.Linear, factor: float) -> None:
    """Multiply a fresh classifier's weights and biases by --init_scale."""
    with torch.no_grad():
        classifier.weight.mul_(factor)
        classifier.bias.mul_(factor)
