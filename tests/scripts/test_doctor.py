"""The check before a long run: what it says of recorded measurements, of folders and variables."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common import distributed
from common.datasets import ImageFiles
from scripts.tools import doctor, shapes
from scripts.tools.doctor import Report
from scripts.tools.measured_run import Launch, Measurement
from tests.scripts.test_measured_run import TINY, own, plan, recorded


def warnings(capsys: Any) -> list[str]:
    return [line.strip() for line in capsys.readouterr().out.splitlines() if "WARNING" in line or "ERROR" in line]


# ---- own flags, and those of the main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "sleep"], "--stage sleep: saim has finetune, linprobe, pretrain"),
        (["--processes", "0"], "--processes 0: expected at least 1"),
        (["--seconds", "0"], "--seconds 0.0: expected at least 0.1"),
        (["--check_images", "some"], "--check_images some: expected a number of images, or all"),
    ],
)
def test_own_flags__raise_on_mistakes(words, message):
    with pytest.raises(distributed.UserError, match=f"^{message}$"):
        doctor.check_own_flags(own("saim", *words))


@pytest.mark.parametrize("words", [["no_such_method"], ["saim", "--seconds"], ["saim", "--seconds", "long"]])
def test_a_wrong_flag__is_one_line(words, capsys):
    with pytest.raises(SystemExit) as end:
        distributed.run(lambda known: None, lambda: doctor.get_args_parser().parse_known_args(words))
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert (text.count("\n"), "argument" in text) == (1, True)


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


@pytest.mark.parametrize(
    ("method", "stage", "words", "folder"),
    [
        ("saim", "pretrain", ["--output_dir", "x"], "x"),
        ("cae", "pretrain", ["--model", "cae_nano"], "runs/cae_nano"),
        ("cae", "attentive", ["--model", "cae_nano"], "runs/cae_nano_attentive"),
        ("udi", "pretrain", ["--arch", "vit_nano"], "runs/udi_vit_nano"),
        ("udi", "linprobe", ["--pretrained_weights", "run/checkpoint.pth"], "run/"),  # beside the weights
        ("udi", "semi_supervised", ["--finetune", "run/vit.pth"], "run/semi_supervised_learning/"),
    ],
)
def test_plan__folder_of_the_run(method, stage, words, folder):
    assert plan(method, *words, stage=stage).folder.startswith(folder)


# ---- recipe


@pytest.mark.parametrize(
    ("method", "stage", "words", "script", "images"),
    [
        ("saim", "pretrain", ["--model", "saim_base", "--epochs", "800"], "saim_vit_base_800e.sh", 2048),
        ("saim", "finetune", [], "saim_vit_base_800e.sh", 1024),
        ("udi", "pretrain", ["--epochs", "300"], "udi_vit_small_300e.sh", 1024),
        ("cae", "linprobe", ["--model", "cae_large_patch16_224"], "cae_large_1600e.sh", 16384),
        ("a2mim", "pretrain", ["--backbone", "resnet101"], "a2mim_resnet101_300e.sh", 2048),
        ("cae", "segmentation", ["--lr", "2e-4"], "cae_base_800e.sh", 16),
        ("a2mim", "detection", ["--recipe", "r50_c4_2x"], "a2mim_resnet50_300e.sh", 16),
        ("a2mim", "pretrain", ["--method", "simmim", "--backbone", "vit_large"], "simmim_vit_large_800e.sh", 2048),
    ],
)
def test_paper_row__is_that_of_the_rows_scripts(method, stage, words, script, images):
    row = doctor.paper_row(method, stage, plan(method, *words, stage=stage).args)
    assert row is not None
    same_script = script.replace("800e", "300e") if stage == "finetune" else script  # both rows fine-tune alike
    assert row.script in (script, same_script)
    assert row.images == images


def recipe(method: str, words: list[str], said: str, planned: int = 1) -> Report:
    report = Report()
    doctor.check_recipe(report, plan(method, *words, planned=planned), Measurement(output=said))
    return report


def test_check_recipe__images_per_update_and_warm_up(capsys):
    words = ["--batch_size", "64", "--epochs", "60"]
    recipe("saim", words, "saim_base: 1 parameters; 1000000 images, 64 per update, lr 5.00e-05", planned=8)
    out = capsys.readouterr().out
    assert "512 images = --batch_size 64 x --accum_iter 1 x 8 processes" in out
    assert "WARNING: 512 images per update, the published row has 2048 -> --accum_iter 4 keeps the published" in out
    assert "4.00e-04: --blr 0.0002 x 512 / 256" in out  # what main computed for one process, times 8
    assert "WARNING: the warm-up takes 50% of the run -> --warmup_epochs 6" in out  # the row's 30 of 300
    assert "weight_decay 0.05 (0.5)" in out


@pytest.mark.parametrize("network", ["cae_base_patch16_224_8k_vocab", "cae_nano"])
def test_check_recipe__absolute_rates_are_compared(network, capsys):
    words = ["--model", network, "--lr", "1.5e-3", "--batch_size", "64"]
    recipe("cae", words, "x: 1 trained parameters; 1000000 images, 64 per update (paper: 2048), lr 1.50e-03")
    expected = "--lr 0.0015 is absolute and published for 2048 images per update, this run has 64 -> --lr 4.69e-05 is"
    assert any(expected in line for line in warnings(capsys))


def test_check_recipe__scaled_rate_at_256_images(capsys):
    recipe("udi", ["--batch_size", "256"], "x: 1 trained; 9 images, 256 per update (paper: 1024), lr 5.00e-04")
    assert "5.00e-04: --lr 0.0005 x 256 / 256" in capsys.readouterr().out


def test_check_recipe__network_without_a_row_is_not_warned_of(capsys):
    report = recipe("saim", TINY, "x: 1 parameters; 1000000 images, 8 per update, lr 6.25e-06")
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
    assert launch(workers=0, device="cuda").on_gpu
    assert "WARNING: --num_workers 0: the GPU waits for every image -> --num_workers 4" in warnings(capsys)


def test_check_launcher__slurm_in_an_interactive_shell(machine, capsys):
    for name, value in zip(doctor.LAUNCHERS[3], ("0", "8", "0"), strict=True):
        machine.setenv(name, value)
    found = launch()
    assert (found.planned, found.here, found.launched) == (1, 1, False)
    assert not set(doctor.LAUNCHERS[3]) & set(found.env)  # else the measured run would wait, too
    assert "makes a plain python wait" not in (said := warnings(capsys)[0])
    assert "make a plain python wait for 8 processes -> start it by srun, or unset SLURM_PROCID" in said


def test_check_launcher__started_by_torchrun(machine, capsys):
    for name, value in zip(doctor.LAUNCHERS[0], ("1", "2", "1"), strict=True):
        machine.setenv(name, value)
    assert launch() == Launch(2, 2, True, dict(os.environ), 1)
    assert "torchrun: process 1 of 2" in capsys.readouterr().out
    with pytest.raises(distributed.UserError, match="^--processes 4: this is a launch of 2$"):
        launch("--processes", "4")


def test_check_launcher__variables_that_are_no_numbers(machine):
    for name, value in zip(doctor.LAUNCHERS[0], ("first", "2", "1"), strict=True):
        machine.setenv(name, value)
    with pytest.raises(distributed.UserError, match="^RANK=first, WORLD_SIZE=2, LOCAL_RANK=1: invalid literal"):
        launch()


def test_check_launcher__incomplete_variables(machine, capsys):
    machine.setenv("WORLD_SIZE", "4")
    launch()
    assert any("WORLD_SIZE=4 is set, but not all" in line for line in warnings(capsys))


def test_check_versions__names_what_does_not_fit(monkeypatch, capsys):
    installed = {"timm": "0.4.5", "torch": "2.14.1+cu130"}
    monkeypatch.setattr(doctor.metadata, "version", lambda name: installed.get(name, "99"))
    doctor.check_versions(Report())
    said = warnings(capsys)
    assert any("timm 0.4.5 is installed, requirements.txt has timm" in line for line in said)
    assert not any("torch 2.14.1" in line for line in said)


# ---- images


@pytest.fixture
def images(tmp_path) -> ImageFiles:
    """Three images of 10 x 20 pixels, the last one damaged."""
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        Image.new("RGB", (10, 20)).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:40])
    return ImageFiles(tmp_path, [(str(path), 0) for path in paths])


@pytest.mark.parametrize("skips", [False, True])
def test_check_images__unreadable_ones(images, skips, capsys):
    report = Report()
    doctor.check_images(report, images, "train", "all", 10, skips)
    assert (len(report.failures), report.warnings) == (int(not skips), int(skips))
    out = capsys.readouterr().out
    assert "all: 2 readable; shorter side 10 to 10 pixels" in out
    assert f"1 unreadable: {images.samples[2][0]}: " in out
    assert "--bad_images skip" in out


def test_check_images__sampled_and_too_small(images, capsys):
    report = Report()
    doctor.check_images(report, images, "train", "1", 224, True)
    out = capsys.readouterr().out
    assert "1 of 3, sampled" in out
    assert report.warnings == 1  # either damaged or enlarged


def test_check_data__a_folder_with_splits_among_the_images(tmp_path, capsys):
    for name in ("photos/train/a", "photos/val/a", "other"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    args = argparse.Namespace(data_path=str(tmp_path), dataset="", batch_size=1)
    doctor.check_layout(Report(), args, Path(doctor.image_sets(args, False, 0)["train"].root))
    nested = tmp_path / "photos"
    out = capsys.readouterr().out
    assert f"WARNING: {nested} holds train/ or val/, and all images of both are read -> --data_path {nested}" in out
    assert "fine-tuning and probes need them" in out


def test_image_sets__are_those_of_the_run(digits, tmp_path):
    """Of lists and folders, those with as many images as the run has."""
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(Path(digits) / name)
        (tmp_path / f"{name}.txt").write_text("3/0003.png 3\n" if name == "train" else "8/0048.png 8\n")
    args = argparse.Namespace(data_path=str(tmp_path), batch_size=1)
    for count, kind in ((48, "ImageFiles"), (1, "ListedImages")):
        found = doctor.image_sets(args, True, count)
        assert [type(images).__name__ for images in found.values()] == [kind] * 2
    assert doctor.image_sets(args, True, 7) == {}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Four training images and two validation images of drawn shapes, with masks and as COCO."""
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_stills(folder, "training", range(1, 5), 64, 0)
    shapes.write_stills(folder, "validation", range(5, 7), 64, 0)
    return folder


