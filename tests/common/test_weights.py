"""What a checkpoint's file holds: flags and weights, in the layouts of all authors."""

import argparse
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common import distributed
from common.distributed import Checkpoint, Position, UserError, command

ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("args", "flags"),
    [({"lr": 1}, {"lr": 1}), (argparse.Namespace(lr=1), {"lr": 1}), (None, {}), ("lr 1", {})],
    ids=["dict", "namespace", "none", "text"],
)
def test_flags_of(args, flags):
    found = distributed.flags_of({"args": args})
    assert found == flags
    assert found is not args


def test_weights__of_the_first_key_and_without_prefix():
    state = {"model": {"module.a": ONE}, "module": {"b": ONE}, "epoch": 1}
    assert list(distributed.weights_of(state, "x")) == ["a"]
    assert list(distributed.weights_of(state, "x", ("module", "model"))) == ["b"]
    with pytest.raises(distributed.UserError, match="x: holds no weights under 'ema'; its keys: model, module, epoch"):
        distributed.weights_of(state, "x", ("ema",))


def test_weights__of_a_bare_file():
    bare = {"module.a": ONE, "b": ONE}
    assert list(distributed.weights_of(bare, "x", bare=True)) == ["a", "b"]
    for state, allowed in ((bare, False), (bare | {"epoch": 1}, True), ({}, True)):
        with pytest.raises(distributed.UserError, match="holds no weights under 'state_dict' or 'model' or 'module'"):
            distributed.weights_of(state, "x", bare=allowed)


def test_part__is_all_where_no_name_has_the_prefix():
    weights = {"encoder.a": ONE, "decoder.b": ONE}
    assert list(distributed.part_of(weights, "encoder.")) == ["a"]
    assert distributed.part_of(weights, "backbone.") == weights


# ---- what files may hold


def test_numpy_scalars_of_every_type_are_read(tmp_path):
    kinds = ["?", "b", "B", "h", "H", "i", "I", "q", "Q", "e", "f", "d", "g", "F", "D", "U3", "S3", "M8[s]", "m8[s]"]
    scalars = {kind: np.zeros(1, kind)[0] for kind in kinds}
    torch.save({"model": {}, "scalars": scalars}, tmp_path / "x.pth")
    assert distributed.load(str(tmp_path / "x.pth"))["scalars"] == scalars


def test_configurations_are_read_as_plain_dicts(tmp_path, monkeypatch):
    """As SimMIM and Swin store theirs, and Lightning its hyperparameters, without their packages."""

    class Config(dict):
        pass

    for name in ("yacs.config.CfgNode", "pytorch_lightning.utilities.parsing.AttributeDict"):
        module, Config.__qualname__ = name.rsplit(".", 1)
        Config.__name__, Config.__module__ = Config.__qualname__, module
        with monkeypatch.context() as patch:
            for parent in (module.split(".")[0], module.rsplit(".", 1)[0], module):
                patch.setitem(sys.modules, parent, types.SimpleNamespace(__path__=[], **{Config.__name__: Config}))
            config = Config(TRAIN=Config(EPOCHS=800))
            config.__dict__["__immutable__"] = True
            torch.save({"model": {"a": ONE}, "config": config}, tmp_path / "x.pth")
        assert distributed.load(str(tmp_path / "x.pth"))["config"] == {"TRAIN": {"EPOCHS": 800}}


def test_parts_are_read_through_their_index(tmp_path):
    save_file({"a": ONE}, tmp_path / "model-1.safetensors")
    save_file({"b": 2 * ONE}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert distributed.load(str(index)) == {"model": {"a": ONE, "b": 2 * ONE}}
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="index.json: its part model-2.safetensors is missing"):
        distributed.load(str(index))


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_program_is_named(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)), str(path))
    with pytest.raises(UserError, match=f"^{path}: is a TorchScript program.*torch.jit.load") as error:
        distributed.load(str(path))
    way = str(error.value).split("; ")[1].split(" keeps")[0]
    monkeypatch.chdir(tmp_path)
    exec(way, {"torch": torch})
    assert sorted(distributed.weights_of(distributed.load("weights.pth"), "x", bare=True)) == ["bias", "weight"]


