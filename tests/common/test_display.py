"""What a run shows while it trains: durations, rates, and the time left of the epoch and of the run."""

import re
import sys

import pytest
import torch
from tqdm import tqdm

from common.distributed import EpochLog
from common.distributed.metrics import RunLog, duration

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (86_399, "23:59:59"), (90_000, "1 d 01:00")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_log__time_left_of_epoch_and_run(capsys, monkeypatch):
    monkeypatch.setattr("time.perf_counter", iter(range(0, 1000, 5)).__next__)
    log = EpochLog("Epoch: [1]", 40, 8, CPU, later=120_000)
    for step, _ in log.steps(range(40)):
        log.update(step, loss=1.0, lr=3e-8)
    lines = [line for line in capsys.readouterr().out.splitlines() if "eta" in line]
    assert len(lines) == 2
    left = re.search(r"\[20/40\]  eta: 0:0\d:\d\d, of the run: \d+ d \d\d:\d\d  loss: 1\.0000", lines[0])
    assert left, lines[0]
    assert "lr: 3e-08" in lines[0]
    assert "[40/40]  eta: 0:00:00, of the run: " in lines[1]
    plain = EpochLog("Test:", 20, 8, CPU)
    assert all(step >= 0 for step, _ in plain.steps(range(20)))
    assert "of the run" not in capsys.readouterr().out


def test_time_left_of_the_run__once_after_ten_steps(capsys, monkeypatch):
    run = RunLog("")
    monkeypatch.setattr("time.perf_counter", iter(range(0, 1000, 5)).__next__)
    for later in (400, 200):
        log = EpochLog("Epoch: [1]", 19, 8, CPU, run_log=run, later=later)
        for step, _ in log.steps(range(19)):
            log.update(step, loss=1.0)
    for _ in EpochLog("Test:", 19, 8, CPU).steps(range(19)):
        pass
    told = [line for line in capsys.readouterr().out.splitlines() if "first 10 steps" in line]
    assert len(told) == 1
    assert re.search(r"by the first 10 steps, 0\.\d images/s: 1:\d\d:\d\d left of the run$", told[0]), told[0]


def test_terminal__bar_fits_80_columns_and_an_epoch_leaves_a_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    monkeypatch.setenv("COLUMNS", "80")
    log = EpochLog("Epoch: [0]", 60, 512, CPU, later=10**7)
    for step, _ in log.steps(range(60)):
        log.update(step, loss=6.25)
    out, err = capsys.readouterr()
    assert out.count("Epoch: [0]  [60/60]  eta: 0:00:00") == out.count("\n") == 1
    assert not err.strip("\r\n ").endswith("%")
