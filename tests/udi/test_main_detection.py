"""Detection's program: recipe, a run that is stopped and resumed, the authors' commands, mistakes."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from common import distributed
from common.datasets import IMAGENET_MEAN, IMAGENET_STD
from scripts.tools import shapes
from tests.support.runs import arguments, assert_same, command, finish, mistake, run_main, spoil
from udi import authors_commands, main_detection
from udi.detection_heads import MaskRCNN
from udi.models_detection import mask_rcnn

MAIN = "udi/main_detection.py"
SMALL = "--arch vit_nano --heads narrow --short_sides 48 64 --long_side 96 --test_short_side 64 --crop_short_sides 56"
SMALL += " --crop_range 32 48 --num_workers 0 --device cpu --epochs 2 --lr 1e-3 --warmup_iters 2 --lr_drops 1"
SMALL += " --eval_interval 0"
CONFIG = "configs/udi/mask_rcnn_vit_small_12_p16_1x_coco.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four training images and two validation images of drawn shapes, as COCO."""
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_stills(folder, "training", range(1, 5), 64, 0)
    shapes.write_stills(folder, "validation", range(5, 7), 64, 0)
    return folder / "coco"


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The folder of a whole run, not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    run_main(main_detection, *flags(data, folder))
    return folder


def flags(data: Path, folder: Path | str, *further: str) -> list[str]:
    return [*SMALL.split(), "--data_path", str(data), "--output_dir", str(folder), *further]


# ---- the recipe


def test_norms_of_the_vit_and_positions_are_not_decayed():
    with torch.device("meta"):
        model = mask_rcnn()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = main_detection.param_groups(model, 0.05)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0)
    exempt = {f"backbone.blocks.{i}.norm{n}.{kind}" for i in range(12) for n in (1, 2) for kind in ("weight", "bias")}
    assert {names[id(p)] for p in others["params"]} == exempt | {"backbone.pos_embed"}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_defaults(data, monkeypatch):
    """What the authors' configuration trains and evaluates with, but for the network's size."""
    caught: dict[int, Any] = {}
    monkeypatch.setattr(main_detection, "fit", lambda *args: caught.update(enumerate(args)))
    run_main(main_detection, "--arch", "vit_nano", "--data_path", str(data), "--num_workers", "0")
    args, model, loader, val_loader, _, updater, rate, *_ = caught.values()
    assert (args.epochs, args.lr, args.eval_interval, args.drop_path, loader.batch_size) == (12, 5e-5, 1, 0.05, 1)
    assert (model.roi_head.matching.number, updater.clip_grad) == (512, None)
    view = vars(loader.loader.dataset.transform)
    crops = {"crop_short_sides": [400, 500, 600], "crop_range": [384, 600]}
    statistics = {"statistics": (IMAGENET_MEAN, IMAGENET_STD)}
    assert view == {"short_sides": [*range(480, 801, 32)], "long_side": 1333, **crops, **statistics}
    assert vars(val_loader.loader.dataset.transform) == {"short_side": 800, "long_side": 1333, **statistics}
    assert type(updater.optimizer) is torch.optim.AdamW
    assert (updater.optimizer.defaults["betas"], updater.optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)
    # Four images are four updates an epoch: the warm-up of 1000 ends in epoch 250.
    middle = (1 - 0.5 * 0.999) * 5e-5
    found = [rate(*at) for at in ((0, 0), (125, 0), (250, 0))]
    assert found == pytest.approx([5e-8, middle * 0.01, 5e-7])
    args.warmup_iters = 0
    assert [rate(epoch, 0) for epoch in (7, 8, 10, 11)] == pytest.approx([5e-5, 5e-6, 5e-6, 5e-7])


# ---- runs


def test_a_run_and_its_evaluation(data, trained, tmp_path, capsys):
    lines = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert lines[1]["train_loss_rpn_cls"] < lines[0]["train_loss_rpn_cls"]
    assert "test_box_AP" not in lines[0]
    state = distributed.load(str(trained / "epoch_2.pth"))
    assert {name.split(".")[0] for name in state["state_dict"]} == {"backbone", "neck", "rpn_head", "roi_head"}
    capsys.readouterr()
    run_main(main_detection, *flags(data, tmp_path, "--eval", "--resume", str(trained / "checkpoint.pth")))
    assert f"* box AP {lines[1]['test_box_AP']:.1f}" in capsys.readouterr().out
    name = "predictions.segm.json"
    assert (tmp_path / name).read_text() == (trained / name).read_text()


@pytest.mark.slow
def test_stop_inside_an_epoch_loses_nothing(data, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, MaskRCNN, 2, stop=True)  # the estimate of memory is 0
        with pytest.raises(SystemExit) as end:
            run_main(main_detection, *flags(data, tmp_path))
    assert end.value.code == 128 + signal.SIGTERM
    run_main(main_detection, *flags(data, tmp_path))
    assert_same(trained, tmp_path)


@pytest.mark.slow
def test_two_processes_train(data, tmp_path):
    finish(command(2, MAIN, *flags(data, tmp_path)), tmp_path / "two.txt")
    assert "* box AP" in (tmp_path / "two.txt").read_text()


# ---- the authors' commands, and mistakes


def test_authors_command_lines(data):
    words = [CONFIG, "--work-dir", "out", "--cfg-options", "model.pretrained=a.pth", "data.samples_per_gpu=2"]
    args = arguments(main_detection, *authors_commands.translate(words, main_detection.ROWS))
    assert (args.output_dir, args.pretrained_weights, args.batch_size, args.lr) == ("out", "a.pth", 2, 5e-5)
    words = [CONFIG, "a.pth", "--eval", "bbox", "segm"]
    args = arguments(main_detection, *authors_commands.translate(words, main_detection.ROWS, test=True))
    assert (args.eval, args.resume) == (True, "a.pth")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--short_sides", "16"], "--short_sides 16: expected sides of 32 pixels or more"),
        (["--crop_range", "64", "32"], "--crop_range 64 32: expected sides of 32 pixels or more, rising"),
        (["--patch_size", "32"], "--arch vit_nano: 4 maps of patches of 32 pixels: expected 4 maps, 8 or 16 pixels"),
        (["--eval"], "--eval: name the checkpoint to evaluate with --resume"),
        (["--output_dir", "", "--save_pictures", "1"], "--save_pictures 1: needs --output_dir"),
    ],
)
def test_mistakes(data, tmp_path, given, said, capsys):
    assert said in mistake(main_detection, *flags(data, tmp_path), *given, capsys=capsys)
