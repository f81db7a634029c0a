"""The report of runs: what is read, compared, left out, and that its page is well-formed."""

import argparse
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from common import distributed
from scripts.tools import curves, report
from tests.support.runs import mistake

ROW = "saim_vit_base_800e"
COMMAND = "python saim/main_finetune.py --epochs 3 --batch_size 8 --name '<b>&'"


def start(**values) -> dict:
    machine = {"command": COMMAND, "processes": 2, "hardware": "2 x H100", "torch": "2.11", "seconds": 1800}
    return {**machine, "started": "2026-01-01T00:00:00Z", **values}


def make_stage(folder: Path, epochs: int, flags: dict | None, *starts: dict, key: str = "test_acc1") -> Path:
    """A stage of `epochs` logged epochs, accuracies 80, 81, ...; flags None: without a checkpoint."""
    folder.mkdir(parents=True)
    first = 1 if key.startswith("val") else 0
    lines = [{"train_loss": 1 / (e + 1), key: 80.0 + e, "epoch": e + first} for e in range(epochs)]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if flags is not None:
        torch.save({"model": {"w": torch.zeros(2)}, "args": flags}, folder / "checkpoint.pth")
    if starts:
        (folder / "run.json").write_text(json.dumps({"starts": starts}))
    return folder


@pytest.fixture
def row(tmp_path) -> Path:
    """A row with a finished fine-tuning, an unfinished probe and a k-NN result, in a folder of another name."""
    run = tmp_path / "runs" / "mine"
    flags = {"epochs": 3, "batch_size": 8, "accum_iter": 4}
    make_stage(run / "finetune", 3, flags, start(row=ROW), start(row=ROW, started="2026-01-02T00:00:00Z"))
    make_stage(run / "linprobe", 2, flags, start(row=ROW, started="2026-01-03T00:00:00Z"))
    (run / "knn").mkdir()
    (run / "knn" / "knn.json").write_text('{"knn20": 33.2, "seconds": 5}')
    return run


def run_report(*paths: Path, out: Path) -> tuple[str, str]:
    report.main(report.get_args_parser().parse_args([*map(str, paths), "--out", str(out)]))
    return (out / "report.md").read_text(), (out / "report.html").read_text()


def table(text: str, column: int = 1) -> dict[str, dict[str, str]]:
    """The cells of the Markdown table by stage, or another column, and column."""
    head, _, *rows = (line for line in text.splitlines() if line.startswith("|"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *rows)]
    return {cells[i][column]: dict(zip(cells[0], cells[i], strict=True)) for i in range(1, len(cells))}


def test_cells(row, tmp_path):
    text, _ = run_report(row, out=tmp_path / "out")
    cells = table(text)
    assert list(cells) == ["finetune", "linprobe", "knn"]
    finetune, linprobe, knn = cells.values()
    digest = hashlib.sha256((row / "finetune" / "checkpoint.pth").read_bytes()).hexdigest()
    expected = {
        "run": ROW,
        "metric": "top-1",
        "published": "83.9",
        "measured": "82.0",
        "difference": "-1.9",
        "epochs": "3",
        "time": "60.0 min",
        "method": "saim",
        "model": "",
        "loss": "0.3333",
    }
    expected |= {"images per update": "64", "hardware": "2 x H100"}
    expected |= {"checkpoint (SHA-256)": f"checkpoint.pth {digest[:12]}"}
    assert finetune == {"stage": "finetune", **expected}
    assert (linprobe["published"], linprobe["difference"], linprobe["epochs"]) == ("62.5", "", "2 of 3, unfinished")
    assert (knn["run"], knn["measured"], knn["published"], knn["time"]) == (ROW, "33.2 (k = 20)", "", "")
    assert text.count(COMMAND) == 2  # equal commands once per stage


def test_best_epoch_is_told_beside_the_last(tmp_path):
    stage = make_stage(tmp_path / "saim_vit_base_300e" / "finetune", 2, {"epochs": 2})
    with open(stage / "log.txt", "a") as file:
        file.write('{"train_loss": 1, "test_acc1": 70.0, "epoch": 1}\n')
    cells = table(run_report(stage.parent, out=tmp_path / "out")[0])["finetune"]
    assert (cells["measured"], cells["difference"]) == ("70.0 (best 80.0)", "-13.6")


