"""The run that the doctor measures: how it is started and ended, what is predicted from it, and how well."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts.tools import doctor, measured_run
from scripts.tools.bench import synthetic_images
from scripts.tools.measured_run import Launch, Measurement, Plan
from tests.support.helpers import ROOT

SCRIPT = "scripts/tools/doctor.py"
TINY = ["--model", "saim_nano", "--query_depth", "1", "--input_size", "16", "--patch_size", "8", "--warmup_epochs", "0"]
TINY += ["--batch_size", "8", "--num_workers", "0", "--epochs", "30"]


def own(method: str = "saim", *words: str) -> argparse.Namespace:
    return doctor.get_args_parser().parse_args([method, *words])


def plan(method: str, *words: str, stage: str = "pretrain", planned: int = 1, here: int = 1) -> Plan:
    made = doctor.make_plan(own(method, "--stage", stage), list(words))
    made.launch = Launch(planned, here)
    return made


def recorded(
    seconds: Sequence[float], wait: float = 0.0, epochs: Sequence[int] = (), rest: float = 0.0, **further: Any
) -> Measurement:
    """A run of 8 images a step, whose steps take so long and wait for images before; epochs begin at some of them."""
    run = Measurement(images=8, output="x: 1 parameters; 800 images, 8 per update, lr 1e-3", **further)
    now, first, epoch = 0.0, 0, 0
    for i, took in enumerate(seconds):
        if i in epochs:
            now, first, epoch = now + rest, i, epoch + 1
        now += wait + took
        line = {"seconds": now, "epoch": epoch, "step": i - first + 1, "steps": 100, "data": wait}
        run.lines.append(line | {"images_per_second": 8 / (wait + took), "memory": 10**9})
    return run


# ---- how it is started and ended


def test_changed__keeps_the_users_folders_and_brings_updates_soon(tmp_path):
    def changed(made: Plan, accum: int) -> argparse.Namespace:
        words = [*made.words, *measured_run.changed(made, accum, tmp_path)]
        return doctor.parsed(made.own.method, made.own.stage, words)[0]

    words = ["--accum_iter", "16", "--output_dir", "mine", "--log_dir", "mine", "--epochs", "9"]
    args = changed(plan("semaim", *words), 2)
    assert (args.output_dir, args.log_dir) == (str(tmp_path / "run"), str(tmp_path / "events"))
    assert (args.accum_iter, args.bad_images, args.epochs) == (2, "skip", 9)
    assert changed(plan("udi", "--update_freq", "4", "--finetune", "none.pth", stage="finetune"), 2).update_freq == 2
    assert changed(plan("udi", "--epochs", "9", "--freeze_last_layer", "1"), 1).freeze_last_layer == 0


def test_is_full__after_warming_up():
    assert not recorded([1.0] * 6).is_full(5)  # three warm up
    assert recorded([1.0] * 9).is_full(5)
    assert not recorded([1.0] * 9, ahead=8).is_full(5)  # batches that were loaded ahead
    assert recorded([10.0] * 4, ahead=8).is_full(5)  # slow steps: after four times as long
    gpu = recorded([1.0] * 19, device=(1, 2))
    assert not gpu.is_full(5)  # its single steps say nothing


def test_said__by_every_main():
    for output, said in {
        "x: 1 parameters on cpu; 9 images, 64 per update, lr 5.00e-05": (9, 64, 5e-5),
        "x: 9 training images, 64 per update (paper: 1024), lr 1e-3": (9, 64, 1e-3),
        "images, 32 per update; 3 x 3 codes an image": (0, 32, 0),
        "nothing": (0, 0, 0),
    }.items():
        assert Measurement(output=output).said == said


# ---- what is predicted


def test_speed_of__steps_and_what_is_between_epochs():
    speed = measured_run.speed_of(recorded([9, 1, 1, 1, 1, 1, 5, 1, 1, 1], epochs=[6], rest=3), 1)
    assert speed is not None
    assert speed.step == 1  # neither the first steps, while warming up, nor an epoch's first one counts
    assert speed.rest == pytest.approx(3)
    disturbed = measured_run.speed_of(recorded([9, 1, 1, *[1] * 9, 5, *[1] * 9]), 1)
    assert disturbed is not None
    assert disturbed.step == 1  # nor the slowest tenth
    assert (disturbed.low, disturbed.high, disturbed.count) == (1, 1, 19)


def test_speed_of__lines_of_several_steps():
    run = recorded([9.0, 9.0, 9.0, *[1.0] * 17])
    for i in range(5):
        line = run.lines[-1] | {"step": 40 + 20 * i, "images_per_second": 8 / 2, "data": 1.0}
        run.lines.append(line | {"seconds": run.lines[-1]["seconds"] + 40})
    speed = measured_run.speed_of(run, 1)
    assert speed is not None
    assert (speed.step, speed.wait) == (pytest.approx((17 + 200) / 117), pytest.approx(100 / 117))


def test_speed_of__waiting_comes_in_bursts():
    run = recorded([1.0] * 11)
    for i in (3, 7):
        run.lines[i] |= {"data": 2.0, "images_per_second": 8 / 3}
    speed = measured_run.speed_of(run, 1)
    assert speed is not None
    assert speed.step == pytest.approx(1 + 2 * 2 / 8)  # two waits of 2 s in eight steps


def test_speed_of__updates_of_several_micro_steps():
    """Measured with two micro-steps per update, of which the second takes two seconds more, predicted for others."""
    run = recorded([9, 3, *[1, 3] * 6], accum=2)
    for accum, step in ((2, 2), (4, 1.5), (8, 1.25)):
        speed = measured_run.speed_of(run, accum)
        assert speed is not None
        assert speed.step == pytest.approx(step)


def test_speed_of__a_gpu_is_right_at_reports():
    run = recorded([0.1] * 20, device=(1, 2))  # the host runs ahead
    for i in range(3):
        line = run.lines[-1] | {"step": 40 + 20 * i, "images_per_second": 8.0}
        run.lines.append(line | {"seconds": run.lines[-1]["seconds"] + 20})
    speed = measured_run.speed_of(run, 1)
    assert speed is not None
    assert speed.step == 1


def test_speed_of__nothing_measured():
    assert measured_run.speed_of(Measurement(), 1) is None


def test_speed_of__saving_and_evaluation_that_no_epoch_showed():
    speed = measured_run.speed_of(recorded([1.0] * 9, saving=2.0, evaluation=96.0), 1)
    assert speed is not None
    assert speed.rest == 100  # saved before and after
    without = measured_run.speed_of(recorded([1.0] * 9, saving=2.0), 1)
    assert without is not None
    assert without.rest == 2


# ---- real runs


def examine(*words: str, timeout: float = 300, **kwargs: Any) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, SCRIPT, *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, **kwargs)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_doctor__a_run_of_the_flags(digits, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = [*TINY, "--data_path", digits, "--output_dir", str(tmp_path / "run")]
    assert doctor.examine(own("saim", "--seconds", "0.2"), words) == 0
    out = capfd.readouterr().out
    for text in ("48 images in 10 classes, 4 to 5 each", "per process at the peak", "whole run:", "MB each, written"):
        assert text in out
    assert "all: 48 readable; shorter side 8 to 8 pixels, median 8" in out
    assert "half of the images are smaller than the run's 16 pixels" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_doctor__continues_a_run_in_the_folder(digits, tmp_path, run_script):
    words = ["--data_path", digits, "--output_dir", str(tmp_path / "run")]
    run_script("saim/main_pretrain.py", *TINY[:-1], "2", *words)
    before = tree(tmp_path)
    done = examine("saim", "--seconds", "0.5", *TINY, *words, "--weight_decay", "0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{tmp_path}/run/checkpoint.pth, epoch 2 of 30" in done.stdout
    assert "other flags: epochs 30 (was 2), weight_decay 0.2 (was 0.05)" in done.stdout
    complete = examine("saim", "--seconds", "0.5", *TINY[:-1], "2", *words)
    assert complete.returncode == 0, complete.stdout + complete.stderr
    assert "it has all of its 2 epochs: the run would end at once -> more --epochs" in complete.stdout
    other = examine("saim", "--seconds", "0.5", *TINY, *words, "--patch_size", "4")
    assert other.returncode == 1
    assert "'model' does not fit this run" in other.stdout
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_doctor__two_processes_and_a_launch(digits, tmp_path, launch):
    words = ["saim", "--seconds", "0.5", *TINY, "--data_path", digits, "--output_dir", str(tmp_path / "run")]
    done = examine(*words, "--processes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "images/s with 2 processes" in done.stdout
    launched = launch(2, SCRIPT, *words)
    assert "torchrun: process 0 of 2" in launched.stdout
    assert "images/s with 2 processes" in launched.stdout
    assert launched.stdout.count("The run can start") == 1
    wrong = examine(*words, "--processes", "2", "--batch_size", "30")
    assert wrong.returncode == 1
    assert "48 training images do not fill one batch on each of 2 processes" in wrong.stdout


@pytest.mark.slow
def test_doctor__broken_images(digits, tmp_path):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (16, 16)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    words = ["saim", "--seconds", "0.2", *TINY, "--data_path", str(tmp_path), "--output_dir", ""]
    done = examine(*words)
    assert done.returncode == 1
    assert f"1 unreadable: {folder / '3.png'}" in done.stdout
    assert "step:" in done.stdout  # the measurement goes on without it
    assert examine(*words, "--bad_images", "skip").returncode == 0


@pytest.mark.slow
def test_doctor__too_little_memory(digits, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))

    words = ["--model", "saim_base", "--batch_size", "48", "--num_workers", "0", "--data_path", digits]
    done = examine("saim", "--seconds", "1", *words, "--output_dir", str(tmp_path), preexec_fn=limit)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the memory of this machine is too small" in done.stdout
    assert "halve --batch_size and double --accum_iter" in done.stdout


@pytest.mark.slow
def test_doctor__without_measuring(digits, tmp_path):
    words = ["--data_path", digits, "--output_dir", str(tmp_path / "run")]
    done = examine("saim", "--no_measure", *TINY, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step:" not in done.stdout
    assert "size not measured" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["finetune", "linprobe"])
def test_doctor__stages_with_evaluations(stage, digits, tmp_path):
    words = ["--model", "vit_nano_patch16", "--input_size", "16", "--patch_size", "8", "--nb_classes", "10"]
    words += ["--finetune", "", "--warmup_epochs", "0", "--batch_size", "8", "--num_workers", "0", "--epochs", "20"]
    words += ["--data_path", digits, "--output_dir", str(tmp_path / "x")]
    done = examine("saim", "--stage", stage, "--seconds", "0.5", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "val:           20 images in 10 classes" in done.stdout
    assert "saving and evaluation" in done.stdout
    assert "evaluation:" in done.stdout
    assert "the evaluation of its checkpoint ended" not in done.stdout


# ---- accuracy: what is predicted, and what the run itself does right afterwards

SMALL = {
    "saim": "--model saim_nano --query_depth 4 --input_size 64 --patch_size 8 --batch_size 16",
    "semaim": "--model aim_nano --query_depth 4 --input_size 64 --patch_size 8 --batch_size 16 --permutation_type "
    "attention_center",
    "cae": "--model cae_nano --input_size 64 --patch_size 8 --second_input_size 64 --num_mask_patches 32 "
    "--decoder_embed_dim 96 --decoder_num_heads 3 --decoder_num_classes 256 --discrete_vae_type customized "
    "--batch_size 16",
    "a2mim": "--backbone resnet_nano --input_size 64 --batch_size 16 --mask_patch_size 16",
    "udi": "--arch vit_nano --global_size 64 --local_size 32 --batch_size 8 --out_dim 4096 --local_crops_number 2",
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> str:
    return synthetic_images(tmp_path_factory.mktemp("photographs"), 160)


def real_run(script: Path, words: list[str], processes: int = 1) -> tuple[float, float, float]:
    """Median seconds, and seconds of processor time, of an epoch after the first; memory at the peak, bytes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher[: 5 * (processes > 1)], str(ROOT / "tests/support/timed_run.py"), str(script)]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("EPOCH")]
    times = [tuple(map(float, line[1:])) for line in lines]
    took, computed = ([b[i] - a[i] for a, b in zip(times, times[1:], strict=False)] for i in (0, 1))
    return statistics.median(took), statistics.median(computed), 1024 * times[-1][2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "processes"), [("saim", 1), ("saim", 2), ("semaim", 1), ("cae", 1), ("a2mim", 1), ("udi", 1)]
)
def test_doctor__predicts_memory_and_speed(method, processes, photographs, tmp_path, monkeypatch, run_script):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [*SMALL[method].split(), "--warmup_epochs", "1", "--epochs", "6", "--num_workers", "1"]
    words += ["--data_path", photographs, "--output_dir", str(tmp_path / "run")]
    words += ["--log_dir", ""] if method == "semaim" else []
    if method == "cae":
        tokenizer = ["--epochs", "1", "--input_size", "64", "--num_tokens", "256", "--hidden_dim", "32"]
        tokenizer += ["--codebook_dim", "64", "--batch_size", "32", "--data_path", photographs]
        run_script("cae/main_tokenizer.py", *tokenizer, "--output_dir", str(tmp_path / "tokenizer"))
        words += ["--discrete_vae_weight_path", str(tmp_path / "tokenizer" / "checkpoint.pth")]
    planned = plan(method, *words, planned=processes, here=processes)
    planned.own.seconds, planned.launch.env = 10.0, dict(os.environ)
    ratios = []
    for i in range(3):  # another program may disturb either of a pair
        folder = tmp_path / str(i)
        folder.mkdir()
        run = measured_run.measure(planned, folder)
        assert run.is_complete, run.output
        speed = measured_run.speed_of(run, 1)
        assert speed is not None
        real = [*words, "--output_dir", str(tmp_path / f"run{i}")]
        took, computed, peak = real_run(planned.script, real, processes)
        assert run.host == pytest.approx(peak, rel=0.10)
        epoch = planned.steps(run) * speed.step + speed.rest
        # Where others hold the cores, only processor time says how long an epoch is.
        busy = min(run.computed, computed / took) < 0.7
        ratio = epoch * run.computed / computed if busy else epoch / took
        ratios.append({"speed": ratio, "busy": busy, "memory": run.host / peak})
        if abs(ratio - 1) < 0.15:
            break
    print(json.dumps({"method": method, "processes": processes, "predicted / real": ratios}))
    assert any(abs(r["speed"] - 1) < 0.15 for r in ratios), ratios
