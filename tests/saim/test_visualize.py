"""Attention maps against the authors' numbers, the figures of both visualizers, and their user errors."""

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import distributed
from saim import figures, main_linprobe, models_saim, models_vit, visualize_attention, visualize_prediction
from saim.models_saim import SaimViT
from tests.support.helpers import ROOT, assert_close, golden_files, load_golden
from tests.support.processes import launch

SIZES = {"img_size": 16, "patch_size": 4}
VIT = ["--model", "vit_tiny_patch16", "--input_size", "16", "--patch_size", "4"]
FLAGS = {"model": "saim_tiny", "input_size": 16, "patch_size": 4, "query_depth": 1, "norm_pix_loss": True}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """All three scripts' checkpoints of one encoder, upstream's form of it, a raster-order one, and useless ones."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    saim = models_saim.saim_tiny(**SIZES, query_depth=1)
    state = saim.state_dict()
    files = {"pretrain": {"model": state, "args": FLAGS}}
    for name, pool in (("cls", False), ("pool", True), ("probe", False)):
        model = models_vit.vit_tiny_patch16(**SIZES, num_classes=10, global_pool=pool)
        models_vit.load_pretrained(model, state)
        if name == "probe":
            main_linprobe.add_probe(model)
        files[name] = {"model": model.state_dict(), "args": {"model": "vit_tiny_patch16"}}
    raster = models_saim.saim_tiny(**SIZES, query_depth=1, gaussian_kernel_size=3, gaussian_sigma=1)
    blur = {"order": "raster", "norm_pix_loss": False, "gaussian_kernel_size": 3, "gaussian_sigma": 1}
    files["raster"] = {"model": raster.state_dict(), "args": {**FLAGS, **blur}}
    upstream = {key: FLAGS[key] for key in ("model", "input_size", "query_depth", "norm_pix_loss")}
    files["upstream"] = {"model": state, "args": argparse.Namespace(**upstream)}
    files["bare"] = {"model": state}
    files["weightless"] = {"weights": state}
    for name, content in files.items():
        torch.save(content, folder / f"{name}.pth")
    (folder / "text.pth").write_text("no checkpoint")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture
def run(monkeypatch):
    """Run a script's main in this process, without its signal handlers."""
    monkeypatch.setattr(distributed, "init", lambda device: torch.device("cpu"))

    def call(script, *flags):
        distributed.run(script.main, script.get_args_parser().parse_args([str(flag) for flag in flags]))

    return call


@pytest.fixture(scope="module")
def drawn(checkpoints, digits, tmp_path_factory) -> Path:
    """What the scripts write when they run from the method's folder."""
    folder = tmp_path_factory.mktemp("drawn")
    own = ["--checkpoint", checkpoints["pretrain"], "--output_dir", str(folder), "--data_path", digits]
    pair = ["--compare", checkpoints["raster"], "--names", "raster", "SAIM"]
    attention = ["visualize_attention.py", *VIT, *own, *pair, "--num_images", "4", "--save_npy"]
    prediction = ["visualize_prediction.py", *own, "--num_images", "1", "--seed", "3"]
    for argv in (attention, prediction):
        assert launch(folder / "log", *argv, cwd=ROOT / "saim") == [0], (folder / "log").read_text()
    return folder


# ---- attention


@golden_files("saim", "vit_")
def test_attention_map(path):
    ref = load_golden(path)
    if "out/last_attention" in ref:
        attention_map = visualize_attention.attention_map(ref["out/last_attention"])
        ref.check("out/cls_map", attention_map, rtol=1e-4, atol=2e-5)


def test_attention_map__query_and_heads():
    attention = torch.rand(2, 3, 5, 5).softmax(-1)
    call = visualize_attention.attention_map
    assert_close(call(attention, "2", "1")[1], attention[1, 1, 3, 1:].view(2, 2), rtol=0, atol=0)
    assert_close(call(attention, 3, -1), call(attention, -1, 2), rtol=0, atol=0)
    by_query = torch.stack([call(attention, i) for i in range(4)])
    assert_close(call(attention, "mean"), by_query.mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("query", "heads"), [("4", "mean"), ("patch", "mean"), ("cls", "3"), ("cls", "all")])
