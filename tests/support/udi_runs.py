"""Small pre-training runs: their flags, files and logs, and how one is stopped and resumed."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from common import distributed
from tests.support.helpers import ROOT
from tests.support.runs import run_main, spoil
from udi import main_pretrain
from udi.models_udi import MultiCropWrapper

SCRIPT = "udi/main_pretrain.py"
NARROW = str(ROOT / "tests" / "support" / "udi_narrow_head.py")
SMALL = "--arch vit_nano --patch_size 8 --global_size 32 --local_size 16 --out_dim 256 --epochs 2 --warmup_epochs 1"
SMALL += " --global_sampling_window_size 2 --local_sampling_window_size 1"
SMALL += " --num_workers 0 --drop_path_rate 0.2 --lr 0.05 --local_crops_number 2 --warmup_teacher_temp_epochs 2"
# 48 images: 6 steps of 8; or 5 steps of 9, which are 2 updates and half of one that is never made.
CASES = {
    "plain": f"{SMALL} --batch_size 8",
    "accum": f"{SMALL} --batch_size 9 --accum_iter 2 --optimizer lars --norm_last_layer false --local_crops_number 1",
    "bn": f"{SMALL} --batch_size 9 --accum_iter 2 --optimizer sgd --use_bn_in_head true --local_crops_number 0",
    "no patches": f"{SMALL} --batch_size 8 --include_patch false",
}
STEPS = {"plain": 6, "accum": 5, "bn": 5, "no patches": 6}
# Entries of a line of log.txt.
NAMES = ["train_loss", "train_g_cl", "train_g_mcl", "train_g_pch", "train_l_cl", "train_l_mcl", "train_mean_entropy"]
NAMES += ["train_entropy", "train_lr", "train_wd", "train_grad_norm", "epoch"]


def state_of(folder: Path, name: str = "checkpoint.pth") -> dict[str, Any]:
    return distributed.load(str(folder / name))


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def flags_of(case: str, digits: str, folder: Path, *further: str) -> list[str]:
    return [*CASES[case].split(), "--data_path", f"{digits}/train", "--output_dir", str(folder), *further]


def train(case: str, digits: str, folder: Path, *further: str) -> None:
    run_main(main_pretrain, *flags_of(case, digits, folder, *further))


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
