"""Transfer: repeated augmentation against the authors' numbers, the data sets, and the script."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100

from common import distributed
from tests.support.helpers import assert_close, golden_files, load_golden
from tests.support.runs import assert_same, mistake, run_main, spoil
from tests.support.udi_weights import NANO, pretrained
from udi import data, main_transfer
from udi.models_eval import EvaluationViT


@golden_files("udi", "semi_transfer")
def test_repeated_augmentation(path):
    ref = load_golden(path)
    for i, (images, replicas, rank, epoch) in enumerate(ref.meta["ra"]):
        for kind in (data.RASampler, data.RepeatSampler):
            sampler = kind(range(images), replicas, rank)
            sampler.set_epoch(epoch)
            found = list(sampler)
            assert len(sampler) == len(found)
            ref.equal(f"out/ra/{i}", [x[0] if kind is data.RepeatSampler else x for x in found])


def test_copies_are_numbered():
    """Over all processes an image has copies 0, 1 and 2, so that each is augmented in its own way."""
    pairs: list[Any] = []
    for rank in range(2):
        sampler = data.RepeatSampler(range(300), 2, rank)  # type: ignore[arg-type]
        pairs += list(sampler)
    copies: dict[int, set[int]] = {}
    for index, copy in pairs:
        assert copy not in copies.setdefault(index, set())
        copies[index].add(copy)
    assert sum(len(found) == 3 for found in copies.values()) >= len(copies) - 1


# ---- data sets of a few images


def picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 24), (shade, 255 - shade, 0)).save(path)


def flowers(root: Path) -> str:
    for n in range(1, 13):
        picture(root / "jpg" / f"image_{n:05d}.jpg", 20 * n)
    savemat(root / "imagelabels.mat", {"labels": np.array([[1, 2, 3, 102] * 3], np.uint8)})
    parts = {"trnid": [[1, 2, 3, 4]], "valid": [[8, 7, 6, 5]], "tstid": [[9, 10, 11, 12]]}
    savemat(root / "setid.mat", {name: np.array(ids, np.uint16) for name, ids in parts.items()})
    return str(root)


def cars(root: Path) -> str:
    names = ("relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test")
    rows = []
    for n in range(1, 13):
        picture(root / "car_ims" / f"{n:06d}.jpg", 20 * n)
        rows.append((f"car_ims/{n:06d}.jpg", 1, 1, 10, 7 * n, 196 if n == 1 else n % 4 + 1, n > 8))
    table = np.empty((1, len(rows)), dtype=[(name, object) for name in names])
    table[0, :] = rows
    savemat(root / "cars_annos.mat", {"annotations": table})
    return str(root)


SPECIES = [{"id": i, "name": f"species {i}", "genus": f"genus {i // 2}", "kingdom": "Animalia"} for i in range(4)]


def inat(root: Path, year: int = 2018) -> str:
    (root / "categories.json").write_text(json.dumps(SPECIES))
    for split, order in (("train", (3, 1, 0, 2) * 2), ("val", (0, 1, 2, 3))):
        content: dict[str, list] = {"images": [], "annotations": []}
        for n, category in enumerate(order):
            name = f"train_val{year}/Aves/{category}/{split}{n}.jpg"
            picture(root / name, 60 * category)
            content["images"].append({"id": n, "file_name": name})
            content["annotations"].append({"id": n, "image_id": n, "category_id": category})
        (root / f"{split}{year}.json").write_text(json.dumps(content))
    return str(root)


def loaded(name: str, root: str, *further: str) -> tuple[Any, Any]:
    args = main_transfer.get_args_parser().parse_args(["--data_set", name, "--data_path", root, *further])
    train, val = (data.transfer_set(args, split) for split in (True, False))
    assert train[0][0].size == (20, 24)
    return train, val


def test_flowers(tmp_path):
    """The training and the validation part, in this order; labels from 0. torchvision's folder is found, too."""
    (tmp_path / "flowers-102").mkdir()
    for root in (flowers(tmp_path), flowers(tmp_path / "flowers-102")):
        train, val = loaded("flowers", root)
        assert [Path(path).stem[-2:] for path, _ in train.samples] == ["01", "02", "03", "04", "08", "07", "06", "05"]
        assert [label for _, label in train.samples] == [0, 1, 2, 101, 101, 2, 1, 0]
        assert [label for _, label in val.samples] == [0, 1, 2, 101]
        assert len(train.classes) == 102
        assert train.samples[0][0].startswith(str(tmp_path / "flowers-102"))


