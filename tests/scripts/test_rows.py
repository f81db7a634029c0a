"""The scripts of the paper's rows: what they would launch, what they refuse, and one of them run at toy size."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.saim.test_commands import COMMANDS, PARSERS, flags

ROWS = ["saim_vit_base_300e", "saim_vit_base_800e", "saim_vit_igpt_base_300e"]
IMAGES_PER_UPDATE = {"pretrain": 2048, "finetune": 1024, "linprobe": 2048}
VARIABLES = ["GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "DATA", "OUT", "EXTRA"]
VARIABLES += [f"EXTRA_{stage.upper()}" for stage in IMAGES_PER_UPDATE]


def row(name: str, *arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a row script with `python` being this interpreter and nothing inherited of what the scripts read."""
    inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    script = ["bash", str(ROOT / "scripts" / f"{name}.sh")]
    return subprocess.run([*script, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def dry_run(name: str, *stages: str, **kwargs) -> dict[str, str]:
    """The printed commands by stage, their continued lines joined."""
    done = row(name, "--dry_run", *stages, **kwargs)
    assert (done.returncode, done.stderr) == (0, "")
    commands = done.stdout.replace("\\\n", " ").splitlines()
    return {re.findall(r"main_(\w+)\.py ", command)[0]: command for command in commands}


def parse(stage: str, command: str) -> argparse.Namespace:
    return PARSERS[stage].parse_args(flags(command))


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a script that ran nothing."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("gpus, nodes", [(32, 1), (8, 1), (8, 4), (1, 1)])
def test_dry_run__keeps_the_images_per_update(name, gpus, nodes):
    commands = dry_run(name, GPUS=str(gpus), NNODES=str(nodes), NODE_RANK="0", MASTER_ADDR="node0", DATA="/imagenet")
    assert list(commands) == list(IMAGES_PER_UPDATE)
    for stage, command in commands.items():
        launcher = f"-m torch.distributed.launch --nproc_per_node {gpus} --nnodes {nodes} --node_rank 0 "
        launcher += "--master_addr node0 --master_port 29500"
        expected = f"python {launcher if gpus * nodes > 1 else ''} saim/main_{stage}.py".split()
        assert shlex.split(command)[: len(expected)] == expected
        args = parse(stage, command)
        assert args.batch_size * args.accum_iter * gpus * nodes == IMAGES_PER_UPDATE[stage]
        assert (args.data_path, args.output_dir) == ("/imagenet", f"runs/{name}/{stage}")
        assert stage == "pretrain" or args.finetune == f"runs/{name}/pretrain/checkpoint.pth"


@pytest.mark.parametrize(
    "name, changed",
    [
        ("saim_vit_base_800e", {}),
        ("saim_vit_base_300e", {"epochs": 300}),
        # The model of one stream has no decoder, whatever its depth.
        ("saim_vit_igpt_base_300e", {"epochs": 300, "model": "vit_igpt_base"}),
    ],
)
def test_flags__are_those_of_the_readme(name, changed):
    for stage, command in dry_run(name, GPUS="32").items():
        found = vars(parse(stage, command))
        paths = {key: found[key] for key in ("data_path", "output_dir", "finetune") if key in found}
        assert found == vars(parse(stage, COMMANDS[stage])) | paths | (changed if stage == "pretrain" else {})


def test_stages__are_selected_and_keep_their_order():
    for stages in (["finetune"], ["linprobe"], ["pretrain", "linprobe"]):
        assert list(dry_run("saim_vit_base_800e", *stages, GPUS="8")) == stages
    assert list(dry_run("saim_vit_base_800e", "linprobe", "finetune", GPUS="8")) == ["finetune", "linprobe"]


def test_gpus__default_to_the_devices_of_torch():
    assert dry_run("saim_vit_base_800e", "pretrain")["pretrain"].startswith("python saim/main_pretrain.py ")


def test_paths__are_quoted_and_independent_of_the_folder(tmp_path):
    names = {"DATA": "/my data/$HOME", "OUT": "it's here"}
    for cwd, script in ((tmp_path, f"{ROOT}/saim/main_finetune.py"), (ROOT / "saim", "main_finetune.py")):
        command = dry_run("saim_vit_base_800e", "finetune", cwd=cwd, GPUS="1", **names)["finetune"]
        assert shlex.split(command)[1] == script
        args = parse("finetune", command)
        assert (args.data_path, args.output_dir) == ("/my data/$HOME", "it's here/finetune")
        assert args.finetune == "it's here/pretrain/checkpoint.pth"
        # What a shell makes of the pasted text is what Python's shlex made of it.
        words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True).stdout
        assert words.splitlines() == shlex.split(command)
    args = parse("pretrain", dry_run("saim_vit_base_800e", "pretrain", cwd=tmp_path, GPUS="1")["pretrain"])
    assert args.output_dir == f"{ROOT}/runs/saim_vit_base_800e/pretrain"


def test_extra__comes_last_and_keeps_the_images_per_update():
    extra = {"EXTRA": "--num_workers 16 --compile", "EXTRA_PRETRAIN": "--num_workers 2\n--batch_size=16"}
    commands = dry_run("saim_vit_base_800e", GPUS="8", **extra)
    pretrain, finetune = (parse(stage, commands[stage]) for stage in ("pretrain", "finetune"))
    assert (pretrain.num_workers, pretrain.batch_size, pretrain.accum_iter) == (2, 16, 16)
    assert (finetune.num_workers, finetune.batch_size, finetune.accum_iter) == (16, 32, 4)
    assert pretrain.compile
    assert finetune.compile
    # An explicit --accum_iter is taken as it is.
    command = dry_run("saim_vit_base_800e", "linprobe", GPUS="3", EXTRA_LINPROBE="--accum_iter 5")["linprobe"]
    assert parse("linprobe", command).accum_iter == 5


def test_help__prints_both_headers():
    done = row("saim_vit_base_800e", "--help")
    assert done.returncode == 0
    assert "Published: 83.9 fine-tuned, 62.5 linear." in done.stdout
    assert "EXTRA_<STAGE>" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    "arguments, env, message",
    [
        (["--dry_run", "probe"], {}, "'probe' is neither --dry_run nor a stage (pretrain finetune linprobe)"),
        (["--dryrun"], {}, "'--dryrun' is neither"),
        ([], {}, "set DATA to the folder with train/ and val/: DATA=/imagenet bash "),
        ([], {"DATA": str(ROOT / "saim")}, f"DATA={ROOT}/saim: has no folder train/"),
        (["--dry_run"], {"GPUS": "0"}, "GPUS=0: expected a whole number of at least 1"),
        (["--dry_run"], {"NNODES": "two"}, "NNODES=two: expected a whole number of at least 1"),
        ([], {"NNODES": "4", "DATA": "data"}, "NNODES=4: on every node set NODE_RANK, 0 to 3, and MASTER_ADDR"),
        (
            ["--dry_run"],
            {"GPUS": "6"},
            "pretrain: 2048 images per update are no multiple of GPUS x NNODES x --batch_size = 6 x 1 x 64 = 384; "
            "GPUS that work: 1 2 4 8 16 32\n",
        ),
        (["--dry_run"], {"GPUS": "64"}, "= 64 x 1 x 64 = 4096; GPUS that work: 1 2 4 8 16 32\n"),
        (["--dry_run"], {"NNODES": "3"}, "= 1 x 3 x 64 = 192; GPUS that work: none\n"),
        (["--dry_run", "linprobe"], {"EXTRA_LINPROBE": "--batch_size x"}, "linprobe: --batch_size x: expected a whole"),
        # A mistake in the last stage is told before the first one starts.
        ([], {"DATA": "data", "EXTRA_LINPROBE": "--batch_size 96"}, "linprobe: 2048 images per update are no multiple"),
    ],
)
def test_mistakes__are_one_line(tmp_path, arguments, env, message):
    (tmp_path / "data" / "train").mkdir(parents=True)
    done = row("saim_vit_base_800e", *arguments, cwd=tmp_path, **{"GPUS": "1", **env})
    assert message in refused(done)
    assert done.stderr.startswith("saim_vit_base_800e.sh: ")


