"""Segmentation and detection on images of other than three 8-bit channels, and from encoders of three."""

import json
import signal
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import a2mim.main_detection
import a2mim.main_segmentation
import cae.main_detection
import cae.main_segmentation
import udi.main_detection
import udi.main_segmentation
from common import distributed
from scripts.tools import prepare_data
from tests.support.channels import checkpoint_of, weights_of
from tests.support.runs import mistake, run_main

SIDES = 40, 48
ANY = ["--num_workers", "0", "--device", "cpu", "--batch_size", "2", "--save_pictures", "1"]
MASKS = [*ANY, "--input_size", "32", "--iters", "2", "--eval_interval", "2", "--warmup_iters", "0"]
OBJECTS = "--short_sides 48 --long_side 64 --test_short_side 48 --crop_short_sides 40 --crop_range 32 40 --epochs 1"
BOXES = [*ANY, *OBJECTS.split(), "--warmup_iters", "0"]
RUNS: dict[tuple[str, str], tuple[ModuleType, list[str], str]] = {
    ("cae", "segmentation"): (cae.main_segmentation, [*MASKS, "--model", "upernet_cae_nano"], "--finetune"),
    ("a2mim", "segmentation"): (a2mim.main_segmentation, [*MASKS, "--model", "upernet_vit_nano"], "--pretrained"),
    ("udi", "segmentation"): (udi.main_segmentation, [*MASKS, "--arch", "vit_nano"], "--pretrained_weights"),
    ("cae", "detection"): (cae.main_detection, [*BOXES, "--model", "mask_rcnn_cae_nano"], "--finetune"),
    ("a2mim", "detection"): (a2mim.main_detection, [*BOXES, "--model", "mask_rcnn_resnet_nano"], "--pretrained"),
    ("udi", "detection"): (
        udi.main_detection,
        [*BOXES, "--arch", "vit_nano", "--heads", "narrow"],
        "--pretrained_weights",
    ),
}
CASES = [
    pytest.param(*case, chans, marks=() if (case, chans) == (("cae", "segmentation"), 5) else pytest.mark.slow)
    for case in RUNS
    for chans in (1, 5)
]


def images(root: Path, task: str, chans: int) -> str:
    """Images of 16 bits with a bright rectangle, which is class 1 of 2, or the object; masks or annotations beside."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        listed, found = [], []
        for i in range(count):
            values = rng.integers(0, 20_000, (chans, *SIDES)).astype(np.uint16)
            values[:, 8:24, 12:36] += 20_000
            mask = (values[0] >= 20_000).astype(np.uint8)
            mask[8:24, 12:36] = 1
            folder = root / ("images/" * (task == "segmentation") + split + "2017" * (task == "detection"))
            folder.mkdir(parents=True, exist_ok=True)
            if chans == 1:
                Image.fromarray(values[0]).save(folder / f"{i}.tif")
            else:
                np.save(folder / f"{i}.npy", values)
            (root / "masks" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
            name = f"{i}.{'tif' if chans == 1 else 'npy'}"
            listed.append({"id": i + 1, "file_name": name, "height": SIDES[0], "width": SIDES[1]})
            found.append({"id": i + 1, "image_id": i + 1, "category_id": 1, "bbox": [12, 8, 24, 16]})
        if task == "detection":
            (root / "annotations").mkdir(exist_ok=True)
            content = {"images": listed, "annotations": found, "categories": [{"id": 1, "name": "field"}]}
            (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    (root / "classes.txt").write_text("ground\nfield\n")
    return str(root)


def train(method: str, task: str, data: str, folder: Path, chans: int, *further: str) -> None:
    main, flags, _ = RUNS[method, task]
    place = ["--data_path", data, "--work_dir" if method == "a2mim" else "--output_dir", str(folder)]
    run_main(main, *flags, *place, "--in_chans", str(chans), *further)


@pytest.mark.parametrize(("method", "task", "chans"), CASES)
def test_main(method, task, chans, tmp_path, capsys):
    """Statistics are of the training images alone; a picture is drawn."""
    data = images(tmp_path / "data", task, chans)
    run_main(prepare_data, "stats", data, "--in_chans", str(chans))
    assert f"{chans} channels of 4 images" in capsys.readouterr().out
    train(method, task, data, tmp_path / "run", chans)
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 1
    assert distributed.flags_of(distributed.load(checkpoint_of(tmp_path / "run")))["in_chans"] == chans


@pytest.mark.slow
@pytest.mark.parametrize(("method", "task"), RUNS)
def test_a_run_that_is_broken_off_ends_as_a_whole_one(method, task, tmp_path):
    data, calls = images(tmp_path / "data", task, 5), []
    stats = ["--mean", *["0.2"] * 5, "--std", *["0.1"] * 5]

    def agree(fatal: bool) -> tuple[int, bool]:
        calls.append(fatal)
        return (signal.SIGTERM if len(calls) == 2 else 0), fatal

    train(method, task, data, tmp_path / "whole", 5, *stats)
    with mock.patch("common.datasets.loader.agree", agree), pytest.raises(SystemExit) as end:
        train(method, task, data, tmp_path / "broken", 5, *stats)
    assert end.value.code == 128 + signal.SIGTERM
    train(method, task, data, tmp_path / "broken", 5, *stats)
    whole, broken = weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken")
    assert [name for name, x in whole.items() if not torch.equal(x, broken[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize(("method", "task"), RUNS)
def test_encoders_of_other_channels(method, task, tmp_path, capsys):
    main, flags, takes = RUNS[method, task]
    start = images(tmp_path / "three", task, 3)
    train(method, task, start, tmp_path / "start", 3)
    stats = ["--mean", *["0.2"] * 5, "--std", *["0.1"] * 5]
    data = images(tmp_path / "five", task, 5)
    train(method, task, data, tmp_path / "run", 5, takes, checkpoint_of(tmp_path / "start"), *stats)
    assert "of 3 channels, adapted to 5" in capsys.readouterr().out
    five = checkpoint_of(tmp_path / "run")
    words = [*flags, "--data_path", start, "--in_chans", "3", takes, five]
    error = mistake(main, *words, "--output_dir", str(tmp_path / "no"), capsys=capsys)
    assert "(96, 5, 16, 16)" in error or "(64, 5, 7, 7)" in error or "[96, 5, 16, 16]" in error, error


def test_every_network_of_a_resnet_takes_them():
    with torch.device("meta"):
        for name in ("mask_rcnn_r50_c4", "mask_rcnn_resnet_nano"):
            assert a2mim.main_detection.MODELS[name](in_chans=5).backbone.conv1.in_channels == 5  # type: ignore


def test_mistakes(tmp_path, capsys):
    data = images(tmp_path / "data", "segmentation", 5)
    _, flags, _ = RUNS["cae", "segmentation"]
    words = [*flags, "--data_path", data, "--output_dir", str(tmp_path / "run")]
    error = mistake(cae.main_segmentation, *words, "--in_chans", "5", capsys=capsys)
    assert "--mean is missing: expected 5 numbers, one a channel" in error
    error = mistake(cae.main_segmentation, *words, "--in_chans", "3", capsys=capsys)
    assert ".npy: unreadable image (5 channels, expected --in_chans 3)" in error
    error = mistake(cae.main_segmentation, *words, capsys=capsys)
    assert "images/val: has no images, expected names that end in .jpg, " in error
