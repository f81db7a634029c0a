"""Pre-training and fine-tuning that are stopped, killed, starved of disk and resumed; and users' mistakes."""

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from a2mim import main_finetune, main_linprobe, main_pretrain
from a2mim.models_a2mim import Classifier, MaskedImageModel, build_classifier
from a2mim.openmixup import to_openmixup_state_dict
from common import distributed
from tests.support.helpers import ROOT
from tests.support.processes import CONTEXT, launch, run_script
from tests.support.runs import FAULTS, assert_same, mistake, run_main, spoil

# 48 images: 6 steps of 8; or 7 steps of 7, the last one of 6 images and half an update.
SMALL = ["--epochs", "3", "--num_workers", "0", "--warmup_epochs", "1"]
VIT = ["--backbone", "vit_nano", "--patch_size", "8", "--batch_size", "8", "--drop_path", "0.2", "--clip_grad", "1"]
UNEVEN = ["--backbone", "resnet_nano", "--batch_size", "7", "--accum", "2"]
SPECTRUM = ["--loss", "focal_l1", "--fft_weight", "0.5", "--fft_unmask_weight", "1e-3"]
PARAMWISE = ["--paramwise", '[("bias", {"weight_decay": 0.0}), ("mask_", {"weight_decay": 0.0, "lr_mult": 0.1})]']
EVAL = ["--train_size", "32", "--val_resize", "36", "--val_crop", "32", "--nb_classes", "10"]
LAMB = ["--opt", "lamb", "--lr", "1e-2", "--bce", "true", "--by_epoch", "true", "--drop_path", "0.2", "--aug", "rsb"]
EMA = ["--ema", "0.9", "--ema_warmup_iters", "9", "--ema_update_interval", "2"]
MIX = ["--mixup", "0.1", "--cutmix", "1"]
CASES: dict[str, tuple[ModuleType, type, list[str]]] = {
    "vit": (main_pretrain, MaskedImageModel, [*SMALL, *VIT, "--input_size", "64", *PARAMWISE]),
    "resnet": (
        main_pretrain,
        MaskedImageModel,
        [*SMALL, *UNEVEN, *SPECTRUM, *PARAMWISE, "--input_size", "64", "--mask_layer", "3", "--mask_init", "1e-6"],
    ),
    # Repeated augmentation needs 256 images.
    "finetune": (main_finetune, Classifier, [*SMALL, *UNEVEN, *EVAL, *LAMB, *EMA, *MIX]),
    "finetune_vit": (main_finetune, Classifier, [*SMALL, *VIT, *EVAL, *MIX, "--layer_decay", "0.65", "--aug", "swin"]),
}
SCRIPTS = {name: f"a2mim/{Path(str(main.__file__)).name}" for name, (main, *_) in CASES.items()}


def state_of(folder: Path, name: str = "latest.pth") -> dict[str, Any]:
    return distributed.load(str(folder / name))


def flags_of(case: str, digits: str, folder: Path, *further: str) -> list[str]:
    return [*CASES[case][2], "--data_path", digits, "--work_dir", str(folder), "--device", "cpu", *further]


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, digits):
    """Folders of uninterrupted runs by case and number of processes."""
    runs = {}

    def get(case: str, processes: int = 1, *further: str) -> Path:
        key = (case, processes, *further)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("reference")
            flags = flags_of(case, digits, runs[key], *further)
            if processes == 1:
                run_main(CASES[case][0], *flags)
            else:
                assert launch(runs[key] / "out", SCRIPTS[case], *flags, processes=processes) == [0] * processes
        return runs[key]

    return get


@pytest.fixture(scope="module")
def many(digits, tmp_path_factory) -> str:
    """The digits with 260 training images, enough for repeated augmentation."""
    folder = Path(shutil.copytree(digits, tmp_path_factory.mktemp("many") / "images"))
    originals = sorted(folder.glob("train/*/*.png"))
    for i in range(260 - len(originals)):
        path = originals[i % len(originals)]
        os.link(path, path.with_name(f"copy{i}.png"))
    return str(folder)


# ---- stopped and resumed, to the bit


def broken(case: str, digits: str, folder: Path, when: int, stop: bool, *further: str) -> Path:
    """A run that a signal, or a NaN, ends before its training step `when`, and that goes on from there."""
    main, network, _ = CASES[case]
    flags = flags_of(case, digits, folder, *further)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, network, when, stop)
        with pytest.raises(SystemExit) as end:
            run_main(main, *flags)
    assert end.value.code == (128 + signal.SIGTERM if stop else 1)
    name = "latest.pth" if stop else "latest-nonfinite.pth"
    state = state_of(folder, name)
    assert all(value.isfinite().all() for value in state["state_dict"].values() if value.is_floating_point())
    # A stopped run is found by itself.
    run_main(main, *flags, *([] if stop else ["--resume_from", str(folder / name)]))
    return folder


STOPS = [("vit", 9), ("resnet", 6), ("resnet", 10), ("finetune", 2), ("finetune", 9), ("finetune_vit", 14)]


