"""Logistic regression on frozen features of few labelled images: those that a list names, 1 % or 10 % of ImageNet."""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import datasets, distributed
from udi.backbone import build_backbone, load_backbone
from udi.data import semi_supervised_sets
from udi.files import TextLog
from udi.flags import ARCHS, add_checkpoint_flags, boolean
from udi.main_knn import DUMPS, dump, extract_features, interleave
from udi.models_udi import VisionTransformer

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

SCALES = (1.0, 2**-0.5, 0.5)  # of the image's side, with --multi_scale


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI logistic regression")
    g = distributed.flag_groups(p)
    # ---- features
    g.model.add_argument("--n_last_blocks", default=1, type=int, help="last blocks whose class tokens are the features")
    g.model.add_argument(
        "--avgpool_patchtokens",
        default=0,
        type=int,
        choices=[0, 1, 2],
        help="0: class tokens; 1: mean of the last block's patches, without the final norm; 2: both, with it",
    )
    g.optimizer.add_argument(
        "--batch_size_per_gpu", "--batch_size", dest="batch_size", default=128, type=int, help="images per process"
    )
    # ---- regression
    g.optimizer.add_argument(
        "--lr_lambd", default=[0.01, 0.1, 1], type=float, nargs="+", help="weights of |W|^2 / 2, each tried by itself"
    )
    g.unused.add_argument("--use_cuda", default=True, type=boolean, help="the regression runs on the CPU")
    g.optimizer.add_argument(
        "--adjust_lambd", default=True, type=boolean, help="divide these weights by the number of images"
    )
    # ---- network
    g.data.add_argument(
        "--multi_scale", default=False, type=boolean, help="average the features of images of three sizes"
    )
    add_checkpoint_flags(p)
    g.unused.add_argument("--window_size", default=7, type=int, help="window of Swin transformers, which are not here")
    g.output.add_argument("--dump_features", default=None, help="folder to write features and labels to")
    g.output.add_argument(
        "--load_features", default=".", help="folder of written features; what it does not hold is computed"
    )
    g.data.add_argument("--num_workers", default=10, type=int, help="loader processes per process")
    g.model.add_argument("--arch", default="vit_small", choices=ARCHS, help="backbone")
    g.model.add_argument("--input_size", default=224, type=int, help="image side in pixels")
    # ---- data, files, process
    g.data.add_argument(
        "--data_path", default="/mnt/aiops/common/imageNet100_sicy/", help="folder with train/ and val/"
    )
    g.unused.add_argument("--epochs", default=100, type=int, help="the regression runs to its minimum")
    g.unused.add_argument("--it0", default=10, type=int, help="belongs to the authors' solver")
    g.data.add_argument(
        "--target_list_path",
        default="./subset/1percent.txt",
        help="text file with the labelled images' names",
    )
    g.model.add_argument(
        "--class_num", default=1000, type=int, help="number of classes, the first of the class folders"
    )
    g.data.add_argument(
        "--bad_images", default="stop", choices=["stop", "skip"], help="what to do at an image that cannot be read"
    )
    datasets.add_channel_flags(p)
    g.data.add_argument("--pin_mem", default=True, type=boolean, help="copy images to the GPU through pinned memory")
    g.output.add_argument("--output_dir", default="./exp2/logistic_regression", help="folder of <list>_train.log")
    distributed.add_launch_flags(p)
    g.unused.add_argument("--world_size", default=1, type=int, help="the launcher's environment decides")
    p.set_defaults(pretrained_weights="./vit_small/checkpoint.pth", checkpoint_key="teacher,student")
    return p


class Features(nn.Module):
    """Features (B, n D) of images (B, 3, H, W).

    Args:
        n_last_blocks, avgpool_patchtokens, multi_scale: as the flags say.
    Raises:
        ValueError: the backbone has fewer blocks.
    """

    def __init__(
        self, backbone: VisionTransformer, n_last_blocks: int = 1, avgpool_patchtokens: int = 0, multi_scale=False
    ):
        super().__init__()
        if not 1 <= n_last_blocks <= len(backbone.blocks):
            raise ValueError(f"expected 1 to {len(backbone.blocks)}, the backbone's blocks")
        self.backbone, self.n_last_blocks = backbone, n_last_blocks
        self.avgpool_patchtokens, self.multi_scale = avgpool_patchtokens, multi_scale

    def single(self, imgs: Tensor) -> Tensor:
        """Features of images at the size that they have."""
        c = self.backbone.num_class_token
        if self.avgpool_patchtokens == 1:  # as upstream: not normalised
            return self.backbone.forward_tokens(imgs)[:, c:].mean(dim=1)
        blocks = self.backbone.get_intermediate_layers(imgs, self.n_last_blocks)
        parts = [tokens[:, 0] for tokens in blocks]
        if self.avgpool_patchtokens == 2:
            parts.append(blocks[-1][:, c:].mean(dim=1))
        return torch.cat(parts, dim=1)

    def forward(self, imgs: Tensor) -> Tensor:
        if not self.multi_scale:
            return self.single(imgs)
        # Upstream's division by the norm of the whole batch vanishes when each image's features are normalised.
        resized = (imgs if s == 1 else F.interpolate(imgs, scale_factor=s, mode="bilinear") for s in SCALES)
        return torch.stack([self.single(x) for x in resized]).mean(dim=0)


