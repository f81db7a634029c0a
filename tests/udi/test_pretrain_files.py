"""The files of pre-training: the authors' keys and names, the authors' own, and where a run goes on from."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from common import distributed
from tests.support.runs import run_main
from tests.support.udi_runs import NAMES, flags_of, log_of, state_of, train
from udi import main_pretrain
from udi.lars import LARS

pytestmark = pytest.mark.usefixtures("narrow_head")

# ---- files


def test_checkpoints_have_upstreams_keys(reference):
    folder = reference("plain")
    state = state_of(folder)
    assert {"student", "teacher", "optimizer", "epoch", "args", "udi_loss"} <= set(state)
    assert "fp16_scaler" not in state  # upstream cannot load an empty one
    assert state["epoch"] == 2  # the next one
    assert list(state["student"]) == [f"module.{name}" for name in state["teacher"]]
    assert not any(name.startswith("module.") for name in state["teacher"])
    for name, value in state["teacher"].items():
        if name.startswith("head.0."):
            for k in (1, 2):  # one head under three names
                assert torch.equal(value, state["teacher"][name.replace("head.0.", f"head.{k}.")])
    assert {"backbone.backbone.cls_token", "backbone.attn.qkv.weight", "backbone.norm1.bias"} < set(state["teacher"])
    assert {name: list(value.shape) for name, value in state["udi_loss"].items()} == {
        "centering.center": [3, 256],
        "centering.count": [3, 1],
    }
    assert state["udi_loss"]["centering.center"].abs().sum(dim=1).min() > 0
    assert isinstance(state["args"], dict)
    assert [list(line) for line in log_of(folder)] == [NAMES] * 2
    assert [line["epoch"] for line in log_of(folder)] == [0, 1]
    # The teacher follows slowly, except where nothing is trained.
    student, teacher = state["student"], state["teacher"]
    same = {name for name, value in teacher.items() if torch.equal(value, student[f"module.{name}"])}
    assert same == {f"head.{k}.last_layer.weight_g" for k in range(3)}


def test_numbered_checkpoints(digits, tmp_path):
    train("no patches", digits, tmp_path, "--batch_size", "24", "--epochs", "4", "--saveckp_freq", "2")
    names = {path.name for path in tmp_path.glob("*.pth")}
    # The last epoch's is ours.
    numbered = {f"checkpoint{epoch:04}.pth" for epoch in (0, 2, 3)}
    assert names == {"checkpoint.pth", "checkpoint-previous.pth", *numbered}
    assert [state_of(tmp_path, name)["epoch"] for name in sorted(numbered)] == [1, 3, 4]


@pytest.mark.slow
def test_no_numbered_checkpoints(digits, tmp_path):
    train("no patches", digits, tmp_path, "--batch_size", "24", "--saveckp_freq", "0")
    assert {path.name for path in tmp_path.glob("*.pth")} == {"checkpoint.pth", "checkpoint-previous.pth"}


def official(path: Path, target: Path, tensors: bool) -> None:
    """The file as upstream writes it: flags as a Namespace, none of our keys, old optimizer settings."""
    state = distributed.load(str(path))
    keys = ("student", "teacher", "optimizer", "epoch", "udi_loss")
    found: dict[str, Any] = {key: state[key] for key in keys}
    found["args"] = argparse.Namespace(**state["args"])
    found["fp16_scaler"] = {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 7,
    }
    for moments in found["optimizer"]["state"].values():
        if "step" in moments and not tensors:
            moments["step"] = int(moments["step"])
    old = ("lr", "betas", "eps", "weight_decay", "amsgrad", "foreach", "maximize", "capturable", "params", "momentum")
    for group in found["optimizer"]["param_groups"]:
        for key in set(group) - {*old, "dampening", "nesterov", "eta", "weight_decay_filter", "lars_adaptation_filter"}:
            del group[key]
    torch.save(found, target)


def test_groups_of_lars_have_the_authors_keys(reference):
    """Their program reads them all; an earlier file of ours, with another name of eta, goes on."""
    groups = state_of(reference("accum"))["optimizer"]["param_groups"]
    theirs = {"lr", "momentum", "weight_decay", "eta", "weight_decay_filter", "lars_adaptation_filter", "params"}
    assert all(theirs <= set(group) for group in groups)
    state = LARS([torch.zeros(2, 2)]).state_dict()
    (earlier,) = state["param_groups"]
    earlier["trust_coefficient"] = 2 * earlier.pop("eta")
    del earlier["weight_decay_filter"], earlier["lars_adaptation_filter"]
    optimizer = LARS([torch.zeros(2, 2)])
    optimizer.load_state_dict(state)
    assert theirs == set(optimizer.param_groups[0])
    assert optimizer.param_groups[0]["eta"] == 0.002


REST = [("plain", False), ("no patches", True), ("bn", True)]
OFFICIAL = [("plain", True), ("accum", True), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in REST)]


@pytest.mark.parametrize(("case", "tensors"), OFFICIAL)
def test_an_official_checkpoint_goes_on(digits, reference, tmp_path, case, tensors, capsys):
    """Found by itself in the output folder."""
    whole = reference(case)
    official(whole / "checkpoint0000.pth", tmp_path / "checkpoint.pth", tensors)
    capsys.readouterr()
    train(case, digits, tmp_path)
    assert "checkpoint.pth: epoch 1, 0 images of it done" in capsys.readouterr().out
    expected, found = state_of(whole), state_of(tmp_path)
    for part in ("student", "teacher", "udi_loss"):
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), (part, name)
    assert log_of(tmp_path) == log_of(whole)[1:]


def test_a_finished_run_returns_and_can_be_made_longer(digits, reference, tmp_path, capsys):
    shutil.copytree(reference("plain"), tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "checkpoint.pth").stat().st_mtime_ns
    train("plain", digits, tmp_path)
    assert "2 epochs done" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pth").stat().st_mtime_ns == before
    train("plain", digits, tmp_path, "--epochs", "3", "--batch_size", "24", "--seed", "3")
    assert [line["epoch"] for line in log_of(tmp_path)] == [0, 1, 2]


def test_resume_wins_over_the_folder(digits, reference, tmp_path, capsys):
    shutil.copytree(reference("plain"), tmp_path, dirs_exist_ok=True)
    given = str(reference("plain") / "checkpoint0000.pth")
    train("plain", digits, tmp_path, "--resume", given, "--batch_size", "24")
    assert f"resumed {given}: epoch 1," in capsys.readouterr().out


@pytest.mark.slow
def test_no_folder_writes_nothing(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_main(main_pretrain, *flags_of("plain", digits, tmp_path, "--batch_size", "24"), "--output_dir", "")
    assert not list(tmp_path.iterdir())
