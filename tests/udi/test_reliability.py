"""Pre-training that is stopped, killed, starved of disk or images, and resumed."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.processes import launch
from tests.support.runs import FAULTS, assert_same, mistake, run_main, spoil
from tests.support.udi_runs import CASES, NARROW, SCRIPT, STEPS, broken, flags_of, log_of, state_of, train
from udi import main_pretrain
from udi.models_udi import MultiCropWrapper

pytestmark = pytest.mark.usefixtures("narrow_head")

# ---- stopped and resumed, to the bit: both networks, centres, optimizer, meters and log


@pytest.mark.parametrize(
    ("case", "step"),
    [("accum", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("plain", 8), ("bn", 7)))],
)
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
        pytest.param("plain", 9, "teacher", marks=pytest.mark.slow),
        ("accum", 3, "student"),
        pytest.param("bn", 6, "teacher", marks=pytest.mark.slow),
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


@pytest.mark.parametrize("case", ["accum", pytest.param("bn", marks=pytest.mark.slow)])
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


@pytest.mark.parametrize(
    ("case", "seed"),
    [("accum", 8), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("plain", 0), ("bn", 8)))],
)
def test_a_truncated_image_stops_or_is_skipped(truncated, tmp_path, case, seed, capsys):
    """Whatever batches were seen before it since the last update leave no trace; the seeds put it behind the first."""
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