def test_check_data__of_dense_stages(drawn, capsys):
    mask = next((drawn / "ade20k" / "annotations" / "validation").iterdir())
    for stage, words in (("segmentation", ["--iters", "9"]), ("detection", [])):
        made = plan("cae", *words, "--data_path", str(drawn / ("ade20k" if words else "coco")), stage=stage)
        doctor.check_data(Report(), made, Measurement(output="x: 4 images, 2 per update, lr 1e-4"))
    out = capsys.readouterr().out
    assert "train:         4 images with masks of 150 classes" in out
    assert "val images:    all: 2 readable; shorter side 64 to 64 pixels" in out
    annotations = json.loads((drawn / "coco/annotations/instances_train2017.json").read_text())
    assert f"4 images with {len(annotations['annotations'])} objects of {len(annotations['categories'])}" in out
    Image.new("L", (9, 9)).save(mask)
    doctor.check_data(Report(), plan("cae", "--data_path", str(drawn / "ade20k"), stage="segmentation"), Measurement())
    assert f"its mask {mask} has 9 x 9 pixels" in capsys.readouterr().out


def test_check_data__batches_that_leave_images_out(tmp_path, capsys):
    words = ["--batch_size", "64", "--data_path", str(tmp_path), "--dataset", "torch/x"]
    run = Measurement(output="[1] x.png: unreadable image (y): skipped, 1 so far\nx: 100 images, 64 per update")
    run.lines = [{"steps": 1}]
    report = Report()
    doctor.check_data(report, plan("saim", *words, planned=2), run)
    assert report.failures == ["100 images do not fill a batch of 64 on 2 processes"]
    doctor.check_data(report, plan("saim", *words), run)
    said = warnings(capsys)
    problem = "an epoch leaves out 36% of the images, which fill no batch -> a --batch_size that divides 100 better"
    assert f"WARNING: {problem}" in said
    assert "WARNING: x.png: unreadable image (y) -> delete or replace it" in said
    doctor.check_data(report, plan("saim", *words, "--accum_iter", "2"), run)
    assert report.failures[1:] == ["an epoch has 1 batches, fewer than the 2 of an update"]


