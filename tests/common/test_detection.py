"""Images with objects: what is read and left out, random views, batches, and what users are told."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from torch import Tensor

from common.datasets import Loader, seeded
from common.dense_datasets import detection, views
from common.dense_datasets.detection import DetectionImages, GroupedSampler, ImageInfo, collate, decode_mask
from common.dense_datasets.views import EvalTransform, TrainTransform, cropped, flipped
from common.distributed import UserError

CPU = torch.device("cpu")
DETR_SIDES = range(480, 801, 32)


def shape(x: float, y: float, w: float, h: float, **fields: Any) -> dict[str, Any]:
    """An annotation of a rectangle."""
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    own = {"image_id": 5, "category_id": 7, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
    return {**own, "segmentation": [corners], **fields}


def write(folder: Path, annotations: list[dict], sizes: dict[int, tuple[int, int]] | None = None, **lists: Any) -> Path:
    """A json and its images, of (height, width) by id; category ids have gaps and no order."""
    images = []
    for number, (height, width) in (sizes or {5: (40, 60)}).items():
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    categories = [{"id": 90, "name": "late"}, {"id": 7, "name": "first"}, {"id": 9, "name": "second"}]
    numbered = [{"id": 1000 + i, **entry} for i, entry in enumerate(annotations)]
    content = {"images": images, "annotations": numbered, "categories": categories, **lists}
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"


def read(folder: Path, annotations: list[dict], train: bool = True, **kwargs: Any) -> DetectionImages:
    return DetectionImages(write(folder, annotations, **kwargs), folder, train)


# ---- annotations


def test_training_leaves_out_what_cannot_be_learnt(tmp_path, capsys):
    refused = [
        shape(60, 0, 5, 5),
        shape(-5, 0, 5, 5),
        shape(2, 2, 0.5, 9),
        shape(2, 2, 9, 0.9),
        shape(2, 2, 9, 9, area=0),
    ]
    kept = [shape(-3, 5, 10, 10), shape(50, 30, 30, 30), shape(1, 1, 8, 8, category_id=90)]
    only_refused = [shape(1, 1, 0, 5, image_id=6), shape(1, 1, 9, 9, image_id=6, iscrowd=1)]
    small = [shape(1, 1, 9, 9, image_id=8)]
    sizes = dict.fromkeys((5, 6, 7), (40, 60)) | {8: (31, 90)}
    images = read(tmp_path, [*refused, *kept, *only_refused, *small], sizes=sizes)
    assert [number for _, number in images.samples] == [5, 6]
    assert (images.category_ids, images.classes) == ([7, 9, 90], ["first", "second", "late"])
    objects = images.objects(0)
    assert objects["boxes"].tolist() == [[-3, 5, 7, 15], [50, 30, 80, 60], [1, 1, 9, 9]]
    assert objects["labels"].tolist() == [0, 0, 2]
    empty = images.objects(1)  # background
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 40, 60)
    left = "1 images without annotations, 1 smaller than 32 pixels, 1 crowds, 6 objects without area or outside"
    assert f"2 images; left out: {left} their image" in capsys.readouterr().out
    assert len(read(tmp_path, kept, sizes=sizes, train=False)) == 4


def test_masks_are_pycocotools_own(tmp_path):
    ring = np.zeros((40, 60), np.uint8)
    ring[5:30, 10:50] = 1
    ring[10:20, 20:30] = 0
    packed: Any = mask_utils.encode(np.asfortranarray(ring))
    flat = np.flatnonzero(np.diff(ring.T.ravel(), prepend=0)).tolist()
    unpacked = {"size": [40, 60], "counts": np.diff([0, *flat, ring.size]).tolist()}
    two = [[1.2, 1, 20, 2.7, 15, 20.4], [30, 30, 40, 30, 40, 39], [1, 2, 3, 4]]
    packed = {"size": packed["size"], "counts": packed["counts"].decode()}
    entries = [shape(1, 1, 40, 38, segmentation=s) for s in (two[:2], packed, unpacked)]
    objects = read(tmp_path, [*entries, shape(1, 1, 40, 38, segmentation=two)]).objects(0)
    coco: Any = COCO(tmp_path / "a.json")
    for mask, entry in zip(objects["masks"][:3], coco.loadAnns(coco.getAnnIds(5)), strict=False):
        assert np.array_equal(mask.numpy(), coco.annToMask(entry))
    assert np.array_equal(objects["masks"][1], ring)
    assert np.array_equal(objects["masks"][2], ring)
    assert torch.equal(objects["masks"][3], objects["masks"][0])  # four numbers enclose nothing
    assert not decode_mask([[1, 2, 3, 4]], 40, 60).any()


def test_boxes_stand_in_for_masks(tmp_path, capsys):
    bare = {"image_id": 5, "category_id": 9, "bbox": [10, 5, 20, 10]}
    objects = read(tmp_path, [bare]).objects(0)
    assert objects["masks"].sum() == 200
    assert objects["masks"][0, 5:15, 10:30].all()
    assert "1 annotations have no segmentation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("annotations", "lists", "said"),
    [
        ([shape(1, 1, 9, 9, category_id=8)], {}, "annotation 1000 has the unknown category_id 8"),
        ([shape(1, 1, 9, 9, image_id=4)], {}, "annotation 1000 has the unknown image_id 4"),
        ([{"image_id": 5, "category_id": 7}], {}, "an entry lacks a value or has a wrong one: 'bbox'"),
        ([], {"images": {}}, "expected the lists images, annotations, categories, as COCO has them"),
        ([], {"categories": []}, "has 1 images and 0 categories"),
        ([], {}, "has no image to train on"),
    ],
)
def test_annotations__raise_on_what_they_lack(tmp_path, annotations, lists, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, annotations, **lists)


def test_annotations__raise_on_missing_files(tmp_path, monkeypatch):
    path = write(tmp_path, [shape(1, 1, 9, 9)])
    with pytest.raises(UserError, match="no such file of annotations"):
        DetectionImages(tmp_path / "b.json", tmp_path, True)
    with pytest.raises(UserError, match="nowhere: no such folder of images"):
        DetectionImages(path, tmp_path / "nowhere", True)
    (tmp_path / "5.png").unlink()
    with pytest.raises(UserError, match=r"5\.png: no such image \(1 of 1 named by"):
        DetectionImages(path, tmp_path, True)
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as json"):
        DetectionImages(path, tmp_path, True)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match="object detection needs pycocotools: pip install pycocotools"):
        DetectionImages(path, tmp_path, True)


def test_an_image_of_another_size_is_refused(tmp_path):
    images = read(tmp_path, [shape(1, 1, 9, 9)])
    Image.new("RGB", (40, 60)).save(tmp_path / "5.png")
    with pytest.raises(ValueError, match=r"has 40 x 60 pixels, .*a.json says 60 x 40"):
        images[0]
    loader = Loader(images, TrainTransform([32]), 1, CPU, num_workers=0, joint=True, collate=collate)
    with pytest.raises(UserError, match="5.png: unreadable image"):
        next(iter(loader.batches()))


# ---- views


def boxes_of(masks: Tensor) -> Tensor:
    """The smallest boxes around masks."""
    spans = [[(float(i.min()), float(i.max()) + 1) for i in np.nonzero(mask.numpy())[::-1]] for mask in masks]
    return torch.tensor([[x[0], y[0], x[1], y[1]] for x, y in spans])


@pytest.mark.parametrize("crops", [(), (70, 90)])
def test_boxes_and_masks_move_with_the_image(crops):
    """Bright rectangles stay where boxes and masks say they are."""
    image = np.zeros((60, 90, 3), np.uint8)
    image[10:40, 15:35], image[20:50, 60:84] = 255, 255
    masks = torch.zeros(2, 60, 90, dtype=torch.uint8)
    masks[0, 10:40, 15:35], masks[1, 20:50, 60:84] = 1, 1
    target = {"image_id": 3, "boxes": torch.tensor([[15.0, 10, 35, 40], [60, 20, 84, 50]]), "masks": masks}
    target["labels"] = torch.tensor([4, 6])
    transform = TrainTransform([64, 96, 128], 400, crops, (50, 80))
    flips, sizes = set(), set()
    for seed in range(20):
        with seeded(seed):
            pixels, (info, objects) = transform(Image.fromarray(image), target)
        assert info.original == (60, 90)
        assert tuple(pixels.shape[1:]) == info.size == tuple(objects["masks"].shape[1:])
        assert [side % 32 for side in info.padded] == [0, 0]
        seen = objects["masks"].flatten(1).sum(1) > 0
        assert (objects["boxes"][seen] - boxes_of(objects["masks"][seen])).abs().max() < (
            2.6 if crops else 1.6
        )  # a pixel before it grew
        bright = pixels.mean(0) > 1
        assert (bright != (objects["masks"].sum(0) > 0)).float().mean() < 0.05
        if not crops:
            assert objects["labels"].tolist() == [4, 6]
            flips.add(bool(objects["boxes"][0, 0] > objects["boxes"][1, 0]))
        sizes.add(min(info.size))
    assert flips == (set() if crops else {False, True})
    assert crops or sizes == {64, 96, 128}


def test_crops_clip_boxes_and_drop_what_is_outside():
    image, masks = torch.zeros(3, 60, 90, dtype=torch.uint8), torch.ones(3, 60, 90, dtype=torch.uint8)
    boxes = torch.tensor([[15.0, 10, 35, 40], [60, 20, 84, 50], [0, 0, 20, 59]])
    target = {"boxes": boxes, "labels": torch.tensor([4, 6, 8]), "masks": masks}
    part, inside = cropped(image, target, (5, 20), (50, 30))
    assert part.shape == (3, 50, 30)
    assert inside["boxes"].tolist() == [[0, 5, 15, 35]]
    assert inside["labels"].tolist() == [4]
    assert inside["masks"].shape == (1, 50, 30)
    assert flipped(image, target)[1]["boxes"].tolist()[0] == [55, 10, 75, 40]


def test_detr_policy__sizes_of_the_recipe(monkeypatch):
    """Short sides 480, 512, ... 800, the long one at most 1333; half the images show a part of 384 to 600 pixels."""
    monkeypatch.setattr(views, "resize_image", lambda image, size: image[:, :1, :1].expand(3, *size))
    monkeypatch.setattr(views, "normalize", lambda image, *_: image)  # only sizes are looked at
    empty = {"image_id": 1, "boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    target = {**empty, "masks": torch.zeros(0, 90, 160, dtype=torch.uint8)}
    image, transform, seen = Image.new("RGB", (160, 90)), TrainTransform(DETR_SIDES), []
    random.seed(0)
    for _ in range(150):
        _, (info, _) = transform(image, target)
        height, width = info.size
        whole = abs(width / height - 160 / 90) < 0.01
        assert max(info.size) <= 1333
        assert max(info.size) == 1333 or min(info.size) in DETR_SIDES
        seen.append((whole, min(info.size)))
    assert {side for whole, side in seen if whole} >= set(DETR_SIDES[:8])  # the longest would be above 1333
    assert 0.3 < sum(whole for whole, _ in seen) / len(seen) < 0.7


def test_evaluation_sees_whole_images():
    pixels, (info, objects) = EvalTransform()(Image.new("RGB", (640, 427)), {"image_id": 9})
    assert info == ImageInfo((800, 1199), (800, 1216), (427, 640), (1199 / 640, 800 / 427), 9)
    assert pixels.shape == (3, 800, 1199)
    assert objects == {}
    assert EvalTransform()(Image.new("RGB", (1000, 200)), {"image_id": 9})[1][0].size == (267, 1333)


# ---- batches


def test_batches_are_padded_at_right_and_bottom():
    def sample(height: int, width: int) -> Any:
        padded = (-(-height // 32) * 32, -(-width // 32) * 32)
        info = ImageInfo((height, width), padded, (height, width), (1.0, 1.0), height)
        objects = {"boxes": torch.zeros(2, 4), "labels": torch.ones(2), "masks": torch.ones(2, height, width)}
        return torch.ones(3, height, width), (info, objects)

    images, targets = collate([sample(40, 60), sample(33, 90)])
    assert images.shape == (2, 3, 64, 96)
    assert images[0].sum() == 3 * 40 * 60
    assert images[0, :, :40, :60].all()
    assert targets[1][1]["masks"].shape == (2, 64, 96)
    assert targets[1][1]["masks"][:, :33, :90].all()
    assert targets[0][0].padded == (64, 64)


def test_grouped_sampler(monkeypatch):
    sizes = [(40, 60)] * 7 + [(60, 40)] * 5 + [(50, 50)] * 2
    alone = GroupedSampler(sizes, 2, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        alone.set_epoch(epoch)
        epochs.append(list(alone))
    assert epochs[0] == epochs[2] != epochs[1]
    for order in epochs:
        assert len(order) == len(alone) == 16
        assert set(order) == set(range(14))
        assert all((a < 7) == (b < 7) for a, b in zip(order[::2], order[1::2], strict=True))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(detection, "world_size", lambda: 2)
        monkeypatch.setattr(detection, "rank", lambda rank=rank: rank)
        shares.append(list(alone))
    assert len(alone) == len(shares[0]) == len(shares[1]) == 8
    assert set(shares[0] + shares[1]) == set(range(14))


def test_batches_depend_on_seed_epoch_and_index_alone(tmp_path):
    sizes = {number: (40, 60) if number % 3 else (60, 40) for number in range(1, 8)}
    images = read(tmp_path, [shape(5, 5, 20, 20, image_id=number) for number in sizes], sizes=sizes)

    def batches(workers: int = 0, start: int = 0, seed: int = 0, epoch: int = 1) -> list:
        sampler = GroupedSampler(images.sizes, 2, seed)
        transform = TrainTransform([32, 48, 64], 90, (40,), (24, 36))
        options: dict[str, Any] = {"joint": True, "collate": collate, "sampler": sampler, "num_workers": workers}
        return list(Loader(images, transform, 2, CPU, seed=seed, **options).batches(epoch, start))

    whole, rest = batches(), batches(start=2, workers=1)
    assert len(whole) == 4
    for (image, targets), (other, others) in zip(whole[2:], rest, strict=True):
        assert torch.equal(image, other)
        for (info, objects), (same, those) in zip(targets, others, strict=True):
            assert info == same
            assert all(torch.equal(objects[key], those[key]) for key in objects)
    for other in (batches(epoch=2), batches(seed=1)):
        assert any(a.shape != b.shape or not torch.equal(a, b) for (a, _), (b, _) in zip(whole, other, strict=True))
