"""Features of images in files: what is written, by one and by several processes, and users' mistakes."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.datasets import ImageFolder

from saim.models_vit import MODELS
from scripts.tools import extract_features
from scripts.tools.encoders import load as encoders
from scripts.tools.extract_features import read
from tests.support import processes
from tests.support.runs import mistake, run_main

SMALL = ["--num_workers", "0", "--batch_size", "7", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A fine-tuned network for 16 pixels with ten classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("features") / "checkpoint.pth"
    torch.save({"model": MODELS["vit_nano_patch16"](img_size=16, patch_size=8, num_classes=10).state_dict()}, path)
    return str(path)


def extract(*flags: Any) -> None:
    run_main(extract_features, *map(str, flags), *SMALL)


@pytest.fixture(scope="module")
def expected(checkpoint, digits) -> np.ndarray:
    """Features of the validation images, one by one."""
    backbone = encoders.load_backbone("saim", checkpoint)
    transform = encoders.eval_transform(backbone)
    images = ImageFolder(f"{digits}/val", transform)
    with torch.no_grad():
        return torch.cat([backbone(image[None]) for image, _ in images]).numpy()


# ---- what is written


def test_files(checkpoint, digits, expected, tmp_path, monkeypatch):
    """The three kinds of --out hold the same; what they replace is gone, and nothing else is left."""
    monkeypatch.chdir(tmp_path)
    flags = ["saim", checkpoint, "--data_path", digits, "--split", "val", "--dtype", "float32"]
    for out, file in (("a.npy", "a.npy"), ("b.safetensors", "b.safetensors"), ("c/", "c/val.npy")):
        extract(*flags, "--out", out)
        features, labels, about = read(file)
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6)
        assert labels.tolist() == sorted(i % 10 for i in range(48, 68))
        assert about["names"] == [f"val/{i % 10}/{i:04d}.png" for i in sorted(range(48, 68), key=lambda i: i % 10)]
        assert about["classes"] == [str(i) for i in range(10)]
        assert about["skipped"] == []
        assert (about["method"], about["model_name"], about["input_size"]) == ("saim", "vit_nano_patch16", 16)
    extract(*flags[:-2], "--out", "a.npy")
    features, *_ = read("a.npy")
    assert features.dtype == np.float16
    np.testing.assert_array_equal(features, read("c/val.npy")[0].astype(np.float16))
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    one = ["a.json", "a.labels.npy", "a.npy", "b.safetensors", "c/val.json", "c/val.labels.npy", "c/val.npy"]
    assert written == one


def test_several_processes_write_the_same(checkpoint, digits, tmp_path):
    """48 images in batches of 7: every process ends with another incomplete batch."""
    flags = ["saim", checkpoint, "--data_path", digits, "--dtype", "float32"]
    extract(*flags, "--out", tmp_path / "1.npy")
    log, script = (
        tmp_path / "log",
        ["scripts/tools/extract_features.py", *flags, *SMALL, "--out", str(tmp_path / "2.npy")],
    )
    assert processes.launch(log, *script, processes=2) == [0, 0], log.read_text()
    for ending in (".npy", ".labels.npy", ".json"):
        assert (tmp_path / f"1{ending}").read_bytes() == (tmp_path / f"2{ending}").read_bytes()


def test_images_without_class_folders(checkpoint, digits, expected, tmp_path, capsys):
    folder = tmp_path / "flat"
    folder.mkdir()
    for path in Path(digits, "val").rglob("*.png"):
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")
    extract(
        "saim", checkpoint, "--data_path", folder, "--split", "val", "--out", tmp_path / "a.npy", "--dtype", "float32"
    )
    assert f"{folder} has no folder val/: all 20 images below it are read" in capsys.readouterr().out
    features, labels, about = read(str(tmp_path / "a.npy"))
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6)
    assert set(labels.tolist()) == {-1}
    assert about["names"][0] == "0-0050.png"
    assert about["classes"] == []


@pytest.mark.parametrize("kind", ["damaged", "empty", "text"])
def test_unreadable_images_stop_or_are_left_out(kind, checkpoint, digits, expected, tmp_path, capsys):
    data = Path(shutil.copytree(digits, tmp_path / "data"))
    bad = data / "val" / "1" / "0051.png"
    content = {"damaged": bad.read_bytes()[:60], "empty": b"", "text": b"no image"}[kind]
    bad.write_bytes(content)
    flags = ["saim", checkpoint, "--data_path", str(data), "--split", "val", "--out", str(tmp_path / "a.npy")]
    flags += [*SMALL, "--dtype", "float32"]
    error = mistake(extract_features, *flags, capsys=capsys)
    assert f"{bad}: unreadable image (" in error
    assert [p.name for p in tmp_path.iterdir()] == ["data"], "nothing is left behind"
    run_main(extract_features, *flags, "--bad_images", "skip")
    features, labels, about = read(str(tmp_path / "a.npy"))
    np.testing.assert_allclose(features, np.delete(expected, 2, axis=0), rtol=0, atol=1e-6)
    assert len(labels) == len(about["names"]) == 19
    assert "val/1/0051.png" not in about["names"]
    assert [line.split(": ")[0] for line in about["skipped"]] == [str(bad)]


def test_timm_data_sets(checkpoint, digits, tmp_path, monkeypatch):
    class Reader:
        def __init__(self, images):
            self.images = images

        def __getitem__(self, index):
            path, label = self.images.samples[index]
            return open(path, "rb"), label

    images: Any = ImageFolder(f"{digits}/val")
    indexed: Any = type("Indexed", (), {"reader": Reader(images), "__len__": lambda self: len(images)})()
    monkeypatch.setattr(extract_features.datasets, "image_dataset", lambda *_, **__: indexed)
    extract("saim", checkpoint, "--dataset", "hfds/x", "--out", tmp_path / "a.npy")
    features, labels, about = read(str(tmp_path / "a.npy"))
    assert about["names"] == [str(i) for i in range(20)]
    assert labels.tolist() == images.targets
    assert np.isfinite(features).all()


def test_tar_files_are_read_once_in_order(checkpoint, digits, expected, tmp_path):
    """Also those of a training split: the folder's features, labels and names."""
    images = ImageFolder(f"{digits}/val")
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i, (path, label) in enumerate(images.samples):
            for name, content in ((f"{i:03}.png", Path(path).read_bytes()), (f"{i:03}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    flags = ["--dataset", "wds/x", "--split", "train", "--data_path", tmp_path]
    extract("saim", checkpoint, *flags, "--dtype", "float32", "--out", tmp_path / "a.npy")
    features, labels, about = read(str(tmp_path / "a.npy"))
    assert about["names"] == [f"train-0.tar/{i:03}.png" for i in range(20)]
    assert labels.tolist() == images.targets
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-6)


# ---- networks


def test_methods_and_folders(checkpoint, digits, expected, tmp_path):
    """A folder with a timm model gives the checkpoint's features, as `timm` and under the method's name."""
    form = encoders.timm_form("saim", encoders.load_backbone("saim", checkpoint))
    network: Any = timm.create_model(form.architecture, num_classes=form.num_classes, **form.model_args)
    network.load_state_dict(form.weights)
    folder = tmp_path / "exported"
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    about = {"input_size": [3, 16, 16], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "num_classes": 10}
    about |= {"crop_pct": 0.875, "interpolation": "bicubic"}
    config = {"architecture": form.architecture, "num_classes": 10, "model_args": form.model_args}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": about, "global_pool": "token"}))
    for method in ("timm", "saim"):
        extract(
            method, folder, "--data_path", digits, "--split", "val", "--out", tmp_path / "a.npy", "--dtype", "float32"
        )
        features, _, about = read(str(tmp_path / "a.npy"))
        np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
        assert about["pool"] == "token"


def test_random_weights_are_the_same_every_time(digits, tmp_path):
    for name in ("a", "b"):
        flags = ["--model", "vit_nano", "--input_size", "16", "--data_path", digits, "--out", tmp_path / f"{name}.npy"]
        extract("udi", "random", *flags)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_features_that_do_not_fit(checkpoint, digits, tmp_path, capsys):
    state = torch.load(checkpoint)
    for factor, words in ((1e6, "too large for float16; use --dtype float32"), (float("nan"), "are not finite")):
        state["model"]["norm.weight"] = torch.full((96,), factor)
        torch.save(state, tmp_path / "checkpoint.pth")
        flags = ["saim", str(tmp_path / "checkpoint.pth"), "--data_path", digits, "--out", str(tmp_path / "a.npy")]
        assert words in mistake(extract_features, *flags, *SMALL, capsys=capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


# ---- mistakes

MISTAKES = [
    (["saim", "/nowhere.pth"], "/nowhere.pth: no such checkpoint file"),
    (["saim", "random"], "--model: must be given for random weights"),
    (["saim", "random", "--model", "vit_nono"], "--model vit_nono: expected one of vit_base_patch16"),
    (["timm", "CHECKPOINT"], "has no config.json, expected a folder written by scripts/tools/export.py"),
    (["timm", "FOLDER", "--key", "x"], "--key: "),
    (["saim", "CHECKPOINT", "--input_size", "17"], "image size 17 is not a multiple of the patch size 8"),
    (["saim", "CHECKPOINT", "--input_size", "0"], "--input_size 0: expected at least 1"),
    (["saim", "CHECKPOINT", "--data_path", "/nowhere"], "--data_path /nowhere: no such folder"),
    (["saim", "CHECKPOINT", "--out", "a.pt"], "--out a.pt: expected FILE.npy, FILE.safetensors, or a folder"),
    (["saim", "CHECKPOINT", "--out", "/proc/x/a.npy"], "--out /proc/x/a.npy: cannot be written"),
    (["saim", "CHECKPOINT", "--device", "cuda:99"], "--device cuda:99: "),
    (["saim", "CHECKPOINT", "--dataset", "digits"], "--dataset digits: expected one of torch/..."),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(flags, words, checkpoint, digits, tmp_path, capsys):
    given = {"CHECKPOINT": checkpoint, "FOLDER": str(tmp_path)}
    flags = [given.get(word, word) for word in flags]
    own = ["--data_path", digits, "--out", str(tmp_path / "a.npy"), *SMALL]
    assert words in mistake(extract_features, *flags[:2], *own, *flags[2:], capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_damaged_checkpoints_and_other_networks_are_refused(checkpoint, digits, tmp_path, capsys):
    (tmp_path / "a.pth").write_bytes(Path(checkpoint).read_bytes()[:1000])
    Image.new("RGB", (8, 8)).save(tmp_path / "b.pth", "png")
    own = ["--data_path", digits, "--out", str(tmp_path / "a.npy"), *SMALL]
    for name in ("a.pth", "b.pth"):
        assert f"{name}: " in mistake(extract_features, "saim", str(tmp_path / name), *own, capsys=capsys)
    assert "A2MIM has no ViT of the file's width and blocks" in mistake(
        extract_features, "a2mim", checkpoint, *own, capsys=capsys
    )


def test_damaged_files_are_refused(checkpoint, digits, tmp_path):
    extract("saim", checkpoint, "--data_path", digits, "--split", "val", "--out", tmp_path / "a.npy")
    extract("saim", checkpoint, "--data_path", digits, "--split", "val", "--out", tmp_path / "a.safetensors")
    for name in ("a.npy", "a.safetensors", "a.json", "a.labels.npy"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(extract_features.UserError, match="expected a file of scripts/tools/extract_features.py"):
            read(str(tmp_path / (name if name.endswith("a.safetensors") else "a.npy")))
        (tmp_path / name).write_bytes(whole)
    np.save(tmp_path / "a.labels.npy", np.zeros(7, np.int64))
    with pytest.raises(extract_features.UserError, match=r"features \(20, 96\), labels \(7,\), 20 names"):
        read(str(tmp_path / "a.npy"))
