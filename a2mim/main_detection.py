"""Object detection and instance segmentation: Mask R-CNN on A2MIM's encoders. Rows: scripts/a2mim_*.sh detection.

The defaults are the authors' configuration of ViT-B, 8 GPUs x 2 images; --recipe names those of ResNet-50.
"""

import argparse
import itertools
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from a2mim.detection_heads import MaskRCNN
from a2mim.engine_detection import batch_loss, evaluate, fit
from a2mim.models_detection import MODELS, VITS, load_encoder
from common import datasets, distributed, lr_sched
from common.dense_datasets import detection
from common.dense_datasets.views import EvalTransform, TrainTransform
from common.distributed import sync_bn

_R50 = "--opt sgd --lr 0.02 --weight_decay 1e-4 --crop_short_sides --model mask_rcnn_r50_"
_MMDET = _R50 + "{} --short_sides 800"
_D2 = _R50 + "{} --warmup_iters 1000 --short_sides 640 672 704 736 768 800 --precise_bn 200"
_2X = " --epochs 24 --warmup_iters 1000 --lr_drops 16 23"
RECIPES = {  # the flags that differ from the defaults
    "vit_1x": "",
    **{f"r50_{kind}_1x": _MMDET.format(kind) + " --lr_drops 8 11" for kind in ("c4", "fpn")},
    **{f"r50_{kind}_2x": _MMDET.format(kind) + _2X for kind in ("c4", "fpn")},
    # For detectron2, of 90,000 and 180,000 updates (12.3 and 24.6 epochs), in whole epochs.
    "d2_r50_c4_1x": _D2.format("c4") + " --long_side 1200 --lr_drops 8 11",
    "d2_r50_c4_2x": _D2.format("c4") + " --long_side 1200 --epochs 24 --lr_drops 16 22",
    "d2_r50_fpn_1x": _D2.format("fpn_2fc") + " --lr_drops 8 11",
    "d2_r50_fpn_2x": _D2.format("fpn_2fc") + " --epochs 24 --lr_drops 16 22",
}
ROWS = {  # by what an mmdetection configuration has in its name
    "vit_base": "",
    **{f"r50[-_]{kind}.*{time}": f"--recipe=r50_{kind}_{time}" for kind in ("c4", "fpn") for time in ("1x", "2x")},
}
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("long_side", "test_short_side", "test_long_side"), (32, math.inf)),
    **dict.fromkeys(("warmup_iters", "eval_interval", "save_pictures", "precise_bn"), (0, math.inf)),
    "save_ckpt_freq": (1, math.inf),
}


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("A2MIM object detection")
    g = distributed.flag_groups(p)
    p.add_argument("--recipe", default="vit_1x", choices=[*RECIPES], help="defaults of all other flags")
    # ---- data and views
    detection.add_flags(p)
    sides = "short sides of training images in pixels, of which one is drawn"
    g.augmentation.add_argument("--short_sides", type=int, nargs="+", default=[*range(480, 801, 32)], help=sides)
    meant = "short sides of 640 to 800 pixels, which the authors' configurations of ResNet-50 mean but do not use"
    g.augmentation.add_argument("--multi_scale", action="store_true", help=meant)
    g.augmentation.add_argument("--long_side", type=int, default=1333, help="longest side of a training image")
    part = "half of the training images are resized to one of these short sides, cropped, and resized again"
    g.augmentation.add_argument("--crop_short_sides", type=int, nargs="*", default=[400, 500, 600], help=part)
    least = "smallest and largest side of that crop in pixels"
    g.augmentation.add_argument("--crop_range", type=int, nargs=2, default=[384, 600], help=least)
    g.output.add_argument("--test_short_side", type=int, default=800, help="short side of images in evaluations")
    g.output.add_argument("--test_long_side", type=int, default=1333, help="and their longest side")
    # ---- model
    g.model.add_argument("--model", default="mask_rcnn_vit_base", choices=[*MODELS], help="network")
    g.model.add_argument("--pretrained", default="", help="checkpoint with the encoder; '' starts from random weights")
    skipped = "probability of skipping a ViT's last block in training; lower for earlier ones"
    g.augmentation.add_argument("--drop_path", default=0.2, type=float, help=skipped)
    recompute = "compute what is inside a ViT's blocks again in the backward pass"
    g.process.add_argument("--use_checkpoint", action="store_true", help=recompute)
    # ---- optimizer
    g.optimizer.add_argument("--batch_size", default=2, type=int, help="images per process in one forward pass")
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="batches per update")
    g.optimizer.add_argument("--epochs", default=12, type=int, help="passes over the training images")
    g.optimizer.add_argument("--opt", default="adamw", choices=["adamw", "sgd"], help="optimizer; sgd: momentum 0.9")
    g.optimizer.add_argument("--lr", default=3e-4, type=float, help="learning rate, for 16 images per update")
    decayed = "weight decay of all weights, as upstream: of biases, norms and positions, too"
    g.optimizer.add_argument("--weight_decay", default=0.05, type=float, help=decayed)
    drops = "epochs, counted from 0, that begin with a tenth of the learning rate before them"
    g.optimizer.add_argument("--lr_drops", type=int, nargs="*", default=[9, 11], help=drops)
    g.optimizer.add_argument("--warmup_iters", default=500, type=int, help="updates in which the learning rate rises")
    # ---- evaluation, files, process
    precise = "training batches over which batch norms average their statistics anew before evaluations; 0: they do not"
    g.output.add_argument("--precise_bn", default=0, type=int, metavar="N", help=precise)
    folder = "folder of checkpoints and log.txt; '' writes nothing"
    g.output.add_argument("--output_dir", "--work_dir", default="", help=folder)
    g.output.add_argument("--save_ckpt_freq", default=1, type=int, help="epochs between the kept files epoch_<n>.pth")
    every = "epochs between evaluations; 0: after the last"
    g.output.add_argument("--eval_interval", default=1, type=int, help=every)
    only = "only evaluate the checkpoint of --resume or of --output_dir, the authors' or ours"
    g.output.add_argument("--eval", action="store_true", help=only)
    drawn = "images of which the last evaluation writes a picture, in pictures/ of --output_dir"
    g.output.add_argument("--save_pictures", default=0, type=int, metavar="N", help=drawn)
    distributed.add_flags(p)
    g.process.add_argument("--deterministic", action="store_true", help="deterministic kernels on a GPU")
    return p


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of a command line on top of those of its --recipe."""
    argv = sys.argv[1:] if argv is None else argv
    parser = get_args_parser()
    recipe = parser.parse_args(argv).recipe
    flags = get_args_parser().parse_args(RECIPES[recipe].split())
    distributed.preset(parser, f"--recipe {recipe}", {name: getattr(flags, name) for name in flags.given})
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that are out of range or do not fit together."""
    distributed.check_ranges(args, RANGES)
    for name in ("short_sides", "crop_short_sides", "crop_range"):
        values = getattr(args, name)
        if any(value < 32 for value in values) or (name == "crop_range" and values[0] > values[1]):
            shown = " ".join(map(str, values))
            raise distributed.UserError(f"--{name} {shown}: expected sides of 32 pixels or more, rising")
    if args.save_pictures and not args.output_dir:
        raise distributed.UserError(f"--save_pictures {args.save_pictures}: needs --output_dir")


