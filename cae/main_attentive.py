"""Attentive probing of a CAE encoder: a query token gathers frozen features by cross-attention.

README: 8192 images per update, SGD with Nesterov momentum 0.9, learning rate 0.4, 90 epochs, no weight decay.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn

from cae import main_finetune
from cae.files import default_folder
from cae.models_vit import VisionTransformer
from common import distributed

PROCESSES = 32  # README: 32 GPUs


def get_args_parser() -> argparse.ArgumentParser:
    """The flags of fine-tuning, with the augmentation off, and those of the probe."""
    p = main_finetune.get_args_parser()
    p.prog = "CAE attentive probing"
    g = distributed.flag_groups(p)
    g.model.add_argument(
        "--linear_type",
        default="standard",
        choices=["standard", "attentive"],
        help="with --enable_linear_eval, what is probed: the class token, or what a query token gathers by attention",
    )
    g.output.add_argument(
        "--eval_bn",
        default="batch",
        choices=["batch", "running"],
        help="statistics of the attentive probe's batch norm in evaluations: each batch's, as the authors' program, or "
        "the running ones",
    )
    p.set_defaults(aa="")
    return p


def build_model(args: argparse.Namespace) -> VisionTransformer:
    """The network of the flags; raises UserError for values that do not fit together."""
    return main_finetune.build_model(args, lin_probe=args.enable_linear_eval, linear_type=args.linear_type)


def published_order(images: int) -> list[int]:
    """Indices of the validation images as 32 processes take them: r, r + 32, ... by process r, one after the other.

    The probe's batch norm takes each batch's own statistics in evaluations. In this order a batch has images of many
    classes, as in the published rows, and the same ones on any number of processes; in that of the class folders it
    would have those of one or two.
    """
    return [index for process in range(PROCESSES) for index in range(process, images, PROCESSES)]


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    torch.manual_seed(args.seed + distributed.rank())
    default_folder(args, "attentive")
    if not args.enable_linear_eval and not args.aa:  # as upstream: fine-tuning always has RandAugment
        args.aa = main_finetune.get_args_parser().get_default("aa")
    own = args.eval_bn == "batch" and args.enable_linear_eval and args.linear_type == "attentive"
    loaders = main_finetune.build_loaders(args, device, published_order if own else None)
    model = build_model(args)
    if args.enable_linear_eval:
        main_finetune.freeze(model, "query_token", "attentive_blocks", "head")
        head: nn.Linear = model.head  # type: ignore[assignment]
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    is_train = args.eval_bn == "batch"
    prefix = f"{args.exp_name}_"
    main_finetune.run(args, model, device, loaders, prefix=prefix, stage="attentive", is_train=is_train)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
