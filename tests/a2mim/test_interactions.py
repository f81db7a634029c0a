"""Interactions: the authors' numbers, properties of the samples, and the stages as a user runs them."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from a2mim import analysis, main_interactions
from a2mim.interactions import (
    REWARDS,
    gen_contexts,
    gen_pairs,
    interactions,
    order_of,
    presence,
    reward,
    rewards,
    strength,
)
from a2mim.models_a2mim import build_classifier
from a2mim.openmixup import to_openmixup_state_dict
from common import distributed
from tests.support import processes
from tests.support.helpers import ROOT, assert_close, golden_files, load_golden
from tests.support.runs import mistake, run_main

# ---- the authors' numbers


class Toy(nn.Module):
    """The network of the goldens."""

    def __init__(self, ref):
        super().__init__()
        self.w1, self.w2 = ref["in/W1"], ref["in/W2"]

    def forward(self, x):
        return F.conv2d(x, self.w1, stride=self.w1.shape[-1]).relu().flatten(1) @ self.w2.T


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@golden_files("a2mim", "rep_bottleneck")
def test_matches_upstream(path):
    ref = load_golden(path)
    meta, tol = ref.meta, {"rtol": 1e-4, "atol": 1e-5} | ref.meta.get("tolerance", {})
    grid, seed = meta["grid"], meta["seed"]
    found: dict[str, list] = {kind: [[] for _ in meta["ratios"]] for kind in REWARDS}
    for k, (image, label) in enumerate(zip(ref["in/images"], ref["in/labels"].tolist(), strict=True)):
        seed_all(1000 * k + seed)
        pairs = gen_pairs(grid, meta["pairs"], meta["stride"])
        ref.check(f"out/img{k}/pairs", pairs, rtol=0, atol=0)
        for r, ratio in enumerate(meta["ratios"]):
            percent, order = round(100 * ratio), order_of(grid, ratio)
            seed_all(1000 * k + order + 1 + seed)
            contexts = gen_contexts(pairs, grid, order, meta["contexts"])
            ref.check(f"out/img{k}/players_{percent}", contexts, rtol=0, atol=0)
            values = rewards(Toy(ref), image, label, presence(pairs, contexts, grid), batch_size=7)
            for kind in REWARDS:
                delta, name = interactions(values[kind]), f"out/img{k}/interactions_{kind}_{percent}"
                ref.check(name, delta, **tol)
                if name in ref:  # the toy's logits are sums over cells: Δ of yi is rounding noise
                    found[kind][r].append(ref.arrays[name])
                if (logits := f"out/img{k}/logits_{percent}") in ref:
                    assert_close(values[kind], reward(ref[logits], label, kind), **tol)
    for kind in REWARDS:
        if all(len(deltas) == len(ref["in/images"]) for deltas in found[kind]):
            ref.check(f"out/strength_{kind}", strength(np.array(found[kind])), **tol)


# ---- properties


@pytest.mark.parametrize(("grid", "stride", "possible"), [(2, 1, 6), (2, 5, 6), (3, 1, 20), (4, 2, 90)])
def test_gen_pairs__all_there_are_and_no_more(grid, stride, possible):
    seed_all(0)
    pairs = gen_pairs(grid, possible, stride)
    assert len({frozenset(pair) for pair in pairs.tolist()}) == possible
    rows, columns = np.divmod(pairs, grid)
    assert max(np.ptp(rows, axis=1).max(), np.ptp(columns, axis=1).max()) <= stride
    with pytest.raises(ValueError, match=f"has {possible} pairs within {stride} cells, not {possible + 1}"):
        gen_pairs(grid, possible + 1, stride)


def test_presence__four_of_each_context():
    pairs, contexts = np.array([[0, 3], [2, 1]]), np.array([[[5]], [[0]]])
    shown = [np.flatnonzero(row).tolist() for row in presence(pairs, contexts, grid=3).reshape(8, 9)]
    assert shown == [[0, 3, 5], [0, 5], [3, 5], [5], [0, 1, 2], [0, 2], [0, 1], [0]]


def test_interactions_of_a_sum_are_zero_and_of_a_product_are_not():
    masks = presence(np.array([[0, 1]]), np.array([[[2], [3]]]), grid=2).astype(np.float32)
    weights = np.array([1.0, 10, 100, 1000], np.float32)
    assert_close(interactions(torch.from_numpy(masks @ weights)), np.zeros((1, 2)), rtol=0, atol=1e-4)
    assert_close(interactions(torch.from_numpy(masks[..., 0] * masks[..., 1])), np.ones((1, 2)), rtol=0, atol=0)


def test_reward__the_three_agree():
    logits, labels = 3 * torch.randn(4, 5, 6), torch.randint(0, 6, (4, 5))
    modified = reward(logits, labels, "modified")
    assert_close(reward(logits, labels, "normal"), F.logsigmoid(modified), rtol=1e-5, atol=1e-5)
    assert_close(reward(logits, labels, "normal"), -F.cross_entropy(logits.mT, labels, reduction="none"), 1e-5, 1e-5)
    assert_close(reward(logits, 2, "yi"), logits[..., 2], rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected normal, modified, yi"):
        reward(logits, 0, "softmax")


def test_rewards__equal_masks_are_evaluated_once():
    seen = []

    def network(imgs):
        seen.append(len(imgs))
        return imgs.flatten(1)[:, ::7]

    pairs = gen_pairs(4, 6, 2)
    for order, least in ((0, 6), (14, 6), (5, 1)):
        seen.clear()
        masks = presence(pairs, gen_contexts(pairs, 4, order, 9), 4)
        values = rewards(network, torch.randn(3, 8, 8), 1, masks, batch_size=10)["yi"]  # type: ignore[arg-type]
        assert values.shape == (6, 36)
        assert sum(seen) <= (1 + 16 + least if order != 5 else masks[..., 0].size)
        assert max(seen) <= 10


def test_strength__context_means_first_then_magnitudes():
    array = np.array([[[[1.0, -1], [2, 2]]], [[[-3.0, -3], [4, 0]]]])  # |I|: 0 2, 3 2
    assert strength(array).tolist() == pytest.approx([1 / 1.75, 2.5 / 1.75])


# ---- the stages

STUDY = ["--arch", "test_resnet", "--dataset", "imagenet", "--image_size", "32", "--grid_size", "4", "--images", "3"]
STUDY += ["--pairs", "3", "--contexts", "2", "--ratios", "0", "0.5", "1", "--device", "cpu"]
STAGES = Path("a2mim/analysis_tools/representation_bottleneck")
SCRIPTS = ("sampler", "gen_pairs_pixel", "m_order_interaction_logit_pixel", "compute_interactions", "draw_figures")


@pytest.fixture
def study(digits, tmp_path, monkeypatch) -> list[str]:
    """Flags of a small study of a small network; its results are below ./results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.distributed.exits._received", [])
    return [*STUDY, "--data_path", digits]


