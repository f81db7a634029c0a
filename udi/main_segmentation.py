"""Semantic segmentation with UDI's ViT and Semantic FPN. Recipe of the rows: scripts/udi_*.sh segmentation.

The defaults are the authors' configuration semfpn_vit-s16_512x512_40k_ade20k, "4 x 4" images per update.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn

from common import datasets, distributed, lr_sched
from common.dense_datasets.iterations import add_flags as add_iteration_flags
from common.dense_datasets.segmentation import add_flags as add_data_flags
from common.dense_datasets.segmentation import segmentation_loaders
from common.dense_datasets.transforms import EvalTransform, TrainTransform
from common.distributed import sync_bn
from udi.dense_backbone import load_patches
from udi.engine_segmentation import batch_loss, evaluate, evaluate_checkpoint, fit
from udi.flags import ARCHS
from udi.models_segmentation import SegmentationNetwork, semantic_fpn

# Flags of the authors' configuration that are not our defaults.
ROWS = {"semfpn_vit-s16_512x512_40k_ade20k": ""}
# same as cae/main_segmentation.py
TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # ours, as is usual: the authors test one scale
NARROW = {"vit_nano": {"fpn_channels": 64, "head_channels": 32}}  # ours, for a CPU
RANGES: dict[str, tuple[float, float]] = {
    "save_interval": (1, math.inf),
    **dict.fromkeys(("warmup_iters", "save_pictures"), (0, math.inf)),
}


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI semantic segmentation")
    g = distributed.flag_groups(p)
    add_data_flags(p)
    g.data.add_argument("--input_size", default=512, type=int, help="side in pixels of the crops in training")
    sides = "longest long and short side to which images are resized; default: 4 and 1 times --input_size"
    g.data.add_argument("--scale", nargs=2, type=int, metavar=("LONG", "SHORT"), help=sides)
    # ---- model
    g.model.add_argument("--arch", default="vit_small", choices=ARCHS, help="backbone")
    decides = "patch side in pixels; that of a checkpoint wins"
    g.model.add_argument("--patch_size", default=16, type=int, help=decides)
    start = "checkpoint of the backbone; '' starts from random weights"
    g.model.add_argument("--pretrained_weights", default="", help=start)
    network = "network of the checkpoint: teacher or student"
    g.model.add_argument("--checkpoint_key", default="teacher", help=network)
    skipped = "probability of skipping the last block in training; lower for earlier ones"
    g.augmentation.add_argument("--drop_path", default=0.1, type=float, help=skipped)
    # ---- optimizer
    add_iteration_flags(p, iters=40000, eval_interval=4000)
    g.optimizer.add_argument("--batch_size", default=4, type=int, help="images per process in one forward pass")
    g.optimizer.add_argument("--lr", default=6e-5, type=float, help="highest learning rate, for 16 images per update")
    decayed = "weight decay of all but the positions, as upstream: of biases and norms, too"
    g.optimizer.add_argument("--weight_decay", default=0.01, type=float, help=decayed)
    g.optimizer.add_argument("--warmup_iters", default=1500, type=int, help="updates in which the learning rate rises")
    # ---- evaluation, files, process
    g.output.add_argument("--output_dir", default="", help="folder of checkpoints and log.txt; '' writes nothing")
    only = "only evaluate the checkpoint of --resume or of --output_dir, the authors' or ours"
    g.output.add_argument("--eval", action="store_true", help=only)
    averaged = f"average evaluations over the scales {', '.join(map(str, TTA_SCALES))} and mirrored images"
    g.output.add_argument("--tta", action="store_true", help=averaged)
    drawn = "evaluated images that are drawn with truth and prediction, in pictures/ of --output_dir"
    g.output.add_argument("--save_pictures", default=0, type=int, metavar="N", help=drawn)
    distributed.add_flags(p, counts_epochs=False)
    g.process.add_argument("--deterministic", action="store_true", help="deterministic kernels on a GPU")
    p.set_defaults(save_interval=4000, auxiliary_weight=0.0)  # there is no auxiliary head
    return p


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: everything, and the positions without weight decay.

    As upstream: its rule for norms finds no name, so that they and all biases are decayed.
    """
    positions = [p for name, p in model.named_parameters() if "pos_embed" in name]
    others = [p for name, p in model.named_parameters() if "pos_embed" not in name]
    return [{"params": others, "weight_decay": weight_decay}, {"params": positions, "weight_decay": 0.0}]


