"""The scripts of the papers' rows when they run: what a stage needs, how it ends, and three rows at toy size."""

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import distributed
from tests.saim import test_commands as saim
from tests.support.helpers import ROOT
from tests.support.rows import dry_run, forked_python, parse, refused, row
from tests.udi import test_commands as udi


@pytest.fixture
def fake(tmp_path) -> dict[str, Any]:
    """Arguments of `row` with which `python` only writes its arguments to the file calls; it exits with $STATUS."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@" >> calls\nexit ${STATUS:-0}\n')
    python.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    return {"cwd": tmp_path, "GPUS": "2", "DATA": "data", "OUT": "it's [here]", "PATH": path}


def calls(fake: dict[str, Any]) -> list[str]:
    path = fake["cwd"] / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "name, stage, encoder, flag",
    [
        ("saim_vit_base_800e", "linprobe", "pretrain/checkpoint.pth", "--finetune"),
        ("semaim_vit_base_800e", "finetune", "pretrain/aim_base.exp.temp.pth", "--finetune"),
        # The teacher is not asked for: pre-training alone reads it.
        ("semaim_vit_large_clip_800e", "knn", "pretrain/aim_large.exp.temp.pth", "--pretrained_weights"),
        ("simmim_resnet50_300e", "finetune", "extract/encoder.pth", "--pretrained"),
        ("udi_vit_small_300e", "knn", "pretrain/checkpoint.pth", "--pretrained_weights"),
        ("udi_vit_small_100e", "finetune", "extract/backbone.pth", "--finetune"),
    ],
)
def test_missing_encoder__is_one_line(fake, name, stage, encoder, flag):
    done = row(name, stage, **fake)
    expected = f"{stage}: it's [here]/{encoder} does not exist; run the stage {Path(encoder).parent} first, "
    expected += f'or set EXTRA_{stage.upper()}="{flag} FILE"\n'
    assert (done.returncode, done.stderr) == (2, f"{name}.sh: {expected}")
    assert not calls(fake)
    # One that the user names is the main's to check.
    assert row(name, stage, **{**fake, f"EXTRA_{stage.upper()}": f"{flag} other.pth"}).returncode == 0
    assert len(calls(fake)) == 1


@pytest.mark.parametrize(
    "name, checkpoint",
    [
        ("saim_vit_base_800e", "finetune/checkpoint.pth"),
        ("semaim_vit_base_800e", "finetune/vit_base_patch16.exp.temp.pth"),
        ("semaim_vit_base_800e", "linprobe/vit_base_patch16.exp.linear.pth"),
        ("a2mim_convnext_base_300e", "finetune/latest.pth"),
    ],
)
def test_encoder__is_not_needed_to_resume(fake, name, checkpoint):
    path = fake["cwd"] / fake["OUT"] / checkpoint
    path.parent.mkdir(parents=True)
    path.touch()
    done = row(name, path.parent.name, **fake)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(calls(fake)) == 1


def test_extract__runs_on_the_first_node(fake):
    """The other nodes, which share its files, go on to fine-tuning; that starts when the first node does."""
    fake |= {"NNODES": "2", "MASTER_ADDR": "node0"}
    name, stages = "a2mim_resnet101_300e", ("extract", "finetune")
    done = row(name, *stages, NODE_RANK="1", **fake)
    assert (done.returncode, done.stderr) == (0, "")
    assert ["--nnodes 2 --node_rank 1 " in call for call in calls(fake)] == [True]
    done = row(name, *stages, NODE_RANK="0", **fake)
    assert "finetune: it's [here]/extract/encoder.pth does not exist" in done.stderr  # this python makes none
    assert [Path(call.split()[0]).name for call in calls(fake)[1:]] == ["extract_backbone_weights.py"]


def test_teacher__is_told_by_its_variable(fake):
    done = row("semaim_vit_base_clip_800e", **fake)
    assert "pretrain: set TEACHER, see --help: TEACHER=/path/to/ViT-B-16.pt bash " in refused(done)
    assert not calls(fake)
    done = row("semaim_vit_base_clip_800e", "pretrain", TEACHER="my clip.pt", **fake)
    assert done.returncode == 0
    command = done.stdout.replace("\\\n", " ")
    assert parse("pretrain", command, "semaim").teacher_path == "my clip.pt"


def test_image__is_told_by_its_variable(fake):
    """Before the first stage starts; only the stage that draws it asks for it, on the first node alone."""
    done = row("udi_vit_small_300e", **fake)
    assert "attention: set IMAGE, see --help: IMAGE=/path/to/photo.jpg bash " in refused(done)
    assert not calls(fake)
    pretrained = fake["cwd"] / fake["OUT"] / "pretrain" / "checkpoint.pth"
    pretrained.parent.mkdir(parents=True)
    pretrained.touch()
    assert row("udi_vit_small_300e", "linear", **fake).returncode == 0
    nodes = {"NNODES": "2", "MASTER_ADDR": "node0", "IMAGE": "my photo.jpg"}
    for number in ("1", "0"):
        done = row("udi_vit_small_300e", "attention", NODE_RANK=number, **{**fake, **nodes})
        assert (done.returncode, done.stderr) == (0, "")
        assert len(calls(fake)) == 1 + (number == "0")
    args = parse("attention", done.stdout.replace("\\\n", " "), "udi")
    assert (args.image_path, args.output_dir) == (["my photo.jpg"], f"{fake['OUT']}/attention")


def test_failed_stage__stops_the_script(fake):
    done = row("saim_vit_base_800e", STATUS="3", **fake)
    assert done.returncode == 3
    # What ran is what the dry run shows.
    shown = dry_run("saim_vit_base_800e", "pretrain", **fake)["pretrain"]
    assert [f"python {call}".split() for call in calls(fake)] == [" ".join(shlex.split(shown)).split()]


def test_signal_for_all_processes__lets_the_run_save(fake):
    saves = "trap 'sleep 0.5; echo $PET_SIGNALS_TO_HANDLE >saved; exit 138' USR1"
    (fake["cwd"] / "bin" / "python").write_text(f"#!/bin/sh\n{saves}\n>started\nwhile :; do sleep 0.05; done\n")
    script = ["bash", str(ROOT / "scripts" / "saim_vit_base_800e.sh"), "pretrain"]
    env = {**os.environ, **{k: v for k, v in fake.items() if k != "cwd"}}
    process = subprocess.Popen(script, cwd=fake["cwd"], env=env, start_new_session=True)
    while not (fake["cwd"] / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.wait(timeout=60) == 138
    assert "SIGUSR1" in (fake["cwd"] / "saved").read_text()


@pytest.fixture(scope="module")
def toy_saim(tmp_path_factory, digits) -> Callable[..., Path]:
    """Run stages of SAIM's row at toy size; the folder of the stages."""
    folder = tmp_path_factory.mktemp("saim")
    (folder / "images of digits").symlink_to(digits)
    toy = "--input_size 16 --patch_size 8 --batch_size 8 --accum_iter 1 --epochs 1 --warmup_epochs 0 --num_workers 0"
    env = {
        "GPUS": "1",
        "DATA": "images of digits",
        "OUT": "out",
        "EXTRA": toy,
        "EXTRA_PRETRAIN": "--model saim_nano --query_depth 1",
        "EXTRA_FINETUNE": "--model vit_nano_patch16 --nb_classes 10",
        "EXTRA_LINPROBE": "--model vit_nano_patch16 --nb_classes 10",
    }

    def run(*stages: str) -> Path:
        with forked_python(folder / "log") as forked:
            done = row("saim_vit_base_300e", *stages, cwd=folder, **env, **forked)
        assert done.returncode == 0, done.stdout + done.stderr + (folder / "log").read_text()
        for stage in stages or saim.COMMANDS:
            lines = (folder / "out" / stage / "log.txt").read_text().splitlines()
            assert [json.loads(line)["epoch"] for line in lines] == [0]
        return folder / "out"

    return run


