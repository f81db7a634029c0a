"""Object detection and instance segmentation: Mask R-CNN on a CAE encoder. Recipes of the rows: scripts/cae_*.sh."""

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from cae.dense_backbone import load_backbone
from cae.engine_detection import batch_loss, evaluate, fit
from cae.main_segmentation import param_groups
from cae.models_detection import MODELS
from common import datasets, distributed, lr_sched
from common.datasets import Loader
from common.dense_datasets import detection
from common.dense_datasets.views import EvalTransform, TrainTransform
from common.distributed import sync_bn

LARGE = "--model mask_rcnn_cae_large --lr 2e-4 --layer_decay 0.85 --layer_scale_init_value 1e-5"
# By network and epochs of its pre-training (0: not said): flags of the authors' configuration beside our defaults.
ROWS = {
    **{("base", epochs): "" for epochs in (0, 300, 800, 1600)},
    **{("large", epochs): LARGE for epochs in (0, 1600)},
}


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("CAE object detection")
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
    g.model.add_argument("--model", default="mask_rcnn_cae_base", help=f"one of {', '.join(MODELS)}")
    g.model.add_argument("--finetune", default="", help="checkpoint of the encoder; '' starts from random weights")
    g.model.add_argument(
        "--layer_scale_init_value", default=0.1, type=float, help="initial layer scale (README, L: 1e-5)"
    )
    skipped = "probability of skipping the last block in training; lower for earlier ones"
    g.augmentation.add_argument("--drop_path", default=0.2, type=float, help=skipped)
    recompute = "forget what is inside the encoder's blocks and compute it again in the backward pass"
    g.process.add_argument("--use_checkpoint", action=argparse.BooleanOptionalAction, default=True, help=recompute)
    # ---- optimizer
    g.optimizer.add_argument("--batch_size", default=2, type=int, help="images per process in one forward pass")
    g.optimizer.add_argument("--accum_iter", "--update_freq", default=1, type=int, help="batches per update")
    g.optimizer.add_argument("--epochs", default=12, type=int, help="passes over the training images")
    g.optimizer.add_argument("--lr", default=3e-4, type=float, help="learning rate for 32 images per update (L: 2e-4)")
    g.optimizer.add_argument(
        "--weight_decay", default=0.05, type=float, help="weight decay of all but biases and norms"
    )
    share = "a block's learning rate as a share of the next one's, towards the input (L: 0.85)"
    g.optimizer.add_argument("--layer_decay", default=0.75, type=float, help=share)
    g.optimizer.add_argument("--clip_grad", type=float, help="largest norm of the gradient; default: any norm")
    drops = "epochs, counted from 0, that begin with a tenth of the learning rate before them"
    g.optimizer.add_argument("--lr_drops", type=int, nargs="*", default=[9, 11], help=drops)
    g.optimizer.add_argument("--warmup_iters", default=500, type=int, help="updates in which the learning rate rises")
    g.optimizer.add_argument("--warmup_ratio", default=1e-3, type=float, help="share of the rate at the first update")
    # ---- output and process
    g.output.add_argument(
        "--output_dir", default="", help="folder of checkpoints, log.txt and predictions; '' for none"
    )
    g.output.add_argument("--log_dir", help="folder of TensorBoard's events; default: --output_dir")
    g.output.add_argument("--save_ckpt_freq", default=1, type=int, help="epochs between the kept files epoch_<n>.pth")
    g.output.add_argument("--eval_interval", default=0, type=int, help="epochs between evaluations; 0: after the last")
    pictures = "images of which the last evaluation writes a picture, in --output_dir/pictures"
    g.output.add_argument("--save_pictures", default=0, type=int, metavar="N", help=pictures)
    g.output.add_argument(
        "--eval", action="store_true", help="only evaluate the checkpoint of --resume or --output_dir"
    )
    g.process.add_argument("--no_auto_resume", action="store_false", dest="auto_resume", help="start anew")
    g.process.add_argument("--deterministic", action="store_true", help="cuDNN's deterministic kernels")
    distributed.add_flags(p)
    p.set_defaults(data_path="data/coco")
    return p


