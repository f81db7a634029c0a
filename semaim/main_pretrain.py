"""SemAIM pre-training. Recipes of the paper's rows: scripts/semaim_*.sh."""

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torchvision import transforms

from common import datasets, distributed, lr_decay, lr_sched
from semaim.engine_pretrain import Guide, batch_loss, train_one_epoch
from semaim.files import run_files
from semaim.initial import start_from
from semaim.models_clip import ClipVisual, DinoViT, load_teacher
from semaim.models_semaim import MODELS, AimViT


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("SemAIM pre-training")
    g = distributed.flag_groups(p)
    g.optimizer.add_argument("--batch_size", default=64, type=int, help="images per process in each forward pass")
    g.optimizer.add_argument("--epochs", default=800, type=int, help="passes over the training images")
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="forward passes that make one update")
    g.model.add_argument("--model", default="saim_base", choices=MODELS, help="network; saim_base is aim_base")
    g.model.add_argument("--input_size", default=224, type=int, help="side of an image in pixels")
    g.model.add_argument(
        "--patch_size", default=None, type=int, help="side of a patch in pixels; by default that of --model"
    )
    g.model.add_argument("--query_depth", default=12, type=int, help="number of blocks of the decoder (query stream)")
    g.model.add_argument(
        "--share_weight", action="store_true", help="is refused: the blocks of the two streams have different weights"
    )
    g.model.add_argument("--prediction_head_type", default="MLP", type=str, help="head of the decoder: MLP or LINEAR")
    g.model.add_argument(
        "--gaussian_kernel_size", default=None, type=int, help="side of the target's blur in pixels, odd (README: 9)"
    )
    g.model.add_argument(
        "--gaussian_sigma",
        default=None,
        type=float,
        help="standard deviation of the target's blur in pixels (README: 1); without both flags there is no blur",
    )
    g.model.add_argument("--loss_type", default="L2", type=str, help="error of predicted pixels: L1 or L2")
    g.model.add_argument("--norm_pix_loss", action="store_true", help="standardise each target patch (README: yes)")
    g.model.add_argument(
        "--permutation_type",
        default="stochastic",
        type=str,
        help="order in which patches are predicted: attention_center (README), attention, attention_guided, "
        "stochastic, stochastic_center, center2out, zigzag (row by row) or raster (a snake)",
    )
    g.model.add_argument(
        "--use_ema_model", action="store_true", help="draw the order's map with a moving average of the weights"
    )
    g.model.add_argument(
        "--predict_feature",
        default="none",
        type=str,
        help="what is predicted: none (pixels), features of a clip or dino teacher, of the encoder itself (inference), "
        "or of its moving average (ema)",
    )
    g.model.add_argument("--teacher_path", default="", help="published weights of the CLIP or DINO teacher")
    g.model.add_argument(
        "--attention_type",
        default="cls",
        type=str,
        help="map that the order follows: similarity of each patch to the class token (cls) or to the mean of all "
        "patches (gap), or the class token's self-attention (self)",
    )
    g.process.add_argument(
        "--attn_impl",
        default="auto",
        choices=["auto", "mask", "flex", "causal"],
        help="way of computing attention: auto, mask and flex keep ties of the order, causal breaks them by index",
    )
    g.process.add_argument(
        "--order_amp", action="store_true", help="run the pass that draws the map in --amp_dtype instead of float32"
    )
    g.optimizer.add_argument("--weight_decay", default=0.05, type=float, help="weight decay of AdamW")
    g.optimizer.add_argument(
        "--clip_grad",
        default=None,
        type=float,
        help="largest norm of the gradient; by default it is not clipped (README: 3)",
    )
    g.optimizer.add_argument("--lr", default=None, type=float, help="absolute learning rate; by default --blr decides")
    g.optimizer.add_argument("--blr", default=2e-4, type=float, help="learning rate per 256 images of an update")
    g.optimizer.add_argument("--min_lr", default=0.0, type=float, help="learning rate at the end")
    g.optimizer.add_argument("--warmup_epochs", default=30, type=int, help="epochs in which the learning rate rises")
    g.process.add_argument("--not_use_fp16", action="store_true", help="the same as --amp_dtype fp32")
    datasets.add_augment_flag(p, "pillow", "tensor", "device")
    datasets.add_flags(p, pin_mem=False)
    g.output.add_argument("--output_dir", default="./pretrain/saim_base", help="folder for checkpoints and the log")
    g.output.add_argument(
        "--log_dir",
        default="./output_dir",
        help="folder for TensorBoard's files, which go to <model>.<experiment> in it",
    )
    g.output.add_argument(
        "--saveckp_freq", default=20, type=int, help="epochs between the numbered checkpoints that are kept"
    )
    g.output.add_argument("--experiment", default="exp", type=str, help="part of the name of every file")
    distributed.add_flags(p, pretrains=True)
    return p


