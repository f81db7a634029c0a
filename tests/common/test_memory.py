"""The estimate of a step's memory: what it counts, what it leaves untouched, what it refuses."""

import contextlib
import importlib
import io
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import saim.main_pretrain
from common.datasets import memory
from scripts.tools import shapes
from tests.support.cae import tokenizer_file
from tests.support.dense import masked_images
from tests.support.helpers import ROOT
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


class Odd(nn.Module):
    """Has what real networks have: shapes by masks and drawn numbers, decisions by values, weights set in the pass."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.token, self.average = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.average.lerp_(self.token + 1, 0.5)
        self.token.data = x.detach().mean(dim=0)
        kept = x[torch.randn(len(x)).argsort()[: int(mask.sum())]] + self.token
        kept = kept.relu() if bool((kept.double().sqrt().float().isnan() | True).all()) else kept
        return self.norm(self.linear(kept)).tanh()[mask[: len(kept)].nonzero()[:, 0]].sum()


def odd_loss(net: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return net(*batch)


def test_shapes_alone__give_the_same_bytes_and_touch_nothing(monkeypatch):
    model, batch = Odd().train(), [torch.randn(6, 8), torch.tensor([True, True, False, False, True, False])]
    real = memory.saved_bytes(Odd(), odd_loss, batch)
    before = [(p, p.clone()) for p in [*model.parameters(), *model.buffers()]]
    monkeypatch.setattr(memory, "SMALL", 0)
    seen: list[type] = []

    def loss(net: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        seen.append(type(batch[0]))
        return odd_loss(net, batch)

    state = torch.get_rng_state()
    assert memory.saved_bytes(model, loss, batch) == real > 0
    assert seen == [FakeTensor] and model.training and torch.equal(torch.get_rng_state(), state)
    now = [*model.parameters(), *model.buffers()]
    assert all(p is q and torch.equal(p, was) for p, (q, was) in zip(now, before, strict=True))


def test_shapes_that_depend_on_values__are_computed(monkeypatch):
    model, batch = nn.Linear(8, 4).train(), torch.cat([torch.ones(3, 8), torch.zeros(2, 8)])

    def loss(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return net(batch[batch[:, 0] > 0.5]).tanh().sum()

    monkeypatch.setattr(memory, "SMALL", 0)
    assert memory.saved_bytes(model, loss, batch) == 4 * 3 * (8 + 4) and model.training


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
def test_every_training_warns_of_random_weights_and_refuses_what_does_not_fit(
    name, digits, dense, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1.0)
    data = dense.get(name.split(".")[1], digits)
    flags = [*PROGRAMS[name].split(), "--data_path", data, "--output_dir", str(tmp_path), "--num_workers", "0"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        error = mistake(importlib.import_module(name), *flags, "--device", "cpu", capsys=capsys)
    assert ("WARNING: no --" in said.getvalue()) == ("tokenizer" not in name)
    assert re.search(r"--batch_size \d+: a step of \d+ images takes about \S+ GB", error)
    assert list(Path(tmp_path).iterdir()) == []


PRETRAINING = {
    "saim.main_pretrain": f"--model saim_nano {VIT}",
    "semaim.main_pretrain": f"--model aim_nano --permutation_type attention_center {VIT}",
    "cae.main_pretrain": "--model cae_nano --input_size 32 --patch_size 8 --second_input_size 16 --num_mask_patches 8 "
    "--min_mask_patches_per_block 2 --discrete_vae_type customized --decoder_num_classes 12 --batch_size 16",
    "a2mim.main_pretrain": "--backbone resnet_nano --input_size 32 --mask_patch_size 32 --fft_weight 1 --batch_size 9",
    "udi.main_pretrain": "--arch vit_nano --patch_size 8 --global_size 32 --local_size 16 --out_dim 64 --batch_size 16",
}
OF_SHAPES = {name: flags for name, flags in (PRETRAINING | PROGRAMS).items() if "detection" not in name}
QUICK = ("semaim.main_pretrain", "udi.main_pretrain")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in OF_SHAPES])
def test_every_network_is_estimated_by_shapes_alone(name, digits, dense, tmp_path, monkeypatch):
    """The bytes are those of a pass that computes all."""

    class Stop(Exception):
        pass

    def compare(model: nn.Module, loss_of: Any, batch: Any, *others: nn.Module) -> int:
        real = memory.kept_bytes((model, *others), loss_of, batch)
        passes: list[Any] = []
        monkeypatch.setattr(memory, "SMALL", 0)
        found = saved_bytes(model, lambda net, batch: passes.append(batch) or loss_of(net, batch), batch, *others)
        assert found == real > 0 and len(passes) == 1
        raise Stop

    saved_bytes = memory.saved_bytes
    monkeypatch.setattr(memory, "saved_bytes", compare)
    data = dense.get(name.split(".")[1], digits)
    with pytest.raises(Stop):
        main = importlib.import_module(name)
        flags = [*OF_SHAPES[name].split(), "--data_path", data, "--output_dir", str(tmp_path), "--num_workers", "0"]
        flags += ["--discrete_vae_weight_path", tokenizer_file(tmp_path)] * (name == "cae.main_pretrain")
        main.main(main.get_args_parser().parse_args([*flags, "--device", "cpu"]))


BY_SHAPES = """
from common.datasets import memory
from common import distributed
from scripts.tools import flags
from udi import main_pretrain

plain, memory.SMALL = memory.kept_bytes, 0

def kept_bytes(modules, loss_of, batch):
    assert any(isinstance(x, memory.FakeTensor) for x in memory.tree_leaves(batch))
    return plain(modules, loss_of, batch)

memory.kept_bytes = kept_bytes
distributed.run(main_pretrain.main, lambda: flags.arguments(main_pretrain, __import__("sys").argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_meet_in_a_pass_of_shapes(digits, tmp_path, launch):
    """Whose loss adds up what the processes have, as a real one."""
    (tmp_path / "by_shapes.py").write_text(BY_SHAPES)
    flags = [*PRETRAINING["udi.main_pretrain"].split(), "--epochs", "1", "--warmup_epochs", "0", "--num_workers", "0"]
    flags += ["--device", "cpu", "--data_path", digits, "--output_dir", ""]
    said = launch(2, str(tmp_path / "by_shapes.py"), *flags, PYTHONPATH=str(ROOT)).stdout
    assert said.count("memory: a step of 16 images takes about") == 1
    assert "1 epochs done" in said
