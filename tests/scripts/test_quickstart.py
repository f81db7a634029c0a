"""The quickstart: which folders it takes for what, its commands and tables; its steps are programs with own tests."""

import argparse
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.distributed import UserError
from scripts.tools import extract_features, neighbours, probe, quickstart
from scripts.tools.encoders.load import METHODS
from tests.support.helpers import ROOT
from tests.support.runs import arguments, mistake, run_main

METHOD = pytest.mark.parametrize("method", METHODS)


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    with pytest.raises(UserError, match="^--data_path /nowhere: no such folder$"):
        quickstart.main(argparse.Namespace(data_path="/nowhere", method="saim"))


@pytest.mark.slow
def test_a_missing_folder_is_one_line():
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "scripts/quickstart.sh", "--data_path", "/nowhere"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr == "quickstart.py: --data_path /nowhere: no such folder\n"


def test_a_stopped_quickstart_stops_its_commands():
    before = signal.getsignal(signal.SIGTERM)
    lane = quickstart.Lane([quickstart.Step([sys.executable, "-c", "import time; time.sleep(60)"])])

    def stop() -> None:
        while lane.process is None:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(UserError, match="stopped; the same command goes on from here"):
        quickstart.together(lane)
    assert lane.process is not None and lane.process.returncode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


# ---- folders


def photos(root: Path, *names: str, side: int = 40) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side + 8, 3), np.uint8)).save(root / name)
    return root


# ---- commands


def parsed(step: quickstart.Step) -> None:
    script, flags = step.argv[1], step.argv[2:]
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    arguments(module, *flags)


@METHOD
@pytest.mark.parametrize(("number", "side"), [(5, 96), (1437, 8), (2000, 96)])
def test_every_command_is_understood(method, number, side, tmp_path):
    data = photos(tmp_path / "data", *(f"{s}/{c}/{i}.jpg" for s in ("train", "val") for c in "ab" for i in "01"))
    images = quickstart.Images(data, tmp_path / "few", number, side, classes=2, per_class=2)
    plan = quickstart.Plan(method, "laptop", images, tmp_path / "out")
    steps = [*plan.pretrain(), *plan.supervised("supervised", ""), *plan.supervised("finetune", plan.encoder)]
    for step in [*steps, *plan.features(), plan.pixels(), *plan.pictures(), plan.curves("pretrain")]:
        parsed(step)


@METHOD
def test_small_images_have_64_patches(method):
    images = quickstart.Images(Path("data"), None, 1437, 8, classes=10)
    settings = quickstart.settings_of(method, "laptop", "pretrain", images, 1437, 20_000)
    size = int(settings.get("input_size") or settings["global_size"])
    assert (size, settings.get("patch_size")) == ((64, None) if method == "a2mim" else (16, "2"))
    assert (settings["epochs"], settings["batch_size"], settings["warmup_epochs"]) == ("14", "32", "1")


def test_few_images__a_smaller_batch_and_rate():
    images = quickstart.Images(Path("data"), None, 5, 96, classes=0)
    settings = quickstart.settings_of("saim", "laptop", "pretrain", images, 5, 20_000)
    assert (settings["batch_size"], settings["epochs"], settings["lr"]) == ("2", "300", "0.00071")


# ---- its tools


@pytest.fixture
def features(tmp_path) -> str:
    """A file of four images' features: two pairs of neighbours."""
    root = photos(tmp_path / "data", "a/0.png", "a/1.png", "b/2.png", "b/3.png")
    rows = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], np.float32)
    targets = np.array([[0, 0], [1, 0], [2, 1], [3, 1]])
    names = ["a/0.png", "a/1.png", "b/2.png", "b/3.png"]
    about = {"data_path": str(root), "classes": ["a", "b"]}
    extract_features.write(tmp_path / "features.npy", rows, targets, about, names)
    return str(tmp_path / "features.npy")


def test_nearest__not_the_image_itself(features):
    rows, cosines = neighbours.nearest(extract_features.read(features)[0], [0, 3], 2)
    np.testing.assert_array_equal(rows, [[1, 3], [2, 1]])
    np.testing.assert_allclose(cosines[:, 0], 0.9939, atol=1e-4)


def test_neighbours__a_picture(features, tmp_path, capsys):
    run_main(neighbours, features, "--out", str(tmp_path / "grid.png"), "--queries", "3")
    assert "3 images and their 3 nearest of 4" in capsys.readouterr().out
    assert min(Image.open(tmp_path / "grid.png").size) > 300


def test_neighbours__raises_where_the_images_are_gone(features, tmp_path, capsys):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert "no such file; the images of" in mistake(neighbours, features, capsys=capsys)


def test_probe__of_features_and_of_few_of_them(features, tmp_path, capsys):
    few = photos(tmp_path / "few", "train/a/0.png", "train/b/2.png")
    run_main(probe, "--features", features, features, "--few", str(few), "--out", str(tmp_path / "p.json"))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "4 training images: nearest 100.0 %, logistic 100.0 % of 4 validation images"
    assert shown[1].startswith("2 training images: ")
    photos(tmp_path / "few", "train/a/other.png")
    error = mistake(probe, "--features", features, features, "--few", str(few), capsys=capsys)
    assert "1 of its images are none of the training images" in error


def test_probe__pixels(tmp_path, capsys):
    for i, name in enumerate(
        f"{split}/{c}/{i}.png" for split in ("train", "val") for i in "012" for c in ("dark", "light")
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "white" if i % 2 else "black").save(tmp_path / name)
    run_main(probe, "--pixels", "8", "--data_path", str(tmp_path))
    assert capsys.readouterr().out.startswith("6 training images: nearest 100.0 %, logistic 100.0 % of 6 validation")
