"""UDI's ViTs of any checkpoint: as each evaluation sees them, and under timm's names."""

import argparse
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from common.distributed import UserError
from scripts.tools.encoders import load
from scripts.tools.encoders.backbone import grid_side
from tests.support.helpers import assert_close, golden_files, load_golden
from tests.support.timm_forms import assert_timm_form, timm_model
from tests.support.udi_weights import NANO, pretrained
from udi import main_finetune, main_knn, main_linprobe, models_finetune, models_udi
from udi.backbone import build_backbone
from udi.models_eval import build_evaluation_vit, build_proj_head, linear_head

load_backbone, timm_form = partial(load.load_backbone, "udi"), partial(load.timm_form, "udi")

IMGS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for value in model.parameters():
        value.data.add_(0.02 * torch.randn_like(value))
    return model.eval()


@pytest.fixture(scope="module", params=[1, 2])
def weights(tmp_path_factory, request) -> str:
    return pretrained(tmp_path_factory.mktemp("udi"), "--number_cls_token", str(request.param))


# ---- pre-training


@golden_files("udi", "eval_two_cls")
def test_authors_two_class_tokens(path, tmp_path, monkeypatch):
    ref = load_golden(path)
    config = ref.meta["config"]
    build = partial(models_udi.VisionTransformer, embed_dim=config["d"], depth=config["depth"], num_heads=config["h"])
    monkeypatch.setitem(models_udi.MODELS, "golden", build)
    torch.save({"teacher": ref.group("sd/teacher")}, tmp_path / "a.pth")
    backbone = load_backbone(str(tmp_path / "a.pth"), "golden")
    for pool, name in (("token", "knn"), ("avg", "patch_mean")):
        backbone.pool = pool
        ref.check(f"out/all_tokens/{name}", backbone(ref["in/x"]), **ref.meta["tolerance"], what=pool)
        ref.check(f"out/all_tokens/{name}", timm_model(timm_form(backbone))(ref["in/x"]), **ref.meta["tolerance"])


OTHERS = [pytest.param(*case, marks=pytest.mark.slow) for case in ((48, ""), (32, "student"))]


@pytest.mark.parametrize(("size", "key"), [(32, ""), (48, "student"), *OTHERS])
def test_features_are_those_of_knn(size, key, weights):
    flags = [*NANO, "--input_size", str(size), "--pretrained_weights", weights, "--checkpoint_key", key or "teacher"]
    model = main_knn.build_model(main_knn.get_args_parser().parse_args(flags)).eval()
    backbone, imgs = load_backbone(weights, input_size=size, key=key), torch.randn(2, 3, size, size)
    assert torch.equal(backbone(imgs), model(imgs))
    assert (backbone.model_name, backbone.input_size, backbone.patch_size, backbone.pool) == (
        "vit_nano",
        size,
        8,
        "token",
    )
    assert_timm_form(timm_form(backbone), backbone, imgs)


def test_mean_of_the_patches_is_that_of_the_linear_probe(weights):
    backbone = load_backbone(weights, pool="avg")
    both = main_linprobe.probe_features(backbone.network, IMGS, 1, avgpool=True).unflatten(1, (-1, 2))  # type: ignore[arg-type]
    assert torch.equal(backbone(IMGS), both[..., 1])
    assert_timm_form(timm_form(backbone), backbone, IMGS)


def test_extracted_weights(weights, tmp_path):
    backbone = load_backbone(weights)
    torch.save(backbone.weights(), tmp_path / "vit.pth")
    again = load_backbone(str(tmp_path / "vit.pth"))
    assert torch.equal(again(IMGS), backbone(IMGS))
    assert (again.model_name, again.input_size) == ("vit_nano", 32)


# ---- fine-tuning

PAPER = ["--layer_scale_init_value", "0", "--disable_rel_pos_bias", "--abs_pos_emb", "--use_cls"]
PAPER += ["--imagenet_default_mean_and_std"]
RECIPES = {
    "default": [],  # relative positions, layer scale, mean pooling
    "paper": PAPER,
    "both positions": ["--abs_pos_emb", "--use_cls"],
    "layer scale": ["--disable_rel_pos_bias", "--abs_pos_emb"],
    "sin-cos": [*PAPER, "--disable_learned_abs_pos_emb"],
    "no positions": ["--disable_rel_pos_bias"],
}
FLAGS = ["--model", "vit_nano", "--input_size", "32", "--patch_size", "8", "--nb_classes", "5"]


