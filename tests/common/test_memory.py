"""The estimate of a step's memory: what it counts, what it leaves untouched, what it refuses."""

import importlib
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import saim.main_pretrain
from common.datasets import memory
from scripts.tools import shapes
from tests.support.dense import masked_images
from tests.support.runs import mistake, run_main

TINY = ["--model", "saim_nano", "--input_size", "16", "--patch_size", "8", "--batch_size", "16", "--epochs", "1"]
TINY += ["--num_workers", "0", "--device", "cpu", "--warmup_epochs", "0"]


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    random.random()
    np.random.rand()  # noqa: NPY002 - the global generator must stay as it is
    return model(batch + torch.rand_like(batch)).sum()


def test_saved_bytes__activations_without_weights():
    model = nn.Sequential(nn.Linear(8, 100), nn.Tanh(), nn.Linear(100, 4), nn.Tanh())
    assert memory.saved_bytes(model, loss_of, torch.randn(3, 8)) == 4 * 3 * (8 + 100 + 4)


def test_saved_bytes__nothing_else_changes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    other = nn.BatchNorm1d(2)
    batch = torch.randn(1, 3, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    numpy: Any = np.random.get_state()  # noqa: NPY002
    states = random.getstate(), numpy[1].tolist(), torch.get_rng_state()

    def loss(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        other(torch.randn(4, 2))  # moves its statistics, as a loss moves its centres
        return loss_of(net, batch)

    assert memory.saved_bytes(model, loss, batch, other) > 0
    assert model.training and int(other.num_batches_tracked) == 0  # type: ignore[arg-type]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert random.getstate() == states[0]
    numpy = np.random.get_state()  # noqa: NPY002
    assert numpy[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_run_says_what_it_needs_and_refuses_what_does_not_fit(digits, tmp_path, monkeypatch, capsys):
    command = [*TINY, "--data_path", digits, "--output_dir", str(tmp_path)]
    monkeypatch.setattr(memory, "available_bytes", lambda _: 6e6)
    error = mistake(saim.main_pretrain, *command, "--batch_size", "48", capsys=capsys)
    assert re.search(r"--batch_size 48: a step of 48 images takes about \S+ GB \(.*, --force goes on", error)
    assert not (tmp_path / "log.txt").exists()
    run_main(saim.main_pretrain, *command, "--batch_size", "48", "--force")
    assert "memory: a step of 48 images takes about" in capsys.readouterr().out


@pytest.mark.parametrize("free", [1.0, 1e12])
def test_a_batch_that_fits_is_named(digits, free, monkeypatch, capsys):
    flags = [*TINY, "--data_path", digits, "--output_dir", ""]
    monkeypatch.setattr(memory, "available_bytes", lambda _: free)
    if free > 1:
        run_main(saim.main_pretrain, *flags)
        assert "1000.0 GB are available" in capsys.readouterr().out
    else:
        assert "a smaller network or images fit" in mistake(saim.main_pretrain, *flags, capsys=capsys)


VIT = "--input_size 16 --patch_size 8 --batch_size 16"
SEGMENTATION = "--input_size 32 --batch_size 2 --iters 5"
DETECTION = "--short_sides 48 --long_side 96 --crop_short_sides 48 --crop_range 32 48 --batch_size 1"
PROGRAMS = {
    "saim.main_linprobe": f"--model vit_nano_patch16 {VIT}",
    "semaim.main_linprobe": f"--model vit_nano_patch16 {VIT}",
    "cae.main_linprobe": f"--model cae_nano {VIT}",
    "cae.main_attentive": f"--model cae_nano {VIT} --enable_linear_eval --linear_type attentive --use_cls",
    "cae.main_tokenizer": "--input_size 8 --num_layers 2 --num_tokens 8 --codebook_dim 8 --hidden_dim 8 --batch_size 9",
    "a2mim.main_linprobe": "--backbone resnet_nano --train_size 32 --val_resize 36 --val_crop 32 --batch_size 16",
    "udi.main_linprobe": f"--arch vit_nano --pretrained_weights= {VIT}",
    "cae.main_segmentation": f"--model upernet_cae_nano {SEGMENTATION}",
    "a2mim.main_segmentation": f"--model upernet_vit_nano {SEGMENTATION}",
    "udi.main_segmentation": f"--arch vit_nano --patch_size 8 {SEGMENTATION}",
    "cae.main_detection": f"--model mask_rcnn_cae_nano {DETECTION}",
    "a2mim.main_detection": f"--model mask_rcnn_resnet_nano {DETECTION}",
    "udi.main_detection": f"--arch vit_nano --heads narrow {DETECTION}",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> dict[str, str]:
    """Images with masks, and images with boxes."""
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_stills(folder, "training", range(1, 5), 64, 0)
    shapes.write_stills(folder, "validation", range(5, 7), 64, 0)
    masks = masked_images(tmp_path_factory.mktemp("masks"))
    return {"main_segmentation": str(masks), "main_detection": str(folder / "coco")}


FAST = ("semaim.main_linprobe", "cae.main_tokenizer", "udi.main_segmentation", "cae.main_detection")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in PROGRAMS])
def test_every_training_refuses_what_does_not_fit(name, digits, dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1.0)
    data = dense.get(name.split(".")[1], digits)
    flags = [*PROGRAMS[name].split(), "--data_path", data, "--output_dir", str(tmp_path), "--num_workers", "0"]
    error = mistake(importlib.import_module(name), *flags, "--device", "cpu", capsys=capsys)
    assert re.search(r"--batch_size \d+: a step of \d+ images takes about \S+ GB", error)
    assert list(Path(tmp_path).iterdir()) == []
