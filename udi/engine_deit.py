"""The training recipe of the semi-supervised and transfer evaluations, DeiT's: flags, transforms, optimizer, loop."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.scheduler_factory import create_scheduler
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torchvision import transforms

from common import datasets, distributed, lr_decay
from udi.backbone import ALIASES, load_backbone
from udi.engine_finetune import evaluate, fit
from udi.files import TextLog, folder_beside
from udi.main_finetune import build_mixup
from udi.models_eval import EvaluationViT, build_evaluation_vit
from udi.models_udi import MODELS

CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "constant", "none")


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of the network and its weights."""
    p.add_argument("--avgpool_patchtokens", default=0, type=int, choices=[0, 1], help="1: classify the patches' mean")
    p.add_argument("--arch", default="vit_small", choices=[*MODELS, *ALIASES])
    p.add_argument("--patch_size", default=16, type=int, help="in pixels; a checkpoint's own counts")
    p.add_argument("--window_size", default=7, type=int, help="no effect: of Swin transformers, which UDI has not")
    p.add_argument("--input-size", "--input_size", default=224, type=int, help="image side in pixels")
    p.add_argument(
        "--pretrained_weights", default="./vit_small/checkpoint.pth", type=str, help="'' trains from scratch"
    )
    p.add_argument("--checkpoint_key", default="teacher", type=str, help="teacher, student, or both: one run each")
    p.add_argument("--class_tokens", default="all", choices=["all", "first"], help="first: leave out the second one")
    p.add_argument("--finetune", default="", help="checkpoint or https address, in place of --pretrained_weights")
    p.add_argument("--init_scale", default=1.0, type=float, help="factor on the initial classifier")
    p.add_argument("--drop", default=0.0, type=float, help="dropout")
    p.add_argument("--attn_drop_rate", default=0.0, type=float, help="dropout of attention")
    p.add_argument("--drop-path", "--drop_path", default=0.1, type=float, help="stochastic depth of the last block")
    p.add_argument(
        "--model-ema", "--model_ema", action="store_true", default=True, help="keep a moving average (default)"
    )
    p.add_argument("--no-model-ema", "--no_model_ema", action="store_false", dest="model_ema")
    p.add_argument("--model-ema-decay", "--model_ema_decay", default=0.99996, type=float)
    p.add_argument(
        "--model-ema-force-cpu", "--model_ema_force_cpu", action="store_true", help="keep it in the host's memory"
    )


