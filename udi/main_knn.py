"""k-nearest-neighbour classification with a frozen backbone: weighted votes by cosine, without any training."""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import datasets, distributed
from udi.backbone import build_backbone, load_backbone
from udi.files import TextLog, folder_beside
from udi.flags import ARCHS, add_checkpoint_flags, boolean

# same as semaim/main_knn.py
CHUNK = 2**27  # similarities that are held at once
# same as semaim/main_knn.py
DUMPS = ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth")


def get_args_parser() -> argparse.ArgumentParser:
    p = distributed.new_parser("UDI k-NN")
    g = distributed.flag_groups(p)
    g.optimizer.add_argument(
        "--batch_size_per_gpu",
        "--batch_size",
        dest="batch_size",
        default=128,
        type=int,
        help="images per process (README: 256)",
    )
    # ---- vote: defaults of the authors' eval_knn.py
    g.output.add_argument(
        "--nb_knn",
        default=[10, 15, 20, 30, 40, 50, 100, 200],
        nargs="+",
        type=int,
        help="numbers of neighbours, each of which votes by itself",
    )
    g.output.add_argument("--temperature", default=0.07, type=float, help="T of a vote's weight exp(cosine / T)")
    g.model.add_argument("--nb_classes", default=1000, type=int, help="number of classes")
    # ---- network
    g.model.add_argument("--arch", default="vit_small", choices=ARCHS, help="backbone")
    add_checkpoint_flags(p)
    g.model.add_argument("--input_size", default=224, type=int, help="image side in pixels")
    # ---- files, data, process
    g.process.add_argument(
        "--use_cuda", default=True, type=boolean, help="false keeps the features in the host's memory"
    )
    g.output.add_argument("--dump_features", default=None, help="folder to write features and labels to")
    g.output.add_argument(
        "--load_features", default=None, help="folder of written features and labels, which are not computed then"
    )
    datasets.add_flags(p)
    g.output.add_argument("--output_dir", default="", help="folder of knn.log; default: knn-eva-... beside the weights")
    distributed.add_launch_flags(p)
    p.set_defaults(data_path="/dataset/imageNet100_sicy/", num_workers=10, local_rank=0)
    return p


@torch.no_grad()
def extract_features(model: nn.Module, loader: datasets.Loader, device: torch.device) -> tuple[Tensor, Tensor]:
    """Unit-length features (n, D) and labels (n,) of this process's images, on `device`.

    Args:
        model: maps images (B, 3, H, W) to features (B, D).
    Raises:
        distributed.UserError: a feature is not finite.
    """
    model.eval()
    features, labels = [], [torch.empty(0, dtype=torch.long, device=device)]
    log = distributed.EpochLog("Features:", len(loader), loader.batch_size, loader.device)
    for _, (imgs, targets) in log.steps(loader.batches()):
        features.append(F.normalize(model(imgs).float(), dim=1).to(device))
        labels.append(targets.to(device))
    if not all(bool(batch.isfinite().all()) for batch in features):
        raise distributed.UserError("the backbone's features are not finite")
    # A process without images still knows how many numbers a feature has.
    width = max(distributed.gather(features[0].shape[1] if features else 0))
    return torch.cat([torch.empty(0, width, device=device), *features]), torch.cat(labels)


