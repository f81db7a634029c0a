"""The order in which the patches of an image are predicted: eight rules that rank them, and what a rank may see.

The paper's order is `attention_center` (SemAIM, arXiv 2312.10457, Fig. 1 and Eq. (5)). A map S says how similar each
patch is to the whole image; the centerness C of a patch is its distance to the maximum of S, a little randomised; the
patches are predicted in ascending order of C.

Legend: N batch, w grid side, L = w² patches, row by row, T = L + 1 tokens, class token first.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed

BOXES = (1, 3, 5)  # half sides of the three nested boxes, upstream models_semaim.py@ade770f
BOX_GRID = 14  # grid side that their bounds were tabulated for


class Grid(NamedTuple):
    """Where the patches are."""

    side: int  # w
    row: Tensor  # (L,) long
    column: Tensor  # (L,) long


# ---- the eight rules: (grid, maps (N, L), noise (N, L), center_noise (2, N)) -> ranks (N, L), or (L,) for all images.
# ---- The smaller the rank, the earlier the patch; noise and center_noise are uniform in [0, 1).


def zigzag(grid: Grid, maps: Tensor, noise: Tensor, center_noise: Tensor) -> Tensor:
    """Row by row from the left. As upstream: this, not `raster`, is the raster scan."""
    return grid.side * grid.row + grid.column


def raster(grid: Grid, maps: Tensor, noise: Tensor, center_noise: Tensor) -> Tensor:
    """Row by row, every second row from the right. As upstream: a snake that is named raster."""
    return (grid.side * grid.row + torch.where(grid.row % 2 == 0, grid.column, grid.side - 1 - grid.column)).float()


def stochastic(grid: Grid, maps: Tensor, noise: Tensor, center_noise: Tensor) -> Tensor:
    """A random order."""
    return noise


def center2out(grid: Grid, maps: Tensor, noise: Tensor, center_noise: Tensor) -> Tensor:
    """A random order within each of four zones: three nested boxes in the middle of the image, and the rest."""
    start = (grid.side // 2 - distributed.constant(BOXES, noise.device)).expand(len(noise), -1)
    return noise - boxes_that_hold(grid, start, start)


def stochastic_center(grid: Grid, maps: Tensor, noise: Tensor, center_noise: Tensor) -> Tensor:
    """The same zones around a random patch, which is never in the last row or column (as upstream)."""
    row, column = (center_noise * (grid.side - 1)).floor().long()
    return noise - boxes_around(grid, row, column)


def attention_guided(grid: Grid, maps: Tensor, noise: Tensor, center_noise: Tensor) -> Tensor:
    """The same zones around the maximum of the map."""
    return noise - boxes_around(grid, *maximum(grid, maps))


def attention(grid: Grid, maps: Tensor, noise: Tensor, center_noise: Tensor) -> Tensor:
    """The most similar patch first: the map itself is the order."""
    return 1 - maps.float()


def attention_center(grid: Grid, maps: Tensor, noise: Tensor, center_noise: Tensor) -> Tensor:
    """The paper's order, centerness C: distance on the grid to the maximum of the map, plus 0.001 noise.

    Fig. 1 says that C is randomised; that much noise and this distance are upstream's, models_semaim.py@ade770f.
    """
    row, column = maximum(grid, maps)
    distance = (grid.row - row[:, None]).square() + (grid.column - column[:, None]).square()
    # float32 square roots are rounded differently by different kernels, and every bit makes or breaks a tie.
    return distance.double().sqrt().float() + 0.001 * noise


ORDERS: dict[str, Callable[..., Tensor]] = {
    rule.__name__: rule
    for rule in (
        zigzag,
        raster,
        stochastic,
        stochastic_center,
        center2out,
        attention,
        attention_guided,
        attention_center,
    )
}
MAP_ORDERS = ("attention", "attention_guided", "attention_center")
BOX_ORDERS = ("stochastic_center", "attention_guided")  # defined on the grid of 14 only
TOTAL_ORDERS = ("zigzag", "raster")  # no two patches of an image tie


def maximum(grid: Grid, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the largest value of each map (N, L): (N,) long each."""
    best = maps.argmax(dim=1)
    return best // grid.side, best % grid.side


