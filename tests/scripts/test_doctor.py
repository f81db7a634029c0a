"""The check before a long run: what it says of recorded measurements, of folders and variables, and of real runs."""

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

from common import distributed
from scripts.tools import doctor
from scripts.tools.bench import synthetic_images
from scripts.tools.doctor import Launch, Measurement, Report
from tests.support.helpers import ROOT

SCRIPT = "scripts/tools/doctor.py"
TINY = ["--model", "saim_nano", "--query_depth", "1", "--input_size", "16", "--patch_size", "8", "--warmup_epochs", "0"]
TINY += ["--batch_size", "8", "--num_workers", "0", "--epochs", "30"]
ONE = Launch(1, 1, False, dict(os.environ))


def flags(method: str, *words: str, stage: str = "pretrain") -> argparse.Namespace:
    return doctor.parsed(ROOT / method / f"main_{stage}.py", list(words))[0]


def own(method: str = "saim", *words: str) -> argparse.Namespace:
    return doctor.get_args_parser().parse_args([method, *words])


def recorded(*events: dict[str, Any], status: int = 0, output: str = "") -> Measurement:
    return Measurement(status, output, list(events), 0.0)


def warnings(capsys: Any) -> list[str]:
    return [line.strip() for line in capsys.readouterr().out.splitlines() if "WARNING" in line or "ERROR" in line]


def steps(seconds: Sequence[float], wait: float = 0.0, accum: int = 1, begin: float = 100.0) -> list[dict[str, Any]]:
    """Events of an epoch whose steps take so long, each waiting for its images first."""
    events: list[dict[str, Any]] = [{"event": "begin", "time": begin}]
    now = begin
    for i, took in enumerate([*seconds, 0.0]):
        more = i < len(seconds)
        events.append({"event": "ask", "time": now, "asked": now, "got": now + wait, "cpu": now, "more": more})
        events[-1] |= {"last": (i + 1) % accum == 0, "warm": i > 0}
        now += wait + took
    return events


# ---- own flags, and those of the main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "sleep"], "--stage sleep: saim has finetune, linprobe, pretrain"),
        (["--processes", "0"], "--processes 0: expected at least 1"),
        (["--seconds", "0"], "--seconds 0: expected more than 0"),
        (["--check_images", "some"], "--check_images some: expected a number of images, or all"),
    ],
)
def test_own_flags__raise_on_mistakes(words, message):
    with pytest.raises(distributed.UserError, match=f"^{message}$"):
        doctor.check_own_flags(own("saim", *words))


def test_examine__stage_that_trains_nothing():
    with pytest.raises(distributed.UserError, match="^--stage knn: trains nothing$"):
        doctor.examine(own("semaim", "--stage", "knn"), [])


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("saim", ["--model", "huge"], "argument --model: invalid choice: 'huge'"),
        ("saim", ["--batch_size", "0"], "main_pretrain.py: --batch_size 0: expected at least 1"),
        ("udi", ["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        ("a2mim", ["none.py"], "main_pretrain.py: none.py: cannot be read (No such file or directory)"),
    ],
)
def test_examine__passes_the_mains_refusal_on(method, words, message, capsys):
    assert doctor.examine(own(method), words) == 1
    assert message in capsys.readouterr().out


# ---- recipe


@pytest.mark.parametrize(
    ("method", "stage", "words", "script", "images"),
    [
        ("saim", "pretrain", ["--model", "saim_base", "--epochs", "800"], "saim_vit_base_800e.sh", 2048),
        ("saim", "finetune", [], "saim_vit_base_800e.sh", 1024),
        ("udi", "pretrain", ["--epochs", "300"], "udi_vit_small_300e.sh", 1024),
        ("cae", "linprobe", ["--model", "cae_large_patch16_224"], "cae_large_1600e.sh", 16384),
        ("a2mim", "pretrain", ["--backbone", "resnet101"], "a2mim_resnet101_300e.sh", 2048),
        ("a2mim", "pretrain", ["--method", "simmim", "--backbone", "vit_large"], "simmim_vit_large_800e.sh", 2048),
    ],
)
def test_paper_row__is_that_of_the_rows_scripts(method, stage, words, script, images):
    row = doctor.paper_row(method, stage, flags(method, *words, stage=stage))
    assert row is not None
    same_script = script.replace("800e", "300e") if stage == "finetune" else script  # both rows fine-tune alike
    assert row.script in (script, same_script)
    assert row.images == images


