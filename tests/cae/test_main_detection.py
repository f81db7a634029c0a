"""Mask R-CNN's command line: the recipe, a whole run, its evaluation, interruptions and users' mistakes."""

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cae import main_detection
from cae.authors_commands import translate
from cae.detection_heads import MaskRCNN
from cae.models_detection import MODELS
from common import distributed
from scripts.tools import shapes
from tests.support.runs import assert_same, command, finish, mistake, run_main, spoil

MAIN = "cae/main_detection.py"
SMALL = ["--model", "mask_rcnn_cae_nano", "--short_sides", "48", "64", "--long_side", "96", "--test_short_side", "64"]
SMALL += ["--crop_short_sides", "56", "--crop_range", "32", "48", "--num_workers", "0", "--device", "cpu"]
SMALL += [
    "--epochs",
    "2",
    "--lr",
    "1e-3",
    "--warmup_iters",
    "2",
    "--lr_drops",
    "1",
    "--batch_size",
    "1",
    "--accum_iter",
    "2",
]


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """Four training images and two validation images of drawn shapes, as COCO."""
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_stills(folder, "training", range(1, 5), 64, 0)
    shapes.write_stills(folder, "validation", range(5, 7), 64, 0)
    return folder / "coco"


def flags(coco: Path, folder: Path | str, *further: str) -> list[str]:
    return [*SMALL, "--data_path", str(coco), "--output_dir", str(folder), *further]


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory) -> Path:
    """The folder of a whole run, not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    run_main(main_detection, *flags(coco, folder, "--save_pictures", "2"))
    return folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# ---- the recipe


def test_recipe__values_of_the_published_rows(coco):
    """CAE base, COCO, 1x: 16 GPUs x 2 images, DETR's views, AdamW with rates that shrink per layer."""
    args = main_detection.get_args_parser().parse_args(["--data_path", str(coco), "--num_workers", "0"])
    main_detection.check(args)
    assert (args.batch_size, args.epochs, args.lr, args.weight_decay, args.layer_decay) == (2, 12, 3e-4, 0.05, 0.75)
    assert (args.drop_path, args.layer_scale_init_value, args.use_checkpoint) == (0.2, 0.1, True)
    assert (args.lr_drops, args.warmup_iters, args.warmup_ratio, args.clip_grad) == ([9, 11], 500, 1e-3, None)
    loader, val_loader, images = main_detection.build_loaders(args, torch.device("cpu"))
    assert loader is not None
    view: Any = loader.loader.dataset.transform  # type: ignore[attr-defined]
    assert view.short_sides == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert (view.long_side, view.crop_short_sides, view.crop_range) == (1333, [400, 500, 600], [384, 600])
    test_view: Any = val_loader.loader.dataset.transform  # type: ignore[attr-defined]
    assert (test_view.short_side, test_view.long_side, val_loader.batch_size) == (800, 1333, 1)
    assert images.classes == shapes.NAMES


