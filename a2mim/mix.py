"""Mixup and CutMix with upstream's draws, and the losses of mixed labels.

timm's version mixes a batch with its reverse; here it is mixed with a random permutation.
"""

import random
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Target = tuple[Tensor, Tensor, float]  # classes (B,), classes of the partners (B,), share of the first


def mixup(
    x: Tensor, y: Tensor, alpha: float, lam: float | None = None, perm: Tensor | None = None
) -> tuple[Tensor, Target]:
    """Blend images (B, C, H, W) of classes y (B,) with permuted ones; lam ~ Beta(alpha, alpha) counts the first."""
    lam = float(np.random.beta(alpha, alpha)) if lam is None else lam  # noqa: NPY002 - the step's seeded generator
    perm = torch.randperm(len(x)) if perm is None else perm
    perm = perm.to(x.device)
    return lam * x + (1 - lam) * x[perm], (y, y[perm], lam)


def cutmix(
    x: Tensor,
    y: Tensor,
    alpha: float,
    lam: float | None = None,
    perm: Tensor | None = None,
    cx: int | None = None,
    cy: int | None = None,
) -> tuple[Tensor, Target]:
    """Paste a box of permuted images (B, C, H, W) into images of classes y (B,).

    Args:
        lam: share of the image outside of the box, Beta(alpha, alpha). cx, cy: row and column of the box's centre.
    Returns:
        images, and targets whose share is that of the pixels left.
    """
    height, width = x.shape[-2:]
    lam = float(np.random.beta(alpha, alpha)) if lam is None else lam  # noqa: NPY002
    if perm is None:
        perm = torch.randperm(len(x))
        for _ in range(10):  # no image is to be its own partner, if ten more draws can help it
            if (perm != torch.arange(len(x))).all():
                break
            perm = torch.randperm(len(x))
    perm = perm.to(x.device)
    rows, columns = int(height * (1 - lam) ** 0.5), int(width * (1 - lam) ** 0.5)
    cx = np.random.randint(height) if cx is None else cx  # noqa: NPY002
    cy = np.random.randint(width) if cy is None else cy  # noqa: NPY002
    top, bottom = (int(np.clip(cx + d, 0, height)) for d in (-(rows // 2), rows // 2))
    left, right = (int(np.clip(cy + d, 0, width)) for d in (-(columns // 2), columns // 2))
    mixed = x.clone()
    # the box of every partner, (B, C, bottom - top, right - left)
    mixed[..., top:bottom, left:right] = x[perm][..., top:bottom, left:right]
    return mixed, (y, y[perm], 1 - (bottom - top) * (right - left) / (height * width))


class Mix:
    """Mixup or CutMix, one of them for every batch; an alpha of 0 turns one off."""

    def __init__(self, mixup_alpha: float, cutmix_alpha: float):
        chosen = ((mixup, mixup_alpha), (cutmix, cutmix_alpha))
        self.modes = [partial(mode, alpha=alpha) for mode, alpha in chosen if alpha > 0]

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Target]:
        """Mixed images (B, C, H, W) and targets."""
        return random.choices(self.modes)[0](x, y)


def ft_loss(logits: Tensor, target: Target | Tensor, kind: str, smoothing: float = 0.1) -> Tensor:
    """Classification loss, ().

    Args:
        logits: (B, K). target: classes (B,), or mixed ones.
        kind: label_smooth, the cross entropy with `smoothing`; bce, the binary cross entropy of every class, summed
            over classes and averaged over images (as upstream: 1000 times timm's on ImageNet).
    """
    ya, yb, lam = (target, target, 1.0) if isinstance(target, Tensor) else target
    logits = logits.float()
    if kind == "label_smooth":
        losses = (F.cross_entropy(logits, y, label_smoothing=smoothing) for y in (ya, yb))
        first, second = losses
        return lam * first + (1 - lam) * second
    if kind != "bce":
        raise ValueError(f"loss {kind}: expected label_smooth or bce")
    share = torch.zeros_like(logits).scatter_(1, ya[:, None], lam)
    share = share.scatter_add_(1, yb[:, None], torch.full_like(share[:, :1], 1 - lam))
    return F.binary_cross_entropy_with_logits(logits, share, reduction="sum") / len(logits)