def test_row__runs_at_toy_size(toy_saim):
    assert sorted(path.name for path in toy_saim().iterdir()) == sorted(saim.COMMANDS)


@pytest.mark.slow
def test_row__resumes_at_toy_size(toy_saim):
    toy_saim()
    toy_saim("finetune")


@pytest.mark.slow
def test_udi__runs_at_toy_size_and_returns_at_once(tmp_path, digits):
    """All stages; a second run adds nothing."""
    common = "--epochs 1 --warmup_epochs 0 --batch_size 8 --accum_iter 1 --num_workers 0"
    env = {
        "GPUS": "1",
        "DATA": digits,
        "OUT": "out",
        "IMAGE": str(min(Path(digits).glob("val/*/*.png"))),
        "EXTRA_PRETRAIN": f"{common} --arch vit_nano{udi.VIEWS}",
        "EXTRA_KNN": "--arch vit_nano --input_size 64 --nb_classes 10 --nb_knn 10 --num_workers 0",
        "EXTRA_LINEAR": "--epochs 1 --batch_size 8 --accum_iter 1 --num_workers 0 --arch vit_nano --input_size 64"
        " --num_labels 10",
        "EXTRA_FINETUNE": f"{common} --model vit_nano --input_size 64 --nb_classes 10",
    }
    stages = ["pretrain", "knn", "linear", "extract", "finetune"]  # attention has no EXTRA_..., and vit_small's name
    log = tmp_path / "log"
    with forked_python(log) as forked:
        done = row("udi_vit_small_100e", *stages, cwd=tmp_path, **env, **forked)
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    for stage in ("pretrain", "linear", "finetune"):
        lines = (tmp_path / "out" / stage / "log.txt").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [0]
    assert (tmp_path / "out" / "extract" / "backbone.pth").is_file()
    assert "10-NN classifier result" in log.read_text()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*.pth") if path.parent.name != "extract"}
    with forked_python(log) as forked:
        again = row("udi_vit_small_100e", *stages, cwd=tmp_path, **env, **forked)
    assert again.returncode == 0, again.stdout + again.stderr + log.read_text()
    assert {path: path.stat().st_mtime_ns for path in files} == files


