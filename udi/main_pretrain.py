"""UDI pre-training. Recipes of the authors' rows: scripts/udi_*.sh."""

import argparse
import copy
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn

from common import datasets, distributed
from udi import optim
from udi.backbone import ALIASES
from udi.engine_pretrain import Rates, batch_loss, train_one_epoch
from udi.files import Prefixed, default_folder
from udi.flags import ARCHS, PRETRAIN_RANGES, boolean, limit
from udi.initial import start_from
from udi.loss import UDILoss
from udi.models_udi import MODELS, DINOHead, MaskedAttention, MultiCropWrapper, UDIWrapper
from udi.udi_augmentation import DataAugmentation, collate
from udi.views_on_device import AugmentationOnDevice, collate_on_device


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI pre-training")
    g = distributed.flag_groups(p)
    # Rates, decay, momenta, temperatures: defaults of the authors' main_udi.py. README: those of the README's command.
    # ---- network
    g.model.add_argument("--arch", default="vit_small", choices=ARCHS, help="backbone")
    g.model.add_argument("--patch_size", default=16, type=int, help="patch side in pixels")
    g.model.add_argument("--global_size", default=224, type=int, help="side of the global views in pixels")
    g.model.add_argument("--local_size", default=96, type=int, help="side of the local crops in pixels")
    g.model.add_argument("--out_dim", default=65536, type=int, help="number of prototypes K")
    g.model.add_argument("--include_patch", default=True, type=boolean, help="learn from sampled patches, too")
    g.model.add_argument(
        "--number_cls_token", default=2, type=int, choices=[1, 2], help="class tokens; without patches there is 1"
    )
    g.model.add_argument(
        "--norm_last_layer", default=True, type=boolean, help="keep the norms of the prototypes at 1 (README: false)"
    )
    g.model.add_argument(
        "--use_bn_in_head", default=False, type=boolean, help="batch norm in the projection head, per process"
    )
    # ---- teacher
    g.optimizer.add_argument(
        "--momentum_teacher", default=0.996, type=float, help="momentum of the teacher; grows to 1 by a cosine"
    )
    g.model.add_argument("--alpha", default=0.5, type=float, help="share of patches in the extra class token's targets")
    g.optimizer.add_argument(
        "--warmup_teacher_temp", default=0.04, type=float, help="temperature of the teacher in the first epoch"
    )
    g.optimizer.add_argument(
        "--teacher_temp", default=0.07, type=float, help="temperature of the teacher after its warm-up"
    )
    g.optimizer.add_argument(
        "--warmup_teacher_temp_epochs", default=30, type=int, help="epochs in which the temperature grows linearly"
    )
    g.optimizer.add_argument(
        "--exact_center", action="store_true", help="let centres weigh all rows alike, instead of all processes"
    )
    # ---- optimizer
    g.process.add_argument("--use_fp16", default=True, type=boolean, help="false computes in float32")
    g.optimizer.add_argument("--weight_decay", default=0.04, type=float, help="weight decay at the start")
    g.optimizer.add_argument(
        "--weight_decay_end", default=0.1, type=float, help="weight decay at the end, reached by a cosine"
    )
    g.optimizer.add_argument(
        "--clip_grad", default=3.0, type=limit, help="largest norm of each parameter's gradient; 0 does not clip"
    )
    g.optimizer.add_argument(
        "--batch_size_per_gpu",
        "--batch_size",
        dest="batch_size",
        default=128,
        type=int,
        help="images per process and micro-step",
    )
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="micro-steps per update; centres move with each")
    g.optimizer.add_argument("--epochs", default=300, type=int, help="epochs to train")
    g.optimizer.add_argument(
        "--freeze_last_layer", default=1, type=int, help="epochs at the start in which prototypes stay"
    )
    g.optimizer.add_argument("--lr", default=5e-4, type=float, help="learning rate per 256 images of an update")
    g.optimizer.add_argument("--warmup_epochs", default=10, type=int, help="epochs in which the rate grows from 0")
    g.optimizer.add_argument("--min_lr", default=1e-5, type=float, help="learning rate at the end")
    g.optimizer.add_argument("--optimizer", default="adamw", choices=["adamw", "sgd", "lars"], help="optimizer")
    g.augmentation.add_argument(
        "--drop_path_rate", default=0.1, type=float, help="stochastic depth of the student's last block; grows from 0"
    )
    # ---- views
    g.augmentation.add_argument(
        "--global_crops_scale",
        default=[0.25, 1.0],
        type=float,
        nargs="+",
        help="smallest and largest share of the image that a global view shows",
    )
    g.augmentation.add_argument(
        "--local_crops_number", default=6, type=int, help="local crops of an image (README: 10)"
    )
    g.augmentation.add_argument(
        "--local_crops_scale",
        default=[0.05, 0.25],
        type=float,
        nargs="+",
        help="smallest and largest share of the image that a local crop shows",
    )
    g.augmentation.add_argument(
        "--global_sampling_window_size",
        default=3,
        type=int,
        help="side of a window of a global view in patches; one patch of each window is sampled",
    )
    g.augmentation.add_argument(
        "--local_sampling_window_size", default=2, type=int, help="side of a window of a local crop in patches"
    )
    g.augmentation.add_argument(
        "--fix_crop_reference",
        action="store_true",
        help="overlap columns of crops by columns; the authors' program takes a row for one",
    )
    datasets.add_augment_flag(p, "pillow", "device")
    # ---- data, files, process
    datasets.add_flags(p)
    g.output.add_argument("--output_dir", default=".", help="checkpoints, log.txt, TensorBoard; '' writes nothing")
    g.output.add_argument(
        "--saveckp_freq", default=20, type=int, help="epochs from one numbered checkpoint to the next; 0: none"
    )
    distributed.add_flags(p, pretrains=True)
    p.set_defaults(data_path="/path/to/imagenet/train/", num_workers=10, local_rank=0)
    return p