def test_attention_map__refuses_what_is_not_there(query, heads):
    with pytest.raises(ValueError, match=r"expected (cls, )?mean or an index from 0 to"):
        visualize_attention.attention_map(torch.rand(2, 3, 5, 5), query, heads)


def test_stretch():
    maps = torch.stack([torch.tensor([[1.0, 2.0], [3.0, 5.0]]) * 1e-3, torch.full((2, 2), 0.25)])
    expected = [[[0, 0.25], [0.5, 1]], [[0, 0], [0, 0]]]
    assert_close(visualize_attention.stretch(maps), expected, rtol=1e-6, atol=1e-7)


def test_attention_figures(drawn):
    assert (drawn / "attention.png").stat().st_size
    rows = sorted(drawn.glob("0*.png"))
    assert len(rows) == len(list(drawn.glob("0*.npy"))) == 4
    assert len({row.stem[-1] for row in rows}) == 4  # four classes: classes were dealt by the images' numbers
    row = np.asarray(Image.open(rows[0]))
    assert row.shape == (128, 3 * 128 + 2 * 4, 3)
    raster, saim = np.load(rows[0].with_suffix(".npy"))  # in the picture's order
    for left, values in ((132, raster), (264, saim)):
        panel = row[:, left : left + 128]
        assert (panel.reshape(4, 32, 4, 32, 3).std(axis=(1, 3)) == 0).all()  # one colour per patch
        brightest = np.unravel_index(values.argmax(), values.shape)
        assert panel[::32, ::32][brightest].tolist() == [253, 231, 36]  # the upper end of viridis
    assert not np.array_equal(raster, saim)


def test_attention_of_every_kind_of_checkpoint(checkpoints):
    imgs, maps = torch.randn(2, 3, 16, 16), []
    for name in ("pretrain", "cls", "pool", "probe"):
        model = visualize_attention.build_model(visualize_attention.get_args_parser().parse_args(VIT))
        models_vit.load_encoder(model, checkpoints[name])
        maps.append(visualize_attention.encoder_maps(model, imgs, layer=-1, query="cls", heads="mean"))
    assert maps[0].shape == (2, 4, 4)
    for other in maps[1:]:
        assert_close(other, maps[0], rtol=0, atol=0)


# ---- prediction


def test_sizes_of_attention_maps_are_those_of_the_checkpoint(checkpoints):
    """Of pre-training and fine-tuning, where they are not given; a file that says nothing has ViT-B's."""
    parser = visualize_attention.get_args_parser()
    for name, flags, expected in (
        ("pretrain", [], ("vit_tiny_patch16", 16, 4)),
        ("pretrain", ["--input_size", "32", "--patch_size", "8"], ("vit_tiny_patch16", 32, 8)),
        ("cls", [], ("vit_tiny_patch16", 224, None)),
        ("bare", [], ("vit_base_patch16", 224, None)),
    ):
        args = parser.parse_args(["--checkpoint", checkpoints[name], *flags])
        visualize_attention.fill_sizes(args)
        assert (args.model, args.input_size, args.patch_size) == expected


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("blur", [{}, {"gaussian_kernel_size": 3, "gaussian_sigma": 1.0}], ids=["sharp", "blurred"])
def test_predict__in_pixels_has_the_networks_loss(norm_pix_loss, blur):
    torch.manual_seed(0)
    sizes = {**SIZES, "embed_dim": 24, "depth": 2, "num_heads": 2, "query_depth": 1}
    model = SaimViT(**sizes, norm_pix_loss=norm_pix_loss, **blur).eval()
    imgs = torch.randn(3, 3, 16, 16)
    noise = visualize_prediction.draw_noise(model, 3, seed=1)
    pred, target = visualize_prediction.predict(model, imgs, noise)
    assert_close(target, model.gaussian_blur(imgs) if model.gaussian_blur else imgs, rtol=0, atol=1e-6)
    error = model.patchify(pred - target)
    if norm_pix_loss:
        error = error / model.patchify(target).std(dim=-1, keepdim=True)
    assert_close(error.square().mean(), model(imgs, noise), rtol=1e-4, atol=0)