def recipe(method: str, words: list[str], told: str, epochs: int, planned: int = 1, total: int = 10**6) -> Report:
    args = flags(method, *words)
    script = doctor.parsed(ROOT / method / "main_pretrain.py", words)[1]
    start = {"event": "start", "epochs": epochs, "args": vars(args)}
    run = recorded({"event": "loader", "name": "train", "images": total}, start, output=told)
    launch = Launch(planned, 1, False, {})
    report = Report()
    doctor.check_recipe(report, run, own(method), args, launch, script["get_args_parser"]())
    return report


def test_check_recipe__images_per_update_and_warm_up(capsys):
    words = ["--batch_size", "64", "--epochs", "60"]
    recipe("saim", words, "saim_base: 1 parameters; 9 images, 64 per update, lr 5.00e-05", 60, planned=8)
    out = capsys.readouterr().out
    assert "512 images = --batch_size 64 x --accum_iter 1 x 8 processes" in out
    assert "WARNING: 512 images per update, the paper has 2048 -> --accum_iter 4 keeps the paper's" in out
    assert "4.00e-04: --blr 0.0002 x 512 / 256" in out  # what main computed for one process, times 8
    assert "WARNING: the warm-up takes 50% of the run -> --warmup_epochs 6" in out  # the paper's 30 of 300
    assert "weight_decay 0.05 (0.5)" in out


@pytest.mark.parametrize("network", ["cae_base_patch16_224_8k_vocab", "cae_nano"])
def test_check_recipe__absolute_rates_are_compared(network, capsys):
    words = ["--model", network, "--lr", "1.5e-3", "--batch_size", "64"]
    recipe("cae", words, "x: 1 trained parameters; 9 images, 64 per update (paper: 2048), lr 1.50e-03", 300)
    expected = "--lr 0.0015 is absolute and the paper's for 2048 images per update, this run has 64 -> --lr 4.69e-05 is"
    assert any(expected in line for line in warnings(capsys))


def test_check_recipe__scaled_rate_at_256_images(capsys):
    recipe("udi", ["--batch_size", "256"], "x: 1 trained; 9 images, 256 per update (paper: 1024), lr 5.00e-04", 300)
    assert "5.00e-04: --lr 0.0005 of 256 images per update; it grows with them" in capsys.readouterr().out


def test_check_recipe__network_without_a_row_is_not_warned_of(capsys):
    report = recipe("saim", TINY, "x: 1 parameters; 9 images, 8 per update, lr 6.25e-06", 30)
    assert "no row has saim_nano" in capsys.readouterr().out
    assert report.warnings == 0


# ---- launcher


@pytest.fixture
def machine(monkeypatch):
    """A machine of four cores without a launcher."""
    monkeypatch.setattr(doctor, "cores", lambda: 4)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", *doctor.LAUNCHERS[1], *doctor.LAUNCHERS[2]):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def launch(*words: str, workers: int = 1, device: str = "cpu") -> Launch:
    return doctor.check_launcher(Report(), own("saim", *words), argparse.Namespace(num_workers=workers), device)


def test_check_launcher__plain_python(machine, capsys):
    assert launch() == Launch(1, 1, False, dict(os.environ), 0)
    assert warnings(capsys) == []


def test_check_launcher__more_processes_than_cores_are_extrapolated(machine, capsys):
    planned = launch("--processes", "32")
    assert (planned.planned, planned.here, planned.launched) == (32, 4, False)
    assert "32; measured with 4" in capsys.readouterr().out


def test_check_launcher__threads_and_workers(machine, capsys):
    machine.setenv("OMP_NUM_THREADS", "8")
    launch(workers=10)
    assert warnings(capsys) == [
        "WARNING: 1 x 8 threads on 4 cores -> OMP_NUM_THREADS=4",
        "WARNING: --num_workers 10: 10 loader processes on 4 cores -> --num_workers 4",
    ]
    machine.setenv("OMP_NUM_THREADS", "1")
    launch()
    assert warnings(capsys) == ["WARNING: 1 x 1 threads use half of 4 cores or less -> OMP_NUM_THREADS=4"]
    launch(workers=0, device="cuda")
    assert "WARNING: --num_workers 0: the GPU waits for every image -> --num_workers 4" in warnings(capsys)


