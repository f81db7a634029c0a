"""TensorBoard's scalars in a run of Weights & Biases, too: with a stand-in for the package, and with itself."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import saim.main_pretrain
from common import distributed
from tests.common.test_run_record import PRETRAIN
from tests.support.runs import mistake, run_main


class Wandb(ModuleType):
    """Keeps what it is told."""

    Error = type("Error", (Exception,), {})

    def __init__(self, refuses: str = ""):
        super().__init__("wandb")
        self.refuses, self.runs = refuses, []

    def init(self, **options: Any) -> Any:
        if self.refuses:
            raise self.Error(self.refuses)
        points: list[dict[str, float]] = []
        run = SimpleNamespace(id=options["id"] or f"id{len(self.runs)}", points=points, options=options)
        run.log, run.define_metric = points.append, lambda *_, **__: None
        self.runs.append(run)
        return run


def test_a_run_and_its_continuation(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := Wandb())
    board: list[tuple[str, float, int]] = []
    writer = SimpleNamespace(add_scalar=lambda *point: board.append(point), flush=lambda: None)
    monkeypatch.setattr("torch.utils.tensorboard.writer.SummaryWriter", lambda *_, **__: writer)
    flags = [*PRETRAIN, "--data_path", digits, "--output_dir", str(tmp_path), "--wandb", "mine"]
    run_main(saim.main_pretrain, *flags)
    run_main(saim.main_pretrain, *flags, "--epochs", "3")
    first, second = wandb.runs
    assert (first.id, second.options["id"], first.options["project"]) == ("id0", "id0", "mine")
    assert first.options["config"]["model"] == "saim_nano"
    told = [(tag, value, point["step"]) for point in first.points + second.points for tag, value in point.items()]
    assert [point for point in told if point[0] != "step"] == board
    assert {tag for tag, *_ in board} == {"train_loss", "lr"}
    distributed.RunLog(str(tmp_path), flags={"wandb": "mine"})  # another run in the folder
    assert wandb.runs[2].options["id"] is None


def test_mistakes(tmp_path, monkeypatch, capsys, digits):
    flags = [*PRETRAIN, "--data_path", digits, "--output_dir", str(tmp_path / "out"), "--wandb", "mine"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "--wandb mine: is not installed" in mistake(saim.main_pretrain, *flags, capsys=capsys)
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "wandb", Wandb("no key.\n Log in"))
    assert "--wandb mine: no key. Log in; WANDB_MODE=offline" in mistake(saim.main_pretrain, *flags, capsys=capsys)


@pytest.mark.slow
def test_offline_with_the_package_itself(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (0.0, 5.0):
        log = distributed.RunLog(str(tmp_path), start=start, flags={"wandb": "mine", "lr": 0.1})
        log.scalars({"loss": 1.0}, int(start))
        log.epoch({"loss": 1.0})
        assert log.writer is not None
        log.writer.wandb.finish()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert {folder.name.rsplit("-", 1)[1] for folder in folders} == {(tmp_path / "wandb.id").read_text()}
