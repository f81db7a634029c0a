"""--config: flags from JSON, YAML and the record of a run, in every main."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import a2mim.main_detection
import cae.main_visualize
import saim.main_finetune
import saim.main_pretrain
import udi.main_pretrain
from common import distributed
from tests.support.documents import METHODS
from tests.support.helpers import ROOT
from tests.support.runs import arguments, assert_same, kept_signals, mistake, run_main, spoil

MAINS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for method in METHODS
    for path in (ROOT / method).glob("main_*.py")
    if "get_args_parser" in path.read_text()
)
TINY = ["--model", "saim_nano", "--query_depth", "1", "--input_size", "16", "--patch_size", "8", "--epochs", "1"]
TINY += ["--batch_size", "8", "--warmup_epochs", "0", "--num_workers", "0", "--blr", "1e-3", "--norm_pix_loss"]


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def record(path: Path, args: Any, **changed: Any) -> str:
    """The run.json of a run with these flags."""
    start = {"flags": vars(args) | changed, "given": sorted(args.given)}
    return written(path, {"starts": [start, start]})


# ---- what a file says


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_values(tmp_path, suffix):
    text = {
        "json": '{"lr": 1e-3, "epochs": 7, "cls_token": true, "aa": "", "color_jitter": null, '
        '"cutmix_minmax": [0.2, 0.4]}',
        "yaml": "lr: 1e-3\nepochs: 7  # passes\ncls_token: yes\ncutmix-minmax: [0.2, 0.4]\naa: ''\ncolor_jitter:\n",
    }[suffix]
    path = written(tmp_path / f"c.{suffix}", text)
    args = arguments(saim.main_finetune, f"--config={path}", "--epochs", "9")
    assert (args.lr, args.epochs, args.global_pool, args.aa) == (1e-3, 9, False, "")
    assert (args.cutmix_minmax, args.color_jitter) == ([0.2, 0.4], None)
    assert distributed.is_given(args, "lr") and distributed.is_given(args, "aa")
    assert not distributed.is_given(args, "batch_size")
    assert "config_file" not in vars(args)


def test_of_several_files__the_last_wins(tmp_path):
    files = [written(tmp_path / f"{n}.yaml", f"epochs: {n}\nseed: {n}\n"[: 10 + 8 * (n == 1)]) for n in (1, 2)]
    args = arguments(saim.main_pretrain, *(word for file in files for word in ("--config", file)))
    assert (args.epochs, args.seed) == (2, 1)


def test_a_required_flag_and_a_recipe(tmp_path):
    path = written(tmp_path / "c.yaml", "checkpoint: a.pth\n")
    assert arguments(cae.main_visualize, "--config", path).checkpoint == "a.pth"
    path = written(tmp_path / "d.yaml", "recipe: r50_c4_2x\nlr: 0.5\nepochs: 5\n")
    args = a2mim.main_detection.parse_args(["--config", path, "--epochs", "4"])
    assert (args.model, args.lr, args.epochs, args.lr_drops) == ("mask_rcnn_r50_c4", 0.5, 4, [16, 23])


def test_a_configuration_of_a2mim_beside_it(tmp_path):
    own, path = tmp_path / "c.py", written(tmp_path / "c.yaml", "epochs: 5\n")
    own.write_text("method = 'finetune'\nepochs = 3\nlr = 0.5\nnb_classes = 7\n")
    args = arguments(importlib.import_module("a2mim.main_finetune"), "--config", path, str(own), "--nb_classes", "8")
    assert (args.epochs, args.lr, args.nb_classes) == (5, 0.5, 8)
    assert {"epochs", "lr", "nb_classes"} <= args.given


# ---- mistakes

MISTAKES = {
    "learning_rate: 1": "learning_rate is no flag of this script, see --help",
    "warmup_epoch: 1": "warmup_epoch is no flag of this script, see --help; the nearest is warmup_epochs",
    "config: a.yaml": "config is no flag of this script",
    "epochs: many": "argument --epochs: invalid int value: 'many'",
    "epochs: 1.5": "argument --epochs: invalid int value: '1.5'",
    "epochs: [1]": "argument --epochs: invalid int value: '[1]'",
    "lr: true": "argument --lr: invalid float value: 'True'",
    "epochs:": "epochs None: expected a value",
    "model: saim_gigantic": "argument --model: invalid choice: 'saim_gigantic'",
    "norm_pix_loss: 3": "norm_pix_loss 3: expected True or False",
    "data_path: [a, b]": "data_path ['a', 'b']: expected a text",
    "epochs: [": "line 1: is neither YAML nor JSON",
    "- epochs": "expected flags and their values, name: value",
    "": "expected flags and their values, name: value",
    "starts: 3": "has no flags of a run",
    "starts: []": "has no flags of a run",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(tmp_path, text, capsys):
    path = written(tmp_path / "c.yaml", text)
    line = mistake(saim.main_pretrain, "--config", path, capsys=capsys)
    assert f"--config {path}: {MISTAKES[text]}" in line


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, words in (("none", "cannot be read (No such file"), ("", "cannot be read"), ("binary", "is no text")):
        assert words in mistake(saim.main_pretrain, "--config", str(tmp_path / name), capsys=capsys)


# ---- a run's record


@pytest.mark.parametrize("name", MAINS)
def test_flags_of_a_record_are_those_of_the_run(name, tmp_path):
    main = importlib.import_module(name)
    first = arguments(main, *(["--checkpoint", "a.pth"] if name in ("cae.main_visualize",) else []))
    changed = {"local_rank": 3, "dist_url": "tcp://a", "class_names": ["a"], "found": 1}  # another's, and the run's own
    again = arguments(main, "--config", record(tmp_path / "run.json", first, **changed))
    assert vars(again) == vars(first)
    assert again.given == first.given


def test_given_flags_stay_given(tmp_path):
    words = ["--query_depth", "4", "--model", "saim_small", "--dist_url", "tcp://a"]
    first = arguments(saim.main_pretrain, *words)
    path = record(tmp_path / "run.json", first, patch_size=8)
    again = arguments(saim.main_pretrain, "--config", path, "--seed", "3")
    assert again.given == {"query_depth", "model", "seed"}
    assert (again.patch_size, again.dist_url) == (8, "env://")


def test_values_off_by_a_type(tmp_path):
    """A flag whose type makes None of 0, patterns with their options, a switch that turns off."""
    first = arguments(udi.main_pretrain, "--clip_grad", "0", "--use_fp16", "false")
    assert first.clip_grad is None
    again = arguments(udi.main_pretrain, "--config", record(tmp_path / "run.json", first))
    assert vars(again) == vars(first)
    main = importlib.import_module("a2mim.main_finetune")
    first = arguments(main, "--paramwise", "[('bias', {'weight_decay': 0})]", "--no_pin_mem", "--cfg-options", "lr=3")
    again = arguments(main, "--config", record(tmp_path / "run.json", first), "--lr", "4")
    assert vars(again) | {"lr": 3, "cfg_options": 0} == vars(first) | {"cfg_options": 0}
    assert again.lr == 4


def test_a_record_of_another_program_is_refused(tmp_path, capsys):
    path = record(tmp_path / "run.json", arguments(saim.main_finetune, "--layer_decay", "0.5"))
    assert "layer_decay is no flag of this script" in mistake(saim.main_pretrain, "--config", path, capsys=capsys)


def test_a_run_is_repeated_to_the_bit(digits, tmp_path, monkeypatch):
    """Also one that was stopped, and went on from a checkpoint that was named."""
    first, again = tmp_path / "first", tmp_path / "again"
    words = [*TINY, "--data_path", digits, "--output_dir", str(first)]
    with monkeypatch.context() as patch, kept_signals():
        spoil(patch, saim.main_pretrain.SaimViT, when=2, stop=True)
        with pytest.raises(SystemExit):
            run_main(saim.main_pretrain, *words)
    run_main(saim.main_pretrain, *words, "--resume", str(first / "checkpoint.pth"))
    run_main(saim.main_pretrain, "--config", str(first / "run.json"), "--output_dir", str(again))
    assert_same(first, again)
    starts = [json.loads((folder / "run.json").read_text())["starts"] for folder in (first, again)]
    assert [len(entries) for entries in starts] == [2, 1]
    assert starts[1][0]["flags"] == starts[0][1]["flags"] | {"output_dir": str(again), "resume": ""}
    assert starts[1][0]["given"] == starts[0][1]["given"]
