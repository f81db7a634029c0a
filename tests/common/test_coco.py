"""Average precision: that of pycocotools on the same predictions."""

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from common.dense_datasets import coco
from common.dense_datasets.detection import DetectionImages
from scripts.tools.shapes import write_stills


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> DetectionImages:
    """Twelve drawn pictures, one empty and one with a crowd."""
    folder = tmp_path_factory.mktemp("shapes")
    write_stills(folder, "validation", range(9, 21), 64, 0)
    return DetectionImages(folder / "coco/annotations/instances_val2017.json", folder / "coco/val2017", False)


def found(images: DetectionImages, index: int, noise: float, rng: np.random.Generator) -> dict[str, Any]:
    """The image's objects, moved and confused by noise."""
    objects = images.objects(index)
    count, shift = len(objects["labels"]), int(noise > 0)
    boxes = objects["boxes"] + torch.from_numpy(rng.normal(0, noise, (count, 4))).float()
    wrong = torch.from_numpy(rng.integers(0, 6, count))
    labels = torch.where(torch.from_numpy(rng.random(count) < 0.2 * shift), wrong, objects["labels"])
    masks = objects["masks"].roll(shift, 2).bool()
    return {"boxes": boxes, "scores": torch.from_numpy(rng.random(count)), "labels": labels, "masks": masks}


def predictions(images: DetectionImages, noise: float) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    all_found = [found(images, i, noise, rng) for i in range(len(images))]
    numbers = [number for _, number in images.samples]
    return [p for n, f in zip(numbers, all_found, strict=True) for p in coco.predictions_of(n, f, images.category_ids)]


def test_ap_is_that_of_pycocotools(images, tmp_path):
    made = predictions(images, noise=1.5)
    stats, per_class = coco.average_precision(images, made)
    coco.save_predictions(str(tmp_path / "new"), made)
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(images.path)
            own: Any = truth.loadRes(str(tmp_path / f"new/predictions.{name}.json"))
            evaluation = COCOeval(truth, own, name)  # type: ignore[arg-type]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        numbers = [100 * x if x > -1 else np.nan for x in evaluation.stats[:6]]
        np.testing.assert_array_equal([stats[f"{kind}_{n}"] for n in coco.NAMES], numbers)
        assert 20 < stats[f"{kind}_AP"] < 90
        assert np.nanmean(list(per_class[kind].values())) == pytest.approx(stats[f"{kind}_AP"])
    assert list(per_class["box"]) == images.classes
    entry = json.loads((tmp_path / "new/predictions.segm.json").read_text())[0]
    assert set(entry) == {"image_id", "category_id", "score", "segmentation"}


def test_perfect_and_absent_predictions(images):
    stats, _ = coco.average_precision(images, predictions(images, noise=0))
    assert stats["mask_AP"] == pytest.approx(100)
    assert stats["box_AP"] == pytest.approx(100)
    stats, per_class = coco.average_precision(images, [])
    assert set(stats.values()) == {0.0}
    assert set(per_class["mask"].values()) == {0.0}


def test_annotations_are_read_once(images, monkeypatch):
    made = predictions(images, noise=1.5)
    first, _ = coco.average_precision(images, made)
    monkeypatch.setattr(coco, "read_annotations", None)
    again, _ = coco.average_precision(images, made)
    np.testing.assert_equal(again, first)


def test_save_predictions__raises_where_nothing_can_be_written(images, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(coco.UserError, match="predictions.bbox.json: cannot be written"):
        coco.save_predictions(str(tmp_path / "file"), [])


def test_predictions_of_nothing(images):
    none = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()}
    assert coco.predictions_of(1, {**none, "masks": torch.zeros(0, 40, 60).bool()}, images.category_ids) == []
