"""Object detection and instance segmentation: Mask R-CNN on UDI's ViT. Recipe of the rows: scripts/udi_*.sh detection.

The defaults are the authors' configuration mask_rcnn_vit_small_12_p16_1x_coco, 1 image per GPU; how many GPUs they had
is not said, here 8.
"""

import argparse
import math
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn

from common import datasets, distributed, lr_sched
from common.dense_datasets import detection
from common.dense_datasets.views import EvalTransform, TrainTransform
from common.distributed import sync_bn
from udi.dense_backbone import load_patches
from udi.detection_heads import MaskRCNN
from udi.engine_detection import batch_loss, evaluate, fit
from udi.flags import ARCHS
from udi.models_detection import HEADS, mask_rcnn

# Flags of the authors' configuration that are not our defaults.
ROWS = {"mask_rcnn_vit_small_12_p16_1x_coco": ""}
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("long_side", "test_short_side"), (32, math.inf)),
    **dict.fromkeys(("warmup_iters", "eval_interval", "save_pictures"), (0, math.inf)),
    "save_ckpt_freq": (1, math.inf),
}


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI object detection")
    g = distributed.flag_groups(p)
    # ---- data and views
    detection.add_flags(p)
    sides = "short sides of training images in pixels, of which one is drawn"
    g.augmentation.add_argument("--short_sides", type=int, nargs="+", default=[*range(480, 801, 32)], help=sides)
    g.augmentation.add_argument("--long_side", type=int, default=1333, help="longest side of an image in pixels")
    part = "half of the training images are resized to one of these short sides, cropped, and resized again"
    g.augmentation.add_argument("--crop_short_sides", type=int, nargs="*", default=[400, 500, 600], help=part)
    least = "smallest and largest side of that crop in pixels"
    g.augmentation.add_argument("--crop_range", type=int, nargs=2, default=[384, 600], help=least)
    g.output.add_argument("--test_short_side", type=int, default=800, help="short side of images in evaluations")
    # ---- model
    g.model.add_argument("--arch", default="vit_small", choices=ARCHS, help="backbone")
    decides = "patch side in pixels, 8 or 16; that of a checkpoint wins"
    g.model.add_argument("--patch_size", default=16, type=int, help=decides)
    narrow = "width of pyramid and heads; narrow: for images of 128 pixels on a CPU"
    g.model.add_argument("--heads", default="wide", choices=[*HEADS], help=narrow)
    start = "checkpoint of the backbone; '' starts from random weights"
    g.model.add_argument("--pretrained_weights", default="", help=start)
    network = "network of the checkpoint: teacher or student"
    g.model.add_argument("--checkpoint_key", default="teacher", help=network)
    skipped = "probability of skipping the last block in training; lower for earlier ones"
    g.augmentation.add_argument("--drop_path", default=0.05, type=float, help=skipped)
    # ---- optimizer
    g.optimizer.add_argument("--batch_size", default=1, type=int, help="images per process in one forward pass")
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="batches per update")
    g.optimizer.add_argument("--epochs", default=12, type=int, help="passes over the training images")
    g.optimizer.add_argument("--lr", default=5e-5, type=float, help="learning rate, for 8 images per update")
    decayed = "weight decay of all but positions and the ViT's norms, as upstream: of biases and batch norms, too"
    g.optimizer.add_argument("--weight_decay", default=0.05, type=float, help=decayed)
    drops = "epochs, counted from 0, that begin with a tenth of the learning rate before them"
    g.optimizer.add_argument("--lr_drops", type=int, nargs="*", default=[8, 11], help=drops)
    g.optimizer.add_argument("--warmup_iters", default=1000, type=int, help="updates in which the learning rate rises")
    # ---- evaluation, files, process
    g.output.add_argument("--output_dir", default="", help="folder of checkpoints and log.txt; '' writes nothing")
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


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: everything, and positions and the ViT's norms without weight decay.

    As upstream: its rule looks for "norm" in names, which no batch norm has; biases are decayed, too.
    """
    exempt = ("pos_embed", "cls_token", "norm")
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[any(word in name for word in exempt)]["params"].append(parameter)
    return groups


def refuse_mmdet(state: dict, *_) -> None:
    """Raise ValueError for a training state of the authors' program, which counts its progress in another way."""
    if "epoch" not in state:
        raise ValueError("it is mmdet's; such a file can be evaluated or give its encoder, but not be continued")


def build_model(args: argparse.Namespace, weights: dict | None) -> MaskRCNN:
    """The network of the flags; raises UserError for values that do not fit together."""
    return mask_rcnn(
        len(args.class_names),
        **HEADS[args.heads],
        arch=args.arch,
        patch_size=args.patch_size,
        weights=weights,
        drop_path_rate=args.drop_path,
        in_chans=args.in_chans or 3,
    )


def main(args: argparse.Namespace) -> None:
    check(args)
    device = distributed.init(args.device, args.deterministic)
    torch.manual_seed(args.seed + distributed.rank())
    # ---- data
    statistics = datasets.statistics(args)[:2]
    views = TrainTransform(args.short_sides, args.long_side, args.crop_short_sides, args.crop_range, statistics)
    whole = EvalTransform(args.test_short_side, args.long_side, statistics)
    loader, val_loader, images = detection.detection_loaders(args, device, views, whole)
    # ---- model
    resume = distributed.find_checkpoint(args.output_dir, args.resume)
    start = resume or args.pretrained_weights  # its patch size wins over the flag
    if not start:
        distributed.log("WARNING: no --pretrained_weights, the backbone is random")
    model = build_model(args, load_patches(start, args.checkpoint_key) if start else None).to(device)
    if loader is None:
        if not resume:
            raise distributed.UserError("--eval: name the checkpoint to evaluate with --resume")
        distributed.load_weights(model, resume)
        evaluate(model, val_loader, images, args.output_dir, args.save_pictures)
        return
    datasets.check_memory(args, model, batch_loss, loader)
    net = distributed.wrap(sync_bn.convert(model, device), device, args.compile)
    # ---- optimizer
    groups = param_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, buffers=sync_bn.statistics(model))
    updates = len(loader) // args.accum_iter

    def rate(epoch: int, step: int) -> float:
        update = epoch * updates + step // args.accum_iter
        return lr_sched.warmup_drops(update, epoch, args.lr, args.lr_drops, args.warmup_iters, ratio=1e-3)

    n_parameters = sum(p.numel() for p in model.parameters())
    per_update = args.batch_size * args.accum_iter * distributed.world_size()
    distributed.log(
        f"Mask R-CNN on {args.arch}: {n_parameters:,} parameters on {device}, {updater.dtype}; {loader.images} images, "
        f"{per_update} per update, lr {args.lr:.2e}, {len(images.classes)} classes"
    )
    # ---- loop
    files = distributed.Files(
        numbered="epoch_{done}.pth", weights="state_dict", every=args.save_ckpt_freq, phase=1, adapt=refuse_mmdet
    )
    parts = {"optimizer": optimizer, "scaler": updater.scaler}
    checkpoint = distributed.Checkpoint(args.output_dir, args, model, files, **parts)
    fit(args, net, loader, val_loader, images, updater, rate, checkpoint, resume)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
