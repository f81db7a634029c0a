"""A2MIM and SimMIM pre-training. Published recipes: configs/openmixup/pretrain and scripts/a2mim_*, simmim_*."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from a2mim import config, data, optim, training
from a2mim.backbones import BACKBONES, FINE_TUNED, insertion_stride
from a2mim.config import boolean
from a2mim.engine_pretrain import batch_loss, train_one_epoch
from a2mim.files import resume_path, run_files
from a2mim.initial import start_from
from a2mim.losses import PIXEL_LOSSES, MIMLoss
from a2mim.masking_generator import BlockwiseMaskGenerator
from a2mim.models_a2mim import MASK_TOKENS, MaskedImageModel, build_masked
from a2mim.pictures import save_reconstructions
from common import datasets, distributed

TITLES = {"a2mim": "A2MIM", "simmim": "SimMIM"}


def get_args_parser() -> argparse.ArgumentParser:
    p = config.new_parser("A2MIM pre-training")
    g = distributed.flag_groups(p)
    # ---- model
    g.model.add_argument(
        "--method",
        default="a2mim",
        choices=TITLES,
        help="simmim: no loss but L1 of masked pixels, decoder named as SimMIM's",
    )
    g.model.add_argument("--backbone", default="resnet50", help=", ".join(b for b in BACKBONES if b not in FINE_TUNED))
    g.model.add_argument("--input_size", default=224, type=int, help="side of the images in pixels")
    g.model.add_argument("--patch_size", default=16, type=int, help="side of a patch of a ViT in pixels")
    g.model.add_argument(
        "--drop_path",
        default=0.0,
        type=float,
        help="stochastic depth, probability at the last block; authors' ViTs: 0.1",
    )
    g.model.add_argument(
        "--mask_layer",
        default=0,
        type=int,
        help="depth of the mask token: k is the output of part k of [stem, layer1, layer2, layer3] of a CNN, of "
        "[patches, positions, block 0, ...] of a ViT; authors' A2MIM: ViT 0, CNN 3; SimMIM 0",
    )
    g.model.add_argument(
        "--mask_token",
        default="learnable",
        choices=MASK_TOKENS,
        help="learnt; zero or randn, frozen; mean of the batch's or of each image's features; or none",
    )
    g.model.add_argument(
        "--mask_init",
        default=0.0,
        type=float,
        help="where a learnt factor on masked features starts, 0: no such factor; authors' recipes named init: 1e-6",
    )
    g.model.add_argument(
        "--mask_replace",
        default=False,
        type=boolean,
        help="true: the token replaces masked features (SimMIM), false: it is added to them (A2MIM)",
    )
    # ---- masks and loss
    g.model.add_argument("--mask_patch_size", default=32, type=int, help="side of a masked block in pixels")
    g.model.add_argument(
        "--model_patch_size",
        default=0,
        type=int,
        help="pixels per side of a feature at --mask_layer; 0: computed, else checked",
    )
    g.model.add_argument(
        "--mask_ratio", default=0.6, type=float, help="share of the blocks that are masked, rounded up"
    )
    g.model.add_argument(
        "--mask_color",
        default="mean",
        choices=["mean", "zero"],
        help="mean: masked pixels take the image's mean colour (A2MIM); zero: images stay as they are (SimMIM)",
    )
    g.augmentation.add_argument(
        "--crop_scale",
        default=[0.8, 1.0],
        type=float,
        nargs=2,
        help="smallest and largest share of an image in a crop; authors' ViTs and SimMIM: 0.67 1",
    )
    losses = [name.removesuffix("_loss") for name in PIXEL_LOSSES]
    g.model.add_argument("--loss", default="l1", choices=losses, help="loss of a pixel; authors' CNNs: focal_l1")
    g.model.add_argument(
        "--focal_alpha", default=0.2, type=float, help="focal losses: growth of a pixel's weight with its error"
    )
    g.model.add_argument("--focal_gamma", default=1.0, type=float, help="focal losses: power of a pixel's weight")
    g.model.add_argument(
        "--unmask_weight",
        default=0.0,
        type=float,
        help="weight of visible pixels in the loss of pixels, masked ones have 1",
    )
    g.model.add_argument(
        "--fft_weight", default=0.0, type=float, help="weight of the Fourier loss; authors' ViTs 0.1, ResNet-50 0.5"
    )
    g.model.add_argument(
        "--fft_focal",
        default=True,
        type=boolean,
        help="Fourier loss: true: focal, of the batch's mean; false: --loss of the moduli of every image",
    )
    g.model.add_argument(
        "--fft_unmask_weight", default=0.0, type=float, help="Fourier loss: share of the prediction at visible pixels"
    )
    g.model.add_argument(
        "--fft_unmask_replace",
        default="mixed",
        choices=["mixed", "target", "prediction", "mean"],
        help="Fourier loss: what the rest of visible pixels is; mixed: half target, half prediction",
    )
    g.model.add_argument(
        "--fft_reweight",
        default=False,
        type=boolean,
        help="Fourier loss that is not focal: multiplied by its own value",
    )
    # ---- optimizer
    optim.add_flags(p)
    p.set_defaults(  # authors' configurations of CNNs; their ViTs: 4e-4, step at epoch 700 of 800, clip 5
        epochs=300,
        batch_size=256,
        lr=1.2e-3,
        sched="StepFixCosineAnnealing",
        warmup_epochs=10,
        sync_bn=True,
    )
    # ---- data, files, process
    datasets.add_augment_flag(p, "pillow", "tensor", "device")
    datasets.add_flags(p)
    p.set_defaults(data_path="data/ImageNet")
    g.output.add_argument(
        "--save_every", default=10, type=int, help="epochs between numbered checkpoints, of which the newest is kept"
    )
    g.output.add_argument(
        "--save_recon_every", default=0, type=int, help="iterations between pictures of reconstructions; 0: none"
    )
    g.output.add_argument(
        "--recon_iters_per_epoch",
        default=0,
        type=int,
        help="iterations per epoch of the run that --save_recon_every was chosen for; 0: this one",
    )
    distributed.add_flags(p, pretrains=True)
    return p


def build_loss(args: argparse.Namespace) -> MIMLoss:
    """The loss of the flags."""
    if args.method == "simmim":
        if args.loss != "l1" or args.fft_weight:
            raise distributed.UserError("--method simmim: has no --loss but l1 and no --fft_weight")
        return MIMLoss(type="SimMIMHead", encoder_in_channels=args.in_chans or 3)
    return MIMLoss(
        loss={"mode": f"{args.loss}_loss", "alpha": args.focal_alpha, "gamma": args.focal_gamma},
        unmask_weight=args.unmask_weight,
        fft_weight=args.fft_weight,
        fft_focal=args.fft_focal,
        fft_unmask_weight=args.fft_unmask_weight,
        fft_unmask_replace=args.fft_unmask_replace,
        fft_reweight=args.fft_reweight,
        encoder_in_channels=args.in_chans or 3,
    )


def build_model(args: argparse.Namespace, **overrides) -> MaskedImageModel:
    """The network of the flags (and overrides by keyword); raises UserError for values that do not fit together."""
    keywords: dict[str, Any] = {"patch_size": args.patch_size} if "vit" in args.backbone else {}
    keywords |= {
        "img_size": args.input_size,
        "drop_path": args.drop_path,
        "mask_layer": args.mask_layer,
        "mask_token": args.mask_token,
        "mask_init": args.mask_init,
        "mask_replace": args.mask_replace,
        "method": args.method,
        "channels_last": torch.cuda.is_available() and args.device != "cpu",
        "loss": build_loss(args),
    }
    with distributed.user_errors(f"--backbone {args.backbone} --input_size {args.input_size}"):
        return build_masked(args.backbone, **{**keywords, **overrides})


def build_masking(args: argparse.Namespace) -> BlockwiseMaskGenerator:
    """The mask generator of the flags, on the grid of the masked features."""
    if args.backbone not in BACKBONES:
        raise distributed.UserError(f"--backbone {args.backbone}: expected one of {', '.join(BACKBONES)}")
    if args.backbone in FINE_TUNED:
        raise distributed.UserError(f"--backbone {args.backbone}: is for fine-tuning only")
    with distributed.user_errors(f"--backbone {args.backbone}"):
        stride = insertion_stride(args.backbone, args.mask_layer, args.patch_size)
    if args.model_patch_size not in (0, stride):
        raise distributed.UserError(
            f"--model_patch_size {args.model_patch_size}: {args.backbone} has features of {stride} pixels at "
            f"--mask_layer {args.mask_layer}"
        )
    with distributed.user_errors("--input_size, --mask_patch_size and --mask_layer"):
        return BlockwiseMaskGenerator(args.input_size, args.mask_patch_size, stride, args.mask_ratio)


def build_data(args: argparse.Namespace, device: torch.device) -> tuple[datasets.Loader, dict]:
    """Training batches of the flags, and what else `batch_loss` takes: fills, filled_target."""
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        raise distributed.UserError(f"--crop_scale {args.crop_scale}: expected two shares, 0 to 1, increasing")
    statistics = data.own_statistics(args)
    masking, scale = build_masking(args), tuple(args.crop_scale)
    transform = data.PretrainTransform(masking, args.input_size, scale, *statistics, augment=args.augment)
    loader = data.train_loader(args, data.images(args, train=True, labelled=False), transform, device)
    return loader, view_of(args)


def view_of(args: argparse.Namespace) -> dict[str, bool]:
    """Whether masked pixels are filled in what the network sees and predicts, as arguments of `reconstruct`."""
    fills = args.mask_color == "mean"
    # As upstream: SimMIM on filled images predicts the filled image.
    return {"fills": fills, "filled_target": fills and args.method == "simmim"}


def build_optimizer(args: argparse.Namespace, model: MaskedImageModel, lr: float) -> torch.optim.Optimizer:
    """--opt with the options of --paramwise."""
    return optim.build_optimizer(args, optim.param_groups(model, {**optim.optimizer_cfg(args), "lr": lr}))


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device, args.deterministic)
    torch.manual_seed(args.seed + distributed.rank())
    # ---- data
    loader, context = build_data(args, device)
    if context["filled_target"]:
        distributed.log("simmim with --mask_color mean: masked targets are the mean colour, too, as upstream")
    training.check_last_batch(args, loader, args.input_size)
    # ---- model
    model = build_model(args)
    resume = resume_path(args)
    distributed.hold_flags(args, resume, distributed.HELD)
    if weights := distributed.initial_weights(args, resume):
        start_from(model, weights, args.initial_checkpoint)
    net = training.prepare(args, model, device, starts=not resume)
    if args.use_checkpoint:
        distributed.recompute_blocks(model)
    datasets.check_memory(args, model, partial(batch_loss, **context), loader)
    # ---- optimizer
    optimizer = build_optimizer(args, model, args.lr)
    schedule = optim.lr_config(args)
    optim.check_schedule(schedule)
    updater = training.build_updater(args, optimizer, model, loader)
    # ---- loop
    parts = {"optimizer": optim.OfficialOptimizer(optimizer, model), "scaler": updater.scaler}
    files = run_files(args, len(loader))
    checkpoint = distributed.Checkpoint(args.output_dir, args, optim.Weights(model), files, **parts)
    position = checkpoint.resume(resume, args.start_epoch)
    tags = {name: f"train/{name}" for name in ("loss", "loss_spatial", "loss_freq", "lr", "grad_norm")}

    # The interval counts iterations of a run with --recon_iters_per_epoch; the epochs of this one may be longer.
    every = -(-args.save_recon_every * len(loader) // (args.recon_iters_per_epoch or len(loader)))
    channels = datasets.stored_channels(vars(args))

    def draw(iteration: int, out: dict[str, Any]) -> None:
        """Draw reconstruction/epoch_<n>.png if it is due and does not exist; a full disk does not end the run."""
        path = Path(args.output_dir, "reconstruction", f"epoch_{iteration // len(loader)}.png")
        if every and iteration % every == 0 and distributed.is_main() and args.output_dir and not path.exists():
            try:
                save_reconstructions(
                    path, out["target"], out["pred"].detach(), out["mask"], TITLES[args.method], *channels
                )
            except OSError as error:
                distributed.log(f"WARNING: {path}: cannot be written ({error.strerror})")

    for epoch, epoch_log in checkpoint.epochs(loader, position, tags, "Epoch: [{done}]"):
        with checkpoint.on_exit(epoch_log, updater):
            stats = train_one_epoch(
                net,
                loader,
                updater,
                lambda it: optim.set_rates(optimizer.param_groups, schedule, it, len(loader), args.epochs),
                epoch_log,
                draw,
                args.seed,
                **context,
            )
        epoch_log.run_log.epoch({**{f"train_{k}": v for k, v in stats.items()}, "epoch": epoch + 1})
        checkpoint.save(distributed.Position(epoch + 1))
    distributed.log(f"{args.epochs} epochs done; latest.pth is in {args.output_dir or 'no folder'}")


if __name__ == "__main__":
    distributed.run(main, lambda: config.parse_args(get_args_parser()))