def test_missing_encoder__is_one_line(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    done = row("saim_vit_base_800e", "linprobe", cwd=tmp_path, GPUS="1", DATA="data", OUT="out")
    assert done.returncode == 2
    expected = "linprobe: out/pretrain/checkpoint.pth does not exist; run the stage pretrain first, "
    expected += 'or set EXTRA_LINPROBE="--finetune FILE"\n'
    assert done.stderr == f"saim_vit_base_800e.sh: {expected}"


def test_failed_stage__stops_the_script(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" >> calls\nexit 3\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:{os.environ['PATH']}"
    done = row("saim_vit_base_800e", cwd=tmp_path, GPUS="2", DATA="data", PATH=path)
    assert done.returncode == 3
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 1
    # What ran is what the dry run shows.
    shown = dry_run("saim_vit_base_800e", "pretrain", cwd=tmp_path, GPUS="2", DATA="data")["pretrain"]
    assert f"python {calls[0]}".split() == shown.split()


def test_row__runs_and_resumes_at_toy_size(tmp_path, digits):
    (tmp_path / "images of digits").symlink_to(digits)
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
    done = row("saim_vit_base_300e", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in IMAGES_PER_UPDATE:
        lines = (tmp_path / "out" / stage / "log.txt").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [0]
    again = row("saim_vit_base_300e", "finetune", cwd=tmp_path, **env)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len((tmp_path / "out" / "finetune" / "log.txt").read_text().splitlines()) == 1


@pytest.mark.parametrize("path", [*(f"{name}.sh" for name in ROWS), "lib/row.sh"])
def test_syntax(path):
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / path)]).returncode == 0
