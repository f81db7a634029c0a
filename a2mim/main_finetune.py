"""Fine-tuning of a pre-trained encoder with labels. Recipes: configs/openmixup/finetune, scripts/a2mim_*, simmim_*."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from a2mim import config, data, optim, training
from a2mim.backbones import BACKBONES
from a2mim.config import boolean
from a2mim.engine_finetune import evaluate_checkpoint, fit
from a2mim.files import resume_path, run_files
from a2mim.mix import Mix, ft_loss
from a2mim.models_a2mim import Classifier, build_classifier
from common import datasets, distributed


def get_args_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("A2MIM fine-tuning", allow_abbrev=False, usage="%(prog)s [CONFIG] [flags], see --help")
    config.add_flags(p)
    p.add_argument("--method", default="finetune", choices=["finetune", "linear"], help="for tools/train.py")
    p.add_argument("--epochs", default=100, type=int)
    p.add_argument("--batch_per_gpu", "--batch_size", dest="batch_size", default=128, type=int, help="and micro-step")
    p.add_argument("--accum", "--accum_iter", dest="accum_iter", default=1, type=int, help="micro-steps per update")
    # ---- model
    p.add_argument("--backbone", default="resnet50", help=", ".join(BACKBONES))
    p.add_argument("--patch_size", default=16, type=int, help="of a ViT, in pixels")
    p.add_argument("--drop_path", default=0.0, type=float, help="stochastic depth")
    p.add_argument("--nb_classes", default=1000, type=int)
    p.add_argument("--resize_rel_pos", action="store_true", help="of another grid in --pretrained; default: start at 0")
    p.add_argument("--fp32_encoder", default=False, type=boolean, nargs="?", const=True, help="autocast: the head only")
    p.add_argument("--ema", default=0.0, type=float, help="momentum of the weights' average; 0 has none")
    p.add_argument("--ema_warmup_iters", default=0, type=int, help="iterations in which it grows from 0.9 of that")
    p.add_argument("--ema_update_interval", default=1, type=int, help="iterations between its updates")
    # ---- optimizer
    p.add_argument("--opt", default="adamw", choices=optim.OPTIMIZERS)
    p.add_argument("--lr", default=1e-2, type=float, help="absolute")
    p.add_argument("--weight_decay", default=0.05, type=float)
    p.add_argument("--betas", default=[0.9, 0.999], type=float, nargs=2)
    p.add_argument("--eps", default=1e-8, type=float, help="of AdamW")
    p.add_argument("--momentum", default=0.9, type=float, help="of SGD")
    p.add_argument("--paramwise", default=[], type=config.patterns, help="options of parameters whose name matches")
    p.add_argument("--layer_decay", default=None, type=float, help="factor on the learning rate per layer; ViT: 0.65")
    p.add_argument("--clip_grad", default=None, type=float, help="largest gradient norm; ViTs: 5")
    p.add_argument("--amp", default=True, type=boolean, help="false: float32; --amp_dtype bf16 or fp16 wins")
    p.add_argument("--sync_bn", default=False, type=boolean, help="batch statistics over all processes")
    # ---- schedule, by iteration
    p.add_argument("--sched", default="CosineAnnealing", choices=optim.POLICIES)
    p.add_argument("--min_lr", default=0.0, type=float)
    p.add_argument("--warmup_epochs", default=0, type=int)
    p.add_argument("--warmup_ratio", default=1e-5, type=float, help="of the learning rate, where the warm-up starts")
    p.add_argument("--by_epoch", default=False, type=boolean, help="CosineAnnealing: constant within an epoch")
    p.add_argument("--steps", default=[], type=int, nargs="*", help="step: epochs at which the rate falls")
    p.add_argument("--gamma", default=0.1, type=float, help="step: factor by which it falls")
    # ---- augmentation and loss
    p.add_argument("--aug", default="swin", choices=["swin", "rsb", "plain"], help="rsb: RandAugment of --ra_level")
    p.add_argument("--train_size", "--input_size", dest="train_size", default=224, type=int, help="in pixels")
    p.add_argument("--ra_level", default=7, type=int, help="magnitude, 0 to 10")
    p.add_argument("--val_resize", default=256, type=int, help="shorter side before the crop")
    p.add_argument("--val_crop", default=224, type=int)
    p.add_argument("--repeated_aug", default=False, type=boolean, help="each image thrice, a third of them per epoch")
    p.add_argument("--bce", default=False, type=boolean, help="binary cross entropy")
    p.add_argument("--smoothing", default=0.1, type=float, help="of labels, without --bce")
    p.add_argument("--mixup", default=0.0, type=float, help="alpha of Mixup; 0: off")
    p.add_argument("--cutmix", default=0.0, type=float, help="alpha of CutMix; 0: off")
    # ---- data, files, process
    datasets.add_flags(p)
    p.add_argument("--save_every", default=10, type=int, help="epochs between the numbered checkpoints")
    p.add_argument("--eval", action="store_true", help="only evaluate the checkpoint of --resume")
    distributed.add_flags(p)
    p.set_defaults(data_path="data/ImageNet")
    return p


def build_model(args: argparse.Namespace, **overrides) -> Classifier:
    """The network of the flags (and overrides by keyword); raises UserError for values that do not fit together."""
    keywords: dict[str, Any] = {"num_classes": args.nb_classes, "img_size": args.train_size}
    if "vit" in args.backbone or "deit" in args.backbone:
        keywords["patch_size"] = args.patch_size
        if args.train_size != args.val_crop:
            raise distributed.UserError(
                f"--val_crop {args.val_crop}: a ViT is evaluated at its --train_size {args.train_size}"
            )
    keywords |= {"drop_path": args.drop_path, "fp32_encoder": args.fp32_encoder}
    keywords["channels_last"] = torch.cuda.is_available() and args.device != "cpu"
    with distributed.user_errors(f"--backbone {args.backbone} --train_size {args.train_size}"):
        return build_classifier(args.backbone, **{**keywords, **overrides})


def build_loaders(args: argparse.Namespace, device: torch.device) -> tuple[datasets.Loader | None, datasets.Loader]:
    """Training (not with --eval) and validation batches of the flags, whose classes agree."""
    with distributed.user_errors(f"--aug {args.aug} --ra_level {args.ra_level}"):
        augment = data.finetune_transform(args.aug, args.train_size, args.ra_level)
    train = None if args.eval else data.images(args, train=True, labelled=True)
    val = data.images(args, train=False, labelled=True)
    args.class_names = datasets.check_classes(train, val, args.nb_classes)
    view = data.eval_transform(args.val_resize, args.val_crop)
    val_loader = datasets.build_loader(args, val, view, device, train=False)
    if train is None:
        return None, val_loader
    loader = data.train_loader(args, train, augment, device, args.repeated_aug)
    training.check_last_batch(args, loader, args.train_size)
    return loader, val_loader


def build_optimizer(args: argparse.Namespace, model: Classifier, lr: float) -> torch.optim.Optimizer:
    """--opt with the options of --paramwise and --layer_decay."""
    return optim.build_optimizer(args, optim.param_groups(model, {**optim.optimizer_cfg(args), "lr": lr}))


def run(
    args: argparse.Namespace,
    model: Classifier,
    device: torch.device,
    loaders: tuple[datasets.Loader | None, datasets.Loader],
    train: Callable[[], Any],
) -> None:
    """Load, train, evaluate as the flags say.

    Args:
        model: with its frozen parts frozen. train: puts its parts into training mode.
    """
    loader, val_loader = loaders
    # ---- model
    if loader is None:
        training.prepare(args, model, device, starts=False)
        found = distributed.find_checkpoint(args.output_dir, args.resume, "latest.pth")
        updater = distributed.Updater(optim.no_updates(), device, training.precision(args))
        evaluate_checkpoint(found, model, val_loader, updater)
        return
    resume = resume_path(args)
    net = training.prepare(args, model, device, starts=not resume, resize_rel_pos=args.resize_rel_pos)
    ema = None
    if args.ema:  # of weights that are those of process 0 by now
        ema = optim.EMA(model, args.ema, warmup_iters=args.ema_warmup_iters, update_interval=args.ema_update_interval)
    # ---- optimizer
    optimizer = build_optimizer(args, model, args.lr)
    updater = training.build_updater(args, optimizer, model, loader)
    # ---- loop
    checkpoint = distributed.Checkpoint(
        args.output_dir,
        args,
        optim.Weights(model, ema),
        run_files(args, len(loader)),
        optimizer=optim.OfficialOptimizer(optimizer, model),
        scaler=updater.scaler,
    )
    criterion = partial(ft_loss, kind="bce" if args.bce else "label_smooth", smoothing=args.smoothing)
    mixing = Mix(args.mixup, args.cutmix) if args.mixup or args.cutmix else None
    fit(args, net, train, criterion, loader, val_loader, updater, checkpoint, resume, mixing, ema)


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device, args.deterministic)
    torch.manual_seed(args.seed + distributed.rank())
    distributed.log(f"{Path(__file__).name} {vars(args)}")
    loaders = build_loaders(args, device)
    model = build_model(args)
    run(args, model, device, loaders, model.train)


if __name__ == "__main__":
    distributed.run(main, lambda: config.parse_args(get_args_parser()))
