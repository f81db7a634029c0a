"""Fine-tuning of a SAIM encoder with labels. Recipes of the paper's rows: scripts/saim_*.sh."""

import argparse
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from timm.data.mixup import Mixup

from common import datasets, distributed, lr_decay, lr_sched
from saim.engine_finetune import evaluate_checkpoint, fit
from saim.models_vit import MODELS, VisionTransformer, load_encoder


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("SAIM fine-tuning")
    g = distributed.flag_groups(p)
    g.optimizer.add_argument("--batch_size", default=64, type=int, help="images per process in one forward pass")
    g.optimizer.add_argument("--epochs", default=100, type=int, help="passes over the training images")
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="batches per update of the weights")
    g.model.add_argument("--model", default="vit_base_patch16", choices=MODELS, help="size of the network")
    g.model.add_argument("--input_size", default=224, type=int, help="side of the cropped images in pixels")
    g.model.add_argument("--patch_size", type=int, help="side of a patch in pixels; default: that in the model's name")
    g.augmentation.add_argument(
        "--drop_path", default=0.1, type=float, help="probability of skipping the last block; lower for earlier ones"
    )
    g.optimizer.add_argument("--clip_grad", type=float, help="largest norm of the gradient; default: any norm")
    g.optimizer.add_argument("--weight_decay", default=0.05, type=float, help="weight decay of AdamW")
    g.optimizer.add_argument("--lr", type=float, help="highest learning rate; default: computed from --blr")
    g.optimizer.add_argument(
        "--blr", default=1e-3, type=float, help="learning rate per 256 images of an update, without --lr (README: 5e-4)"
    )
    g.optimizer.add_argument(
        "--layer_decay",
        default=0.75,
        type=float,
        help="a block's learning rate as a share of the next one's, towards the input (README: 0.65)",
    )
    g.optimizer.add_argument("--min_lr", default=1e-6, type=float, help="learning rate at the end of training")
    g.optimizer.add_argument(
        "--warmup_epochs", default=5, type=int, help="epochs in which the learning rate rises (README: 20)"
    )
    g.augmentation.add_argument(
        "--color_jitter", type=float, help="strength of random changes of colour, without --aa; default: none"
    )
    g.augmentation.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", help="timm's name of an augmentation policy; '' for none"
    )
    g.augmentation.add_argument(
        "--crop_min_size", default=0.08, type=float, help="smallest crop, as a share of the image's area"
    )
    g.augmentation.add_argument("--hflip", default=0.5, type=float, help="probability of mirroring; 0 suits digits")
    g.augmentation.add_argument("--smoothing", default=0.1, type=float, help="label smoothing")
    g.augmentation.add_argument("--reprob", default=0.25, type=float, help="probability of erasing part of an image")
    g.augmentation.add_argument("--remode", default="pixel", help="what erases: const (black), rand or pixel (noise)")
    g.augmentation.add_argument("--recount", default=1, type=int, help="largest number of erased parts of an image")
    g.unused.add_argument("--resplit", action="store_true", help="the authors' program ignores it, too")
    g.augmentation.add_argument(
        "--mixup", default=0, type=float, help="alpha of Mixup, which blends two images; 0 turns it off (README: 0.8)"
    )
    g.augmentation.add_argument(
        "--cutmix", default=0, type=float, help="alpha of CutMix, which pastes a part; 0 turns it off (README: 1.0)"
    )
    g.augmentation.add_argument(
        "--cutmix_minmax", type=float, nargs="+", help="smallest and largest pasted share, in place of --cutmix"
    )
    g.augmentation.add_argument(
        "--mixup_prob", default=1.0, type=float, help="probability that a batch is changed by Mixup or CutMix"
    )
    g.augmentation.add_argument(
        "--mixup_switch_prob", default=0.5, type=float, help="probability of CutMix where both are on"
    )
    g.augmentation.add_argument(
        "--mixup_mode", default="batch", help="what shares one draw of Mixup or CutMix: batch, pair or elem"
    )
    g.model.add_argument(
        "--finetune",
        default="./pretrain/saim_base/checkpoint.pth",
        help="checkpoint of the encoder; '' starts from random weights",
    )
    g.model.add_argument(
        "--global_pool", action="store_true", default=True, help="classify the mean of the patch tokens (default)"
    )
    g.model.add_argument(
        "--cls_token", action="store_false", dest="global_pool", help="classify the class token (README)"
    )
    datasets.add_flags(p)
    g.model.add_argument("--nb_classes", default=1000, type=int, help="number of classes")
    g.output.add_argument(
        "--output_dir", default="./finetune/saim_base", help="folder of checkpoints, log.txt and TensorBoard events"
    )
    g.output.add_argument(
        "--save_freq", default=10, type=int, help="epochs from one numbered checkpoint, which is kept, to the next"
    )
    g.output.add_argument("--eval", action="store_true", help="only evaluate the checkpoint that --resume names")
    g.unused.add_argument("--dist_eval", action="store_true", help="processes always share the validation images")
    distributed.add_flags(p)
    return p


