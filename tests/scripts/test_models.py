"""The small encoders of docs/models: the files that are there, the page about them, and how they are made."""

import json

import pytest
import torch

from saim import visualize_attention
from scripts.tools import export, knn, models, runs
from scripts.tools.encoders import load as encoders
from tests.support.helpers import ROOT
from tests.support.runs import mistake, run_main

MODELS = models.read()


def test_files_are_small_and_on_the_page():
    assert {path.stem for path in models.FOLDER.glob("*.safetensors")} == set(MODELS)
    assert models.tables(MODELS) in (ROOT / "docs" / "models.md").read_text()
    assert max(about["bytes"] for about in MODELS.values()) < 1.2e6
    assert sum(about["bytes"] for about in MODELS.values()) < 5e6


@pytest.mark.parametrize("method", MODELS)
def test_file(method):
    """What the page says of it, nothing of the machine that made it, and features that differ between images."""
    path, about = models.FOLDER / f"{method}.safetensors", MODELS[method]
    assert (path.stat().st_size, runs.sha256(str(path))) == (about["bytes"], about["sha256"])
    backbone = encoders.load_backbone(method, str(path))
    assert backbone.model_name == about["network"]
    flags = {flag: value for flag, value in backbone.args.items() if flag != "data_path"}  # only a folder's name
    assert not any(export.of_machine(flag, value) for flag, value in flags.items())
    assert "/" not in backbone.args.get("data_path", "")
    with torch.no_grad():
        rows = backbone(torch.randn(2, 3, *[backbone.input_size] * 2))
    assert rows.isfinite().all() and not torch.allclose(*rows)


@pytest.mark.skipif("saim" not in MODELS, reason="no such file")
def test_tools_take_a_file(digits, tmp_path, capsys):
    """k-NN, attention and the folder for timm, as the page has them; the card says what is known and nothing twice."""
    path = str(models.FOLDER / "saim.safetensors")
    run_main(knn, "saim", path, "--data_path", digits, "--num_workers", "0", "--device", "cpu")
    assert "20-NN classifier result" in capsys.readouterr().out
    flags = ["--data_path", digits, "--output_dir", str(tmp_path / "attention"), "--num_images", "2"]
    run_main(visualize_attention, "--checkpoint", path, *flags)
    assert list((tmp_path / "attention").glob("*.png"))
    run_main(export, "saim", path, str(tmp_path / "timm"))
    card = (tmp_path / "timm" / "README.md").read_text()
    assert not any(f"`{flag}`" in card or f"- {flag}:" in card for flag in export.MACHINE)


def test_how_they_are_made(tmp_path, monkeypatch, capsys):
    """The commands, of which those that are done are not repeated, and what is kept of them."""
    commands = []
    accuracy = {"k-NN": {"200": {"cae": [50.0, 52.0, 54.0], "from scratch": [47.0, 48.0, 49.0]}}}
    accuracy["linear probe"] = {"200": {"cae": [60.0, 61.0, 62.0], "from scratch": [57.0, 58.0, 59.0]}}
    network = {"cae": {"network": "cae_nano of cae"}}

    def run(*words, **env):
        commands.append([*map(str, words)])
        if "scripts/tools/export.py" in words:
            (tmp_path / "models" / "cae.safetensors").write_text("weights")
        if "scripts/tools/compare.py" in words:
            words[-1].mkdir(parents=True)
            (words[-1] / "compare.json").write_text(json.dumps({"starts": network, "accuracy": accuracy}))

    monkeypatch.setattr(models, "run", run)
    monkeypatch.setattr(models, "FOLDER", tmp_path / "models")
    (tmp_path / "train").mkdir()
    flags = [str(tmp_path), "cae", "--epochs", "3", "--out", str(tmp_path / "out")]
    run_main(models, *flags)
    assert [command[1].rpartition("/")[2] for command in commands] == [
        "imagenette.sh",
        "export.py",
        "prepare_data.py",
        "compare.py",
    ]
    assert commands[0][2:] == ["cae", "--tiny", "tokenizer", "pretrain"]
    assert commands[1][3] == str(tmp_path / "out" / "cae" / "pretrain" / "checkpoint.pth")
    shown = capsys.readouterr().out
    row = "| cae | cae_nano | 3 | 48.0 ± 1.0 | 52.0 ± 2.0 | 58.0 ± 1.0 | **61.0 ± 1.0** |"
    assert row in shown
    run_main(models, *flags)
    assert len(commands) == 7
    run_main(models)
    assert row in capsys.readouterr().out
    assert "METHOD mae: expected one of saim" in mistake(models, str(tmp_path), "mae", capsys=capsys)
    assert "has no folder train/" in mistake(models, str(tmp_path / "out"), capsys=capsys)