@pytest.mark.parametrize(("case", "when"), STOPS)
def test_a_stop_at_any_step_loses_nothing(digits, reference, tmp_path, case, when, capsys):
    whole = reference(case)
    capsys.readouterr()
    assert_same(whole, broken(case, digits, tmp_path, when, stop=True), "latest.pth")
    assert re.search(r"saved epoch \d, step \d as .*latest.pth; --resume continues", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_stop_at_every_step_loses_nothing(digits, reference, tmp_path, case):
    for when in range(20 if case in ("resnet", "finetune") else 17):  # at the last one the run ends by itself
        assert_same(reference(case), broken(case, digits, tmp_path / str(when), when, stop=True), "latest.pth")


@pytest.mark.parametrize(("case", "when"), [("resnet", 11), ("finetune", 8), ("vit", 0)])
def test_a_nan_is_named_and_the_step_replayed(digits, reference, tmp_path, case, when, capsys):
    whole = reference(case)
    capsys.readouterr()
    folder = broken(case, digits, tmp_path, when, stop=False)
    steps = 6 if case == "vit" else 7
    error = capsys.readouterr().err
    assert f"loss is nan, stopping training before the update of step {when % steps}" in error
    assert error.count("\n") == 1
    assert_same(whole, folder, "latest.pth")


def test_a_nan_keeps_what_was_saved(digits, tmp_path):
    """And the file of the step before it holds no trace of the bad batch, as that of an earlier stop."""
    stopped, nan = tmp_path / "stopped", tmp_path / "nan"
    for folder, stop in ((stopped, True), (nan, False)):
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch, MaskedImageModel, 8 - stop, stop)  # the signal waits for the end of its update: steps 7 and 8
            with pytest.raises(SystemExit):
                run_main(main_pretrain, *flags_of("resnet", digits, folder, "--accum", "1"))
    first, second = state_of(stopped), state_of(nan, "latest-nonfinite.pth")
    assert state_of(nan)["meta"]["iter"] == 7
    assert first["meta"] == second["meta"] == {"epoch": 1, "iter": 8, "seed": 0, "exp_name": ""}
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def test_repeated_augmentation_and_mixing_go_on_as_they_were(many, tmp_path):
    """256 of 260 times 3 images make 9 steps of 30, the last one smaller."""
    own = ["--repeated_aug", "true", "--batch_size", "30", "--accum", "1", "--epochs", "2"]
    run_main(main_finetune, *flags_of("finetune", many, tmp_path / "whole", *own))
    assert state_of(tmp_path / "whole")["meta"]["iter"] == 2 * 9
    assert_same(tmp_path / "whole", broken("finetune", many, tmp_path / "broken", 13, True, *own), "latest.pth")


@pytest.mark.slow
def test_workers_change_nothing(digits, reference, tmp_path):
    folder = broken("resnet", digits, tmp_path, 9, True, "--num_workers", "1")
    assert_same(reference("resnet"), folder, "latest.pth")


def test_average_and_statistics_are_where_they_belong(reference):
    """The averaged parameters under the normal names, live ones under `ema_`, live statistics once."""
    state = state_of(reference("finetune"))["state_dict"]
    live = {name: value for name, value in state.items() if name.startswith("ema_")}
    parameters = [name for name in state if name not in live and not re.search("running|tracked", name)]
    assert sorted(live) == sorted("ema_" + name.replace(".", "_") for name in parameters)
    moved = [not torch.equal(state[name], live["ema_" + name.replace(".", "_")]) for name in parameters]
    assert sum(moved) > len(moved) // 2
    assert state["backbone.bn1.num_batches_tracked"] == 3 * 7


def test_an_evaluation_can_be_stopped_and_is_repeated(digits, reference, tmp_path):
    flags = flags_of("finetune", digits, tmp_path)
    argv = [str(FAULTS), SCRIPTS["finetune"], *flags]
    assert launch(tmp_path / "out", *argv, FAULT="stop_in_eval:4") == [128 + signal.SIGTERM]
    assert state_of(tmp_path)["meta"] == {"epoch": 1, "iter": 14, "seed": 0, "exp_name": ""}
    assert len(log_of(tmp_path)) == 1
    run_main(main_finetune, *flags)
    assert_same(reference("finetune"), tmp_path, "latest.pth")


@pytest.mark.parametrize("case", ["vit", pytest.param("finetune", marks=pytest.mark.slow)])
def test_a_kill_inside_a_save_loses_an_epoch_at_most(digits, reference, tmp_path, case):
    argv = [str(FAULTS), SCRIPTS[case], *flags_of(case, digits, tmp_path)]
    assert launch(tmp_path / "out", *argv, FAULT="kill_in_save:2") == [-signal.SIGKILL]
    assert (tmp_path / "latest.tmp").exists()
    assert state_of(tmp_path)["meta"]["iter"] == (6 if case == "vit" else 7)
    run_main(CASES[case][0], *flags_of(case, digits, tmp_path))
    assert_same(reference(case), tmp_path, "latest.pth")