def build_model(args: argparse.Namespace) -> VisionTransformer:
    """The network of the flags; raises UserError for values that do not fit together."""
    with distributed.user_errors(f"--model {args.model}"):
        return MODELS[args.model](
            img_size=args.input_size,
            in_chans=args.in_chans or 3,
            num_classes=args.nb_classes,
            drop_path_rate=args.drop_path,
            global_pool=args.global_pool,
            **({} if args.patch_size is None else {"patch_size": args.patch_size}),
        )


def build_optimizer(args: argparse.Namespace, model: VisionTransformer, lr: float) -> torch.optim.AdamW:
    """AdamW with a learning rate that shrinks by --layer_decay per block towards the input."""
    depth = len(model.blocks)
    groups = lr_decay.layer_decay_groups(model, args.weight_decay, args.layer_decay, depth, model.no_weight_decay())
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)  # upstream main_finetune.py@08d36c3


def build_mixup(args: argparse.Namespace) -> Mixup | None:
    """timm's Mixup and CutMix; None if both are off, or nothing is trained."""
    if args.eval or not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    if args.batch_size % 2:
        raise distributed.UserError(f"--batch_size {args.batch_size}: Mixup and CutMix need an even number")
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.nb_classes,
    )


def main(args: argparse.Namespace) -> None:
    distributed.check_ranges(args, {"crop_min_size": (1e-9, 1), "hflip": (0, 1)})
    device = distributed.init(args.device)
    torch.manual_seed(args.seed + distributed.rank())
    # ---- data
    mean, std, in_chans = datasets.statistics(args)
    with distributed.user_errors(f"--aa {args.aa} --remode {args.remode}"):
        augment = datasets.finetune_transform(
            args.input_size,
            args.color_jitter,
            args.aa,
            args.reprob,
            args.remode,
            args.recount,
            mean=mean,
            std=std,
            crop_min_size=args.crop_min_size,
            hflip=args.hflip,
            in_chans=in_chans,
        )
    val_transform = datasets.eval_transform(args.input_size, None, mean, std, in_chans)
    loader, val_loader = datasets.supervised_loaders(args, augment, val_transform, device)
    with distributed.user_errors("--mixup, --cutmix and their options"):
        mixup = build_mixup(args)
    # ---- model
    model = build_model(args)
    resume = distributed.find_checkpoint(args.output_dir, args.resume)
    if args.finetune and not args.eval and not resume:
        distributed.check_default_file(args, "finetune")
        load_encoder(model, args.finetune, head_std=2e-5)  # upstream main_finetune.py@08d36c3
    elif not args.finetune and not resume:
        distributed.log("WARNING: no --finetune: the encoder has random weights")
    model.to(device)
    if not args.eval:
        datasets.check_memory(args, model, lambda net, batch: net(batch[0]), loader)
    net = distributed.wrap(model, device, args.compile)
    # ---- optimizer
    images_per_step = args.batch_size * distributed.world_size()
    # README: 5e-4 * 1024 / 256 = 2e-3, weight decay 0.05, layer decay 0.65
    lr = args.blr * images_per_step * args.accum_iter / 256 if args.lr is None else args.lr
    optimizer = build_optimizer(args, model, lr)
    schedule = partial(
        lr_sched.warmup_cosine, base=lr, final=args.min_lr, warmup=args.warmup_epochs, epochs=args.epochs
    )
    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, args.clip_grad)
    # Mixup folds the smoothing into its soft targets.
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else args.smoothing)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    distributed.log(
        f"{args.model}: {n_parameters:,} parameters on {device}, {updater.dtype}; "
        f"{loader.images} images, {images_per_step * args.accum_iter} per update, lr {lr:.2e}"
    )
    # ---- loop
    if args.eval:
        evaluate_checkpoint(resume, model, val_loader, updater)
    else:
        files = distributed.Files(every=args.save_freq)
        checkpoint = distributed.Checkpoint(
            args.output_dir, args, model, files, optimizer=optimizer, scaler=updater.scaler
        )
        fit(args, net, criterion, loader, val_loader, updater, schedule, checkpoint, resume, mixup)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