# ---- speed


def check_speed(run: Measurement, *words: str, planned: int = 1) -> None:
    made = plan("saim", "--batch_size", "8", "--warmup_epochs", "0", "--epochs", "10", *words, planned=planned)
    doctor.check_speed(Report(), made, run)


def test_check_speed__waiting_for_images(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "cores", lambda: 4)
    check_speed(recorded([1.0] * 9, 1.0), "--num_workers", "2")
    out = capsys.readouterr().out
    assert "WARNING: training waits for images 50% of the time -> --num_workers 4" in out
    assert "4 images/s with 1 process" in out
    check_speed(recorded([1.0] * 9, 1.0), "--num_workers", "4")
    assert any("shrink the images once" in line for line in warnings(capsys))


def test_check_speed__duration_and_extrapolation(capsys):
    run = recorded([1.0] * 9, begun=100.0)
    run.output += "\n[1] resumed x.pth: epoch 5, 400 images of it done, 1 processes"
    check_speed(run, planned=4)
    out = capsys.readouterr().out
    assert "epoch:         25 s (25 steps" in out
    assert "3.5 min for 10 epochs, 4.5 of them left" in out  # 100 s until the first step, 4.5 x 25 s
    assert "extrapolated from 1 to 4 processes" in out
    assert "32 images/s, without the exchange" in out