# ---- a run's own files


def run_in(folder: Path, **files) -> Checkpoint:
    return Checkpoint(str(folder), argparse.Namespace(epochs=9), torch.nn.Linear(1, 1), distributed.Files(**files))


def test_the_newest_other_checkpoint_is_one_of_the_run(tmp_path):
    run_in(tmp_path, latest="checkpoint_linear.pth").save(Position(1))
    (tmp_path / "downloaded.pth").write_bytes(b"x")
    checkpoint = run_in(tmp_path)
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    with pytest.raises(UserError) as error:
        checkpoint.resume(str(tmp_path / "checkpoint.pth"))
    assert "newest other" not in str(error.value)
    checkpoint.save(Position(1))
    os.replace(tmp_path / "checkpoint.pth", tmp_path / "checkpoint-0.pth")
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    with pytest.raises(UserError, match="the newest other checkpoint is .*checkpoint-0.pth"):
        checkpoint.resume(str(tmp_path / "checkpoint.pth"))


def test_a_damaged_file__names_the_one_that_it_replaced(tmp_path):
    """Where only the file itself is known, as in a program that reads weights."""
    for name in ("checkpoint.pth", "checkpoint-0.pth", "other-previous.pth"):
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match="checkpoint.pth: truncated or not a checkpoint$|not a checkpoint$"):
        distributed.load(str(tmp_path / "checkpoint.pth"))
    (tmp_path / "checkpoint-previous.pth").write_bytes(b"whole")
    with pytest.raises(UserError, match="the newest other checkpoint is .*/checkpoint-previous.pth$"):
        distributed.load(str(tmp_path / "checkpoint.pth"))


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    checkpoint = run_in(tmp_path)
    plain = torch.save

    def save_to_full_disk(state, file):
        with open("/dev/full", "wb") as full:
            plain(state | {"much": torch.zeros(10**6)}, full)

    monkeypatch.setattr(torch, "save", save_to_full_disk)
    with pytest.raises(UserError, match=r"checkpoint.pth: cannot be written \(No space left on device\)"):
        checkpoint.save(Position(1))


# ---- what a user sees last


def test_a_missing_key_is_a_sentence():
    with pytest.raises(UserError, match="^x.json: 'splits' is missing$"), distributed.user_errors("x.json"):
        _ = {}["splits"]


def test_torchrun_repeats_the_line(tmp_path, monkeypatch):
    """It ends with what this file says, after its own traceback."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr(sys, "argv", ["main_pretrain.py"])

    def fail(_args) -> None:
        raise UserError("--data_path x: no such folder")

    with pytest.raises(SystemExit):
        command.run(fail, argparse.Namespace())
    about = json.loads((tmp_path / "error.json").read_text())["message"]
    assert about["message"] == "main_pretrain.py: --data_path x: no such folder"


@pytest.mark.parametrize("chans", [1, 2, 4, 13])
def test_weights_of_three_channels_are_adapted_to_others(chans):
    found = {"proj.weight": torch.rand(5, 3, 2, 2), "head.weight": torch.rand(2, 3, 1, 1), "bias": torch.ones(2)}
    own = {"proj.weight": torch.zeros(5, chans, 4, 4), "head.weight": torch.zeros(7, 9, 1, 1), "bias": torch.zeros(2)}
    adapted = distributed.adapt_channels(found, own)
    assert {name for name in found if adapted[name] is not found[name]} == {"proj.weight"}  # head: of another width
    weight, old = adapted["proj.weight"], found["proj.weight"]  # the patch size may differ, and stays the file's
    if chans == 1:  # a grey image gives what it gave as three equal channels
        torch.testing.assert_close(weight, old.sum(dim=1, keepdim=True))
    else:
        torch.testing.assert_close(weight, old[:, [i % 3 for i in range(chans)]] * 3 / chans)
    same = {"proj.weight": torch.zeros(5, 3, 2, 2)}
    assert distributed.adapt_channels(found, same)["proj.weight"] is old
