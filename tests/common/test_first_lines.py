"""What a run says and keeps when it starts, and the flags that follow the model, the folders or `runs/`."""

import argparse
import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import torch

import a2mim.main_finetune
import cae.files
import cae.main_pretrain
import saim.main_finetune
import saim.main_pretrain
import semaim.main_pretrain
import udi.files
import udi.main_logistic_regression
import udi.main_pretrain
import udi.main_video_segmentation
from common import datasets, distributed
from common.distributed import step
from scripts.tools import doctor
from tests.support.runs import CPU, arguments, mistake, run_main

TINY = ["--model", "vit_nano_patch16", "--input_size", "16", "--patch_size", "8", "--batch_size", "16", "--epochs", "1"]
TINY += ["--num_workers", "0", "--device", "cpu", "--warmup_epochs", "0"]


# ---- which flags were given


def test_is_given():
    args = arguments(saim.main_finetune, "--nb_classes=7", "--finetune", "")
    assert distributed.is_given(args, "nb_classes") and distributed.is_given(args, "finetune")
    assert not distributed.is_given(args, "lr")
    assert "given" not in vars(args)


def test_is_given__in_a_configuration(tmp_path):
    (tmp_path / "c.py").write_text("nb_classes = 7\n")
    args = arguments(a2mim.main_finetune, str(tmp_path / "c.py"), "--cfg-options", "lr=1e-3")
    assert distributed.is_given(args, "nb_classes") and distributed.is_given(args, "lr")
    assert not distributed.is_given(args, "epochs")


@pytest.mark.parametrize("main", [saim.main_pretrain, semaim.main_pretrain])
@pytest.mark.parametrize(("flags", "depth"), [(["nano"], 4), (["base"], 12), (["nano", "--query_depth", "2"], 2)])
def test_query_depth_follows_the_model(main, flags, depth):
    prefix = "saim" if main is saim.main_pretrain else "aim"
    args = arguments(main, "--model", f"{prefix}_{flags[0]}", "--input_size", "16", *flags[1:])
    with torch.device("meta"):
        model = main.build_model(args)
    assert (len(model.query_blocks), args.query_depth) == (depth, depth)


def test_query_depth__given_counts():
    with pytest.raises(distributed.UserError, match="query_depth 12 does not fit depth 4"):
        saim.main_pretrain.build_model(arguments(saim.main_pretrain, "--model", "saim_nano", "--query_depth", "12"))
    assert semaim.main_pretrain.default_query_depth("aim_huge") == 16


@pytest.mark.parametrize(("method", "name"), [(cae, "cae_nano"), (udi, "udi_vit_small")])
def test_default_folder(method, name, capsys):
    main, distributed = method.main_pretrain, method.files
    flags = ["--model", "cae_nano"] if method is cae else []
    args = arguments(main, *flags)
    distributed.default_folder(args)
    assert args.output_dir == f"runs/{name}"
    assert f"no --output_dir: results go to runs/{name}" in capsys.readouterr().out
    args = arguments(main, "--output_dir", "")
    distributed.default_folder(args)
    assert args.output_dir == ""


@pytest.mark.parametrize(
    ("main", "flag", "default"),
    [
        (saim.main_finetune, "finetune", "./pretrain/saim_base/checkpoint.pth"),
        (udi.main_logistic_regression, "pretrained_weights", "./vit_small/checkpoint.pth"),
        (udi.main_video_segmentation, "pretrained_weights", "./vit_small_800_best/checkpoint.pth"),
    ],
)
def test_a_default_checkpoint_that_is_not_there(main, flag, default):
    with pytest.raises(distributed.UserError) as error:
        distributed.check_default_file(arguments(main), flag)
    words = f"expected a checkpoint; it is not given, and its default {default} does not exist"
    assert str(error.value) == f"--{flag}: {words}"
    distributed.check_default_file(arguments(main, f"--{flag}", "/nowhere.pth"), flag)  # which reading it names


def test_fine_tuning_without_its_checkpoint(digits, capsys, tmp_path):
    flags = [*TINY, "--data_path", digits, "--output_dir", str(tmp_path)]
    assert "it is not given, and its default" in mistake(saim.main_finetune, *flags, capsys=capsys)


# ---- a run


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> tuple[Path, str]:
    """Folder and output of a run that forgot --finetune and --nb_classes."""
    out, said = tmp_path_factory.mktemp("run"), io.StringIO()
    with contextlib.redirect_stdout(said):
        run_main(saim.main_finetune, *TINY, "--data_path", digits, "--finetune", "", "--output_dir", str(out))
    return out, said.getvalue()


