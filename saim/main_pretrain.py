"""SAIM pre-training. Recipes of the paper's rows: scripts/saim_*.sh."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torchvision import transforms

from common import datasets, distributed, lr_decay, lr_sched
from saim.engine_pretrain import batch_loss, train_one_epoch
from saim.initial import start_from
from saim.models_saim import MODELS, SaimViT


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("SAIM pre-training")
    g = distributed.flag_groups(p)
    g.optimizer.add_argument("--batch_size", default=64, type=int, help="images per process in one forward pass")
    g.optimizer.add_argument("--epochs", default=800, type=int, help="passes over the training images")
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="batches per update of the weights")
    g.model.add_argument("--model", default="saim_base", choices=MODELS, help="size of the network")
    g.model.add_argument("--input_size", default=224, type=int, help="side of the cropped images in pixels")
    g.model.add_argument("--patch_size", type=int, help="side of a patch in pixels; default: 16")
    g.model.add_argument("--query_depth", default=12, type=int, help="number of decoder blocks")
    g.model.add_argument("--share_weight", action="store_true", help="the decoder uses the encoder's blocks")
    g.model.add_argument("--prediction_head_type", default="MLP", help="layer that predicts the pixels: MLP or LINEAR")
    blur = "of the Gaussian that blurs the target; without both flags there is no blur"
    g.model.add_argument("--gaussian_kernel_size", type=int, help=f"side in pixels, odd, {blur} (README: 9)")
    g.model.add_argument("--gaussian_sigma", type=float, help=f"width in pixels {blur} (README: 1)")
    g.model.add_argument("--loss_type", default="L2", help="error of the prediction: L2 (squared) or L1 (absolute)")
    g.model.add_argument(
        "--norm_pix_loss", action="store_true", help="shift and scale each target patch to mean 0 and variance 1"
    )
    g.model.add_argument(
        "--order", default="random", choices=["random", "raster"], help="order in which the patches are predicted"
    )
    g.optimizer.add_argument("--weight_decay", default=0.05, type=float, help="weight decay of AdamW (README: 0.5)")
    g.optimizer.add_argument("--clip_grad", type=float, help="largest norm of the gradient; default: any norm")
    g.optimizer.add_argument("--lr", type=float, help="highest learning rate; default: computed from --blr")
    g.optimizer.add_argument(
        "--blr", default=2e-4, type=float, help="learning rate per 256 images of an update, used without --lr"
    )
    g.optimizer.add_argument("--min_lr", default=0.0, type=float, help="learning rate at the end of training")
    g.optimizer.add_argument("--warmup_epochs", default=30, type=int, help="epochs in which the learning rate rises")
    datasets.add_augment_flag(p, "pillow", "tensor", "device")
    datasets.add_flags(p, pin_mem=False)
    g.output.add_argument(
        "--output_dir", default="./pretrain/saim_base", help="folder of checkpoints, log.txt and TensorBoard events"
    )
    g.output.add_argument(
        "--save_freq", default=100, type=int, help="epochs from one numbered checkpoint, which is kept, to the next"
    )
    distributed.add_flags(p, pretrains=True)
    return p


def pretrain_transform(input_size: int, *statistics: Any, augment: str = "pillow") -> Any:
    """Random crop of 20-100 % of the image, bicubic, and a flip (upstream main_pretrain.py@08d36c3)."""
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


def build_model(args: argparse.Namespace, **overrides) -> SaimViT:
    """The network of the flags (and overrides by keyword); raises UserError for values that do not fit together."""
    if args.query_depth == 12 and not distributed.is_given(args, "query_depth"):
        args.query_depth = default_query_depth(args.model)
    if (args.gaussian_kernel_size is None) != (args.gaussian_sigma is None):  # as upstream: then there is no blur
        distributed.log("WARNING: no blur; it needs both --gaussian_kernel_size and --gaussian_sigma")
    with distributed.user_errors(f"--model {args.model}"):
        return MODELS[args.model](
            img_size=args.input_size,
            in_chans=args.in_chans or 3,
            query_depth=args.query_depth,
            share_weight=args.share_weight,
            prediction_head_type=args.prediction_head_type,
            gaussian_kernel_size=args.gaussian_kernel_size,
            gaussian_sigma=args.gaussian_sigma,
            loss_type=args.loss_type,
            norm_pix_loss=args.norm_pix_loss,
            token_order=args.order,
            **({} if args.patch_size is None else {"patch_size": args.patch_size}),
            **overrides,
        )


def build_optimizer(args: argparse.Namespace, model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW on two groups: biases and norms without weight decay, then the rest with it, the class token, too."""
    groups = lr_decay.decay_groups(model, args.weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)  # upstream main_pretrain.py@08d36c3


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    torch.manual_seed(args.seed + distributed.rank())
    # ---- data
    loader, _ = build_data(args, device)
    # ---- model
    model = build_model(args).to(device)
    resume = distributed.find_checkpoint(args.output_dir, args.resume)
    distributed.hold_flags(args, resume, distributed.HELD)
    if weights := distributed.initial_weights(args, resume):
        start_from(model, weights, args.initial_checkpoint)
    if model.idle_blocks:
        distributed.log(f"WARNING: the last {model.idle_blocks} encoder blocks are not trained at this --query_depth")
    if args.use_checkpoint:
        distributed.recompute_blocks(model)
    datasets.check_memory(args, model, batch_loss, loader)
    net = distributed.wrap(model, device, args.compile, find_unused=model.idle_blocks > 0)
    # ---- optimizer
    images_per_step = args.batch_size * distributed.world_size()
    # README: 2e-4 * 2048 / 256 = 1.6e-3, weight decay 0.5 (without the flag 0.05)
    lr = args.blr * images_per_step * args.accum_iter / 256 if args.lr is None else args.lr
    optimizer = build_optimizer(args, model, lr)
    schedule = partial(
        lr_sched.warmup_cosine, base=lr, final=args.min_lr, warmup=args.warmup_epochs, epochs=args.epochs
    )
    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, args.clip_grad)
    distributed.log(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters on {device}, {updater.dtype}; "
        f"{loader.images} images, {images_per_step * args.accum_iter} per update, lr {lr:.2e}"
    )
    # ---- loop
    files = distributed.Files(every=args.save_freq)
    checkpoint = distributed.Checkpoint(args.output_dir, args, model, files, optimizer=optimizer, scaler=updater.scaler)
    position = checkpoint.resume(resume, args.start_epoch)
    for epoch, epoch_log in checkpoint.epochs(loader, position, {"loss": "train_loss", "lr": "lr"}, ticks=1000):
        with checkpoint.on_exit(epoch_log):
            stats = train_one_epoch(net, loader, updater, schedule, epoch_log, args.seed)
        epoch_log.run_log.epoch({**{f"train_{k}": v for k, v in stats.items()}, "epoch": epoch})
        checkpoint.save(distributed.Position(epoch + 1))
    distributed.log(f"{args.epochs} epochs done; checkpoint.pth and log.txt are in {args.output_dir}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
