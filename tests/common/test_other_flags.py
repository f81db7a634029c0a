"""A folder that holds a run: what a start with other flags does, and two runs at once."""

import subprocess
import sys
from pathlib import Path

import pytest

import a2mim.main_finetune
import cae.main_finetune
import saim.main_finetune
import udi.main_finetune
from common import distributed
from tests.support.runs import mistake, run_main

TINY = ["--model", "vit_nano_patch16", "--input_size", "16", "--patch_size", "8", "--batch_size", "16", "--blr", "0.01"]
TINY += ["--num_workers", "0", "--device", "cpu", "--warmup_epochs", "0", "--drop_path", "0"]


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory) -> list[str]:
    """The command of a finished run of one epoch."""
    command = [*TINY, "--data_path", digits, "--finetune", "", "--weight_decay", "0.1", "--layer_decay", "0.5"]
    command += ["--output_dir", str(tmp_path_factory.mktemp("run")), "--epochs", "1"]
    run_main(saim.main_finetune, *command)
    return command


def folder_of(command: list[str]) -> Path:
    return Path(command[command.index("--output_dir") + 1])


def test_the_same_command_returns_at_once(finished, capsys):
    before = (folder_of(finished) / "log.txt").read_text()
    run_main(saim.main_finetune, *finished, "--num_workers", "1", "--save_freq", "10")
    assert "flags that differ" not in capsys.readouterr().out
    assert (folder_of(finished) / "log.txt").read_text() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--blr", "0.02"], "lr 0.00125 (was 0.000625)"),
        (["--lr", "0.02"], "lr 0.02 (was 0.000625)"),
        (["--batch_size", "8"], "lr 0.000313 (was 0.000625)"),
        (["--finetune", "other.pth"], "--finetune"),
    ],
)
def test_a_finished_run_is_not_taken_for_another(finished, flags, words, capsys):
    error = mistake(saim.main_finetune, *finished, *flags, capsys=capsys)
    assert "holds a finished run of other" in error
    assert words in error
    assert "name another --output_dir, or give more --epochs" in error


def test_a_finished_run_of_other_images(finished, digits, tmp_path, capsys):
    for path in Path(digits).rglob("*.png"):
        link = tmp_path / path.relative_to(digits)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    (tmp_path / "train" / "0" / "more.png").symlink_to(path)
    error = mistake(saim.main_finetune, *finished, "--data_path", str(tmp_path), capsys=capsys)
    assert "images 49 (was 48)" in error


@pytest.mark.parametrize(
    ("flags", "decay", "scale"),
    [([], 0.1, 0.5), (["--weight_decay", "0.3", "--layer_decay", "0.9"], 0.3, 0.9)],
    ids=["the file's hold", "given ones act"],
)
def test_decays_at_a_resume(finished, flags, decay, scale, tmp_path, capsys):
    start = [w for f in ("--weight_decay", "--layer_decay") for w in (f, finished[finished.index(f) + 1])]
    command = [w for w in finished if w not in start]
    options = ["--resume", str(folder_of(finished) / "checkpoint.pth"), "--output_dir", str(tmp_path)]
    run_main(saim.main_finetune, *command, *flags, *options, "--epochs", "2")
    groups = distributed.load(str(tmp_path / "checkpoint.pth"))["optimizer"]["param_groups"]
    assert {g["weight_decay"] for g in groups} == {0.0, decay}
    assert max(g["lr_scale"] for g in groups) == 1.0
    assert min(g["lr_scale"] for g in groups) == pytest.approx(scale**5)
    changed = ["weight_decay 0.3 (was 0.1)", "layer_decay 0.9 (was 0.5)"] if flags else []
    said = capsys.readouterr().out.split("run's: ")[1].splitlines()[0].split(", ")
    assert sorted(said) == sorted(["epochs 2 (was 1)", *changed])


@pytest.mark.parametrize(
    ("main", "flags", "latest"),
    [
        (cae.main_finetune, "--model cae_nano --finetune= --input_size 16 --patch_size 8", "checkpoint.pth"),
        pytest.param(
            a2mim.main_finetune,
            "--backbone resnet_nano --train_size 32 --val_resize 36 --val_crop 32",
            "latest.pth",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            udi.main_finetune,
            "--model vit_nano --finetune= --input_size 16 --patch_size 8",
            "checkpoint.pth",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cae", "a2mim", "udi"],
)
def test_decays_of_a_schedule_at_a_resume(main, flags, latest, digits, tmp_path):
    """They are the file's, too, unless they are given."""
    words = [*flags.split(), "--batch_size", "16", "--num_workers", "0", "--device", "cpu", "--data_path", digits]
    words += ["--output_dir", str(tmp_path), "--warmup_epochs", "0"]
    decays = []
    for i, more in enumerate((["--weight_decay", "0.3"], [], ["--weight_decay", "0.2"]), 1):
        run_main(main, *words, "--epochs", str(i), *more)
        groups = distributed.load(str(tmp_path / latest))["optimizer"]["param_groups"]
        decays.append({group["weight_decay"] for group in groups} - {0.0})
    assert decays == [{0.3}, {0.3}, {0.2}]


HOLD = """
import sys, time
from common import distributed
checkpoint = distributed.Checkpoint(sys.argv[1], None, None, distributed.Files())
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_at_once(finished, capsys):
    """The second is refused; a run that was killed leaves no lock, and an evaluation needs none."""
    folder = folder_of(finished)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        error = mistake(saim.main_finetune, *finished, capsys=capsys)
        assert f"{folder / 'checkpoint.pth'}: another run is writing it" in error
        run_main(saim.main_finetune, *finished, "--eval", "--resume", str(folder / "checkpoint.pth"))
    finally:
        holder.kill()
        holder.wait()
    run_main(saim.main_finetune, *finished)
    assert not list(folder.glob(".*"))  # nor a file