def test_first_lines(run):
    out, said = run
    assert "parameters on cpu, torch.float32; 48 images, 16 per update" in said
    assert f"1 epochs of 3 steps; results go to {out}" in said
    assert "'num_workers'" not in said  # all flags


def test_run_json_has_flags_and_warnings(run):
    out, said = run
    start = json.loads((out / "run.json").read_text())["starts"][0]
    assert start["flags"]["patch_size"] == 8
    assert start["warnings"] == ["no --finetune: the encoder has random weights"]
    assert f"WARNING: {start['warnings'][0]}" in said


def test_classes_are_those_of_the_folders(run, digits, capsys):
    out, _ = run
    weights = distributed.load(str(out / "checkpoint.pth"))
    assert weights["model"]["head.weight"].shape[0] == weights["args"]["nb_classes"] == 10
    evaluation = ["--data_path", digits, "--eval", "--resume", str(out / "checkpoint.pth")]
    run_main(saim.main_finetune, *TINY, *evaluation)
    assert "Accuracy of the network on the 20 test images" in capsys.readouterr().out
    refused = mistake(saim.main_finetune, *TINY, "--data_path", digits, "--nb_classes", "9", capsys=capsys)
    assert "--nb_classes 9: the training images have 10 classes" in refused


def test_evaluation_takes_the_checkpoint_s_classes(run, digits, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in "38":
            os.symlink(Path(digits, split, name), tmp_path / split / name)
    checkpoint = str(run[0] / "checkpoint.pth")
    flags = [*TINY, "--batch_size", "4", "--data_path", str(tmp_path), "--eval", "--resume", checkpoint]
    run_main(saim.main_finetune, *flags)
    assert "2 of the checkpoint's 10 classes are here" in capsys.readouterr().out


def test_without_a_folder__a_warning_and_all_flags_for_verbose(digits, capsys):
    run_main(saim.main_finetune, *TINY, "--data_path", digits, "--finetune", "", "--output_dir", "", "--verbose")
    said = capsys.readouterr().out
    assert "WARNING: --output_dir is empty: neither checkpoints nor logs are written" in said
    assert "'num_workers': 0" in said


def test_loader__workers_are_capped_at_the_cores(digits, recwarn):
    images = datasets.image_dataset(digits, train=True)
    loader = datasets.Loader(images, datasets.eval_transform(16), 20, CPU, num_workers=64)
    assert loader.loader.num_workers == len(os.sched_getaffinity(0))
    assert not [w for w in recwarn if "worker processes" in str(w.message)]
    assert loader.left_out == 8


# ---- bf16 on a CPU


@pytest.mark.parametrize(
    ("precision", "instructions", "said"),
    [
        ("auto", ["amx_bf16", "avx512_bf16"], "amx_bf16 and avx512_bf16: --amp_dtype bf16 may be faster"),
        ("auto", [], ""),
        ("fp32", ["avx512_bf16"], ""),
        ("bf16", ["avx512_bf16"], ""),
        ("bf16", [], "--amp_dtype bf16: slower than fp32 on this processor"),
    ],
)
def test_bf16_is_recommended_where_the_processor_has_it(precision, instructions, said, monkeypatch, capsys):
    monkeypatch.setattr(step, "bf16_instructions", lambda: instructions)
    updater = distributed.Updater(torch.optim.SGD([torch.zeros(1)], 0.1), CPU, precision)
    assert updater.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)  # never by itself
    out = capsys.readouterr().out
    assert said in out and bool(out) == bool(said)
    doctor.check_devices(doctor.Report(), argparse.Namespace(device="cpu", amp_dtype=precision))
    out = capsys.readouterr().out
    assert said in out and ("precision:" in out) == bool(said)


def test_a_continued_run_keeps_its_precision(digits, tmp_path, capsys):
    flags = ["--model", "saim_nano", *TINY[2:], "--data_path", digits, "--output_dir", str(tmp_path)]
    run_main(saim.main_pretrain, *flags, "--amp_dtype", "bf16")
    for more in (["--epochs", "2"], ["--epochs", "3", "--amp_dtype", "fp32"]):  # a given flag wins
        run_main(saim.main_pretrain, *flags, *more)
    lines = [line for line in capsys.readouterr().out.splitlines() if "parameters on cpu" in line]
    assert ["bfloat16" in line for line in lines] == [True, True, False]
