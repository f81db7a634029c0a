"""The scripts of the papers' rows: what their arguments and environment change, and what they refuse."""

import shlex
import subprocess

import pytest

from tests.support.helpers import ROOT
from tests.support.rows import ROWS, dry_run, parse, refused, row


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


def test_extra__may_use_other_names_of_a_flag():
    name = "a2mim_resnet50_300e"
    extra = {"EXTRA_PRETRAIN": "--batch_per_gpu=32", "EXTRA_FINETUNE": "--batch_size 64 --accum 3"}
    commands = dry_run(name, GPUS="8", **extra)
    pretrain, finetune = (parse(stage, commands[stage], name) for stage in ("pretrain", "finetune"))
    assert (pretrain.batch_size, pretrain.accum_iter) == (32, 8)
    assert (finetune.batch_size, finetune.accum_iter, finetune.ema_warmup_iters) == (64, 3, 3 * 12520)


def test_extra__of_an_evaluation_is_its_own():
    extra = {"EXTRA": "--compile", "EXTRA_KNN": "--temperature 0.1"}
    name = "semaim_vit_base_800e"
    commands = dry_run(name, "linprobe", "knn", GPUS="8", **extra)
    assert parse("linprobe", commands["linprobe"], name).compile
    assert "--compile" not in commands["knn"]
    assert commands["knn"].endswith("--temperature 0.1")


def test_more_gpus__get_a_smaller_batch():
    name = "semaim_vit_base_800e"
    args = [parse(*item, name) for item in dry_run(name, "pretrain", "finetune", "linprobe", GPUS="32").items()]
    assert [(a.batch_size, a.accum_iter) for a in args] == [(64, 1), (32, 1), (128, 1)]


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
        (
            ["--dry_run"],
            {"GPUS": "64", "EXTRA_PRETRAIN": "--batch_size 64"},
            "= 64 x 1 x 64 = 4096; GPUS that work: 1 2 4 8 16 32\n",
        ),
        (["--dry_run"], {"NNODES": "3"}, "= 1 x 3 x 64 = 192; GPUS that work: none\n"),
        (["--dry_run", "linprobe"], {"EXTRA_LINPROBE": "--batch_size x"}, "linprobe: --batch_size x: expected a whole"),
        (["--dry_run", "linprobe"], {"EXTRA_LINPROBE": "--accum_iter=0"}, "linprobe: --accum_iter 0: expected a whole"),
        # A mistake in the last stage is told before the first one starts.
        ([], {"DATA": "data", "EXTRA_LINPROBE": "--batch_size 96"}, "linprobe: 2048 images per update are no multiple"),
    ],
)
def test_mistakes__are_one_line(tmp_path, arguments, env, message):
    (tmp_path / "data" / "train").mkdir(parents=True)
    done = row("saim_vit_base_800e", *arguments, cwd=tmp_path, **{"GPUS": "1", **env})
    assert message in refused(done)
    assert done.stderr.startswith("saim_vit_base_800e.sh: ")


DENSE = f"""source {ROOT}/scripts/lib/row.sh
launch pretrain a.py 4 --batch_size 4
launch segmentation b.py 4 --batch_size 4
evaluate video c.py
"""


@pytest.mark.parametrize(
    "stages, env, expected",
    [
        ([], {}, [("a.py", "/path/to/imagenet")]),
        (["segmentation"], {}, [("b.py", "/path/to/ade20k")]),
        (["video", "pretrain"], {"DAVIS": "/d", "DATA": "/i"}, [("a.py", "/i"), ("c.py", "/d")]),
    ],
)
def test_dense_stages__run_only_when_named_and_have_data_of_their_own(tmp_path, stages, env, expected):
    (tmp_path / "row.sh").write_text(DENSE)
    done = row(tmp_path / "row", "--dry_run", *stages, GPUS="1", **env)
    words = [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]
    assert [(line[1].split("/")[-1], line[line.index("--data_path") + 1]) for line in words] == expected, done.stderr


def test_dense_stages__need_no_images_of_pre_training(tmp_path):
    (tmp_path / "row.sh").write_text(DENSE)
    done = row(tmp_path / "row", "segmentation", GPUS="1")
    assert f"segmentation: set ADE20K to the folder of the data set: ADE20K=/ade20k bash {tmp_path}" in refused(done)
    done = row(tmp_path / "row", "segmentation", GPUS="1", ADE20K=str(tmp_path / "none"))
    assert f"ADE20K={tmp_path}/none: is no folder" in refused(done)


@pytest.mark.parametrize("path", [*(f"{name}.sh" for name in ROWS), "lib/row.sh"])
def test_syntax(path):
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / path)]).returncode == 0
