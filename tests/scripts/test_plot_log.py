"""Curves from log.txt: what is read, what is skipped, what is drawn."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from common import distributed
from scripts.tools import plot_log
from scripts.tools.runs import read_log, read_progress


@pytest.fixture
def runs(tmp_path) -> dict[str, str]:
    """Folders of a pre-training and a fine-tuning run."""
    pretrain = [{"train_lr": 1e-3, "train_loss": 1 / (1 + e), "train_total_norm": 0.5, "epoch": e} for e in range(4)]
    finetune = [
        {"train_lr": 1e-4, "train_loss": 2.0, "test_loss": 1.5, "test_acc1": 9.0 * e, "epoch": e} for e in (0, 1)
    ]
    for name, lines in (("pretrain", pretrain), ("finetune", finetune)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {path.name: str(path) for path in tmp_path.iterdir()}


def test_plot__panels_and_legends(runs):
    read = {name: read_log(path) for name, path in sorted(runs.items())}
    own, loss, accuracy, rate = plot_log.plot(read).axes
    assert (own.get_ylabel(), loss.get_ylabel()) == ("method's own loss", "cross entropy")
    assert [line.get_label() for line in own.lines] == ["pretrain"]
    assert [line.get_label() for line in loss.lines] == ["finetune: train_loss", "finetune: test_loss"]
    assert [line.get_label() for line in accuracy.lines] == ["finetune"]
    assert np.array_equal(accuracy.lines[0].get_xydata(), [[0, 0], [1, 9]])
    assert len(rate.lines) == 2
    assert [ax.get_ylabel() for ax in plot_log.plot({"a": read["pretrain"]}).axes] == ["loss", "learning rate"]


def test_run_names(runs, tmp_path):
    folders = [runs["pretrain"], f"{runs['finetune']}/log.txt"]
    assert plot_log.run_names(folders) == ["pretrain", "finetune"]
    twins = [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]
    for twin in twins:
        (tmp_path / twin).mkdir(parents=True)
    assert plot_log.run_names(twins) == twins


@pytest.mark.parametrize(
    ("log", "out", "words"),
    [
        ("nowhere", "log.png", "nowhere: cannot be read"),
        ("empty.txt", "log.png", "has no line with an epoch"),
        ("bare.txt", "log.png", "no loss, accuracy or learning rate"),
        ("pretrain", "log.xyz", "--out .*: cannot be written"),
        ("pretrain", "empty.txt/log.png", "--out .*: cannot be written"),
    ],
)
def test_user_errors(runs, tmp_path, capsys, log, out, words):
    (tmp_path / "empty.txt").write_bytes(b"\x80\n")
    (tmp_path / "bare.txt").write_text('{"epoch": 0}')
    args = plot_log.get_args_parser().parse_args([str(tmp_path / log), "--out", str(tmp_path / out)])
    with pytest.raises(SystemExit) as end:
        distributed.run(plot_log.main, args)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(words, line)


@pytest.mark.slow
def test_script(run_script, runs, tmp_path):
    out = tmp_path / "figures" / "log.png"
    run_script("scripts/tools/plot_log.py", *runs.values(), "--out", str(out))
    assert Image.open(out).width > 800


def test_shares_are_drawn_as_percents():
    run = {0: {"train_loss": 2.0, "train_mlm_acc": 0.54, "epoch": 0}}
    _, accuracy = plot_log.plot({"cae": run}).axes
    assert accuracy.get_ylabel() == "accuracy (%)"
    assert np.asarray(accuracy.lines[0].get_ydata())[0] == pytest.approx(54)


def test_plot_progress__a_point_per_line(tmp_path):
    lines = [
        {"epoch": e, "step": s, "steps": 2, "loss": 1.0, "images_per_second": 9, "data": 0.1, "memory": 2e9}
        for e, s in ((0, 1), (0, 2), (1, 1))
    ]
    (tmp_path / "x.progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    read = read_progress(str(tmp_path / "x.log.txt"))
    axes = plot_log.plot_progress(read).axes
    assert [ax.get_ylabel() for ax in axes] == ["loss", "images/s", "wait for\nimages (s)", "memory (GB)"]
    np.testing.assert_array_equal(axes[3].lines[0].get_xydata(), [[0.5, 2], [1, 2], [1.5, 2]])
    assert read_progress(str(tmp_path / "log.txt")) == []
