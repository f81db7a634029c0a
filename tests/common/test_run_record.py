"""run.json: what every start of a run says about itself."""

import json
import os
import shlex
import sys

import pytest

from common import distributed
from saim import main_pretrain
from tests.support.runs import run_main, spoil

PRETRAIN = ["--model", "saim_nano", "--query_depth", "1", "--input_size", "16", "--patch_size", "8", "--epochs", "2"]
PRETRAIN += ["--batch_size", "8", "--warmup_epochs", "1", "--num_workers", "0"]


def starts(folder) -> list[dict]:
    return json.loads((folder / "run.json").read_text())["starts"]


def test_starts_are_kept_and_brought_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setenv("ROW_SCRIPT", "saim_vit_base_800e")
    log = distributed.RunLog(str(tmp_path), events=str(tmp_path / "events"))
    assert not (tmp_path / "run.json").exists()  # nothing is trained yet
    log.epoch({"epoch": 0})
    first = starts(tmp_path)
    assert len(first) == 1
    assert shlex.split(first[0]["command"]) == ["python", *sys.orig_argv[1:]]
    assert (first[0]["processes"], first[0]["row"]) == (1, "saim_vit_base_800e")
    assert first[0]["hardware"].endswith(f", {os.cpu_count()} cores")
    log._begun -= 100
    log.epoch({"epoch": 1})
    assert [start["seconds"] >= 100 for start in starts(tmp_path)] == [True]
    distributed.RunLog(str(tmp_path), events=str(tmp_path / "events")).epoch({"epoch": 2})
    assert [start["seconds"] >= 100 for start in starts(tmp_path)] == [True, False]
    assert (tmp_path / "log.txt").read_text() == '{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n'


@pytest.mark.parametrize("content", ["", "{", "[]", '{"starts": 3}'])
def test_a_damaged_file_is_begun_anew(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    distributed.RunLog(str(tmp_path)).epoch({"epoch": 0})
    assert len(starts(tmp_path)) == 1


def test_what_cannot_be_written_is_named(tmp_path):
    log = distributed.RunLog(str(tmp_path))
    (tmp_path / "run.json").mkdir()
    with pytest.raises(distributed.UserError, match=r"run\.(tmp|json): cannot be written"):
        log.epoch({"epoch": 0})


def test_a_stopped_run_has_two_starts_and_a_complete_one_no_third(tmp_path, digits, monkeypatch):
    flags = [*PRETRAIN, "--data_path", digits, "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        spoil(patch, main_pretrain.SaimViT, when=2, stop=True)
        with pytest.raises(SystemExit):
            run_main(main_pretrain, *flags)
    assert not (tmp_path / "log.txt").exists()
    assert len(starts(tmp_path)) == 1
    for _ in range(2):
        run_main(main_pretrain, *flags)
        assert len(starts(tmp_path)) == 2


def test_without_a_folder_nothing_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    distributed.RunLog("", events="events").epoch({"epoch": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["events"]


@pytest.mark.slow
def test_two_processes_are_one_start(tmp_path, digits, launch):
    launch(2, "saim/main_pretrain.py", *PRETRAIN, "--data_path", digits, "--output_dir", str(tmp_path))
    assert [start["processes"] for start in starts(tmp_path)] == [2]
    assert "main_pretrain.py" in starts(tmp_path)[0]["command"]
