"""Semantic segmentation with CAE's encoder and UPerNet. Recipes of the published rows: scripts/cae_*.sh segmentation.

The defaults are those of the row of 800 epochs of pre-training, whose updates see 16 images: 8 processes of 2.
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

from cae.dense_backbone import load_backbone
from cae.engine_segmentation import batch_loss, evaluate, evaluate_checkpoint, fit
from cae.models_segmentation import MODELS, SegmentationNetwork
from common import datasets, distributed, lr_decay, lr_sched
from common.dense_datasets.iterations import add_flags as add_iteration_flags
from common.dense_datasets.segmentation import add_flags as add_data_flags
from common.dense_datasets.segmentation import segmentation_loaders
from common.dense_datasets.transforms import EvalTransform, TrainTransform
from common.distributed import sync_bn

LARGE = "--model=upernet_cae_large --drop_path=0.15 --layer_scale_init_value=1e-5 --lr=4e-5 --layer_decay=0.95"
# By network and epochs of its pre-training (0: not said): flags of the authors' configuration beside our defaults.
ROWS = {
    ("base", 300): "--lr=3e-4",
    ("base", 800): "",
    ("base", 1600): "--lr=1e-4",
    ("base", 0): "",
    ("large", 1600): f"{LARGE} --save_interval=32000",
    ("large", 0): f"{LARGE} --save_interval=32000",
}
TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # ours, as is usual: the authors test one scale
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("save_interval", "stride"), (1, math.inf)),
    **dict.fromkeys(("warmup_iters", "save_pictures", "layer_scale_init_value", "auxiliary_weight"), (0, math.inf)),
}


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("CAE semantic segmentation")
    g = distributed.flag_groups(p)
    add_data_flags(p)
    side = "side in pixels of the crops in training and of the windows in evaluations"
    g.data.add_argument("--input_size", default=512, type=int, help=side)
    sides = "longest long and short side to which images are resized; default: 4 and 1 times --input_size"
    g.data.add_argument("--scale", nargs=2, type=int, metavar=("LONG", "SHORT"), help=sides)
    # ---- model
    g.model.add_argument("--model", default="upernet_cae_base", choices=list(MODELS), help="network")
    g.model.add_argument("--finetune", default="", help="checkpoint of the encoder; '' starts from random weights")
    scale = "initial layer scale; 0 for none (large: 1e-5)"
    g.model.add_argument("--layer_scale_init_value", default=0.1, type=float, help=scale)
    share = "weight of the auxiliary head's loss"
    g.model.add_argument("--auxiliary_weight", default=0.4, type=float, help=share)
    skipped = "probability of skipping the last block in training; lower for earlier ones (large: 0.15)"
    g.augmentation.add_argument("--drop_path", default=0.1, type=float, help=skipped)
    # ---- optimizer
    add_iteration_flags(p, iters=160000, eval_interval=16000)
    g.optimizer.add_argument("--batch_size", default=2, type=int, help="images per process in one forward pass")
    rate = "highest learning rate, for 16 images per update (300 epochs: 3e-4, 1600: 1e-4, large: 4e-5)"
    g.optimizer.add_argument("--lr", default=2e-4, type=float, help=rate)
    decay = "a block's learning rate as a share of the next one's, towards the input (large: 0.95)"
    g.optimizer.add_argument("--layer_decay", default=0.65, type=float, help=decay)
    decayed = "weight decay of all but biases and norms"
    g.optimizer.add_argument("--weight_decay", default=0.05, type=float, help=decayed)
    g.optimizer.add_argument("--warmup_iters", default=1500, type=int, help="updates in which the learning rate rises")
    # ---- evaluation, files, process
    g.output.add_argument("--output_dir", default="", help="folder of checkpoints and log.txt; '' writes nothing")
    only = "only evaluate the checkpoint of --resume or of --output_dir, the authors' or ours"
    g.output.add_argument("--eval", action="store_true", help=only)
    steps = "pixels between windows in evaluations; default: two thirds of --input_size"
    g.output.add_argument("--stride", type=int, help=steps)
    averaged = f"average evaluations over the scales {', '.join(map(str, TTA_SCALES))} and mirrored images"
    g.output.add_argument("--tta", action="store_true", help=averaged)
    drawn = "evaluated images that are drawn with truth and prediction, in pictures/ of --output_dir"
    g.output.add_argument("--save_pictures", default=0, type=int, metavar="N", help=drawn)
    distributed.add_flags(p, counts_epochs=False)
    g.process.add_argument("--deterministic", action="store_true", help="deterministic kernels on a GPU")
    again = "compute blocks again in the backward pass, to save memory"
    g.process.add_argument("--use_checkpoint", action="store_true", help=again)
    return p


def param_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Optimizer groups whose `lr_scale` is layer_decay ** (depth + 1 - layer); pyramid and heads have the full rate.

    As upstream: the class token and the tables of relative positions are decayed, too.
    """

    def layer_id(name: str, depth: int) -> int:
        return lr_decay.vit_layer_id(name.removeprefix("backbone."), depth)

    depth = len(model.backbone.blocks)  # type: ignore[arg-type]
    return lr_decay.layer_decay_groups(model, weight_decay, layer_decay, depth, layer_id=layer_id)