def check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not fit together or are out of range."""
    if args.save_pictures and not args.output_dir:
        raise distributed.UserError(f"--save_pictures {args.save_pictures}: needs --output_dir")
    if args.model not in MODELS:
        raise distributed.UserError(f"--model {args.model}: expected one of {', '.join(MODELS)}")
    ranges = dict.fromkeys(("long_side", "test_short_side"), (32, 100000.0)) | {"warmup_ratio": (0, 1)}
    counted = ("warmup_iters", "eval_interval", "save_pictures", "save_ckpt_freq")
    distributed.check_ranges(args, {**ranges, **dict.fromkeys(counted, (0, float("inf")))})
    for name in ("short_sides", "crop_short_sides", "crop_range"):
        values = getattr(args, name)
        if any(value < 32 for value in values) or (name == "crop_range" and values[0] > values[1]):
            raise distributed.UserError(
                f"--{name} {' '.join(map(str, values))}: expected sides of 32 pixels or more, rising"
            )


def build_loaders(
    args: argparse.Namespace, device: torch.device
) -> tuple[Loader | None, Loader, detection.DetectionImages]:
    """Training batches with DETR's views, validation batches, and the validation images."""
    statistics = datasets.statistics(args)[:2]
    train = TrainTransform(args.short_sides, args.long_side, args.crop_short_sides, args.crop_range, statistics)
    whole = EvalTransform(args.test_short_side, args.long_side, statistics)
    return detection.detection_loaders(args, device, train, whole)


def refuse_mmdet(state: dict[str, Any], *_) -> None:
    """Raise ValueError for a training state of the authors' program, whose optimizer has other groups."""
    if "epoch" not in state:
        raise ValueError("it is mmdet's; such a file can be evaluated or give its encoder, but not be continued")


def main(args: argparse.Namespace) -> None:
    check(args)
    device = distributed.init(args.device, args.deterministic)
    torch.manual_seed(args.seed + distributed.rank())
    # ---- data
    loader, val_loader, images = build_loaders(args, device)
    # ---- model
    with distributed.user_errors(f"--model {args.model}"):
        model = MODELS[args.model](
            num_classes=len(images.classes),
            drop_path_rate=args.drop_path,
            init_values=args.layer_scale_init_value,
            use_checkpoint=args.use_checkpoint,
            in_chans=args.in_chans or 3,
        )
    resume = distributed.find_checkpoint(args.output_dir if args.auto_resume else "", args.resume)
    if args.finetune and not resume:
        load_backbone(model.backbone, args.finetune)  # type: ignore[arg-type]
    elif not resume:
        distributed.log("WARNING: no --finetune: the encoder has random weights")
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
    groups = param_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    moved = sync_bn.statistics(model)
    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, args.clip_grad, moved)
    updates = len(loader) // args.accum_iter

    def rate(epoch: int, step: int) -> float:
        update = epoch * updates + step // args.accum_iter
        return lr_sched.warmup_drops(update, epoch, args.lr, args.lr_drops, args.warmup_iters, args.warmup_ratio)

    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_update = args.batch_size * args.accum_iter * distributed.world_size()
    distributed.log(
        f"{args.model}: {n_parameters:,} trained parameters on {device}, {updater.dtype}; {loader.images} images, "
        f"{per_update} per update, lr {args.lr:.2e}, {len(images.classes)} classes"
    )
    # ---- loop
    files = distributed.Files(
        numbered="epoch_{done}.pth",
        weights="state_dict",
        every=args.save_ckpt_freq,
        phase=1,
        events=args.log_dir or "",
        adapt=refuse_mmdet,
    )
    parts = {"optimizer": optimizer, "scaler": updater.scaler}
    checkpoint = distributed.Checkpoint(args.output_dir, args, model, files, **parts)
    fit(args, net, loader, val_loader, images, updater, rate, checkpoint, resume)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
