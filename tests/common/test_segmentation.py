"""Images with masks: the published arithmetic, the folders, the order of an iteration run, the scores."""

import argparse
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common import datasets
from common.dense_datasets.iterations import IterationLoader
from common.dense_datasets.scores import Confusion, table
from common.dense_datasets.segmentation import class_names, segmentation_images
from common.dense_datasets.transforms import (
    EvalTransform,
    TrainTransform,
    distort,
    draw_crop,
    draw_distortion,
    keep_ratio_size,
    normalize,
    resize_image,
    resize_labels,
)
from common.distributed import EpochLog, Position, UserError
from common.distributed.checkpoint import Checkpoint
from tests.support.dense import NAMES, masked_images
from tests.support.helpers import assert_close, golden_files, load_golden, tolerance

CPU = torch.device("cpu")


def check_transforms(path) -> None:
    ref = load_golden(path)
    image, limits = ref["in/image"].permute(2, 0, 1), ref.meta["tolerances"]

    def compare(got: torch.Tensor, name: str) -> None:
        expected = limits["keys with a comma (several steps)"] if "," in name else limits
        off = (got.permute(1, 2, 0).int() - ref[name].int()).abs()
        assert got.dtype == torch.uint8 and off.max() <= expected["levels"], name
        assert (off <= 1).float().mean() >= expected["share_within_1_level"], name

    for name in [key for key in ref.arrays if key.startswith("out/")]:
        kind, _, what = name.removeprefix("out/").partition("_")
        if kind == "image":
            width, height = map(int, what.split("x"))
            compare(resize_image(image, (height, width)), name)
        elif kind == "label":
            width, height = map(int, what.split("x"))
            assert torch.equal(resize_labels(ref["in/label"], (height, width)), ref[name]), name
        else:
            steps = [step.split("_") for step in name.removeprefix("out/photo/").split(",")]
            compare(distort(image, [(step, float(amount)) for step, amount in steps]), name)


@golden_files("cae", "dense_transforms")
def test_transforms_of_cae(path):
    check_transforms(path)


@golden_files("a2mim", "dense_transforms")
def test_transforms_of_a2mim(path):
    check_transforms(path)


@golden_files("udi", "dense_transforms")
def test_transforms_of_udi(path):
    check_transforms(path)


@golden_files("cae", "seg_miou")
def test_scores(path):
    ref = load_golden(path)
    classes = ref.meta["num_classes"]
    counted = Confusion(classes)
    for prediction, raw in zip(ref["in/pred"], ref["in/gt_raw"], strict=True):
        counted.update(prediction, torch.where(raw == 0, 255, raw.long() - 1))
    means, iou, acc = counted.scores()
    for name in ("mIoU", "aAcc"):
        ref.check(f"out/{name}", torch.tensor(means[name]) / 100, **tolerance(ref), what=name)
    ref.check("out/iou", iou / 100, **tolerance(ref))
    ref.check("out/acc", acc / 100, **tolerance(ref))


def test_scores_are_a_plain_count():
    rng = np.random.default_rng(0)
    prediction, labels = rng.integers(0, 4, (2, 3, 9, 7))
    labels[labels == 3] = 255  # a class that does not occur, and is predicted
    counted = Confusion(5)
    for one, truth in zip(prediction, labels, strict=True):
        counted.update(torch.from_numpy(one), torch.from_numpy(truth))
    means, iou, acc = counted.scores()
    valid = labels != 255
    for k in range(5):
        both, either = (((prediction == k) & (labels == k)).sum(), ((prediction == k) | (labels == k)) & valid)
        assert_close(iou[k], 100 * both / either.sum() if either.any() else np.nan, rtol=1e-12, atol=0)
        assert_close(acc[k], 100 * both / (labels == k).sum() if (labels == k).any() else np.nan, rtol=1e-12, atol=0)
    assert_close(torch.tensor(means["aAcc"]), 100 * (prediction == labels)[valid].mean(), rtol=1e-6, atol=0)
    assert_close(torch.tensor(means["mIoU"]), np.nanmean(iou.numpy()), rtol=1e-6, atol=0)
    assert table(["a", "b", "c", "d", "a long name"], iou, acc).splitlines()[-1] == "a long name     nan     nan"


def test_sizes():
    assert keep_ratio_size((512, 683), (2048, 512)) == (512, 683)
    assert keep_ratio_size((300, 1000), (2048, 512)) == (512, 1707)
    assert keep_ratio_size((200, 2000), (512, 2048)) == (205, 2048)  # the long side decides


