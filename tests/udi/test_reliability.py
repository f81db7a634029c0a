"""Pre-training that is stopped, killed, starved of disk and resumed; its files; its variants; users' mistakes."""

import argparse
import json
import math
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import distributed
from tests.support.helpers import ROOT
from tests.support.processes import launch
from tests.support.runs import FAULTS, arguments, assert_same, mistake, run_main, spoil
from tests.support.udi_narrow_head import WIDTHS
from udi import main_pretrain
from udi.models_udi import MODELS, DINOHead, MultiCropWrapper

SCRIPT = "udi/main_pretrain.py"
NARROW = str(ROOT / "tests" / "support" / "udi_narrow_head.py")
SMALL = "--arch vit_nano --patch_size 8 --global_size 64 --local_size 32 --out_dim 256 --epochs 2 --warmup_epochs 1"
SMALL += " --num_workers 0 --drop_path_rate 0.2 --lr 0.05 --local_crops_number 2 --warmup_teacher_temp_epochs 2"
# 48 images: 6 steps of 8; or 5 steps of 9, which are 2 updates and half of one that is never made.
CASES = {
    "plain": f"{SMALL} --batch_size 8",
    "accum": f"{SMALL} --batch_size 9 --accum_iter 2 --optimizer lars --norm_last_layer false --local_crops_number 1",
    "bn": f"{SMALL} --batch_size 9 --accum_iter 2 --optimizer sgd --use_bn_in_head true --local_crops_number 0",
    "no patches": f"{SMALL} --batch_size 8 --include_patch false",
}
TINY = ["--global_size", "32", "--local_size", "16", "--batch_size", "24"]
STEPS = {"plain": 6, "accum": 5, "bn": 5, "no patches": 6}


@pytest.fixture(scope="module", autouse=True)
def narrow_head():
    """Checkpoints are small, in this process; in others by narrow.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DINOHead.__init__, "__defaults__", WIDTHS)
        yield


def state_of(folder: Path, name: str = "checkpoint.pth") -> dict[str, Any]:
    return distributed.load(str(folder / name))


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def flags_of(case: str, digits: str, folder: Path, *further: str) -> list[str]:
    return [*CASES[case].split(), "--data_path", f"{digits}/train", "--output_dir", str(folder), *further]


def train(case: str, digits: str, folder: Path, *further: str) -> None:
    run_main(main_pretrain, *flags_of(case, digits, folder, *further))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, digits):
    """Folders of uninterrupted runs by case and number of processes."""
    runs = {}

    def get(case: str, processes: int = 1, *further: str) -> Path:
        key = (case, processes, *further)
        if key not in runs:
            folder = runs[key] = tmp_path_factory.mktemp("reference")
            if processes == 1:
                train(case, digits, folder, *further)
            else:
                argv = [NARROW, SCRIPT, *flags_of(case, digits, folder, *further)]
                ends = launch(folder / "out", *argv, processes=processes, RECORD=str(folder))
                assert ends == [0] * processes, (folder / "out").read_text()
        return runs[key]

    return get


# ---- stopped and resumed, to the bit: both networks, centres, optimizer, meters and log


def broken(case: str, digits: str, folder: Path, call: int, stop: bool, *further: str) -> Path:
    """A run that a signal, or a NaN, ends at a network's call, and that goes on from there.

    call: two per step; even ones are the teacher's.
    """
    flags = flags_of(case, digits, folder, *further)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, MultiCropWrapper, call, stop)
        with pytest.raises(SystemExit) as end:
            run_main(main_pretrain, *flags)
    assert end.value.code == (128 + signal.SIGTERM if stop else 1)
    name = "checkpoint.pth" if stop else "checkpoint-nonfinite.pth"
    state = state_of(folder, name)
    for part in ("student", "teacher", "udi_loss"):
        assert all(value.isfinite().all() for value in state[part].values())
    run_main(main_pretrain, *flags, *([] if stop else ["--resume", str(folder / name)]))  # a stopped run is found
    return folder


@pytest.mark.parametrize(("case", "step"), [("plain", 8), ("accum", 2), ("bn", 7)])
def test_a_stop_at_any_step_loses_nothing(digits, reference, tmp_path, case, step, capsys):
    whole = reference(case)
    capsys.readouterr()
    assert_same(whole, broken(case, digits, tmp_path, 2 * step, stop=True))
    assert re.search(r"saved epoch \d, step \d as .*checkpoint.pth; --resume continues", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_stop_at_every_step_loses_nothing(digits, reference, tmp_path, case):
    last = 2 * STEPS[case] - 1 - STEPS[case] % 2  # after the last update the run ends by itself
    for step in range(last):
        assert_same(reference(case), broken(case, digits, tmp_path / str(step), 2 * step, stop=True))


@pytest.mark.parametrize(
    ("case", "step", "whose"),
    [
        ("plain", 9, "teacher"),
        ("accum", 3, "student"),
        ("bn", 6, "teacher"),
        pytest.param("no patches", 0, "student", marks=pytest.mark.slow),
    ],
)
def test_a_nan_is_named_and_the_step_replayed(digits, reference, tmp_path, case, step, whose, capsys):
    """The teacher's reaches the centres at once: they are put back."""
    whole = reference(case)
    capsys.readouterr()
    folder = broken(case, digits, tmp_path, 2 * step + (whose == "student"), stop=False)
    error = capsys.readouterr().err
    assert f"loss is nan, stopping training before the update of step {step % STEPS[case]}" in error
    assert error.count("\n") == 1
    assert_same(whole, folder)