def add_optimizer_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of the optimizer and of its learning rates."""
    p.add_argument("--opt", default="adamw", type=str, help="any optimizer of timm's")
    p.add_argument("--opt-eps", "--opt_eps", default=1e-8, type=float, help="epsilon, where the optimizer has one")
    p.add_argument("--opt-betas", "--opt_betas", default=None, type=float, nargs="+", help="default: its own")
    p.add_argument("--clip-grad", "--clip_grad", default=None, type=float, help="largest gradient norm")
    p.add_argument("--momentum", default=0.9, type=float, help="of SGD")
    p.add_argument("--weight-decay", "--weight_decay", default=0.05, type=float)
    p.add_argument("--accum_iter", default=1, type=int, help="micro-steps per update")
    p.add_argument("--sched", default="cosine", type=str, help=", ".join(SCHEDULES) + "; stepped per epoch")
    p.add_argument("--lr-noise", "--lr_noise", default=None, type=float, nargs="+", help="shares of the run it is in")
    p.add_argument("--lr-noise-pct", "--lr_noise_pct", default=0.67, type=float)
    p.add_argument("--lr-noise-std", "--lr_noise_std", default=1.0, type=float)
    p.add_argument("--warmup-lr", "--warmup_lr", default=1e-6, type=float, help="of the first two epochs")
    p.add_argument("--min-lr", "--min_lr", default=1e-5, type=float, help="the cosine rises to it from a smaller --lr")
    p.add_argument("--decay-epochs", "--decay_epochs", default=30, type=float, help="of --sched step")
    p.add_argument("--warmup-epochs", "--warmup_epochs", default=5, type=int)
    p.add_argument("--cooldown-epochs", "--cooldown_epochs", default=10, type=int, help="no effect: --epochs is all")
    p.add_argument(
        "--patience-epochs", "--patience_epochs", default=10, type=int, help="no effect: of plateau, refused"
    )
    p.add_argument("--decay-rate", "--decay_rate", "--dr", default=0.1, type=float, help="of --sched step and poly")
    p.add_argument("--disable_weight_decay_on_bias_norm", action="store_true", help="no effect: they never decay")


def add_augmentation_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of what happens to the training images."""
    p.add_argument("--color-jitter", "--color_jitter", default=0.4, type=float, help="only without --aa")
    p.add_argument("--aa", default="rand-m9-mstd0.5-inc1", type=str, help="AutoAugment policy of timm; none: without")
    p.add_argument("--smoothing", default=0.1, type=float, help="label smoothing")
    p.add_argument("--train-interpolation", "--train_interpolation", default="bicubic", type=str, help="or bilinear")
    p.add_argument("--reprob", default=0.25, type=float, help="probability of random erasing")
    p.add_argument("--remode", default="pixel", type=str)
    p.add_argument("--recount", default=1, type=int)
    p.add_argument("--resplit", action="store_true", help="no effect, as upstream")
    p.add_argument("--mixup", default=0.8, type=float)
    p.add_argument("--cutmix", default=1.0, type=float)
    p.add_argument("--cutmix-minmax", "--cutmix_minmax", default=None, type=float, nargs="+")
    p.add_argument("--mixup-prob", "--mixup_prob", default=1.0, type=float)
    p.add_argument("--mixup-switch-prob", "--mixup_switch_prob", default=0.5, type=float)
    p.add_argument("--mixup-mode", "--mixup_mode", default="batch", type=str, help="batch, pair or elem")


def add_process_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of distillation (refused), files and processes."""
    p.add_argument("--teacher-model", "--teacher_model", default="self", type=str, help="no effect: of distillation")
    p.add_argument("--teacher-path", "--teacher_path", default="", type=str, help="no effect: of distillation")
    p.add_argument(
        "--distillation-type",
        "--distillation_type",
        default="none",
        choices=["none", "soft", "hard"],
        help="others are refused: upstream's crash",
    )
    p.add_argument("--distillation-alpha", "--distillation_alpha", default=0.5, type=float, help="no effect")
    p.add_argument("--distillation-tau", "--distillation_tau", default=1.0, type=float, help="no effect")
    p.add_argument(
        "--output_dir", default="", help="checkpoints, logs; default: named by the flags, beside the weights"
    )
    p.add_argument("--eval", action="store_true", help="only evaluate the checkpoint of --resume or --output_dir")
    p.add_argument("--dist-eval", "--dist_eval", action="store_true", help="no effect: they are always shared")
    p.add_argument("--bad_images", default="stop", choices=["stop", "skip"], help="what an unreadable image does")
    p.add_argument("--num_workers", default=10, type=int, help="loader processes per process")
    p.add_argument("--pin-mem", "--pin_mem", action="store_true", default=True, help="through pinned memory (default)")
    p.add_argument("--no-pin-mem", "--no_pin_mem", action="store_false", dest="pin_mem")
    p.add_argument("--configure", default="job.yaml", type=str, help="no effect, as upstream")
    distributed.add_flags(p)
    p.set_defaults(local_rank=0)


# ---- what the flags say


def build_model(args: argparse.Namespace, path: str, key: str) -> EvaluationViT:
    """The network of the flags without a head, with a checkpoint's weights; '' takes random ones."""
    weights = None
    if path:
        weights = load_backbone(path, key, args.class_tokens)
    else:
        distributed.log("WARNING: no --pretrained_weights, training from scratch")
    return build_evaluation_vit(
        args.arch,
        args.patch_size,
        weights,
        args.input_size,
        avgpool_patchtokens=args.avgpool_patchtokens,
        drop_rate=args.drop,
        attn_drop_rate=args.attn_drop_rate,
        drop_path_rate=args.drop_path,
    )