def refuse_mmseg(state: dict[str, Any], *_) -> None:
    """Raise ValueError for a training state of the authors' program, which counts its progress in another way."""
    if "epoch" not in state:
        raise ValueError("it is mmseg's; such a file can be evaluated or give its encoder, but not be continued")


def build_model(args: argparse.Namespace) -> SegmentationNetwork:
    """The network of the flags; raises UserError for values that do not fit together."""
    with distributed.user_errors(f"--model {args.model} --input_size {args.input_size}"):
        return MODELS[args.model](
            num_classes=args.nb_classes,
            img_size=args.input_size,
            init_values=args.layer_scale_init_value,
            drop_path_rate=args.drop_path,
            use_checkpoint=args.use_checkpoint,
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
    model = build_model(args)
    resume = distributed.find_checkpoint(args.output_dir, args.resume)
    if args.finetune and not resume:
        load_backbone(model.backbone, args.finetune)  # type: ignore[arg-type]
    elif not resume:
        distributed.log("WARNING: no --finetune: the encoder has random weights")
    model.to(device)
    evaluation = partial(
        evaluate,
        loader=val_loader,
        names=args.class_names,
        pictures=args.save_pictures,
        folder=args.output_dir,
        statistics=statistics,
        window=size,
        stride=args.stride or round(size * 2 / 3),
        flip=args.tta,
    )
    if loader is None:
        evaluate_checkpoint(resume, model, evaluation)
        return
    datasets.check_memory(args, model, partial(batch_loss, auxiliary_weight=args.auxiliary_weight), loader.loader)
    net = distributed.wrap(sync_bn.convert(model, device), device, args.compile)
    # ---- optimizer
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)

    def set_rates(update: int) -> None:
        rate = lr_sched.warmup_poly(update, args.lr, args.iters, args.warmup_iters, ratio=1e-6)
        lr_sched.set_lr(optimizer.param_groups, rate)

    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, buffers=sync_bn.statistics(model))
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    images = args.batch_size * args.accum_iter * distributed.world_size()
    distributed.log(
        f"{args.model}: {n_parameters:,} trained parameters on {device}, {updater.dtype}; "
        f"{loader.loader.images} images, {images} per update, lr {args.lr:.2e}, {len(args.class_names)} classes"
    )
    # ---- loop
    files = distributed.Files(weights="state_dict", adapt=refuse_mmseg)
    parts = {"optimizer": optimizer, "scaler": updater.scaler}
    checkpoint = distributed.Checkpoint(args.output_dir, args, model, files, **parts)
    fit(args, net, loader, updater, set_rates, checkpoint, resume, evaluation)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
