"""Looks at a run's checkpoints: what a look writes, alarms, files that are replaced or torn while they are read."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from common import distributed
from saim import main_pretrain
from scripts.tools import curves, watch
from tests.support.runs import CPU, mistake, run_main
from tests.support.tiny_encoders import checkpoint

RUN = "--model saim_nano --input_size 16 --patch_size 8 --query_depth 1 --norm_pix_loss --batch_size 16 --epochs 2"
SMALL = ["--once", "--images", "20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits) -> Path:
    """A finished pre-training of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    flags = [*RUN.split(), "--warmup_epochs", "0", "--num_workers", "0", "--device", "cpu"]
    run_main(main_pretrain, *flags, "--data_path", digits, "--output_dir", str(folder))
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    monkeypatch.setattr(watch, "draw", lambda *args: None)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "watch.jsonl").read_text().splitlines()]


def test_a_look__and_none_at_the_same_file(copy, digits, capsys):
    before = {path: path.read_bytes() for path in copy.iterdir()}
    run_main(watch, str(copy), "--data_path", digits, *SMALL)
    shown = capsys.readouterr().out
    first, second = lines(copy)
    assert (first["epochs"], second["epochs"], second["of"], second["checkpoint"]) == (0, 2, 2, "checkpoint.pth")
    assert first["knn20"] != second["knn20"] or first["rankme"] != second["rankme"]
    assert second["loss"] == json.loads((copy / "log.txt").read_text().splitlines()[-1])["train_loss"]
    assert min(Image.open(copy / second["picture"]).size) > 100
    assert "before training: 20-NN " in shown and "2 epochs: 20-NN " in shown and "the run is finished" in shown
    assert list((copy / "watch").glob("events*"))
    assert all(path.read_bytes() == content for path, content in before.items())  # the run's own files
    run_main(watch, str(copy), "--data_path", digits, *SMALL)
    assert len(lines(copy)) == 2
    assert "nothing new, 2 epochs" in capsys.readouterr().out


def test_without_labels_and_until_the_run_is_finished(copy, digits, monkeypatch, no_pictures):
    """A run that is in its first epoch, and goes on between two looks."""
    done = (copy / "checkpoint.pth").read_bytes()
    state = torch.load(copy / "checkpoint.pth", weights_only=True)
    torch.save({**state, "epoch": 0}, copy / "checkpoint.pth")
    monkeypatch.setattr(watch, "wait", lambda seconds: (copy / "checkpoint.pth").write_bytes(done))
    run_main(watch, str(copy), "--data_path", f"{digits}/train/3", "--images", "20")
    assert [line["epochs"] for line in lines(copy)] == [0, 1, 2]
    assert all("agreement" in line and "knn20" not in line for line in lines(copy))


def test_alarms__of_collapse_and_of_the_loss(copy, digits, monkeypatch, capsys, tmp_path, no_pictures):
    state = torch.load(copy / "checkpoint.pth", weights_only=True)
    state["model"] = {k: torch.zeros_like(v) if "blocks.1" in k else v for k, v in state["model"].items()}
    state["model"] = {k: v if "pos_embed" in k else torch.zeros_like(v) for k, v in state["model"].items()}
    torch.save(state, copy / "checkpoint.pth")
    flags = json.loads((copy / "run.json").read_text())["starts"][-1]["flags"]
    band = {"row": "mine", "flags": curves.learnt(flags), "images": 48, "seeds": [0, 1, 2]}
    band |= {"mean": [9.0, 9.0], "std": [0.1, 0.1]}
    (tmp_path / "mine.json").write_text(json.dumps(band))
    find = curves.band_of
    monkeypatch.setattr(curves, "band_of", lambda flags, images: find(flags, images, tmp_path))
    run_main(watch, str(copy), "--data_path", digits, *SMALL)
    found = lines(copy)[-1]["alarms"]
    assert [alarm.split(":")[0] for alarm in found[:2]] == ["features collapse", "features collapse"]
    assert found[2].startswith("loss outside the reference band of mine (3 seeds) in 2 of 2 epochs")
    assert capsys.readouterr().out.count("ALARM: ") == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["semaim", "a2mim", "udi"])
def test_pictures_of_the_other_methods(method, digits, tmp_path):
    path = checkpoint(method, tmp_path)
    images = [str(path) for path in sorted(Path(digits, "val").rglob("*.png"))[:2]]
    watch.draw(method, path, distributed.flags_of(distributed.load(path)), images, tmp_path / "out")
    assert list((tmp_path / "out").rglob("*.png"))


def test_a_picture_that_cannot_be_drawn__is_a_line(copy, digits, capsys):
    """As CAE's on a machine without its tokenizer."""
    flags = watch.get_args_parser().parse_args([str(copy), "--data_path", digits, *SMALL])
    path = checkpoint("cae", copy)
    looks = watch.Watch(flags, CPU)
    looks.open(None)
    assert looks.picture("cae", path, distributed.flags_of(distributed.load(path)), 1) == ""
    assert "no picture: --discrete_vae_type dall-e: name the folder" in capsys.readouterr().out


# ---- files that change


def test_read_whole__a_file_that_is_replaced_meanwhile(copy, monkeypatch):
    path, read, calls = copy / "checkpoint.pth", distributed.load, []

    def load(name: str):
        state = read(name)
        if not calls:
            shutil.copy(path, copy / "next")
            os.replace(copy / "next", path)
        calls.append(name)
        return state

    monkeypatch.setattr(distributed, "load", load)
    state, stamp = watch.read_whole(path)
    assert len(calls) == 2 and stamp == watch.stamp(path) and "model" in state


def test_read_whole__a_file_that_is_still_being_copied(copy, monkeypatch, digits, capsys, no_pictures):
    path = copy / "checkpoint.pth"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(distributed.UserError, match="truncated or not a checkpoint"):
        watch.read_whole(path)
    monkeypatch.setattr(watch, "wait", lambda seconds: path.write_bytes(content))
    run_main(watch, str(copy), "--data_path", digits, "--images", "20")
    assert "truncated or not a checkpoint" in capsys.readouterr().out
    assert lines(copy)[-1]["epochs"] == 2


def test_read_whole__gives_up_where_it_never_rests(copy, monkeypatch):
    count = iter(range(100))
    monkeypatch.setattr(watch, "stamp", lambda path: [next(count)])
    with pytest.raises(distributed.UserError, match="changes faster than it can be read"):
        watch.read_whole(copy / "checkpoint.pth")


def test_mistakes(copy, digits, tmp_path, capsys):
    def error(*words: str) -> str:
        return mistake(watch, *words, *SMALL, capsys=capsys)

    assert "nowhere: no such folder" in error(str(tmp_path / "nowhere"), "--data_path", digits)
    (tmp_path / "empty").mkdir()
    assert "has no checkpoint.pth or " in error(str(tmp_path / "empty"), "--data_path", digits)
    assert "/nowhere: no such folder" in error(str(copy), "--data_path", "/nowhere")
    assert "--poll 0.0: expected" in error(str(copy), "--data_path", digits, "--poll", "0")
