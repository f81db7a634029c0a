"""Types and ranges of flags, and the flags that several evaluations share, in the authors' order."""

import argparse
import math

from common import datasets, distributed
from udi.backbone import ALIASES
from udi.models_udi import MODELS

PRETRAIN_RANGES = {
    **dict.fromkeys(("momentum_teacher", "alpha"), (0, 1)),
    **dict.fromkeys(("teacher_temp", "warmup_teacher_temp"), (1e-12, math.inf)),
    **dict.fromkeys(("warmup_teacher_temp_epochs", "freeze_last_layer", "local_crops_number"), (0, math.inf)),
    **dict.fromkeys(("global_size", "local_size", "out_dim"), (1, math.inf)),
    **dict.fromkeys(("global_sampling_window_size", "local_sampling_window_size"), (1, math.inf)),
}
ARCHS = (*MODELS, *ALIASES)
CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "constant", "none")  # of timm's


def boolean(text: str) -> bool:
    """Type of upstream's flags that are on or off."""
    if text.lower() in ("on", "true", "1"):
        return True
    if text.lower() in ("off", "false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text}: expected true or false")


def limit(text: str) -> float | None:
    """Type of a largest value, 0 being none."""
    return float(text) or None


def add_checkpoint_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags that say which pre-trained backbone is evaluated."""
    group = distributed.flag_groups(p).model
    group.add_argument("--patch_size", default=16, type=int, help="patch side in pixels; that of a checkpoint wins")
    group.add_argument(
        "--pretrained_weights", default="./checkpoint.pth", help="checkpoint of the backbone; '' has none"
    )
    group.add_argument("--checkpoint_key", default="teacher", help="network of the checkpoint: teacher or student")
    group.add_argument(
        "--class_tokens",
        default="all",
        choices=["all", "first"],
        help="class tokens that stay in the backbone; its first one stands for the image",
    )


def add_deit_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of DeiT's recipe, which the semi-supervised and the transfer evaluation share."""
    g = distributed.flag_groups(p)
    g.optimizer.add_argument(
        "--batch_size", "--batch-size", default=128, type=int, help="images per process and micro-step"
    )
    g.optimizer.add_argument("--epochs", default=300, type=int, help="epochs to train (README: 1000, or 360)")
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="micro-steps per update")
    # ---- network
    g.model.add_argument(
        "--avgpool_patchtokens",
        default=0,
        type=int,
        choices=[0, 1],
        help="1 classifies the mean of the patches instead of the class token",
    )
    g.model.add_argument("--arch", default="vit_small", choices=ARCHS, help="backbone")
    add_checkpoint_flags(p)
    p.set_defaults(pretrained_weights="./vit_small/checkpoint.pth")
    g.unused.add_argument("--window_size", default=7, type=int, help="window of Swin transformers, which are not here")
    g.model.add_argument("--input-size", "--input_size", default=224, type=int, help="image side in pixels")
    g.augmentation.add_argument("--drop", default=0.0, type=float, help="dropout of the layers' outputs")
    g.augmentation.add_argument("--attn_drop_rate", default=0.0, type=float, help="dropout of attention weights")
    g.augmentation.add_argument(
        "--drop-path", "--drop_path", default=0.1, type=float, help="stochastic depth of the last block; grows from 0"
    )
    g.output.add_argument(
        "--model-ema",
        "--model_ema",
        action="store_true",
        default=True,
        help="keep a moving average of the weights in the checkpoints (default)",
    )
    g.output.add_argument(
        "--no-model-ema",
        "--no_model_ema",
        action="store_false",
        dest="model_ema",
        help="keep no moving average of the weights",
    )
    g.output.add_argument(
        "--model-ema-decay", "--model_ema_decay", default=0.99996, type=float, help="decay of the moving average"
    )
    g.output.add_argument(
        "--model-ema-force-cpu",
        "--model_ema_force_cpu",
        action="store_true",
        help="keep the moving average in the host's memory",
    )
    # ---- optimizer and rates
    g.optimizer.add_argument("--opt", default="adamw", help="optimizer, any of timm's")
    g.optimizer.add_argument(
        "--opt-eps", "--opt_eps", default=1e-8, type=float, help="epsilon of the optimizer, where it has one"
    )
    g.optimizer.add_argument(
        "--opt-betas", "--opt_betas", default=None, type=float, nargs="+", help="betas; default: the optimizer's own"
    )
    g.optimizer.add_argument(
        "--clip-grad", "--clip_grad", default=None, type=float, help="largest norm of all gradients; default: any"
    )
    g.optimizer.add_argument("--momentum", default=0.9, type=float, help="momentum of SGD")
    g.optimizer.add_argument("--weight-decay", "--weight_decay", default=0.05, type=float, help="weight decay")
    g.optimizer.add_argument(
        "--sched", default="cosine", help=f"schedule of the rate, by epoch: {', '.join(SCHEDULES)}"
    )
    g.optimizer.add_argument("--lr", default=1e-3, type=float, help="learning rate per 512 images of an update")
    g.optimizer.add_argument(
        "--lr-noise",
        "--lr_noise",
        default=None,
        type=float,
        nargs="+",
        help="one or two shares of the run, between which (or from which on) the rate is noisy; default: never",
    )
    g.optimizer.add_argument(
        "--lr-noise-pct", "--lr_noise_pct", default=0.67, type=float, help="largest noise as a share of the rate"
    )
    g.optimizer.add_argument(
        "--lr-noise-std", "--lr_noise_std", default=1.0, type=float, help="standard deviation of the noise"
    )
    g.optimizer.add_argument(
        "--warmup-lr", "--warmup_lr", default=1e-6, type=float, help="learning rate of the first two epochs"
    )
    g.optimizer.add_argument(
        "--min-lr", "--min_lr", default=1e-5, type=float, help="rate at the end of the cosine, also above --lr"
    )
    g.optimizer.add_argument(
        "--decay-epochs", "--decay_epochs", default=30, type=float, help="epochs between the steps of --sched step"
    )
    g.optimizer.add_argument("--warmup-epochs", "--warmup_epochs", default=5, type=int, help="epochs of the warm-up")
    g.unused.add_argument(
        "--cooldown-epochs", "--cooldown_epochs", default=10, type=int, help="training ends after --epochs"
    )
    g.unused.add_argument(
        "--patience-epochs",
        "--patience_epochs",
        default=10,
        type=int,
        help="belongs to the schedule plateau, which is refused",
    )
    g.optimizer.add_argument(
        "--decay-rate", "--decay_rate", "--dr", default=0.1, type=float, help="factor of --sched step, power of poly"
    )
    # ---- augmentation
    g.augmentation.add_argument(
        "--color-jitter", "--color_jitter", default=0.4, type=float, help="strength of colour jitter, without --aa only"
    )
    g.augmentation.add_argument(
        "--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy of timm; none has none"
    )
    g.augmentation.add_argument("--smoothing", default=0.1, type=float, help="label smoothing")
    g.augmentation.add_argument(
        "--train-interpolation",
        "--train_interpolation",
        default="bicubic",
        help="how training images are resized: bicubic, bilinear, lanczos or random",
    )
    g.augmentation.add_argument("--reprob", default=0.25, type=float, help="probability of random erasing")
    g.augmentation.add_argument("--remode", default="pixel", help="what random erasing fills in, as in timm")
    g.augmentation.add_argument("--recount", default=1, type=int, help="largest number of erased rectangles")
    g.unused.add_argument("--resplit", action="store_true", help="unread by the authors' program, too")
    g.augmentation.add_argument("--mixup", default=0.8, type=float, help="alpha of Mixup; 0 has none")
    g.augmentation.add_argument("--cutmix", default=1.0, type=float, help="alpha of CutMix; 0 has none")
    g.augmentation.add_argument(
        "--cutmix-minmax",
        "--cutmix_minmax",
        default=None,
        type=float,
        nargs="+",
        help="smallest and largest share of the side that CutMix replaces; default: by --cutmix",
    )
    g.augmentation.add_argument(
        "--mixup-prob", "--mixup_prob", default=1.0, type=float, help="probability that a batch is mixed"
    )
    g.augmentation.add_argument(
        "--mixup-switch-prob", "--mixup_switch_prob", default=0.5, type=float, help="share of CutMix where both are on"
    )
    g.augmentation.add_argument(
        "--mixup-mode", "--mixup_mode", default="batch", help="what is mixed alike: batch, pair or elem"
    )
    datasets.add_channel_flags(p)
    # ---- distillation, which crashes upstream
    g.unused.add_argument("--teacher-model", "--teacher_model", default="self", help="distillation is not offered")
    g.unused.add_argument("--teacher-path", "--teacher_path", default="", help="distillation is not offered")
    g.unused.add_argument(
        "--distillation-type",
        "--distillation_type",
        default="none",
        choices=["none", "soft", "hard"],
        help="distillation is not offered: soft and hard are refused",
    )
    g.unused.add_argument(
        "--distillation-alpha", "--distillation_alpha", default=0.5, type=float, help="distillation is not offered"
    )
    g.unused.add_argument(
        "--distillation-tau", "--distillation_tau", default=1.0, type=float, help="distillation is not offered"
    )
    # ---- start, files, process
    g.model.add_argument("--finetune", default="", help="checkpoint or https address, in place of --pretrained_weights")
    g.unused.add_argument(
        "--disable_weight_decay_on_bias_norm", action="store_true", help="biases and norms never decay"
    )
    g.model.add_argument("--init_scale", default=1.0, type=float, help="factor on the initial classifier")
    g.output.add_argument(
        "--output_dir",
        default="",
        help="checkpoints and logs; default: a folder beside the weights, named by the flags",
    )
    g.output.add_argument(
        "--eval", action="store_true", help="only evaluate the checkpoint of --resume or --output_dir"
    )
    g.unused.add_argument(
        "--dist-eval", "--dist_eval", action="store_true", help="processes always share the test images"
    )
    g.data.add_argument(
        "--bad_images", default="stop", choices=["stop", "skip"], help="what to do at an image that cannot be read"
    )
    g.data.add_argument("--num_workers", default=10, type=int, help="loader processes per training process")
    g.data.add_argument(
        "--pin-mem",
        "--pin_mem",
        action="store_true",
        default=True,
        help="copy images to the GPU through pinned memory (default)",
    )
    g.data.add_argument(
        "--no-pin-mem", "--no_pin_mem", action="store_false", dest="pin_mem", help="do not use pinned memory"
    )
    g.unused.add_argument("--configure", default="job.yaml", help="unread by the authors' program, too")
    distributed.add_flags(p)
