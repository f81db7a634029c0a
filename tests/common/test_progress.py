"""progress.jsonl: which steps have a line, what it says, and that it disturbs nothing."""

import json
import math
import re
from collections.abc import Callable

import pytest
import torch

from common import distributed
from common.distributed import metrics
from saim import main_pretrain
from tests.common.test_run_record import PRETRAIN
from tests.support.runs import CPU, run_main, spoil

KEYS = ["seconds", "epoch", "step", "steps", "images_per_second", "data", "memory"]


def lines(folder, name: str = "progress.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def train(run_log, steps: int, device=CPU, epoch: int = 0, start: int = 0, each=lambda step: None) -> None:
    """An epoch whose loss is the number of the step."""
    log = distributed.EpochLog("Epoch:", steps, 4, device, run_log=run_log, epoch=epoch, start=start)
    for step, _ in log.steps(range(steps - start)):
        log.update(step, loss=torch.tensor(float(step)), lr=0.5)
        each(step)


@pytest.mark.parametrize(
    ("log", "progress"), [("log.txt", "progress.jsonl"), ("aim_base.exp.log.txt", "aim_base.exp.progress.jsonl")]
)
def test_it_is_named_like_the_log(tmp_path, log, progress):
    train(distributed.RunLog(str(tmp_path), log), steps=1)
    assert len(lines(tmp_path, progress)) == 1


def test_a_line_for_each_of_the_first_steps_then_for_each_report(tmp_path):
    run_log = distributed.RunLog(str(tmp_path))
    train(run_log, 12)
    train(run_log, 50, epoch=1)
    train(run_log, 50, epoch=2)
    found = lines(tmp_path)
    assert all(list(line) == [*KEYS, "loss", "lr"] for line in found)
    first = [(0, step) for step in range(1, 13)] + [(1, step) for step in range(1, 9)]
    reports = [(epoch, step) for epoch in (1, 2) for step in (20, 40, 50)]
    assert [(line["epoch"], line["step"]) for line in found] == first + reports
    assert [line["loss"] for line in found[:20]] == [*range(12), *range(8)]
    assert found[20]["loss"] == sum(range(8, 20)) / 12  # all steps since the line before
    assert found[-1]["loss"] == sum(range(40, 50)) / 10
    assert {(line["epoch"], line["steps"]) for line in found} == {(0, 12), (1, 50), (2, 50)}


@pytest.fixture
def spend(monkeypatch) -> Callable[[float], None]:
    """Lets the clock, which stands still otherwise, go on by some seconds."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return lambda seconds: now.append(now.pop() + seconds)


def test_times_and_memory(tmp_path, spend):
    def slow_batches():
        for i in range(3):
            spend(0.02)
            yield i

    log = distributed.EpochLog("Epoch:", 3, 4, CPU, run_log=distributed.RunLog(str(tmp_path)))
    for _ in log.steps(slow_batches()):
        spend(0.03)
    for line in lines(tmp_path):
        assert line["data"] == pytest.approx(0.02)
        assert 4 / line["images_per_second"] == pytest.approx(0.05)
        assert line["memory"] == pytest.approx(metrics.resident_bytes(peak=True), rel=0.01)
    times = [line["seconds"] for line in lines(tmp_path)]
    assert times[0] < times[1] < times[2]
    assert 4 / lines(tmp_path)[2]["images_per_second"] == pytest.approx(times[2] - times[1], abs=1e-3)


def test_rates_count_the_images_that_a_batch_has(tmp_path, capsys, spend):
    """The last batch of an evaluation may be smaller: 8 images are no batch of 64."""
    log = distributed.EpochLog("Test:", 2, 64, CPU, run_log=distributed.RunLog(str(tmp_path)))
    for _ in log.steps((torch.zeros(n, 3), torch.zeros(n, dtype=torch.long)) for n in (6, 2)):
        spend(0.1)
    first, second = lines(tmp_path)
    assert first["images_per_second"] == pytest.approx(6 / 0.1)
    assert second["images_per_second"] == pytest.approx(2 / 0.1)
    said = float(re.findall(r"([\d.]+) images/s", capsys.readouterr().out)[-1])
    assert said == pytest.approx(8 / 0.2)


def test_a_gpu_is_read_at_reports_only(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "peak_memory", lambda _: 7)
    written, reads = [], []
    read = distributed.EpochLog._read
    monkeypatch.setattr(distributed.EpochLog, "_read", lambda self: reads.append(None) or read(self))

    def each(_step) -> None:
        written.append(len(lines(tmp_path)) if (tmp_path / "progress.jsonl").exists() else 0)

    train(distributed.RunLog(str(tmp_path)), 45, torch.device("cuda"), each=each)
    assert written == [0] * 20 + [20] * 20 + [21] * 5
    assert len(reads) == 4  # three reports and the end of the epoch, as without the file
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, 21), 40, 45]
    assert {line["memory"] for line in lines(tmp_path)} == {7}


def test_numbers_that_json_does_not_have(tmp_path):
    distributed.RunLog(str(tmp_path)).progress(0.0, {"loss": math.nan})
    assert lines(tmp_path)[0]["loss"] is None


def test_only_one_rank_writes_and_what_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    (tmp_path / "progress.jsonl").mkdir()
    train(distributed.RunLog(str(tmp_path)), steps=2)
    (tmp_path / "progress.jsonl").rmdir()
    monkeypatch.setattr(metrics, "is_main", lambda: False)
    train(distributed.RunLog(str(tmp_path)), steps=2)
    assert not (tmp_path / "progress.jsonl").exists()


def test_a_resumed_run_goes_on_at_the_end_of_the_file(tmp_path, digits, monkeypatch):
    flags = [*PRETRAIN, "--data_path", digits, "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        spoil(patch, main_pretrain.SaimViT, when=2, stop=True)
        with pytest.raises(SystemExit):
            run_main(main_pretrain, *flags)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    run_main(main_pretrain, *flags)
    found = lines(tmp_path)
    assert [(line["epoch"], line["step"]) for line in found] == [(e, s) for e in (0, 1) for s in range(1, 7)]
    seconds = [line["seconds"] for line in found]
    assert seconds[3:] == sorted(seconds[3:])
    assert {line["steps"] for line in found} == {6}