def refuse_mmdet(state: dict, *_) -> None:
    """Raise ValueError for a training state of the authors' program, which counts its progress in another way."""
    if "epoch" not in state:
        raise ValueError("it is mmdet's; such a file can be evaluated, but not be continued")


def build_model(args: argparse.Namespace) -> MaskRCNN:
    """The network of the flags; raises UserError for values that do not fit together."""
    kwargs: dict[str, Any] = {"in_chans": args.in_chans or 3}
    if args.model in VITS:
        largest = math.ceil(max(args.long_side, args.test_long_side) / 32) * 32  # of padded images
        kwargs |= {"img_size": largest, "drop_path_rate": args.drop_path, "use_checkpoint": args.use_checkpoint}
    with distributed.user_errors(f"--model {args.model}"):
        return MODELS[args.model](num_classes=len(args.class_names), **kwargs)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """As upstream: all weights are decayed (the rule that would exempt norms and biases of the ViT is misspelt)."""
    if args.opt == "sgd":
        return torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)
    kwargs: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": args.weight_decay, "fused": True}
    return torch.optim.AdamW(model.parameters(), args.lr, **kwargs)


@torch.no_grad()
def average_statistics(model: MaskRCNN, loader: datasets.Loader, epoch: int, count: int, seed: int) -> None:
    """Set the running statistics of batch norms to their plain means over an epoch's first batches ("precise BN").

    Args:
        count: of batches, on every process; the random draws in them depend on (seed, rank, number) alone.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for number, (images, targets) in enumerate(itertools.islice(loader.batches(epoch), count)):
        for norm in norms:
            norm.momentum = 1 / (number + 1)  # the first batch replaces what was there
        distributed.seed_step(seed, number)
        model(images, *map(list, zip(*targets, strict=True)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def main(args: argparse.Namespace) -> None:
    check(args)
    device = distributed.init(args.device, args.deterministic)
    torch.manual_seed(args.seed + distributed.rank())
    # ---- data
    short_sides = range(640, 801, 32) if args.multi_scale else args.short_sides
    statistics = datasets.statistics(args)[:2]
    views = TrainTransform(short_sides, args.long_side, args.crop_short_sides, args.crop_range, statistics)
    whole = EvalTransform(args.test_short_side, args.test_long_side, statistics)
    loader, val_loader, images = detection.detection_loaders(args, device, views, whole)
    # ---- model
    resume = distributed.find_checkpoint(args.output_dir, args.resume)
    model = build_model(args)
    if args.pretrained and not resume:
        load_encoder(model, args.pretrained)
    elif not resume:
        distributed.log("WARNING: no --pretrained, the encoder is random")
    model.to(device)
    if loader is None:
        if not resume:
            raise distributed.UserError("--eval: name the checkpoint to evaluate with --resume")
        distributed.load_weights(model, resume)
        evaluate(model, val_loader, images, args.output_dir, args.save_pictures)
        return
    datasets.check_memory(args, model, batch_loss, loader)
    net = distributed.wrap(sync_bn.convert(model, device), device, args.compile)
    # ---- optimizer
    optimizer = build_optimizer(args, model)
    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, buffers=sync_bn.statistics(model))
    updates = len(loader) // args.accum_iter

    def rate(epoch: int, step: int) -> float:
        update = epoch * updates + step // args.accum_iter
        return lr_sched.warmup_drops(update, epoch, args.lr, args.lr_drops, args.warmup_iters, ratio=1e-3)

    n_parameters = sum(p.numel() for p in model.parameters())
    per_update = args.batch_size * args.accum_iter * distributed.world_size()
    distributed.log(
        f"{args.model}: {n_parameters:,} parameters on {device}, {updater.dtype}; {loader.images} images, "
        f"{per_update} per update, lr {args.lr:.2e}, {len(images.classes)} classes"
    )
    # ---- loop
    files = distributed.Files(
        numbered="epoch_{done}.pth", weights="state_dict", every=args.save_ckpt_freq, phase=1, adapt=refuse_mmdet
    )
    parts = {"optimizer": optimizer, "scaler": updater.scaler}
    checkpoint = distributed.Checkpoint(args.output_dir, args, model, files, **parts)
    precise = partial(average_statistics, model, loader, count=args.precise_bn, seed=args.seed)
    fit(args, net, loader, val_loader, images, updater, rate, checkpoint, resume, precise)


if __name__ == "__main__":
    distributed.run(main, parse_args)