def build_model(args: argparse.Namespace, **overrides) -> MultiCropWrapper:
    """The student of the flags (and overrides of the ViT by keyword); raises UserError for values that do not fit."""
    arch = ALIASES.get(args.arch) or args.arch
    tokens = args.number_cls_token if args.include_patch else 1
    keywords = {"img_size": [args.global_size], "patch_size": args.patch_size, "num_class_token": tokens}
    keywords["in_chans"] = args.in_chans or 3
    with distributed.user_errors(f"--arch {args.arch} --patch_size {args.patch_size}"):
        vit = MODELS[arch](**{**keywords, "drop_path_rate": args.drop_path_rate, **overrides})
        dim = vit.embed_dim
        head = DINOHead(dim, args.out_dim, args.use_bn_in_head, args.norm_last_layer)
        # 6 heads for every width that they divide, as upstream.
        attn = MaskedAttention(dim, 6 if dim % 6 == 0 else 16, qkv_bias=True) if args.include_patch else None
        return MultiCropWrapper(UDIWrapper(vit, attn, dim), head, args.local_crops_number, args.include_patch)


def build_teacher(student: MultiCropWrapper) -> MultiCropWrapper:
    """A copy of the student that is never trained by gradients and drops nothing."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    for block in teacher.backbone.backbone.blocks:
        block.drop_path.rate = 0.0  # type: ignore[union-attr]
    return teacher


def build_loss(args: argparse.Namespace) -> UDILoss:
    """The loss of the flags, with the teacher's temperature by epoch."""
    epochs = max(1, args.epochs)
    temperatures = optim.ramp_table(
        args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs, epochs
    )
    with distributed.user_errors("--number_cls_token and --include_patch"):
        return UDILoss(
            args.local_crops_number,
            args.out_dim,
            temperatures.tolist(),
            include_patch=args.include_patch,
            num_clt=args.number_cls_token if args.include_patch else 1,
            alpha=args.alpha,
            exact_center=args.exact_center,
        )


def build_loader(args: argparse.Namespace, device: torch.device) -> datasets.Loader:
    """Training batches of the flags."""
    for name in ("global_crops_scale", "local_crops_scale"):
        low, high = (getattr(args, name) * 2)[:2]
        if len(getattr(args, name)) != 2 or not 0 < low <= high <= 1:
            raise distributed.UserError(f"--{name} {getattr(args, name)}: expected two shares, 0 to 1, increasing")
    statistics = datasets.statistics(args) if args.in_chans or args.mean or args.std else ()
    on_device = args.augment == "device"
    if args.in_chans not in (None, 3):
        distributed.log("colour jitter and greyscale: left out for images of other than three channels")
    with distributed.user_errors("--global_size, --local_size, --patch_size and the sampling windows"):
        augment = (AugmentationOnDevice if on_device else DataAugmentation)(
            tuple(args.global_crops_scale),
            tuple(args.local_crops_scale),
            args.local_crops_number,
            args.global_size,
            args.local_size,
            args.global_sampling_window_size,
            args.local_sampling_window_size,
            args.patch_size,
            fix_crop_reference=args.fix_crop_reference,
            statistics=statistics,
        )
    return datasets.pretrain_loader(args, augment, device, collate=collate_on_device if on_device else collate)


def build_data(args: argparse.Namespace, device: torch.device) -> tuple[datasets.Loader, dict[str, Any]]:
    """Training batches of the flags, and what else `batch_loss` takes: a teacher and the loss."""
    teacher = build_teacher(build_model(args)).to(device)
    return build_loader(args, device), {"teacher": teacher, "udi_loss": build_loss(args).to(device)}


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """--optimizer with the learning rate lr until the schedule sets it."""
    optimizer = optim.build_optimizer(args.optimizer, optim.get_params_groups(model))
    optim.set_rates(optimizer, lr, args.weight_decay)
    return optimizer


