"""Pre-training and fine-tuning that are stopped, killed, starved of disk or meet a NaN, on one process and on two."""

import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from a2mim import main_finetune, main_pretrain
from a2mim.models_a2mim import MaskedImageModel
from tests.support.a2mim_runs import CASES, SCRIPTS, flags_of, log_of, state_of
from tests.support.helpers import ROOT
from tests.support.processes import CONTEXT, launch, run_script
from tests.support.runs import FAULTS, assert_same, run_main, spoil


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


REST = [pytest.param(*case, marks=pytest.mark.slow) for case in (("resnet", 10), ("finetune_vit", 14))]
STOPS = [("vit", 9), ("finetune", 9), *REST]


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


@pytest.mark.parametrize(
    ("case", "when"),
    [("resnet", 11), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("finetune", 8), ("vit", 0)))],
)
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


@pytest.mark.parametrize("case", ["finetune", pytest.param("resnet", marks=pytest.mark.slow)])
def test_two_processes_with_shared_statistics_meet_a_nan_and_a_stop(digits, reference, tmp_path, case):
    """Together; and go on from either to the weights of a run without them."""
    whole = reference(case, 2, *TWO)
    flags, out = flags_of(case, digits, tmp_path, *TWO), tmp_path / "out"
    faulty = [str(FAULTS), SCRIPTS[case], *flags]
    assert launch(out, *faulty, processes=2, FAULT="nan_at:8") == [1, 1]
    assert "loss is nan, stopping training before the update of step 3" in out.read_text()
    assert "Traceback" not in out.read_text()
    own = ["--resume_from", str(tmp_path / "latest-nonfinite.pth")]
    status = launch(out, *faulty, *own, processes=2, FAULT="signal_at:4")
    assert status == [128 + signal.SIGTERM] * 2, out.read_text()
    assert 10 < state_of(tmp_path)["meta"]["iter"] < 15
    assert launch(out, SCRIPTS[case], *flags, processes=2) == [0, 0]
    assert "resumed" in out.read_text()
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
            own = part["net16"][name]  # of a forward pass in bfloat16, whose statistics are float32
            assert own.dtype == value.dtype
            torch.testing.assert_close(own, value, rtol=0.02, atol=0.02)
    assert parts[0]["y16"].dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat([part["y16"] for part in parts]).float(), y, rtol=0.05, atol=0.05)
