"""OpenMixup's names of weights, encoders from files, positions of another grid."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from a2mim.backbones import BACKBONES, pieces
from a2mim.losses import MIMLoss
from a2mim.models_a2mim import (
    Classifier,
    MaskedImageModel,
    build_masked,
)
from a2mim.openmixup import (
    extract_encoder,
    load_classifier,
    load_encoder,
    load_openmixup_state_dict,
    resize_pos_embed,
    to_openmixup_state_dict,
)
from common.distributed import UserError
from tests.support.a2mim_networks import (
    NANO,
    assert_constant,
    assert_normal,
    classifier,
    encoder_of,
    full_classifier,
    full_encoder,
    masked,
    randomised,
    seeded,
)
from tests.support.helpers import assert_close

# ---- official state dicts


@pytest.mark.parametrize("method", ["a2mim", "simmim"])
@pytest.mark.parametrize("name", NANO)
def test_state_dicts_survive_a_round_trip(name, method):
    source = randomised(masked(name, method=method, mask_init=1e-6))
    official = to_openmixup_state_dict(source)
    decoder = "neck.decoder_pred.0." if method == "a2mim" else "neck.decoder.0."
    assert {k.split(".")[0] for k in official} == {"backbone", "neck"}
    assert {k for k in official if k.startswith("neck.")} == {f"{decoder}{part}" for part in ("weight", "bias")}
    model = masked(name, method=method, mask_init=1e-6)
    load_openmixup_state_dict(model, official)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    again = to_openmixup_state_dict(model)
    assert list(again) == list(official)
    assert all(torch.equal(again[key], value) for key, value in official.items())


@pytest.mark.parametrize("name", [*NANO, "deit_small"])
def test_state_dicts_of_classifiers_survive_a_round_trip(name):
    sizes = {"embed_dim": 96, "depth": 2, "num_heads": 3} if "deit" in name else {}
    source, model = randomised(classifier(name, **sizes)), classifier(name, **sizes)
    official = to_openmixup_state_dict(source)
    head = "head.layers.head" if "deit" in name else "head.fc"
    assert {k for k in official if k.startswith("head.")} == {f"{head}.weight", f"{head}.bias"}
    load_openmixup_state_dict(model, official)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_relative_index_is_written_for_upstream():
    official = to_openmixup_state_dict(masked("vit_nano"))
    index = official["backbone.layers.3.attn.relative_position_index"]
    assert index.shape == (17, 17)
    assert index.max() == 7 * 7 + 2
    assert index.dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("backbone.conv1.weight"), "1 tensors are missing .backbone.conv1.weight., 0 are unexpected"),
        (lambda s: s.update(other=torch.zeros(1)), "0 tensors are missing .none., 1 are unexpected .other."),
        (
            lambda s: s.update({"backbone.conv1.weight": torch.zeros(1)}),
            r"backbone.conv1.weight is \(1,\), expected \(64, 3, 7, 7\)",
        ),
    ],
)
def test_load_openmixup_state_dict__is_strict(change, words):
    model = masked()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = to_openmixup_state_dict(randomised(masked()))
    change(state)
    with pytest.raises(ValueError, match=words):
        load_openmixup_state_dict(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing was loaded"


def test_load_openmixup_state_dict__ignores_averages_only():
    state = to_openmixup_state_dict(randomised(masked()))
    model = masked()
    load_openmixup_state_dict(model, state | {"ema_backbone_conv1_weight": torch.zeros(1)})
    assert torch.equal(model.encoder.conv1.weight, state["backbone.conv1.weight"])
    with pytest.raises(ValueError, match="1 tensors are missing"):
        load_openmixup_state_dict(model, {k: v for k, v in state.items() if k != "backbone.mask_token"})


# ---- encoders from files


def written(tmp_path: Path, state: Any, name: str = "pretrained.pth") -> str:
    torch.save(state, tmp_path / name)
    return str(tmp_path / name)


def forms(source: MaskedImageModel) -> dict[str, Any]:
    """One encoder in the files in which it is found."""
    official = to_openmixup_state_dict(source)
    averages = {"ema_" + k.replace(".", "_"): torch.zeros_like(v) for k, v in official.items()}
    timm_names = dict(source.encoder.state_dict())
    return {
        "full": {"meta": {"epoch": 3}, "state_dict": official | averages, "optimizer": {"state": {}}},
        "of DDP": {"state_dict": {f"module.{k}": v for k, v in official.items()}},
        "extracted": {"state_dict": extract_encoder({"state_dict": official}), "author": "openmixup"},
        "bare": official,
        "timm": timm_names | {"fc.weight": torch.zeros(5, 5), "head.bias": torch.zeros(5)},
        "timm, nested": {"model": timm_names},
    }


FORMS = ("full", "of DDP", "extracted", "bare", "timm", "timm, nested")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NANO)
def test_load_encoder(name, form, tmp_path, capsys):
    source = randomised(masked(name, mask_init=1e-6))
    path = written(tmp_path, forms(source)[form])
    expected = source.encoder.state_dict()
    for model in (classifier(name, 50), masked(name, mask_layer=3)):
        fresh = {k: v.clone() for k, v in model.state_dict().items()}
        load_encoder(model, path)
        assert f"{path}: " in capsys.readouterr().out
        own = encoder_of(model).state_dict()
        kept = {k for k in own if k in expected}
        assert kept == set(expected) - ({"norm.weight", "norm.bias"} if isinstance(model, Classifier) else set())
        assert all(torch.equal(own[key], expected[key]) for key in kept)
        if isinstance(model, MaskedImageModel):
            for key in ("mask_token", "decoder.weight", "decoder.bias"):
                assert torch.equal(model.state_dict()[key], fresh[key]), key
        else:
            assert_normal(model.head.weight, 0.02 if "convnext" in name else 0.01, "last layer")
            assert_constant(model.head.bias, 0.0, "last layer")
            if "vit" in name:
                assert_constant(model.net.fc_norm.weight, 1.0, "norm")
                assert_constant(model.net.fc_norm.bias, 0.0, "norm")


def test_load_encoder__computes_what_the_pretraining_network_did(tmp_path):
    source = randomised(masked("resnet_nano")).eval()
    model = classifier("resnet_nano").eval()
    load_encoder(model, written(tmp_path, {"state_dict": to_openmixup_state_dict(source)}))
    imgs = torch.randn(2, 3, 64, 64)
    latent, _ = source.encode(imgs, torch.zeros(2, 16, 16))
    assert_close(model.features(imgs), latent.mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)


def test_load_encoder__reads_maes_checkpoints(tmp_path):
    sizes = {"embed_dim": 96, "depth": 2, "num_heads": 3}
    model = classifier("mae_vit_base", **sizes)
    state = {k: torch.rand_like(v) for k, v in model.net.state_dict().items() if not k.startswith(("head", "fc_norm"))}
    extra = {"mask_token": 1, "norm.weight": 1, "decoder_pos_embed": 1, "decoder_blocks.0.attn.qkv.weight": 1}
    load_encoder(model, written(tmp_path, {"model": state | {k: torch.zeros(v) for k, v in extra.items()}}))
    assert all(torch.equal(model.net.state_dict()[k], v) for k, v in state.items())


def test_load_encoder__takes_the_norm_for_the_class_token(tmp_path):
    """A linear probe of a ViT reads the class token after the pre-trained norm."""
    source = randomised(masked("vit_nano")).eval()
    model = classifier("vit_nano", global_pool="token").eval()
    load_encoder(model, written(tmp_path, {"state_dict": to_openmixup_state_dict(source)}))
    imgs = torch.randn(2, 3, 64, 64)
    x = imgs
    for piece in pieces(source.encoder):
        x = piece(x)
    assert_close(model.features(imgs), x[:, 0], rtol=1e-4, atol=1e-4)


def test_load_encoder__of_a_vit_into_a_deit(tmp_path):
    """Which has no biases of queries and values, and the authors' initial values of its head."""
    source = randomised(masked("vit_nano"))
    model = classifier("deit_small", num_classes=500, embed_dim=96, depth=4, num_heads=3)
    load_encoder(model, written(tmp_path, {"state_dict": to_openmixup_state_dict(source)}))
    state = model.net.state_dict()
    left = [name for name in source.encoder.state_dict() if name not in state]
    assert left == [f"blocks.{i}.attn.{name}" for i in range(4) for name in ("q_bias", "v_bias")]
    assert all(torch.equal(state[k], v) for k, v in source.encoder.state_dict().items() if k not in left)
    assert_normal(model.head.weight, 0.02, "last layer")


