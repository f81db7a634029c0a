"""k-NN of any method's checkpoint, or of features in files: votes weighted by cosine, as main_knn.py of SemAIM and UDI.

Usage: python scripts/tools/knn.py METHOD CHECKPOINT --data_path DATA [flags]
       python scripts/tools/knn.py --features TRAIN VAL, files that scripts/tools/extract_features.py wrote.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import datasets, distributed
from common.distributed import UserError, log
from scripts.tools import extract_features
from scripts.tools.encoders import knn
from scripts.tools.encoders import load as encoders
from scripts.tools.flags import Parser


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("k-NN", usage="%(prog)s METHOD CHECKPOINT [flags], see --help")
    encoders.add_flags(p)
    for action in p._positionals._group_actions:
        action.nargs, action.required = "?", False
    p.add_argument("--features", nargs=2, metavar=("TRAIN", "VAL"), help="files with features, instead of a checkpoint")
    p.add_argument("--nb_knn", default=[10, 20], nargs="+", type=int, help="numbers of neighbours to try")
    p.add_argument("--temperature", default=0.07, type=float, help="of the votes' weights, exp(cosine / temperature)")
    p.add_argument("--json", action="store_true", help="end with a line of JSON")
    p.add_argument("--batch_size", default=128, type=int, help="images per process")
    datasets.add_flags(p, channels=False)
    p.add_argument("--amp_dtype", default="fp32", choices=["auto", "bf16", "fp16", "fp32"], help="of the encoder")
    distributed.add_launch_flags(p)
    return p


def compute(args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """Unit-length features and labels of this process's training images, and of all validation images."""
    backbone = encoders.from_flags(args).to(device)
    in_chans = args.in_chans
    train = datasets.image_dataset(args.data_path, True, True, args.dataset, args.train_split, in_chans=in_chans)
    val = datasets.image_dataset(args.data_path, False, True, args.dataset, args.val_split, in_chans=in_chans)
    datasets.check_classes(train, val, sys.maxsize)
    transform = encoders.eval_transform(backbone)
    loaders = [datasets.build_loader(args, images, transform, device, train=False) for images in (train, val)]
    log(f"{backbone.model_name}, {backbone.input_size} pixels, {backbone.pool or 'own'} pooling")
    precision = distributed.amp_dtype(args.amp_dtype, device)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        own_train, own_val = (knn.unit_features(backbone, loader) for loader in loaders)
    return [*own_train, *(torch.cat(parts) for parts in zip(*distributed.gather(own_val), strict=True))]


def load(paths: list[str]) -> list[Tensor]:
    """The same of files.

    Raises:
        UserError: they have no labels, no images, or do not belong together.
    """
    (train, train_labels, about), (val, val_labels, other) = (extract_features.read(path) for path in paths)
    for path, labels in zip(paths, (train_labels, val_labels), strict=True):
        if len(labels) == 0 or labels.min() < 0:
            raise UserError(
                f"--features {path}: its images have no class folders" if len(labels) else f"{path}: is empty"
            )
    if train.shape[1] != val.shape[1]:
        raise UserError(f"--features: {paths[0]} has {train.shape[1]} numbers per image, {paths[1]} {val.shape[1]}")
    for key, what in (("classes", "classes"), ("checkpoint", "checkpoints")):
        if about.get(key) != other.get(key):
            log(f"WARNING: --features: the files are of different {what}")
    share = slice(distributed.rank(), None, distributed.world_size())
    train, train_labels = train[share], train_labels[share]
    unit = (F.normalize(torch.from_numpy(np.array(x, np.float32)), dim=1) for x in (train, val))
    return [next(unit), torch.from_numpy(train_labels), next(unit), torch.from_numpy(val_labels)]


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    if bool(args.features) == bool(args.method):
        raise UserError("expected METHOD and CHECKPOINT, or --features TRAIN VAL")
    if args.method and not args.checkpoint:
        raise UserError(f"{args.method}: expected a CHECKPOINT after it")
    if min(args.nb_knn) < 1:
        raise UserError(f"--nb_knn {min(args.nb_knn)}: expected at least 1")
    train, train_labels, val, val_labels = load(args.features) if args.features else compute(args, device)
    results = knn.vote(train, train_labels, val, val_labels, args.nb_knn, args.temperature)
    for k, (top1, top5) in results.items():
        log(f"{k}-NN classifier result: Top1: {top1}, Top5: {top5}")
    if args.json and distributed.is_main():
        line = {"features": args.features} if args.features else {"method": args.method, "checkpoint": args.checkpoint}
        line |= {"temperature": args.temperature, "val_images": len(val)}
        print(json.dumps({**line, "knn": {k: {"top1": a, "top5": b} for k, (a, b) in results.items()}}), flush=True)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