def test_cars(tmp_path):
    train, val = loaded("Cars", cars(tmp_path))
    assert [label for _, label in train.samples] == [195, 2, 3, 0, 1, 2, 3, 0]
    assert [label for _, label in val.samples] == [1, 2, 3, 0]
    assert len(train.classes) == len(val.classes) == 196


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inat(name, year, tmp_path):
    """Classes are numbered by their first annotation of the training part, in both parts."""
    root = inat(tmp_path, year)
    train, val = loaded(name, root)
    assert train.classes == ["species 3", "species 1", "species 0", "species 2"]
    assert [label for _, label in train.samples] == [0, 1, 2, 3] * 2
    assert [label for _, label in val.samples] == [2, 1, 3, 0]
    train, val = loaded(name, root, "--inat-category", "genus")
    assert train.classes == ["genus 1", "genus 0"]
    assert [label for _, label in val.samples] == [1, 1, 0, 0]


@pytest.mark.parametrize(("name", "kind"), [("CIFAR10", CIFAR10), ("CIFAR", CIFAR100), ("CIFAR100", CIFAR100)])
def test_cifar_is_torchvisions(name, kind, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(kind, "__init__", lambda self, root, train, **_: calls.append((str(root), train)))
    args = main_transfer.get_args_parser().parse_args(["--data_set", name, "--data_path", str(tmp_path)])
    assert type(data.transfer_set(args, True)) is kind
    data.transfer_set(args, False)
    assert calls == [(str(tmp_path), True), (str(tmp_path), False)]


@pytest.mark.parametrize("name", ["IMNET", "image_folder"])
def test_class_folders(name, digits):
    args = main_transfer.get_args_parser().parse_args(["--data_set", name, "--data_path", digits])
    assert (len(data.transfer_set(args, True)), len(data.transfer_set(args, False))) == (48, 20)


# ---- the script

SMALL = [*NANO, "--input-size", "32", "--num_workers", "0", "--batch-size", "4", "--epochs", "2", "--device", "cpu"]
SMALL += ["--warmup-epochs", "1", "--warmup-lr", "1e-3", "--lr", "0.5"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return pretrained(tmp_path_factory.mktemp("transfer"))


@pytest.mark.parametrize(
    ("name", "make", "classes"),
    [("flowers", flowers, 102), pytest.param("Cars", cars, 196, marks=pytest.mark.slow), ("INAT", inat, 4)],
)
def test_runs(name, make, classes, tmp_path):
    (tmp_path / "images").mkdir()
    path = pretrained(tmp_path / "weights")
    flags = [*SMALL, "--data_set", name, "--data_path", make(tmp_path / "images"), "--pretrained_weights", path]
    run_main(main_transfer, *flags)
    folder = tmp_path / "weights" / "transfer_learning" / name / "adamw_b_4_lr_5.00e-01_wd_5.00e-02_dr-0.10-ep_2"
    newest, before, best = (
        distributed.load(str(folder / f"{file}.pth")) for file in ("checkpoint_bak", "checkpoint", "checkpoint_best")
    )
    assert newest["epoch"] == 1
    assert before["epoch"] < newest["epoch"]
    assert {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "args"} <= set(newest)
    assert newest["model"]["head.weight"].shape == best["model"]["head.weight"].shape == (classes, 96)
    assert len((folder / "log.txt").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("stop", [True, False], ids=["signal", "nan"])
def test_stop_inside_an_epoch_loses_nothing(digits, weights, tmp_path, monkeypatch, stop):
    flags = [*SMALL, "--data_set", "IMNET", "--data_path", digits, "--pretrained_weights", weights]
    flags += ["--model-ema-decay", "0.5", "--avgpool_patchtokens", "1", "--clip-grad", "1"]
    run_main(main_transfer, *flags, "--output_dir", str(tmp_path / "whole"))
    broken = [*flags, "--output_dir", str(tmp_path / "broken")]
    with monkeypatch.context() as patch:
        spoil(patch, EvaluationViT, 15, stop)
        with pytest.raises(SystemExit) as end:
            run_main(main_transfer, *broken)
    assert end.value.code == (128 + signal.SIGTERM if stop else 1)
    resume = [] if stop else ["--resume", str(tmp_path / "broken" / "checkpoint_nonfinite.pth")]
    run_main(main_transfer, *broken, *resume)
    assert_same(tmp_path / "whole", tmp_path / "broken", latest="checkpoint_bak.pth")


def test_average_follows_the_weights(digits, weights, tmp_path):
    """It is saved; with a decay of 0 it is the model, with 1 the model at the start."""
    flags = [*SMALL, "--data_set", "IMNET", "--data_path", digits, "--pretrained_weights", weights, "--epochs", "1"]
    flags += ["--no-repeated-aug", "--model-ema-force-cpu"]
    for decay in ("0", "1"):
        run_main(main_transfer, *flags, "--output_dir", str(tmp_path / decay), "--model-ema-decay", decay)
    moved, still = (distributed.load(str(tmp_path / decay / "checkpoint_bak.pth")) for decay in ("0", "1"))
    start = torch.load(weights, weights_only=True)["teacher"]
    for name, value in moved["model"].items():
        assert_close(moved["model_ema"][name], value, rtol=0, atol=1e-7, what=name)
        assert torch.equal(value, still["model"][name]), "the average changes no training"
        if not name.startswith("head."):
            assert_close(still["model_ema"][name], start[f"backbone.backbone.{name}"], rtol=0, atol=1e-7, what=name)


def test_checkpoint_that_is_not_the_newest(digits, weights, tmp_path, capsys):
    """Without checkpoint_bak.pth a run goes on from checkpoint.pth."""
    flags = [*SMALL, "--data_set", "IMNET", "--data_path", digits, "--pretrained_weights", weights]
    flags += ["--output_dir", str(tmp_path)]
    run_main(main_transfer, *flags)
    whole = distributed.load(str(tmp_path / "checkpoint_bak.pth"))
    (tmp_path / "checkpoint_bak.pth").unlink()
    run_main(main_transfer, *flags)
    assert f"resumed {tmp_path / 'checkpoint.pth'}" in capsys.readouterr().out
    again = distributed.load(str(tmp_path / "checkpoint_bak.pth"))
    assert all(torch.equal(value, whole["model"][name]) for name, value in again["model"].items())


MISTAKES = [
    (["--data_path", "/nowhere"], "--data_path /nowhere: no such folder"),
    (["--data_set", "flowers"], "expected jpg/, imagelabels.mat and setid.mat (--download fetches them) there"),
    (["--data_set", "Cars"], "expected cars_annos.mat and the images that it names there"),
    (["--data_set", "INAT"], "expected train2018.json, val2018.json and categories.json there"),
    (["--data_set", "INAT19"], "expected train2019.json"),
    (["--data_set", "INAT", "--data_path", "INAT", "--inat-category", "order"], "categories.json there (KeyError"),
    (["--data_set", "flowers", "--data_path", "FLOWERS"], "image_00001.jpg, which is missing"),
    (["--distillation-type", "hard"], "--distillation-type hard: only none is supported"),
    (["--batch-size", "50"], "--batch_size 50: 48 training images do not fill one batch"),
    (["--sched", "nosuch"], "--sched nosuch: expected one of"),
    (["--class_tokens", "first", "--resume", "WEIGHTS"], "does not fit this run"),
    (["--accum_iter", "99"], "--accum_iter 99: an epoch has only"),
    (["--lr", "-1"], "--lr -1.0: expected 0 to"),
    (["--cutmix-minmax", "0.5"], "--cutmix_minmax 0.5: expected two shares"),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(flags, words, digits, weights, tmp_path, capsys):
    for name, make in (("inat", inat), ("flowers", flowers)):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    (tmp_path / "flowers" / "jpg" / "image_00001.jpg").unlink()
    torch.save({"model": {"head.weight": torch.zeros(1)}}, tmp_path / "odd.pth")
    places = {
        "INAT": str(tmp_path / "inat"),
        "FLOWERS": str(tmp_path / "flowers"),
        "WEIGHTS": str(tmp_path / "odd.pth"),
    }
    filled = [
        places.get(flag) or flag if previous in ("--data_path", "--resume") else flag
        for previous, flag in zip(["", *flags], flags, strict=False)
    ]
    own = [*SMALL, "--data_set", "IMNET", "--data_path", digits, "--pretrained_weights", weights]
    assert words in mistake(main_transfer, *own, "--output_dir", str(tmp_path / "out"), *filled, capsys=capsys)


@pytest.mark.slow
def test_two_processes(digits, weights, tmp_path, launch):
    flags = [*SMALL, "--data_set", "IMNET", "--data_path", digits, "--pretrained_weights", weights]
    launch(2, "udi/eval_transfer_learning/eval_transfer_learning.py", *flags, "--output_dir", str(tmp_path))
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2
