"""k-nearest-neighbour classification of features: votes weighted by cosine, as in main_knn.py of SemAIM and UDI.

Legend: n training images of this process, m test images, D width of the features, k neighbours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common import datasets, distributed
from common.distributed import UserError
from scripts.tools.encoders.backbone import Backbone

CHUNK = 2**27  # similarities that are held at once


def unit_features(backbone: Backbone, loader: datasets.Loader) -> tuple[Tensor, Tensor]:
    """Features of unit length (n, D) and labels (n,) of this process's images, in the host's memory.

    Raises:
        UserError: a feature is not finite.
    """
    features, labels = [torch.empty(0, backbone.embed_dim)], [torch.empty(0, dtype=torch.long)]
    steps = distributed.EpochLog("Features:", len(loader), loader.batch_size, loader.device)
    for _, (imgs, targets) in steps.steps(loader.batches()):
        features.append(F.normalize(backbone(imgs).float(), dim=1).cpu())
        labels.append(targets.cpu())
    if not all(bool(batch.isfinite().all()) for batch in features):
        raise UserError("the encoder's features are not finite")
    return torch.cat(features), torch.cat(labels)


def nearest(train: Tensor, train_labels: Tensor, test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (m, k), largest first, and labels (m, k) of the most similar training images; fewer columns if n < k."""
    k, found = min(k, len(train)), []
    for chunk in test.split(max(1, CHUNK // max(1, len(train)))):
        cosines, index = (chunk @ train.T).topk(k, dim=1)
        found.append((cosines, train_labels[index]))
    cosines, labels = zip(*found, strict=True)
    return torch.cat(cosines), torch.cat(labels)


def vote(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, nb_knn: list[int], temperature: float
) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy, in percent, of the votes of each number of neighbours. Collective.

    With k < 5 neighbours top 5 counts the best k classes only.
    Args:
        train: (n, D), of unit length, this process's share of the training images. test: (m, D), all test images.
    Raises:
        UserError: there are not so many training images.
    """
    images, largest = round(distributed.all_sum([len(train)])[0]), max(nb_knn)
    if largest > images:
        raise UserError(f"--nb_knn {largest}: there are only {images} training images")
    found = distributed.gather(nearest(train, train_labels, test, largest))
    cosines, labels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))  # (m, n of all processes)
    cosines, index = cosines.topk(largest, dim=1)
    labels, results = labels.gather(1, index), {}
    votes = ((cosines - cosines[:, :1]) / temperature).exp()  # the same winners, and no overflow at low temperatures
    classes = 1 + int(max(x.max() for x in (labels, test_labels)))
    for k in nb_knn:
        scores = votes.new_zeros(len(votes), classes).scatter_add_(1, labels[:, :k], votes[:, :k])
        hits = scores.argsort(dim=1, descending=True, stable=True)[:, : min(5, k)] == test_labels[:, None]
        top1, top5 = (100 * x.sum().item() / len(test_labels) for x in (hits[:, 0], hits))
        results[k] = top1, top5
    return results