def test_check_launcher__slurm_in_an_interactive_shell(machine, capsys):
    for name, value in zip(doctor.LAUNCHERS[3], ("0", "8", "0"), strict=True):
        machine.setenv(name, value)
    found = launch()
    assert (found.planned, found.here, found.launched) == (1, 1, False)
    assert not set(doctor.LAUNCHERS[3]) & set(found.env)  # else the measured run would wait, too
    assert "makes a plain python wait" not in (told := warnings(capsys)[0])
    assert "make a plain python wait for 8 processes -> start it by srun, or unset SLURM_PROCID" in told


def test_check_launcher__started_by_torchrun(machine, capsys):
    for name, value in zip(doctor.LAUNCHERS[0], ("1", "2", "1"), strict=True):
        machine.setenv(name, value)
    assert launch() == Launch(2, 2, True, dict(os.environ), 1)
    assert "torchrun: process 1 of 2" in capsys.readouterr().out
    with pytest.raises(distributed.UserError, match="^--processes 4: this is a launch of 2$"):
        launch("--processes", "4")


def test_check_launcher__incomplete_variables(machine, capsys):
    machine.setenv("WORLD_SIZE", "4")
    launch()
    assert any("WORLD_SIZE=4 is set, but not all" in line for line in warnings(capsys))


def test_check_versions__names_what_does_not_fit(monkeypatch, capsys):
    installed = {"timm": "0.4.5", "torch": "2.14.1+cu130"}
    monkeypatch.setattr(doctor.metadata, "version", lambda name: installed.get(name, "99"))
    doctor.check_versions(Report())
    told = warnings(capsys)
    assert any("timm 0.4.5 is installed, requirements.txt has timm" in line for line in told)
    assert not any("torch 2.14.1" in line for line in told)


# ---- images


