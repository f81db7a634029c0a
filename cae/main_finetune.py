"""Fine-tuning of a CAE encoder with labels. Recipes of the published rows: scripts/cae_*.sh."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from timm.data.mixup import Mixup
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torchvision import transforms

from cae import optim
from cae.augmentation import HALF
from cae.engine_finetune import evaluate, evaluate_checkpoint, fit
from cae.files import default_folder, resume_path, run_files
from cae.models_vit import MODELS, VisionTransformer, load_encoder
from common import datasets, distributed, lr_decay


def add_model_flags(parser: argparse.ArgumentParser, drop_path: float) -> None:
    """Add the flags of the network; drop_path: default of --drop_path."""
    g = distributed.flag_groups(parser)
    g.model.add_argument(
        "--model", default="deit_base_patch16_224", help=f"must be given (no default works): {', '.join(MODELS)}"
    )
    g.model.add_argument(
        "--rel_pos_bias", action="store_true", default=True, help="add relative position biases to attention (default)"
    )
    g.model.add_argument(
        "--disable_rel_pos_bias", action="store_false", dest="rel_pos_bias", help="no relative position biases"
    )
    g.model.add_argument(
        "--sin_pos_emb", action="store_true", default=True, help="add fixed sine and cosine positions (default)"
    )
    g.model.add_argument(
        "--disable_sin_pos_emb", action="store_false", dest="sin_pos_emb", help="no sine and cosine positions"
    )
    g.model.add_argument("--abs_pos_emb", action="store_true", help="learned positions in place of sine and cosine")
    g.model.add_argument(
        "--layer_scale_init_value", default=0.1, type=float, help="initial layer scale; 0 for none (README, L: 1e-5)"
    )
    g.model.add_argument("--input_size", default=224, type=int, help="side of the images in pixels")
    g.model.add_argument("--patch_size", type=int, help="side of a patch in pixels; default: that in the model's name")
    g.augmentation.add_argument("--drop", default=0.0, type=float, help="dropout of tokens")
    g.augmentation.add_argument("--attn_drop_rate", default=0.0, type=float, help="dropout of attention")
    g.augmentation.add_argument(
        "--drop_path",
        default=drop_path,
        type=float,
        help="probability of skipping the last block in training; lower for earlier ones",
    )
    g.model.add_argument(
        "--init_scale", default=0.001, type=float, help="factor by which the head's initial weights are reduced"
    )
    g.model.add_argument(
        "--use_mean_pooling", action="store_true", default=True, help="classify the mean of the patch tokens (default)"
    )
    g.model.add_argument(
        "--use_cls",
        action="store_false",
        dest="use_mean_pooling",
        help="classify the class token, after the final norm",
    )


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("CAE fine-tuning")
    g = distributed.flag_groups(p)
    g.optimizer.add_argument("--batch_size", default=64, type=int, help="images per process in one forward pass")
    g.optimizer.add_argument("--epochs", default=30, type=int, help="passes over the training images (README, B: 100)")
    g.optimizer.add_argument(
        "--update_freq", "--accum_iter", default=1, type=int, help="batches per update of the weights"
    )
    g.output.add_argument(
        "--save_ckpt_freq", default=5, type=int, help="epochs from one numbered checkpoint to the next"
    )
    # ---- model
    add_model_flags(p, drop_path=0.1)
    g.output.add_argument(
        "--disable_eval_during_finetuning", action="store_true", help="do not evaluate after every epoch"
    )
    g.output.add_argument(
        "--model_ema", action="store_true", help="keep a moving average of the weights in the checkpoints"
    )
    g.output.add_argument(
        "--model_ema_decay", default=0.9999, type=float, help="momentum of the average of --model_ema"
    )
    g.output.add_argument(
        "--model_ema_force_cpu", action="store_true", help="keep the average of --model_ema in the host's memory"
    )
    # ---- optimizer
    optim.add_flags(p)
    g.optimizer.add_argument(
        "--lr", default=5e-4, type=float, help="highest learning rate (README, B: 8e-3 for 4096 images per update)"
    )
    g.optimizer.add_argument(
        "--layer_decay",
        default=0.9,
        type=float,
        help="a block's learning rate as a share of the next one's, towards the input (README, B: 0.65)",
    )
    g.unused.add_argument(
        "--warmup_lr", default=1e-6, type=float, help="the warm-up starts at 0, as in the authors' code"
    )
    g.optimizer.add_argument("--min_lr", default=1e-6, type=float, help="learning rate at the end of training")
    g.optimizer.add_argument("--warmup_epochs", default=5, type=int, help="epochs in which the learning rate rises")
    g.optimizer.add_argument(
        "--warmup_steps",
        default=-1,
        type=int,
        help="updates in which the learning rate rises, in place of --warmup_epochs, if above 0",
    )
    # ---- augmentation
    g.augmentation.add_argument(
        "--color_jitter", default=0.4, type=float, help="strength of random changes of colour, without --aa"
    )
    g.augmentation.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", help="timm's name of an augmentation policy; '' for none"
    )
    g.augmentation.add_argument("--smoothing", default=0.1, type=float, help="label smoothing")
    g.augmentation.add_argument(
        "--train_interpolation", default="bicubic", help="how images are resized: bicubic, bilinear, lanczos or random"
    )
    g.augmentation.add_argument(
        "--crop_pct", type=float, help="share of the side that evaluations see; default: 0.875, from 384 pixels on 1"
    )
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
    # ---- what is loaded
    g.model.add_argument("--finetune", default="", help="checkpoint of the encoder; '' starts from random weights")
    g.model.add_argument(
        "--model_key",
        default="model|module|state_dict",
        help="keys under which --finetune may hold the weights, in this order",
    )
    g.model.add_argument("--model_prefix", default="", help="prefix of the weights' names in --finetune")
    g.model.add_argument(
        "--new_cls_norm",
        action="store_true",
        help="with --use_cls start with a new final norm, as the authors' code does, instead of the checkpoint's",
    )
    g.optimizer.add_argument(
        "--disable_weight_decay_on_rel_pos_bias",
        action="store_true",
        help="no weight decay on relative position biases",
    )
    # ---- data, files, process
    datasets.add_flags(p)
    g.data.add_argument("--eval_data_path", help="folder of the validation images; default: val/ in --data_path")
    g.model.add_argument("--nb_classes", default=0, type=int, help="number of classes; 0: as many as the class folders")
    g.augmentation.add_argument(
        "--imagenet_default_mean_and_std",
        action="store_true",
        help="normalise images by ImageNet's mean and deviation instead of 0.5 and 0.5",
    )
    g.data.add_argument(
        "--data_set",
        default="IMNET",
        choices=["CIFAR", "IMNET", "IMNET100", "image_folder"],
        help="IMNET: train/ and val/ in --data_path; image_folder: class folders in --data_path and --eval_data_path; "
        "CIFAR: CIFAR-100; IMNET100 is not supported",
    )
    g.output.add_argument("--output_dir", default="", help="folder of checkpoints and log.txt; '' writes nothing")
    g.output.add_argument("--log_dir", help="folder of TensorBoard's events; default: --output_dir")
    g.process.add_argument(
        "--auto_resume", action="store_true", default=True, help="continue a run found in --output_dir (default)"
    )
    g.process.add_argument(
        "--no_auto_resume", action="store_false", dest="auto_resume", help="start anew, whatever is in --output_dir"
    )
    g.output.add_argument("--save_ckpt", action="store_true", default=True, help="write checkpoints (default)")
    g.output.add_argument("--no_save_ckpt", action="store_false", dest="save_ckpt", help="write no checkpoints")
    g.output.add_argument(
        "--eval",
        action="store_true",
        help="only evaluate the checkpoint of --resume, of --output_dir, or of --finetune",
    )
    g.unused.add_argument("--dist_eval", action="store_true", help="processes always share the validation images")
    distributed.add_flags(p)
    g.process.add_argument("--enable_deepspeed", action="store_true", help="not supported, is refused")
    g.model.add_argument(
        "--enable_linear_eval",
        action="store_true",
        help="freeze the encoder and train a head on its class token, or the probe of main_attentive.py",
    )
    g.unused.add_argument("--enable_multi_print", action="store_true", help="process 0 prints")
    g.output.add_argument(
        "--exp_name", default="", help="prefix of the numbered checkpoints' names, in attentive probing"
    )
    p.set_defaults(data_path="/datasets01/imagenet_full_size/061417/", num_workers=10)
    return p


def build_model(args: argparse.Namespace, **overrides) -> VisionTransformer:
    """The network of the flags (and overrides by keyword); raises UserError for values that do not fit together."""
    if args.model not in MODELS:
        raise distributed.UserError(f"--model {args.model}: expected one of {', '.join(MODELS)}")
    if args.model.endswith(("_384", "_512")) and not args.model.endswith(f"_{args.input_size}"):
        raise distributed.UserError(f"--model {args.model}: expected --input_size {args.model[-3:]}")
    if args.nb_classes < 1:
        raise distributed.UserError(f"--nb_classes {args.nb_classes}: expected the data set's number of classes")
    keywords = {
        "img_size": args.input_size,
        "in_chans": args.in_chans or 3,
        "num_classes": args.nb_classes,
        "drop_rate": args.drop,
        "attn_drop_rate": args.attn_drop_rate,
        "drop_path_rate": args.drop_path,
        "init_values": args.layer_scale_init_value,
        "use_rel_pos_bias": args.rel_pos_bias,
        "use_mean_pooling": args.use_mean_pooling,
        "sin_pos_emb": args.sin_pos_emb,
        "abs_pos_emb": args.abs_pos_emb,
        "init_scale": args.init_scale,
    }
    if args.patch_size is not None:
        keywords["patch_size"] = args.patch_size
    with distributed.user_errors(f"--model {args.model}"):
        return MODELS[args.model](**{**keywords, **overrides})


def build_optimizer(args: argparse.Namespace, model: VisionTransformer, lr: float) -> torch.optim.Optimizer:
    """--opt with a learning rate that shrinks by --layer_decay per layer towards the input.

    README: AdamW, weight decay 0.05, layer decay 0.65 (B) and 0.75 (L); betas are the optimizer's. As upstream: without
    any weight decay all layers learn at the same rate.
    """
    skip = model.no_weight_decay()
    if args.disable_weight_decay_on_rel_pos_bias:
        skip |= {n for n, _ in model.named_parameters() if "relative_position_bias_table" in n}
    if args.weight_decay == 0 or args.layer_decay == 1:
        groups = optim.param_groups(model, args.weight_decay, skip)
    else:
        groups = lr_decay.layer_decay_groups(model, args.weight_decay, args.layer_decay, len(model.blocks), skip)
    return optim.create_optimizer(args, groups, lr)


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


def build_transforms(args: argparse.Namespace):
    """Training and evaluation transforms of the flags."""
    normal = args.imagenet_default_mean_and_std
    usual = (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD) if normal else (HALF, HALF)
    mean, std, in_chans = datasets.statistics(args, *usual)
    with distributed.user_errors(f"--aa {args.aa} --remode {args.remode} --train_interpolation"):
        augment = datasets.finetune_transform(
            args.input_size,
            args.color_jitter,
            args.aa,
            args.reprob,
            args.remode,
            args.recount,
            args.train_interpolation,
            mean,
            std,
            in_chans=in_chans,
        )
    if args.input_size <= 32:  # as upstream, but for images that are not of that size yet
        resize = transforms.Resize(args.input_size, interpolation=transforms.InterpolationMode.BICUBIC)
        crop = transforms.RandomCrop(args.input_size, padding=4)
        augment.transforms[:1] = [resize, crop]
    crop_pct = args.crop_pct or (224 / 256 if args.input_size < 384 else 1.0)
    return augment, datasets.eval_transform(args.input_size, crop_pct, mean, std, in_chans)


def build_loaders(
    args: argparse.Namespace, device: torch.device, val_order: Callable[[int], list[int]] | None = None
) -> tuple[datasets.Loader, datasets.Loader | None]:
    """Training batches of the flags, and validation batches, or None where no evaluation needs them.

    val_order: as in `supervised_loaders`.
    """
    if args.enable_deepspeed:
        raise distributed.UserError("--enable_deepspeed: DeepSpeed is not supported; leave it out")
    args.accum_iter = args.update_freq
    if args.data_set == "IMNET100":
        raise distributed.UserError("--data_set IMNET100: has no definition upstream; use IMNET or image_folder")
    if args.data_set == "image_folder" and not args.eval_data_path:
        raise distributed.UserError("--data_set image_folder: needs --eval_data_path")
    if args.data_set == "CIFAR":
        args.dataset = args.dataset or "torch/cifar100"
    augment, val_transform = build_transforms(args)
    direct = args.data_set == "image_folder"
    if args.disable_eval_during_finetuning and not args.eval:
        images = datasets.image_dataset(
            args.data_path,
            True,
            True,
            args.dataset,
            args.train_split,
            direct=direct,
            skip=args.output_dir,
            in_chans=args.in_chans,
        )
        datasets.follow_classes(args, images, images)
        options = {"seed": args.seed, "accum_iter": args.accum_iter, "whole_updates": True}
        return datasets.build_loader(args, images, augment, device, **options), None
    return datasets.supervised_loaders(
        args,
        augment,
        val_transform,
        device,
        val_path=args.eval_data_path or "",
        val_batch_size=int(1.5 * args.batch_size),
        whole_updates=True,
        val_order=val_order,
        direct=direct,
    )


def freeze(model: nn.Module, *trained: str) -> None:
    """Train the named parts only."""
    for name, param in model.named_parameters():
        param.requires_grad_(name.split(".")[0] in trained)


def take_weights(args: argparse.Namespace, model: VisionTransformer, resume: str, head_std: float) -> None:
    """Load --finetune, unless a run continues from `resume`; head_std: as in `load_encoder`."""
    if args.finetune and not resume:
        std, keys = 0.0 if args.eval else head_std, tuple(args.model_key.split("|"))
        load_encoder(model, args.finetune, std, keys, args.model_prefix, keep_norm=not args.new_cls_norm)
    elif args.finetune:
        distributed.log(f"--finetune {args.finetune} is not read: {resume} has the weights")
    elif not resume:
        distributed.log("WARNING: no --finetune: the encoder has random weights")


def run(
    args: argparse.Namespace,
    model: VisionTransformer,
    device: torch.device,
    loaders: tuple[datasets.Loader, datasets.Loader | None],
    head_std: float = 0.0,
    prefix: str = "",
    stage: str = "finetune",
    **kwargs,
) -> None:
    """Load, train, evaluate as the flags say.

    Args:
        model: whose frozen parts are frozen. head_std: as in `load_encoder`. stage: as in `resume_path`.
        prefix: of numbered checkpoints. kwargs: of the forward pass in evaluations.
    """
    loader, val_loader = loaders
    with distributed.user_errors("--mixup, --cutmix and their options"):
        mixup = build_mixup(args)
    # ---- model
    resume = resume_path(args, stage)
    distributed.hold_flags(args, resume)
    take_weights(args, model, resume, head_std)
    model.to(device)
    if not args.eval:
        datasets.check_memory(args, model, lambda net, batch: net(batch[0], is_train=False), loader)
    net = distributed.wrap(model, device, args.compile, find_unused=args.abs_pos_emb)  # positions get no gradient
    place = torch.device("cpu") if args.model_ema_force_cpu else None
    ema = ModelEmaV3(model, args.model_ema_decay, device=place) if args.model_ema else None
    # ---- optimizer
    optimizer = build_optimizer(args, model, args.lr)
    updates = max(1, len(loader) // args.accum_iter)  # an evaluation has none
    by_update = optim.build_rates(args, updates)

    def rates(epoch: int, step: int) -> tuple[float, float]:
        return by_update(epoch * updates + step // args.accum_iter)

    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, args.clip_grad)
    # Mixup folds the smoothing into its soft targets.
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else args.smoothing)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    images_per_update = args.batch_size * args.accum_iter * distributed.world_size()
    distributed.log(
        f"{args.model}: {n_parameters:,} trained parameters on {device}, {updater.dtype}; "
        f"{loader.images} images, {images_per_update} per update, lr {args.lr:.2e}"
    )
    # ---- loop
    if val_loader is not None and args.eval and args.finetune and not resume:
        evaluate(model, val_loader, updater, **kwargs)
        return
    if val_loader is not None and args.eval:
        evaluate_checkpoint(resume, model, val_loader, updater, **kwargs)
        return
    files = run_files(args, args.save_ckpt_freq, prefix, stage=stage)
    parts = {"optimizer": optimizer, "scaler": updater.scaler, **({"model_ema": ema.module} if ema else {})}
    checkpoint = distributed.Checkpoint(args.output_dir, args, model, files, **parts)
    checkpoint.writes = checkpoint.writes and args.save_ckpt
    kwargs["best_name"] = "checkpoint-best.pth"
    fit(args, net, criterion, loader, val_loader, updater, rates, checkpoint, resume, mixup, ema, **kwargs)


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    torch.manual_seed(args.seed + distributed.rank())
    default_folder(args, "finetune")
    if args.enable_linear_eval and args.aa == get_args_parser().get_default("aa"):
        args.aa = ""  # as upstream
    loaders = build_loaders(args, device)
    model = build_model(args, lin_probe=args.enable_linear_eval)
    if args.enable_linear_eval:  # as upstream: the class token, without fc_norm
        freeze(model, "head")
    run(args, model, device, loaders, head_std=0.01 if args.enable_linear_eval else 0.0)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