@pytest.fixture(scope="module")
def toy_simmim(tmp_path_factory, digits) -> Callable[[], Path]:
    """Run SimMIM's row of ResNet-50 at toy size; the folder of its stages."""
    folder = tmp_path_factory.mktemp("simmim")
    toy = "--backbone resnet_nano --input_size 64 --batch_size 8 --accum_iter 1 --epochs 1 --warmup_epochs 0"
    toy += " --num_workers 0"
    env = {"GPUS": "1", "DATA": digits, "OUT": "out", "EXTRA_PRETRAIN": toy}
    env["EXTRA_FINETUNE"] = f"{toy} --val_resize 64 --val_crop 64 --nb_classes 10"

    def run() -> Path:
        with forked_python(folder / "log") as forked:
            done = row("simmim_resnet50_300e", cwd=folder, **env, **forked)
        assert done.returncode == 0, done.stdout + done.stderr + (folder / "log").read_text()
        for stage in ("pretrain", "finetune"):
            lines = (folder / "out" / stage / "log.txt").read_text().splitlines()
            assert [json.loads(line)["epoch"] for line in lines] == [1]
        return folder / "out"

    return run


@pytest.mark.slow
def test_extracted_encoder__is_fine_tuned(toy_simmim):
    out = toy_simmim()
    names = ("pretrain/latest.pth", "extract/encoder.pth", "finetune/latest.pth")
    trained, encoder, tuned = (distributed.load(str(out / name))["state_dict"] for name in names)
    expected = {key.removeprefix("backbone."): value for key, value in trained.items() if key.startswith("backbone.")}
    assert encoder.keys() == expected.keys()
    for key, value in encoder.items():
        assert value.equal(expected[key]), key
    # Six updates move the weights, but not far from where they start.
    start, end = encoder["conv1.weight"], tuned["backbone.conv1.weight"]
    assert 0 < (end - start).norm() < 0.2 * start.norm()


@pytest.mark.slow
def test_complete_row__returns_at_once(toy_simmim):
    out = toy_simmim()
    files = {path: path.stat().st_mtime_ns for path in out.glob("*/*.pth") if path.parent.name != "extract"}
    assert len(files) >= 4
    toy_simmim()
    assert {path: path.stat().st_mtime_ns for path in files} == files