@pytest.fixture
def images(tmp_path) -> Path:
    """A list of three images of 10 x 20 pixels, the last one damaged."""
    for i in range(3):
        Image.new("RGB", (10, 20)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    (tmp_path / "list.txt").write_text("".join(f"0\t{tmp_path / f'{i}.png'}\n" for i in range(3)))
    return tmp_path / "list.txt"


@pytest.mark.parametrize("skips", [False, True])
def test_check_images__unreadable_ones(images, skips, capsys):
    report = Report()
    doctor.check_images(report, images, "train", "all", 10, skips)
    assert (len(report.failures), report.warnings) == (int(not skips), int(skips))
    out = capsys.readouterr().out
    assert "all: 2 readable; shorter side 10 to 10 pixels" in out
    assert f"1 unreadable: {images.with_name('2.png')}: " in out
    assert "--bad_images skip" in out


def test_check_images__sampled_and_too_small(images, capsys):
    report = Report()
    doctor.check_images(report, images, "train", "1", 224, True)
    out = capsys.readouterr().out
    assert "1 of 3, sampled" in out
    assert report.warnings == 1  # either damaged or enlarged


def test_check_data__folders_that_are_no_classes(tmp_path, capsys):
    for name in ("photos/train/a", "photos/val/a", "other"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    args = argparse.Namespace(data_path=str(tmp_path), dataset="")
    doctor.check_layout(Report(), {"root": str(tmp_path), "kind": "ClassFolders"}, args)
    nested = tmp_path / "photos"
    out = capsys.readouterr().out
    assert f"WARNING: {nested} is taken for a class, but holds train/ or val/ -> --data_path {nested}" in out
    assert "fine-tuning and probes need them" in out


def test_check_data__batches_that_leave_images_out(tmp_path, capsys):
    loader = {"event": "loader", "name": "train", "images": 100, "steps": 1, "batch_size": 64, "drop_last": True}
    loader |= {"root": "", "kind": "Pictures", "classes": 0}
    args = argparse.Namespace(data_path=str(tmp_path), dataset="torch/x", bad_images="stop", input_size=8)
    run = recorded(loader, {"event": "start", "world_size": 1}, {"event": "done", "bad": ["x.png: unreadable"]})
    report = Report()
    doctor.check_data(report, run, own(), args, Launch(2, 1, False), tmp_path)
    assert report.failures == ["100 images do not fill a batch of 64 on 2 processes"]
    doctor.check_data(report, run, own(), args, Launch(1, 1, False), tmp_path)
    told = warnings(capsys)
    problem = "an epoch leaves out 36% of the images, which fill no batch -> a --batch_size that divides 100 better"
    assert f"WARNING: {problem}" in told
    assert "WARNING: x.png: unreadable -> delete or replace it" in told


# ---- speed


def test_speed_of__median_step_and_gap_between_epochs():
    events = [*steps([9, 1, 1, 1, 5], begin=100), *steps([1, 1, 1], begin=120)]
    speed = doctor.speed_of(recorded(*events), flags("saim"))
    assert speed is not None
    assert speed.step == 1  # neither the first step, while warming up, nor a slow one counts
    assert speed.rest == pytest.approx(120 - 117)  # saving, between the epochs
    assert (speed.low, speed.high, speed.start) == (1, 5, 100)


def test_speed_of__waiting_comes_in_bursts():
    one, other = steps([1.0] * 9), steps([1.0] * 9, wait=2.0)
    for ask, waits in zip(one[1:], other[1:], strict=True):
        ask["got"] += waits["got"] - waits["asked"] if one.index(ask) % 4 == 0 else 0
    shift = 0.0
    for ask in one[1:]:  # a wait delays what comes after it
        wait = ask["got"] - ask["asked"]
        ask["asked"] += shift
        ask["got"] += shift
        shift += wait
    speed = doctor.speed_of(recorded(*one), flags("saim"))
    assert speed is not None
    assert speed.step == pytest.approx(1 + 2 * 2 / 8)  # two waits of 2 s in eight steps


def test_speed_of__updates_of_several_micro_steps():
    seconds = [9, 1, 1, 3] + [1, 1, 1, 3] * 2
    speed = doctor.speed_of(recorded(*steps(seconds, accum=4)), flags("saim", "--accum_iter", "4"))
    assert speed is not None
    assert speed.step == pytest.approx(6 / 4)


def test_speed_of__device_clock_counts_on_a_gpu():
    events = steps([0.1] * 5)  # the host runs ahead
    device = {"event": "device", "seconds": [0.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    speed = doctor.speed_of(recorded(*events, device), flags("saim"))
    assert speed is not None
    assert speed.step == 1


def test_speed_of__nothing_measured():
    assert doctor.speed_of(recorded({"event": "begin", "time": 1.0}), flags("saim")) is None


def test_evaluation_excess__of_batches_that_were_left_out():
    evaluation: list[dict[str, Any]] = [{"event": "evaluation", "time": 10.0, "batches": 100, "batch_size": 4}]
    evaluation += [{"event": "evaluated", "time": 12.0 + i, "done": i} for i in range(5)]
    evaluation += [{"event": "evaluated", "time": 16.0, "done": None}]
    events = [*steps([1, 1], begin=0), *evaluation, *steps([1], begin=20)]
    assert doctor.evaluation_excess(recorded(*events)) == 96  # of 100 batches four were evaluated, a second each


def slow_loader(wait: float, workers: int, *further: dict[str, Any], planned: int = 1) -> Measurement:
    loader = {"event": "loader", "name": "train", "images": 800, "steps": 100, "device": "cpu"}
    run = recorded(loader, {"event": "start", "epochs": 10}, *further, *steps([1.0] * 9, wait))
    doctor.check_speed(
        Report(), run, flags("saim", "--batch_size", "8", "--num_workers", str(workers)), Launch(planned, 1, False)
    )
    return run


def test_check_speed__waiting_for_images(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "cores", lambda: 4)
    slow_loader(1.0, 2, {"event": "alone", "images_per_second": 4.0})
    out = capsys.readouterr().out
    assert "WARNING: training waits for images 50% of the time -> --num_workers 4" in out
    assert "4 images/s alone with --num_workers 2; training could take 8 and waits 50%" in out
    slow_loader(1.0, 4)
    assert any("shrink the images once" in line for line in warnings(capsys))


def test_check_speed__duration_and_extrapolation(capsys):
    slow_loader(0.0, 2, {"event": "resume", "epoch": 5, "images": 400}, planned=4)
    out = capsys.readouterr().out
    assert "epoch:         25 s (25 steps" in out
    assert "3.5 min for 10 epochs, 4.5 of them left" in out  # 100 s until the first step, 4.5 x 25 s
    assert "extrapolated from 1 to 4 processes" in out
    assert "32 images/s, without the exchange" in out


def test_check_speed__cores_that_others_hold(capsys):
    run = slow_loader(0.0, 1)
    for event in run.all("ask"):
        event["cpu"] = 100 + (event["cpu"] - 100) / 2
    doctor.check_speed(Report(), run, flags("saim", "--batch_size", "8"), Launch(1, 1, False))
    assert any("other programs held the cores: the process computed 50%" in line for line in warnings(capsys))


def test_check_memory__what_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "memory_available", lambda: (9e9, 10e9))
    gpu = {"host": 8e9, "allocated": 70e9, "reserved": 78e9, "in_use": 79e9, "total": 80e9}
    run = recorded({"event": "memory", "ranks": [gpu], "workers": 1e9}, {"event": "batch", "bytes": 10**15})
    doctor.check_memory(Report(), run, flags("saim"), ONE)
    told = warnings(capsys)
    assert any("9.00 GB of 9.00 GB available memory would be used -> halve --batch_size" in line for line in told)
    assert any("79.00 GB of the GPU's 80.00 GB are in use" in line for line in told)
    assert any("of /dev/shm" in line and "--shm-size" in line for line in told)


@pytest.mark.parametrize(
    ("status", "output", "problem", "remedy"),
    [
        (-9, "", "the memory of this machine is too small", "halve --batch_size and double --accum_iter"),
        (1, "x\nRuntimeError: [enforce fail] can't allocate memory", "the memory of this machine", "--accum_iter"),
        (1, "torch.OutOfMemoryError: CUDA out of memory. Tried", "the GPU's memory is too small", "--amp_dtype bf16"),
        (1, "RuntimeError: DataLoader worker: Bus error", "the loader's shared memory is full", "--shm-size"),
        (2, "[rank 1] main_pretrain.py: --lr x: wrong\nother", "main_pretrain.py: --lr x: wrong", ""),
        (1, "Traceback\nKeyError: 'x'", "the run ended: KeyError: 'x'", ""),
    ],
)
def test_explain__how_runs_end(status, output, problem, remedy, capsys):
    report = Report()
    doctor.explain(report, recorded(status=status, output=output), Path("main_pretrain.py"))
    assert report.failures[0].startswith(problem)
    assert remedy in capsys.readouterr().out
    assert report.end() == 1


# ---- files


def files_of(folder: Path, *further: dict[str, Any], epochs: int = 100, **changes: Any) -> Measurement:
    files = {"event": "files", "folder": str(folder), "latest": "checkpoint.pth", "numbered": "checkpoint-{epoch}.pth"}
    files |= {"every": 10, "phase": 0, "keep_all": True, "log": "log.txt", **changes}
    start = {"event": "start", "epochs": epochs, "args": {"batch_size": 8, "model": "saim_nano"}}
    return recorded(files, start, *({"event": "resume", "path": "", "epoch": 0, "images": 0}, *further)[-2:])


def saved(size: float) -> dict[str, Any]:
    return {"event": "save", "seconds": 1.0, "files": 1, "bytes": size}


def test_check_files__space_for_checkpoints(tmp_path, monkeypatch, capsys):
    report = Report()
    doctor.check_files(report, files_of(tmp_path / "new" / "run", saved(1e6)))
    out = capsys.readouterr().out
    assert "1 MB each, written in 1 s; 11 numbered ones" in out  # epochs 0, 10, ..., 90, and the last
    assert "14 MB at most" in out
    assert report.warnings == 0
    assert not (tmp_path / "new").exists()
    doctor.check_files(report, files_of(tmp_path, saved(1e15)))
    assert any("the run needs up to" in line and "--save_freq" in line for line in warnings(capsys))


def test_numbered__of_a_run_that_keeps_the_last_one():
    files = {"every": 10, "phase": 1, "keep_all": False}
    assert doctor.numbered(files, 0, 100) == 1
    assert doctor.numbered({**files, "keep_all": True}, 95, 100) == 1
    assert doctor.numbered({**files, "every": 0}, 0, 100) == 0


def test_check_files__folders_that_hold_something(tmp_path, capsys):
    (tmp_path / "note.txt").touch()
    doctor.check_files(Report(), files_of(tmp_path))
    assert any("is not empty (note.txt), but nothing in it is continued" in line for line in warnings(capsys))
    doctor.check_files(Report(), recorded({"event": "files", "folder": ""}, {"event": "start", "epochs": 1}))
    assert warnings(capsys) == ["WARNING: neither checkpoints nor logs are written -> --output_dir DIR"]


def test_check_files__a_folder_in_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    report = Report()
    doctor.check_files(report, files_of(tmp_path / "file" / "run"))
    assert report.failures == [f"--output_dir {tmp_path / 'file' / 'run'}: cannot be written"]


def test_check_files__no_room_to_measure(tmp_path, capsys):
    doctor.check_files(Report(), files_of(tmp_path, {"event": "save", "seconds": 1.0, "error": "x: cannot be written"}))
    assert any("x: cannot be written -> TMPDIR=" in line for line in warnings(capsys))


# ---- real runs


def examine(*words: str, timeout: float = 300, **kwargs: Any) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, SCRIPT, *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, **kwargs)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_doctor__a_run_and_the_folder_that_it_would_continue(digits, tmp_path, run_script):
    words = ["--data_path", digits, "--output_dir", str(tmp_path / "run")]
    done = examine("saim", "--seconds", "0.5", *TINY, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("48 images in 10 classes, 4 to 5 each", "per process at the peak", "whole run:", "MB each, written"):
        assert text in done.stdout
    assert "all: 48 readable; shorter side 8 to 8 pixels, median 8" in done.stdout
    assert "half of the images are smaller than the run's 16 pixels" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_doctor__continues_a_run_in_the_folder(digits, tmp_path, run_script):
    words = ["--data_path", digits, "--output_dir", str(tmp_path / "run")]
    run_script("saim/main_pretrain.py", *TINY[:-1], "2", *words)
    before = tree(tmp_path)
    done = examine("saim", "--seconds", "0.5", *TINY, *words, "--weight_decay", "0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint.pth, epoch 2 of 30" in done.stdout
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
    done = examine(
        "saim", "--stage", stage, "--seconds", "0.5", *words, "--data_path", digits, "--output_dir", str(tmp_path / "x")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "val:           20 images in 10 classes" in done.stdout
    assert "saving and evaluation" in done.stdout


# ---- accuracy: what is predicted, and what the run itself does right afterwards

SMALL = {
    "saim": "--model saim_nano --query_depth 4 --input_size 64 --patch_size 8 --batch_size 16",
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


def computed_between_epochs(run: Measurement) -> float:
    """Seconds of processor time from an epoch's last step to the next one's first."""
    last, spent = 0.0, []
    for event in run.events:
        if event["event"] == "ask":
            last = event["cpu"]
        elif event["event"] == "begin" and last:
            spent.append(event["cpu"] - last)
    return statistics.median(spent)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "processes"), [("saim", 1), ("saim", 2), ("a2mim", 1), ("udi", 1)])
def test_doctor__predicts_memory_and_speed(method, processes, photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [*SMALL[method].split(), "--warmup_epochs", "1", "--epochs", "6", "--num_workers", "1"]
    words += ["--data_path", photographs, "--output_dir", str(tmp_path / "run")]
    script = ROOT / method / "main_pretrain.py"
    args = flags(method, *words)
    ratios = []
    for i in range(3):  # another program may disturb either of a pair
        folder = tmp_path / str(i)
        folder.mkdir()
        run = doctor.measure(script, words, Launch(processes, processes, False, dict(os.environ)), 10.0, folder)
        assert run.first("done"), run.output
        speed = doctor.speed_of(run, args)
        assert speed is not None
        steps = run.first("loader", name="train")["steps"]
        took, computed, peak = real_run(script, [*words[:-1], str(tmp_path / f"run{i}")], processes)
        host = run.first("memory")["ranks"][0]["host"]
        assert host == pytest.approx(peak, rel=0.10)
        wall = (steps * speed.step + speed.rest) / took
        processor = (steps * speed.computed + computed_between_epochs(run)) / computed
        # Where others hold the cores, only processor time tells.
        busy = min(speed.computed / (speed.step - speed.wait), computed / took) < 0.7
        ratios.append({"wall": wall, "processor": processor, "busy": busy, "memory": host / peak})
        if abs((processor if busy else wall) - 1) < 0.15:
            break
    print(json.dumps({"method": method, "processes": processes, "predicted / real": ratios}))
    assert any(abs((r["processor"] if r["busy"] else r["wall"]) - 1) < 0.15 for r in ratios), ratios