def fit(features: np.ndarray, labels: np.ndarray, penalty: float) -> "LogisticRegression":
    """The weights W, without intercept, that minimise mean cross entropy + penalty / 2 |W|^2; the minimum is unique.

    Args:
        features: (n, D) float64. labels: (n,), of at least 2 classes.
    """
    from sklearn.exceptions import ConvergenceWarning  # here, because importing it takes 1.2 s
    from sklearn.linear_model import LogisticRegression

    # scikit-learn's C weighs the sum of the losses; of two classes it only knows the difference of their weights,
    # whose square counts half.
    pairs = 2.0 if len(np.unique(labels)) == 2 else 1.0
    model = LogisticRegression(C=pairs / (len(features) * penalty), fit_intercept=False, tol=1e-8, max_iter=20000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, labels)
    if any(issubclass(w.category, ConvergenceWarning) for w in caught):
        distributed.log("WARNING: the regression stopped before it reached the tolerance")
    return model


def files_of(args: argparse.Namespace, folder: str, key: str) -> Path:
    """Folder of the features of one list and one kind."""
    kind = f"{key}_{args.class_tokens}_{args.n_last_blocks}_{args.avgpool_patchtokens}_{args.multi_scale:d}"
    return Path(folder, f"{Path(args.target_list_path).stem}_{kind}")


def origin(args: argparse.Namespace) -> str:
    """What features depend on besides the names of their folder."""
    weights = Path(args.pretrained_weights)
    written = weights.stat().st_mtime_ns if weights.exists() else 0
    names = ("pretrained_weights", "arch", "input_size", "data_path", "class_num")
    return json.dumps({name: getattr(args, name) for name in names} | {"written": written})


def dump_with_origin(args: argparse.Namespace, folder: str, found: list[Tensor]) -> None:
    """Write features and labels, and last what they are of."""
    dump(folder, [found[:2]], found[2:])
    (Path(folder) / "origin.json").write_text(origin(args))


def load_features(folder: Path, expected: str, insist: bool) -> list[Tensor] | None:
    """What `dump` wrote, of the same weights and images unless the user insists; None if it is not there."""
    try:
        origin = (folder / "origin.json").read_text()
        if origin != expected:
            distributed.log(f"WARNING: --load_features: the features in {folder} are of {origin}")
            if not insist:
                return None
        found = [torch.load(folder / name, map_location="cpu", weights_only=True) for name in DUMPS]
    except Exception:  # torch reports a damaged file by many types
        distributed.log(f"--load_features: no features in {folder}, computing them")
        return None
    distributed.log(f"--load_features: features of {folder}")
    return found


@torch.no_grad()
def compute(args: argparse.Namespace, device: torch.device, key: str) -> list[Tensor]:
    """Features and labels of the training and the test images (as in `DUMPS`), on rank 0; [] elsewhere."""
    distributed.check_default_file(args, "pretrained_weights")
    state = distributed.load(args.pretrained_weights)
    datasets.follow_channels(args, distributed.flags_of(state))
    weights = load_backbone(state, key, args.class_tokens, args.pretrained_weights)
    backbone = build_backbone(args.arch, args.patch_size, weights, args.input_size, in_chans=args.in_chans or 3)
    with distributed.user_errors(f"--n_last_blocks {args.n_last_blocks}"):
        model = Features(backbone, args.n_last_blocks, args.avgpool_patchtokens, args.multi_scale).to(device)
    own = []
    for images in semi_supervised_sets(args):
        loader = datasets.build_loader(
            args,
            images,
            datasets.eval_transform(args.input_size, 224 / 256, *datasets.statistics(args)),
            device,
            train=False,
        )
        own += extract_features(model, loader, torch.device("cpu"))
    shares = distributed.gather_to_main(own)
    found = [interleave(list(parts)) for parts in zip(*shares, strict=True)]
    if args.dump_features:
        folder = str(files_of(args, args.dump_features, key))
        distributed.main_does(lambda: dump_with_origin(args, folder, found))
    return found


def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    if min(args.lr_lambd) <= 0:
        raise distributed.UserError(f"--lr_lambd {min(args.lr_lambd)}: expected more than 0")
    if args.class_num < 2:
        raise distributed.UserError(f"--class_num {args.class_num}: expected at least 2")
    text_log = TextLog(args.output_dir, f"{Path(args.target_list_path).stem}_train.log")
    # ---- features
    features = {}
    keys = [key.strip() for key in args.checkpoint_key.split(",") if key.strip()]
    if not keys:
        raise distributed.UserError(f"--checkpoint_key {args.checkpoint_key}: expected teacher, student or both")
    for key in keys:
        found = None
        if args.load_features:
            insist = args.load_features != "."  # the default
            found = load_features(files_of(args, args.load_features, key), origin(args), insist)
        absent = distributed.agree(found is None)[1]  # on any process
        features[key] = compute(args, device, key) if absent or found is None else found
    # ---- regression: on rank 0, which the others need not wait for
    for key, found in features.items() if distributed.is_main() else ():
        train, labels, test, test_labels = (x.double().numpy() if x.is_floating_point() else x.numpy() for x in found)
        for given in args.lr_lambd:
            penalty = given / len(train) if args.adjust_lambd else given
            accuracy = 100 * fit(train, labels, penalty).score(test, test_labels)
            text_log.write(f"{key}: {len(train)} images, lambda {given:g}: accuracy {accuracy:.3f}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