@pytest.mark.parametrize("case", ["accum", "bn"])
def test_a_nan_leaves_no_trace(digits, tmp_path, case):
    """The file of the update before it is that of a run which was stopped there; earlier files stay."""
    stopped, nan = tmp_path / "stopped", tmp_path / "nan"
    for folder, stop in ((stopped, True), (nan, False)):
        with pytest.MonkeyPatch.context() as patch:
            # The signal waits for the end of its update: of steps 0 and 1, or 2 and 3, of the second epoch.
            spoil(patch, MultiCropWrapper, 2 * (5 + (0 if stop else 3)), stop)
            with pytest.raises(SystemExit):
                train(case, digits, folder)
    first, second = state_of(stopped), state_of(nan, "checkpoint-nonfinite.pth")
    assert state_of(nan)["epoch"] == first["epoch"] == second["epoch"] == 1
    assert (first["images"], state_of(nan)["images"]) == (18, 0)
    assert second["images"] == 18
    for part in ("student", "teacher", "udi_loss"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), (part, name)


@pytest.mark.slow
def test_workers_change_nothing(digits, reference, tmp_path):
    assert_same(reference("accum"), broken("accum", digits, tmp_path, 12, True, "--num_workers", "1"))


@pytest.mark.parametrize(("case", "when"), [("plain", 3), pytest.param("accum", 2, marks=pytest.mark.slow)])
def test_a_kill_inside_a_save_loses_an_epoch_at_most(digits, reference, tmp_path, case, when):
    """Saves: checkpoint.pth, checkpoint0000.pth, checkpoint.pth, ..."""
    argv = [NARROW, str(FAULTS), SCRIPT, *flags_of(case, digits, tmp_path)]
    assert launch(tmp_path / "out", *argv, FAULT=f"kill_in_save:{when}") == [-signal.SIGKILL]
    assert list(tmp_path.glob("*.tmp"))
    assert state_of(tmp_path)["epoch"] == 1
    assert len(log_of(tmp_path)) == (2 if when == 3 else 1)  # the epoch that is trained again is logged once
    train(case, digits, tmp_path)
    assert_same(reference(case), tmp_path)


@pytest.mark.parametrize("when", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_full_disk_keeps_the_previous_checkpoint(digits, reference, tmp_path, when):
    argv = [NARROW, str(FAULTS), SCRIPT, *flags_of("plain", digits, tmp_path)]
    assert launch(tmp_path / "out", *argv, FAULT=f"full_disk_at:{when}") == [2]
    text = (tmp_path / "out").read_text()
    assert text.count("cannot be written") == 1
    assert "Traceback" not in text
    assert not list(tmp_path.glob("*.tmp"))
    if when == 3:
        assert state_of(tmp_path)["epoch"] == 1
    else:
        assert not list(tmp_path.glob("*.pth"))
        (tmp_path / "log.txt").unlink()
    train("plain", digits, tmp_path)
    assert_same(reference("plain"), tmp_path)


# ---- two processes

TWO = ["--batch_size", "4"]  # 24 images each: 6 steps


def test_two_processes_stop_and_go_on(digits, reference, tmp_path):
    whole = reference("plain", 2, *TWO)
    flags = flags_of("plain", digits, tmp_path, *TWO)
    argv = [NARROW, str(FAULTS), SCRIPT, *flags]
    ends = launch(tmp_path / "out", *argv, processes=2, FAULT="signal_at:15")
    assert ends == [128 + signal.SIGTERM] * 2, (tmp_path / "out").read_text()
    state = state_of(tmp_path)
    assert (state["epoch"], state["images"]) == (1, 16)
    assert launch(tmp_path / "out", NARROW, SCRIPT, *flags, processes=2) == [0, 0]
    assert "resumed" in (tmp_path / "out").read_text()
    assert_same(whole, tmp_path)


def test_all_ranks_hold_the_same(reference):
    """Students, teachers and centres: their seeds are equal, gradients and centres are exchanged."""
    folder = reference("plain", 2, *TWO)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == 2
    assert first == second
    state = state_of(folder)
    assert first[1][2] == [value.double().abs().sum().item() for value in state["udi_loss"].values()]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "call"), [("accum", 12), ("bn", 13)])
