"""The figure of orders: what each panel shows, in numbers; the files; and user errors."""

import argparse
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import distributed
from saim import figures
from semaim import main_visualize, models_semaim, models_vit
from semaim.main_visualize import GROUPS, PANELS, encoder_maps, heat, jet, make_order, overlay, stretch
from tests.support.helpers import ROOT, assert_close, golden_files, load_golden
from tests.support.processes import launch

SIZES = {"img_size": 16, "patch_size": 4, "query_depth": 2}
FLAGS = {"model": "aim_nano", "input_size": 16, "patch_size": 4}


def aim(**kwargs) -> models_semaim.AimViT:
    return models_semaim.aim_nano(**{**SIZES, **kwargs}).eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Pre-training checkpoints of two encoders in several forms, and useless ones."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    state, other = aim().state_dict(), aim().state_dict()
    semantic = FLAGS | {"permutation_type": "attention_center"}
    deep = aim(depth=5, query_depth=1).state_dict()
    fine_tuned = models_vit.vit_nano_patch16(img_size=16, patch_size=4, num_classes=10, global_pool=True)
    trained = {"model": "aim_nano", "state_dict": state}
    files = {
        "zigzag": trained | {"args": FLAGS | {"permutation_type": "zigzag"}},
        "snake": trained | {"args": FLAGS | {"permutation_type": "raster"}},
        "semantic": {"model": "aim_nano", "state_dict": other, "args": semantic},
        "ema": trained | {"state_dict": other, "ema_state_dict": state, "args": FLAGS},
        "namespace": {"state_dict": state, "args": argparse.Namespace(**FLAGS)},
        "upstream": trained | {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        "encoder": trained | {"state_dict": {k: v for k, v in state.items() if "query" not in k and "pred" not in k}},
        "fine_tuned": {"state_dict": fine_tuned.state_dict(), "args": FLAGS},
        "vit": {"state_dict": fine_tuned.state_dict(), "model": "vit_nano_patch16"},
        "deep": trained | {"state_dict": deep, "args": FLAGS},
        "nan": trained | {"state_dict": state | {"cls_token": state["cls_token"] * torch.nan}, "args": FLAGS},
        "weightless": {"model": "aim_nano", "args": FLAGS},
    }
    for name, content in files.items():
        torch.save(content, folder / f"{name}.pth")
    (folder / "text.pth").write_text("no checkpoint")
    return {path.stem: str(path) for path in folder.iterdir()}


def parse(*flags) -> argparse.Namespace:
    return main_visualize.get_args_parser().parse_args(["--device", "cpu", *map(str, flags)])


def run(*flags) -> None:
    distributed.run(main_visualize.main, parse(*flags))


def encoder(*flags, path: str = "") -> models_semaim.AimViT:
    return main_visualize.build_encoder(parse(*flags), path)[0]


# ---- maps and orders


@golden_files("semaim", "pretrain_orders")
def test_encoder_maps(path):
    ref = load_golden(path)
    model = models_semaim.AimViT(**ref.kwargs).eval()
    model.load_state_dict(ref.weights)
    attention, similarity = encoder_maps(model, ref["in/imgs"])
    ref.check("out/self_attention", attention, rtol=1e-4, atol=2e-5)
    ref.check("out/feature_attention", similarity, rtol=1e-4, atol=2e-5)


def drawn_order(rule: str, attention_type: str = "cls") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is drawn of the attention, of the similarity and of the order of two images."""
    torch.manual_seed(0)
    model = aim(attention_type=attention_type)
    attention, similarity = encoder_maps(model, torch.randn(2, 3, 16, 16))
    order = make_order(model, rule, attention, similarity, seed=0)
    return heat("self-attention", attention), heat("similarity", similarity), heat("order", order)


def test_order_of_zigzag__bands_from_the_top():
    *_, order = drawn_order("zigzag")
    assert_close(order, np.broadcast_to(1 - np.arange(16) / (15 + 1e-5), (2, 16)), rtol=0, atol=1e-6)
    rows = order.unflatten(1, (4, 4))
    assert (rows.amin(dim=2)[:, :-1] > rows.amax(dim=2)[:, 1:]).all()


def test_order_of_raster__every_second_row_from_the_right():
    *_, order = drawn_order("raster")
    assert order[0].argsort(descending=True).tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11, 15, 14, 13, 12]


@pytest.mark.parametrize("attention_type", ["cls", "gap", "self"])
def test_order_of_similarity__is_the_map(attention_type):
    attention, similarity, order = drawn_order("attention", attention_type)
    own, other = (attention, similarity) if attention_type == "self" else (similarity, attention)
    # The 1e-5 of the two stretches sits at opposite ends: 1 - (1 - map - low) / (range + 1e-5) with low = 1 - max.
    assert_close(order - own, (1 - own.amax(dim=1, keepdim=True)).expand(-1, 16), rtol=0, atol=1e-4)
    assert (order - own).max() < 0.01
    assert (order - other).abs().max() > 0.1


@pytest.mark.parametrize("attention_type", ["cls", "self"])
def test_order_of_semantic__a_disc_around_the_maximum(attention_type):
    attention, similarity, order = drawn_order("attention_center", attention_type)
    best = (attention if attention_type == "self" else similarity).argmax(dim=1)
    assert order.argmax(dim=1).tolist() == best.tolist()
    at = torch.arange(16)
    for centre, own in zip(best, order, strict=True):
        distance = ((at // 4 - centre // 4) ** 2 + (at % 4 - centre % 4) ** 2).double().sqrt()
        assert_close(own, 1 - distance / distance.max(), rtol=0, atol=2e-3)  # noise: 0.001 patches


def test_make_order__the_seed_alone_decides():
    model = aim()
    maps = torch.rand(3, 16)
    order = make_order(model, "stochastic", maps, maps, seed=0)
    assert torch.equal(make_order(aim(), "stochastic", 1 - maps, maps, seed=0), order)
    assert not torch.equal(make_order(model, "stochastic", maps, maps, seed=1), order)
    centred = make_order(model, "attention_center", maps, maps, seed=0)
    nearest = centred.gather(1, maps.argmax(dim=1, keepdim=True))
    assert_close(nearest, 0.001 * order.gather(1, maps.argmax(dim=1, keepdim=True)), rtol=1e-5, atol=0)


# ---- panels


def test_stretch():
    maps = torch.tensor([[1.0, 2.0, 3.0, 5.0], [0.25] * 4])
    expected = [[0, 1 / 4.00001, 2 / 4.00001, 4 / 4.00001], [0, 0, 0, 0]]
    assert_close(stretch(maps), expected, rtol=1e-6, atol=0)


def test_jet():
    colours = jet(np.array([[0, 64, 128], [191, 255, 32]], np.uint8))  # OpenCV's table, to a level
    expected = [[[0, 0, 128], [0, 128, 255], [130, 255, 126]], [[255, 128, 0], [128, 0, 0], [0, 0, 255]]]
    assert colours.dtype == np.uint8
    assert_close(colours.astype(int), expected, rtol=0, atol=2)


def test_overlay():
    image = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    values = torch.tensor([[0.0, 0.5, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    panel = overlay(values, image)
    colours = jet(np.array([[0, 128, 255, 0], [255] * 4], np.uint8))
    for (n, row, column, channel), level in np.ndenumerate(panel):
        patch = 2 * (row // 2) + column // 2
        exact = 0.3 * colours[n, patch, channel] + 0.7 * image[n, row, column, channel]
        assert abs(level - exact) <= 0.5
    assert (overlay(values, np.full_like(image, 255)) <= 255).all()
    assert overlay(values, np.full_like(image, 255))[0, 2, 0].tolist() == [217, 178, 178]  # no overflow


def test_draw__labels_lines_and_panels():
    image = np.zeros((2, 4, 4, 3), np.uint8)
    blocks = {"input": {"": image}, **{name: dict.fromkeys(PANELS, image + i) for i, name in enumerate(GROUPS, 1)}}
    fig = main_visualize.draw(blocks)
    texts = {text.get_text(): text.get_position() for text in fig.texts if text.get_position()[1] < 0.5}
    assert list(texts) == ["(a) input", *(group.label for group in GROUPS.values())]
    corners = np.array([ax.get_position().bounds for ax in fig.axes]).reshape(13, 2, 4)  # columns, rows
    assert {text.get_horizontalalignment() for text in fig.texts} == {"center"}
    middles = corners[:, 0, 0] + corners[:, 0, 2] / 2
    assert_close([x for x, _ in texts.values()], middles[[0, 2, 5, 8, 11]], rtol=0, atol=1e-9)
    lines = [line.get_xdata()[0] for line in fig.artists]  # type: ignore[attr-defined]
    right, left = corners[[0, 3, 6, 9], 0, 0] + corners[0, 0, 2], corners[[1, 4, 7, 10], 0, 0]
    assert_close(lines, (right + left) / 2, rtol=0, atol=1e-9)
    assert (corners[:, 0, 1] > corners[:, 1, 1]).all()  # the first image on top
    width, height = fig.get_size_inches()
    assert_close(corners[..., 2] * width, corners[..., 3] * height, rtol=1e-9, atol=0)
    assert corners.min() > 0
    assert (corners[..., :2] + corners[..., 2:]).max() < 1
    alone = main_visualize.draw({name: blocks[name] for name in ("input", "semantic")}).texts
    assert [text.get_text() for text in alone][::2] == ["input", "semantic-aware order\nred: high, first", "similarity"]


# ---- encoders


def test_build_encoder__sizes_given_over_stored_over_default(checkpoints):
    for name, flags, size, patch in (
        ("zigzag", (), 16, 4),
        ("zigzag", ("--input_size", 32), 32, 4),
        ("namespace", (), 16, 4),
        ("upstream", ("--input_size", 16, "--patch_size", 4), 16, 4),
        ("encoder", ("--input_size", 16, "--patch_size", 4), 16, 4),
        ("", ("--model", "aim_nano"), 224, 16),
    ):
        embed = encoder(*flags, path=checkpoints.get(name, "")).patch_embed
        assert (embed.img_size, embed.patch_size) == (size, patch)


def test_build_encoder__every_form_holds_the_same_encoder(checkpoints):
    size = ("--input_size", 16, "--patch_size", 4)
    ema = encoder("--checkpoint_key", "ema_state_dict", path=checkpoints["ema"])
    others = [encoder(*size, path=checkpoints[name]) for name in ("zigzag", "namespace", "upstream", "encoder")]
    for other in others:
        assert other.state_dict().keys() == ema.state_dict().keys()
        assert all(torch.equal(value, ema.state_dict()[key]) for key, value in other.state_dict().items())
    assert not torch.equal(encoder(path=checkpoints["ema"]).cls_token, ema.cls_token)


def test_build_encoder__random_by_seed():
    small = ("--model", "aim_nano", "--input_size", 16)
    tokens = [encoder(*small, "--seed", seed).cls_token for seed in (0, 0, 1)]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


# ---- files


@pytest.fixture(scope="module")
def images(digits) -> list[str]:
    return [str(path) for path in sorted(Path(digits).glob("val/*/*.png"))[:2]]


def maps_of(folder: Path) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "maps.npz", allow_pickle=False))


def groups_of(folder: Path) -> set[str]:
    return {key.split("/")[0] for key in maps_of(folder)} - {"images"}


def test_figure__all_groups(checkpoints, images, tmp_path):
    own = ["--raster", checkpoints["snake"], "--semantic", checkpoints["semantic"]]
    flags = [*own, "--checkpoint", checkpoints["zigzag"], "--images", *images, "--output", str(tmp_path / "all.png")]
    log = tmp_path / "out"
    assert launch(log, "main_visualize.py", *flags, cwd=ROOT / "semaim") == [0], log.read_text()  # as a user starts it
    assert "WARNING" not in log.read_text()
    assert Image.open(tmp_path / "all.png").width > 11 * 128  # two orders share the maps of --checkpoint
    folder = tmp_path / "all_panels"
    maps = maps_of(folder)
    assert maps.pop("images").tolist() == images
    assert set(maps) == {f"{group}/{panel}" for group in GROUPS for panel in PANELS}
    assert all(values.shape == (2, 4, 4) for values in maps.values())
    assert len(list(folder.glob("*.png"))) == 2 * 13

    pixels = figures.to_pixels(figures.read_images(images, 16))
    for i, file in enumerate(images):
        stem = f"{i:02d}_{Path(file).stem}"
        assert (np.asarray(Image.open(folder / f"{stem}_input.png")) == pixels[i]).all()
        for group in GROUPS:
            for panel in PANELS:
                values = torch.from_numpy(maps[f"{group}/{panel}"]).flatten(1)
                drawn = np.asarray(Image.open(folder / f"{stem}_{group}_{panel}.png"))
                assert (drawn == overlay(heat(panel, values), pixels)[i]).all()
    assert maps["raster/order"][0, 1].tolist() == [7, 6, 5, 4]  # the snake that the checkpoint was trained with
    for panel in PANELS[:2]:  # one encoder draws three groups, another one the fourth
        assert (maps[f"raster/{panel}"] == maps[f"similarity/{panel}"]).all()
        assert (maps[f"stochastic/{panel}"] == maps[f"similarity/{panel}"]).all()
        assert not np.allclose(maps[f"semantic/{panel}"], maps[f"similarity/{panel}"], rtol=1e-3)


def test_figure__groups_without_checkpoint_are_skipped(checkpoints, images, tmp_path, capsys):
    own = ("--stochastic", checkpoints["zigzag"], "--semantic", checkpoints["semantic"])
    run(*own, "--images", *images, "--output", tmp_path / "new" / "two.png")
    warning = f"--stochastic {checkpoints['zigzag']}: trained in zigzag order, expected stochastic"
    assert warning in capsys.readouterr().out
    assert groups_of(tmp_path / "new" / "two_panels") == {"stochastic", "semantic"}
    assert Image.open(tmp_path / "new" / "two.png").width < 8 * 160


@pytest.mark.slow
def test_figure__random(images, tmp_path):
    for seed in (0, 1):
        size = ("--model", "aim_nano", "--input_size", 32, "--patch_size", 8)
        run("--random", "--seed", seed, *size, "--images", images[0], "--output", tmp_path / f"{seed}.png")
    maps, other = (maps_of(tmp_path / f"{seed}_panels") for seed in (0, 1))
    assert groups_of(tmp_path / "0_panels") == set(GROUPS)
    assert Image.open(tmp_path / "0.png").width < 8 * 160  # maps once, and four orders
    for panel in PANELS[:2]:
        assert all((maps[f"{group}/{panel}"] == maps[f"raster/{panel}"]).all() for group in GROUPS)
    assert not (maps["stochastic/order"] == other["stochastic/order"]).any()
    assert (maps["raster/order"] == other["raster/order"]).all()


def test_figure__random_beside_a_checkpoint_of_another_size(checkpoints, images, tmp_path):
    flags = ("--random", "--semantic", checkpoints["semantic"], "--images", images[0], "--output", tmp_path / "a.png")
    run(*flags, "--model", "aim_nano", "--input_size", 32)
    maps = maps_of(tmp_path / "a_panels")
    assert (maps["raster/order"].shape, maps["semantic/order"].shape) == ((1, 2, 2), (1, 8, 8))


# ---- images


@pytest.mark.parametrize("helper", ["spread", "read_images", "to_pixels"])
def test_helper_is_the_same_as_saims(helper):
    assert inspect.getsource(getattr(main_visualize, helper)) == inspect.getsource(getattr(figures, helper))


def test_chosen_images(digits, images):
    root = Path(digits)
    assert main_visualize.chosen_images(images, 1, 0) == images
    [first, second] = main_visualize.chosen_images([images[1], str(root / "train" / "3")], 1, 0)
    assert (first, Path(second).parent) == (images[1], root / "train" / "3")
    for folder, split in ((root, "val"), (root / "train", "train")):
        found = [Path(path) for path in main_visualize.chosen_images([str(folder)], 10, seed=0)]
        assert [path.parent for path in found] == [root / split / str(i) for i in range(10)]  # one of each class
    assert len(main_visualize.chosen_images([digits, digits], 3, seed=0)) == 6
    several = {tuple(main_visualize.chosen_images([digits], 3, seed)) for seed in range(5)}
    assert len(several) > 1


# ---- user errors


@pytest.fixture
def broken(tmp_path) -> dict[str, str]:
    """Paths that fail, by name."""
    (tmp_path / "noimage.png").write_text("text")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    names = {path.name: str(path) for path in tmp_path.iterdir()}
    return {**names, "missing": str(tmp_path / "missing.pth"), "below_file": str(tmp_path / "file" / "a.png")}


ERRORS = {
    "no_group": (["--checkpoint", ""], "no order to draw: expected a checkpoint by --raster, .* or --random"),
    "random_and_checkpoint": (["--random"], "--random: expected no --checkpoint"),
    "attention_type": (["--attention_type", "max"], "--attention_type max: expected one of cls, gap, self"),
    "model": (["--model", "vit"], "--model vit: expected one of aim_base, "),
    "other_model": (["--model", "aim_tiny"], "check --model, .*96 encoder weights are missing, first blocks.4"),
    "shallower_model": (["--checkpoint", "{deep}"], "check --model, .*more blocks than the model's 4: blocks.4"),
    "patch_size": (["--patch_size", "8"], "check --model, --patch_size .*: patch_embed.proj.weight is"),
    "input_size": (["--input_size", "18"], "image size 18 is not a multiple of the patch size 4"),
    "no_size": (["--input_size", "0"], "--input_size 0: expected at least 1"),
    "missing": (["--semantic", "{missing}"], "missing.pth: no such checkpoint file"),
    "text": (["--checkpoint", "{text}"], "text.pth: not a checkpoint"),
    "no_weights": (["--checkpoint", "{weightless}"], "holds no weights under 'state_dict'; its keys: model, args"),
    "checkpoint_key": (["--checkpoint_key", "ema_state_dict"], "holds no weights under 'ema_state_dict'"),
    "fine_tuned": (["--checkpoint", "{fine_tuned}"], "2 encoder weights are missing, first norm.weight"),
    "vit": (["--checkpoint", "{vit}"], "vit.pth: is of the model vit_nano_patch16; --model: expected one of aim_base"),
    "not_finite": (["--checkpoint", "{nan}"], "nan.pth: the encoder's maps are not finite"),
    "no_images": (["--images", ""], "--images: expected image files or folders"),
    "no_number": (["--num_images", "0"], "--num_images 0: expected at least 1"),
    "missing_image": (["--images", "{missing}"], "--images .*missing.pth: cannot be read .No such file"),
    "empty_folder": (["--images", "{empty}"], "--images .*empty: expected images in .*empty, or in class folders"),
    "no_image": (["--images", "{noimage.png}"], "noimage.png: unreadable image"),
    "ending": (["--output", "fig.txt"], "--output fig.txt: expected a file name that ends in .png"),
    "no_output": (["--output", ""], "--output : expected a file name that ends in .png"),
    "unwritable": (["--output", "{below_file}"], "--output .*a.png: cannot be written"),
    "folder": (["--output", "{folder.png}"], "--output .*folder.png: cannot be written .Is a directory"),
    "device": (["--device", "abacus"], "--device abacus: expected auto"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors(checkpoints, images, broken, capsys, case):
    flags, words = ERRORS[case]
    paths = checkpoints | broken
    given = [paths[flag[1:-1]] if flag.startswith("{") else flag for flag in flags]
    with pytest.raises(SystemExit) as end:
        run("--checkpoint", checkpoints["zigzag"], "--images", *images, "--output", broken["empty"] + "/o.png", *given)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(words, line)
