"""A2MIM Fig. 1, 5, A1, A2: interactions of two cells of an image, how much they matter together, by order.

The order m is the number of other cells that are shown, the context S.
I_ij^(m) = mean over contexts S of m cells of v(S+i+j) - v(S+i) - v(S+j) + v(S), v being a classifier's reward.

Legend: n = G² cells, P pairs, C contexts per pair, m order, M masks, K classes.
"""

import random
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

REWARDS = ("normal", "modified", "yi")


def order_of(grid: int, ratio: float) -> int:
    """The number m of cells in a context, for a share `ratio` of the n - 2 cells outside the pair."""
    return int((grid**2 - 2) * ratio)


def gen_pairs(grid: int, num: int, stride: int) -> np.ndarray:
    """Draw different pairs of neighbouring cells from the global generators of NumPy and Python.

    Args:
        num: P. stride: how many rows and columns the second cell is away at most; beyond the edge it is moved onto it.
    Returns:
        (P, 2) int64, cells counted row by row.
    Raises:
        ValueError: there are fewer pairs than that.
    """
    reach = range(-min(stride, grid - 1), min(stride, grid - 1) + 1)
    possible = (sum(grid - abs(d) for d in reach) ** 2 - grid**2) // 2
    if num > possible:
        raise ValueError(f"a grid of {grid}x{grid} cells has {possible} pairs within {stride} cells, not {num}")
    offsets = [step for step in product(range(-stride, stride + 1), repeat=2) if step != (0, 0)]
    pairs: dict[frozenset[int], tuple[int, int]] = {}
    while len(pairs) < num:
        row, column = np.random.randint(grid), np.random.randint(grid)  # noqa: NPY002 - as upstream: the global one
        down, right = random.choice(offsets)
        i = row * grid + column
        j = min(max(row + down, 0), grid - 1) * grid + min(max(column + right, 0), grid - 1)
        if i != j:
            pairs.setdefault(frozenset((i, j)), (i, j))
    return np.array(list(pairs.values()))


def gen_contexts(pairs: np.ndarray, grid: int, order: int, num: int) -> np.ndarray:
    """Draw contexts of each pair from NumPy's global generator.

    Args:
        pairs: (P, 2) cells. order: m. num: C.
    Returns:
        (P, C, m) int64, cells outside of the pair.
    """
    cells = np.arange(grid**2)
    others = [np.delete(cells, pair) for pair in pairs]
    drawn = [[np.random.choice(o, order, replace=False) for _ in range(num)] for o in others]  # noqa: NPY002
    return np.array(drawn, dtype=np.int64).reshape(len(pairs), num, order)


def presence(pairs: np.ndarray, contexts: np.ndarray, grid: int) -> np.ndarray:
    """Masks (P, 4C, n) bool, True = shown; of each context four: with both cells, the first, the second, neither."""
    base = np.zeros((*contexts.shape[:2], grid**2), dtype=bool)
    np.put_along_axis(base, contexts.astype(np.int64), True, axis=2)
    masks = base[:, :, None].repeat(4, axis=2)  # (P, C, 4, n)
    every = np.arange(len(pairs))
    for row, cell in ((0, 0), (0, 1), (1, 0), (2, 1)):
        masks[every, :, row, pairs[:, cell]] = True
    return masks.reshape(len(pairs), -1, grid**2)


def reward(logits: Tensor, label: int | Tensor, softmax_type: str = "modified") -> Tensor:
    """What a classifier's answer is worth, v.

    Args:
        logits: (..., K). label: the true class, one or (...).
        softmax_type: normal: log p_y; modified: log p_y / (1 - p_y), by logits; yi: the class's logit z_y.
    Returns:
        (...) in nats (yi: in units of the logits).
    """
    index = torch.as_tensor(label, device=logits.device).expand(logits.shape[:-1])[..., None]
    own = logits.gather(-1, index).squeeze(-1)
    if softmax_type == "yi":
        return own
    if softmax_type == "modified":
        logits = logits.scatter(-1, index, -torch.inf)
    elif softmax_type != "normal":
        raise ValueError(f"softmax_type {softmax_type}: expected {', '.join(REWARDS)}")
    return own - logits.logsumexp(dim=-1)


@torch.inference_mode()
def rewards(model: nn.Module, image: Tensor, label: int, masks: np.ndarray, batch_size: int) -> dict[str, Tensor]:
    """Rewards of an image of which only some cells are shown, the others being 0.

    Equal masks (all contexts of order 0 and n - 2, for example) are evaluated once.
    Args:
        image: (3, H, W), normalised, on the model's device. masks: (..., n) bool, True = shown.
        batch_size: masked images per forward pass.
    Returns:
        by softmax_type: (...) float32, on the CPU; the only host synchronisation is at the end.
    """
    grid = round(masks.shape[-1] ** 0.5)
    packed = np.packbits(masks.reshape(-1, grid**2), axis=1)
    _, first, inverse = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    shown = torch.from_numpy(masks.reshape(-1, grid**2)[first]).to(image.device)  # (M, n)
    parts = []
    for part in shown.split(batch_size):
        part = part.view(-1, 1, grid, grid).to(image.dtype)
        logits = model(image * F.interpolate(part, image.shape[-2:], mode="nearest")).float()
        parts.append(torch.stack([reward(logits, label, kind) for kind in REWARDS]))
    values = torch.cat(parts, dim=1).cpu()[:, torch.from_numpy(inverse.reshape(-1))]
    return dict(zip(REWARDS, values.view(len(REWARDS), *masks.shape[:-1]).unbind(), strict=True))


def interactions(v: Tensor) -> Tensor:
    """Δ = v(S+i+j) - v(S+i) - v(S+j) + v(S): rewards (..., 4C), in the order of `presence` -> (..., C)."""
    both, first, second, neither = torch.as_tensor(v).unflatten(-1, (-1, 4)).unbind(dim=-1)
    return both + neither - first - second


def strength(array: np.ndarray) -> np.ndarray:
    """J^(m) = I^(m) / mean over m of I^(m), I^(m) being the mean of |I_ij^(m)| over images and pairs.

    Args:
        array: (orders, images, P, C), Δ.
    Returns:
        (orders,), of mean 1.
    """
    absolute = np.abs(np.asarray(array).mean(axis=-1))  # |I_ij|
    by_order = absolute.reshape(len(absolute), -1).mean(axis=1)
    return by_order / by_order.mean()
