"""Segmentation: loss, sliding windows, averaged predictions, and a run that is stopped and resumed."""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cae.engine_segmentation import evaluate, fit, predict, save_picture, segmentation_loss, slide
from common import distributed
from common.dense_datasets.segmentation import segmentation_loaders
from common.dense_datasets.transforms import EvalTransform, TrainTransform
from tests.support.dense import NAMES, masked_images
from tests.support.helpers import assert_close, golden_files, load_golden, tolerance
from tests.support.runs import CPU, kept_signals, spoil


class Network(nn.Module):
    """Two convolutions of stride 4; the auxiliary output in training mode only."""

    def __init__(self, pool: bool = False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1))
        self.pool = nn.AdaptiveAvgPool2d(1) if pool else nn.Identity()
        self.heads = nn.ModuleList(nn.Conv2d(8, 3, 1) for _ in range(2))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        return [head(x) for head in (self.heads if self.training else self.heads[:1])]  # type: ignore[index]


@golden_files("cae", "seg_slide")
def test_sliding_windows(path):
    ref = load_golden(path)

    def model(crop: Tensor) -> list[Tensor]:
        logits = nn.functional.conv2d(crop, ref["in/w"], ref["in/b"], padding=1)
        rows, columns = (torch.linspace(0, end, n) for end, n in zip((2, 1), crop.shape[2:], strict=True))
        seen.append(crop.shape)
        return [logits * (1 + rows[:, None] + columns)]

    seen: list[torch.Size] = []
    (window, width), (stride, _) = ref.meta["crop"], ref.meta["stride"]
    assert window == width
    logits = slide(model, ref["in/x"], window, stride)
    ref.equal("n_windows", len(seen))
    ref.check("out/logits_padded", logits, **tolerance(ref))
    size = torch.Size(ref.meta["ori_shape"])
    full = nn.functional.interpolate(logits, size, mode="bilinear")
    ref.check("out/logits_rescaled", full, **tolerance(ref))
    prediction = predict(model, [ref["in/x"]], size, window, stride)  # type: ignore[arg-type]
    assert torch.equal(prediction, full.argmax(1))


def test_ignored_pixels_count_as_zeros_in_the_mean():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 3, 6, 5)), rng.integers(0, 3, (2, 6, 5))
    labels[:, 2:4] = 255
    picked = np.take_along_axis(logits, np.where(labels == 255, 0, labels)[:, None], 1)[:, 0]
    entropy = np.where(labels == 255, 0, np.log(np.exp(logits).sum(1)) - picked).mean()
    outputs = [torch.from_numpy(logits), torch.zeros(2, 3, 1, 1, dtype=torch.float64)]
    losses = segmentation_loss(outputs, torch.from_numpy(labels), 0.4)
    assert_close(losses["loss_decode"], entropy, rtol=1e-6, atol=0)
    assert_close(losses["loss_auxiliary"], np.log(3) * 2 / 3, rtol=1e-6, atol=0)
    assert_close(losses["loss"], entropy + 0.4 * np.log(3) * 2 / 3, rtol=1e-6, atol=0)
    right = (logits.argmax(1) == labels).sum() / (labels != 255).sum()
    assert_close(losses["pixel_acc"], 100 * right, rtol=1e-6, atol=0)
    assert list(segmentation_loss(outputs[:1], torch.from_numpy(labels))) == ["loss", "loss_decode", "pixel_acc"]


def test_small_images_fill_the_window_and_views_are_averaged():
    torch.manual_seed(0)
    network = Network().eval()
    small, shapes = torch.randn(1, 3, 12, 40), []
    network.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[2:])))
    assert predict(network, [small], torch.Size((24, 80)), window=16, stride=12).shape == (1, 24, 80)
    assert set(shapes) == {(16, 16)} and len(shapes) == 3
    views, size = [torch.randn(1, 3, 16, 16), torch.randn(1, 3, 24, 24)], torch.Size((20, 20))
    mirrored = [network(view.flip(-1))[0].flip(-1) for view in views]
    resize = partial(nn.functional.interpolate, mode="bilinear")
    each = [
        resize(resize(logits, view.shape[2:]), size).softmax(1)
        for view, one in zip(views, mirrored, strict=True)
        for logits in (network(view)[0], one)
    ]
    assert torch.equal(predict(network, views, size, flip=True), sum(each).argmax(1))  # type: ignore[union-attr]