def test_check_speed__of_a_run_that_counts_updates(capsys):
    words = ["--iters", "1000", "--eval_interval", "400", "--accum_iter", "2", "--batch_size", "8"]
    made = plan("cae", *words, stage="segmentation")
    run = recorded([1.0] * 9, begun=100.0, evaluation=40.0, saving=5.0)
    run.output += "\n[1] resumed x.pth: epoch 1, 3200 images of it done, 1 processes"
    doctor.check_speed(Report(), made, run)
    out = capsys.readouterr().out
    assert "interval:      14.2 min (800 steps, 50 s for saving and evaluation)" in out
    assert "15.8 min for 1000 updates, 400 of them left" in out  # 100 s until the first step, an interval of 850 s


def test_check_speed__cores_that_others_hold_and_an_evaluation_that_fails(capsys):
    check_speed(recorded([1.0] * 9, computed=0.5, problem="main_finetune.py: no"))
    said = warnings(capsys)
    assert any("other programs held the cores: the process computed 50%" in line for line in said)
    assert any("the evaluation of its checkpoint ended: main_finetune.py: no" in line for line in said)


def test_check_memory__what_does_not_fit(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "available_bytes", lambda device: 9e9)
    run = recorded([1.0], host=8 * 10**9, workers=10**9, device=(79 * 10**9, 80 * 10**9))
    run.lines[-1]["memory"] = 70 * 10**9
    made = plan("saim")
    made.launch.on_gpu = True
    doctor.check_memory(Report(), made, run)
    out = capsys.readouterr().out
    assert "9.00 GB of 9.00 GB available memory would be used -> halve --batch_size" in out
    assert "70.00 GB per process at the peak, of 80.00 GB" in out
    assert "79.00 GB of the GPU's 80.00 GB are in use" in out


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
    doctor.explain(report, plan("saim"), Measurement(status, output))
    assert report.failures[0].startswith(problem)
    assert remedy in capsys.readouterr().out
    assert report.end() == 1


# ---- files


def check_files(folder: object, report: Report, *words: str, **further: Any) -> None:
    made = plan("saim", "--output_dir", str(folder), "--epochs", "100", "--save_freq", "10", *words)
    doctor.check_files(report, made, Measurement(**further))


def test_check_files__space_for_checkpoints(tmp_path, capsys):
    report = Report()
    check_files(tmp_path / "new" / "run", report, checkpoint=10**6, saving=1.0)
    out = capsys.readouterr().out
    assert "1 MB each, written in 1 s; 11 numbered ones" in out  # epochs 0, 10, ..., 90, and the last
    assert "14 MB at most" in out
    assert report.warnings == 0
    assert not (tmp_path / "new").exists()
    check_files(tmp_path, report, checkpoint=10**15)
    assert any("the run needs up to" in line and "--save_freq" in line for line in warnings(capsys))


def test_numbered__of_a_run_that_keeps_the_last_one():
    assert doctor.numbered(plan("a2mim", "--epochs", "100", "--save_every", "10"), 0) == 1
    assert doctor.numbered(plan("saim", "--epochs", "100", "--save_freq", "10"), 95) == 1
    assert doctor.numbered(plan("cae", stage="tokenizer"), 0) == 0  # keeps none


def test_check_files__folders_that_hold_something(tmp_path, capsys):
    (tmp_path / "note.txt").touch()
    check_files(tmp_path, Report())
    assert any("is not empty (note.txt), but nothing in it is continued" in line for line in warnings(capsys))
    check_files("", Report())
    assert warnings(capsys) == ["WARNING: neither checkpoints nor logs are written -> --output_dir DIR"]


def test_check_files__other_flags_than_the_continued_run(tmp_path, capsys):
    said = "[1] flags that differ from the resumed run's: epochs 100 (was 2), bad_images skip (was stop)\n"
    check_files(tmp_path, Report(), output=f"{said}[1] resumed x.pth: epoch 2, 0 images of it done, 1 processes")
    [line] = warnings(capsys)
    assert line.startswith("WARNING: it continues a run with other flags: epochs 100 (was 2) -> a new --output_dir")


def test_check_files__a_folder_in_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    report = Report()
    check_files(tmp_path / "file" / "run", report)
    assert report.failures == [f"--output_dir {tmp_path / 'file' / 'run'}: cannot be written"]


def test_check_files__no_room_to_measure(tmp_path, capsys):
    check_files(tmp_path, Report(), output="main_pretrain.py: x.pth: cannot be written (No space); earlier")
    assert any("x.pth: cannot be written (No space) -> TMPDIR=" in line for line in warnings(capsys))