def test_crops_avoid_a_single_class():
    labels = torch.zeros(40, 60, dtype=torch.uint8)
    labels[:, 30:] = 1
    labels[:20, :20] = 255
    random.seed(0)
    crops = [draw_crop(labels, (20, 20)) for _ in range(20)]
    for rows, columns in crops:
        assert labels[rows, columns].shape == (20, 20)
        counts = torch.bincount(labels[rows, columns].flatten(), minlength=256)[:255]
        assert counts.max() < 0.75 * counts.sum()
    assert len({(rows.start, columns.start) for rows, columns in crops}) > 10
    assert draw_crop(torch.zeros(8, 50, dtype=torch.uint8), (20, 20))[0] == slice(
        0, 20
    )  # lower than the crop, and of one class


def test_distortion_draws_every_step():
    random.seed(0)
    drawn = [draw_distortion() for _ in range(400)]
    names = [tuple(name for name, _ in steps) for steps in drawn]
    assert len(set(names)) == 22
    shares = [sum(step in one for one in names) / 400 for step in ("brightness", "contrast", "saturation", "hue")]
    assert all(0.4 < share < 0.6 for share in shares)
    assert all(-18 <= amount <= 17 for steps in drawn for name, amount in steps if name == "hue")


def flags(root: Path, **kwargs) -> argparse.Namespace:
    values = {"data_path": str(root), "output_dir": "", "nb_classes": None, "reduce_zero_label": None}
    values |= {"in_chans": None}
    args = argparse.Namespace(**{**values, **kwargs})
    args.class_names = class_names(args)
    return args


@pytest.fixture
def ade(tmp_path) -> Path:
    return masked_images(tmp_path / "ade")


def test_views_and_their_labels_move_together(ade):
    """Every class has a colour: after all transforms the brighter pixels still belong to the higher class."""
    images = segmentation_images(flags(ade), train=True)
    transform = TrainTransform((48, 64), scale=(64, 48))
    random.seed(0)
    for index in range(len(images)):
        pixels, labels = transform(*images[index])
        assert pixels.shape == (3, 48, 64) and labels.shape == (48, 64) and labels.dtype == torch.uint8
        means = [pixels.mean(0)[labels == k].mean() for k in labels.unique() if k != 255 and (labels == k).sum() > 50]
        assert means == sorted(means)
        padding = (pixels == 0).all(0)
        assert (labels[padding] == 255).all()
    image, labels = images[0]
    (once, twice), same = EvalTransform((64, 48), (1.0, 1.5))(image, labels)
    assert once.shape == (3, 48, 62) and twice.shape == (3, 72, 94) and same.shape == labels.shape
    white = normalize(torch.full((3, 1, 1), 255, dtype=torch.uint8)).flatten()
    assert_close(white, (255 - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375]), 1e-6, 0)


def test_label_zero(ade, tmp_path):
    assert np.unique(segmentation_images(flags(ade), True)[0][1])[-1] == 255
    kept = segmentation_images(flags(ade, reduce_zero_label=False, nb_classes=None), True)
    with pytest.raises(ValueError, match="has the label 3, expected 0 to 2 or 255"):
        [kept[i] for i in range(len(kept))]
    own = masked_images(tmp_path / "own", layout="own")
    (own / "classes.txt").write_text("none\nsky\nwall\nfloor\n")
    args = flags(own)
    assert args.nb_classes == 4 and set(np.unique(segmentation_images(args, False)[0][1])) <= {0, 1, 2, 3}


def test_cityscapes_and_voc(ade, tmp_path):
    city = tmp_path / "city"
    for folder, ending in (("leftImg8bit", "_leftImg8bit.png"), ("gtFine", "_gtFine_labelTrainIds.png")):
        (city / folder / "train" / "ulm").mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("L", (8, 6), 2).save(city / folder / "train" / "ulm" / (name + ending))
    Image.new("L", (8, 6)).save(city / "gtFine" / "train" / "ulm" / "a_gtFine_instanceIds.png")
    images = segmentation_images(flags(city, nb_classes=19), True)
    assert len(images) == 2 and (images[1][1] == 2).all()
    voc = tmp_path / "voc"
    shutil.copytree(ade / "images" / "training", voc / "JPEGImages")
    shutil.copytree(ade / "annotations" / "training", voc / "SegmentationClass")
    for path in (voc / "SegmentationClass").iterdir():
        mask = Image.open(path)
        mask.putpalette([k * 7 % 256 for k in range(768)])
        assert mask.mode == "P"
        mask.save(path)
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("0\n4\n")
    images = segmentation_images(flags(voc, nb_classes=21), True)
    assert len(images) == 2 and set(np.unique(images[1][1])) == {0, 1, 2, 3}
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("0\nlost\n")
    with pytest.raises(UserError, match="lost is not in"):
        segmentation_images(flags(voc, nb_classes=21), False)


