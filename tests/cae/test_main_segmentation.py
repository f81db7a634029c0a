"""Segmentation's program: its recipe, a run that learns and is resumed, evaluations, and users' mistakes."""

import json
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cae import main_segmentation
from cae.dense_backbone import DenseBackbone
from cae.main_segmentation import ROWS, build_model, get_args_parser, param_groups
from cae.models_segmentation import SegmentationNetwork
from common import distributed
from common.datasets import IMAGENET_MEAN, IMAGENET_STD
from tests.support.dense import masked_images
from tests.support.processes import launch
from tests.support.runs import FAULTS, assert_same, command, finish, mistake, run_main, spoil, start

SMALL = "--model upernet_cae_nano --input_size 32 --num_workers 0 --batch_size 2 --iters 5 --eval_interval 3"
SMALL += " --warmup_iters 1 --lr 3e-3"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return masked_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The folder of a whole run, not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    run_main(main_segmentation, *flags(data, folder, "--save_pictures", "1"))
    return folder


def flags(data: Path, folder: Path | str, *further: str) -> list[str]:
    return [*SMALL.split(), "--data_path", str(data), "--output_dir", str(folder), *further]


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# ---- the recipe


@pytest.mark.parametrize(
    ("row", "rate", "decay", "depth", "rest"),
    [
        (("base", 300), 3e-4, 0.65, 12, (0.1, 0.1)),
        (("base", 800), 2e-4, 0.65, 12, (0.1, 0.1)),
        (("base", 1600), 1e-4, 0.65, 12, (0.1, 0.1)),
        (("large", 1600), 4e-5, 0.95, 24, (1e-5, 0.15)),
    ],
)
def test_rows(row, rate, decay, depth, rest):
    """Rates by layer, what is decayed, layer scale and drop path, as the authors' configurations have them."""
    args = get_args_parser().parse_args(ROWS[row].split())
    args.nb_classes = 150
    assert (args.lr, args.layer_scale_init_value, args.drop_path) == (rate, *rest)
    with torch.device("meta"):
        model = build_model(args)
    names = {id(p): name for name, p in model.named_parameters()}
    scales, decays = {}, {}
    for group in param_groups(model, args.weight_decay, args.layer_decay):
        for p in group["params"]:
            scales[names[id(p)]], decays[names[id(p)]] = group["lr_scale"], group["weight_decay"]
    assert set(names.values()) - set(scales) == {"backbone.pos_embed"}
    expected = {
        "cls_token": 0,
        "patch_embed.proj.bias": 0,
        "blocks.0.gamma_1": 1,
        f"blocks.{depth - 1}.mlp.fc2.weight": depth,
    }
    for name, layer in expected.items():
        assert scales[f"backbone.{name}"] == pytest.approx(decay ** (depth + 1 - layer))
    others = {s for name, s in scales.items() if not re.match(r"backbone\.(blocks|cls_token|patch_embed)", name)}
    assert others == {1.0}
    decayed = {name for name, value in decays.items() if value == 0.05}
    assert set(decays.values()) == {0, 0.05}
    assert "backbone.cls_token" in decayed
    assert "backbone.blocks.0.attn.relative_position_bias_table" in decayed
    assert all((name in decayed) == (model.get_parameter(name).ndim > 1) for name in decays)


def test_defaults(data, monkeypatch):
    """What the published row trains and evaluates with, but for the network's size."""
    caught: list[Any] = []
    monkeypatch.setattr(main_segmentation, "fit", lambda *args: caught.extend(args))
    run_main(main_segmentation, "--model", "upernet_cae_nano", "--data_path", str(data), "--num_workers", "0")
    args, _, loader, updater, set_rates, *_, evaluation = caught
    assert (args.iters, args.eval_interval, args.save_interval, args.auxiliary_weight) == (160000, 16000, 8000, 0.4)
    assert (loader.total, len(loader), loader.batch_size, updater.clip_grad) == (160000, 16000, 2, None)
    view = vars(loader.loader.loader.dataset.transform)
    expected = {"size": (512, 512), "scale": (2048, 512), "ratio": (0.5, 2), "cat_max_ratio": 0.75}
    statistics = {"statistics": (IMAGENET_MEAN, IMAGENET_STD)}
    assert view == expected | statistics
    kwargs = evaluation.keywords
    assert (kwargs["window"], kwargs["stride"], kwargs["flip"]) == (512, 341, False)
    view = vars(kwargs["loader"].loader.dataset.transform)
    assert view == {"scale": (2048, 512), "ratios": (1.0,)} | statistics
    assert type(updater.optimizer) is torch.optim.AdamW
    assert (updater.optimizer.defaults["betas"], updater.optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)
    rates: dict[int, list[float]] = {}
    for update in (0, 750, 1500, 80000):
        set_rates(update)
        rates[update] = [group["lr"] / group["lr_scale"] for group in updater.optimizer.param_groups]
    middle = 2e-4 * (1 - 750 / 160000) * (1 - 0.5 * (1 - 1e-6))
    for update, rate in {0: 2e-10, 750: middle, 1500: 2e-4 * (1 - 1500 / 160000), 80000: 1e-4}.items():
        assert rates[update] == pytest.approx([rate] * len(rates[update]), rel=1e-9)


# ---- a run


def test_a_run_learns(trained):
    lines = log_lines(trained)
    assert [line["iter"] for line in lines] == [3, 5]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert (trained / "pictures" / "0000.png").stat().st_size > 5000
    state = distributed.load(str(trained / "checkpoint.pth"))
    assert state["args"]["class_names"] == ["sky", "wall", "floor"]
    assert state["state_dict"]["decode_head.conv_seg.weight"].shape == (3, 48, 1, 1)


