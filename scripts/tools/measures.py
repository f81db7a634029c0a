"""What features of images say about their encoder: with labels accuracy, without them agreement, rank and variance.

Legend: n images, D width of the features.
"""

import argparse
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms

from common import datasets
from common.distributed import UserError
from scripts.tools.encoders import knn
from scripts.tools.encoders import load as encoders
from scripts.tools.neighbours import nearest

NEIGHBOURS = 20  # that vote
TEMPERATURE = 0.07  # of the votes, as in the methods' main_knn.py
CLOSEST = 10  # neighbours that two views are to share
ZOOM = 0.8  # side of the second view, as a share of the first one's


# ---- features


@torch.inference_mode()
def features(
    backbone: encoders.Backbone, images: Any, args: argparse.Namespace, device: torch.device, zoom: float = 1.0
) -> np.ndarray:
    """Features (n, D) of images, float32, in their order.

    Args:
        args: the flags of `common.datasets.add_loader_flags`, and batch_size.
        zoom: below 1 only the middle of each image is seen, of that share of the side.
    Raises:
        UserError: an image is unreadable, or a feature is not finite.
    """
    transform = encoders.eval_transform(backbone)
    if zoom < 1:  # the middle of the usual view, resized to it
        size, mode = backbone.input_size, transforms.InterpolationMode(backbone.interpolation)
        resize, crop, *rest = transform.transforms
        middle = [transforms.CenterCrop(max(1, round(zoom * size))), transforms.Resize(size, interpolation=mode)]
        transform = transforms.Compose([resize, crop, *middle, *rest])
    loader = datasets.build_loader(args, images, transform, device, train=False)
    found = [backbone(imgs).float().cpu() for imgs, _ in loader.batches()]
    rows = torch.cat([torch.empty(0, backbone.embed_dim), *found]).numpy()
    if not np.isfinite(rows).all():
        raise UserError("the encoder's features are not finite")
    if len(rows) != len(images):  # later rows would be taken for other images
        raise UserError(f"{len(images) - len(rows)} of the images cannot be read; take them out")
    return rows


# ---- measures


def unit(rows: np.ndarray) -> Tensor:
    return F.normalize(torch.from_numpy(np.asarray(rows, np.float32)), dim=1)


def knn_accuracy(train: np.ndarray, labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray) -> float:
    """Percent that the votes of the 20 nearest training images get right; of fewer, where there are fewer."""
    k = min(NEIGHBOURS, len(train))
    known, asked = (torch.from_numpy(np.asarray(x, np.int64)) for x in (labels, val_labels))
    return knn.vote(unit(train), known, unit(val), asked, [k], TEMPERATURE)[k][0]


def rankme(rows: np.ndarray) -> float:
    """Effective rank of features: exp of the entropy of their singular values' shares, 1 (all on a line) to min(n, D).

    The estimate of RankMe ("RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations
    by Their Rank", ICML 2023): share = singular value / sum of them + 1e-7, features as they are, not centred.
    """
    values = np.linalg.svd(np.asarray(rows, np.float64), compute_uv=False)
    shares = values / max(values.sum(), 1e-300) + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def variance(rows: np.ndarray) -> float:
    """Total variance of the features scaled to unit length, 0 (all images alike) to 1 (directions cancel out)."""
    return float(unit(rows).double().var(dim=0, correction=0).sum())


def agreement(rows: np.ndarray, zoomed: np.ndarray) -> np.ndarray:
    """By image (n,), the percentage of its 10 nearest images that its middle part has for neighbours, too.

    Says how far features go by content rather than by place and size; chance is 1000 / (n - 1). Features that are all
    alike have arbitrary neighbours, see `variance`.
    Args:
        rows, zoomed: (n, D), features of the images and of their middle parts.
    """
    k = min(CLOSEST, len(rows) - 1)
    pairs = [nearest(x, list(range(len(x))), k)[0] for x in (rows, zoomed)]
    shared = [len(np.intersect1d(a, b)) for a, b in zip(*pairs, strict=True)]
    return 100 * np.array(shared) / k