def test_mistakes_are_named(ade, tmp_path):
    assert flags(ade).class_names == list(NAMES)
    with pytest.raises(UserError, match="--nb_classes 7: .* names 3 classes"):
        flags(ade, nb_classes=7)
    with pytest.raises(UserError, match="nowhere: expected its folders images/training and annotations/training, or"):
        segmentation_images(flags(tmp_path / "nowhere"), True)
    mask = ade / "annotations" / "training" / "2.png"
    broken = [
        (lambda: Image.new("L", (9, 9)).save(mask), r"has 9 x 9 pixels, the image \(48, 48\)"),
        (lambda: Image.new("L", (48, 48), 9).save(mask), "has the label 9, expected 1 to 3, 0 or 255"),
        (lambda: Image.new("RGB", (48, 48)).save(mask), "is RGB, expected one channel of class indices"),
        (lambda: mask.write_bytes(b"no image"), "cannot identify"),
    ]
    for damage, words in broken:
        damage()
        images = segmentation_images(flags(ade), True)
        loader = datasets.Loader(images, TrainTransform((16, 16)), 7, CPU, num_workers=0, joint=True)
        with pytest.raises(UserError, match=f"2.jpg: unreadable image .*{words}"):
            list(loader.batches())
        loader = datasets.Loader(images, TrainTransform((16, 16)), 7, CPU, num_workers=0, joint=True, bad_images="skip")
        assert next(loader.batches())[1].shape == (7, 16, 16) and len(loader.bad) == 1
    mask.unlink()
    with pytest.raises(UserError, match=r"2.jpg: has no mask .*2.png \(1 of 7 such\)"):
        segmentation_images(flags(ade), True)
    shutil.rmtree(ade / "images" / "training")
    (ade / "images" / "training").mkdir()
    with pytest.raises(UserError, match="has no images"):
        segmentation_images(flags(ade), True)


def iterations(root: Path, iters: int, interval: int, workers: int = 0) -> IterationLoader:
    images = segmentation_images(flags(root), True)
    passes = datasets.Loader(images, TrainTransform((16, 16)), 2, CPU, num_workers=workers, joint=True)
    return IterationLoader(passes, iters, interval)


def test_passes_follow_one_another_whatever_the_intervals(ade):
    """7 images make 3 batches: 8 updates are two passes and two batches."""

    def run(loader: IterationLoader, start: int = 0) -> list[Any]:
        first, rest = divmod(start, len(loader))
        batches = [loader.batches(i, rest if i == first else 0) for i in range(first, loader.intervals)]
        return [images for interval in batches for images, _ in interval]

    whole = run(iterations(ade, 8, 100))
    assert len(whole) == 8 and not torch.equal(whole[0], whole[3])
    for other in (iterations(ade, 8, 5), iterations(ade, 8, 1, workers=1)):
        assert all(torch.equal(a, b) for a, b in zip(run(other), whole, strict=True))
    resumed = run(iterations(ade, 8, 5), start=4)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole[4:], strict=True))


def test_positions_inside_an_interval(ade, capsys):
    loader = iterations(ade, 8, 5)
    assert (len(loader), loader.intervals, loader.total) == (5, 2, 8)
    assert loader.start(Position(1, 4, [{"loss": [1.0, 2.0]}])) == (2, {"loss": [1.0, 2.0]})
    assert loader.start(Position(1, 5, [{"loss": [1.0, 2.0]}])) == (2, {})
    assert "no whole number of updates" in capsys.readouterr().out
    for flag in ("iters", "interval"):
        with pytest.raises(UserError, match="expected at least 1"):
            iterations(ade, **{"iters": 8, "interval": 5, flag: 0})


def test_the_last_interval_is_shorter(ade, tmp_path):
    """The log of the last interval counts the updates that remain; TensorBoard's axis counts all."""
    loader = iterations(ade, 8, 5)
    args = argparse.Namespace(epochs=loader.intervals)
    checkpoint = Checkpoint(str(tmp_path / "run"), args, torch.nn.Linear(1, 1))
    seen: list[tuple[int, int, int]] = []
    for _, log in checkpoint.epochs(loader, Position(), {"loss": "loss"}, total=loader.total):
        assert isinstance(log, EpochLog)
        log.run_log.scalars = lambda values, step: seen.append(step)  # type: ignore[method-assign]
        for step, _ in log.steps(range(log.total)):
            log.update(step, loss=1.0)
        assert log.later == {5: 3, 3: 0}[log.total]
    assert seen == list(range(8))