def files(folder: Path) -> dict[str, bytes]:
    """Contents by name; figures and settings by name only."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.suffix in (".npy", ".pth") else b""
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_all_stages(study, tmp_path, capsys):
    run_main(main_interactions, *study)
    (root,) = tmp_path.glob("results/result_INTER_pixel_CLASS_random_GRID_4x4_seed0/MODEL_test_resnet_DATA_imagenet")
    settings = json.loads((root / "settings.json").read_text())
    names = [name for name, *_ in settings["chosen"]]
    assert len({index for _, index, _ in settings["chosen"]}) == 3
    for kind, suffix, shape in (
        ("players", ".npy", (3, 2, 7)),
        ("interactions_logit", ".pth", (3, 8)),
        ("interactions_out_gt_softmax_modified", ".npy", (3, 2)),
    ):
        assert {path.name for path in (root / kind).iterdir()} == {"ratio0", "ratio50", "ratio100"}
        for name in names:
            path = root / kind / "ratio50" / f"{name}{suffix}"
            content = np.load(path) if suffix == ".npy" else torch.load(path, weights_only=True)["normal"]
            assert content.shape == shape
    assert np.load(root / "pairs.npy").shape == (3, 3, 2)
    assert np.load(root / "figures/default.npy").mean() == pytest.approx(1)
    assert (root / "figures/default.png").stat().st_size > 5000
    assert "J by order: 0n: " in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in root.glob("interactions*/*/*")}
    run_main(main_interactions, *study, "--softmax_type", "yi", "--save_name", "logits")
    assert before.items() <= {path: path.stat().st_mtime_ns for path in root.glob("interactions*/*/*")}.items()
    assert not np.array_equal(np.load(root / "figures/logits.npy"), np.load(root / "figures/default.npy"))


def test_killed_and_resumed__identical_files(study, tmp_path, monkeypatch, capsys):
    run_main(main_interactions, *study, "--output_dir", "whole")
    plain, calls = main_interactions.rewards, []

    def stopping(*args):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) == 6:
            raise ZeroDivisionError  # the process dies
        return plain(*args)

    monkeypatch.setattr(main_interactions, "rewards", stopping)
    with pytest.raises(SystemExit) as end:
        run_main(main_interactions, *study, "--output_dir", "parts")
    assert end.value.code == 128 + signal.SIGTERM
    assert len(list(tmp_path.glob("parts/*/*/interactions_logit/*/*"))) == 4
    monkeypatch.setattr("common.distributed.exits._received", [])
    with pytest.raises(ZeroDivisionError):
        run_main(main_interactions, *study, "--output_dir", "parts")
    run_main(main_interactions, *study, "--output_dir", "parts")
    assert len(calls) == 6 + 4
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_images_by_a_list_with_a_flat_folder(study, digits, tmp_path, capsys):
    """As upstream has ImageNet: data/ImageNet/val/<image>, and their classes in data/meta/ImageNet/val_labeled.txt."""
    flat, lists = tmp_path / "data/ImageNet/val", tmp_path / "data/meta/ImageNet"
    flat.mkdir(parents=True)
    lists.mkdir(parents=True)
    found = sorted(Path(digits).glob("val/*/*.png"))
    for path in found:
        shutil.copy(path, flat)
    (lists / "val_labeled.txt").write_text("".join(f"{path.name} {path.parent.name}\n" for path in found))
    run_main(main_interactions, *study, "--data_path", str(flat.parent), "--stage", "sampler")
    (settings,) = tmp_path.glob("results/*/*/settings.json")
    chosen = json.loads(settings.read_text())["chosen"]
    assert len(chosen) == 3
    assert all(label == int(found[index].parent.name) for _, index, label in chosen)


@pytest.mark.parametrize("launcher", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stage_by_stage_on_two_processes(study, tmp_path, launch, launcher):
    run_main(main_interactions, *study, "--output_dir", "one")
    study += ["--output_dir", str(tmp_path / "two")]
    for stage in ("sampler", "pairs"):
        run_main(main_interactions, *study, "--stage", stage)
    assert not list(tmp_path.glob("two/*/*/interactions_*"))
    words = [str(STAGES / "m_order_interaction_logit_pixel.py"), *study, "--stage", "all"]
    if launcher:
        launch(2, *words)
    else:
        assert processes.launch(tmp_path / "out", *words, processes=2) == [0, 0], (tmp_path / "out").read_text()
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.parametrize(("script", "stage"), zip(SCRIPTS, main_interactions.STAGES, strict=True))
def test_aliases(script, stage):
    assert f'"--stage", "{stage}"]' in (ROOT / STAGES / f"{script}.py").read_text()


def test_own_checkpoint(study, tmp_path, monkeypatch, capsys):
    """A fine-tuned checkpoint of this method's: the network that runs has its weights."""
    model = build_classifier("resnet18", 10, img_size=32)
    nn.init.normal_(model.head.weight)
    torch.save({"state_dict": to_openmixup_state_dict(model)}, tmp_path / "latest.pth")
    used = []
    monkeypatch.setattr(
        main_interactions, "rewards", lambda net, *_: used.append(net) or dict.fromkeys(REWARDS, torch.rand(3, 8))
    )
    run_main(
        main_interactions, *study, "--backbone", "resnet18", "--checkpoint_path", ".", "--checkpoint_name", "latest.pth"
    )
    assert analysis.fingerprint(used[0]) == analysis.fingerprint(model)
    assert not used[0].training
    assert list(tmp_path.glob("results/*/MODEL_resnet18_DATA_imagenet"))
    del used[:]
    torch.save(analysis.timm_network("test_resnet", 10, 32, None).state_dict(), tmp_path / "timm.pth")
    run_main(main_interactions, *study, "--checkpoint_path", "timm.pth")
    weights = distributed.load("timm.pth")
    assert all(torch.equal(value, weights[name]) for name, value in used[0].state_dict().items())


