"""What goes wrong outside of this program ends in one line: odd images, lost loader processes, absent packages."""

import argparse
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common import datasets, distributed
from common.datasets import Loader
from common.distributed import UserError, command
from saim import main_pretrain
from tests.support.helpers import ROOT
from tests.support.runs import kept_signals, mistake

CPU = torch.device("cpu")


def picky(image: Any) -> torch.Tensor:
    if image.size[0] == 5:
        raise IndexError("five")
    return torch.zeros(3)


@pytest.fixture
def images(tmp_path) -> Path:
    for i in range(8):
        Image.new("RGB", (5 if i == 3 else 6, 4)).save(tmp_path / f"{i}.png")
    return tmp_path


def batches(images: Path, **kwargs) -> list:
    data = datasets.image_dataset(str(images), True, labelled=False)
    return list(Loader(data, kwargs.pop("transform", picky), 4, CPU, **{"num_workers": 0, **kwargs}).batches())


def test_an_error_inside_a_transform_names_the_image(images):
    before = torch.get_rng_state()
    with pytest.raises(
        UserError, match="/3.png: 5 x 4 pixels, which a transform cannot take .five.; --bad_images skip"
    ):
        batches(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(batches(images, bad_images="skip")) == 2


def test_images_too_thin_to_be_resized_are_named(images):
    Image.new("RGB", (65000, 1)).save(images / "3.png")
    with pytest.raises(UserError, match="/3.png: unreadable image .65000 x 1 pixels are too thin"):
        batches(images, transform=datasets.eval_transform(224))
    assert len(batches(images, transform=datasets.eval_transform(8), bad_images="skip")) == 2


class Fatal:
    """Kills the loader process that reads the image of 5 pixels."""

    def __call__(self, image: Any) -> torch.Tensor:
        if image.size[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3)


@pytest.mark.parametrize(
    "kwargs", [{}, *(pytest.param(x, marks=pytest.mark.slow) for x in ({"train": False}, {"bad_images": "skip"}))]
)
def test_a_lost_loader_process_is_one_line(images, kwargs):
    with (
        kept_signals(),
        pytest.raises(UserError, match=r"DataLoader worker .* exited unexpectedly: memory or /dev/shm"),
    ):
        batches(images, transform=Fatal(), num_workers=1, **kwargs)


def test_a_full_shared_memory_is_one_line(images):
    def full(_samples: list) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    with pytest.raises(UserError, match=r"^unable to allocate shared memory.*: memory or /dev/shm is full") as error:
        batches(images, collate=full)
    assert "--bad_images" not in str(error.value)


def test_the_position_is_saved_when_a_loader_process_is_lost(digits, tmp_path, monkeypatch, capsys):
    """In the second of two updates; the run goes on from the first."""
    read = Loader._read

    def lose(self):
        for step, batch in enumerate(read(self)):
            yield batch if step < 1 else (None, None, ["lost"])

    monkeypatch.setattr(Loader, "_read", lose)
    flags = ["--model", "saim_nano", "--query_depth", "2", "--input_size", "16", "--patch_size", "8", "--device", "cpu"]
    flags += ["--num_workers", "0", "--batch_size", "24", "--data_path", digits, "--output_dir", str(tmp_path)]
    assert mistake(main_pretrain, *flags, capsys=capsys).endswith(": lost\n")
    assert distributed.load(str(tmp_path / "checkpoint.pth"))["images"] == 24


def test_training_goes_on_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    log = distributed.RunLog(str(tmp_path))
    log.scalars({"loss": 1.0}, 0)
    log.epoch({"loss": 1.0})
    assert "WARNING: TensorBoard cannot be imported" in capsys.readouterr().out
    assert (tmp_path / "log.txt").exists()


def test_files_import_where_linux_modules_are_missing(monkeypatch):
    """As on Windows, which has neither `resource` nor SIGUSR1."""
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(signal, "SIGUSR1")
    names = runpy.run_path(str(ROOT / "common" / "distributed" / "exits.py"))
    handlers = {s: signal.getsignal(s) for s in names["SIGNALS"]}
    names["catch_signals"]()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    runpy.run_path(str(ROOT / "common" / "datasets" / "loader.py"))
    metrics = runpy.run_path(str(ROOT / "common" / "distributed" / "metrics.py"))
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert metrics["resident_bytes"]() == 0


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])

    def main(_args) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        command.run(main, argparse.Namespace())
    assert (end.value.code, capsys.readouterr().err) == (130, "quickstart.py: stopped by Ctrl-C\n")
