"""Scores of a segmentation over a whole set: intersection over union and accuracy, per class and overall."""

import torch
from torch import Tensor

from common.dense_datasets.transforms import IGNORED
from common.distributed import all_sum


class Confusion:
    """Counts pixels by true and predicted class, over all processes.

    Attributes:
        counts: (K, K) int64, rows the truth; of this process.
    """

    def __init__(self, nb_classes: int, device: torch.device | str = "cpu"):
        self.nb_classes = nb_classes
        self.counts = torch.zeros(nb_classes * nb_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Add an image; both: class indices of one shape. Pixels with label 255 count nowhere."""
        valid = labels != IGNORED
        pairs = labels[valid].long() * self.nb_classes + prediction[valid].long()
        self.counts += torch.bincount(pairs, minlength=len(self.counts))

    def scores(self) -> tuple[dict[str, float], Tensor, Tensor]:
        """The scores over all processes' images, in percent. Collective.

        Returns:
            mIoU and mAcc (means over the classes that occur), aAcc (share of right pixels); IoU and accuracy of each
            class, (K,) float64, NaN where a class does not occur.
        """
        total = torch.tensor(all_sum(self.counts.tolist()), dtype=torch.float64).view(self.nb_classes, -1)
        right, truth, predicted = total.diag(), total.sum(1), total.sum(0)
        iou, acc = 100 * right / (truth + predicted - right), 100 * right / truth
        means = {"mIoU": iou.nanmean(), "mAcc": acc.nanmean(), "aAcc": 100 * right.sum() / truth.sum()}
        return {name: float(value) for name, value in means.items()}, iou, acc


def table(names: list[str], iou: Tensor, acc: Tensor) -> str:
    """A line per class: name, IoU and accuracy in percent."""
    width = max(map(len, [*names, "class"]))
    rows = [
        f"{name:<{width}}  {i:6.2f}  {a:6.2f}" for name, i, a in zip(names, iou.tolist(), acc.tolist(), strict=True)
    ]
    return "\n".join([f"{'class':<{width}}     IoU     Acc", *rows])