def test_two_processes_meet_a_nan_together(digits, reference, tmp_path, case, call):
    """12 calls are 6 steps: of the second epoch, which has 4 of 5 images each, the third one, an update's first."""
    own = ["--batch_size", "5"]
    whole = reference(case, 2, *own)
    flags = flags_of(case, digits, tmp_path, *own)
    argv = [NARROW, str(FAULTS), SCRIPT, *flags]
    assert launch(tmp_path / "out", *argv, processes=2, FAULT=f"nan_at:{call}") == [1, 1]
    text = (tmp_path / "out").read_text()
    assert "loss is nan, stopping training before the update of step 2" in text
    assert "Traceback" not in text
    resume = ["--resume", str(tmp_path / "checkpoint-nonfinite.pth")]
    assert launch(tmp_path / "out", NARROW, SCRIPT, *flags, *resume, processes=2) == [0, 0]
    assert_same(whole, tmp_path)


@pytest.mark.slow
def test_two_processes_go_on_as_one_and_back(digits, tmp_path):
    flags = flags_of("plain", digits, tmp_path, *TWO, "--warmup_epochs", "0", "--warmup_teacher_temp_epochs", "0")
    argv = [NARROW, SCRIPT, *flags]
    assert launch(tmp_path / "out", *argv, "--epochs", "1", processes=2) == [0, 0]
    run_main(main_pretrain, *flags, "--epochs", "2")
    assert launch(tmp_path / "out", *argv, "--epochs", "3", processes=2) == [0, 0]
    assert [line["epoch"] for line in log_of(tmp_path)] == [0, 1, 2]


# ---- files

NAMES = ["train_loss", "train_g_cl", "train_g_mcl", "train_g_pch", "train_l_cl", "train_l_mcl", "train_mean_entropy"]
NAMES += ["train_entropy", "train_lr", "train_wd", "train_grad_norm", "epoch"]


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
    train("no patches", digits, tmp_path, *TINY, "--epochs", "4", "--saveckp_freq", "2")
    names = {path.name for path in tmp_path.glob("*.pth")}
    # The last epoch's is ours.
    numbered = {f"checkpoint{epoch:04}.pth" for epoch in (0, 2, 3)}
    assert names == {"checkpoint.pth", "checkpoint-previous.pth", *numbered}
    assert [state_of(tmp_path, name)["epoch"] for name in sorted(numbered)] == [1, 3, 4]


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
        if "trust_coefficient" in group:
            group |= {"eta": group["trust_coefficient"], "weight_decay_filter": None, "lars_adaptation_filter": None}
        for key in set(group) - {*old, "dampening", "nesterov", "eta", "weight_decay_filter", "lars_adaptation_filter"}:
            del group[key]
    torch.save(found, target)


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


