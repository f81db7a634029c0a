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
    p = config.new_parser("A2MIM fine-tuning")
    g = distributed.flag_groups(p)
    g.model.add_argument(
        "--method",
        default="finetune",
        choices=["finetune", "linear"],
        help="of a configuration: which script it is for",
    )
    # ---- model
    g.model.add_argument("--backbone", default="resnet50", help=", ".join(BACKBONES))
    g.model.add_argument("--patch_size", default=16, type=int, help="side of a patch of a ViT in pixels")
    g.model.add_argument("--drop_path", default=0.0, type=float, help="stochastic depth, probability at the last block")
    g.model.add_argument("--nb_classes", default=1000, type=int, help="number of classes")
    g.model.add_argument(
        "--resize_rel_pos",
        action="store_true",
        help="resize relative positions of --pretrained to the grid of this run; by default they start at 0 then",
    )
    g.process.add_argument(
        "--fp32_encoder",
        default=False,
        type=boolean,
        nargs="?",
        const=True,
        help="compute in float32 in spite of --amp, as the authors' programs do; a gradient scaler still works",
    )
    g.optimizer.add_argument(
        "--ema", default=0.0, type=float, help="momentum of a moving average of the weights; 0: none"
    )
    g.optimizer.add_argument(
        "--ema_warmup_iters", default=0, type=int, help="iterations in which that momentum grows from 0.9 of itself"
    )
    g.optimizer.add_argument(
        "--ema_update_interval", default=1, type=int, help="iterations between updates of the moving average"
    )
    # ---- optimizer
    optim.add_flags(p)
    g.optimizer.add_argument(
        "--layer_decay",
        default=None,
        type=float,
        help="factor on the learning rate per layer, by default 1; authors' ViTs 0.65",
    )
    p.set_defaults(lr=1e-2, warmup_ratio=1e-5)  # authors' ViTs: 1e-2; their ResNets: LAMB, 8e-3 (A3) or 5e-3 (A2)
    # ---- augmentation and loss
    g.augmentation.add_argument(
        "--aug",
        default="swin",
        choices=["swin", "rsb", "plain"],
        help="swin: timm's with random erasing; rsb: RandAugment of --ra_level; plain: crop and flip",
    )
    g.augmentation.add_argument(
        "--train_size",
        "--input_size",
        dest="train_size",
        default=224,
        type=int,
        help="side of training images in pixels",
    )
    g.augmentation.add_argument("--ra_level", default=7, type=int, help="rsb: magnitude of RandAugment, 0 to 10")
    g.augmentation.add_argument(
        "--val_resize",
        default=256,
        type=int,
        help="shorter side of validation images in pixels, before the central crop",
    )
    g.augmentation.add_argument("--val_crop", default=224, type=int, help="side of the central crop in pixels")
    g.augmentation.add_argument(
        "--repeated_aug", default=False, type=boolean, help="each image three times, a third of the images per epoch"
    )
    g.augmentation.add_argument("--bce", default=False, type=boolean, help="binary cross entropy of every class (RSB)")
    g.augmentation.add_argument("--smoothing", default=0.1, type=float, help="label smoothing, without --bce")
    g.augmentation.add_argument(
        "--mixup", default=0.0, type=float, help="alpha of Mixup, 0: off; authors: 0.8, RSB 0.1"
    )
    g.augmentation.add_argument("--cutmix", default=0.0, type=float, help="alpha of CutMix, 0: off; authors: 1")
    # ---- data, files, process
    datasets.add_flags(p)
    p.set_defaults(data_path="data/ImageNet")
    g.output.add_argument(
        "--save_every", default=10, type=int, help="epochs between numbered checkpoints, of which the newest is kept"
    )
    g.output.add_argument("--eval", action="store_true", help="only evaluate the checkpoint of --resume")
    distributed.add_flags(p)
    return p


def build_model(args: argparse.Namespace, **overrides) -> Classifier:
    """The network of the flags (and overrides by keyword); raises UserError for values that do not fit together."""
    keywords: dict[str, Any] = {"num_classes": args.nb_classes, "img_size": args.train_size}
    keywords["in_chans"] = args.in_chans or 3
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
        statistics = data.own_statistics(args)
        augment = data.finetune_transform(args.aug, args.train_size, args.ra_level, *statistics)
    train = None if args.eval else data.images(args, train=True, labelled=True)
    val = data.images(args, train=False, labelled=True)
    datasets.follow_classes(args, train, val)
    view = data.eval_transform(args.val_resize, args.val_crop, *statistics)
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
        model: its parameters that do not require a gradient stay as they are. train: switches it to training mode.
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
    distributed.hold_flags(args, resume)
    if not (resume or args.pretrained or args.load_checkpoint):
        distributed.log("WARNING: no --pretrained: the encoder has random weights")
    net = training.prepare(args, model, device, starts=not resume, resize_rel_pos=args.resize_rel_pos)
    datasets.check_memory(args, model, lambda net, batch: net(data.normalize(batch[0])), loader)
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
    loaders = build_loaders(args, device)
    model = build_model(args)
    run(args, model, device, loaders, model.train)


if __name__ == "__main__":
    distributed.run(main, lambda: config.parse_args(get_args_parser()))
