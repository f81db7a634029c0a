"""Linear probing of a SAIM encoder. Recipes of the paper's rows: scripts/saim_*.sh."""

import argparse
import sys
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn

from common import datasets, distributed, lr_sched
from saim.engine_finetune import evaluate_checkpoint, fit
from saim.models_vit import MODELS, VisionTransformer, load_encoder


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("SAIM linear probing")
    g = distributed.flag_groups(p)
    g.optimizer.add_argument(
        "--batch_size", default=512, type=int, help="images per process in one forward pass (README: 64)"
    )
    g.optimizer.add_argument("--epochs", default=90, type=int, help="passes over the training images")
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="batches per update of the weights")
    g.model.add_argument(
        "--model",
        default="vit_large_patch16",
        choices=MODELS,
        help="size of the network (README: vit_base_patch16)",
    )
    g.model.add_argument("--input_size", default=224, type=int, help="side of the cropped images in pixels")
    g.model.add_argument("--patch_size", type=int, help="side of a patch in pixels; default: that in the model's name")
    g.optimizer.add_argument("--weight_decay", default=0, type=float, help="weight decay of the classifier")
    g.optimizer.add_argument("--lr", type=float, help="highest learning rate; default: computed from --blr")
    g.optimizer.add_argument(
        "--blr", default=0.1, type=float, help="learning rate per 256 images of an update, used without --lr"
    )
    g.optimizer.add_argument("--min_lr", default=0.0, type=float, help="learning rate at the end of training")
    g.optimizer.add_argument(
        "--warmup_epochs", default=10, type=int, help="epochs in which the learning rate rises (README: 0)"
    )
    g.model.add_argument("--finetune", default="", help="checkpoint of the encoder; '' probes random weights")
    g.model.add_argument(
        "--global_pool", action="store_true", default=False, help="classify the mean of the patch tokens"
    )
    g.model.add_argument(
        "--cls_token", action="store_false", dest="global_pool", help="classify the class token (default and README)"
    )
    datasets.add_flags(p)
    g.model.add_argument("--nb_classes", default=1000, type=int, help="number of classes")
    g.output.add_argument(
        "--output_dir", default="./output_dir", help="folder of checkpoints, log.txt and TensorBoard events"
    )
    g.output.add_argument(
        "--save_freq", default=10, type=int, help="epochs from one numbered checkpoint, which is kept, to the next"
    )
    g.output.add_argument("--eval", action="store_true", help="only evaluate the checkpoint that --resume names")
    g.unused.add_argument("--dist_eval", action="store_true", help="processes always share the validation images")
    distributed.add_flags(p)
    return p


def add_probe(model: VisionTransformer) -> nn.Sequential:
    """Freeze the network and put a batch norm without parameters in front of its head; returns the new head."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    norm = nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6)  # statistics of each process's own images
    head = nn.Sequential(norm, model.head)
    model.head = head
    return head


def build_optimizer(args: argparse.Namespace, head: nn.Module, lr: float) -> torch.optim.SGD:
    """SGD with momentum on the head's parameters, as upstream main_linprobe.py@08d36c3, which imports LARS in vain."""
    return torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=args.weight_decay, fused=True)


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    torch.manual_seed(args.seed + distributed.rank())
    if args.batch_size < 2:
        raise distributed.UserError(f"--batch_size {args.batch_size}: the probe's batch norm needs at least 2 images")
    # ---- data
    statistics = datasets.statistics(args)
    augment = datasets.probe_transform(args.input_size, *statistics)
    val_transform = datasets.eval_transform(args.input_size, None, *statistics)
    loader, val_loader = datasets.supervised_loaders(args, augment, val_transform, device)
    # ---- model
    with distributed.user_errors(f"--model {args.model}"):
        model = MODELS[args.model](
            img_size=args.input_size,
            in_chans=args.in_chans or 3,
            num_classes=args.nb_classes,
            global_pool=args.global_pool,
            **({} if args.patch_size is None else {"patch_size": args.patch_size}),
        )
    resume = distributed.find_checkpoint(args.output_dir, args.resume)
    if args.finetune and not args.eval and not resume:
        load_encoder(model, args.finetune, head_std=0.01)  # upstream main_linprobe.py@08d36c3
    elif not args.finetune and not resume:
        distributed.log("WARNING: no --finetune: the encoder has random weights")
    head = add_probe(model)
    model.to(device)
    if not args.eval:
        datasets.check_memory(args, model, lambda net, batch: net(batch[0]), loader)
    net = distributed.wrap(model, device, args.compile)
    # ---- optimizer
    images_per_step = args.batch_size * distributed.world_size()
    # README: 0.1 * 2048 / 256 = 0.8, weight decay 0
    lr = args.blr * images_per_step * args.accum_iter / 256 if args.lr is None else args.lr
    optimizer = build_optimizer(args, head, lr)
    schedule = partial(
        lr_sched.warmup_cosine, base=lr, final=args.min_lr, warmup=args.warmup_epochs, epochs=args.epochs
    )
    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter)
    distributed.log(
        f"{args.model}: {sum(p.numel() for p in head.parameters()):,} trained parameters on {device}, {updater.dtype}; "
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
        fit(args, net, nn.CrossEntropyLoss(), loader, val_loader, updater, schedule, checkpoint, resume)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