SHALLOW: dict[str, dict[str, Any]] = {
    "vit_nano": {"depth": 2},
    "resnet_nano": {"block_counts": (1, 1, 1, 2)},
    "convnext_nano": {"depths": (1, 1, 1, 1)},
}
OTHERS = [(name, name) for name in NANO] + [("resnet_nano", "convnext_nano"), ("convnext_nano", "vit_nano")]


@pytest.mark.parametrize("extracted", [False, True])
@pytest.mark.parametrize(("found", "wanted"), OTHERS)
def test_load_encoder__refuses_another_encoder(found, wanted, extracted, tmp_path):
    """In one line; upstream loads a ResNet-50 into a ResNet-101 as far as it goes."""
    other = MaskedImageModel(BACKBONES[found](**SHALLOW[found], num_classes=0, img_size=64), MIMLoss())
    for source, model in ((other, classifier(wanted)), (masked(found), Classifier(BACKBONES[wanted](
        **SHALLOW[wanted], num_classes=7, img_size=64)))):  # fmt: skip
        state = to_openmixup_state_dict(source)
        path = written(tmp_path, {"state_dict": extract_encoder(state) if extracted else state})
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(UserError, match="is not this encoder: .* missing .* unexpected") as error:
            load_encoder(model, path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("sizes", [(50, 101), (101, 50)])
def test_load_encoder__refuses_another_depth_of_the_papers(sizes, tmp_path):
    found, wanted = (f"resnet{depth}" for depth in sizes)
    state = to_openmixup_state_dict(full_encoder(found))
    path = written(tmp_path, {"state_dict": {k: torch.zeros(()).expand(v.shape) for k, v in state.items()}})
    model = full_classifier(wanted)
    with pytest.raises(UserError, match=f"of its {len(model.net.state_dict()) - 2} tensors are missing"):
        load_encoder(model, path)


def test_load_encoder__refuses_another_width(tmp_path):
    source = seeded(lambda: build_masked("vit_nano", MIMLoss(), 64))
    state = to_openmixup_state_dict(source)
    wider = {k: torch.cat([v, v]) if k.endswith("attn.proj.bias") else v for k, v in state.items()}
    with pytest.raises(UserError, match=r"blocks.0.attn.proj.bias is \(192,\), expected \(96,\)"):
        load_encoder(classifier("vit_nano"), written(tmp_path, {"state_dict": wider}))


def test_load_encoder__refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint file"):
        load_encoder(classifier(), str(tmp_path / "nowhere.pth"))
    with pytest.raises(UserError, match="is not this encoder"):
        load_encoder(classifier(), written(tmp_path, {"state_dict": {"other": torch.zeros(2)}}))
    with pytest.raises(UserError, match="is not this encoder"):
        load_encoder(classifier(), written(tmp_path, {"epoch": 3}))


def test_load_classifier(tmp_path):
    source, model = randomised(classifier()), classifier()
    state = to_openmixup_state_dict(source)
    live = {"ema_" + k.replace(".", "_"): v + 1 for k, v in state.items()}
    load_classifier(model, written(tmp_path, {"meta": {}, "state_dict": state | live}))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="head.fc.weight is") as error:
        load_classifier(classifier(num_classes=3), str(tmp_path / "pretrained.pth"))
    assert "\n" not in str(error.value)


