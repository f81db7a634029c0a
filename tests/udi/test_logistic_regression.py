"""Logistic regression: the minimum, the features, and the script on one and on several processes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.helpers import assert_close
from tests.support.runs import mistake, run_main
from tests.support.udi_weights import NANO, pretrained
from udi import main_logistic_regression
from udi.main_knn import DUMPS
from udi.main_logistic_regression import Features, fit
from udi.models_udi import VisionTransformer


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_the_gradient_vanishes(classes, penalty):
    """Of mean cross entropy + penalty / 2 |W|^2 over all classes' weights, without intercept."""
    draw = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(60, 8, generator=draw, dtype=torch.float64), dim=1)
    y = torch.arange(60) % classes
    model = fit(x.numpy(), y.numpy(), penalty)
    weights = torch.from_numpy(np.asarray(model.coef_))
    if classes == 2:  # the difference of two opposite vectors
        weights = torch.cat([-weights / 2, weights / 2])
    weights.requires_grad_()
    (F.cross_entropy(x @ weights.T, y) + penalty / 2 * weights.square().sum()).backward()
    assert weights.grad is not None
    assert weights.grad.abs().max() < 1e-6
    assert not np.any(model.intercept_)


# ---- features


def network(tokens: int = 2) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer([32], 8, embed_dim=24, depth=3, num_heads=3, num_class_token=tokens).eval()


@pytest.mark.parametrize("tokens", [1, 2])
def test_kinds_of_features(tokens):
    model, x = network(tokens), torch.randn(2, 3, 32, 32)
    last, raw = model.get_intermediate_layers(x, 2), model.forward_tokens(x)
    assert_close(Features(model, 1, 0)(x), last[1][:, 0], rtol=1e-5, atol=1e-6)
    assert_close(Features(model, 2, 0)(x), torch.cat([last[0][:, 0], last[1][:, 0]], 1), rtol=1e-5, atol=1e-6)
    assert_close(Features(model, 1, 1)(x), raw[:, tokens:].mean(1), rtol=1e-5, atol=1e-6)
    both = torch.cat([last[1][:, 0], last[1][:, tokens:].mean(1)], 1)
    assert_close(Features(model, 1, 2)(x), both, rtol=1e-5, atol=1e-6)


def test_three_scales():
    model, x = network(), torch.randn(2, 3, 64, 64)
    found = Features(model, 1, 0, multi_scale=True)(x)
    sizes = [F.interpolate(x, scale_factor=s, mode="bilinear") for s in (2**-0.5, 0.5)]
    assert [s.shape[-1] for s in sizes] == [45, 32]
    expected = sum((model(image)[:, 0] for image in sizes), model(x)[:, 0]) / 3
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---- the script

SMALL = [*NANO, "--input_size", "32", "--num_workers", "0", "--batch_size_per_gpu", "7", "--class_num", "10"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return pretrained(tmp_path_factory.mktemp("regression"))


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("lists") / "forty.txt"
    path.write_text("\n".join(f"{i:04d}.png" for i in range(40)))
    return str(path)


def flags_of(digits: str, weights: str, names: str, folder: Path, *further: str) -> list[str]:
    own = ["--data_path", digits, "--pretrained_weights", weights, "--target_list_path", names]
    return [*SMALL, *own, "--output_dir", str(folder), "--load_features", str(folder / "features"), *further]


def results(path: Path) -> dict[tuple[str, str], float]:
    lines = re.findall(r"INFO:(\w+): 40 images, lambda (\S+): accuracy ([\d.]+)\n", path.read_text())
    return {(key, penalty): float(value) for key, penalty, value in lines}


def test_results(digits, weights, names, tmp_path, capsys):
    flags = flags_of(digits, weights, names, tmp_path, "--dump_features", str(tmp_path / "features"))
    run_main(main_logistic_regression, *flags)
    found = results(tmp_path / "forty_train.log")
    assert list(found) == [(key, penalty) for key in ("teacher", "student") for penalty in ("0.01", "0.1", "1")]
    assert "no features in" in capsys.readouterr().out
    # From the files: without images.
    (tmp_path / "forty_train.log").unlink()
    run_main(main_logistic_regression, *flags, "--data_path", "/nowhere", "--pretrained_weights", "/nowhere")
    assert results(tmp_path / "forty_train.log") == found
    # Those of another kind of features are not taken.
    assert "no such folder" in mistake(
        main_logistic_regression,
        *flags,
        *("--data_path", "/nowhere", "--avgpool_patchtokens", "1"),
        capsys=capsys,
    )


def test_adjusted_weights(digits, weights, names, tmp_path):
    """0.4 of 40 images is 0.01 of their mean."""
    one = ["--checkpoint_key", "teacher", "--lr_lambd"]
    run_main(main_logistic_regression, *flags_of(digits, weights, names, tmp_path / "a", *one, "0.4"))
    plain = [*one, "0.01", "--adjust_lambd", "false"]
    run_main(main_logistic_regression, *flags_of(digits, weights, names, tmp_path / "b", *plain))
    first, second = (results(tmp_path / folder / "forty_train.log") for folder in "ab")
    assert list(first.values()) == list(second.values())


@pytest.mark.slow
def test_several_processes_find_the_same(digits, weights, names, tmp_path, launch):
    found = []
    for folder, processes in (("one", 1), ("two", 2)):
        flags = flags_of(digits, weights, names, tmp_path / folder, "--checkpoint_key", "teacher")
        script = "udi/eval_semi_supervised_learning/eval_logistic_regression.py"
        launch(processes, script, *flags, "--dump_features", str(tmp_path / folder))
        found.append(results(tmp_path / folder / "forty_train.log"))
    assert found[0] == pytest.approx(found[1], abs=5.01)
    for name in DUMPS:
        one, two = (
            torch.load(next((tmp_path / folder).glob(f"*/{name}")), weights_only=True) for folder in ("one", "two")
        )
        assert_close(two, one, rtol=0, atol=1e-5, what=name)


MISTAKES = [
    (["--lr_lambd", "0.1", "0"], "--lr_lambd 0.0: expected more than 0"),
    (["--class_num", "1"], "--class_num 1: expected at least 2"),
    (["--n_last_blocks", "5"], "--n_last_blocks 5: expected 1 to 4"),
    (["--pretrained_weights", "/nowhere.pth"], "/nowhere.pth: no such checkpoint file"),
    (["--target_list_path", "/nowhere.txt"], "--target_list_path /nowhere.txt: No such file"),
    (["--arch", "vit_tiny"], "--arch vit_tiny: "),
    (["--output_dir", "/proc/x"], "/proc/x/forty_train.log: cannot be written"),
    (["--dump_features", "/proc/x"], "cannot be written"),
    (["--checkpoint_key", ","], "--checkpoint_key ,: expected teacher, student or both"),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(flags, words, digits, weights, names, tmp_path, capsys):
    own = flags_of(digits, weights, names, tmp_path)
    assert words in mistake(main_logistic_regression, *own, *flags, capsys=capsys)