def test_a_full_disk_keeps_the_previous_checkpoint(digits, reference, tmp_path):
    argv = [str(FAULTS), SCRIPTS["vit"], *flags_of("vit", digits, tmp_path)]
    assert launch(tmp_path / "out", *argv, FAULT="full_disk_at:2") == [2]
    text = (tmp_path / "out").read_text()
    assert text.count("cannot be written") == 1
    assert "Traceback" not in text
    assert state_of(tmp_path)["meta"]["epoch"] == 1
    assert not list(tmp_path.glob("*.tmp"))
    run_main(main_pretrain, *flags_of("vit", digits, tmp_path))
    assert_same(reference("vit"), tmp_path, "latest.pth")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kills_at_random_instants(digits, reference, tmp_path, case):
    flags = flags_of(case, digits, tmp_path)
    for _ in range(4):
        process = CONTEXT.Process(target=run_script, args=([SCRIPTS[case], *flags], str(tmp_path / "out"), {}))
        process.start()
        process.join(timeout=random.uniform(0.1, 1))
        process.kill()
        process.join()
    run_main(CASES[case][0], *flags)
    assert_same(reference(case), tmp_path, "latest.pth")


# ---- two processes

TWO = ["--batch_size", "5", "--sync_bn", "true"]  # 24 images each: 5 steps, the last one of 4 images


@pytest.mark.parametrize(("case", "when"), [pytest.param("resnet", 6, marks=pytest.mark.slow), ("finetune", 7)])
def test_two_processes_with_shared_statistics_stop_and_go_on(digits, reference, tmp_path, case, when):
    whole = reference(case, 2, *TWO)
    flags = flags_of(case, digits, tmp_path, *TWO)
    argv = [str(FAULTS), SCRIPTS[case], *flags]
    status = launch(tmp_path / "out", *argv, processes=2, FAULT=f"signal_at:{when}")
    assert status == [128 + signal.SIGTERM] * 2, (tmp_path / "out").read_text()
    assert 5 < state_of(tmp_path)["meta"]["iter"] < 10
    assert launch(tmp_path / "out", SCRIPTS[case], *flags, processes=2) == [0, 0]
    assert "resumed" in (tmp_path / "out").read_text()
    assert_same(whole, tmp_path, "latest.pth")


def test_two_processes_meet_a_nan_together(digits, reference, tmp_path):
    whole = reference("resnet", 2, *TWO)
    flags = flags_of("resnet", digits, tmp_path, *TWO)
    status = launch(tmp_path / "out", str(FAULTS), SCRIPTS["resnet"], *flags, processes=2, FAULT="nan_at:8")
    assert status == [1, 1]
    text = (tmp_path / "out").read_text()
    assert "loss is nan, stopping training before the update of step 3" in text
    assert "Traceback" not in text
    own = ["--resume_from", str(tmp_path / "latest-nonfinite.pth")]
    assert launch(tmp_path / "out", SCRIPTS["resnet"], *flags, *own, processes=2) == [0, 0]
    assert_same(whole, tmp_path, "latest.pth")


@pytest.mark.slow
def test_two_processes_go_on_as_one_and_back(digits, reference, tmp_path):
    flags = flags_of("finetune", digits, tmp_path, *TWO, "--warmup_epochs", "0")
    assert launch(tmp_path / "out", SCRIPTS["finetune"], *flags, "--epochs", "1", processes=2) == [0, 0]
    run_main(main_finetune, *flags, "--epochs", "2")
    assert launch(tmp_path / "out", SCRIPTS["finetune"], *flags, processes=2) == [0, 0]
    assert [line["epoch"] for line in log_of(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("shared", ["true", "false"])
def test_two_processes_evaluate_what_they_save(digits, tmp_path, shared, capsys):
    """The average, which starts from the same weights on both, with the statistics of process 0."""
    flags = flags_of("finetune", digits, tmp_path, "--batch_size", "5", "--sync_bn", shared)
    flags += ["--epochs", "1", "--warmup_epochs", "0", "--ema", "0.9999"]
    assert launch(tmp_path / "out", SCRIPTS["finetune"], *flags, processes=2) == [0, 0]
    capsys.readouterr()
    run_main(main_finetune, *flags, "--eval", "--resume", str(tmp_path / "latest.pth"))
    line = "head0_top1: {val_head0_top1:.3f}, head0_top5: {val_head0_top5:.3f}".format(**log_of(tmp_path)[0])
    assert line in capsys.readouterr().out


def test_statistics_of_the_joint_batch(tmp_path):
    """Batch norm on 2 processes with 3 and 5 images is that of 8 on one: output, gradients, running statistics."""
    torch.manual_seed(0)
    bn, last = nn.BatchNorm2d(3), nn.BatchNorm2d(4, affine=False)
    net = nn.Sequential(bn, nn.Conv2d(3, 4, 3), last)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x = (torch.randn(8, 3, 6, 5) * torch.arange(1, 9).view(8, 1, 1, 1) + 3).requires_grad_()  # unlike each other
    problem = {"net": net.state_dict(), "x": x.detach(), "slope": torch.randn(8, 4, 4, 3), "sizes": [3, 5]}
    torch.save(problem, tmp_path / "problem")
    script = str(ROOT / "tests" / "support" / "joint_batch.py")
    assert launch(tmp_path / "out", script, str(tmp_path / "problem"), str(tmp_path), processes=2) == [0, 0]
    y = net(x)
    (y * problem["slope"]).sum().backward()
    net.eval()
    parts = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1)]

    def close(found: torch.Tensor, expected: torch.Tensor | None) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    close(torch.cat([part["y"] for part in parts]), y)
    close(torch.cat([part["x"] for part in parts]), x.grad)
    close(torch.cat([part["evaluated"] for part in parts]), net(x))
    for name, parameter in net.named_parameters():
        close(parts[0]["gradients"][name] + parts[1]["gradients"][name], parameter.grad)
    for name, value in net.state_dict().items():
        for part in parts:
            close(part["net"][name], value)