# ---- positions of another grid


def test_positions_are_resized(tmp_path, capsys):
    source = randomised(masked("vit_nano", img_size=64))
    path = written(tmp_path, {"state_dict": to_openmixup_state_dict(source)})
    model = classifier("vit_nano", img_size=96)
    load_encoder(model, path)
    own, pos = model.net.pos_embed, source.encoder.pos_embed
    assert torch.equal(own[:, 0], pos[:, 0])
    grid = pos[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert_close(own[:, 1:], expected, rtol=1e-5, atol=1e-6)
    assert "of another grid start at zero" in capsys.readouterr().out
    for block in model.net.blocks:
        assert_constant(block.attn.relative_position_bias_table, 0.0, "table, as upstream")
    load_encoder(model, path, resize_rel_pos=True)
    assert "relative positions of another grid resized" in capsys.readouterr().out
    for block, old in zip(model.net.blocks, source.encoder.blocks, strict=True):
        table, given = block.attn.relative_position_bias_table, old.attn.relative_position_bias_table
        assert table.shape == (11 * 11 + 3, 3)
        assert torch.equal(table[-3:], given[-3:]), "the class token's entries"
        assert table[:-3].std() > 0.3 * given[:-3].std()
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 7)


def test_relative_tables_are_resized_by_distance(tmp_path):
    """A table that depends on the vertical distance alone still does so, and stays symmetric."""
    source = masked("vit_nano", img_size=64)
    rows = (torch.arange(7) - 3.0).square()[:, None].expand(7, 7)
    for block in source.encoder.blocks:
        block.attn.relative_position_bias_table.data[:-3] = rows.reshape(-1, 1)
    model = classifier("vit_nano", img_size=96)
    path = written(tmp_path, {"state_dict": to_openmixup_state_dict(source)})
    load_encoder(model, path, resize_rel_pos=True)
    table = model.net.blocks[1].attn.relative_position_bias_table[:-3, 0].view(11, 11)
    assert_close(table, table[:, :1].expand(11, 11), rtol=0, atol=1e-4)
    assert_close(table, table.flip(0), rtol=0, atol=1e-4)
    assert table[:, 0].argmin() == 5


def test_same_grid_is_not_resized(tmp_path):
    source = randomised(masked("vit_nano"))
    path = written(tmp_path, {"state_dict": to_openmixup_state_dict(source)})
    for resize in (False, True):
        model = classifier("vit_nano")
        load_encoder(model, path, resize_rel_pos=resize)
        assert torch.equal(model.net.pos_embed, source.encoder.pos_embed)
        first, old = model.net.blocks[0].attn, source.encoder.blocks[0].attn
        assert torch.equal(first.relative_position_bias_table, old.relative_position_bias_table)


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (7, 7), (2, 5)])
def test_resize_pos_embed__keeps_constants(grid):
    pos = torch.cat([torch.full((1, 1, 3), 5.0), torch.full((1, 16, 3), 2.0)], dim=1)
    resized = resize_pos_embed(pos, grid)
    assert_close(resized[:, 0], pos[:, 0], rtol=0, atol=0)
    assert_close(resized[:, 1:], torch.full((1, grid[0] * grid[1], 3), 2.0), rtol=1e-6, atol=1e-6)