def test_parameter_groups():
    model = MODELS["mask_rcnn_cae_nano"](num_classes=3)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in main_detection.param_groups(model, 0.05, 0.5):
        found |= {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    depth = len(model.backbone.blocks)  # type: ignore[arg-type]
    lowest = 0.5 ** (depth + 1)
    assert "backbone.pos_embed" not in found
    assert set(found) == set(names.values()) - {"backbone.pos_embed"}
    assert found["backbone.cls_token"] == (lowest, 0.05)
    assert found["backbone.patch_embed.proj.weight"] == (lowest, 0.05)
    assert found["backbone.patch_embed.proj.bias"] == (lowest, 0)
    for i in range(depth):
        assert found[f"backbone.blocks.{i}.mlp.fc1.weight"] == (0.5 ** (depth - i), 0.05)
        assert found[f"backbone.blocks.{i}.gamma_1"] == (0.5 ** (depth - i), 0)
    for name in ("backbone.fpn1.0", "neck.fpn_convs.0.conv", "rpn_head.rpn_conv", "roi_head.bbox_head.fc_cls"):
        assert (found[f"{name}.weight"], found[f"{name}.bias"]) == ((1, 0.05), (1, 0))


def test_rates(coco, tmp_path, monkeypatch):
    """Of the first update and those after the drop; of two batches' updates each."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(main_detection, "fit", lambda *args: seen.update(rate=args[6], updater=args[5]))
    run_main(main_detection, *flags(coco, tmp_path, "--lr", "3e-4", "--warmup_iters", "5", "--lr_drops", "9", "11"))
    rates = [seen["rate"](*at) for at in ((0, 0), (0, 1), (0, 2), (5, 0), (9, 0), (11, 3))]
    assert rates == pytest.approx([3e-7, 3e-7, 3e-4 * (1 - 0.8 * 0.999), 3e-4, 3e-5, 3e-6])
    optimizer = seen["updater"].optimizer
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)


# ---- a run


def test_a_run_logs_saves_and_evaluates(coco, trained, tmp_path, capsys):
    first, last = log_of(trained)
    losses = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")
    for line in (first, last):
        assert line["train_loss"] == pytest.approx(sum(line[f"train_{name}"] for name in losses), rel=1e-5)
    assert "test_box_AP" not in first
    assert 0 <= last["test_mask_AP50"] <= 100
    assert {"checkpoint.pth", "epoch_1.pth", "epoch_2.pth", "log.txt"} <= {path.name for path in trained.iterdir()}
    state = distributed.load(str(trained / "epoch_2.pth"))
    assert state["args"]["class_names"] == shapes.NAMES
    assert any(name.startswith("roi_head.bbox_head.") for name in state["state_dict"])
    pictures = sorted((trained / "pictures").iterdir())
    assert len(pictures) == 2
    with Image.open(pictures[0]) as picture:
        assert picture.width >= 640
    capsys.readouterr()
    run_main(main_detection, *flags(coco, tmp_path, "--eval", "--resume", str(trained / "checkpoint.pth")))
    assert f"* box AP {last['test_box_AP']:.1f}" in capsys.readouterr().out
    for kind in ("bbox", "segm"):
        name = f"predictions.{kind}.json"
        assert (tmp_path / name).read_text() == (trained / name).read_text()


def test_stop_inside_an_epoch_loses_nothing(coco, trained, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        spoil(patch, MaskRCNN, 1, stop=True)  # the estimate of memory is 0; asked inside an update of two batches
        with pytest.raises(SystemExit) as end:
            run_main(main_detection, *flags(coco, tmp_path, "--save_pictures", "2"))
    assert end.value.code == 128 + signal.SIGTERM
    state = distributed.load(str(tmp_path / "checkpoint.pth"))
    assert state["images"] == 2  # of four: the update is complete
    run_main(main_detection, *flags(coco, tmp_path, "--save_pictures", "2"))
    assert "resumed" in capsys.readouterr().out
    assert_same(trained, tmp_path)


# ---- the authors' command lines


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("configs/cae/mask_rcnn_cae_base_800e_1x.py", ("mask_rcnn_cae_base", 3e-4, 0.75, 0.1)),
        ("mask_rcnn_large_1600e.py", ("mask_rcnn_cae_large", 2e-4, 0.85, 1e-5)),
    ],
)
def test_a_configuration_names_a_row(config, expected):
    words = "--work-dir OUT --seed 3 --deterministic --launcher pytorch --options model.pretrained=FILE.pth "
    words += "model.backbone.use_checkpoint=True data.samples_per_gpu=4"
    own = translate([config, *words.split()], main_detection.ROWS)
    args = main_detection.get_args_parser().parse_args(own)
    assert (args.model, args.lr, args.layer_decay, args.layer_scale_init_value) == expected
    assert (args.output_dir, args.seed, args.deterministic, args.finetune) == ("OUT", 3, True, "FILE.pth")
    assert (args.use_checkpoint, args.batch_size) == (True, 4)
    own = translate([config, "epoch_12.pth", "--eval", "bbox", "segm"], main_detection.ROWS, test=True)
    args = main_detection.get_args_parser().parse_args(own)
    assert (args.eval, args.resume) == (True, "epoch_12.pth")


def test_the_authors_files(trained, tmp_path, coco, capsys):
    """A detector of mmdet can be evaluated; its training cannot be continued, as its optimizer has other groups."""
    state = distributed.load(str(trained / "checkpoint.pth"))
    theirs = {"meta": {"epoch": 12, "iter": 99}, "state_dict": state["state_dict"], "optimizer": state["optimizer"]}
    torch.save(theirs, tmp_path / "epoch_12.pth")
    own = flags(coco, tmp_path / "run", "--resume", str(tmp_path / "epoch_12.pth"))
    assert "it is mmdet's; such a file can be evaluated" in mistake(main_detection, *own, capsys=capsys)
    run_main(main_detection, *own, "--eval")
    assert "* box AP" in capsys.readouterr().out


# ---- mistakes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "mask_rcnn"], "--model mask_rcnn: expected one of mask_rcnn_cae_"),
        (["--short_sides", "16"], "--short_sides 16: expected sides of 32 pixels or more"),
        (["--crop_range", "64", "32"], "--crop_range 64 32: expected sides of 32 pixels or more, rising"),
        (["--warmup_ratio", "2"], "--warmup_ratio 2.0: expected 0 to 1"),
        (["--train_json", "no.json"], "no.json: no such file of annotations"),
        (["--val_images", "no"], "no: no such folder of images"),
        (["--output_dir", "", "--save_pictures", "1"], "--save_pictures 1: needs --output_dir"),
        (["--eval"], "--eval: name the checkpoint to evaluate with --resume"),
        (["--finetune", "no.pth"], "no.pth: no such checkpoint file"),
        (["--amp_dtype", "fp16"], "--amp_dtype fp16: needs a GPU"),
    ],
)
def test_mistakes(coco, tmp_path, given, said, capsys):
    assert said in mistake(main_detection, *flags(coco, tmp_path), *given, capsys=capsys)


def test_categories_of_training_and_validation_must_agree(coco, tmp_path, capsys):
    file = coco / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "circle"
    (tmp_path / "val.json").write_text(json.dumps(content))
    said = mistake(main_detection, *flags(coco, ""), "--val_json", str(tmp_path / "val.json"), capsys=capsys)
    assert "its categories are not those of" in said
    assert "'circle'" in said


# ---- several processes, and what takes longer


@pytest.mark.slow
def test_two_processes_evaluate_as_one(coco, trained, tmp_path):
    shutil.copy(trained / "checkpoint.pth", tmp_path / "file.pth")
    own = flags(coco, tmp_path, "--eval", "--resume", str(tmp_path / "file.pth"))
    finish(command(2, MAIN, *own), tmp_path / "two.txt")
    assert f"* box AP {log_of(trained)[-1]['test_box_AP']:.1f}" in (tmp_path / "two.txt").read_text()
    for kind in ("bbox", "segm"):
        one, two = (json.loads((folder / f"predictions.{kind}.json").read_text()) for folder in (trained, tmp_path))
        assert sorted(map(json.dumps, one)) == sorted(map(json.dumps, two))


@pytest.mark.slow
def test_two_processes_train_and_resume(coco, tmp_path):
    own = ["--accum_iter", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(command(2, MAIN, *flags(coco, whole, *own)), tmp_path / "whole.txt")
    state = distributed.load(str(whole / "checkpoint.pth"))
    finish(command(2, MAIN, *flags(coco, parts, *own, "--epochs", "1")), tmp_path / "first.txt")
    (parts / "log.txt").unlink()
    finish(command(2, MAIN, *flags(coco, parts, *own)), tmp_path / "second.txt")
    resumed = distributed.load(str(parts / "checkpoint.pth"))["state_dict"]
    assert all(torch.equal(value, resumed[name]) for name, value in state["state_dict"].items())
    assert math.isfinite(log_of(whole)[-1]["train_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["train", "test"])
def test_the_authors_programs_start_ours(tool, run_script):
    done = run_script(f"cae/downstream_tasks/detection/tools/{tool}.py", "mine.py", "epoch_12.pth", status=2)
    assert "mine.py: expected the name of a configuration with base or large in it" in done.stderr