def test_draw_noise():
    random = models_saim.saim_tiny(**SIZES, query_depth=1)
    noise = visualize_prediction.draw_noise(random, 3, seed=0)
    assert_close(visualize_prediction.draw_noise(random, 3, seed=0), noise, rtol=0, atol=0)
    assert not torch.equal(visualize_prediction.draw_noise(random, 3, seed=1), noise)
    raster = models_saim.saim_tiny(**SIZES, query_depth=0, token_order="raster")
    order = raster.generate_order(torch.zeros(2), visualize_prediction.draw_noise(raster, 2, seed=0))
    assert_close(order, torch.arange(16).expand(2, -1), rtol=0, atol=0)


def test_draw__shows_each_patch_from_its_turn_on():
    rank = np.array([[[3, 1], [0, 2]]])
    white = np.full((1, 4, 4, 3), 255, np.uint8)
    black = np.zeros_like(white)
    axes = np.array(visualize_prediction.draw(black, white, black, rank, False, "").axes).reshape(2, 7)
    for column, share in enumerate(visualize_prediction.SHARES, start=2):
        shown = axes[0, column].images[0].get_array()[::2, ::2, 0] == 255
        assert (shown == (rank[0] < 4 * share)).all()
    assert (axes[0, 1].images[0].get_array() == rank[0] + 1).all()


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("pretrain", []),
        ("upstream", ["--patch_size", "4"]),
        ("bare", ["--model", "saim_tiny", "--input_size", "16", "--patch_size", "4", "--query_depth", "1"]),
    ],
)
def test_load_model(checkpoints, name, flags):
    args = visualize_prediction.get_args_parser().parse_args(["--checkpoint", checkpoints[name], *flags])
    model, known = visualize_prediction.load_model(args)
    assert (known.model, known.input_size, known.patch_size, known.order) == ("saim_tiny", 16, 4, "random")
    assert model.norm_pix_loss == (name != "bare")
    assert not model.training


@pytest.mark.parametrize("name", ["pretrain", pytest.param("raster", marks=pytest.mark.slow)])
def test_prediction_figure(run, checkpoints, digits, tmp_path, name):
    flags = ["--checkpoint", checkpoints[name], "--data_path", digits, "--num_images", 2]
    run(visualize_prediction, *flags, "--output_dir", tmp_path)
    assert Image.open(tmp_path / "predictions.png").width >= 7 * 128


def test_prediction_figure__depends_on_the_seed_alone(run, drawn, checkpoints, digits, tmp_path):
    flags = ["--checkpoint", checkpoints["pretrain"], "--data_path", digits, "--num_images", 1, "--seed", 3]
    run(visualize_prediction, *flags, "--output_dir", tmp_path)
    ours, theirs = (np.asarray(Image.open(path / "predictions.png"), np.int16) for path in (tmp_path, drawn))
    assert np.abs(ours - theirs).max() <= 1  # the two processes add up on different numbers of threads


def test_predict__with_a_single_stream():
    model = models_saim.vit_igpt_base(img_size=16, patch_size=4, depth=1, embed_dim=24, num_heads=2).eval()
    imgs = torch.randn(2, 3, 16, 16)
    noise = visualize_prediction.draw_noise(model, 2, seed=0)
    pred, target = visualize_prediction.predict(model, imgs, noise)
    error = model.patchify(pred - target) / model.patchify(target).std(dim=-1, keepdim=True)
    assert_close(error.square().mean(), model(imgs), rtol=1e-4, atol=0)


def test_model_flags__given_over_stored_over_default():
    stored = {"model": "vit_igpt_base", "input_size": 16, "patch_size": 8, "gaussian_sigma": None}
    given = argparse.Namespace(patch_size=4, input_size=None)
    for form in (stored, argparse.Namespace(**stored)):
        flags = visualize_prediction.model_flags({"args": form}, given)
        assert (flags.model, flags.input_size, flags.patch_size, flags.loss_type) == ("vit_igpt_base", 16, 4, "L2")


# ---- images


