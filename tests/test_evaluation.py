"""Evaluating a checkpoint needs neither training images nor a batch size that training could use."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from a2mim import engine_finetune
from common import distributed
from tests.support.helpers import ROOT
from tests.support.runs import run_main
from tests.support.udi_weights import pretrained

SIZES = ["--input_size", "16", "--patch_size", "4", "--num_workers", "0", "--device", "cpu"]
CAE = ["--model", "cae_nano", *SIZES, "--nb_classes", "10", "--warmup_epochs", "0"]
ATTENTIVE = ["--enable_linear_eval", "--linear_type", "attentive", "--use_cls"]
UDI = ["--arch", "vit_nano", "--patch_size", "4", "--num_workers", "0", "--device", "cpu"]
SWIN = ROOT / "a2mim/configs/openmixup/finetune/imagenet/vit_base_p16_swin_ft_simmim_sz224_4xb128_accu2_cos_ep100.py"
A2MIM = ["--num_workers", "0", "--device", "cpu", "--nb_classes", "10", "--train_size", "32", "--val_resize", "32"]
A2MIM += ["--val_crop", "32", "--backbone", "vit_nano"]
MAINS = {
    "saim.main_finetune": ["--model", "vit_nano_patch16", *SIZES, "--nb_classes", "10", "--mixup", "0.8"],
    "saim.main_linprobe": ["--model", "vit_nano_patch16", *SIZES, "--nb_classes", "10"],
    "semaim.main_finetune": ["--model", "vit_nano_patch16", *SIZES, "--nb_classes", "10", "--mixup", "0.8"],
    "semaim.main_linprobe": ["--model", "vit_nano_patch16", *SIZES, "--nb_classes", "10"],
    "cae.main_finetune": [*CAE, "--mixup", "0.8", "--update_freq", "9"],
    "cae.main_attentive": [*CAE, *ATTENTIVE],
    "cae.main_linprobe": CAE,
    "a2mim.main_finetune": [str(SWIN), *A2MIM],
    "a2mim.main_linprobe": A2MIM,
    "udi.main_finetune": ["--model", "vit_nano", *SIZES, "--nb_classes", "10", "--mixup", "0.8", "--update_freq", "9"],
    "udi.main_linprobe": [*UDI, "--input_size", "16", "--num_labels", "10"],
    "udi.main_semi_supervised": [*UDI, "--input-size", "32", "--class_num", "10"],
    "udi.main_transfer": [*UDI, "--input-size", "32", "--data_set", "IMNET"],
}


@pytest.mark.parametrize("name", MAINS)
def test_eval_needs_no_training_images(name, digits, tmp_path, monkeypatch, capsys):
    module: Any = import_module(name)
    shutil.copytree(Path(digits, "val"), tmp_path / "val")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "load_weights", lambda *_, **__: {})  # evaluate the weights as they are drawn
    monkeypatch.setattr(engine_finetune, "load_openmixup_state_dict", lambda *_: None)
    torch.save({"model": {}}, "x.pth")
    batch = {"cae.main_attentive": "20", "cae.main_linprobe": "1"}.get(name, "7")
    own = ["--data_path", str(tmp_path), "--batch_size", batch, "--resume", "x.pth", *MAINS[name]]
    own += ["--evaluate" if name == "udi.main_linprobe" else "--eval"]
    if name == "udi.main_finetune":  # it looks into the file, too
        parsed = module.get_args_parser().parse_args(own)
        torch.save({"model": module.build_model(parsed, None).state_dict()}, "x.pth")
    elif name.startswith("udi"):
        own += ["--pretrained_weights", pretrained(tmp_path / "udi")]
    run_main(module, *own)
    assert "images/s" in capsys.readouterr().out
