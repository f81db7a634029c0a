"""The comparison of encoders: its files and its sentence, fine-tuning by every method, mistakes."""

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saim.models_vit import MODELS
from scripts.tools import compare
from scripts.tools.encoders import load as encoders
from scripts.tools.images import read_pictures
from tests.support.runs import arguments, mistake, run_main
from tests.support.tiny_encoders import checkpoint

SMALL = ["--num_workers", "0", "--device", "cpu", "--seeds", "2"]  # there are two validation images per class


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Two encoders of 16 pixels, with other random weights each."""
    paths = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
        model = MODELS["vit_nano_patch16"](img_size=16, patch_size=8, num_classes=0)
        torch.save(
            {"model": model.state_dict(), "args": {"model": "saim_nano", "input_size": 16, "order": "random"}}, path
        )
        paths.append(str(path))
    return paths


@pytest.fixture
def sheets(monkeypatch) -> list[Path]:
    """Contact sheets that would have been drawn."""
    paths: list[Path] = []
    monkeypatch.setattr(compare, "draw_neighbours", lambda pictures, start, path: paths.append(path))
    return paths


def test_with_labels(files, digits, tmp_path, capsys, sheets):
    out = tmp_path / "out"
    flags = ["--scratch", "--labels_per_class", "1, 2,all,9", "--output_dir", str(out), *SMALL]
    run_main(compare, digits, f"before={files[0]}", f"again={files[0]}", *flags)
    shown = capsys.readouterr().out.splitlines()
    record = json.loads((out / "compare.json").read_text())
    assert "9 labels per class left out: the smallest class has 4 training images" in " ".join(shown)
    assert shown[-1] == record["conclusion"]
    assert record["conclusion"].startswith("Linear probe, mean over 1, 2, all labels per class: ")
    assert record["labels_per_class"] == {"1": 10, "2": 20, "all": 48}
    assert list(record["accuracy"]) == ["k-NN", "linear probe"]
    assert list(record["starts"]) == ["before", "again", "from scratch"]
    assert "no difference beyond chance between again and before (+0.0 ± " in record["conclusion"]
    for by_count in record["accuracy"].values():
        for by_start in by_count.values():
            assert all(len(values) == 2 and 0 <= min(values) <= max(values) <= 100 for values in by_start.values())
    page = (out / "compare.md").read_text()
    assert f"**{record['conclusion']}**" in page and "at least 9.0 times the differences' own deviation" in page
    assert page.count("\n| k-NN: ") == page.count("\n| linear probe: ") == 3
    assert min(Image.open(out / "compare.png").size) > 300
    assert sheets == [out / f"neighbours-{i}.png" for i in (1, 2, 3)]


def test_without_labels(files, digits, tmp_path, sheets):
    run_main(compare, f"{digits}/train/3", *files, "--output_dir", str(tmp_path), *SMALL)
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["conclusion"].startswith("Neighbour agreement, without labels: ")
    assert record["accuracy"] == {} and not (tmp_path / "compare.png").exists()
    assert list(record["starts"]) == [Path(file).parent.name for file in files]
    assert all(about["rankme"] >= 1 and 0 <= about["variance"] <= 1 for about in record["starts"].values())


def test_contact_sheet(tmp_path):
    for i in range(3):
        Image.new("RGB", (9, 9), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    backbone: Any = None
    start = compare.Start("x", "", "saim", False, backbone, [np.array([[1, 0], [0.9, 0.1], [0, 1]])])
    compare.draw_neighbours(read_pictures(str(tmp_path)), start, tmp_path / "sheet.png")
    assert min(Image.open(tmp_path / "sheet.png").size) > 300


# ---- images of five bands


@pytest.fixture(scope="module")
def bands(tmp_path_factory) -> tuple[str, str]:
    """A folder of .npy files in two classes, which the last band tells apart, and an encoder of five channels."""
    root, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 20_000, (12, 12, 5), np.uint16)
                image[..., 4] += 40_000 * (label == "b")
                np.save(root / split / label / f"{i}.npy", image)
    torch.manual_seed(5)
    model = MODELS["vit_nano_patch16"](img_size=16, patch_size=8, num_classes=0, in_chans=5)
    args = {
        "model": "saim_nano",
        "input_size": 16,
        "order": "random",
        "in_chans": 5,
        "mean": [0.2] * 5,
        "std": [0.1] * 5,
    }
    torch.save({"model": model.state_dict(), "args": args}, root / "checkpoint.pth")
    return str(root), str(root / "checkpoint.pth")


def test_five_bands(bands, tmp_path, sheets):
    flags = ["--scratch", "--labels_per_class", "all", "--output_dir", str(tmp_path), *SMALL]
    run_main(compare, bands[0], f"five={bands[1]}", *flags)
    found = json.loads((tmp_path / "compare.json").read_text())["accuracy"]["linear probe"]["all"]
    assert found == {"five": [100, 100], "from scratch": [100, 100]}  # no three bands tell them apart


def test_five_bands__fine_tuned_and_drawn(bands, tmp_path):
    pictures = read_pictures(bands[0], in_chans=5)
    start = compare.Start("x", bands[1], "saim", False, encoders.load_backbone("saim", bands[1]), [])
    rows, val = pictures.split(0, 2)
    assert 0 <= compare.finetune(start, pictures, rows, val, seed=0, seen=20) <= 100
    pictures = read_pictures(f"{bands[0]}/val/a", in_chans=5)
    start.features = [np.eye(2)]
    compare.draw_neighbours(pictures, start, tmp_path / "sheet.png")
    assert min(Image.open(tmp_path / "sheet.png").size) > 200


def test_files_of_other_channels__raises(bands, files, capsys):
    error = mistake(compare, *SMALL, bands[0], files[0], f"five={bands[1]}", capsys=capsys)
    assert "checkpoint.pth: takes 5 channels, " in error and "checkpoint.pth 3; both need the same images" in error


# ---- the test of pairs


def test_paired__students_t():
    a, b = np.array([71.0, 68, 75, 70]), np.array([65.0, 66, 70, 62])
    mean, error, p = compare.paired(a, b, least=0)
    assert (mean, error) == (5.25, pytest.approx(1.25))
    assert p == pytest.approx(0.02460, abs=1e-4)  # t = 4.2 with 3 degrees of freedom
    assert compare.paired(b, a, 0)[2] == p
    mean, error, p = compare.paired(a, a - 1, least=2)  # equal differences, but no finer than whole images
    assert (mean, error) == (1, 1) and p == pytest.approx(0.391, abs=1e-3)
    assert math.isnan(compare.paired(a[:1], b[:1], 0)[2])


def test_conclusion__says_when_it_is_chance():
    values = {"first": np.array([50.0, 52, 54]), "up": np.array([60.0, 62.5, 64]), "same": np.array([55.0, 47, 56])}
    sentence = compare.conclude("k-NN", "3 seeds", values, 0.1)
    assert "up is better than first (+10.2 ± 0.2 points, p = 0.0" in sentence
    assert "no difference beyond chance between same and first (+0.7 ± " in sentence
    assert "level 0.025" in sentence  # two comparisons share it
    assert "worse than up" in compare.conclude("k-NN", "3 seeds", {k: values[k] for k in ("up", "first")}, 0.1)
    assert "one seed cannot tell" in compare.conclude("k-NN", "1 seed", {k: v[:1] for k, v in values.items()}, 0.1)
    assert "nothing to compare" in compare.conclude("k-NN", "3 seeds", {"first": values["first"]}, 0.1)


# ---- fine-tuning


@pytest.mark.parametrize("method", ["saim", *(pytest.param(m, marks=pytest.mark.slow) for m in encoders.METHODS[1:])])
def test_finetune__by_the_methods_own_program(method, digits, tmp_path):
    pictures = read_pictures(digits)
    rows, val = pictures.split(0, 2)
    rows, path = pictures.labelled(rows, "1", 0), checkpoint(method, tmp_path)
    for fresh in (False, True):
        backbone = encoders.load_backbone(method, path, fresh=fresh)
        start = compare.Start("x", "" if fresh else path, method, fresh, backbone, [])
        accuracy = compare.finetune(start, pictures, rows, val, seed=0, seen=30)
        assert accuracy in range(0, 101, 10)  # of ten images


@pytest.mark.parametrize(
    ("method", "model"),
    [
        ("saim", "vit_nano_patch16"),
        ("semaim", "vit_nano_patch16"),
        ("cae", "cae_nano"),
        ("a2mim", "resnet_nano"),
        ("a2mim", "vit_nano"),
        ("udi", "vit_nano"),
    ],
)
def test_finetune_flags__are_understood(method, model, digits, tmp_path):
    backbone: Any = SimpleNamespace(model_name=model, input_size=32, patch_size=8, in_chans=None)
    start = compare.Start("x", "file", method, False, backbone, [])
    words = compare.finetune_flags(start, Path(digits), tmp_path, seed=3, images=20, epochs=2)
    args = vars(arguments(importlib.import_module(f"{method}.main_finetune"), *words))
    side = "train_size" if method == "a2mim" else "input_size"
    known = {side: 32, "epochs": 2, "seed": 3, "nb_classes": 10, "batch_size": 16}
    assert {name: args[name] for name in known} == known
    assert model in (args.get("model"), args.get("backbone"))
    assert "file" in (args.get("finetune"), args.get("pretrained"))


def test_mistakes(files, digits, tmp_path, capsys):
    def error(*words: str) -> str:
        return mistake(compare, *SMALL, "--output_dir", str(tmp_path / "out"), *words, capsys=capsys)

    assert "--labels_per_class 1,x: expected numbers or all" in error(digits, files[0], "--labels_per_class", "1,x")
    assert "the smallest class has 4 training images" in error(digits, files[0], "--labels_per_class", "99")
    assert "--seeds 0: expected" in error(digits, files[0], "--seeds", "0")
    assert "--seeds 3: a class has too few validation images" in error(digits, files[0], "--seeds", "3")
    assert "/nowhere: no such folder" in error("/nowhere", files[0])
    assert "of different names" in error(digits, files[0], files[0])
    assert "need a checkpoint of a method" in error(digits, str(tmp_path), "--scratch")