# ---- files


def test_the_last_numbered_file_is_kept(digits, tmp_path):
    run_main(main_pretrain, *flags_of("vit", digits, tmp_path, "--save_every", "2", "--epochs", "5"))
    assert {path.name for path in tmp_path.glob("*.pth")} == {"latest.pth", "latest-previous.pth", "epoch_5.pth"}
    latest, numbered = state_of(tmp_path), state_of(tmp_path, "epoch_5.pth")
    assert latest["meta"] == numbered["meta"] == {"epoch": 5, "iter": 30, "seed": 0, "exp_name": ""}
    assert all(torch.equal(value, numbered["state_dict"][name]) for name, value in latest["state_dict"].items())
    assert state_of(tmp_path, "latest-previous.pth")["meta"]["epoch"] == 4
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, MaskedImageModel, 19, stop=True)  # in the fourth epoch
        with pytest.raises(SystemExit):
            run_main(main_pretrain, *flags_of("vit", digits, tmp_path / "b", "--save_every", "2", "--epochs", "5"))
    assert [path.name for path in (tmp_path / "b").glob("epoch_*.pth")] == ["epoch_2.pth"]  # whole multiples


def official(path: Path, target: Path, steps_as_numbers: bool = True) -> None:
    """The file as upstream writes it: without our keys, whose optimizer has a group per parameter."""
    state = distributed.load(str(path))
    for moments in state["optimizer"]["state"].values():
        if "step" in moments and steps_as_numbers:
            moments["step"] = int(moments["step"])
    groups = [{"params": group["params"], "lr": 1.0, "initial_lr": 1.0} for group in state["optimizer"]["param_groups"]]
    for own, group in zip(groups, state["optimizer"]["param_groups"], strict=True):
        assert len(group["params"]) == 1
        own |= {k: group[k] for k in ("weight_decay", "betas", "eps", "step") if k in group}
    meta = {k: state["meta"][k] for k in ("epoch", "iter")} | {"mmcv_version": "1.7.2", "config": "model = dict()"}
    optimizer = {"state": state["optimizer"]["state"], "param_groups": groups}
    torch.save({"meta": meta, "state_dict": state["state_dict"], "optimizer": optimizer}, target)


VITS = [pytest.param(case, marks=pytest.mark.slow) for case in ("vit", "finetune_vit")]