def test_no_folder_writes_nothing(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_main(main_pretrain, *flags_of("plain", digits, tmp_path, *TINY), "--output_dir", "")
    assert not list(tmp_path.iterdir())


# ---- unreadable images


@pytest.fixture(scope="module")
def truncated(digits, tmp_path_factory) -> tuple[str, Path]:
    """The digits, one of them cut off."""
    images = Path(shutil.copytree(digits, tmp_path_factory.mktemp("truncated") / "images"))
    victim = min((images / "train" / "3").iterdir())
    victim = victim.rename(victim.with_suffix(".jpg"))
    Image.effect_noise((40, 40), 50).save(victim)
    victim.write_bytes(victim.read_bytes()[:-300])
    return str(images), victim


@pytest.mark.parametrize(("case", "seed"), [("plain", 0), ("accum", 1), pytest.param("bn", 5, marks=pytest.mark.slow)])
def test_a_truncated_image_stops_or_is_skipped(truncated, tmp_path, case, seed, capsys):
    """Whatever batches were seen before it since the last update leave no trace."""
    images, victim = truncated
    flags = flags_of(case, images, tmp_path / "run", "--seed", str(seed))
    error = mistake(main_pretrain, *flags, capsys=capsys)
    assert f"{victim}: unreadable image" in error
    assert "--bad_images skip goes on without it" in error
    assert state_of(tmp_path / "run")["epoch"] == 0  # the position is saved
    run_main(main_pretrain, *flags, "--bad_images", "skip")
    assert f"{victim}: unreadable image" in capsys.readouterr().out
    train(case, images, tmp_path / "whole", "--seed", str(seed), "--bad_images", "skip")
    assert_same(tmp_path / "whole", tmp_path / "run")


# ---- variants

NO_MCL = [name for name in NAMES if "mcl" not in name]
NO_LOCAL = [name for name in NAMES if "_l_" not in name]
VARIANTS = {
    "--include_patch false": ([name for name in NO_MCL if "pch" not in name], 1, 1),
    "--include_patch false --number_cls_token 2": ([name for name in NO_MCL if "pch" not in name], 1, 1),
    "--include_patch false --local_crops_number 0": (["train_loss", "train_g_cl", *NAMES[6:]], 1, 1),
    "--number_cls_token 1": (NO_MCL, 1, 2),
    "--number_cls_token 1 --local_crops_number 0": ([name for name in NO_LOCAL if "mcl" not in name], 1, 2),
    "--local_crops_number 0": (NO_LOCAL, 2, 3),
    "--use_bn_in_head true": (NAMES, 2, 3),
    "--norm_last_layer false": (NAMES, 2, 3),
    "--optimizer sgd": (NAMES, 2, 3),
    "--optimizer lars": (NAMES, 2, 3),
    "--clip_grad 0": (NAMES, 2, 3),
    "--use_fp16 false --amp_dtype bf16": (NAMES, 2, 3),
    "--amp_dtype bf16": (NAMES, 2, 3),
    "--exact_center --fix_crop_reference": (NAMES, 2, 3),
    "--global_sampling_window_size 4 --local_sampling_window_size 2": (NAMES, 2, 3),
    "--global_sampling_window_size 1 --local_sampling_window_size 1": (NAMES, 2, 3),
    "--local_size 8 --local_sampling_window_size 1 --local_crops_number 1": (NAMES, 2, 3),
    "--warmup_teacher_temp_epochs 30": (NAMES, 2, 3),
    "--warmup_teacher_temp_epochs 0 --alpha 0": (NAMES, 2, 3),
    "--freeze_last_layer 0 --momentum_teacher 1": (NAMES, 2, 3),
}


QUICK = [own for own in VARIANTS if re.search("false|token|number|bn|sgd|lars|clip|30", own)]
OTHERS = [pytest.param(own, marks=pytest.mark.slow) for own in VARIANTS if own not in QUICK]


@pytest.mark.parametrize("own", [*QUICK, *OTHERS])
def test_variants_train(digits, tmp_path, own):
    names, tokens, levels = VARIANTS[own]
    further = [*TINY, "--epochs", "1", "--warmup_epochs", "0", "--freeze_last_layer", "0", *own.split()]
    train("plain", digits, tmp_path, *further)
    (line,) = log_of(tmp_path)
    assert list(line) == names
    assert all(isinstance(value, (int, float)) for value in line.values())
    state = state_of(tmp_path)
    assert state["udi_loss"]["centering.center"].shape == (levels, 256)
    student, teacher = state["student"], state["teacher"]
    assert student["module.backbone.backbone.cls_token"].shape[1] == tokens
    assert sum(name.endswith(".last_layer.weight_v") for name in teacher) == levels
    assert ("backbone.attn.qkv.weight" in teacher) == ("--include_patch false" not in own)
    free = "--norm_last_layer false" in own
    scales = student["module.head.0.last_layer.weight_g"]
    assert torch.equal(scales, torch.ones_like(scales)) != free
    assert ("head.0.mlp.1.running_mean" in teacher) == ("use_bn" in own)
    still = torch.equal(student["module.backbone.backbone.norm.weight"], teacher["backbone.backbone.norm.weight"])
    assert not still
    fresh = torch.equal(teacher["backbone.backbone.norm.weight"], torch.ones(96))
    assert fresh == ("--momentum_teacher 1" in own)
    moments = set().union(*(set(part) for part in state["optimizer"]["state"].values()))
    if "--optimizer" in own:
        assert "exp_avg" not in moments


@pytest.mark.slow
def test_compiled(digits, tmp_path):
    """Alike, but for the random draws of stochastic depth."""
    own = [*TINY, "--epochs", "1", "--warmup_epochs", "0", "--drop_path_rate", "0", "--lr", "1e-3"]
    for further in ([], ["--compile"]):
        train("plain", digits, tmp_path / str(len(further)), *own, *further)
    (plain,), (compiled,) = (log_of(tmp_path / name) for name in "01")
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_teacher_warm_up_longer_than_the_run():
    flags = "--warmup_teacher_temp 0.04 --teacher_temp 0.07 --epochs 3 --warmup_teacher_temp_epochs"
    for epochs, expected in ((30, np.linspace(0.04, 0.07, 30)[:3]), (2, [0.04, 0.07, 0.07]), (0, [0.07] * 3)):
        args = arguments(main_pretrain, *flags.split(), str(epochs))
        assert main_pretrain.build_loss(args).temperatures == pytest.approx(list(expected))


HEADS = {"vit_tiny": 6, "vit_small": 6, "vit_base": 6, "vit_large": 16}


@pytest.mark.parametrize("arch", [*HEADS, "deit_tiny", "deit_small", "deit_base"])
def test_every_network_is_built(arch, monkeypatch):
    """At its real width and depth; the sampling has 6 heads, as upstream's, where 6 divides the width."""
    monkeypatch.setattr(DINOHead.__init__, "__defaults__", (False, True, 3, 2048, 256))
    with torch.device("meta"):
        student = main_pretrain.build_model(arguments(main_pretrain, "--arch", arch))
    vit, attn = student.backbone.backbone, student.backbone.attn
    assert attn is not None
    assert attn.num_heads == HEADS[arch.replace("deit", "vit")]
    own = MODELS[arch.replace("deit", "vit")].keywords
    assert (vit.embed_dim, len(vit.blocks)) == (own["embed_dim"], own["depth"])
    if arch.endswith("small"):
        assert sum(parameter.numel() for parameter in student.parameters()) == 44611456  # of the authors' code
        assert len(student.state_dict()) == 182


def test_a_width_that_6_does_not_divide(digits, tmp_path, monkeypatch):
    """As vit_large's, at toy size: 16 heads sample its patches."""
    small = partial(MODELS["vit_nano"], embed_dim=64, depth=2, num_heads=4)
    monkeypatch.setitem(MODELS, "vit_large", small)
    own = ["--arch", "vit_large", *TINY, "--epochs", "1", "--warmup_epochs", "0"]
    train("plain", digits, tmp_path, *own)
    assert state_of(tmp_path)["teacher"]["backbone.attn.qkv.weight"].shape == (192, 64)


# ---- collapse


@pytest.mark.parametrize(
    ("mean_entropy", "entropy", "expected"),
    [
        (0.5, 0.1, "predicts one prototype of all images"),
        (math.log(256), 0.995 * math.log(256), "predictions are uniform"),
        (3.0, 2.9995, "do not depend on the image"),
        (3.0, 2.0, ""),
        (math.log(256), 2.0, ""),
    ],
)
def test_collapse_is_told(mean_entropy, entropy, expected, capsys):
    main_pretrain.warn_of_collapse({"mean_entropy": mean_entropy, "entropy": entropy}, 256, images=8)
    out = capsys.readouterr().out
    assert out.count("WARNING: collapse: the teacher") == bool(expected)
    assert expected in out


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("--teacher_temp 100 --warmup_teacher_temp_epochs 0", "predictions are uniform"),
        # Features that say nothing.
        ("--warmup_teacher_temp_epochs 0 --teacher_temp 1e-3", "predicts one prototype of all images"),
        pytest.param(
            "--warmup_teacher_temp_epochs 0 --teacher_temp 0.05",
            "do not depend on the image",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_collapse_is_told_of_a_run(digits, tmp_path, own, expected, monkeypatch, capsys):
    plain = DINOHead.bottleneck

    def blind(self, x):
        return plain(self, torch.ones_like(x) + 0 * x)

    if "uniform" not in expected:
        monkeypatch.setattr(DINOHead, "bottleneck", blind)
    further = [*TINY, "--epochs", "1", "--warmup_epochs", "0", "--lr", "0", "--output_dir", ""]
    train("plain", digits, tmp_path, *further, *own.split())
    out = capsys.readouterr().out
    assert out.count("WARNING: collapse: the teacher") == 1
    assert expected in out


# ---- users' mistakes on the command line: one line, exit status 2, nothing written

BAD = [
    ("--data_path /nowhere", "--data_path /nowhere: no such folder"),
    ("--data_path EMPTY", "has no class folders and no images"),
    ("--data_path HOLLOW", "class folder without images (1 of 1 classes)"),
    ("--dataset digits", "--dataset digits: expected one of torch/..."),
    ("--global_crops_scale 0.9 0.1", "--global_crops_scale [0.9, 0.1]: expected two shares, 0 to 1, increasing"),
    ("--global_crops_scale 0 1", "--global_crops_scale [0.0, 1.0]: expected two shares"),
    ("--global_crops_scale 0.5", "--global_crops_scale [0.5]: expected two shares"),
    ("--local_crops_scale 0.05 2", "--local_crops_scale [0.05, 2.0]: expected two shares"),
    ("--local_crops_scale 0.05 0.1 0.2", "--local_crops_scale [0.05, 0.1, 0.2]: expected two shares"),
    ("--local_crops_scale nan nan", "--local_crops_scale [nan, nan]: expected two shares"),
    ("--global_size 60", "expected multiples of 8"),
    ("--local_size 30", "expected multiples of 8"),
    ("--patch_size 7", "expected multiples of 7"),
    ("--patch_size 0", "--patch_size 0: expected at least 1"),
    ("--global_size 0", "--global_size 0: expected at least 1"),
    ("--local_size -8", "--local_size -8: expected at least 1"),
    ("--global_sampling_window_size 9", "sampling windows of 9 and 2 patches: the views have 8 and 4 per side"),
    ("--global_sampling_window_size 0", "0: expected at least 1"),
    ("--local_sampling_window_size 5", "sampling windows of 3 and 5 patches: the views have 8 and 4 per side"),
    ("--local_sampling_window_size -1", "-1: expected at least 1"),
    ("--local_crops_number -1", "--local_crops_number -1: expected at least 0"),
    ("--out_dim 0", "--out_dim 0: expected at least 1"),
    ("--batch_size_per_gpu 0", "--batch_size 0: expected at least 1"),
    ("--batch_size 49", "48 training images do not fill one batch"),
    ("--accum_iter 0", "--accum_iter 0: expected at least 1"),
    ("--accum_iter 7", "--accum_iter 7: an epoch has only 6 batches"),
    ("--epochs 0", "--epochs 0: expected at least 1"),
    ("--warmup_epochs 3", "a warm-up of 18 steps does not fit into 12 steps"),
    ("--warmup_epochs -1", "--warmup_epochs -1: expected at least 0"),
    ("--lr nan", "--lr nan: expected 0 to"),
    ("--min_lr -1", "--min_lr -1.0: expected 0 to"),
    ("--weight_decay -1", "--weight_decay -1.0: expected 0 to"),
    ("--weight_decay_end nan", "--weight_decay_end nan: expected 0 to"),
    ("--clip_grad -1", "--clip_grad -1.0: expected at least"),
    ("--momentum_teacher 1.1", "--momentum_teacher 1.1: expected 0 to 1"),
    ("--alpha 2", "--alpha 2.0: expected 0 to 1"),
    ("--teacher_temp 0", "--teacher_temp 0.0: expected at least"),
    ("--warmup_teacher_temp nan", "--warmup_teacher_temp nan: expected at least"),
    ("--warmup_teacher_temp_epochs -1", "--warmup_teacher_temp_epochs -1: expected at least 0"),
    ("--drop_path_rate 1.5", "--drop_path_rate 1.5: expected 0 to 1"),
    ("--freeze_last_layer -1", "--freeze_last_layer -1: expected at least 0"),
    ("--device cuda", "--device cuda: no CUDA device"),
    ("--device tpu", "--device tpu: expected auto, cpu, cuda"),
    ("--amp_dtype fp16", "--amp_dtype fp16: needs a GPU"),
    ("--seed -1", "--seed -1: expected"),
    ("--num_workers -1", "--num_workers -1: expected at least 0"),
    ("--saveckp_freq 0", "--saveckp_freq 0: expected at least 1"),
    ("--start_epoch -1", "--start_epoch -1: expected at least 0"),
    ("--output_dir /proc/nowhere", "--output_dir /proc/nowhere: cannot be written"),
    ("--output_dir FILE", "cannot be written"),
    ("--resume missing.pth", "missing.pth: no such checkpoint file"),
    ("--resume EMPTY", "is a folder, expected a checkpoint file"),
    ("--resume /etc/hostname", "/etc/hostname: not a checkpoint"),
    ("--resume TRUNCATED", "truncated or not a checkpoint"),
    ("--resume LIST", "holds a list, expected a checkpoint"),
    ("--resume FOREIGN", "'model' does not fit this run"),
    ("--resume BACKBONE", "holds no weights under 'student'"),
    ("--resume CODE", "it would execute posix.system; refused"),
    ("--resume WHOLE --number_cls_token 1", "'model' does not fit this run"),
    ("--resume WHOLE --include_patch false", "'model' does not fit this run"),
    ("--resume WHOLE --arch vit_tiny", "'model' does not fit this run"),
    ("--resume WHOLE --out_dim 128", "'model' does not fit this run"),
    ("--resume WHOLE --optimizer sgd", "'optimizer' does not fit this run"),
    ("--resume WHOLE --norm_last_layer false", "'optimizer' does not fit this run"),
]


class Code:
    """What a hostile pickle runs."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def files(reference, tmp_path_factory) -> dict[str, str]:
    """What the mistakes name in capitals."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("EMPTY", "HOLLOW/train/0"):
        (folder / name).mkdir(parents=True)
    (folder / "FILE").touch()
    source = reference("plain") / "checkpoint.pth"
    shutil.copy(source, folder / "WHOLE")
    data = source.read_bytes()
    (folder / "TRUNCATED").write_bytes(data[: len(data) // 2])
    teacher = distributed.load(str(source))["teacher"]
    prefix = "backbone.backbone."
    vit = {name.removeprefix(prefix): value for name, value in teacher.items() if name.startswith(prefix)}
    contents = {"LIST": [1], "FOREIGN": {"model": nn.Linear(2, 2).state_dict()}, "BACKBONE": vit, "CODE": {"x": Code()}}
    for name, content in contents.items():
        torch.save(content, folder / name)
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize(("own", "expected"), BAD, ids=[own for own, _ in BAD])
def test_mistakes_are_one_line(own, expected, tmp_path, digits, files, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [files.get(word, word) for word in own.split()]
    error = mistake(main_pretrain, *flags_of("plain", digits, tmp_path / "out", *words), capsys=capsys)
    assert expected in error
    assert not list(tmp_path.rglob("*.pth"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("--arch resnet50", "--arch: invalid choice: 'resnet50'"),
        ("--number_cls_token 3", "--number_cls_token: invalid choice: 3"),
        ("--optimizer adam", "--optimizer: invalid choice: 'adam'"),
        ("--include_patch maybe", "maybe: expected true or false"),
        ("--norm_last_layer", "--norm_last_layer: expected one argument"),
        ("--out_dim many", "--out_dim: invalid int value: 'many'"),
        ("--amp_dtype fp8", "--amp_dtype: invalid choice: 'fp8'"),
        ("--local_crops 3", "unrecognized arguments: --local_crops 3"),  # no abbreviations
    ],
)
def test_unknown_flags_and_choices(own, expected, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(main_pretrain, *own.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 2  # usage, and what is wrong


def test_another_network_in_the_same_folder_is_refused(digits, reference, tmp_path, capsys):
    shutil.copytree(reference("plain"), tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    error = mistake(main_pretrain, *flags_of("no patches", digits, tmp_path), capsys=capsys)
    assert "checkpoint.pth: 'model' does not fit this run: " in error
    assert before == (tmp_path / "checkpoint.pth").read_bytes()


def test_a_damaged_checkpoint_names_the_one_before(digits, reference, tmp_path, capsys):
    shutil.copytree(reference("plain"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:1000])
    error = mistake(main_pretrain, *flags_of("plain", digits, tmp_path), capsys=capsys)
    assert f"{path}: truncated or not a checkpoint; the newest other checkpoint is " in error
    assert error.strip().rsplit(" ", 1)[1].endswith(("checkpoint0001.pth", "checkpoint-previous.pth"))