def build_rates(args: argparse.Namespace, lr: float, updates: int) -> Callable[[int], Rates]:
    """Learning rate (warm-up to lr), weight decay and the teacher's momentum by update; `updates` per epoch."""
    lrs = optim.cosine_scheduler(lr, args.min_lr, args.epochs, updates, args.warmup_epochs)
    decays = optim.cosine_scheduler(args.weight_decay, args.weight_decay_end, args.epochs, updates)
    momenta = optim.cosine_scheduler(args.momentum_teacher, 1, args.epochs, updates)
    return lambda update: Rates(*(float(table[update]) for table in (lrs, decays, momenta)))


def warn_of_collapse(stats: dict[str, float], prototypes: int, images: int) -> None:
    """Say so if the teacher predicts the same of all images, or nothing at all; a few images show neither."""
    if min(images, prototypes) < 8:
        return
    if stats["mean_entropy"] < math.log(2):
        distributed.log("WARNING: collapse: the teacher predicts one prototype of all images")
    elif stats["entropy"] > 0.99 * math.log(prototypes):
        distributed.log("WARNING: collapse: the teacher's predictions are uniform")
    elif stats["mean_entropy"] - stats["entropy"] < 1e-3:
        distributed.log("WARNING: collapse: the teacher's predictions do not depend on the image")


def main(args: argparse.Namespace) -> None:
    distributed.check_ranges(args, PRETRAIN_RANGES)
    device = distributed.init(args.device)
    torch.manual_seed(args.seed)
    default_folder(args)
    # ---- data
    loader = build_loader(args, device)
    # ---- model
    student = build_model(args).to(device)
    resume = distributed.find_checkpoint(args.output_dir, args.resume)
    distributed.hold_flags(args, resume, distributed.HELD)
    args.amp_dtype = args.amp_dtype if args.use_fp16 else "fp32"
    if weights := distributed.initial_weights(args, resume):
        start_from(student, weights, args.initial_checkpoint)
    teacher, udi_loss = build_teacher(student), build_loss(args).to(device)
    loss_of = partial(batch_loss, teacher=teacher, udi_loss=udi_loss)
    if args.use_checkpoint:
        distributed.recompute_blocks(student)
    datasets.check_memory(args, student, loss_of, loader, teacher, udi_loss)
    net = distributed.wrap(student, device, args.compile)
    # ---- optimizer
    images_per_step = args.batch_size * distributed.world_size()
    lr = args.lr * images_per_step * args.accum_iter / 256
    rates = build_rates(args, lr, len(loader) // args.accum_iter)
    optimizer = build_optimizer(args, student, lr)
    epoch = 0

    def before_update() -> None:
        if args.clip_grad:
            optim.clip_gradients(student, args.clip_grad)
        optim.cancel_gradients_last_layer(epoch, student, args.freeze_last_layer)

    buffers = [*student.buffers(), *teacher.buffers(), *udi_loss.buffers()]
    updater = distributed.Updater(
        optimizer, device, args.amp_dtype, args.accum_iter, buffers=buffers, on_gradients=before_update
    )
    n_parameters = sum(p.numel() for p in student.parameters() if p.requires_grad)
    distributed.log(
        f"{args.arch}: {n_parameters:,} trained parameters on {device}, {updater.dtype}; {loader.images} images, "
        f"{images_per_step * args.accum_iter} per update (README: 1024), lr {lr:.2e}"
    )
    # ---- loop
    files = distributed.Files(numbered="checkpoint{epoch:04}.pth", every=args.saveckp_freq, weights="student", epoch=1)
    parts = {"teacher": teacher, "optimizer": optimizer, "udi_loss": udi_loss}
    parts |= {"fp16_scaler": updater.scaler} if updater.scaler.is_enabled() else {}
    checkpoint = distributed.Checkpoint(args.output_dir, args, Prefixed(student), files, **parts)
    position = checkpoint.resume(resume, args.start_epoch)
    for epoch, epoch_log in checkpoint.epochs(
        loader,
        position,
        {name: f"train/{name}" for name in ("loss", "lr", "wd", "mean_entropy", "entropy")},
        f"Epoch: [{{epoch}}/{args.epochs}]",
        print_freq=10,
    ):
        with checkpoint.on_exit(epoch_log, updater):
            stats = train_one_epoch(net, teacher, udi_loss, loader, updater, rates, epoch_log, args.seed)
        warn_of_collapse(stats, args.out_dim, args.batch_size)
        epoch_log.run_log.epoch({**{f"train_{k}": v for k, v in stats.items()}, "epoch": epoch})
        checkpoint.save(distributed.Position(epoch + 1))
    distributed.log(f"{args.epochs} epochs done; checkpoint.pth is in {args.output_dir or 'no folder'}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
