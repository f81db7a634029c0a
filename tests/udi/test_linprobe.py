"""Linear probing: features and training against the authors' numbers, transforms, files, and users' mistakes."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from common import datasets, distributed
from tests.support import udi_weights as files
from tests.support.helpers import ROOT, assert_close, golden_files, load_golden
from tests.support.runs import CPU, FixedLoader, RecordingLog, assert_same, mistake, run_main, spoil
from udi import engine_finetune, main_finetune, main_linprobe
from udi.backbone import build_backbone, load_backbone
from udi.main_linprobe import LinearClassifier, Probe, probe_features
from udi.models_udi import VisionTransformer

# ---- goldens


def backbone_of(config: dict, weights: dict[str, Tensor]) -> VisionTransformer:
    tokens = weights["cls_token"].shape[1]
    sizes = {"embed_dim": config["d"], "depth": config["depth"], "num_heads": config["h"], "num_class_token": tokens}
    model = VisionTransformer(img_size=[config["gs"]], patch_size=config["p"], **sizes)
    model.load_state_dict(weights)
    return model.eval()


@golden_files("udi", "linear_probe")
def test_probe_trajectory(path):
    """Features, and losses, rates, tests and weights of upstream's loop."""
    ref = load_golden(path)
    meta, tol = ref.meta, ref.meta["tolerance"]
    backbone = backbone_of(meta["config"], ref.group("sd/backbone"))
    before = copy.deepcopy(backbone.state_dict())
    imgs = [ref[f"in/x{i}"] for i in range(sum(name.startswith("in/x") for name in ref.arrays))]
    features = probe_features(backbone, imgs[0], meta["n_last_blocks"], meta["avgpool_patchtokens"])
    ref.check("out/features0", features, **tol)
    given = {name: value for name, value in ref.weights.items() if name.startswith("module.")}
    end, history = trained(ref, backbone, imgs, given)
    ref.check("out/lr", history["lr"], rtol=1e-9, atol=0)
    ref.check("out/train_loss", history["loss"], **tol)
    ref.check("out/test", history["test"], **tol)
    for name, expected in ref.group("out/final").items():
        assert_close(end[name], expected, **tol, what=name)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def probe_of(ref, backbone: VisionTransformer, weights: dict[str, Tensor]) -> Probe:
    meta = ref.meta
    model = Probe(backbone, meta["num_labels"], meta["n_last_blocks"], meta["avgpool_patchtokens"])
    probe = main_linprobe.Prefixed(model.classifier)
    assert list(probe.state_dict()) == list(weights)
    probe.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    return model


def trained(ref, backbone: VisionTransformer, imgs: list, weights: dict) -> tuple[dict[str, Tensor], dict[str, list]]:
    """A classifier's weights after the golden's training from the given ones, and the statistics of the epochs."""
    meta, model = ref.meta, probe_of(ref, backbone, weights)
    loader: Any = FixedLoader(imgs, [ref[f"in/y{i}"] for i in range(len(imgs))])
    args = main_linprobe.get_args_parser().parse_args([])
    optimizer = main_linprobe.build_optimizer(args, model, meta["lr"] * meta["total_batch"] / 256)
    scheduler = CosineAnnealingLR(optimizer, meta["epochs"], meta.get("lr_min", args.lr_min))
    updater = distributed.Updater(optimizer, CPU, "fp32")
    history: dict[str, list] = {"loss": [], "lr": [], "test": []}
    for epoch in range(meta["epochs"]):
        log, rate = RecordingLog([], epoch, len(loader)), optimizer.param_groups[0]["lr"]
        stats = engine_finetune.train_one_epoch(
            model, nn.CrossEntropyLoss(), loader, updater, lambda *_, rate=rate: (rate, 0.0), log
        )
        test = engine_finetune.evaluate(model, loader, updater)
        scheduler.step()
        history["loss"].append(stats["loss"])
        history["lr"].append(stats["lr"])
        history["test"].append([test[column] for column in meta["columns_test"]])
    return main_linprobe.Prefixed(model.classifier).state_dict(), history


