"""k-NN of any method's checkpoint: the numbers of the methods' own main_knn.py, from files, on several processes."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.tools import extract_features, knn
from semaim import main_knn as semaim_knn
from semaim.models_semaim import MODELS
from tests.support import processes
from tests.support.runs import mistake, run_main
from tests.support.udi_weights import pretrained
from udi import main_knn as udi_knn

SMALL = ["--num_workers", "0", "--batch_size", "7", "--device", "cpu", "--nb_knn", "5", "1", "--json"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("knn")
    torch.manual_seed(0)
    model = MODELS["aim_nano"](img_size=16, patch_size=8, query_depth=4, permutation_type="stochastic")
    torch.save({"state_dict": model.state_dict()}, folder / "semaim.pth")
    return {"semaim": str(folder / "semaim.pth"), "udi": pretrained(folder / "udi")}


def results(output: str) -> dict[str, dict[str, float]]:
    """Accuracies by k, of the last line and of the lines before, which must agree."""
    found = json.loads(output.splitlines()[-1])["knn"]
    lines = re.findall(r"(\d+)-NN classifier result: Top1: ([\d.]+), Top5: ([\d.]+)$", output, re.MULTILINE)
    assert {k: {"top1": float(a), "top5": float(b)} for k, a, b in lines} == found
    return found


def printed(output: str) -> dict[str, dict[str, float]]:
    """Accuracies by k of a main_knn.py."""
    lines = re.findall(r"(\d+)-NN classifier result: Top1: ([\d.]+), Top5: ([\d.]+)$", output, re.MULTILINE)
    return {k: {"top1": float(a), "top5": float(b)} for k, a, b in lines}


@pytest.mark.parametrize("method", ["semaim", "udi"])
def test_numbers_are_those_of_the_methods(method, checkpoints, digits, tmp_path, capsys):
    run_main(knn, method, checkpoints[method], "--data_path", digits, *SMALL)
    found = results(capsys.readouterr().out)
    flags = ["--num_workers", "0", "--batch_size_per_gpu", "7", "--nb_knn", "5", "1", "--data_path", digits]
    flags += ["--pretrained_weights", checkpoints[method], "--nb_classes", "10", "--device", "cpu"]
    if method == "semaim":
        run_main(semaim_knn, *flags, "--model", "vit_nano_patch16", "--input_size", "16", "--patch_size", "8")
    else:
        run_main(udi_knn, *flags, "--arch", "vit_nano", "--input_size", "32", "--output_dir", str(tmp_path))
    expected = printed(capsys.readouterr().out)
    assert list(found) == list(expected) == ["5", "1"]
    for k in found:
        assert found[k] == pytest.approx(expected[k], abs=1e-4)


def test_files_and_several_processes(checkpoints, digits, tmp_path, capsys):
    """The vote from files equals that of the checkpoint; so does that of two processes."""
    flags = ["semaim", checkpoints["semaim"], "--data_path", digits]
    run_main(knn, *flags, *SMALL)
    alone = results(capsys.readouterr().out)
    files = [str(tmp_path / "train.npy"), str(tmp_path / "val.safetensors")]
    for split, file in zip(("train", "val"), files, strict=True):
        own = ["--num_workers", "0", "--device", "cpu", "--dtype", "float32", "--split", split, "--out", file]
        run_main(extract_features, *flags, *own)
    capsys.readouterr()
    run_main(knn, "--features", *files, *SMALL)
    assert results(capsys.readouterr().out) == alone
    log = tmp_path / "log"
    assert processes.launch(log, "scripts/tools/knn.py", *flags, *SMALL, processes=2) == [0, 0], log.read_text()
    assert results(log.read_text().strip()) == alone


@pytest.mark.slow
def test_files_on_several_processes(tmp_path):
    files = dump(tmp_path)
    found = []
    for n in (1, 3):
        log = tmp_path / f"log{n}"
        assert processes.launch(log, "scripts/tools/knn.py", "--features", *files, *SMALL, processes=n) == [0] * n
        found.append(results(log.read_text().strip()))
    assert found[0] == found[1] == {"5": {"top1": 100, "top5": 100}, "1": {"top1": 100, "top5": 100}}


def dump(folder: Path, dim: int = 4, val_labels: tuple[int, ...] = (0, 1, 2)) -> list[str]:
    """Files of twelve training and three validation images in three well separated classes."""
    draw = np.random.default_rng(0)
    paths = []
    for name, labels, width in (("train", (0, 1, 2) * 4, 4), ("val", val_labels, dim)):
        features = np.eye(max(3, width))[np.array(labels) % 3, :width] + 0.1 * draw.standard_normal(
            (len(labels), width)
        )
        np.save(folder / f"{name}.npy", features.astype(np.float16))
        np.save(folder / f"{name}.labels.npy", np.array(labels))
        (folder / f"{name}.json").write_text(json.dumps({"names": [str(i) for i in range(len(labels))]}))
        paths.append(str(folder / f"{name}.npy"))
    return paths


def test_mistakes_in_files(tmp_path, capsys):
    cases = [
        (dump(tmp_path), ["--nb_knn", "13"], "--nb_knn 13: there are only 12 training images"),
        (dump(tmp_path), ["--nb_knn", "0"], "--nb_knn 0: expected at least 1"),
        (dump(tmp_path), ["--temperature", "0"], "--temperature 0.0: expected at least"),
        (["/nowhere.npy", "/x.npy"], [], "/nowhere.npy: expected a file of scripts/tools/extract_features.py"),
    ]
    for files, flags, words in cases:
        assert words in mistake(knn, "--features", *files, *SMALL, *flags, capsys=capsys)
    files = dump(tmp_path, dim=3)
    assert "train.npy has 4 numbers per image, " in mistake(knn, "--features", *files, *SMALL, capsys=capsys)
    files = dump(tmp_path, val_labels=(-1, -1))
    assert "val.npy: its images have no class folders" in mistake(knn, "--features", *files, *SMALL, capsys=capsys)
    dump(tmp_path)
    assert "expected METHOD and CHECKPOINT, or --features" in mistake(knn, *SMALL, capsys=capsys)
    assert "expected METHOD and" in mistake(knn, "saim", "x", "--features", *files, *SMALL, capsys=capsys)
    assert "saim: expected a CHECKPOINT" in mistake(knn, "saim", *SMALL, capsys=capsys)


def test_mistakes_in_data(checkpoints, digits, tmp_path, capsys):
    flags = ["semaim", checkpoints["semaim"], *SMALL]
    assert "/nowhere: no such folder" in mistake(knn, *flags, "--data_path", "/nowhere", capsys=capsys)
    assert "--nb_knn 49: there are only 48 training images" in mistake(
        knn, *flags, "--data_path", digits, "--nb_knn", "49", capsys=capsys
    )
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        shutil.copy(next(Path(digits, split, "0").iterdir()), tmp_path / split)
    assert "no class folders" in mistake(knn, *flags, "--data_path", str(tmp_path), capsys=capsys)