def pretrain_transform(input_size: int, *statistics: Any, augment: str = "pillow") -> Any:
    """Random crop of 20-100 % of the image, bicubic, and a flip (upstream main_pretrain.py@ade770f)."""
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(input_size, scale=(0.2, 1.0), interpolation=bicubic)
    if augment != "pillow":
        return datasets.crop_and_flip(crop, augment, datasets.Normalize(*statistics[:2]))
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *datasets.tensor_and_normalize(*statistics)])


def build_data(args: argparse.Namespace, device: torch.device) -> tuple[datasets.Loader, dict]:
    """Training batches of the flags, and what else `batch_loss` takes: nothing."""
    transform = pretrain_transform(args.input_size, *datasets.statistics(args), augment=args.augment)
    return datasets.pretrain_loader(args, transform, device), {}


def default_query_depth(model: str) -> int:
    """The authors' 12 where it fits the encoder's depth, else the next larger number that does, or all blocks."""
    with torch.device("meta"):
        depth = len(MODELS[model](query_depth=1).blocks)
    return min((depth // step for step in range(1, depth + 1) if depth // step >= 12), default=depth)


def build_model(args: argparse.Namespace, **overrides) -> AimViT:
    """The network of the flags (and overrides by keyword); raises UserError for values that do not fit together."""
    if args.query_depth == 12 and not distributed.is_given(args, "query_depth"):
        args.query_depth = default_query_depth(args.model)
    if (args.gaussian_kernel_size is None) != (args.gaussian_sigma is None):  # as upstream: then there is no blur
        distributed.log("WARNING: no blur; it needs both --gaussian_kernel_size and --gaussian_sigma")
    keywords = {
        "img_size": args.input_size,
        "in_chans": args.in_chans or 3,
        "out_dim": 512,  # upstream main_pretrain.py@ade770f: CLIP ViT-B/16's
        "permutation_type": args.permutation_type,
        "attention_type": args.attention_type,
        "query_depth": args.query_depth,
        "share_weight": args.share_weight,
        "prediction_head_type": args.prediction_head_type,
        "gaussian_kernel_size": args.gaussian_kernel_size,
        "gaussian_sigma": args.gaussian_sigma,
        "loss_type": args.loss_type,
        "predict_feature": args.predict_feature,
        "norm_pix_loss": args.norm_pix_loss,
        "attn_impl": args.attn_impl,
    }
    if args.patch_size is not None:
        keywords["patch_size"] = args.patch_size
    with distributed.user_errors(f"--model {args.model}"):
        return MODELS[args.model](**{**keywords, **overrides})


def build_with_teacher(args: argparse.Namespace) -> tuple[AimViT, ClipVisual | DinoViT | None]:
    """The network, and the frozen one whose features it predicts, if there is one.

    Raises:
        distributed.UserError: the teacher's file is missing or damaged, or its tokens or channels do not fit.
    """
    if args.predict_feature not in ("clip", "dino"):
        return build_model(args), None
    if args.in_chans not in (None, 3):
        raise distributed.UserError(
            f"--in_chans {args.in_chans}: the teacher of --predict_feature {args.predict_feature} takes 3 channels"
        )
    teacher = load_teacher(args.predict_feature, args.teacher_path, args.input_size)
    model = build_model(args, out_dim=teacher.out_dim)
    width = model.cls_token.shape[-1]
    for what, its, ours in (
        ("patches", teacher.num_patches, model.patch_embed.num_patches),
        ("wide features", teacher.out_dim, width if args.predict_feature == "dino" else teacher.out_dim),
    ):
        if its != ours:
            raise distributed.UserError(
                f"--teacher_path {args.teacher_path}: gives {its} {what} at {args.input_size} pixels, "
                f"--model {args.model} predicts {ours}"
            )
    return model, teacher


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW on two groups, without and with weight decay (README: 0.05); the class token is decayed (as upstream)."""
    groups = lr_decay.decay_groups(model, args.weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)  # upstream main_pretrain.py@ade770f


def main(args: argparse.Namespace) -> None:
    distributed.check_ranges(args, {"saveckp_freq": (1, math.inf)})
    device = distributed.init(args.device)
    torch.manual_seed(args.seed + distributed.rank())
    if args.predict_feature == "ema" and not args.use_ema_model:
        raise distributed.UserError("--predict_feature ema: needs --use_ema_model")
    # ---- data
    loader, _ = build_data(args, device)
    # ---- model
    model, teacher = build_with_teacher(args)
    model.to(device)
    files = run_files(args, every=args.saveckp_freq)
    resume = distributed.find_checkpoint(args.output_dir, args.resume, files.latest)
    distributed.hold_flags(args, resume, distributed.HELD)
    if weights := distributed.initial_weights(args, resume):
        start_from(model, weights, args.initial_checkpoint)
    if args.attn_impl == "flex" and device.type == "cpu":
        raise distributed.UserError("--attn_impl flex: FlexAttention trains on CUDA only; use auto or mask")
    if model.idle_blocks:
        distributed.log(f"WARNING: the last {model.idle_blocks} encoder blocks are not trained at this --query_depth")
    net = distributed.wrap(model, device, args.compile, find_unused=model.idle_blocks > 0)
    ema = ModelEmaV3(model) if args.use_ema_model else None
    guide = Guide(model, ema and ema.module, teacher and teacher.to(device), args.order_amp)  # type: ignore[arg-type]
    if args.use_checkpoint:
        distributed.recompute_blocks(model)
    datasets.check_memory(args, model, partial(batch_loss, guide=guide), loader, *(teacher and [teacher] or []))
    if args.compile:
        guide.source.semantic_pass = torch.compile(guide.source.semantic_pass)
    # ---- optimizer
    images_per_step = args.batch_size * distributed.world_size()
    # README: 2e-4 * 2048 images / 256 = 1.6e-3
    lr = args.blr * images_per_step * args.accum_iter / 256 if args.lr is None else args.lr
    optimizer = build_optimizer(args, model, lr)
    schedule = partial(
        lr_sched.warmup_cosine, base=lr, final=args.min_lr, warmup=args.warmup_epochs, epochs=args.epochs
    )
    precision = "fp32" if args.not_use_fp16 else args.amp_dtype
    updater = distributed.Updater(optimizer, device, precision, args.accum_iter, args.clip_grad)
    distributed.log(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters on {device}, {updater.dtype}; "
        f"{loader.images} images, {images_per_step * args.accum_iter} per update, lr {lr:.2e}"
    )
    # ---- loop
    parts = {"optimizer": optimizer, "loss_scaler": updater.scaler}
    if ema is not None:
        parts["ema_state_dict"] = ema.module
    checkpoint = distributed.Checkpoint(args.output_dir, args, model, files, **parts)
    position = checkpoint.resume(resume, args.start_epoch)
    if ema is not None and "ema_state_dict" in checkpoint.missing:
        ema.set(model)  # from a run without it
    for epoch, epoch_log in checkpoint.epochs(
        loader, position, {"loss": "loss", "lr": "lr", "total_norm": "grad_norm", "fp16_scaler": "fp16_scaler"}
    ):
        with checkpoint.on_exit(epoch_log):
            stats = train_one_epoch(net, loader, updater, schedule, epoch_log, guide, ema, args.seed)
        epoch_log.run_log.epoch({**{f"train_{k}": v for k, v in stats.items()}, "epoch": epoch})
        checkpoint.save(distributed.Position(epoch + 1))
    distributed.log(f"{args.epochs} epochs done; {checkpoint.files.latest} is in {args.output_dir or 'no folder'}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