def test_pictures_can_be_drawn(tmp_path):
    labels = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    save_picture(tmp_path / "a" / "0.png", torch.randn(3, 4, 4), labels, torch.zeros(2, 2).long(), list(NAMES))
    assert (tmp_path / "a" / "0.png").stat().st_size > 5000
    (tmp_path / "file").touch()
    with pytest.raises(distributed.UserError, match="file.0.png: cannot be written"):
        save_picture(tmp_path / "file" / "0.png", torch.randn(3, 4, 4), labels, labels, list(NAMES))


def run(data: Path, out: Path, **kwargs) -> argparse.Namespace:
    """A run of 7 updates in intervals of 3 on one process."""
    flags = {"iters": 7, "eval_interval": 3, "save_interval": 2, "accum_iter": 2, "batch_size": 2, "seed": 0}
    flags |= {"data_path": str(data), "output_dir": str(out), "nb_classes": None, "reduce_zero_label": None}
    flags["in_chans"] = None
    flags |= {
        "num_workers": 0,
        "pin_mem": False,
        "bad_images": "stop",
        "eval": False,
        "auxiliary_weight": 0.4,
        "pictures": 0,
    }
    args = argparse.Namespace(**flags | kwargs)
    torch.manual_seed(0)
    model = Network(pool=args.batch_size == 1)
    with kept_signals():
        loader, val_loader = segmentation_loaders(
            args, CPU, TrainTransform((16, 24), (48, 24)), EvalTransform((48, 24))
        )
        assert loader is not None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        updater = distributed.Updater(optimizer, CPU, "fp32", args.accum_iter, buffers=model.buffers())
        checkpoint = distributed.Checkpoint(args.output_dir, args, model, optimizer=optimizer)
        evaluation = partial(
            evaluate, loader=val_loader, names=args.class_names, pictures=args.pictures, folder=str(out)
        )
        latest = distributed.find_checkpoint(args.output_dir, "")
        fit(args, model, loader, updater, lambda update: seen.append(update), checkpoint, latest, evaluation)
    return args


seen: list[int] = []  # updates whose rates were set


def test_a_run_by_updates(tmp_path, capsys):
    data = masked_images(tmp_path / "data")
    seen.clear()
    run(data, tmp_path, pictures=1)
    assert seen == list(range(7))
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["iter"] for line in lines] == [3, 6, 7]
    assert all(0 < line["val_mIoU"] <= 100 and np.isfinite(line["train_loss"]) for line in lines)
    best = torch.load(tmp_path / "checkpoint-best.pth", weights_only=True)
    assert best["best"] == max(line["val_mIoU"] for line in lines)
    assert (tmp_path / "pictures" / "0000.png").exists() and not (tmp_path / "pictures" / "0001.png").exists()
    assert "floor" in capsys.readouterr().out  # the table of classes


@pytest.mark.parametrize("when", [5, 12])  # forward passes: two an update; inside an interval, and in the shorter last
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, when):
    data = masked_images(tmp_path / "data")
    run(data, tmp_path / "whole")
    spoil(monkeypatch, Network, when, stop=True)
    with pytest.raises(distributed.Stopped):
        run(data, tmp_path / "halves")
    monkeypatch.undo()
    run(data, tmp_path / "halves")
    whole, halves = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("whole", "halves"))
    for name, value in whole["model"].items():
        assert torch.equal(value, halves["model"][name]), name
    assert (tmp_path / "halves" / "log.txt").read_text() == (tmp_path / "whole" / "log.txt").read_text()


def test_a_killed_run_goes_on_from_the_checkpoint_inside_an_interval(tmp_path, monkeypatch):
    data = masked_images(tmp_path / "data")
    spoil(monkeypatch, Network, 5, stop=False)
    with pytest.raises(distributed.NonFinite):
        run(data, tmp_path / "run", save_interval=1)
    state = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert (state["epoch"], state["images"]) == (-1, 8)  # two updates of two batches of two


def test_a_batch_norm_of_one_value_is_refused(tmp_path):
    with pytest.raises(distributed.UserError, match="--batch_size 1: .* expected at least 2"):
        run(masked_images(tmp_path / "data"), tmp_path / "run", batch_size=1)
