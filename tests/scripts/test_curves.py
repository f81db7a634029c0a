"""Reference bands of losses: which run has which, what is inside, and that those in docs/ are of today's recipes."""

import importlib
import json
import math

import numpy as np
import pytest
import torch

from scripts.tools import curves, quickstart, record_curves
from tests.support.helpers import ROOT
from tests.support.runs import arguments


@pytest.fixture
def band(tmp_path) -> curves.Band:
    content = {"row": "digits_saim", "flags": {"lr": 0.1, "model": "m"}, "images": 10, "seeds": [0, 1, 2]}
    content |= {"mean": [1.0, 0.5, 0.4], "std": [0.01, 0.02, 0.0]}
    (tmp_path / "digits_saim.json").write_text(json.dumps(content | {"machine": "x"}))
    return curves.read(tmp_path / "digits_saim.json")


def test_inside_and_outside(band):
    np.testing.assert_allclose(band.half_width, [0.05, 0.1, 5 * 0.004])  # the last by the median share, 0.01
    assert band.outside([1.04, 0.41, 0.419]) == []
    assert band.outside([1.06, 0.5, math.nan]) == [0, 2]
    assert band.outside([1.0]) == []
    log = {1: {"train_loss": 1.0}, 2: {"train_loss": 0.7}}
    where = "in 1 of 2 epochs, first in epoch 2: 0.7, 0.4 to 0.6 expected"
    assert band.verdict(log) == f"loss outside the reference band of digits_saim (3 seeds) {where}"
    assert band.verdict({1: log[1]}).endswith("(3 seeds) in all 1 epochs so far")
    assert "first in epoch 1: nan" in band.verdict({1: {}})  # a log has no number for it
    assert band.verdict({}) == ""


def test_band_of_a_run__by_its_flags(band, tmp_path):
    flags = {"lr": 0.1, "model": "m", "seed": 7, "output_dir": "x", "later_flag": 1}
    assert curves.band_of(flags, 10, tmp_path) == curves.band_of(flags, None, tmp_path) == band
    others = [{**flags, "lr": 0.2}, {"lr": 0.1}, {}, {**flags, "initial_checkpoint": "file"}, {**flags, "in_chans": 1}]
    assert [curves.band_of(other, 10, tmp_path) for other in others] == [None] * 5
    assert curves.band_of(flags, 11, tmp_path) is None


@pytest.mark.parametrize("path", sorted(curves.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_bands_in_docs__are_of_the_recipe_as_it_is(path):
    """Else record it anew, by the command in the file."""
    record, found = json.loads(path.read_text()), curves.read(path)
    method = found.row.removeprefix("digits_")
    images = quickstart.Images(ROOT / "data", None, found.images, 8, classes=10, are_digits=True)
    words = record_curves.steps(method, images, ROOT / "out", seed=5)[-1].argv
    main = importlib.import_module(f"{method}.main_pretrain")
    now = curves.learnt(vars(arguments(main, *words[2:])))
    changed = {k: (now[k], v) for k, v in found.flags.items() if k in now and now[k] != v and now[k] is not None}
    assert not changed
    assert len(found.mean) == len(found.std) == found.flags["epochs"]
    assert record["command"] == f"python scripts/tools/record_curves.py {method}"


def test_record__of_logs(tmp_path):
    for seed, shift in enumerate((0.0, 0.1, 0.2)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "log.txt").write_text("".join(f'{{"epoch": {e}, "train_loss": {2 - e + shift}}}\n' for e in (0, 1)))
        flags = {"lr": 0.1, "seed": seed, "output_dir": str(folder), "epochs": 2}
        (folder / "run.json").write_text(json.dumps({"starts": [{"flags": flags, "seconds": 3.4}]}))
        torch.save({"origin": {"images": 48}}, folder / "checkpoint.pth")
    found = record_curves.band("digits_saim", [tmp_path / str(seed) for seed in range(3)], [0, 1, 2])
    assert (found["mean"], found["std"]) == ([2.1, 1.1], [0.1, 0.1])
    assert (found["flags"], found["images"]) == ({"lr": 0.1, "epochs": 2}, 48)