# same as semaim/main_knn.py
def nearest(train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar training images of each test image.

    Args:
        train_features: (n, D) and test_features: (m, D), of unit length. train_labels: (n,).
    Returns:
        cosines (m, k), largest first, and labels (m, k); fewer columns where n < k.
    """
    k = min(k, len(train_features))
    found = []
    for chunk in test_features.split(max(1, CHUNK // max(1, len(train_features)))):
        cosines, index = (chunk @ train_features.T).topk(k, dim=1)
        found.append((cosines, train_labels[index]))
    cosines, labels = zip(*found, strict=True)
    return torch.cat(cosines), torch.cat(labels)


# same as semaim/main_knn.py
def class_scores(cosines: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Sum of exp(cosine / temperature) over each class's neighbours: (m, k) each -> (m, num_classes)."""
    scores = cosines.new_zeros(len(cosines), num_classes)
    return scores.scatter_add_(1, labels, (cosines / temperature).exp())


# same as semaim/main_knn.py
def accuracy(scores: Tensor, targets: Tensor, k: int) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent; with k < 5 neighbours the latter counts the best k classes only."""
    best = scores.argsort(dim=1, descending=True, stable=True)[:, : min(5, k)]
    hits = best == targets[:, None]
    top1, top5 = (100 * x.sum().item() / len(targets) for x in (hits[:, 0], hits))
    return top1, top5


# same as semaim/main_knn.py
def knn_classifier(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int,
    T: float,
    num_classes: int = 1000,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy, in percent, of the vote of k neighbours; features (n, D) and (m, D) of unit length."""
    cosines, labels = nearest(train_features, train_labels, test_features, k)
    return accuracy(class_scores(cosines - cosines[:, :1], labels, T, num_classes), test_labels, k)


# ---- several processes: each holds a share of the training images, and compares all test images with it


# same as semaim/main_knn.py
def interleave(parts: list[Tensor]) -> Tensor:
    """The images in their order; process r of R has images r, r + R, ..., unless some were skipped."""
    total, count = sum(map(len, parts)), len(parts)
    if [len(part) for part in parts] != [len(range(i, total, count)) for i in range(count)]:
        return torch.cat(parts)
    whole = parts[0].new_empty(total, *parts[0].shape[1:])
    for i, part in enumerate(parts):
        whole[i :: len(parts)] = part
    return whole


# same as semaim/main_knn.py
def vote(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    nb_knn: list[int],
    temperature: float,
    nb_classes: int,
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy, in percent, of the votes of each number of neighbours. Collective.

    Args:
        train: features (n, D) of this process's share of the training images. test: (m, D), of all test images.
    Raises:
        distributed.UserError: there are not so many training images or classes.
    """
    images, largest = round(distributed.all_sum([len(train)])[0]), max(nb_knn)
    if largest > images:
        raise distributed.UserError(f"--nb_knn {largest}: there are only {images} training images")
    top_label = int(max(labels.max() for labels in (train_labels, test_labels) if len(labels)))
    if top_label >= nb_classes:
        raise distributed.UserError(f"--nb_classes {nb_classes}: an image is labelled {top_label}")
    found = [x.cpu() for x in nearest(train, train_labels, test, largest)]
    cosines, labels = (torch.cat(parts, dim=1) for parts in zip(*distributed.gather(found), strict=True))
    cosines, index = cosines.topk(largest, dim=1)
    labels, results = labels.gather(1, index), {}
    for k in nb_knn:
        relative = cosines[:, :k] - cosines[:, :1]  # the same winners, and no overflow at low temperatures
        scores = class_scores(relative, labels[:, :k], temperature, nb_classes)
        results[k] = accuracy(scores, test_labels.cpu(), k)
    return results


class FirstToken(nn.Module):
    """The normalised first class token (B, D) of a backbone."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, imgs: Tensor) -> Tensor:
        return self.backbone(imgs)[:, 0]


def compute(args: argparse.Namespace, device: torch.device, keep: torch.device) -> list[Tensor]:
    """Features and labels of this process's training images, and of all test images (as in `DUMPS`)."""
    if args.pretrained_weights:
        datasets.follow_channels(args, distributed.flags_of(distributed.load(args.pretrained_weights)))
    transform = datasets.eval_transform(args.input_size, 224 / 256, *datasets.statistics(args))
    in_chans = args.in_chans
    train = datasets.image_dataset(args.data_path, True, True, args.dataset, args.train_split, in_chans=in_chans)
    val = datasets.image_dataset(args.data_path, False, True, args.dataset, args.val_split, in_chans=in_chans)
    datasets.check_classes(train, val, args.nb_classes)
    loaders = [datasets.build_loader(args, images, transform, device, train=False) for images in (train, val)]
    model = build_model(args).to(device)
    own_train = extract_features(model, loaders[0], keep)
    own_test = [x.cpu() for x in extract_features(model, loaders[1], keep)]
    test = [interleave(list(parts)).to(keep) for parts in zip(*distributed.gather(own_test), strict=True)]
    if args.dump_features:
        shares = distributed.gather_to_main([x.cpu() for x in own_train])
        distributed.main_does(lambda: dump(args.dump_features, shares, test))
    return [*own_train, *test]


def build_model(args: argparse.Namespace) -> FirstToken:
    """The backbone of the flags with the weights of its checkpoint."""
    weights = None
    if args.pretrained_weights:
        weights = load_backbone(args.pretrained_weights, args.checkpoint_key, args.class_tokens)
    else:
        distributed.log("WARNING: no --pretrained_weights, the backbone is random")
    return FirstToken(build_backbone(args.arch, args.patch_size, weights, args.input_size, in_chans=args.in_chans or 3))


# same as semaim/main_knn.py
def dump(folder: str, shares: list[list[Tensor]], test: list[Tensor]) -> None:
    """Write the features and labels of all images as `DUMPS` in folder."""
    train = [interleave(list(parts)) for parts in zip(*shares, strict=True)]
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip(DUMPS, [*train, *test], strict=True):
            torch.save(value.cpu(), Path(folder) / name)
    except (OSError, RuntimeError) as error:
        raise distributed.UserError(f"--dump_features {folder}: cannot be written ({error})") from error


# same as semaim/main_knn.py
def load_dump(folder: str, keep: torch.device) -> list[Tensor]:
    """Read back what `dump` wrote; of the training images only this process's share."""
    try:
        values = [torch.load(Path(folder) / name, map_location=keep, weights_only=True) for name in DUMPS]
        train, train_labels, test, test_labels = (x.long() if i % 2 else x.float() for i, x in enumerate(values))
        if len(train) != len(train_labels) or len(test) != len(test_labels) or train.shape[1] != test.shape[1]:
            raise ValueError("the files do not belong together")
        if min(len(train), len(test)) == 0 or min(train_labels.min(), test_labels.min()) < 0:
            raise ValueError("images are missing, or a label is negative")
    except Exception as error:  # torch reports a damaged file by many types
        reason = " ".join(str(error).split())[:200]
        raise distributed.UserError(f"--load_features {folder}: expected {', '.join(DUMPS)} ({reason})") from error
    share = slice(distributed.rank(), None, distributed.world_size())
    return [train[share], train_labels[share], test, test_labels]


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    device = distributed.init(args.device)
    if min(args.nb_knn) < 1:
        raise distributed.UserError(f"--nb_knn {min(args.nb_knn)}: expected at least 1")
    torch.manual_seed(0)  # random weights are the same on all processes
    keep = device if args.use_cuda else torch.device("cpu")
    name = f"knn-eva-temperature-{args.temperature:.3f}-key-{args.checkpoint_key}"
    knn_log = TextLog(args.output_dir or folder_beside(args.pretrained_weights, name), "knn.log")
    # ---- features
    if args.load_features:
        train, train_labels, test, test_labels = load_dump(args.load_features, keep)
    else:
        train, train_labels, test, test_labels = compute(args, device, keep)
    # ---- vote
    results = vote(train, train_labels, test, test_labels, args.nb_knn, args.temperature, args.nb_classes)
    for k, (top1, top5) in results.items():
        knn_log(f"{k}-NN classifier result: Top1: {top1:.4f}, Top5: {top5:.4f}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