@golden_files("udi", "eval_two_cls")
def test_features_of_checkpoints_with_two_class_tokens(path):
    ref = load_golden(path)
    teacher = {name.removeprefix("sd/"): ref[name] for name in ref.arrays if name.startswith("sd/teacher/")}
    state = {"teacher": {name.removeprefix("teacher/"): value for name, value in teacher.items()}}
    n, tol = ref.meta["n_last_blocks"], ref.meta["tolerance"]
    for folder, tokens in (("all_tokens", "all"), ("first_token_only", "first")):
        model = backbone_of(ref.meta["config"], load_backbone(state, "teacher", tokens))
        out = f"out/{folder}"
        ref.check(f"{out}/cls_concat", probe_features(model, ref["in/x"], n, False), **tol)
        classes = model.cls_token.shape[1]
        ref.check(f"{out}/attn_cls_to_patches", model.get_last_selfattention(ref["in/x"])[:, :, 0, classes:], **tol)
        if "in/x2" in ref:
            ref.check(f"{out}/dense_x2", model.get_intermediate_layers(ref["in/x2"], 1)[0][:, classes:], **tol)
        both = probe_features(model, ref["in/x"], 1, True).unflatten(1, (-1, 2))
        ref.check(f"{out}/knn", both[..., 0], **tol)
        ref.check(f"{out}/patch_mean", both[..., 1], **tol)


@golden_files("udi", "eval_transforms")
def test_transforms(path):
    ref = load_golden(path)
    parser = main_finetune.get_args_parser()
    makers = {
        "knn_linear_semi_transfer": datasets.eval_transform(224, 224 / 256),
        "finetune_imagenet_stats": main_finetune.build_transforms(
            parser.parse_args(["--imagenet_default_mean_and_std"])
        )[1],
        "finetune_inception_stats": main_finetune.build_transforms(parser.parse_args([]))[1],
    }
    names = [name.removeprefix("out/").split("/") for name in ref.arrays if name.startswith("out/")]
    assert names
    for stage, number in names:
        out: Any = makers[stage](Image.fromarray(ref[f"in/image{number}"].numpy()))
        ref.check(f"out/{stage}/{number}", out[:, ::8, ::8], **ref.meta["tolerance"], what=stage)


# ---- parts


def test_strong_transform_augments_the_whole_image_and_then_crops_it():
    names = [type(step).__name__ for step in main_linprobe.strong_transform().transforms]
    assert names == [
        *("RandomHorizontalFlip", "RandAugment", "RandomResizedCrop", "ToTensor", "Normalize", "RandomErasing")
    ]
    image = Image.fromarray(np.uint8(np.random.default_rng(0).integers(0, 256, (40, 50, 3))))
    with datasets.seeded(1):
        out: Any = main_linprobe.strong_transform(32)(image)
    assert (out.shape, out.dtype) == ((3, 32, 32), torch.float32)


def test_linear_classifier_starts_small():
    torch.manual_seed(0)
    layer = LinearClassifier(64, 500).linear
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not layer.bias.any()
    assert LinearClassifier(6, 3)(torch.rand(2, 3, 2)).shape == (2, 3)


def test_only_the_classifier_learns_and_in_float32():
    model = Probe(build_backbone("vit_nano", 4, None, 16), 10, 2, False).train()
    assert not model.backbone.training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "classifier.linear.weight",
        "classifier.linear.bias",
    }
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(2, 3, 16, 16))
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())


# ---- runs

