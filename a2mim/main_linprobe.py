"""Linear probe of a pre-trained encoder: everything frozen but the last layer."""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from a2mim import config, main_finetune
from a2mim.models_a2mim import Classifier
from common import distributed


def get_args_parser() -> argparse.ArgumentParser:
    p = main_finetune.get_args_parser()
    p.prog = "A2MIM linear probe"
    p.set_defaults(  # authors' configs/openmixup/finetune/imagenet/r50_linear_sz224_4xb64_step_ep100.py
        method="linear",
        batch_size=64,
        opt="sgd",
        lr=30.0,
        weight_decay=0.0,
        sched="step",
        steps=[60, 80],
        aug="plain",
        smoothing=0.0,
        amp=False,
    )
    return p


def build_model(args: argparse.Namespace) -> Classifier:
    """The network of the flags; of a ViT the last layer sees the class token after the pre-trained norm.

    Raises:
        distributed.UserError: values that do not fit together.
    """
    return main_finetune.build_model(args, **({"global_pool": "token"} if "vit_" in args.backbone else {}))


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device, args.deterministic)
    torch.manual_seed(args.seed + distributed.rank())
    loaders = main_finetune.build_loaders(args, device)
    model = build_model(args)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    # As upstream: batch norms go on with batch statistics, and their running ones drift.
    main_finetune.run(args, model, device, loaders, model.train)


if __name__ == "__main__":
    distributed.run(main, lambda: config.parse_args(get_args_parser()))