@pytest.mark.parametrize("case", ["resnet", "finetune", *VITS])
def test_an_official_checkpoint_goes_on_at_its_epoch(digits, reference, tmp_path, case, capsys):
    """With its optimizer's moments and steps and, in fine-tuning, the live weights beside the average."""
    flags = flags_of(case, digits, tmp_path)
    # As if the run of 3 epochs had been ended after its second one.
    whole = reference(case)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, CASES[case][1], 14 if case in ("resnet", "finetune") else 12, stop=True)
        with pytest.raises(SystemExit):
            run_main(CASES[case][0], *flags)
    source = tmp_path / "latest-previous.pth"
    assert distributed.load(str(source))["meta"]["epoch"] == 2
    official(source, tmp_path / "official.pth")
    capsys.readouterr()
    own = ["--work_dir", str(tmp_path / "on"), "--resume_from", str(tmp_path / "official.pth")]
    run_main(CASES[case][0], *flags, *own)
    assert "official.pth: epoch 2, 0 images of it done" in capsys.readouterr().out
    expected, found = state_of(whole), state_of(tmp_path / "on")
    assert found["meta"] == expected["meta"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
    assert log_of(tmp_path / "on") == log_of(whole)[2:]


def test_a_longer_run_goes_on_from_a_finished_one(digits, tmp_path, capsys):
    flags = flags_of("vit", digits, tmp_path, "--sched", "step", "--steps", "100", "--epochs", "2")
    run_main(main_pretrain, *flags)
    capsys.readouterr()
    run_main(main_pretrain, *flags)
    assert "2 epochs done" in capsys.readouterr().out
    run_main(main_pretrain, *flags, "--epochs", "4", "--lr", "1e-4", "--seed", "3", "--batch_size", "6")
    lines = log_of(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [round(line["train_lr"], 6) for line in lines[1:]] == [1.2e-3, 1e-4, 1e-4]
    assert state_of(tmp_path)["meta"]["iter"] == 4 * 8


def test_another_network_in_the_same_folder_is_refused(digits, reference, tmp_path, capsys):
    shutil.copytree(reference("vit"), tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "latest.pth").read_bytes()
    error = mistake(main_pretrain, *flags_of("resnet", digits, tmp_path), capsys=capsys)
    assert "latest.pth: 'model' does not fit this run: " in error
    error = mistake(main_finetune, *flags_of("finetune", digits, tmp_path), capsys=capsys)
    assert "latest.pth: 'model' does not fit this run: " in error
    run_main(main_pretrain, *flags_of("vit", digits, tmp_path))
    assert distributed.load(str(tmp_path / "latest.pth"))["meta"]["epoch"] == 3
    assert before == (tmp_path / "latest.pth").read_bytes()


def test_another_optimizer_in_the_same_folder(digits, tmp_path, capsys):
    run_main(main_finetune, *flags_of("finetune", digits, tmp_path, "--epochs", "2"))
    error = mistake(main_finetune, *flags_of("finetune", digits, tmp_path, "--opt", "adamw"), capsys=capsys)
    assert "does not fit this run" in error


def test_average_can_be_added_and_left_out(digits, tmp_path):
    flags = flags_of("finetune", digits, tmp_path)
    run_main(main_finetune, *flags, "--epochs", "2")
    live = state_of(tmp_path)["state_dict"]["ema_head_fc_weight"]
    run_main(main_finetune, *flags, "--ema", "0", "--lr", "0", "--min_lr", "0")
    state = state_of(tmp_path)["state_dict"]
    assert torch.equal(state["head.fc.weight"], live)
    assert not [name for name in state if name.startswith("ema_")]
    run_main(main_finetune, *flags, "--epochs", "4", "--lr", "0", "--min_lr", "0")
    state = state_of(tmp_path)["state_dict"]
    assert torch.allclose(state["head.fc.weight"], live, rtol=1e-6, atol=0)


def test_resume_from_wins_over_the_folder(digits, reference, tmp_path, capsys):
    flags = flags_of("vit", digits, tmp_path / "own", "--epochs", "2")
    run_main(main_pretrain, *flags)
    capsys.readouterr()
    given = str(reference("vit") / "latest-previous.pth")
    for flag in ("--resume_from", "--resume"):
        run_main(main_pretrain, *flags_of("vit", digits, tmp_path / flag[2:]), flag, given)
        assert f"resumed {given}: epoch 2," in capsys.readouterr().out
    run_main(main_pretrain, *flags, "--resume_from", given, "--epochs", "3", "--auto_resume")
    assert f"resumed {given}: epoch 2," in capsys.readouterr().out
    mine, other = state_of(tmp_path / "own")["state_dict"], state_of(reference("vit"))["state_dict"]
    assert all(torch.equal(value, other[name]) for name, value in mine.items())


def test_weights_alone_start_a_run_anew(digits, reference, tmp_path, capsys):
    """--load_checkpoint takes the whole network, --pretrained the encoder, --resume_from a file without optimizer."""
    source = state_of(reference("vit"))
    torch.save({"state_dict": source["state_dict"]}, tmp_path / "weights.pth")
    still = ["--lr", "0", "--epochs", "2", "--warmup_epochs", "0"]
    for flag, kept in (("--load_checkpoint", ""), ("--resume_from", ""), ("--pretrained", "backbone.layers")):
        folder = tmp_path / flag[2:]
        run_main(main_pretrain, *flags_of("vit", digits, folder, *still, flag, str(tmp_path / "weights.pth")))
        assert [line["epoch"] for line in log_of(folder)] == [1, 2]
        for name, value in state_of(folder)["state_dict"].items():
            if name.startswith(kept):
                assert torch.equal(value, source["state_dict"][name]), (flag, name)


def test_no_folder_writes_nothing(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = flags_of("vit", digits, tmp_path, "--epochs", "2", "--save_recon_every", "0")
    run_main(main_pretrain, *flags, "--work_dir", "")
    assert not list(tmp_path.iterdir())


# ---- unreadable images


@pytest.mark.parametrize("case", ["vit", "finetune"])
def test_a_truncated_image_stops_or_is_skipped(digits, tmp_path, case, capsys):
    images = Path(shutil.copytree(digits, tmp_path / "images"))
    victim = min((images / "train" / "3").iterdir())
    victim = victim.rename(victim.with_suffix(".jpg"))
    Image.effect_noise((40, 40), 50).save(victim)
    victim.write_bytes(victim.read_bytes()[:-300])
    main, _, _ = CASES[case]
    flags = flags_of(case, str(images), tmp_path / "run", "--epochs", "2")
    with pytest.raises(SystemExit) as end:
        run_main(main, *flags)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"{victim}: unreadable image" in error
    assert "--bad_images skip goes on without it" in error
    assert error.count("\n") == 1
    assert state_of(tmp_path / "run")["meta"]["epoch"] == 0  # the position is saved
    run_main(main, *flags, "--bad_images", "skip")
    assert f"{victim}: unreadable image" in capsys.readouterr().out
    assert [line["epoch"] for line in log_of(tmp_path / "run")] == [1, 2]


# ---- users' mistakes on the command line: one line, exit status 2, nothing written

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linear": main_linprobe}
BASES = {
    "pretrain": CASES["resnet"][2],
    "vit": CASES["vit"][2],
    "finetune": CASES["finetune"][2],
    "finetune_vit": CASES["finetune_vit"][2],
    "linear": [*SMALL, *UNEVEN, *EVAL],
}
ENCODER = "--backbone vit_nano --patch_size 8"
BAD = [
    ("pretrain", "--data_path /nowhere", "--data_path /nowhere: no such folder"),
    ("pretrain", "--data_path EMPTY", "has no class folders and no images"),
    ("pretrain", "--data_path HOLLOW", "class folder without images (1 of 1 classes)"),
    ("finetune", "--data_path EMPTY", "has no folder train/, expected"),
    ("finetune", "--data_path FLAT", "has 1 images but no class folders"),
    ("pretrain", "--dataset digits", "--dataset digits: expected one of torch/..."),
    ("pretrain", "--backbone resnet51", "--backbone resnet51: expected one of vit_small, vit_base, "),
    ("finetune", "--backbone resnet51", "resnet51: expected one of vit_small, vit_base, "),
    ("pretrain", "--backbone mae_vit_base", "--backbone mae_vit_base: is for fine-tuning only"),
    ("pretrain", "--mask_patch_size 24", "expected each to be a multiple of the next"),
    ("pretrain", "--mask_patch_size 8", "expected each to be a multiple of the next"),
    ("pretrain", "--mask_patch_size 0", "--mask_patch_size 0: expected at least 1"),
    ("pretrain", "--model_patch_size 8", "resnet_nano has features of 16 pixels at --mask_layer 3"),
    ("pretrain", "--mask_layer 4", "mask_layer 4: expected 0 to 3"),
    ("pretrain", "--mask_layer -1", "mask_layer -1: expected 0 to 3"),
    ("vit", "--mask_layer 4", "mask_layer 4: expected 0 to 3"),
    ("vit", "--patch_size 7", "expected each to be a multiple of the next"),
    ("vit", "--patch_size 0", "--patch_size 0: expected at least 1"),
    ("vit", "--input_size 68", "expected each to be a multiple of the next"),
    ("pretrain", "--input_size 0", "--input_size 0: expected at least 1"),
    ("pretrain", "--input_size 80 --mask_patch_size 16", "--input_size 80"),
    ("pretrain", "--mask_ratio 0", "--mask_ratio 0.0: expected"),
    ("pretrain", "--mask_ratio 1.5", "--mask_ratio 1.5: expected"),
    ("pretrain", "--mask_init -1", "--mask_init -1.0: expected at least 0"),
    ("pretrain", "--crop_scale 0.9 0.1", "--crop_scale [0.9, 0.1]: expected two shares"),
    ("pretrain", "--crop_scale 0 1", "--crop_scale [0.0, 1.0]: expected two shares"),
    ("pretrain", "--fft_weight -1", "--fft_weight -1.0: expected at least 0"),
    ("pretrain", "--fft_unmask_weight 2", "--fft_unmask_weight 2.0: expected 0 to 1"),
    ("pretrain", "--focal_alpha nan", "--focal_alpha nan: expected"),
    ("pretrain", "--focal_gamma -1", "--focal_gamma -1.0: expected"),
    ("pretrain", "--batch_size 0", "--batch_size 0: expected at least 1"),
    ("finetune", "--batch_per_gpu 0", "0: expected at least 1"),
    ("pretrain", "--accum 0", "0: expected at least 1"),
    ("pretrain", "--accum 8", "8: an epoch has only 7 batches"),
    ("pretrain", "--epochs 0", "--epochs 0: expected at least 1"),
    ("pretrain", "--warmup_epochs 3", "--warmup_epochs 3: expected less than --epochs 3"),
    ("finetune", "--warmup_epochs 9", "--warmup_epochs 9: expected less than --epochs 3"),
    ("pretrain", "--warmup_ratio -1", "--warmup_ratio -1.0: expected 0 to 1"),
    ("pretrain", "--sched step", "--sched step: needs the epochs of --steps"),
    ("linear", "--sched step --steps", "--sched step: needs the epochs of --steps"),
    ("pretrain", "--sched step --steps 1 --gamma -1", "--gamma -1.0: expected"),
    ("pretrain", "--betas 0.9 1.0", "--betas 0.9 1.0: "),
    ("finetune", "--betas 2 0.9", "--betas 2.0 0.9: "),
    ("pretrain", "--eps -1", "--eps -1.0: expected"),
    ("linear", "--momentum -1", "--momentum -1.0: expected 0 to 1"),
    ("pretrain", "--lr nan", "--lr nan: expected 0 to"),
    ("pretrain", "--lr -1", "--lr -1.0: expected 0 to"),
    ("pretrain", "--clip_grad 0", "--clip_grad 0.0: expected"),
    ("pretrain", "--device cuda", "--device cuda: no CUDA device"),
    ("pretrain", "--amp_dtype fp16", "--amp_dtype fp16: needs a GPU"),
    ("pretrain", "--seed -1", "--seed -1: expected"),
    ("pretrain", "--num_workers -1", "--num_workers -1: expected at least 0"),
    ("pretrain", "--save_every 0", "--save_every 0: expected at least 1"),
    ("pretrain", "--work_dir /proc/nowhere", "--output_dir /proc/nowhere: cannot be written"),
    ("pretrain", "--work_dir FILE", "cannot be written"),
    ("pretrain", "--resume_from missing.pth", "missing.pth: no such checkpoint file"),
    ("pretrain", "--resume /etc/hostname", "/etc/hostname: not a checkpoint"),
    ("pretrain", "--resume TRUNCATED", "truncated or not a checkpoint"),
    ("pretrain", "--resume VIT", "'model' does not fit this run"),
    ("pretrain", "--load_checkpoint VIT", "tensors are missing"),
    ("pretrain", "--load_checkpoint TRUNCATED", "truncated or not a checkpoint"),
    ("pretrain", "--load_checkpoint missing.pth", "missing.pth: no such checkpoint file"),
    ("pretrain", "--pretrained VIT", "is not this encoder"),
    ("pretrain", "--pretrained VIT --load_checkpoint VIT", "--pretrained and --load_checkpoint: expected one of them"),
    ("finetune", "--pretrained missing.pth", "missing.pth: no such checkpoint file"),
    ("finetune", "--pretrained /etc/hostname", "/etc/hostname: not a checkpoint"),
    ("finetune", "--pretrained TRUNCATED", "truncated or not a checkpoint"),
    ("finetune", "--pretrained VIT", "is not this encoder"),
    ("finetune", "--pretrained FOREIGN", "is not this encoder"),
    ("finetune", "--pretrained LIST", "holds a list, expected a checkpoint"),
    ("finetune", "--pretrained RESNET --backbone resnet18", "is not this encoder"),
    ("finetune_vit", f"--pretrained VIT {ENCODER} --backbone vit_tiny", "is not this encoder"),
    ("finetune_vit", "--pretrained DEEPER", "is not this encoder"),
    ("finetune_vit", "--pretrained SHALLOWER", "is not this encoder"),
    ("finetune_vit", "--pretrained RESNET", "is not this encoder"),
    ("finetune", "--load_checkpoint RESNET", "tensors are missing"),
    ("finetune", "--nb_classes 3", "--nb_classes 3: the training images have 10 classes"),
    ("finetune", "--nb_classes 0", "--nb_classes 0: "),
    ("linear", "--nb_classes 9", "--nb_classes 9: the training images have 10 classes"),
    ("finetune_vit", "--val_crop 40", "--val_crop 40: a ViT is evaluated at its --train_size 32"),
    ("finetune_vit", "--train_size 30 --val_crop 30", "--train_size 30"),
    ("finetune", "--val_crop 0", "--val_crop 0: expected at least 1"),
    ("finetune", "--ra_level 11", "--ra_level 11: expected"),
    ("finetune", "--drop_path 1.5", "--drop_path 1.5: expected 0 to 1"),
    ("finetune", "--smoothing 2", "--smoothing 2.0: expected 0 to 1"),
    ("finetune", "--mixup -1", "--mixup -1.0: expected 0 to"),
    ("finetune", "--ema 2", "--ema 2.0: expected 0 to 1"),
    ("finetune", "--ema_update_interval 0", "--ema_update_interval 0: expected at least 1"),
    ("finetune", "--ema_warmup_iters -1", "--ema_warmup_iters -1: expected at least 0"),
    ("finetune_vit", "--layer_decay 0", "--layer_decay 0.0: expected"),
    ("finetune", "--layer_decay 0.5", "--layer_decay 0.5"),
    ("finetune", "--eval", "--eval: name the checkpoint to evaluate with --resume"),
    ("finetune", "--eval --resume missing.pth", "missing.pth: no such checkpoint file"),
    ("finetune", "--eval --resume RESNET", "tensors are missing"),
    ("linear", "--pretrained /etc/hostname", "/etc/hostname: not a checkpoint"),
    ("linear", "--eval", "--eval: name the checkpoint to evaluate with --resume"),
    ("pretrain", "missing.py", "missing.py: cannot be read (No such file or directory)"),
    ("pretrain", "UNKNOWN", "depth is no flag of this script, see --help"),
    ("pretrain", "CALL", "line 1: expected name = value, a number, text, list ..."),
    ("pretrain", "SYNTAX", "line 2: expected assignments, name = value"),
    ("pretrain", "WRONG", "argument --batch_per_gpu/--batch_size: invalid int value: 'many'"),
    ("pretrain", "CHOICE", "invalid choice: 'l3'"),
    ("pretrain", "/etc/hostname", "/etc/hostname: line 1: expected "),
    ("pretrain", "--cfg-options model.depth=3", "--cfg-options: depth is no flag of this script"),
    ("pretrain", "--cfg-options epochs", "--cfg-options epochs: expected name=value"),
    ("pretrain", "--cfg-options epochs=many", "invalid int value: 'many'"),
]


@pytest.fixture(scope="module")
def files(reference, tmp_path_factory) -> dict[str, str]:
    """What the mistakes name in capitals."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("EMPTY", "HOLLOW/train/0", "FLAT/train", "FLAT/val"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "val"):
        (folder / "FLAT" / split / "0.png").touch()
    texts = {"UNKNOWN": "depth = 3", "CALL": "epochs = int('3')", "SYNTAX": "epochs = 3\nfor", "FILE": ""}
    for name, text in {**texts, "WRONG": "batch_size = 'many'", "CHOICE": "loss = 'l3'"}.items():
        (folder / name).write_text(text + "\n")
    vit, net = (state_of(reference(case)) for case in ("vit", "resnet"))
    data = (reference("vit") / "latest.pth").read_bytes()
    (folder / "TRUNCATED").write_bytes(data[: len(data) // 2])
    layers = {k: v for k, v in vit["state_dict"].items() if k.startswith("backbone.layers.3")}
    deeper = {k.replace("layers.3", "layers.4"): v for k, v in layers.items()}
    checkpoints = {"VIT": vit, "RESNET": net, "LIST": [1], "FOREIGN": {"model": nn.Linear(2, 2).state_dict()}}
    checkpoints["DEEPER"] = {"state_dict": vit["state_dict"] | deeper}
    checkpoints["SHALLOWER"] = {"state_dict": {k: v for k, v in vit["state_dict"].items() if k not in layers}}
    for name, state in checkpoints.items():
        torch.save(state, folder / name)
    names = [path.name for path in folder.iterdir()]
    return {name: str(folder / name) for name in names}


@pytest.mark.parametrize(("script", "own", "expected"), BAD, ids=[f"{script} {own}" for script, own, _ in BAD])
def test_mistakes_are_one_line(script, own, expected, tmp_path, digits, files, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [files.get(word, word) for word in own.split()]
    first = [word for word in words[:1] if not word.startswith("-")]  # a configuration
    given = ["--data_path", digits, "--work_dir", str(tmp_path / "out")]
    main = MAINS["pretrain" if script == "vit" else script.removesuffix("_vit")]
    base = BASES[script] if not first else [word for word in BASES[script] if word != "--loss"]
    base = [word for word in base if word != "focal_l1"] if first else base
    error = mistake(main, *first, *base, *given, *words[len(first) :], capsys=capsys)
    assert expected in error
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(
    ("script", "own", "expected"),
    [
        ("pretrain", ["--method", "mae"], "--method: invalid choice: 'mae'"),
        ("pretrain", ["--loss", "l3"], "--loss: invalid choice: 'l3'"),
        ("pretrain", ["--mask_color", "red"], "--mask_color: invalid choice: 'red'"),
        ("pretrain", ["--mask_token", "ones"], "--mask_token: invalid choice: 'ones'"),
        ("pretrain", ["--betas", "0.9"], "--betas: expected 2 arguments"),
        ("pretrain", ["--sync_bn", "maybe"], "maybe: expected true or false"),
        ("pretrain", ["--paramwise", "bias"], "bias: expected [("),
        ("pretrain", ["--paramwise", '[("bias[", {"weight_decay": 0})]'], '"weight_decay": 0})]: expected [('),
        ("pretrain", ["--paramwise", '[("bias", {"weight_decy": 0})]'], '"weight_decy": 0})]: expected [('),
        ("finetune", ["--aug", "beit"], "--aug: invalid choice: 'beit'"),
        ("finetune", ["--mask_ratio", "0.6"], "unrecognized arguments: --mask_ratio"),
        ("finetune", ["--mix", "0.8"], "unrecognized arguments: --mix"),
    ],
)
def test_unknown_flags_and_choices(script, own, expected, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(MAINS[script], *BASES[script], *own)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 2  # usage, and what is wrong


def test_a_damaged_checkpoint_names_the_one_before(digits, reference, tmp_path, capsys):
    shutil.copytree(reference("vit"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "latest.pth"
    path.write_bytes(path.read_bytes()[:1000])
    error = mistake(main_pretrain, *flags_of("vit", digits, tmp_path), capsys=capsys)
    assert f"{path}: truncated or not a checkpoint; the newest other checkpoint is " in error
    newest = error.strip().rsplit(" ", 1)[1]
    assert newest == str(tmp_path / "epoch_3.pth")
    run_main(main_pretrain, *flags_of("vit", digits, tmp_path, "--epochs", "4"), "--resume", newest)
    assert state_of(tmp_path)["meta"]["epoch"] == 4


def test_another_encoder_does_not_continue_a_run(digits, tmp_path, capsys):
    """A folder's run is continued without a flag, but not one that began with other weights."""
    encoders = [str(tmp_path / f"{k}.pth") for k in (0, 1)]
    for path in encoders:
        torch.save({"state_dict": to_openmixup_state_dict(build_classifier("resnet_nano", 10))}, path)
    own = flags_of("finetune", digits, tmp_path / "run", "--warmup_epochs", "0", "--epochs", "1", "--pretrained")
    run_main(main_finetune, *own, encoders[0])
    assert f"began with {encoders[0]}" in mistake(main_finetune, *own, encoders[1], capsys=capsys)
    run_main(main_finetune, *own, encoders[0])  # done: returns at once