def build_transforms(args: argparse.Namespace) -> tuple[Any, Any]:
    """Training and evaluation transforms of the flags."""
    with distributed.user_errors(f"--aa {args.aa} --remode {args.remode} --train-interpolation"):
        augment = datasets.finetune_transform(
            args.input_size,
            args.color_jitter,
            None if args.aa in ("", "none") else args.aa,
            args.reprob,
            args.remode,
            args.recount,
            args.train_interpolation,
        )
    if args.input_size <= 32:  # as upstream, but for images that are not of that size yet
        resize = transforms.Resize(args.input_size, interpolation=transforms.InterpolationMode.BICUBIC)
        crop = transforms.RandomCrop(args.input_size, padding=4)
        augment.transforms[:1] = [resize, crop]
    return augment, datasets.eval_transform(args.input_size, 224 / 256)


def build_optimizer(args: argparse.Namespace, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """--opt; biases and norms take no weight decay, class tokens and positions do."""
    groups = lr_decay.decay_groups(model, args.weight_decay)
    options: dict[str, Any] = {"lr": lr, "weight_decay": args.weight_decay}
    if args.opt_betas is not None:
        options["betas"] = tuple(args.opt_betas)
    with distributed.user_errors(f"--opt {args.opt} and its flags"):
        if args.opt.lower() == "adamw":
            return torch.optim.AdamW(groups, eps=args.opt_eps, fused=True, **options)
        if not any(word in args.opt.lower() for word in ("sgd", "nesterov", "momentum")):
            options["eps"] = args.opt_eps
        return create_optimizer_v2(groups, args.opt, momentum=args.momentum, **options)


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> Any:
    """timm's scheduler of the flags; None for a constant rate."""
    if args.sched not in SCHEDULES:
        raise distributed.UserError(f"--sched {args.sched}: expected one of {', '.join(SCHEDULES)}")
    with distributed.user_errors(f"--sched {args.sched} and its flags"):
        return create_scheduler(args, optimizer)[0]


def set_lr(scheduler: Any, epoch: int) -> None:
    """Set the learning rate of an epoch.

    As upstream: a schedule is stepped with an epoch's number after that epoch, so the second epoch repeats the first
    one's rate and the last value is never used.
    """
    if scheduler is not None and epoch > 0:
        scheduler.step(epoch - 1)


def rates(
    args: argparse.Namespace, scheduler: Any, optimizer: torch.optim.Optimizer, epoch: int, _step: int
) -> tuple[float, float]:
    """Learning rate, as the scheduler sets it, and weight decay of an epoch."""
    set_lr(scheduler, epoch)
    return optimizer.param_groups[0]["lr"], args.weight_decay


# ---- the loop


class DeitFiles(distributed.Files):
    """Names with an underscore. A newest checkpoint that is not checkpoint.pth leaves this name to the one before."""

    def variant(self, word: str) -> str:
        if word == "previous" and self.latest != "checkpoint.pth":
            return "checkpoint.pth"
        return f"checkpoint_{word}.pth"


def report(
    text_log: TextLog, epoch_log: distributed.EpochLog, stats: dict[str, float], test: dict[str, float], best: float
) -> dict[str, float]:
    """As `udi.engine_finetune.report`, into text_log, too."""
    epoch_log.run_log.scalars({f"test/{k}": v for k, v in test.items()}, (epoch_log.epoch + 1) * epoch_log.total)
    text_log(
        f"epoch {epoch_log.epoch}: train loss {stats['loss']:.4f}, test loss {test['loss']:.4f}, "
        f"Acc@1 {test['acc1']:.3f}, Acc@5 {test['acc5']:.3f}, max accuracy {best:.3f}"
    )
    return {"max_accuracy": best}


def run(
    args: argparse.Namespace,
    device: torch.device,
    folder: str,
    add_head: Callable[[EvaluationViT, str, str], None],
    sets: tuple[Any, Any],
    files: DeitFiles,
    sampler: Callable[[], Any] = lambda: None,
) -> None:
    """Train and evaluate as the flags say, once per --checkpoint_key.

    Args:
        folder: of the results, under the folder of the weights, unless --output_dir is given.
        add_head: gives a model its head, from the weights of (path, key) if it can use them.
        sets: training and test images. files: names of the checkpoints.
        sampler: of the training images.
    Raises:
        distributed.UserError: flags do not fit together, or a file is not what it should be.
    """
    if args.distillation_type != "none":
        raise distributed.UserError(f"--distillation-type {args.distillation_type}: only none is supported")
    path = args.finetune or args.pretrained_weights
    keys = [key.strip() for key in args.checkpoint_key.split(",") if key.strip()]
    if not keys:
        raise distributed.UserError("--checkpoint_key: expected teacher, student or both, with a comma")
    folder = args.output_dir or folder_beside(path, folder)
    if args.resume == "checkpoint.pth" and not Path(args.resume).exists():
        args.resume = ""  # upstream's switch: what is in the run's folder
    if args.resume and len(keys) > 1:
        raise distributed.UserError(f"--resume: expected one --checkpoint_key, not {args.checkpoint_key}")
    train, val = sets
    transform, val_transform = build_transforms(args)
    args.nb_classes = len(train.classes)
    with distributed.user_errors("--mixup, --cutmix and their options"):
        mixup = build_mixup(args)
    for key in keys:
        torch.manual_seed(args.seed)
        own = folder if len(keys) == 1 else str(Path(folder) / key)
        found = (distributed.find_checkpoint(own, args.resume, name) for name in (files.latest, "checkpoint.pth"))
        resume = next(filter(None, found), "")
        if args.eval and not resume:
            raise distributed.UserError(f"--eval: {own} has no checkpoint; name one with --resume")
        # ---- data
        loader = datasets.build_loader(
            args, train, transform, device, seed=args.seed, accum_iter=args.accum_iter, sampler=sampler()
        )
        val_loader = datasets.build_loader(
            args, val, val_transform, device, train=False, batch_size=int(1.5 * args.batch_size)
        )
        # ---- model
        model = build_model(args, path, key)
        add_head(model, path, key)
        model.to(device)
        net = distributed.wrap(model, device, args.compile)
        place = torch.device("cpu") if args.model_ema_force_cpu else None
        ema = ModelEmaV3(model, args.model_ema_decay, device=place) if args.model_ema else None
        # ---- optimizer
        images_per_update = args.batch_size * args.accum_iter * distributed.world_size()
        lr = args.lr * images_per_update / 512
        optimizer = build_optimizer(args, model, lr)
        scheduler = build_scheduler(args, optimizer)
        updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter, args.clip_grad)
        distributed.log(
            f"{args.arch} ({key}): {sum(p.numel() for p in model.parameters()):,} parameters on {device}, "
            f"{updater.dtype}; {loader.images} images, {images_per_update} per update, lr {lr:.2e}"
        )
        # ---- loop
        if args.eval:
            val_loader.match_classes(distributed.load_weights(model, resume), resume)
            evaluate(model, val_loader, updater)
            continue
        parts: dict[str, Any] = {"optimizer": optimizer, "scaler": updater.scaler}
        if scheduler is not None:
            parts["lr_scheduler"] = scheduler
        if ema is not None:
            parts["model_ema"] = ema.module
        checkpoint = distributed.Checkpoint(own, args, model, files, **parts)
        # Mixup folds the smoothing into its soft targets.
        criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else args.smoothing)
        fit(
            args,
            net,
            criterion,
            loader,
            val_loader,
            updater,
            partial(rates, args, scheduler, optimizer),
            checkpoint,
            resume,
            mixup,
            ema,
            tags={"loss": "train/loss", "lr": "train/lr"},
            report=partial(report, TextLog(own, "train.log")),
        )


def scale_classifier(classifier: nn.Linear, factor: float) -> None:
    """Multiply a fresh classifier's weights and biases by --init_scale."""
    with torch.no_grad():
        classifier.weight.mul_(factor)
        classifier.bias.mul_(factor)
