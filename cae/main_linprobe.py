"""Linear probing of a CAE encoder. Recipes of the published rows: scripts/cae_*.sh."""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn

from cae import main_finetune
from cae.engine_finetune import evaluate_checkpoint, fit
from cae.files import resume_path, run_files
from cae.lars import LARS
from cae.models_vit import VisionTransformer, load_encoder
from common import datasets, distributed, lr_sched


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("CAE linear probing")
    g = distributed.flag_groups(p)
    g.optimizer.add_argument("--batch_size", default=512, type=int, help="images per process in one forward pass")
    g.optimizer.add_argument("--epochs", default=90, type=int, help="passes over the training images")
    g.optimizer.add_argument("--accum_iter", default=1, type=int, help="batches per update of the head")
    g.optimizer.add_argument("--weight_decay", default=0, type=float, help="weight decay of LARS")
    g.optimizer.add_argument("--lr", type=float, help="highest learning rate; default: computed from --blr")
    g.optimizer.add_argument(
        "--blr", default=0.1, type=float, help="learning rate per 256 images of an update, used without --lr"
    )
    g.optimizer.add_argument("--min_lr", default=0.0, type=float, help="learning rate at the end of training")
    g.optimizer.add_argument("--warmup_epochs", default=10, type=int, help="epochs in which the learning rate rises")
    g.model.add_argument("--finetune", default="", help="checkpoint of the encoder; '' probes random weights")
    datasets.add_flags(p)
    g.model.add_argument("--nb_classes", default=1000, type=int, help="number of the data set's classes")
    g.output.add_argument(
        "--output_dir", default="./output_dir", help="folder of checkpoints and log.txt; '' writes nothing"
    )
    g.output.add_argument("--log_dir", default="./output_dir", help="folder of TensorBoard's events")
    g.output.add_argument("--eval", action="store_true", help="only evaluate the checkpoint of --resume")
    g.unused.add_argument("--dist_eval", action="store_true", help="processes always share the validation images")
    distributed.add_flags(p)
    main_finetune.add_model_flags(p, drop_path=0)
    g.model.add_argument(
        "--enable_linear_eval", action="store_true", help="probe the class token, as the published rows do"
    )
    g.unused.add_argument("--exp_name", default="", help="the authors' program ignores it, too")
    g.output.add_argument("--save_freq", default=50, type=int, help="epochs from one numbered checkpoint to the next")
    g.unused.add_argument("--linear_type", default="standard", help="the authors' program ignores it, too")
    p.set_defaults(model="vit_large_patch16", data_path="/datasets01/imagenet_full_size/061417/", num_workers=10)
    p.set_defaults(auto_resume=True)
    return p


def build_model(args: argparse.Namespace) -> VisionTransformer:
    """The network of the flags, without the probe; raises UserError for values that do not fit together."""
    return main_finetune.build_model(args, lin_probe=args.enable_linear_eval)


# same as saim/main_linprobe.py
def add_probe(model: VisionTransformer) -> nn.Sequential:
    """Freeze the network and put a batch norm without parameters in front of its head; returns the new head."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    norm = nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6)  # statistics of each process's own images
    head = nn.Sequential(norm, model.head)
    model.head = head
    return head


def build_optimizer(args: argparse.Namespace, head: nn.Module, lr: float) -> LARS:
    """LARS on the head's parameters; README: base rate 0.1, 16384 images per update, no weight decay."""
    return LARS(head.parameters(), lr=lr, weight_decay=args.weight_decay)


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    torch.manual_seed(args.seed + distributed.rank())
    if args.batch_size < 2 and not args.eval:
        raise distributed.UserError(f"--batch_size {args.batch_size}: the probe's batch norm needs at least 2 images")
    # ---- data
    statistics = datasets.statistics(args)
    augment = datasets.probe_transform(args.input_size, *statistics)
    val_transform = datasets.eval_transform(args.input_size, None, *statistics)
    loader, val_loader = datasets.supervised_loaders(args, augment, val_transform, device)
    # ---- model
    model = build_model(args)
    resume = resume_path(args, "linear")
    distributed.hold_flags(args, resume)
    if args.finetune and not args.eval and not resume:
        load_encoder(model, args.finetune, head_std=0.01, resize_positions=True)
    elif not args.finetune and not resume:
        distributed.log("WARNING: no --finetune: the encoder has random weights")
    elif args.finetune and resume:
        distributed.log(f"--finetune {args.finetune} is not read: {resume} has the weights")
    head = add_probe(model)
    model.to(device)
    if not args.eval:
        datasets.check_memory(args, model, lambda net, batch: net(batch[0]), loader)
    net = distributed.wrap(model, device, args.compile)
    # ---- optimizer
    images_per_update = args.batch_size * args.accum_iter * distributed.world_size()
    lr = args.blr * images_per_update / 256 if args.lr is None else args.lr
    optimizer = build_optimizer(args, head, lr)

    def rates(epoch: int, step: int) -> tuple[float, float]:
        at = epoch + step / len(loader)
        return lr_sched.warmup_cosine(at, lr, args.min_lr, args.warmup_epochs, args.epochs), args.weight_decay

    updater = distributed.Updater(optimizer, device, args.amp_dtype, args.accum_iter)
    distributed.log(
        f"{args.model}: {sum(p.numel() for p in head.parameters()):,} trained parameters on {device}, {updater.dtype}; "
        f"{loader.images} images, {images_per_update} per update (README: 16384), lr {lr:.2e}"
    )
    # ---- loop
    if args.eval:
        evaluate_checkpoint(resume, model, val_loader, updater)
        return
    if args.log_dir == get_args_parser().get_default("log_dir"):
        args.log_dir = args.output_dir
    files = run_files(args, args.save_freq, phase=0, stage="linear")
    parts = {"optimizer": optimizer, "scaler": updater.scaler}
    checkpoint = distributed.Checkpoint(args.output_dir, args, model, files, **parts)
    criterion, logged = nn.CrossEntropyLoss(), ("lr", "loss")
    fit(args, net, criterion, loader, val_loader, updater, rates, checkpoint, resume, logged=logged)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
