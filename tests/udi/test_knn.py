"""k-NN: the vote against the authors' numbers, and the script on one and on several processes."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.datasets import eval_transform
from tests.support import processes
from tests.support.helpers import assert_close, golden_files, load_golden
from tests.support.runs import mistake, run_main
from tests.support.udi_weights import NANO, pretrained
from udi import main_knn
from udi.backbone import load_backbone
from udi.main_knn import DUMPS, FirstToken, knn_classifier


@golden_files("udi", "knn")
def test_vote(path):
    ref = load_golden(path)
    train, test = (F.normalize(ref[f"in/{split}_features"], dim=1) for split in ("train", "test"))
    for name, expected in ref.group("out").items():
        found = knn_classifier(
            train,
            ref["in/train_labels"],
            test,
            ref["in/test_labels"],
            int(name.removeprefix("k")),
            ref.meta["temperature"],
            num_classes=ref.meta["num_classes"],
        )
        assert_close(found, expected, **ref.meta["tolerance"], what=name)


@golden_files("udi", "eval_transforms")
def test_transform(path):
    ref = load_golden(path)
    for name, expected in ref.group("out/knn_linear_semi_transfer").items():
        image: Any = eval_transform(224, 224 / 256)(Image.fromarray(ref[f"in/image{name}"].numpy()))
        assert_close(image[:, ::8, ::8], expected, **ref.meta["tolerance"], what=name)


# ---- the script

SMALL = [*NANO, "--input_size", "32", "--num_workers", "0", "--nb_classes", "10", "--batch_size_per_gpu", "7"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return pretrained(tmp_path_factory.mktemp("knn"))


def results(text: str) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy by k."""
    lines = re.findall(r"(\d+)-NN classifier result: Top1: (\d+\.\d{4}), Top5: (\d+\.\d{4})$", text, re.MULTILINE)
    return {int(k): (float(top1), float(top5)) for k, top1, top5 in lines}


def test_log_is_beside_the_weights(digits, tmp_path, monkeypatch, capsys):
    path = pretrained(tmp_path)
    flags = [*SMALL, "--nb_knn", "5", "1", "--data_path", digits]
    run_main(main_knn, *flags, "--pretrained_weights", path)
    folder = tmp_path / "knn-eva-temperature-0.070-key-teacher"
    lines = (folder / "knn.log").read_text().splitlines()
    assert len(lines) == 2
    assert all(
        re.fullmatch(r"INFO:\d-NN classifier result: Top1: \d+\.\d{4}, Top5: \d+\.\d{4}", line) for line in lines
    )
    assert results("\n".join(lines)) == results(capsys.readouterr().out)
    # A bare file name: in the current folder. Another key has its own folder.
    monkeypatch.chdir(tmp_path)
    student = ["--checkpoint_key", "student", "--temperature", "0.1", "--class_tokens", "first"]
    run_main(main_knn, *flags, *student, "--pretrained_weights", "checkpoint.pth")
    assert (tmp_path / "knn-eva-temperature-0.100-key-student" / "knn.log").is_file()
    run_main(main_knn, *flags, "--pretrained_weights", "", "--output_dir", str(tmp_path / "own"))
    assert (tmp_path / "own" / "knn.log").is_file()
    assert "the backbone is random" in capsys.readouterr().out


def test_several_processes_find_the_same(digits, weights, tmp_path, capsys):
    """68 images do not share out evenly over the batches; the files are those of one process."""
    flags = [*SMALL, "--nb_knn", "5", "1", "--data_path", digits, "--pretrained_weights", weights]
    run_main(main_knn, *flags, "--dump_features", str(tmp_path / "one"))
    alone = results(capsys.readouterr().out)
    two = ["udi/eval_knn/eval_knn.py", *flags, "--dump_features", str(tmp_path / "two")]
    assert processes.launch(tmp_path / "out", *two, processes=2) == [0, 0]
    together = (tmp_path / "out").read_text()
    for k, values in results(together).items():
        assert values == pytest.approx(alone[k], abs=5.01)  # of 20 images one may have two equally near neighbours
    for name in DUMPS:
        one, two = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("one", "two"))
        assert_close(two, one, rtol=0, atol=1e-5, what=name)
    assert list(results(together)) == list(alone) == [5, 1]
    run_main(main_knn, *flags, "--load_features", str(tmp_path / "one"), "--data_path", "/nowhere")
    assert results(capsys.readouterr().out) == alone


def test_features_are_the_normalised_first_token(weights):
    args = main_knn.get_args_parser().parse_args([*SMALL, "--pretrained_weights", weights])
    model = main_knn.build_model(args).eval()
    x = torch.randn(2, 3, 32, 32)
    tokens: torch.Tensor = model.backbone.get_intermediate_layers(x, 1)[0]  # type: ignore[operator]
    assert isinstance(model, FirstToken)
    assert tokens.shape == (2, 2 + 16, 96)
    assert_close(model(x), tokens[:, 0], rtol=1e-5, atol=1e-6)
    args.class_tokens = "first"
    alone = main_knn.build_model(args).eval()
    assert alone.backbone.pos_embed.shape == (1, 1 + 16, 96)
    assert load_backbone(weights)["cls_token"].shape == (1, 2, 96)
    assert (alone(x) - model(x)).abs().max() > 1e-3, "the second token is attended to"


@pytest.mark.slow
def test_fewer_images_than_processes(weights, digits, tmp_path, launch):
    """The second process has no image to compute."""
    for split in ("train", "val"):
        (tmp_path / split / "0").mkdir(parents=True)
        shutil.copy(next(Path(digits, split, "0").iterdir()), tmp_path / split / "0")
    flags = [*SMALL, "--nb_knn", "1", "--data_path", str(tmp_path), "--pretrained_weights", weights]
    assert results(launch(2, "udi/main_knn.py", *flags).stdout) == {1: (100, 100)}


MISTAKES = [
    (["--nb_knn", "49"], "--nb_knn 49: there are only 48 training images"),
    (["--nb_knn", "0"], "--nb_knn 0: expected at least 1"),
    (["--nb_classes", "2"], "--nb_classes 2: the training images have 10 classes"),
    (["--temperature", "0"], "--temperature 0.0: expected at least"),
    (["--pretrained_weights", "/nowhere.pth"], "/nowhere.pth: no such checkpoint file"),
    (["--arch", "vit_tiny"], "--arch vit_tiny: "),
    (["--data_path", "/nowhere"], "--data_path /nowhere: no such folder"),
    (["--load_features", "/nowhere"], "--load_features /nowhere: expected trainfeat.pth"),
    (["--dump_features", "/proc/x"], "--dump_features /proc/x: cannot be written"),
    (["--output_dir", "/proc/x"], "/proc/x/knn.log: cannot be written"),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(flags, words, digits, weights, capsys):
    own = ["--data_path", digits, "--pretrained_weights", weights, "--nb_knn", "2"]
    assert words in mistake(main_knn, *SMALL, *own, *flags, capsys=capsys)