def test_spread__takes_classes_in_turn():
    samples = [(f"{target}/{i}.png", target) for target in range(3) for i in range(5)]
    drawn = figures.spread(samples, 6, seed=0)
    assert [path[0] for path in drawn] == ["0", "0", "1", "1", "2", "2"]
    assert drawn == figures.spread(samples, 6, seed=0) != figures.spread(samples, 6, seed=1)
    assert figures.spread(samples, 99, seed=0) == [path for path, _ in samples]


def test_images_without_classes(digits, tmp_path):
    args = argparse.Namespace(images=[], data_path=str(next(Path(digits).glob("val/*"))), num_images=2, seed=0)
    assert len(figures.chosen_images(args)) == 2


def test_to_pixels__undoes_the_normalisation(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (18, 18, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    imgs = figures.read_images([str(tmp_path / "image.png")], 16)
    assert (figures.to_pixels(imgs)[0] == image[1:17, 1:17]).all()


# ---- user errors


@pytest.fixture
def broken(digits, tmp_path) -> dict[str, str]:
    """Paths that fail, by name."""
    (tmp_path / "noimage.png").write_text("text")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    names = {path.name: str(path) for path in tmp_path.iterdir()}
    return {**names, "missing": str(tmp_path / "missing.pth"), "digits": digits}


COMMON_ERRORS = [
    ("missing", ["--checkpoint", "{missing}"], "no such checkpoint file"),
    ("text", ["--checkpoint", "{text}"], "not a checkpoint"),
    ("no_weights", ["--checkpoint", "{weightless}"], "holds no weights under"),
    ("other_image_size", ["--input_size", "18"], "not a multiple of the patch size"),
    ("no_image", ["--data_path", "", "--images", "{noimage.png}"], "noimage.png: unreadable image"),
    ("unwritable", ["--output_dir", "{file}"], "--output_dir .*: cannot be written"),
]
IMAGE_ERRORS = [  # read by one function for both scripts
    ("missing_image", ["--data_path", "", "--images", "{missing}"], "missing.pth: unreadable image"),
    ("no_images", ["--data_path", "{empty}"], "has no class folders and no images"),
    ("neither", ["--data_path", ""], "expected either --images"),
    ("both", ["--images", "{noimage.png}"], "expected either --images"),
    ("no_number", ["--num_images", "0"], "--num_images 0"),
]
ATTENTION_ERRORS = [
    ("patch_size", ["--patch_size", "8"], "check --model, --patch_size"),
    ("model", ["--model", "vit_small_patch16"], "check --model, --patch_size"),
    ("layer", ["--layer", "12"], "--layer 12: the model has 12 blocks"),
    ("query", ["--query", "16"], "--query 16: expected cls, mean or an index from 0 to 15"),
    ("heads", ["--heads", "3"], "--heads 3: expected mean or an index from 0 to 2"),
    ("names", ["--names", "a", "b"], "--names a b: expected 1"),
    ("columns", ["--columns", "0"], "--columns 0"),
]
PREDICTION_ERRORS = [
    ("patch_size", ["--patch_size", "8"], "check --model, --patch_size"),
    ("model", ["--model", "saim_small"], "check --model, --patch_size"),
    ("query_depth", ["--query_depth", "5"], "query_depth 5 does not fit depth 12"),
    ("fine_tuned", ["--checkpoint", "{cls}"], "holds vit_tiny_patch16, expected a pre-training checkpoint"),
]


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        pytest.param(script, flags, words, id=f"{name}-{case}")
        for name, script, errors in (
            ("attention", visualize_attention, IMAGE_ERRORS + ATTENTION_ERRORS),
            ("prediction", visualize_prediction, PREDICTION_ERRORS),
        )
        for case, flags, words in COMMON_ERRORS + errors
    ],
)
def test_user_errors(run, checkpoints, broken, capsys, script, flags, words):
    paths = checkpoints | broken
    given = [paths[flag[1:-1]] if flag.startswith("{") else flag for flag in flags]
    usual = VIT if script is visualize_attention else []
    usual = [*usual, "--checkpoint", checkpoints["pretrain"], "--data_path", broken["digits"], "--num_images", 1]
    with pytest.raises(SystemExit) as end:
        run(script, *usual, "--output_dir", Path(broken["empty"]) / "out", *given)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(words, line)