SMALL = ["--arch", "vit_nano", "--patch_size", "4", "--input_size", "16", "--num_workers", "0", "--num_labels", "10"]
SMALL += ["--batch_size", "10", "--epochs", "3", "--lr", "2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return files.pretrained(tmp_path_factory.mktemp("pretraining"), *files.SIXTEEN)


def flags(digits: str, weights: str, *further: str) -> list[str]:
    return [*SMALL, "--data_path", digits, "--pretrained_weights", weights, *further]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.mark.parametrize("features", [["--n_last_blocks", "4"], ["--n_last_blocks", "1", "--avgpool_patchtokens", "1"]])
def test_probe_and_evaluate_it(digits, weights, features, capsys):
    own = flags(digits, weights, *features, "--class_tokens", "first")
    run_main(main_linprobe, *own)
    folder = Path(weights).parent / f"linear-eva-lr-2.000e+00-mlr-0.000e+00-bs-10-ep-3-key-teacher-layer-{features[1]}"
    state = distributed.load(str(folder / "checkpoint.pth.tar"))
    width = 96 * (2 if len(features) > 2 else 4)
    assert {k: tuple(v.shape) for k, v in state["state_dict"].items()} == {
        "module.linear.weight": (10, width),
        "module.linear.bias": (10,),
    }
    assert {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"} <= set(state)
    assert state["epoch"] == 3
    log = lines(folder)
    assert [list(line) for line in log] == [
        ["train_loss", "train_lr", "epoch", "test_loss", "test_acc1", "test_acc5"]
    ] * 3
    lr = 2 * 10 / 256
    assert [line["train_lr"] for line in log] == pytest.approx(
        [lr * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in range(3)]
    )
    assert state["best_acc"] == max(line["test_acc1"] for line in log)
    capsys.readouterr()
    run_main(main_linprobe, *own, "--evaluate")
    assert f"* Acc@1 {log[-1]['test_acc1']:.3f}" in capsys.readouterr().out
    run_main(main_linprobe, *own)  # nothing is left to do
    assert lines(folder) == log


@pytest.mark.parametrize("when", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_stop_inside_an_epoch_loses_nothing(digits, weights, tmp_path, when, capsys):
    """5 steps per epoch, the last one of 8 images."""
    own = flags(digits, weights, "--val_freq", "2")
    run_main(main_linprobe, *own, "--output_dir", str(tmp_path / "whole"))
    assert ["test_acc1" in line for line in lines(tmp_path / "whole")] == [True, False, True]
    part = [*own, "--output_dir", str(tmp_path / "part")]
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, Probe, when, stop=True)
        with pytest.raises(SystemExit):
            run_main(main_linprobe, *part)
    run_main(main_linprobe, *part)
    assert "resumed" in capsys.readouterr().out
    assert_same(tmp_path / "whole", tmp_path / "part", latest="checkpoint.pth.tar")


def test_few_classes_have_no_acc5(digits, weights, tmp_path):
    images = tmp_path / "images"
    for split in ("train", "val"):
        for name in "123":
            folder = images / split / name
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(Path(digits) / split / name)
    own = flags(str(images), weights, "--num_labels", "3", "--epochs", "1", "--output_dir", str(tmp_path / "out"))
    run_main(main_linprobe, *own)
    assert list(lines(tmp_path / "out")[0]) == ["train_loss", "train_lr", "epoch", "test_loss", "test_acc1"]


def test_patch_size_is_the_checkpoints(digits, weights, tmp_path, capsys):
    own = flags(digits, weights, "--patch_size", "16", "--epochs", "1", "--output_dir", "")
    run_main(main_linprobe, *own)
    assert "--patch_size 16: the checkpoint has patches of 4 pixels" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("script", ["eval_linear_probing/eval_linear.py", "eval/eval_linear/eval_linear.py"])
def test_aliases_with_two_processes(digits, weights, tmp_path, launch, script):
    own = flags(digits, weights, "--batch_size", "5", "--output_dir", str(tmp_path))
    launch(2, Path(script).name, *own, cwd=(ROOT / "udi" / script).parent)
    run = tmp_path / "one"
    run_main(main_linprobe, *flags(digits, weights, "--output_dir", str(run)))
    assert_close([line["test_acc1"] for line in lines(tmp_path)], [line["test_acc1"] for line in lines(run)], 0, 1e-9)


BAD = [
    (["--data_path", "/nowhere"], "--data_path /nowhere: no such folder"),
    (["--arch", "resnet50"], "--arch resnet50: expected one of vit_tiny"),
    (["--arch", "vit_tiny"], "--arch vit_tiny: 'checkpoint' does not fit this run: "),
    (["--pretrained_weights", "missing.pth"], "missing.pth: no such checkpoint file"),
    (["--pretrained_weights", "/etc/hostname"], "/etc/hostname: not a checkpoint"),
    (["--n_last_blocks", "9"], "9 blocks, expected 1 to the depth 4"),
    (["--n_last_blocks", "0"], "0 blocks, expected 1 to the depth 4"),
    (["--avgpool_patchtokens", "true"], "4 blocks, the patches' mean is of 1 only"),
    (["--num_labels", "9"], "--nb_classes 9: the training images have 10 classes"),
    (["--input_size", "18"], "--input_size 18: is no multiple of 4 pixels"),
    (["--val_freq", "0"], "--val_freq 0 --lr_min 0.0: expected at least 1 and 0"),
    (["--epochs", "0"], "--epochs 0: expected at least 1"),
    (["--batch_size", "0"], "--batch_size_per_gpu 0: expected at least 1"),
    (["--accum_iter", "9"], "--accum_iter 9: an epoch has only 5 batches"),
    (["--evaluate", "--output_dir", "/nowhere"], "--evaluate: /nowhere holds no checkpoint.pth.tar"),
    (["--evaluate", "--resume", "missing.pth.tar"], "missing.pth.tar: no such checkpoint file"),
    (["--evaluate", "--resume", "WEIGHTS"], "WEIGHTS: holds no weights under "),
    (["--amp_dtype", "fp16"], "--amp_dtype fp16: needs a GPU"),
    (["--device", "cuda"], "--device cuda: no CUDA device"),
    (["--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere: cannot be written"),
]


@pytest.mark.parametrize(("own", "expected"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(own, expected, digits, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = [weights if word == "WEIGHTS" else word for word in own]
    error = mistake(main_linprobe, *flags(digits, weights, "--output_dir", "out"), *own, capsys=capsys)
    assert expected.replace("WEIGHTS", weights) in error
    assert not list(tmp_path.rglob("*.pth*"))
