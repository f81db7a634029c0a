"""The fine-tuned ViT, its groups, schedules and presets against the authors' numbers, and how weights are loaded."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed
from common.distributed import UserError
from tests.support.helpers import assert_close, golden_files, load_golden
from tests.support.runs import CPU, FixedLoader, RecordingLog
from udi import engine_finetune, main_finetune
from udi.backbone import build_backbone
from udi.models_finetune import (
    MODELS,
    LayerDecayValueAssigner,
    VisionTransformer,
    first_class_token,
    get_parameter_groups,
    interpolate_pos_embed,
    load_pretrained,
    read_weights,
    resize_relative_positions,
)
from udi.optim import cosine_scheduler

# ---- goldens


def kwargs_of(ref) -> dict[str, Any]:
    c = ref.meta["config"]
    sizes = {"img_size": c["gs"], "patch_size": c["p"], "embed_dim": c["d"], "depth": c["depth"], "num_heads": c["h"]}
    return {**sizes, "num_classes": c["C"], **ref.meta["kwargs"]}


@golden_files("udi", "finetune_")
def test_fine_tuning(path):
    """Schedules, or a network's state dict, features and gradients, and upstream's loop where the file has it."""
    ref = load_golden(path)
    if "calls" in ref.meta:
        for i, call in enumerate(ref.meta["calls"]):
            ref.check(f"out/{i}", cosine_scheduler(**call), **ref.meta["tolerance"])
        return
    model = VisionTransformer(**kwargs_of(ref))
    assert list(model.state_dict()) == list(ref.weights)
    ref.equal("pos_embed_is_parameter", isinstance(model.pos_embed, torch.nn.Parameter))
    model.load_state_dict(ref.weights)
    assert_forward(ref, model)
    if "train" in ref.meta:
        model.load_state_dict(ref.weights)
        assert_trajectory(ref, model)


def assert_forward(ref, model: VisionTransformer) -> None:
    tol = ref.meta["tolerance"]
    ref.check("out/features", model.forward_features(ref["in/x"]), **tol)
    logits = model(ref["in/x"])
    ref.check("out/logits", logits, **tol)
    loss = F.cross_entropy(logits, ref["in/y"])
    ref.check("out/loss", loss, **tol)
    loss.backward()
    for name, expected in ref.group("out/grad").items():
        assert_close(model.get_parameter(name).grad, expected, **tol, what=name)


def assert_trajectory(ref, model: VisionTransformer) -> None:
    """Groups, rates, losses and weights as upstream's; what the file does not say is the main's default."""
    train, tol = ref.meta["train"], ref.meta["tolerance"]
    args = main_finetune.get_args_parser().parse_args([])
    for name, value in train.items():
        setattr(args, "warmup_epochs" if name == "warmup" else name, value)
    optimizer = main_finetune.build_optimizer(args, model, args.lr)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    for group, expected in zip(found, ref.meta["groups"], strict=True) if "groups" in ref.meta else ():
        assert {name: group[name] for name in expected} == expected
    steps = sum(name.startswith("in/train_x") for name in ref.arrays)
    rates, history = main_finetune.build_rates(args, steps // args.update_freq), []
    table = np.array([rates(epoch, step) for epoch in range(args.epochs) for step in range(steps)])
    for name, values in zip(("out/train/lr", "out/train/wd"), table.T, strict=True):
        every = args.epochs * steps // len(ref[name]) if name in ref else 1  # a rate for each batch, or each update
        ref.check(name, values[::every], rtol=1e-12, atol=0)
    loader = FixedLoader(*([ref[f"in/train_{part}{i}"] for i in range(steps)] for part in "xy"))
    updater = distributed.Updater(optimizer, CPU, "fp32", args.update_freq, args.clip_grad)
    for epoch in range(args.epochs):
        log = RecordingLog(history, epoch, steps)
        stats = engine_finetune.train_one_epoch(model, torch.nn.CrossEntropyLoss(), loader, updater, rates, log)
    ref.equal("log_keys", list(stats))
    ref.check("out/train/losses", [step["loss"] for step in history], **tol)
    for name, expected in ref.group("out/train/final").items():
        assert_close(model.state_dict()[name], expected, **tol, what=name)


@golden_files("udi", "layer_decay", ".json")
def test_layer_decay_groups(path):
    ref = load_golden(path)
    with torch.device("meta"):
        model = MODELS[ref["model"]](**ref["kwargs"])
    depth, decay = len(model.blocks), ref["layer_decay"]
    assigner = LayerDecayValueAssigner([decay ** (depth + 1 - i) for i in range(depth + 2)])
    skip = model.no_weight_decay()
    groups = get_parameter_groups(model, ref["weight_decay"], skip, assigner.get_layer_id, assigner.get_scale)
    assert len(groups) == ref["n_groups"]
    order = [[g["lr_scale"], g["weight_decay"], len(g["params"])] for g in groups]
    assert order == ref["group_order"]
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: [g["lr_scale"], g["weight_decay"]] for g in groups for p in g["params"]}
    assert found == ref["params"]


@golden_files("udi", "manifest", ".json")
def test_presets_have_upstreams_keys_and_sizes(path):
    presets = {n: p for n, p in load_golden(path)["presets"].items() if n.startswith("finetune:")}
    assert presets
    rows: dict[str, dict[str, Any]] = {
        "use_cls": {"use_mean_pooling": False, "use_rel_pos_bias": False, "use_abs_pos_emb": True, "init_values": 0},
        "CLI defaults": {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1},
    }
    for name, preset in presets.items():
        model_name, row = name.removeprefix("finetune:").split(",", 1)
        kwargs = next(kwargs for start, kwargs in rows.items() if row.startswith(start))
        with torch.device("meta"):
            model = MODELS[model_name](**kwargs)
        assert {k: list(v.shape) for k, v in model.state_dict().items()} == preset["state_dict"], name
        assert list(model.state_dict()) == list(preset["state_dict"]), name
        assert sum(p.numel() for p in model.parameters()) == preset["params"], name
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == preset["trainable"], name


# ---- the network

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 5}


def small(seed: int = 0, **kwargs) -> VisionTransformer:
    """A network in which no tensor is left as constant as it is born."""
    torch.manual_seed(seed)
    model = VisionTransformer(**{**SIZES, **kwargs})
    for param in model.parameters():
        param.data.add_(0.2 * torch.randn_like(param))
    return model


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("rel_pos", [{}, {"use_rel_pos_bias": True}, {"use_shared_rel_pos_bias": True}], ids=str)
def test_last_block_computes_only_the_rows_that_are_read(pooling, tokens, rel_pos):
    if rel_pos and tokens == 2:
        with pytest.raises(ValueError, match="relative positions know 1 class token, not 2"):
            small(**rel_pos, num_class_token=2)
        return
    model = small(use_mean_pooling=pooling, num_class_token=tokens, init_values=0.1, **rel_pos).double().eval()
    imgs = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    assert model.pos_embed is not None
    x = torch.cat([model.cls_token.expand(3, -1, -1), model.patch_embed(imgs)], dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x, None if model.rel_pos_bias is None else model.rel_pos_bias())
    full = model.fc_norm(x[:, tokens:].mean(dim=1)) if model.fc_norm is not None else model.norm(x[:, 0])
    assert_close(model.forward_features(imgs), full, rtol=0, atol=1e-10)
    assert_close(model(imgs), model.head(full), rtol=0, atol=1e-10)


def test_initial_weights():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=64, patch_size=16, embed_dim=192, depth=3, num_heads=3, init_values=0.1)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)  # type: ignore[union-attr]
    assert not model.head.bias.any()  # type: ignore[union-attr]
    for i, block in enumerate(model.blocks, 1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)  # type: ignore[union-attr]
        for layer in (block.attn.proj, block.mlp.fc2):  # type: ignore[union-attr]
            assert layer.weight.std().item() == pytest.approx(0.02 / (2 * i) ** 0.5, rel=0.05)  # type: ignore[union-attr]
        assert torch.equal(block.gamma_1, torch.full((192,), 0.1))  # type: ignore[arg-type]
    for table in (model.cls_token, model.pos_embed):
        assert table is not None
        assert table.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"img_size": 18}, "image size 18 is not a multiple of the patch size 4"),
        ({"num_heads": 3}, "a width of 16 does not divide into 3 heads"),
        ({"attn_drop_rate": 1.5}, "a share of 1.5 of the attention"),
    ],
    ids=str,
)
def test_model__raises_on_what_does_not_fit(kwargs, words):
    with pytest.raises(ValueError, match=words):
        VisionTransformer(**{**SIZES, **kwargs})
    with pytest.raises(ValueError, match="images are 16x12, the model was built for 16x16"):
        small()(torch.rand(1, 3, 16, 12))


def test_groups_without_layers():
    model = small(use_rel_pos_bias=True)
    parser = main_finetune.get_args_parser()
    optimizer = main_finetune.build_optimizer(parser.parse_args(["--layer_decay", "1"]), model, 0.1)
    assert [(g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups] == [(1.0, 0.0), (1.0, 0.05)]
    tables = {id(p) for n, p in model.named_parameters() if "relative_position_bias_table" in n}
    for flags, decay in (([], 0.05), (["--disable_weight_decay_on_rel_pos_bias"], 0.0)):
        groups = main_finetune.build_optimizer(parser.parse_args(flags), model, 0.1).param_groups
        assert {g["weight_decay"] for g in groups for p in g["params"] if id(p) in tables} == {decay}


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "lamb", "lookahead_adamw", "rmsprop"])
def test_optimizers_of_timm(name):
    model = small()
    args = main_finetune.get_args_parser().parse_args(["--opt", name])
    optimizer = main_finetune.build_optimizer(args, model, 1e-3)
    before = model.head.weight.detach().clone()  # type: ignore[union-attr]
    model(torch.rand(2, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)  # type: ignore[union-attr]
    assert len({g["lr_scale"] for g in optimizer.param_groups}) == 4


# ---- files


def pretrained(tokens: int = 1, seed: int = 1, **kwargs) -> dict[str, Tensor]:
    """Weights of a plain ViT."""
    torch.manual_seed(seed)
    model = build_backbone("vit_nano", 4, None, 16, num_class_token=tokens, depth=2, **kwargs)
    return {name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()}


def target(**kwargs) -> VisionTransformer:
    defaults: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 4,
        "depth": 2,
        "num_classes": 5,
        "use_mean_pooling": False,
    }
    return MODELS["vit_nano"](**{**defaults, **kwargs})


LAYOUTS = {
    "plain": lambda w: w,
    "ours": lambda w: {"teacher": {f"backbone.backbone.{k}": v for k, v in w.items()}, "student": {}, "epoch": 1},
    "extracted by upstream": lambda w: {f"backbone.{k}": v for k, v in w.items()},
    "model": lambda w: {"model": w},
    "module": lambda w: {"module": {f"module.{k}": v for k, v in w.items()}},
}
SAMPLING = {"attn.qkv.weight": torch.ones(6, 2), "norm1.weight": torch.ones(2)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_files(layout, tmp_path):
    weights, path = pretrained(), str(tmp_path / "x.pth")
    state = LAYOUTS[layout](weights)
    if layout == "ours":
        state["teacher"] |= {f"backbone.{k}": v for k, v in SAMPLING.items()} | {"head.0.mlp.0.weight": torch.ones(2)}
    elif layout == "extracted by upstream":
        state |= SAMPLING
    torch.save(state, path)
    model = target()
    missing, unexpected = load_pretrained(model, read_weights(path))
    assert (sorted(missing), unexpected) == (["head.bias", "head.weight"], [])
    for name, value in weights.items():
        assert torch.equal(model.state_dict()[name], value), name
    imgs = torch.rand(2, 3, 16, 16)
    vit = build_backbone("vit_nano", 4, weights, depth=2).eval()
    assert_close(model.eval().forward_features(imgs), vit(imgs)[:, 0], rtol=1e-5, atol=1e-6)


def test_two_class_tokens_give_pre_trainings_features(tmp_path):
    weights = pretrained(tokens=2)
    model = target(num_class_token=2).eval()
    load_pretrained(model, weights)
    imgs = torch.rand(2, 3, 16, 16)
    vit = build_backbone("vit_nano", 4, weights, depth=2).eval()
    assert_close(model.forward_features(imgs), vit(imgs)[:, 0], rtol=1e-5, atol=1e-6)
    one = target().eval()
    load_pretrained(one, first_class_token(weights))
    assert torch.equal(one.state_dict()["pos_embed"][:, 1:], weights["pos_embed"][:, 2:])
    vit = build_backbone("vit_nano", 4, first_class_token(weights), depth=2).eval()
    assert_close(one.forward_features(imgs), vit(imgs)[:, 0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"cls_token is \(1, 2, 96\), the model expects \(1, 1, 96\)"):
        load_pretrained(one, weights)


def test_positions_of_another_grid_are_resized():
    weights = pretrained(tokens=2)
    model = target(img_size=24, num_class_token=2)
    load_pretrained(model, weights)
    table = weights["pos_embed"]
    old = table[:, 2:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    new = F.interpolate(old, size=(6, 6), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    assert model.pos_embed is not None
    assert torch.equal(model.pos_embed, torch.cat([table[:, :2], new], dim=1))
    assert interpolate_pos_embed(table, 4, 2) is table


def test_relative_positions_of_another_grid_are_resized():
    source, model = small(use_rel_pos_bias=True), small(1, img_size=24, use_rel_pos_bias=True)
    state = source.state_dict()
    load_pretrained(model, state)
    for i in (0, 1):
        name = f"blocks.{i}.attn.relative_position_bias_table"
        assert torch.equal(model.state_dict()[name], resize_relative_positions(state[name], 6))
    shared, same = small(2, use_shared_rel_pos_bias=True), small(3, use_rel_pos_bias=True)
    load_pretrained(same, shared.state_dict())
    imgs = torch.rand(2, 3, 16, 16)
    assert_close(same.eval()(imgs), shared.eval()(imgs), rtol=1e-5, atol=1e-6)


def test_head_of_the_same_shape_is_kept_and_pooling_starts_its_own_norm():
    state = small().state_dict()
    model = small(1)
    load_pretrained(model, state)
    assert torch.equal(model.head.weight, state["head.weight"])  # type: ignore[union-attr]
    model = VisionTransformer(**{**SIZES, "num_classes": 7}, use_mean_pooling=True)
    weights = small(use_mean_pooling=False).state_dict()
    missing, unexpected = load_pretrained(model, weights)
    assert sorted(missing) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert sorted(unexpected) == ["norm.bias", "norm.weight"]
    assert torch.equal(model.fc_norm.weight, torch.ones(16))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {k: v for k, v in w.items() if "blocks.1" not in k}, "12 weights of the ViT are missing, first blo"),
        (lambda w: {k: v for k, v in w.items() if k != "pos_embed"}, "1 weights of the ViT are missing, first pos_emb"),
        (lambda w: w | {"blocks.2.norm1.weight": w["norm.weight"]}, "more blocks than the model's 2: blocks.2.norm1"),
        (lambda w: w | {"norm.weight": torch.ones(3)}, r"norm.weight is \(3,\), the model expects \(96,\)"),
    ],
)
def test_load_pretrained__raises_on_other_networks(change, words):
    model = target()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        load_pretrained(model, change(pretrained()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_read_weights__raises_where_no_vit_is(tmp_path):
    path = str(tmp_path / "x.pth")
    torch.save(SAMPLING, path)
    with pytest.raises(UserError, match="holds no ViT under 'teacher'"):
        read_weights(path)
    with pytest.raises(UserError, match="holds no ViT under names that start with vit"):
        read_weights(path, model_prefix="vit.")
    torch.save({"net": {f"vit.{k}": v for k, v in pretrained().items()}}, path)
    assert list(read_weights(path, model_key="model|net", model_prefix="vit.")) == list(pretrained())