def test_a_stop_inside_an_interval_loses_nothing(data, trained, tmp_path, monkeypatch, capsys):
    """Inside the last interval, which is shorter."""
    with monkeypatch.context() as patch:
        spoil(patch, SegmentationNetwork, 3, stop=True)
        with pytest.raises(SystemExit):
            run_main(main_segmentation, *flags(data, tmp_path))
    run_main(main_segmentation, *flags(data, tmp_path))
    assert "resumed" in capsys.readouterr().out
    assert_same(trained, tmp_path)


@pytest.mark.slow
def test_two_processes_lose_nothing_either(data, tmp_path):
    """With synchronised batch norm; one image per process; by the authors' script and by torchrun."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    own = {folder: flags(data, folder, "--batch_size", "1", "--accum_iter", "2") for folder in (whole, stopped)}
    script = ["bash", "cae/downstream_tasks/semantic_segmentation/tools/dist_train.sh", "upernet_base.py", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    theirs = start([*script, *own[whole], "--seed", "0"], whole / "out", PYTHON=sys.executable, PORT=port)
    assert theirs.wait(timeout=240) == 0, (whole / "out").read_text()
    fault = command(2, str(FAULTS), "cae/main_segmentation.py", *own[stopped])
    assert start(fault, stopped / "out", FAULT="signal_at:8").wait(timeout=240) != 0
    assert "saved epoch 1, step 2" in (stopped / "out").read_text()
    finish(command(2, "cae/main_segmentation.py", *own[stopped]), stopped / "out")
    assert_same(whole, stopped)


def scores(text: str) -> list[str]:
    """The table of classes and the means."""
    return re.findall(r"^(?:\[.*\] mIoU|sky|wall|floor)(.*)$", text, re.MULTILINE)


def test_evaluation__is_that_of_training_on_any_number_of_processes(data, trained, tmp_path, capsys):
    """The last evaluation of the run; the authors' file layout; 3 images on 1 and 2 processes."""
    own = flags(data, trained, "--eval")
    run_main(main_segmentation, *own)
    printed = scores(capsys.readouterr().out)
    last = log_lines(trained)[-1]
    assert (
        printed[-1].split() == f"{last['val_mIoU']:.2f} mAcc {last['val_mAcc']:.2f} aAcc {last['val_aAcc']:.2f}".split()
    )
    state = distributed.load(str(trained / "checkpoint.pth"))["state_dict"]
    theirs = {key: value for key, value in state.items() if not key.endswith("relative_position_index")}
    torch.save({"meta": {"iter": 5, "epoch": 2}, "state_dict": theirs}, tmp_path / "iter_5.pth")
    log = tmp_path / "out"
    own = flags(data, "", "--eval", "--resume", str(tmp_path / "iter_5.pth"))
    assert launch(log, "cae/main_segmentation.py", *own, processes=2) == [0, 0], log.read_text()
    assert scores(log.read_text()) == printed


def test_evaluation__at_several_scales(data, trained, capsys):
    run_main(main_segmentation, *flags(data, trained, "--eval", "--tta", "--stride", "30"))
    assert len(scores(capsys.readouterr().out)) == 4


def test_the_encoder_is_loaded(data, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main_segmentation, "fit", lambda *args: None)
    path = str(trained / "checkpoint.pth")
    run_main(main_segmentation, *flags(data, tmp_path, "--finetune", path))
    backbone = DenseBackbone(32, embed_dim=96, depth=4, num_heads=3, out_indices=(0, 1, 2, 3))
    assert f"encoder from {path}: {len(backbone.state_dict())} tensors matched" in capsys.readouterr().out


# ---- users' mistakes


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ("--batch_size 1", "--batch_size 1: on one process batch norm has a single value per channel"),
        ("--input_size 40", "--model upernet_cae_nano --input_size 40: images of 40x40: relative positions need"),
        (
            "--data_path /nowhere",
            "--data_path /nowhere: expected its folders images/validation and annotations/validation",
        ),
        ("--nb_classes 4", "--nb_classes 4: --data_path "),
        ("--iters 0", "--iters 0: expected at least 1"),
        ("--save_interval 0", "--save_interval 0: expected at least 1"),
        ("--finetune nowhere.pth", "nowhere.pth: no such checkpoint file"),
        ("--eval --output_dir new", "--eval: name the checkpoint to evaluate with --resume"),
        ("--save_pictures 3 --output_dir=", "--save_pictures 3: needs --output_dir"),
        ("--layer_scale_init_value -1", "--layer_scale_init_value -1.0: expected at least 0"),
    ],
)
def test_mistakes(data, tmp_path, capsys, monkeypatch, further, message):
    monkeypatch.chdir(tmp_path)
    error = mistake(main_segmentation, *flags(data, tmp_path / "out", *further.split()), capsys=capsys)
    assert message in error


def test_a_file_of_mmseg_cannot_be_continued(data, trained, tmp_path, capsys):
    state = distributed.load(str(trained / "checkpoint.pth"))
    theirs = {"meta": {"iter": 5, "epoch": 0}, "state_dict": state["state_dict"], "optimizer": state["optimizer"]}
    torch.save(theirs, tmp_path / "iter_5.pth")
    own = flags(data, tmp_path / "out", "--resume", str(tmp_path / "iter_5.pth"))
    assert "it is mmseg's; such a file can be evaluated" in mistake(main_segmentation, *own, capsys=capsys)
