"""The images that a user gives to a tool: which are labelled, and what of them a seed sees."""

import numpy as np
import pytest
from PIL import Image

from common.distributed import UserError
from scripts.tools.images import classes_of, evenly, read_pictures
from tests.scripts.test_quickstart import photos


@pytest.mark.parametrize(
    ("names", "split", "classes"),
    [
        (["a.jpg", "b.jpg"], False, []),
        (["trip/a.jpg", "trip/b.jpg"], False, []),  # one folder is no classes
        (["ant/a.jpg", "bee/b.jpg", "bee/c.jpg"], False, []),  # one image cannot be in train/ and val/
        (["ant/a.jpg", "ant/b.jpg", "bee/c.jpg", "bee/d.jpg"], False, ["ant", "bee"]),
        (["ant/a.jpg", "ant/b.jpg", "bee/c.jpg", "bee/d.jpg", "e.jpg"], False, []),  # e.jpg would be lost
        ([f"{s}/{c}/{i}.jpg" for s in ("train", "val") for c in ("ant", "bee") for i in "01"], True, ["ant", "bee"]),
        ([*(f"train/{c}/{i}.jpg" for c in ("ant", "bee") for i in "01"), "val/ant/0.jpg"], True, []),
    ],
)
def test_classes_of(names, split, classes, tmp_path):
    assert classes_of(photos(tmp_path, *names), split) == classes


def test_evenly__every_class_and_in_order():
    assert evenly([0] * 10 + [1] * 5, 6) == [0, 4, 9, 10, 12, 14]
    assert evenly([0, 1, 1], 100) == [0, 1, 2]


def test_pictures__seeds_share_no_validation_image(digits, tmp_path):
    for data, held in ((digits, 20), (f"{digits}/train", 48)):
        pictures = read_pictures(data)
        parts = [pictures.split(seed, 5) for seed in range(5)]
        assert sorted(np.concatenate([val for _, val in parts]).tolist()) == list(range(68))[-held:] or held == 48
        assert len(np.unique(np.concatenate([val for _, val in parts]))) == held
        for train, val in parts:
            assert not np.intersect1d(train, val).size
    few, more = (pictures.labelled(parts[0][0], n, seed=3) for n in ("1", "2"))
    assert set(few.tolist()) < set(more.tolist())
    assert np.bincount(pictures.labels[more]).tolist() == [2] * 10
    assert pictures.labelled(parts[0][0], "all", 0) is parts[0][0]
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="has 1 image, expected at least 2"):
        read_pictures(str(tmp_path))
