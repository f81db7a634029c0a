"""Pictures of reconstructions."""

import copy

import torch
from PIL import Image

from a2mim import pictures
from tests.support.helpers import assert_close, golden_files, load_golden


@golden_files("a2mim", "reconstruction_grid")
def test_pictures_match_upstream(path):
    ref = load_golden(path)
    target, pred, mask = (ref[f"in/{k}"] for k in ("target", "pred", "mask"))
    methods = {name.split("/")[0] for name in ref.group("out")}
    assert methods
    for method in methods:
        rows = pictures.reconstruction_rows(target, pred, mask, n=ref.meta["nrow"])
        ref.check(f"out/{method}/rows", rows[..., ::4, ::4], rtol=1e-5, atol=1e-6, what=method)
        grid = pictures.reconstruction_grid(rows)
        assert grid.dtype == torch.uint8
        ref.check(f"out/{method}/grid_shape", list(grid.shape), rtol=0, atol=0)
        if f"out/{method}/uint" in ref:
            assert_close(grid[..., ::3, ::3].int(), ref[f"out/{method}/uint"].int(), rtol=0, atol=1, what=method)


def test_fewer_images_than_columns():
    target, pred, mask = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.ones(2, 1, 1)
    rows = pictures.reconstruction_rows(target, pred, mask)
    assert rows.shape == (6, 3, 32, 32)
    assert torch.equal(rows[:2], target)
    assert not rows[2:4].any(), "the mean colour"
    assert torch.equal(rows[4:], pred)
    assert pictures.reconstruction_grid(rows).shape == (3, 3 * 34 + 2, 2 * 34 + 2)


def test_pictures_are_files(tmp_path):
    path = tmp_path / "reconstruction" / "epoch_0.png"
    target = torch.randn(4, 3, 32, 32)
    pred = target.bfloat16()
    state = copy.deepcopy(target)
    pictures.save_reconstructions(path, target, pred, torch.ones(4, 2, 2, dtype=torch.uint8), "A2MIM")
    assert Image.open(path).size == (1200, 900)
    assert torch.equal(target, state)
