"""Scores of DAVIS-2017: region similarity J, contour accuracy F, and their mean J&F, per object and frame.

Legend: T frames, K objects, H W pixels. Masks hold the objects' numbers, 0 being the background.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np

TOLERANCE = 0.008  # of the contours' places, as a part of the frame's diagonal
VOID = 255  # pixels of a true mask that belong to no object


class ObjectScore(NamedTuple):
    """Means over the frames without the first and the last one, and the share of them above 0.5."""

    name: str
    j_mean: float
    j_recall: float
    f_mean: float
    f_recall: float


def region_similarity(pred: np.ndarray, truth: np.ndarray) -> float:
    """J of two masks (H, W) bool: intersection over union, 1 if both are empty."""
    union = np.count_nonzero(pred | truth)
    return np.count_nonzero(pred & truth) / union if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask (H, W) bool that differ from their neighbour, if any, to the east, south or southeast."""
    edge = np.zeros_like(mask)
    edge[:, :-1] = mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def _near(edge: np.ndarray, radius: int) -> np.ndarray:
    """Pixels within `radius` of an edge that is not empty: its dilation by a disk."""
    from scipy.ndimage import distance_transform_edt  # here, because importing it takes 0.2 s

    return distance_transform_edt(~edge) <= radius  # type: ignore[operator]


def contour_accuracy(pred: np.ndarray, truth: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """F of two masks (H, W) bool: harmonic mean of precision and recall of their boundaries.

    tolerance: how far, in parts of the diagonal, a boundary may be off.
    """
    radius = math.ceil(tolerance * math.hypot(*pred.shape))
    edges = boundary(pred), boundary(truth)
    found, wanted = (np.count_nonzero(edge) for edge in edges)
    if not found or not wanted:
        return float(found == wanted)
    precision = np.count_nonzero(edges[0] & _near(edges[1], radius)) / found
    recall = np.count_nonzero(edges[1] & _near(edges[0], radius)) / wanted
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def frame_scores(truth: np.ndarray, pred: np.ndarray, tolerance: float = TOLERANCE) -> tuple[np.ndarray, np.ndarray]:
    """J and F (K, T) of masks (T, H, W); the first true one says how many objects K there are.

    Raises:
        ValueError: a predicted number is higher.
    """
    truth = np.where(truth == VOID, 0, truth)
    objects = int(truth[0].max())
    if pred.max() > objects:
        raise ValueError(f"object {pred.max()} is predicted where there are {objects}")
    pairs = [[(p == k, t == k) for p, t in zip(pred, truth, strict=True)] for k in range(1, objects + 1)]
    j = [[region_similarity(*pair) for pair in of_object] for of_object in pairs]
    f = [[contour_accuracy(*pair, tolerance) for pair in of_object] for of_object in pairs]
    return np.array(j), np.array(f)


def object_scores(name: str, j: np.ndarray, f: np.ndarray) -> list[ObjectScore]:
    """The objects' scores of a video; j, f: (K, T), of which the first and the last frame are left out."""
    inner = [values[:, 1:-1] for values in (j, f)]
    columns = [column for values in inner for column in (values.mean(axis=1), (values > 0.5).mean(axis=1))]
    return [ObjectScore(f"{name}_{k}", *map(float, row)) for k, row in enumerate(zip(*columns, strict=True), 1)]


def overall(scores: list[ObjectScore]) -> dict[str, float]:
    """Means over all objects of all videos, of J, F and both."""
    j, f = (sum(values) / len(scores) for values in zip(*((s.j_mean, s.f_mean) for s in scores), strict=True))
    return {"J_and_F": (j + f) / 2, "J": j, "F": f}
