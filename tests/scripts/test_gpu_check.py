"""The check of a GPU, rehearsed on a CPU with networks of four blocks."""

import json
import sys

import pytest
import torch

from common.distributed import UserError
from scripts.tools import gpu_check


def flags(*words: str):
    return gpu_check.get_args_parser().parse_args(["--tiny", "--device", "cpu", *words])


def test_speed__what_it_measures():
    found = gpu_check.speed(flags(), "a2mim resnet", "default")
    assert found["batch"] == 4 and found["precision"] == "float32"
    assert found["images/s"] == pytest.approx(4e3 / found["ms"], rel=0.01)
    parts = sum(found[f"{name} ms"] for name in ("forward", "backward", "optimizer"))
    assert 0.3 < parts / found["ms"] < 3 and found["min ms"] <= found["ms"] <= found["max ms"]
    assert 0 < found["of peak"] < 1 and found["GFLOP/image"] > 0.01


def test_files__counts_real_images():
    found = gpu_check.files(flags(), "a2mim resnet")
    assert found["images/s"] > 0 and 0 < found["waits for images"] < 1
    assert gpu_check.files(flags(), "a2mim resnet", "device")["images/s"] > 0


def test_guard__ends_the_run_and_changes_no_weight():
    found = gpu_check.guard(flags(), "a2mim resnet")
    assert found["guard"] == "on the host" and "loss" in found["ended with"]


def test_agreement__of_bf16(monkeypatch):
    assert gpu_check.agreement(flags(), "a2mim resnet")["largest difference"] < 0.02
    steps = iter(torch.arange(1.0, 7.0))
    monkeypatch.setattr(gpu_check.bench.Training, "step", lambda *_: next(steps))
    with pytest.raises(UserError, match="bf16 and fp32 differ by 300.0% of the loss"):
        gpu_check.agreement(flags(), "a2mim resnet")


def test_items__the_most_valuable_first_and_each_can_be_run():
    planned = gpu_check.items(gpu_check.get_args_parser().parse_args(["--device", "cuda", "--data_path", "DATA"]))
    assert [words[0] for _, words in planned[:4]] == ["machine", "peaks", "tests", "speed"]
    assert {words[0] for _, words in planned} == set(gpu_check.ITEMS)
    assert ["speed", "semaim base", "--attn_impl flex"] in [words for _, words in planned]
    for _, (name, *words) in planned:
        if name == "speed":
            assert words[0] in gpu_check.PAPER and words[1] in gpu_check.VARIANTS
    for preset in gpu_check.PAPER:
        gpu_check.flags_of(flags(), preset)


def test_main__a_line_for_each_item_as_it_comes(tmp_path, monkeypatch, capsys):
    code = "import sys, time; word = sys.argv[sys.argv.index('--item') + 1]; time.sleep(9 * (word == 'files')); "
    code += "print('{\"found\": 1}') if word != 'guard' else sys.exit('guard: wrong')"
    script = tmp_path / "item.py"
    script.write_text(code)
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    plan = [(60, ["peaks"]), (60, ["guard", "saim"]), (1, ["files", "saim"])]
    monkeypatch.setattr(gpu_check, "items", lambda args: plan)
    with pytest.raises(SystemExit) as end:
        gpu_check.main(flags("--out", str(tmp_path), "--minutes", "1"))
    assert end.value.code == 1
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok", "failed", "out of time"]
    assert lines[0]["result"] == {"found": 1} and lines[1]["error"] == "guard: wrong"
    assert "1 ok, 1 failed, 1 out of time" in capsys.readouterr().out


def test_main__items_without_time_are_skipped(tmp_path):
    gpu_check.main(flags("--out", str(tmp_path), "--minutes", "0.01"))
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert {line["status"] for line in lines} == {"skipped"}


def test_mistakes__one_line(tmp_path):
    with pytest.raises(UserError, match="--minutes 0.0: expected more than 0"):
        gpu_check.main(flags("--minutes", "0"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        gpu_check.main(flags("--out", str(tmp_path / "file" / "x")))


@pytest.mark.slow
def test_rehearsal__all_items(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", sys.executable)
    gpu_check.main(flags("--out", str(tmp_path), "--minutes", "20"))
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert {line["status"] for line in lines} == {"ok"}
    resumed = [line["result"] for line in lines if line["item"][0] == "resume"]
    assert len(resumed) == len(gpu_check.NANO) and all(found["equal"] for found in resumed)
