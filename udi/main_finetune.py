"""Fine-tuning of a UDI backbone with labels. Recipes of the authors' rows: scripts/udi_*.sh."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torchvision import transforms

from common import datasets, distributed
from udi.engine_finetune import evaluate_checkpoint, fit
from udi.files import folder_beside
from udi.models_finetune import (
    MODELS,
    LayerDecayValueAssigner,
    VisionTransformer,
    first_class_token,
    get_parameter_groups,
    load_pretrained,
    read_weights,
)
from udi.optim import build_mixup, cosine_scheduler, create_optimizer

HALF = (0.5, 0.5, 0.5)
LATEST = "checkpoint.pth"
DERIVED = "./test_exp/"  # upstream's default folder, which it never writes to


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI fine-tuning")
    g = distributed.flag_groups(p)
    # Defaults are those of the authors' eval_finetuning.py. README: those of the README's command.
    g.optimizer.add_argument(
        "--batch_size", default=128, type=int, help="images per process and micro-step (README: 256)"
    )
    g.optimizer.add_argument("--epochs", default=100, type=int, help="epochs to train (README: 200)")
    g.optimizer.add_argument("--update_freq", "--accum_iter", default=1, type=int, help="micro-steps per update")
    g.unused.add_argument("--save_ckpt_freq", default=50, type=int, help="checkpoint.pth is written after each epoch")
    # ---- network
    g.model.add_argument(
        "--model", default="deit_small_patch16_224", help=f"network, must be given: {', '.join(MODELS)}"
    )
    g.model.add_argument(
        "--rel_pos_bias", action="store_true", default=True, help="relative position biases in every block (default)"
    )
    g.model.add_argument(
        "--disable_rel_pos_bias",
        action="store_false",
        dest="rel_pos_bias",
        help="no relative position biases (README: given)",
    )
    g.model.add_argument("--abs_pos_emb", action="store_true", help="add positions to the tokens (README: given)")
    g.model.add_argument(
        "--learned_abs_pos_emb", action="store_true", default=True, help="added positions are learned (default)"
    )
    g.model.add_argument(
        "--disable_learned_abs_pos_emb",
        action="store_false",
        dest="learned_abs_pos_emb",
        help="added positions are fixed, sines and cosines",
    )
    g.model.add_argument(
        "--layer_scale_init_value", default=0.1, type=float, help="initial layer scale; 0 has none (README: 0)"
    )
    g.model.add_argument("--input_size", default=224, type=int, help="image side in pixels")
    g.model.add_argument("--patch_size", default=16, type=int, help="patch side in pixels; that of a checkpoint wins")
    g.augmentation.add_argument("--drop", default=0.0, type=float, help="dropout of the layers' outputs")
    g.augmentation.add_argument("--attn_drop_rate", default=0.0, type=float, help="dropout of attention weights")
    g.augmentation.add_argument(
        "--drop_path", default=0.1, type=float, help="stochastic depth of the last block, grows from 0 (README: 0.1)"
    )
    g.output.add_argument("--disable_eval_during_finetuning", action="store_true", help="do not evaluate the epochs")
    g.output.add_argument(
        "--model_ema", action="store_true", help="keep a moving average of the weights in the checkpoints"
    )
    g.output.add_argument("--model_ema_decay", default=0.9999, type=float, help="decay of the moving average")
    g.output.add_argument(
        "--model_ema_force_cpu", action="store_true", help="keep the moving average in the host's memory"
    )
    # ---- optimizer
    g.optimizer.add_argument("--opt", default="adamw", help="optimizer, adamw or any of timm's")
    g.optimizer.add_argument("--opt_eps", default=1e-8, type=float, help="epsilon of the optimizer, where it has one")
    g.optimizer.add_argument(
        "--opt_betas", default=None, type=float, nargs="+", help="betas; default: the optimizer's own"
    )
    g.optimizer.add_argument(
        "--clip_grad", default=None, type=float, help="largest norm of all gradients; default: any"
    )
    g.optimizer.add_argument("--momentum", default=0.9, type=float, help="momentum of SGD and RMSprop")
    g.optimizer.add_argument("--weight_decay", default=0.05, type=float, help="weight decay at the start")
    g.optimizer.add_argument(
        "--weight_decay_end", default=None, type=float, help="weight decay at the end of a cosine; default: no change"
    )
    g.optimizer.add_argument(
        "--lr", default=4e-3, type=float, help="learning rate, whatever the batch (README: 1e-3 for 1024 images)"
    )
    g.optimizer.add_argument(
        "--layer_decay", default=0.9, type=float, help="factor on the rate per layer towards the input (README: 0.55)"
    )
    g.unused.add_argument("--warmup_lr", default=1e-6, type=float, help="the warm-up starts at 0, as upstream")
    g.optimizer.add_argument("--min_lr", default=1e-6, type=float, help="learning rate at the end")
    g.optimizer.add_argument("--warmup_epochs", default=20, type=int, help="epochs of the warm-up (README: 20)")
    g.optimizer.add_argument(
        "--warmup_steps", default=-1, type=int, help="updates of the warm-up, if positive in place of epochs"
    )
    # ---- augmentation
    g.augmentation.add_argument(
        "--color_jitter", default=0.4, type=float, help="strength of colour jitter, without --aa only"
    )
    g.augmentation.add_argument("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy of timm; '' has none")
    g.augmentation.add_argument("--smoothing", default=0.1, type=float, help="label smoothing")
    g.augmentation.add_argument(
        "--train_interpolation",
        default="bicubic",
        help="how training images are resized: bicubic, bilinear, lanczos or random",
    )
    g.output.add_argument(
        "--crop_pct",
        default=None,
        type=float,
        help="share of the image's side that is evaluated; default: 0.875, from 384 pixels on 1",
    )
    g.augmentation.add_argument("--reprob", default=0.25, type=float, help="probability of random erasing")
    g.augmentation.add_argument("--remode", default="pixel", help="what random erasing fills in, as in timm")
    g.augmentation.add_argument("--recount", default=1, type=int, help="largest number of erased rectangles")
    g.unused.add_argument("--resplit", action="store_true", help="unread by the authors' program, too")
    g.augmentation.add_argument("--mixup", default=0, type=float, help="alpha of Mixup; 0 has none (README: 0.8)")
    g.augmentation.add_argument("--cutmix", default=0, type=float, help="alpha of CutMix; 0 has none (README: 1.0)")
    g.augmentation.add_argument(
        "--cutmix_minmax",
        default=None,
        type=float,
        nargs="+",
        help="smallest and largest share of the side that CutMix replaces; default: by --cutmix",
    )
    g.augmentation.add_argument("--mixup_prob", default=1.0, type=float, help="probability that a batch is mixed")
    g.augmentation.add_argument(
        "--mixup_switch_prob", default=0.5, type=float, help="share of CutMix where both are on"
    )
    g.augmentation.add_argument("--mixup_mode", default="batch", help="what is mixed alike: batch, pair or elem")
    # ---- start
    g.model.add_argument("--finetune", default="", help="checkpoint to start from; '' trains from scratch")
    g.model.add_argument(
        "--checkpoint_key", default="teacher", help="network of a pre-training checkpoint: teacher or student"
    )
    g.model.add_argument(
        "--class_tokens",
        default="all",
        choices=["all", "first"],
        help="class tokens of a checkpoint that stay; its first one is classified with --use_cls",
    )
    g.model.add_argument(
        "--model_key",
        default="model|module",
        help="keys, the first found of which holds the weights in other files; | separates them",
    )
    g.model.add_argument("--model_prefix", default="", help="prefix of the weights' names in other files")
    g.model.add_argument("--init_scale", default=0.001, type=float, help="factor on the initial head")
    g.model.add_argument(
        "--use_mean_pooling", action="store_true", default=True, help="classify the mean of the patches (default)"
    )
    g.model.add_argument(
        "--use_cls", action="store_false", dest="use_mean_pooling", help="classify the class token (README: given)"
    )
    g.optimizer.add_argument(
        "--disable_weight_decay_on_rel_pos_bias", action="store_true", help="relative position biases do not decay"
    )
    # ---- data, files, process
    datasets.add_flags(p)
    g.unused.add_argument("--eval_data_path", default=None, help="val/ of --data_path is evaluated")
    g.model.add_argument("--nb_classes", default=0, type=int, help="number of classes; 0: 1000, as upstream always")
    g.data.add_argument(
        "--imagenet_default_mean_and_std",
        action="store_true",
        help="normalise by ImageNet's mean and deviation, not by 0.5 and 0.5 (README: given)",
    )
    g.output.add_argument(
        "--output_dir",
        default=DERIVED,
        help="checkpoints and logs; default: a folder beside --finetune, named by the flags; '' writes nothing",
    )
    g.output.add_argument("--log_dir", default=DERIVED, help="folder of TensorBoard; default: the output folder")
    g.unused.add_argument(
        "--auto_resume", action="store_true", default=False, help="a run goes on from its folder by itself"
    )
    g.unused.add_argument("--no_auto_resume", action="store_false", dest="auto_resume", help="--resume '' starts anew")
    g.output.add_argument("--save_ckpt", action="store_true", default=True, help="write checkpoints (default)")
    g.output.add_argument("--no_save_ckpt", action="store_false", dest="save_ckpt", help="write no checkpoints")
    g.output.add_argument(
        "--eval", action="store_true", help="only evaluate the checkpoint of --resume, else --finetune"
    )
    g.unused.add_argument("--dist_eval", action="store_true", help="processes always share the validation images")
    g.unused.add_argument("--enable_deepspeed", action="store_true", help="DeepSpeed is refused")
    g.unused.add_argument("--configure", default="job.yaml", help="unread by the authors' program, too")
    distributed.add_flags(p)
    p.set_defaults(data_path="/dataset/imageNet100_sicy/", num_workers=10, resume=LATEST)
    return p


def output_dir(args: argparse.Namespace) -> str:
    """The folder of --output_dir; if that is not given, one beside the weights that is named by the recipe."""
    if args.output_dir != DERIVED:
        return args.output_dir
    name = (
        f"fine-tuning-{args.epochs}-{args.warmup_epochs}-b-{args.batch_size}-lr-{args.lr:.3e}-{args.drop_path:.2f}"
        f"-{args.layer_decay:.2f}-{args.layer_scale_init_value:.2f}-pos-{args.abs_pos_emb:d}"
        f"-cls-{args.use_mean_pooling:d}-aug-{args.mixup:.1f}-{args.cutmix:.1f}"
    )
    return folder_beside(args.finetune, name)


def resume_path(args: argparse.Namespace) -> str:
    """The file of --resume; upstream's checkpoint.pth is that of the output folder, if any; '' starts anew.

    Where there is none, --eval evaluates --finetune.
    """
    found = distributed.find_checkpoint(args.output_dir, "") if args.resume == LATEST else args.resume
    return found or (args.finetune if args.eval else "")


def pretrained_weights(args: argparse.Namespace) -> dict[str, Tensor]:
    """The weights of --finetune, with the class tokens that are to be kept."""
    weights = read_weights(args.finetune, args.checkpoint_key, args.model_key, args.model_prefix)
    tokens = weights["cls_token"].shape[1]
    if tokens == 1:
        return weights
    if args.class_tokens == "all" and not args.rel_pos_bias:
        read = "none is" if args.use_mean_pooling else "the first one is"
        distributed.log(f"{args.finetune}: {tokens} class tokens, all are fine-tuned, {read} classified")
        return weights
    why = "--class_tokens first" if args.class_tokens == "first" else "relative positions know only one"
    distributed.log(f"{args.finetune}: {tokens} class tokens, only the first one is fine-tuned: {why}")
    return first_class_token(weights)


def build_model(args: argparse.Namespace, weights: dict[str, Tensor] | None = None, **overrides) -> VisionTransformer:
    """The network of the flags (and overrides by keyword), with the class tokens and patch size of weights, if given.

    Raises:
        distributed.UserError: values that do not fit together.
    """
    if args.model not in MODELS:
        raise distributed.UserError(f"--model {args.model}: expected one of {', '.join(MODELS)}")
    patch_size, tokens = args.patch_size, 1
    if weights is not None and {"cls_token", "patch_embed.proj.weight"} <= set(weights):
        patch_size, tokens = weights["patch_embed.proj.weight"].shape[-1], weights["cls_token"].shape[1]
    if patch_size != args.patch_size:
        distributed.log(f"--patch_size {args.patch_size}: the checkpoint has patches of {patch_size} pixels, taken")
    keywords = {
        "img_size": args.input_size,
        "in_chans": args.in_chans or 3,
        "patch_size": patch_size,
        "num_classes": args.nb_classes or 1000,
        "drop_rate": args.drop,
        "attn_drop_rate": args.attn_drop_rate,
        "drop_path_rate": args.drop_path,
        "init_values": args.layer_scale_init_value,
        "use_abs_pos_emb": args.abs_pos_emb,
        "use_learned_abs_pos_emb": args.learned_abs_pos_emb,
        "use_rel_pos_bias": args.rel_pos_bias,
        "use_mean_pooling": args.use_mean_pooling,
        "init_scale": args.init_scale,
        "num_class_token": tokens,
    }
    with distributed.user_errors(f"--model {args.model}"):
        return MODELS[args.model](**{**keywords, **overrides})


def build_optimizer(args: argparse.Namespace, model: VisionTransformer, lr: float) -> torch.optim.Optimizer:
    """--opt with a learning rate that shrinks by --layer_decay per layer towards the input."""
    skip = model.no_weight_decay()
    if args.disable_weight_decay_on_rel_pos_bias:
        skip |= {n for n, _ in model.named_parameters() if "relative_position_bias_table" in n}
    if args.layer_decay >= 1:
        return create_optimizer(args, get_parameter_groups(model, args.weight_decay, skip), lr)
    depth = len(model.blocks)
    assigner = LayerDecayValueAssigner([args.layer_decay ** (depth + 1 - i) for i in range(depth + 2)])
    groups = get_parameter_groups(model, args.weight_decay, skip, assigner.get_layer_id, assigner.get_scale)
    return create_optimizer(args, groups, lr)


def build_rates(args: argparse.Namespace, updates: int) -> Callable[[int, int], tuple[float, float]]:
    """Learning rate and weight decay by epoch and micro-step; `updates` per epoch."""
    lr = cosine_scheduler(
        args.lr, args.min_lr, args.epochs, updates, args.warmup_epochs, warmup_steps=args.warmup_steps
    )
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    weight_decay = cosine_scheduler(args.weight_decay, end, args.epochs, updates)

    def rates(epoch: int, step: int) -> tuple[float, float]:
        update = epoch * updates + min(step // args.update_freq, updates - 1)
        return float(lr[update]), float(weight_decay[update])

    return rates


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
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise distributed.UserError(f"--crop_pct {args.crop_pct}: expected a share of the side, above 0, at most 1")
    crop_pct = args.crop_pct or (224 / 256 if args.input_size < 384 else 1.0)
    # As upstream: bilinear, though all else is bicubic.
    resize = transforms.Resize(int(args.input_size / crop_pct), transforms.InterpolationMode.BILINEAR)
    crop = transforms.CenterCrop(args.input_size)
    return augment, transforms.Compose([resize, crop, *datasets.tensor_and_normalize(mean, std, in_chans)])


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    torch.manual_seed(args.seed + distributed.rank())
    if args.enable_deepspeed:
        raise distributed.UserError("--enable_deepspeed: DeepSpeed is not supported; leave it out")
    if not 0 <= args.model_ema_decay <= 1:
        raise distributed.UserError(f"--model_ema_decay {args.model_ema_decay}: expected 0 to 1")
    args.output_dir, args.accum_iter, args.nb_classes = output_dir(args), args.update_freq, args.nb_classes or 1000
    # ---- data
    loader, val_loader = datasets.supervised_loaders(
        args, *build_transforms(args), device, val_batch_size=int(1.5 * args.batch_size), whole_updates=True
    )
    with distributed.user_errors("--mixup, --cutmix and their options"):
        mixup = build_mixup(args)
    # ---- model
    resume, weights = resume_path(args), None
    distributed.hold_flags(args, resume)
    if resume:
        weights = distributed.weights_of(distributed.load(resume), resume)
    elif args.finetune:
        weights = pretrained_weights(args)
    model = build_model(args, weights)
    if weights is not None and not resume:
        where = f"{args.finetune}{distributed.kind_of(weights)}: check --model, --input_size and the positions' flags"
        with distributed.user_errors(where):
            missing, unexpected = load_pretrained(model, weights)
        matched = len(model.state_dict()) - len(missing)
        distributed.log(f"{args.finetune}: {distributed.load_report(matched, missing, unexpected)}")
    elif not resume:
        distributed.log("WARNING: no --finetune: the encoder has random weights")
    elif args.finetune not in ("", resume):
        distributed.log(f"--finetune {args.finetune} is not read: {resume} has the weights")
    model.to(device)
    if not args.eval:
        datasets.check_memory(args, model, lambda net, batch: net(batch[0]), loader)
    net = distributed.wrap(model, device, args.compile)
    place = torch.device("cpu") if args.model_ema_force_cpu else None
    ema = ModelEmaV3(model, args.model_ema_decay, device=place) if args.model_ema else None
    # ---- optimizer
    images_per_update = args.batch_size * args.accum_iter * distributed.world_size()
    optimizer = build_optimizer(args, model, args.lr)
    rates = build_rates(args, max(1, len(loader) // args.accum_iter))  # an evaluation has no updates
    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, args.clip_grad)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else args.smoothing)  # mixup's targets hold it
    distributed.log(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} trained parameters on {device}, "
        f"{updater.dtype}; {loader.images} images, {images_per_update} per update (README: 1024), lr {args.lr:.2e}"
    )
    # ---- loop
    if args.eval:
        evaluate_checkpoint(resume, model, val_loader, updater)
        return
    files = distributed.Files(events="" if args.log_dir == DERIVED else args.log_dir)
    parts = {"optimizer": optimizer, "scaler": updater.scaler}
    if ema is not None:
        parts["model_ema"] = ema.module
    checkpoint = distributed.Checkpoint(args.output_dir, args, model, files, **parts)
    checkpoint.writes = checkpoint.writes and args.save_ckpt
    val = None if args.disable_eval_during_finetuning else val_loader
    fit(args, net, criterion, loader, val, updater, rates, checkpoint, resume, mixup, ema)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