class Cifar:
    """Ten pictures without files."""

    classes = ("bird", "cat")

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return Image.fromarray(np.full((32, 32, 3), 20 * index, np.uint8)), index % 2


def test_images_without_files(study, tmp_path, monkeypatch):
    """CIFAR-10 where --data_path has no folders of classes: its settings, and as many images as there are."""
    asked = []
    monkeypatch.setattr(
        main_interactions.datasets, "image_dataset", lambda *args, **kwargs: asked.append(kwargs["name"]) or Cifar()
    )
    flags = [*STUDY[:2], *STUDY[6:8], *STUDY[-2:], "--stage", "sampler"]
    run_main(main_interactions, *flags)
    assert asked == ["torch/cifar10"]
    (path,) = tmp_path.glob("results/*/MODEL_test_resnet_DATA_cifar10/settings.json")
    settings = json.loads(path.read_text())
    assert [settings[name] for name in ("pairs", "contexts", "images", "image_size", "classes")] == [
        200,
        100,
        10,
        32,
        2,
    ]
    assert sorted(index for _, index, _ in settings["chosen"]) == list(range(10))
    assert all(name.endswith(f"_{i}") and label == i % 2 for name, i, label in settings["chosen"])


MISTAKES = [
    (["--pairs", "91"], "--pairs: a grid of 4x4 cells has 90 pairs within 2 cells, not 91"),
    (["--pairs", "0"], "--pairs 0: expected at least 1"),
    (["--image_size", "3"], "--image_size 3: expected at least 4"),
    (["--ratios", "0", "1.5"], "--ratios 0.0 1.5: expected shares from 0 to 1"),
    (["--images", "21"], "--images 21: there are only 20"),
    (["--class_number", "7"], "--class_number 7: the images have 10 classes"),
    (["--arch", "nonsense"], "Unknown model (nonsense); the images have 10 classes and 32 pixels"),
    (["--arch", "vit", "--image_size", "8"], "the images have 10 classes and 8 pixels"),
    (["--dataset", "birds"], "--dataset birds: expected cifar10, imagenet"),
    (["--data_path", "nowhere"], "--data_path nowhere"),
    (["--stage", "logits"], "pairs.npy: is missing; run --stage pairs first"),
    (["--stage", "draw"], "is missing; run --stage compute first"),
    (["--checkpoint_path", "seven.pth"], "fc.weight is (7, 512), expected (10, 512); the images have 10 classes"),
    (["--checkpoint_path", "seven.pth", "--backbone", "resnet18"], "; the images have 10 classes"),
    (["--checkpoint_path", "none.pth"], "none.pth: no such checkpoint file"),
    (["--pretrained", "--checkpoint_path", "x"], "--pretrained: takes timm's weights of --arch"),
    (["--output_dir", "file"], "cannot be written"),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(flags, words, study, tmp_path, capsys):
    if "seven.pth" in flags:
        study += ["--arch", "resnet18"]
        torch.save(analysis.timm_network("resnet18", 7, 32, None).state_dict(), "seven.pth")
        if "--backbone" in flags:
            torch.save({"state_dict": to_openmixup_state_dict(build_classifier("resnet18", 7))}, "seven.pth")
    (tmp_path / "file").touch()
    assert words in mistake(main_interactions, *study, *flags, capsys=capsys)


def test_other_settings_need_another_folder(study, tmp_path, digits, capsys):
    run_main(main_interactions, *study)
    for flags, words in (
        (["--pairs", "4"], "was begun with other pairs (3, now 4); choose another --output_dirname"),
        (["--images", "2"], "was begun with other images (3, now 2)"),
    ):
        assert words in mistake(main_interactions, *study, *flags, capsys=capsys)
    torch.manual_seed(5)
    torch.save(analysis.timm_network("test_resnet", 10, 32, None).state_dict(), "other.pth")
    error = mistake(main_interactions, *study, "--checkpoint_path", "other.pth", capsys=capsys)
    assert "was begun with other weights" in error
    other = shutil.copytree(digits, tmp_path / "digits")
    for path in other.glob("val/*/*"):
        path.rename(path.with_stem(f"renamed{path.stem}"))
    error = mistake(main_interactions, *study, "--data_path", str(other), capsys=capsys)
    assert error.endswith("was begun with other chosen; choose another --output_dirname\n")
    run_main(main_interactions, *study, "--data_path", str(other), "--output_dirname", "renamed")


def test_unreadable_image_is_named(study, tmp_path, digits, capsys):
    other = shutil.copytree(digits, tmp_path / "digits")
    for path in other.glob("val/*/*"):
        path.write_bytes(b"no image")
    error = mistake(main_interactions, *study, "--data_path", str(other), capsys=capsys)
    assert "unreadable image" in error
    assert "/val/" in error
    (damaged,) = list(tmp_path.glob("results/*/*/players/ratio50/00000_*"))
    damaged.write_bytes(b"no array")
    error = mistake(main_interactions, *study, "--ratios", "0.5", capsys=capsys)
    assert "is damaged; delete it and run --stage pairs first" in error
