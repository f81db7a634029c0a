"""A classifier knows its classes by name: at an evaluation and when a run goes on, in every method."""

import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.runs import mistake, run_main

SMALL = "--input_size 16 --patch_size 4 --batch_size 4 --num_workers 0 --device cpu"
RATE = "--epochs 1 --warmup_epochs 0"
MAINS = {  # a main that trains with labels: its flags, and the file that it keeps
    "saim.main_finetune": (f"--model vit_nano_patch16 {SMALL} {RATE}", "checkpoint.pth"),
    "semaim.main_finetune": (f"--model vit_nano_patch16 {SMALL} {RATE}", "vit_nano_patch16.exp.temp.pth"),
    "cae.main_finetune": (f"--model cae_nano {SMALL} {RATE}", "checkpoint.pth"),
    "a2mim.main_finetune": (
        f"--backbone vit_nano {SMALL} {RATE} --val_resize 16 --val_crop 16",
        "latest.pth",
    ),
    "udi.main_finetune": (f"--model vit_nano {SMALL} {RATE}", "checkpoint.pth"),
}


CLASSES = {"ant": "0", "bee": "1", "cat": "2"}


@pytest.fixture
def images(digits, tmp_path) -> Path:
    """Three digits in class folders with names of their own; each of them alone; and with one that has another name."""

    def make(name: str, classes: dict[str, str]) -> None:
        for split in ("train", "val"):
            for new, old in classes.items():
                shutil.copytree(f"{digits}/{split}/{old}", tmp_path / name / split / new)

    make("all", CLASSES)
    make("renamed", {"dog" if new == "ant" else new: old for new, old in CLASSES.items()})
    for new, old in CLASSES.items():
        make(new, {new: old})
    return tmp_path


@pytest.mark.parametrize("name", MAINS)
def test_classes__are_matched_by_name(name, images, tmp_path, capsys):
    main = importlib.import_module(name)
    flags, kept = MAINS[name]
    words = [*flags.split(), "--nb_classes", "3", "--pretrained" if "a2mim" in name else "--finetune", ""]
    run = ["--output_dir", str(tmp_path / "run"), "--data_path"]
    run_main(main, *words, *run, str(images / "all"))
    file = tmp_path / "run" / kept
    assert torch.load(file, weights_only=True)["args"]["class_names"] == list(CLASSES)
    evaluation = [*words, "--eval", "--resume", str(file), "--data_path"]

    def right(folder: str) -> float:
        """Images of a folder that are classified right: each class has two."""
        capsys.readouterr()
        run_main(main, *evaluation, str(images / folder))
        share = float(re.findall(r"(?:test images: |top1\D*)([\d.]+)", capsys.readouterr().out)[-1]) / 100
        return share * sum(1 for _ in (images / folder / "val").glob("*/*"))

    assert right("all") == pytest.approx(sum(map(right, CLASSES)), abs=0.05)
    error = mistake(main, *evaluation, str(images / "renamed"), capsys=capsys)
    assert "class folder dog (1 of 3 such) is none of its 3 classes ant, bee, cat" in error
    error = mistake(main, *words, *run, str(images / "renamed"), "--epochs", "2", capsys=capsys)
    assert "its classes are not this run's, first " in error
    assert "start in another --output_dir" in error