def finetuned(folder, *flags: str, tokens: int = 1, **overrides) -> tuple[str, nn.Module, argparse.Namespace]:
    args = main_finetune.get_args_parser().parse_args([*FLAGS, *flags])
    model = shaken(main_finetune.build_model(args, num_class_token=tokens, **overrides))
    state = {
        "model": model.state_dict(),
        "model_ema": {k: 1.1 * x for k, x in model.state_dict().items()},
        "args": args,
    }
    torch.save(state, folder / "checkpoint.pth")
    return str(folder / "checkpoint.pth"), model, args


@pytest.mark.parametrize("recipe", RECIPES)
def test_fine_tuned_networks(recipe, tmp_path):
    path, model, args = finetuned(tmp_path, *RECIPES[recipe])
    backbone = load_backbone(path)
    assert backbone.head is not None
    assert torch.equal(backbone.head(backbone(IMGS)), model(IMGS))
    assert backbone.pool == ("avg" if args.use_mean_pooling else "token")
    assert backbone.mean == ((0.485, 0.456, 0.406) if args.imagenet_default_mean_and_std else (0.5, 0.5, 0.5))
    assert (backbone.interpolation, backbone.crop_pct) == ("bilinear", 224 / 256)
    form = timm_form(backbone)
    assert form.num_classes == 5
    assert form.architecture.startswith("beit" if args.rel_pos_bias else "vit")
    assert_timm_form(form, backbone, IMGS)
    torch.save({"model": backbone.weights(), "args": vars(args) | {"pool": backbone.pool}}, tmp_path / "again.pth")
    again = load_backbone(str(tmp_path / "again.pth"))
    assert torch.equal(again(IMGS), backbone(IMGS))


def test_two_class_tokens_and_shared_positions(tmp_path):
    for flags, overrides in ((PAPER, {"num_class_token": 2}), (["--disable_rel_pos_bias"], {"num_class_token": 2})):
        path, model, _ = finetuned(tmp_path, *flags, tokens=2)
        backbone = load_backbone(path)
        assert torch.equal(backbone.head(backbone(IMGS)), model(IMGS)), overrides  # type: ignore[misc]
        assert timm_form(backbone).model_args["reg_tokens"] == 1
        assert_timm_form(timm_form(backbone), backbone, IMGS)
    path, model, _ = finetuned(tmp_path, "--disable_rel_pos_bias", use_shared_rel_pos_bias=True)
    backbone = load_backbone(path)
    assert torch.equal(backbone.head(backbone(IMGS)), model(IMGS))  # type: ignore[misc]
    assert_timm_form(timm_form(backbone), backbone, IMGS)


@pytest.mark.parametrize("recipe", ["default", "paper", "sin-cos"])
def test_positions_of_fine_tuned_networks_are_resized(recipe, tmp_path):
    path, model, args = finetuned(tmp_path, *RECIPES[recipe])
    args.input_size = 48
    other = main_finetune.build_model(args).eval()
    models_finetune.load_pretrained(other, model.state_dict())
    backbone, imgs = load_backbone(path, input_size=48), torch.randn(2, 3, 48, 48)
    assert torch.equal(backbone(imgs), other.forward_features(imgs))
    assert_timm_form(timm_form(backbone), backbone, imgs)


def test_moving_average_and_pools(tmp_path):
    path, model, _ = finetuned(tmp_path)
    average = load_backbone(path, key="model_ema")
    assert torch.equal(average.network.cls_token, 1.1 * model.cls_token)  # type: ignore[operator]
    with pytest.raises(UserError, match="--pool: norm.weight is missing"):
        load_backbone(path, pool="token")
    path, _, _ = finetuned(tmp_path, *PAPER)
    assert load_backbone(path, pool="avg").head is None


