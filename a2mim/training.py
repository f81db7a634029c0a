"""How both kinds of training begin: initial weights, memory layout, batch norms, processes, updates."""

import argparse

import torch
from torch import nn

from a2mim import openmixup
from common import datasets, distributed
from common.distributed import sync_bn


def prepare(
    args: argparse.Namespace, model: openmixup.Model, device: torch.device, starts: bool, **kwargs
) -> nn.Module:
    """Move a model to the device, with the weights of the flags if the run starts, and wrap it for all processes.

    Args:
        kwargs: further arguments of `load_encoder`.
    """
    if args.pretrained and starts:
        openmixup.load_encoder(model, args.pretrained, **kwargs)
    if args.load_checkpoint and starts:
        with distributed.user_errors(args.load_checkpoint):
            state = distributed.load(args.load_checkpoint)
            openmixup.load_openmixup_state_dict(model, distributed.weights_of(state, args.load_checkpoint))
    model.to(device)
    if model.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if args.sync_bn:
        sync_bn.convert(model, device)
    return distributed.wrap(model, device, args.compile)


def precision(args: argparse.Namespace) -> str:
    """--amp false means float32, unless --amp_dtype asks for something."""
    return args.amp_dtype if args.amp or args.amp_dtype != "auto" else "fp32"


def build_updater(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, model: openmixup.Model, loader: datasets.Loader
) -> distributed.Updater:
    """The updates of the flags; says what is trained, and with how many images."""
    moved = sync_bn.statistics(model)
    updater = distributed.Updater(optimizer, loader.device, precision(args), args.accum_iter, args.clip_grad, moved)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    images = args.batch_size * distributed.world_size() * args.accum_iter
    distributed.log(
        f"{args.backbone}: {n_parameters:,} trained parameters on {loader.device}, {updater.dtype}; {loader.images} "
        f"images, {images} per update, lr {args.lr:.2e}"
    )
    return updater


def check_last_batch(args: argparse.Namespace, loader: datasets.Loader, size: int) -> None:
    """Raise UserError if the last batch of an epoch gives the last batch norm of a ResNet a single value."""
    left = 0 if loader.drop_last else len(loader.sampler) % args.batch_size
    last = left or args.batch_size
    if "resnet" in args.backbone and size <= 32 and last == 1:
        raise distributed.UserError(
            f"--batch_size {args.batch_size}: an epoch's last batch has one image, too few for batch norm at {size} px"
        )