# same as cae/main_segmentation.py
def refuse_mmseg(state: dict[str, Any], *_) -> None:
    """Raise ValueError for a training state of the authors' program, which counts its progress in another way."""
    if "epoch" not in state:
        raise ValueError("it is mmseg's; such a file can be evaluated or give its encoder, but not be continued")


def build_model(args: argparse.Namespace, weights: dict | None) -> SegmentationNetwork:
    """The network of the flags; raises UserError for values that do not fit together."""
    return semantic_fpn(
        args.nb_classes,
        **NARROW.get(args.arch, {}),
        arch=args.arch,
        patch_size=args.patch_size,
        weights=weights,
        img_size=args.input_size,
        drop_path_rate=args.drop_path,
        in_chans=args.in_chans or 3,
    )


def main(args: argparse.Namespace) -> None:
    distributed.check_ranges(args, RANGES)
    device = distributed.init(args.device, args.deterministic)
    torch.manual_seed(args.seed + distributed.rank())
    if args.save_pictures and not args.output_dir:
        raise distributed.UserError(f"--save_pictures {args.save_pictures}: needs --output_dir")
    # ---- data
    size = args.input_size
    long, short = args.scale or (4 * size, size)
    statistics = datasets.statistics(args)[:2]
    crops = TrainTransform((size, size), (long, short), ratio=(0.5, 2), cat_max_ratio=0.75, statistics=statistics)
    whole = EvalTransform((long, short), TTA_SCALES if args.tta else (1.0,), statistics)
    loader, val_loader = segmentation_loaders(args, device, crops, whole)
    # ---- model
    resume = distributed.find_checkpoint(args.output_dir, args.resume)
    start = resume or args.pretrained_weights  # its patch size wins over the flag
    if not start:
        distributed.log("WARNING: no --pretrained_weights, the backbone is random")
    model = build_model(args, load_patches(start, args.checkpoint_key) if start else None).to(device)
    evaluation = partial(
        evaluate,
        loader=val_loader,
        names=args.class_names,
        pictures=args.save_pictures,
        folder=args.output_dir,
        statistics=statistics,
        flip=args.tta,
    )
    if loader is None:
        evaluate_checkpoint(resume, model, evaluation)
        return
    datasets.check_memory(args, model, partial(batch_loss, auxiliary_weight=args.auxiliary_weight), loader.loader)
    net = distributed.wrap(sync_bn.convert(model, device), device, args.compile)
    # ---- optimizer
    groups = param_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def set_rates(update: int) -> None:
        rate = lr_sched.warmup_poly(update, args.lr, args.iters, args.warmup_iters, ratio=1e-6)
        lr_sched.set_lr(optimizer.param_groups, rate)

    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, buffers=sync_bn.statistics(model))
    n_parameters = sum(p.numel() for p in model.parameters())
    images = args.batch_size * args.accum_iter * distributed.world_size()
    distributed.log(
        f"Semantic FPN on {args.arch}: {n_parameters:,} parameters on {device}, {updater.dtype}; "
        f"{loader.loader.images} images, {images} per update, lr {args.lr:.2e}, {len(args.class_names)} classes"
    )
    # ---- loop
    files = distributed.Files(weights="state_dict", adapt=refuse_mmseg)
    parts = {"optimizer": optimizer, "scaler": updater.scaler}
    checkpoint = distributed.Checkpoint(args.output_dir, args, model, files, **parts)
    fit(args, net, loader, updater, set_rates, checkpoint, resume, evaluation)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
