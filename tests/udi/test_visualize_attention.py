"""Attention maps: against the authors' pictures, with one and two class tokens, and the files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.helpers import assert_close, golden_files, load_golden
from tests.support.runs import mistake, run_main
from tests.support.udi_weights import NANO, pretrained
from udi import visualize_attention
from udi.models_udi import VisionTransformer
from udi.visualize_attention import attended, attention_maps, enlarge, read_image, to_pixels


@golden_files("udi", "visualize_attention")
def test_pictures(path, tmp_path):
    ref = load_golden(path)
    config = ref.meta["config"]
    model = VisionTransformer(
        [config["gs"]],
        config["p"],
        num_class_token=config["nct"],
        embed_dim=config["d"],
        depth=config["depth"],
        num_heads=config["h"],
    ).eval()
    model.load_state_dict(ref.weights)
    Image.fromarray(ref["in/image"].numpy()).save(tmp_path / "image.png")
    image = read_image(str(tmp_path / "image.png"), ref.meta["image_size"], config["p"])
    ref.check("out/img_grid", to_pixels(image), rtol=0, atol=5e-3)
    maps = attention_maps(model, image)
    heat, masks = enlarge(maps, config["p"]), enlarge(attended(maps, ref.meta["threshold"]), config["p"])
    for j in range(config["h"]):
        ref.check(f"out/heatmap/attn-head{j}.png", heat[j], **ref.meta["tolerance"])
        if f"out/mask/{j}" in ref:
            assert (masks[j] != ref[f"out/mask/{j}"].bool()).float().mean() < 0.02


def test_columns_start_after_the_class_tokens():
    torch.manual_seed(0)
    model = VisionTransformer([32], 8, embed_dim=24, depth=2, num_heads=3, num_class_token=2).eval()
    image = torch.randn(1, 3, 40, 24)
    attention = model.get_last_selfattention(image)[0]
    for query in (0, 1):
        maps = attention_maps(model, image, query)
        assert maps.shape == (3, 5, 3)
        assert_close(maps.flatten(1), attention[:, query, 2:], rtol=1e-6, atol=0)


def test_masks_hold_the_largest_share():
    maps = torch.tensor([[[0.4, 0.1], [0.3, 0.2]]])
    for threshold, mask in ((0.35, [[1, 0], [0, 0]]), (0.65, [[1, 0], [1, 0]]), (0.95, [[1, 1], [1, 1]])):
        assert attended(maps, threshold)[0].int().tolist() == mask
    assert attended(3 * maps, 0.65).equal(attended(maps, 0.65))


# ---- the script


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("tokens", [1, 2])
def test_files(picture, tmp_path, tokens, capsys):
    weights = pretrained(tmp_path, "--number_cls_token", str(tokens))
    flags = ["--arch", "vit_nano", "--pretrained_weights", weights, "--image_path", picture]
    flags += ["--image_size", "45", "60", "--output_dir", str(tmp_path / "out"), "--threshold", "0.6"]
    run_main(visualize_attention, *flags)
    names = ["img.png"] + [f"{kind}head{j}.png" for j in range(3) for kind in ("attn-", "mask_th0.6_")]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*names, "overview.png"}
    for name in names:
        assert Image.open(tmp_path / "out" / name).size == (56, 40), "cut to multiples of 8"
    assert "WARNING" not in capsys.readouterr().out
    if tokens == 2:
        before = (tmp_path / "out" / "attn-head0.png").read_bytes()
        run_main(visualize_attention, *flags, "--query", "1")
        assert (tmp_path / "out" / "attn-head0.png").read_bytes() != before


def test_patches_are_the_checkpoints(picture, tmp_path, capsys):
    """The default of 8 pixels does not fit the published models."""
    flags = ["--arch", "vit_nano", "--patch_size", "16", "--pretrained_weights", pretrained(tmp_path)]
    run_main(visualize_attention, *flags, "--image_path", picture, "--image_size", "48", "--output_dir", str(tmp_path))
    assert "the checkpoint has patches of 8 pixels" in capsys.readouterr().out
    assert not list(tmp_path.glob("mask*")), "no threshold, no masks"


def test_random_weights_are_told(picture, tmp_path, capsys):
    flags = [*NANO, "--image_path", picture, "--image_size", "32"]
    for folder in ("one", "two"):
        run_main(visualize_attention, *flags, "--output_dir", str(tmp_path / folder))
        assert "WARNING: no --pretrained_weights, the backbone is random" in capsys.readouterr().out
    first, second = ((tmp_path / folder / "attn-head0.png").read_bytes() for folder in ("one", "two"))
    assert first == second


MISTAKES = [
    ([], "--image_path is missing: name an image file; nothing is downloaded"),
    (["--image_path", "/nowhere.jpg"], "--image_path /nowhere.jpg: unreadable image"),
    (["--image_path", __file__], "unreadable image"),
    (["--image_path", "PICTURE", "--threshold", "1.5"], "--threshold 1.5: expected 0 to 1"),
    (["--image_path", "PICTURE", "--image_size", "4"], "--image_size 4: expected height and width of at least 8"),
    (["--image_path", "PICTURE", "--image_size", "9", "9", "9"], "--image_size 9 9 9: expected height and width"),
    (["--image_path", "PICTURE", "--query", "1"], "--query 1: the backbone has 1 class tokens"),
    (["--image_path", "PICTURE", "--image_size", "16", "--output_dir", "/proc/x"], "--output_dir /proc/x: cannot be"),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=lambda v: " ".join(v[-2:]) if isinstance(v, list) else "")
def test_mistakes_are_one_line(flags, words, picture, tmp_path, capsys):
    own = [*NANO, "--output_dir", str(Path(tmp_path))]
    flags = [picture if flag == "PICTURE" else flag for flag in flags]
    assert words in mistake(visualize_attention, *own, *flags, capsys=capsys)