@golden_files("udi", "finetune_")
def test_authors_fine_tuned_networks(path, tmp_path, monkeypatch):
    ref = load_golden(path)
    if "calls" in ref.meta or "train" in ref.meta:
        pytest.skip("schedules, or weights of after the training that the numbers are from before")
    config = ref.meta["config"]
    keywords = {"embed_dim": config["d"], "depth": config["depth"], "num_heads": config["h"]}
    monkeypatch.setitem(models_udi.MODELS, "golden", partial(models_udi.VisionTransformer, **keywords))
    monkeypatch.setitem(models_finetune.MODELS, "golden", partial(models_finetune.VisionTransformer, **keywords))
    args = {"abs_pos_emb": ref.meta["kwargs"]["use_abs_pos_emb"], "rel_pos_bias": False, "input_size": config["gs"]}
    torch.save({"model": ref.weights, "args": args}, tmp_path / "a.pth")
    backbone = load_backbone(str(tmp_path / "a.pth"), "golden")
    ref.check("out/features", backbone(ref["in/x"]), **ref.meta["tolerance"])
    ref.check("out/logits", timm_model(timm_form(backbone))(ref["in/x"]), **ref.meta["tolerance"])


# ---- semi-supervised and transfer learning


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Tensor]:
    """Weights of a pre-trained ViT."""
    return load_backbone(pretrained(tmp_path_factory.mktemp("plain"))).weights()


@pytest.mark.parametrize(("avgpool", "layers"), [(0, 0), (1, 0), (0, 1), (1, 3)])
def test_evaluation_networks(avgpool, layers, plain, tmp_path):
    model = build_evaluation_vit(
        "vit_nano", 8, plain, 32, avgpool_patchtokens=avgpool, drop_rate=0.0, attn_drop_rate=0.0
    )
    model.head = build_proj_head(96, 5, layers, 7, None) if layers else linear_head(96, 5)
    shaken(model)
    args = argparse.Namespace(arch="vit_nano", input_size=32)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "a.pth")
    backbone = load_backbone(str(tmp_path / "a.pth"))
    assert backbone.head is not None
    assert_close(backbone.head(backbone(IMGS)), model(IMGS), rtol=0, atol=1e-6)
    assert (backbone.pool, backbone.interpolation) == ("avg" if avgpool else "token", "bicubic")
    form = timm_form(backbone)
    assert form.num_classes == (0 if layers else 5)
    assert any("projection head" in note for note in form.notes) == bool(layers)
    assert_timm_form(form, backbone, IMGS)


# ---- files and flags


def test_random_weights_follow_the_seed():
    torch.manual_seed(0)
    backbone = load_backbone("", "deit_tiny", 32)
    torch.manual_seed(0)
    expected = build_backbone("vit_tiny", 16, None, 32)
    assert backbone.model_name == "vit_tiny"
    assert torch.equal(backbone.eval()(IMGS), expected.eval()(IMGS)[:, 0])


def test_models_are_told_by_their_width(tmp_path):
    torch.save(models_udi.MODELS["vit_tiny"](img_size=[16], patch_size=8).state_dict(), tmp_path / "a.pth")
    assert load_backbone(str(tmp_path / "a.pth")).model_name == "vit_tiny"
    torch.save(
        models_udi.VisionTransformer([16], 8, embed_dim=8, num_heads=1, depth=1).state_dict(), tmp_path / "b.pth"
    )
    with pytest.raises(UserError, match="--model must be given, no known model has 8 channels"):
        load_backbone(str(tmp_path / "b.pth"))


MISTAKES = [
    ({"key": "teachers"}, "--key teachers: not in .*, whose keys are student, teacher, optimizer, args"),
    ({"model": "vit_nono"}, "--model vit_nono: expected one of vit_tiny"),
    ({"model": "vit_tiny"}, "--model vit_tiny: the file has 4 blocks of 96 channels"),
    ({"input_size": 30}, "is no multiple of 8"),
]


@pytest.mark.parametrize(("kwargs", "words"), MISTAKES, ids=str)
def test_mistakes_are_told(kwargs, words, weights):
    with pytest.raises(UserError, match=words):
        load_backbone(weights, **kwargs)


def test_a_linear_probe_has_no_vit(tmp_path):
    torch.save({"state_dict": {"module.linear.weight": torch.zeros(2, 3)}, "args": {}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds no ViT under 'teacher': cls_token is missing; its keys: module.linear"):
        load_backbone(str(tmp_path / "a.pth"))


def test_fine_tuned_positions_need_flags(tmp_path):
    _, model, _ = finetuned(tmp_path, *RECIPES["sin-cos"])
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="has neither positions nor flags"):
        load_backbone(str(tmp_path / "a.pth"))
    assert grid_side({"a.relative_position_bias_table": torch.zeros(7 * 7 + 3, 2)}) == 4