def test_a2mim_counts_epochs_from_1(tmp_path):
    stage = make_stage(tmp_path / "a2mim_vit_base_800e" / "finetune", 3, {"epochs": 3}, key="val_head0_top1")
    assert table(run_report(stage, out=tmp_path / "out")[0])["finetune"]["difference"] == "-2.3"


def test_neighbours_beside_udis_weights(tmp_path):
    folder = tmp_path / "udi_vit_small_300e" / "pretrain" / "knn-eva-teacher"
    folder.mkdir(parents=True)
    lines = [f"INFO:{k}-NN classifier result: Top1: {top1}, Top5: 90.0" for k, top1 in ((10, 74.5), (20, 75.0))]
    (folder / "knn.log").write_text("\n".join(lines))
    cells = table(run_report(tmp_path, out=tmp_path / "out")[0])["knn"]
    assert (cells["published"], cells["measured"], cells["difference"]) == ("75.6", "75.0 (k = 20)", "-0.6")


def test_masks_of_videos(tmp_path):
    folder = tmp_path / "udi_vit_small_300e" / "video" / "topk-5-n-frames-7-mask-neighbors-12"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text('{"test_J_and_F": 61.25, "test_J": 60.0, "test_F": 62.5, "epoch": 0}\n')
    cells = table(run_report(tmp_path, out=tmp_path / "out")[0])["video"]
    assert (cells["run"], cells["metric"], cells["measured"]) == ("udi_vit_small_300e", "J&F", "61.2")
    assert (cells["epochs"], cells["published"]) == ("", "")


def test_segmentation_and_detection(tmp_path):
    run = tmp_path / "cae_base_800e"
    for name, flags, lines in (
        (
            "segmentation",
            {"epochs": 2, "iters": 150},
            [{"val_mIoU": 40.0, "iter": 100}, {"val_mIoU": 49.9, "iter": 150}],
        ),
        ("detection", {"epochs": 1}, [{"test_box_AP": 50.2, "test_mask_AP": 43.4}]),
    ):
        folder = make_stage(run / name, 0, flags, start())
        (folder / "log.txt").write_text("\n".join(json.dumps({**line, "epoch": i}) for i, line in enumerate(lines)))
    cells = table(run_report(run, out=tmp_path / "out")[0])
    names = ("metric", "published", "measured", "difference", "epochs")
    assert [cells["segmentation"][name] for name in names] == ["mIoU", "49.7", "49.9", "+0.2", "150 updates"]
    expected = ["box AP / mask AP", "49.9 / 43.9", "50.2 / 43.4", "+0.3 / -0.5", "1"]
    assert [cells["detection"][name] for name in names] == expected


def test_without_checkpoint_or_with_a_damaged_one(tmp_path, capsys):
    run = tmp_path / "run"
    make_stage(run / "a", 3, None, start())
    make_stage(run / "b", 3, {"epochs": 9}, start(), start(hardware="8 x A100", seconds=900))
    (run / "b" / "checkpoint.pth").write_bytes(b"torn")
    cells = table(run_report(run, out=tmp_path / "out")[0], column=0)
    assert {cells[name]["stage"] for name in "ab"} == {"finetune"}
    assert [cells[name]["epochs"] for name in "ab"] == ["3", "3"]  # as the command says
    assert (cells["b"]["hardware"], cells["b"]["time"]) == ("2 x H100; 8 x A100", "45.0 min")
    assert cells["b"]["checkpoint (SHA-256)"] == "checkpoint.pth is damaged"
    assert "truncated or not a checkpoint" in capsys.readouterr().out


