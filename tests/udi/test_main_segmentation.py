"""Segmentation's program: recipe, a run that learns and is resumed, evaluations, the authors' commands, mistakes."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from common import distributed
from common.datasets import IMAGENET_MEAN, IMAGENET_STD
from tests.support.dense import masked_images
from tests.support.helpers import ROOT
from tests.support.processes import launch
from tests.support.runs import FAULTS, arguments, assert_same, command, finish, mistake, run_main, spoil, start
from tests.support.udi_weights import pretrained
from udi import authors_commands, main_segmentation
from udi.backbone import load_backbone, plain_name
from udi.dense_backbone import load_patches, resize
from udi.eval.eval_semantic_segmentation.tools.model_converters import vit2mmseg
from udi.models_segmentation import SegmentationNetwork, semantic_fpn

SMALL = "--arch vit_nano --patch_size 8 --input_size 32 --num_workers 0 --batch_size 2 --iters 5 --eval_interval 3"
SMALL += " --warmup_iters 1 --lr 3e-3"
CONFIG = "configs/udi/semfpn_vit-s16_512x512_40k_ade20k.py"


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


def test_only_positions_are_not_decayed():
    with torch.device("meta"):
        model = semantic_fpn()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, positions = main_segmentation.param_groups(model, 0.01)
    assert (decayed["weight_decay"], positions["weight_decay"]) == (0.01, 0)
    assert [names[id(p)] for p in positions["params"]] == ["backbone.pos_embed"]
    assert len(decayed["params"]) == len(names) - 1


def test_defaults(data, monkeypatch):
    """What the authors' configuration trains and evaluates with, but for the network's size."""
    caught: dict[int, Any] = {}
    monkeypatch.setattr(main_segmentation, "fit", lambda *args: caught.update(enumerate(args)))
    run_main(main_segmentation, "--arch", "vit_nano", "--data_path", str(data), "--num_workers", "0")
    args, model, loader, updater, set_rates, *_, evaluation = caught.values()
    assert model.backbone.pos_embed.shape[1] == 32 * 32
    assert (args.iters, args.eval_interval, args.save_interval, args.lr) == (40000, 4000, 4000, 6e-5)
    assert (loader.total, len(loader), loader.batch_size, updater.clip_grad) == (40000, 4000, 4, None)
    view = vars(loader.loader.loader.dataset.transform)
    statistics = {"statistics": (IMAGENET_MEAN, IMAGENET_STD)}
    assert view == {"size": (512, 512), "scale": (2048, 512), "ratio": (0.5, 2), "cat_max_ratio": 0.75} | statistics
    kwargs = evaluation.keywords
    assert (kwargs.get("window", 0), kwargs["flip"]) == (0, False), "images are seen whole"
    assert vars(kwargs["loader"].loader.dataset.transform) == {"scale": (2048, 512), "ratios": (1.0,)} | statistics
    assert type(updater.optimizer) is torch.optim.AdamW
    assert (updater.optimizer.defaults["betas"], updater.optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)
    middle = 6e-5 * (1 - 750 / 40000) * (1 - 0.5 * (1 - 1e-6))
    for update, rate in {0: 6e-11, 750: middle, 1500: 6e-5 * (1 - 1500 / 40000), 20000: 3e-5}.items():
        set_rates(update)
        assert [group["lr"] for group in updater.optimizer.param_groups] == pytest.approx([rate] * 2, rel=1e-9)


# ---- a run


def test_a_run_learns(trained):
    lines = log_lines(trained)
    assert [line["iter"] for line in lines] == [3, 5]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    assert (trained / "pictures" / "0000.png").stat().st_size > 5000
    state = distributed.load(str(trained / "checkpoint.pth"))
    assert state["args"]["class_names"] == ["sky", "wall", "floor"]
    assert state["state_dict"]["decode_head.conv_seg.weight"].shape == (3, 32, 1, 1)


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
    """With synchronised batch norm; one image per process."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    own = {folder: flags(data, folder, "--batch_size", "1", "--accum_iter", "2") for folder in (whole, stopped)}
    finish(command(2, "udi/main_segmentation.py", *own[whole]), whole / "out")
    fault = command(2, str(FAULTS), "udi/main_segmentation.py", *own[stopped])
    assert start(fault, stopped / "out", FAULT="signal_at:8").wait(timeout=240) != 0
    assert "saved epoch 1, step 2" in (stopped / "out").read_text()
    finish(command(2, "udi/main_segmentation.py", *own[stopped]), stopped / "out")
    assert_same(whole, stopped)


def scores(text: str) -> list[str]:
    """The table of classes and the means."""
    return re.findall(r"^(?:\[.*\] mIoU|sky|wall|floor)(.*)$", text, re.MULTILINE)


@pytest.mark.slow
def test_evaluation__on_two_processes(data, trained, tmp_path, capsys):
    """Of a file in the authors' layout, with the names of mmsegmentation."""
    run_main(main_segmentation, *flags(data, trained, "--eval"))
    printed = scores(capsys.readouterr().out)
    state = distributed.load(str(trained / "checkpoint.pth"))["state_dict"]
    assert "backbone.layers.0.attn.attn.in_proj_weight" in state
    torch.save({"meta": {"iter": 5, "epoch": 2}, "state_dict": state}, tmp_path / "iter_5.pth")
    log, own = tmp_path / "out", flags(data, "", "--eval", "--resume", str(tmp_path / "iter_5.pth"))
    assert launch(log, "udi/main_segmentation.py", *own, processes=2) == [0, 0], log.read_text()
    assert scores(log.read_text()) == printed


