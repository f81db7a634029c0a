"""The eight orders and their masks against the authors' numbers, and rule by rule."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from semaim import orders
from tests.support.helpers import golden_files, load_golden
from tests.support.semaim_networks import BOX_ORDERS, MAP_ORDERS, build, check_ranks, images, inputs, rule_of, small

DRAWN_ORDERS = [p for p in orders.ORDERS if p not in ("zigzag", "raster", "attention")]


@golden_files("semaim", "pretrain_orders")
def test_orders_and_masks(path):
    ref = load_golden(path)
    for case in ref.meta["cases"]:
        model, given = build(ref, permutation_type=rule_of(case)), inputs(ref, case)
        given.pop("tokens", None)
        content, query, permutation = model.generate_attention_mask(model.patch_embed(ref["in/imgs"]), **given)
        check_ranks(ref, f"out/{case}/permutation", permutation, case)
        n, tokens = len(permutation), permutation.shape[1] + 1
        for mask, stream in ((content, "content"), (query, "query")):
            assert mask.shape == (n, 1, tokens, tokens)
            assert set(mask.unique().tolist()) <= {0, -math.inf}
            packed = np.packbits((mask[:, 0] == 0).numpy(), axis=-1)
            ref.equal(f"out/{case}/{stream}_visible", torch.from_numpy(packed))


# ---- rules


def ranks(rule: str, grid: int, n: int = 2, **given) -> Tensor:
    model = small(img_size=grid, patch_size=1, embed_dim=4, depth=1, query_depth=1, num_heads=1, permutation_type=rule)
    return model.permutation(torch.zeros(n, grid**2, 4), **given)


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 5, 8, 14])
def test_raster_is_a_snake_and_zigzag_is_row_by_row(grid):
    zigzag, raster = ranks("zigzag", grid), ranks("raster", grid)
    assert (zigzag.dtype, raster.dtype) == (torch.int64, torch.float32)
    table = torch.arange(grid**2).view(grid, grid)
    assert torch.equal(zigzag, table.flatten().expand(2, -1))
    snake = [table[r] if r % 2 == 0 else table[r].flip(0) for r in range(grid)]
    assert torch.equal(raster, torch.cat(snake).float().expand(2, -1))


# From the authors' table: [first, end) of the boxes around a centre on the grid of 14.
BOUNDS = {
    0: ((0, 2), (0, 6), (0, 10)),
    1: ((0, 2), (0, 6), (0, 10)),
    2: ((0, 2), (0, 6), (0, 10)),
    3: ((2, 4), (0, 6), (0, 10)),
    4: ((3, 5), (1, 7), (0, 10)),
    5: ((4, 6), (2, 8), (0, 10)),
    6: ((5, 7), (3, 9), (1, 11)),
    7: ((6, 8), (4, 10), (2, 12)),
    8: ((7, 9), (5, 11), (3, 13)),
    9: ((8, 10), (6, 12), (3, 13)),
    10: ((9, 11), (7, 13), (3, 13)),
    11: ((11, 13), (7, 13), (3, 13)),
    12: ((11, 13), (7, 13), (3, 13)),
    13: ((11, 13), (7, 13), (3, 13)),
}


def boxes_at(row: int, column: int) -> Tensor:
    """How many boxes around a centre hold each patch, (196,)."""
    count = torch.zeros(14, 14)
    for (top, bottom), (left, right) in zip(BOUNDS[row], BOUNDS[column], strict=True):
        count[top:bottom, left:right] += 1
    return count.flatten()


def test_attention_guided__boxes_around_the_maximum():
    centres = range(14 * 14)
    maps = F.one_hot(torch.tensor(list(centres)), 196).float()
    found = ranks("attention_guided", 14, n=196, attention_maps=maps, noise=torch.zeros(196, 196))
    assert torch.equal(-found, torch.stack([boxes_at(*divmod(c, 14)) for c in centres]))


def test_stochastic_center__boxes_around_a_drawn_centre():
    centre = torch.tensor([[0, 5, 12, 7], [12, 0, 3, 10]])
    center_noise = (centre + 0.5) / 13
    found = ranks("stochastic_center", 14, n=4, center_noise=center_noise, noise=torch.zeros(4, 196))
    assert torch.equal(-found, torch.stack([boxes_at(r, c) for r, c in centre.T.tolist()]))


@pytest.mark.parametrize("grid", [2, 5, 8, 14, 16])
def test_center2out__boxes_in_the_middle(grid):
    count = torch.zeros(grid, grid)
    for half in (1, 3, 5):
        low, high = max(grid // 2 - half, 0), grid // 2 + half
        count[low:high, low:high] += 1
    noise = torch.rand(2, grid**2)
    assert torch.equal(ranks("center2out", grid, noise=noise), noise - count.flatten())


@pytest.mark.parametrize("grid", [2, 3, 4, 5, 14, 16])
def test_attention_center__distance_to_the_maximum(grid):
    maps = torch.rand(2, grid**2)
    noise = torch.rand(2, grid**2)
    found = ranks("attention_center", grid, attention_maps=maps, noise=noise)
    assert found.dtype == torch.float32
    for image in range(2):
        row, column = divmod(int(maps[image].argmax()), grid)
        for patch in range(grid**2):
            r, c = divmod(patch, grid)
            distance = np.float32(np.float64((r - row) ** 2 + (c - column) ** 2) ** 0.5)
            expected = distance + np.float32(0.001) * noise[image, patch].numpy()
            assert found[image, patch].item() == expected


def test_attention__most_similar_first():
    maps = torch.rand(2, 9)
    found = ranks("attention", 3, attention_maps=maps)
    assert found.dtype == torch.float32
    assert torch.equal(found, 1 - maps)


@pytest.mark.parametrize("rule", orders.ORDERS)
def test_draws(rule):
    """What is drawn, from which generator, and in upstream's order: noise, centre's rows, centre's columns."""
    maps = torch.rand(2, 196) if rule in MAP_ORDERS else None
    model = small(img_size=14, patch_size=1, permutation_type=rule)
    like = torch.zeros(2, 196, 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = model.permutation(like, maps)
    assert torch.equal(before, torch.get_rng_state()) == (rule not in DRAWN_ORDERS)
    torch.manual_seed(5)
    noise = torch.rand(2, 14, 14).flatten(1)
    center_noise = torch.stack([torch.rand(2), torch.rand(2)])
    assert torch.equal(drawn, model.permutation(like, maps, noise, center_noise))
    assert drawn.dtype == (torch.int64 if rule == "zigzag" else torch.float32)


@pytest.mark.parametrize("rule", BOX_ORDERS)
def test_box_orders_need_the_grid_of_14(rule):
    with pytest.raises(ValueError, match=f"{rule} is defined for 14 x 14 patches, here are 4 x 4"):
        small(permutation_type=rule)


@pytest.mark.parametrize("rule", MAP_ORDERS)
def test_missing_maps_are_named(rule):
    model = small(permutation_type=rule, img_size=14, patch_size=1)
    assert model.follows_map
    for call in (model, model.forward_aim):
        with pytest.raises(ValueError, match=f"permutation_type {rule} needs attention_maps"):
            call(images(model))