class Page(HTMLParser):
    """Fails on a tag that is closed by another, and collects what the tests look at."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.rows, self.pre, self.links = [], [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [value for name, value in attrs.items() if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append(attrs.get("class", ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["pre"]:
            self.pre += data


def test_page_is_complete_and_escaped(row, tmp_path):
    text, html = run_report(row, out=tmp_path / "out")
    page = Page(html)
    assert page.rows == ["", "", "unfinished", ""]
    assert page.pre == COMMAND * 2
    assert len(page.links) == 2
    assert all(link.startswith("data:image/png;base64,") for link in page.links)  # nothing from outside
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [f"1-{ROW}-finetune.png", f"2-{ROW}-linprobe.png"]
    assert all(f"]({name})" in text for name in pictures)


def test_foreign_folders_are_left_out_by_name(row, tmp_path, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (row / "linprobe" / "log.txt").write_text("no log\n")
    (row / "knn" / "knn.json").write_text("{}")
    cells = table(run_report(row, foreign, row / "finetune", out=tmp_path / "out")[0])
    assert list(cells) == ["finetune"]  # once
    lines = capsys.readouterr().err.splitlines()
    named = {str(row / "linprobe" / "log.txt"), str(row / "knn"), str(foreign)}
    assert {line.removeprefix("left out: ").split(": ")[0] for line in lines} == named
    assert len(lines) == 3


def test_nothing_to_report(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        distributed.run(report.main, argparse.Namespace(runs=[str(tmp_path)], out=str(tmp_path / "out")))
    assert end.value.code == 1
    assert "nothing to report" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mistakes(row, tmp_path, capsys):
    assert "/nowhere: is no folder" in mistake(report, "/nowhere", capsys=capsys)
    (tmp_path / "file").touch()
    run_report(row, tmp_path / "file", out=tmp_path / "out")  # files beside runs are passed over
    assert "cannot be written" in mistake(report, str(row), "--out", str(tmp_path / "file"), capsys=capsys)


def test_pretraining_has_its_loss_its_steps_and_warnings(tmp_path):
    command = "python saim/main_pretrain.py --model saim_nano " + "--blr 0.001 " * 20
    run = make_stage(
        tmp_path / "photos", 2, {"epochs": 2, "model": "saim_nano"}, start(command=command, warnings=["<odd>"])
    )
    line = {"epoch": 0, "step": 1, "steps": 2, "loss": 1.0, "images_per_second": 9, "data": 0.1, "memory": 2e9}
    (run / "progress.jsonl").write_text(json.dumps(line) + "\n")
    (run / "log.txt").write_text('{"train_loss": 0.25, "epoch": 0}\n{"train_loss": 0.125, "epoch": 1}\n')
    text, html = run_report(run, out=tmp_path / "out")
    cells = table(text, column=0)["photos"]
    assert (cells["stage"], cells["method"], cells["model"], cells["loss"]) == (
        "pretrain",
        "saim",
        "saim_nano",
        "0.125",
    )
    assert "**Warning: <odd>**" in text and "<summary>command</summary>" in text
    assert "Warning: &lt;odd&gt;" in html and "<details>" in html
    assert len(Page(html).links) == 2
    assert (tmp_path / "out" / "1-photos-pretrain-steps.png").exists()


def test_losses_are_compared_with_the_recipes_band(tmp_path, monkeypatch):
    band = curves.Band("digits_saim", {"epochs": 2}, 48, [0, 1, 2], [0.25, 0.125], [0.01, 0.01])
    monkeypatch.setattr(report, "band_of", lambda flags: band if flags.get("epochs") == 2 else None)
    command = "python saim/main_pretrain.py"
    for name, epochs in (("known", 2), ("other", 3)):
        run = make_stage(
            tmp_path / "runs" / name, 2, {"epochs": epochs}, start(command=command, flags={"epochs": epochs})
        )
        (run / "log.txt").write_text('{"train_loss": 0.25, "epoch": 0}\n{"train_loss": 0.2, "epoch": 1}\n')
    text, html = run_report(tmp_path / "runs", out=tmp_path / "out")
    where = "in 1 of 2 epochs, first in epoch 1: 0.2, 0.075 to 0.175 expected."
    line = f"loss outside the reference band of digits_saim (3 seeds) {where}"
    assert text.count(line) == html.count(line) == 1
