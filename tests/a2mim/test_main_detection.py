"""Detection's program: recipes, a run that is stopped and resumed, the authors' commands, mistakes."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from a2mim import authors_commands, main_detection
from a2mim.backbones import BACKBONES
from a2mim.dense_backbone import DenseResNet
from a2mim.det_detectron2 import convert_backbone
from a2mim.detection_heads import MaskRCNN
from a2mim.models_detection import mask_rcnn_resnet_nano
from common import distributed
from common.datasets import IMAGENET_MEAN, IMAGENET_STD
from scripts.tools import shapes
from tests.support.runs import assert_same, command, finish, kept_signals, mistake, run_main, spoil

MAIN = "a2mim/main_detection.py"
SMALL = "--model mask_rcnn_resnet_nano --short_sides 48 64 --long_side 96 --test_short_side 64 --test_long_side 96"
SMALL += " --crop_short_sides 56 --crop_range 32 48 --num_workers 0 --device cpu --epochs 2 --lr 1e-3 --lr_drops 1"
SMALL += " --warmup_iters 2 --eval_interval 0 --batch_size 1"


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


# ---- the recipes

R50 = {"opt": "sgd", "lr": 0.02, "weight_decay": 1e-4, "crop_short_sides": [], "batch_size": 2}
MMDET = {**R50, "short_sides": [800], "long_side": 1333}
D2 = {
    **R50,
    "short_sides": [640, 672, 704, 736, 768, 800],
    "warmup_iters": 1000,
    "test_long_side": 1333,
    "precise_bn": 200,
}
VIT = {"short_sides": [*range(480, 801, 32)], "crop_short_sides": [400, 500, 600], "crop_range": [384, 600]}
VIT |= {"opt": "adamw", "lr": 3e-4, "weight_decay": 0.05, "drop_path": 0.2, "model": "mask_rcnn_vit_base"}
RECIPES = {
    "vit_1x": {**VIT, "epochs": 12, "lr_drops": [9, 11], "warmup_iters": 500, "batch_size": 2, "eval_interval": 1},
    "r50_c4_1x": {**MMDET, "model": "mask_rcnn_r50_c4", "epochs": 12, "lr_drops": [8, 11], "warmup_iters": 500},
    "r50_c4_2x": {**MMDET, "model": "mask_rcnn_r50_c4", "epochs": 24, "lr_drops": [16, 23], "warmup_iters": 1000},
    "r50_fpn_1x": {**MMDET, "model": "mask_rcnn_r50_fpn", "epochs": 12, "lr_drops": [8, 11], "warmup_iters": 500},
    "r50_fpn_2x": {**MMDET, "model": "mask_rcnn_r50_fpn", "epochs": 24, "lr_drops": [16, 23], "warmup_iters": 1000},
    "d2_r50_c4_1x": {**D2, "model": "mask_rcnn_r50_c4", "long_side": 1200, "epochs": 12, "lr_drops": [8, 11]},
    "d2_r50_c4_2x": {**D2, "model": "mask_rcnn_r50_c4", "long_side": 1200, "epochs": 24, "lr_drops": [16, 22]},
    "d2_r50_fpn_1x": {**D2, "model": "mask_rcnn_r50_fpn_2fc", "long_side": 1333, "epochs": 12, "lr_drops": [8, 11]},
    "d2_r50_fpn_2x": {**D2, "model": "mask_rcnn_r50_fpn_2fc", "long_side": 1333, "epochs": 24, "lr_drops": [16, 22]},
}


@pytest.mark.parametrize("recipe", main_detection.RECIPES)
def test_recipe(recipe):
    args = vars(main_detection.parse_args(["--recipe", recipe]))
    assert {name: args[name] for name in RECIPES[recipe]} == RECIPES[recipe]
    assert main_detection.parse_args(["--recipe", recipe, "--lr", "7"]).lr == 7


def test_what_a_recipe_trains_with(data, monkeypatch):
    caught: dict[int, Any] = {}
    monkeypatch.setattr(main_detection, "fit", lambda *args: caught.update(enumerate(args)))
    monkeypatch.setattr(main_detection, "MODELS", dict.fromkeys(main_detection.MODELS, mask_rcnn_resnet_nano))
    given = ["--recipe", "r50_fpn_1x", "--multi_scale", "--data_path", str(data), "--num_workers", "0"]
    with kept_signals():
        main_detection.main(main_detection.parse_args(given))
    args, model, loader, val_loader, _, updater, rate, *_ = caught.values()
    view = vars(loader.loader.dataset.transform)
    assert (view["short_sides"], view["long_side"], view["crop_short_sides"]) == ([*range(640, 801, 32)], 1333, [])
    whole = {"short_side": 800, "long_side": 1333, "statistics": (IMAGENET_MEAN, IMAGENET_STD)}
    assert vars(val_loader.loader.dataset.transform) == whole
    (group,) = updater.optimizer.param_groups
    assert type(updater.optimizer) is torch.optim.SGD
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
    assert len(group["params"]) == len(list(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())
    assert updater.clip_grad is None
    updates = len(loader)
    assert rate(0, 0) == pytest.approx(0.02 * 1e-3)
    assert rate(1, 0) == pytest.approx(0.02 * (1 - (1 - updates / 500) * 0.999))
    args.warmup_iters = 0
    assert [rate(epoch, 0) for epoch in (7, 8, 11)] == pytest.approx([0.02, 0.002, 0.0002])


def test_statistics_are_means_over_batches(data):
    args = main_detection.parse_args(flags(data, "", "--short_sides", "64"))
    with kept_signals():
        device = torch.device("cpu")
        views = main_detection.TrainTransform([64], 96, [], (32, 48))
        loader, *_ = main_detection.detection.detection_loaders(
            args, device, views, main_detection.EvalTransform(64, 96)
        )
    assert loader is not None
    seen: list[torch.Tensor] = []
    model: Any = mask_rcnn_resnet_nano(num_classes=6)
    model.backbone.conv1.register_forward_hook(lambda _module, _inputs, out: seen.append(out.mean(dim=(0, 2, 3))))
    main_detection.average_statistics(model, loader, epoch=0, count=3, seed=0)
    assert len(seen) == 3
    assert torch.allclose(model.backbone.bn1.running_mean, torch.stack(seen).mean(dim=0), atol=1e-6)
    assert model.backbone.bn1.momentum == 0.1
    before = model.backbone.bn1.running_var.clone()
    main_detection.average_statistics(model, loader, epoch=0, count=3, seed=0)
    assert torch.equal(model.backbone.bn1.running_var, before)


# ---- runs


def test_a_run_and_its_evaluation(data, trained, tmp_path, capsys):
    lines = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert lines[1]["train_loss_rpn_cls"] < lines[0]["train_loss_rpn_cls"]
    assert "test_box_AP" not in lines[0]
    capsys.readouterr()
    run_main(main_detection, *flags(data, tmp_path, "--eval", "--resume", str(trained / "checkpoint.pth")))
    assert f"* box AP {lines[1]['test_box_AP']:.1f}" in capsys.readouterr().out
    name = "predictions.segm.json"
    assert (tmp_path / name).read_text() == (trained / name).read_text()


@pytest.mark.slow
def test_a_vit_trains_from_an_encoder(data, tmp_path, capsys):
    torch.save({"state_dict": BACKBONES["vit_nano"](img_size=64).state_dict()}, tmp_path / "vit.pth")
    own = ["--model", "mask_rcnn_vit_nano", "--epochs", "1", "--pretrained", str(tmp_path / "vit.pth")]
    run_main(main_detection, *flags(data, tmp_path / "out", *own))
    out = capsys.readouterr().out
    assert "tensors matched" in out
    assert "* mask AP" in out


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


# ---- the authors' commands and detectron2's names, and mistakes


@pytest.mark.parametrize(
    ("config", "model", "epochs"),
    [
        ("mask-rcnn_vit_base_giou_4conv1f_1x_coco.py", "mask_rcnn_vit_base", 12),
        ("mask-rcnn_r50-c4_ms-2x_coco.py", "mask_rcnn_r50_c4", 24),
    ],
)
def test_authors_command_lines(config, model, epochs):
    words = [f"configs/coco/{config}", "--work-dir", "out", "--cfg-options", "model.pretrained=a.pth"]
    args = main_detection.parse_args(authors_commands.translate(words, main_detection.ROWS))
    assert (args.model, args.epochs, args.output_dir, args.pretrained) == (model, epochs, "out", "a.pth")
    words = [f"configs/coco/{config}", "a.pth", "--eval", "bbox"]
    args = main_detection.parse_args(authors_commands.translate(words, main_detection.ROWS, test=True))
    assert (args.model, args.eval, args.resume) == (model, True, "a.pth")
    with pytest.raises(distributed.UserError, match="expected the name of one of the authors"):
        authors_commands.translate(["retinanet.py"], main_detection.ROWS)


def test_detectron2_names():
    weights = DenseResNet("resnet_nano").state_dict()
    given = convert_backbone.to_detectron2({**weights, "mask_token": torch.zeros(1), "fc.weight": torch.zeros(1)})
    assert {"stem.conv1.weight", "stem.conv1.norm.running_var", "res3.0.conv2.norm.bias"} <= set(given)
    assert {"res3.0.shortcut.weight", "res3.0.shortcut.norm.weight"} <= set(given)
    kept = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    assert len(given) == len(kept)
    detector = {f"backbone.bottom_up.{name}": value for name, value in given.items()}
    detector |= {"roi_heads.res5.norm.weight": torch.zeros(1), "proposal_generator.rpn_head.conv.bias": torch.zeros(1)}
    back = convert_backbone.from_detectron2(detector)
    assert set(back) == set(kept)
    assert all(torch.equal(back[name], value) for name, value in kept.items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--short_sides", "16"], "--short_sides 16: expected sides of 32 pixels or more"),
        (["--crop_range", "64", "32"], "--crop_range 64 32: expected sides of 32 pixels or more, rising"),
        (["--eval"], "--eval: name the checkpoint to evaluate with --resume"),
        (["--pretrained", "no.pth"], "no.pth: no such checkpoint file"),
        (["--output_dir", "", "--save_pictures", "1"], "--save_pictures 1: needs --output_dir"),
    ],
)
def test_mistakes(data, tmp_path, given, said, capsys):
    assert said in mistake(main_detection, *flags(data, tmp_path), *given, capsys=capsys)