def test_evaluation__is_that_of_training(data, trained, capsys):
    run_main(main_segmentation, *flags(data, trained, "--eval"))
    last = log_lines(trained)[-1]
    expected = f"{last['val_mIoU']:.2f}  mAcc {last['val_mAcc']:.2f}  aAcc {last['val_aAcc']:.2f}"
    assert scores(capsys.readouterr().out)[-1].strip() == expected
    run_main(main_segmentation, *flags(data, trained, "--eval", "--tta"))
    assert len(scores(capsys.readouterr().out)) == 4


def test_a_pretrained_backbone_starts_it(data, tmp_path, monkeypatch, capsys):
    """Its patch size counts, also when the run is resumed."""
    path = pretrained(tmp_path / "udi")
    caught: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(main_segmentation, "fit", lambda _, model, *rest: caught.append(model))
        run_main(main_segmentation, *flags(data, tmp_path, "--patch_size", "16", "--pretrained_weights", path))
    vit, found = load_backbone(path), caught[0].backbone
    assert found.blocks[2].attn.qkv.weight.equal(vit["blocks.2.attn.qkv.weight"])
    assert found.pos_embed.equal(resize(vit["pos_embed"][:, 2:], (4, 4)))
    assert "backbone: 51 tensors matched; missing: none" in capsys.readouterr().out
    own = flags(data, tmp_path / "out", "--patch_size", "16", "--pretrained_weights", path, "--iters")
    run_main(main_segmentation, *own, "3")
    run_main(main_segmentation, *own, "4")
    assert "resumed" in capsys.readouterr().out


# ---- the authors' commands


def test_the_authors_command_line():
    words = [CONFIG, "--launcher", "pytorch", "--options", "model.pretrained=a.pth", "data.samples_per_gpu=8"]
    translated = authors_commands.translate([*words, "--data_path", "ade", "--seed", "0"], main_segmentation.ROWS)
    args = arguments(main_segmentation, *translated)
    assert (args.pretrained_weights, args.batch_size, args.data_path) == ("a.pth", 8, "ade")
    assert args.output_dir == f"work_dirs/{Path(CONFIG).stem}"
    words = [CONFIG.replace("udi", "flsl"), "iter_40000.pth", "--eval", "mIoU", "--aug-test", "--work-dir", "here"]
    args = arguments(main_segmentation, *authors_commands.translate(words, main_segmentation.ROWS, test=True))
    assert (args.eval, args.resume, args.tta, args.output_dir) == (True, "iter_40000.pth", True, "here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--launcher", "none"], "expected CONFIG [flags]"),
        (["configs/other.py"], "configs/other.py: expected the configuration semfpn_vit-s16_512x512_40k_ade20k.py"),
        ([CONFIG, "--options", "model.depth=3"], "--options model.depth=3: expected model.pretrained, "),
    ],
)
def test_mistaken_command_lines(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        authors_commands.start(main_segmentation, words)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_authors_launcher(data, tmp_path):
    """The README's line, in its folder, on two processes."""
    tools = ROOT / "udi/eval/eval_semantic_segmentation"
    own = ["--work-dir", str(tmp_path), *SMALL.split(), "--data_path", str(data), "--batch_size", "1"]
    line = ["bash", "tools/dist_train.sh", CONFIG, "2", *own]
    done = subprocess.run(line, cwd=tools, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "5 updates done" in done.stdout
    assert len(log_lines(tmp_path)) == 2


def test_converter(tmp_path, capsys):
    """To mmsegmentation's names, which are read like any file's."""
    path, out = pretrained(tmp_path), tmp_path / "new" / "vit.pth"
    run_main(vit2mmseg, path, str(out))
    state, weights = torch.load(out, weights_only=True), load_patches(path)
    assert "layers.0.ln1.weight" in state and "cls_token" not in state
    assert {plain_name(name): value.shape for name, value in state.items()} == {k: v.shape for k, v in weights.items()}
    assert all(load_patches(str(out))[name].equal(value) for name, value in weights.items())
    assert "DST /proc/x.pth: cannot be written" in mistake(vit2mmseg, path, "/proc/x.pth", capsys=capsys)


# ---- users' mistakes


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ("--input_size 36", "--arch vit_nano: 36 pixels do not divide into patches of 8"),
        ("--data_path /nowhere", "--data_path /nowhere: expected its folders images/validation and annotations/"),
        ("--nb_classes 4", "--nb_classes 4: --data_path "),
        ("--iters 0", "--iters 0: expected at least 1"),
        ("--save_interval 0", "--save_interval 0: expected at least 1"),
        ("--pretrained_weights no.pth", "no.pth: no such checkpoint file"),
        ("--eval --output_dir new", "--eval: name the checkpoint to evaluate with --resume"),
        ("--save_pictures 3 --output_dir=", "--save_pictures 3: needs --output_dir"),
        ("--drop_path 1", "--drop_path 1.0: expected 0 to 1"),
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