def box_start(centre: Tensor, half: int) -> Tensor:
    """First row (or column) of the box of 2 * half rows around `centre`, on the grid of 14.

    Towards the borders boxes stick to the first, or to the last but one row.
    """
    inside = (centre - half).clamp(0, BOX_GRID - 1 - 2 * half)
    return inside.masked_fill(centre <= 2, 0).masked_fill(centre >= BOX_GRID - 3, BOX_GRID - 1 - 2 * half)


def boxes_around(grid: Grid, row: Tensor, column: Tensor) -> Tensor:
    """How many of the boxes around a centre, (N,) each, hold each patch: (N, L) long, 0 to 3."""
    top, left = (torch.stack([box_start(centre, half) for half in BOXES], dim=1) for centre in (row, column))
    return boxes_that_hold(grid, top, left)


def boxes_that_hold(grid: Grid, top: Tensor, left: Tensor) -> Tensor:
    """How many of three boxes hold each patch.

    Args:
        top, left: (N, 3) long, first row and first column of each box.
    Returns:
        (N, L) long, 0 to 3.
    """
    side = 2 * distributed.constant(BOXES, top.device)[:, None]
    down, right = grid.row - top[..., None], grid.column - left[..., None]  # (N, 3, L)
    return ((down >= 0) & (down < side) & (right >= 0) & (right < side)).sum(dim=1)


# ---- ranks of a batch


def permutation(
    rule: str,
    x: Tensor,
    maps: Tensor | None = None,
    noise: Tensor | None = None,
    center_noise: Tensor | None = None,
) -> Tensor:
    """Rank of every patch for a batch like x (N, L, ...): the smaller, the earlier it is predicted. Ranks may tie.

    Args:
        rule: a name of `ORDERS`.
        maps: (N, L), for the three rules that follow a map.
        noise: (N, L) in [0, 1), replaces the draw of the order.
        center_noise: (2, N) in [0, 1), replaces the draw of a random centre's row and column.
    Returns:
        (N, L), long for zigzag and float32 else.
    Raises:
        ValueError: the order follows a map, and none is given; or an argument has another shape.
    """
    n, length = x.shape[:2]
    for name, given, shape in (
        ("attention_maps", maps, (n, length)),
        ("noise", noise, (n, length)),
        ("center_noise", center_noise, (2, n)),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} is {tuple(given.shape)}, expected {shape}")
    if rule in MAP_ORDERS and maps is None:
        raise ValueError(f"permutation_type {rule} needs attention_maps")
    if noise is None and rule not in (*TOTAL_ORDERS, "attention"):
        noise = torch.rand(n, length, device=x.device)
    if center_noise is None and rule == "stochastic_center":
        center_noise = torch.stack([torch.rand(n, device=x.device), torch.rand(n, device=x.device)])
    side, index = math.isqrt(length), torch.arange(length, device=x.device)
    return ORDERS[rule](Grid(side, index // side, index % side), maps, noise, center_noise).expand(n, -1)


# ---- what ranks let a patch see


def visibility(permutation: Tensor) -> tuple[Tensor, Tensor]:
    """What the two streams see of the content stream; ties of the ranks (N, L) are kept exactly.

    In the content stream a patch sees itself and the patches of smaller or equal rank: ties see each other. In the
    query stream a patch is predicted from the patches of smaller rank alone: ties do not predict each other. All see
    the class token, which sees only itself.
    Returns:
        bool masks, True = visible: content (N, T, T), and query (N, L, T), without a row for the class token.
    """
    row, key = permutation[:, :, None], permutation[:, None, :]
    content = F.pad(key <= row, (1, 0), value=True)
    content = F.pad(content, (0, 0, 1, 0), value=False)
    content[:, 0, 0] = True
    return content, F.pad(key < row, (1, 0), value=True)


def sorted_limits(permutation: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """`visibility` when the patches are sorted by order (N, L): row r then sees keys 0 (class token) to its limit.

    Returns:
        limits of the content stream (N, T), of the class token 0, and of the query stream (N, L).
    """
    ranks = permutation.gather(1, order).contiguous()
    low = torch.searchsorted(ranks, ranks, right=False)  # patches of smaller rank
    high = torch.searchsorted(ranks, ranks, right=True)  # of smaller or equal rank
    return F.pad(high, (1, 0)), low


def has_ties(permutation: Tensor) -> bool:
    """Whether two patches of one image have the same rank; on a GPU this waits for the ranks (N, L)."""
    return not bool((permutation.sort(dim=1).values.diff(dim=1) > 0).all())
