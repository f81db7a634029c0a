"""The downstream ViT against the authors' numbers, and the loading of encoders from files."""

import argparse
import ast
import re
from typing import Any

import pytest
import torch

from common.distributed import UserError
from semaim import main_finetune, main_knn
from semaim.main_linprobe import add_probe
from semaim.models_semaim import AimViT
from semaim.models_vit import MODELS, VisionTransformer, interpolate_pos_embed, load_encoder, load_pretrained
from tests.support.helpers import assert_close, golden_files, load_golden


@golden_files("semaim", "vit_eval")
def test_pretrained_encoder_in_the_classifier(path):
    ref = load_golden(path)
    tol = ref.meta["tol"]
    assert ref.meta["cases"]
    for case, keys in ref.meta["cases"].items():
        global_pool = "fc_norm.weight" in keys["missing"]
        model = VisionTransformer(**{**ref.kwargs, "global_pool": global_pool}).eval()
        missing, unexpected = load_pretrained(model, ref.weights)
        assert (sorted(missing), sorted(unexpected)) == (keys["missing"], keys["unexpected"]), case
        result = model.load_state_dict(ref.group(f"in/{case}"), strict=False)
        assert not result.unexpected_keys
        features = model.forward_features(ref["in/imgs"])
        ref.check(f"out/{case}/features", features, rtol=tol, atol=tol, what=case)
        ref.check(f"out/{case}/logits", model(ref["in/imgs"]), rtol=tol, atol=tol, what=case)


@golden_files("semaim", "pos_embed")
def test_interpolate_pos_embed(path):
    ref = load_golden(path)
    assert ref.meta["interp"]
    for i, case in enumerate(ref.meta["interp"]):
        table = interpolate_pos_embed(ref[f"in/interp{i}"], case["to_grid"])
        ref.check(f"out/interp{i}", table, rtol=ref.meta["tol"], atol=ref.meta["tol"], what=str(case))


@golden_files("semaim", "manifest", ".json")
def test_presets_have_upstreams_keys_and_sizes(path):
    presets = {k: v for k, v in load_golden(path)["presets"].items() if k.split("[")[0] in MODELS}
    assert presets
    for name, preset in presets.items():
        keywords = {k: ast.literal_eval(v) for k, v in re.findall(r"(\w+)=([\w.]+)", name)}
        with torch.device("meta"):
            model = MODELS[name.split("[")[0]](**keywords)
        shapes = [(k, list(v.shape)) for k, v in model.state_dict().items()]
        assert shapes == [(k, list(v)) for k, v in dict(preset["state_dict"]).items()], name
        assert sum(p.numel() for p in model.parameters()) == preset["params"], name
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == preset["trainable"], name


# ---- files

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
NANO: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}


def pretrained(**kwargs) -> AimViT:
    torch.manual_seed(0)
    return AimViT(**{**SIZES, "query_depth": 2, **kwargs})


def file_of(content: dict[str, Any], folder) -> str:
    path = folder / "checkpoint.pth"
    torch.save(content, path)
    return str(path)


def assert_encoder(model: VisionTransformer, state: dict[str, torch.Tensor]) -> None:
    blocks = [key for key in model.state_dict() if key.startswith(("blocks.", "patch_embed.", "cls_token"))]
    assert blocks
    for key in blocks:
        assert torch.equal(model.state_dict()[key], state[key]), key


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_load_encoder__upstreams_layouts(tmp_path, capsys, key, prefix):
    """Weights under any of upstream's keys, with or without the prefix of DistributedDataParallel."""
    state = pretrained().state_dict()
    content = {key: {prefix + k: v for k, v in state.items()}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    if key == "state_dict":
        content["model"] = "aim_base"  # upstream keeps the name of the model there
    model = VisionTransformer(**SIZES, num_classes=3, global_pool=True)
    load_encoder(model, file_of(content, tmp_path))
    assert_encoder(model, state)
    assert "missing: head (2), fc_norm (2); unexpected: " in capsys.readouterr().out


def test_load_encoder__by_the_key_of_the_moving_average(tmp_path):
    own, ema = pretrained().state_dict(), {k: v + 1 for k, v in pretrained().state_dict().items()}
    path = file_of({"state_dict": own, "ema_state_dict": ema}, tmp_path)
    model = VisionTransformer(**SIZES, num_classes=0)
    load_encoder(model, path)
    assert_encoder(model, own)
    load_encoder(model, path, key="ema_state_dict")
    assert_encoder(model, ema)
    with pytest.raises(UserError, match="no weights under 'ema'; its keys: state_dict, ema_state_dict"):
        load_encoder(model, path, key="ema")


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("global_pool", [False, True])
def test_load_encoder__takes_fine_tuned_and_probed_files(tmp_path, probed, classes, global_pool):
    """k-NN (no head) and another training (a head of its own) start from a file with a head."""
    tuned = VisionTransformer(**SIZES, num_classes=classes, global_pool=global_pool)
    if probed:
        add_probe(tuned)
    path = file_of({"state_dict": tuned.state_dict()}, tmp_path)
    for classes_now in (0, 3):
        model = VisionTransformer(**SIZES, num_classes=classes_now, global_pool=global_pool)
        load_encoder(model, path)
        assert_encoder(model, tuned.state_dict())
        norm = "fc_norm.weight" if global_pool else "norm.weight"
        assert torch.equal(model.state_dict()[norm], tuned.state_dict()[norm])
        if classes_now:
            add_probe(model)(torch.rand(4, 8))


@pytest.mark.parametrize("std", [2e-5, 0.01])
def test_load_encoder__draws_the_head_anew(tmp_path, std):
    tuned = VisionTransformer(**SIZES, num_classes=500)
    torch.nn.init.ones_(tuned.head.bias)  # type: ignore[arg-type]
    model = VisionTransformer(**SIZES, num_classes=500)
    load_encoder(model, file_of({"state_dict": tuned.state_dict()}, tmp_path), head_std=std)
    head: Any = model.head
    assert head.weight.std().item() == pytest.approx(std, rel=0.1)
    assert head.weight.abs().max() <= 2
    assert not head.bias.any()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"depth": 1, "query_depth": 1}, "blocks.1"),
        ({"depth": 4}, "more blocks than the model's 2: blocks.2"),
        ({"patch_size": 8}, "patch_embed"),
        ({"embed_dim": 12}, "cls_token is \\(1, 1, 12\\), the model expects \\(1, 1, 8\\)"),
    ],
    ids=str,
)
def test_load_encoder__refuses_other_architectures(tmp_path, kwargs, words):
    path = file_of({"state_dict": pretrained(**kwargs).state_dict()}, tmp_path)
    with pytest.raises(UserError, match=f"check --model, --patch_size and --input_size, and --global_pool: .*{words}"):
        load_encoder(VisionTransformer(**SIZES, num_classes=3), path)


@pytest.mark.parametrize(("content", "words"), [({"epoch": 1}, "holds no weights"), (b"hello", "not a checkpoint")])
def test_load_encoder__refuses_other_files(tmp_path, content, words):
    path = tmp_path / "file.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=words):
        load_encoder(VisionTransformer(**SIZES), str(path))


def test_encoder_of_another_image_size(tmp_path):
    state = pretrained(img_size=24).state_dict()
    model = VisionTransformer(**SIZES, num_classes=0)
    load_encoder(model, file_of({"state_dict": state}, tmp_path))
    assert_close(model.pos_embed, interpolate_pos_embed(state["pos_embed"], 4), rtol=0, atol=0)


def test_class_token_features_are_those_of_pretraining(tmp_path):
    """The classifier without a head computes the encoder's own unmasked pass."""
    source = pretrained().eval()
    model = VisionTransformer(**SIZES, num_classes=0).eval()
    load_encoder(model, file_of({"state_dict": source.state_dict()}, tmp_path))
    imgs = torch.rand(2, 3, 16, 16)
    assert_close(model(imgs), source.semantic_pass(imgs)[0][:, 0], rtol=0, atol=1e-6)  # type: ignore[index]


@pytest.mark.parametrize("key", ["state_dict", "ema_state_dict"])
def test_knn_builds_its_encoder_from_the_flags(tmp_path, key):
    states = {name: AimViT(**NANO, query_depth=4).state_dict() for name in ("state_dict", "ema_state_dict")}
    flags = ["--model", "vit_nano_patch16", "--input_size", "16", "--patch_size", "8", "--checkpoint_key", key]
    args = main_knn.get_args_parser().parse_args([*flags, "--pretrained_weights", file_of(states, tmp_path)])
    assert_encoder(main_knn.build_model(args), states[key])
    args.global_pool = True
    assert isinstance(main_knn.build_model(args).head, torch.nn.Identity)
    args.checkpoint_key = "teacher"
    with pytest.raises(UserError, match="no weights under 'teacher'; its keys: state_dict, ema_state_dict"):
        main_knn.build_model(args)


def test_fine_tuning_pools_by_default():
    for flags, pool in (([], True), (["--cls_token"], False), (["--cls_token", "--global_pool"], True)):
        small = ["--model", "vit_nano_patch16", "--input_size", "16", "--patch_size", "8", *flags]
        assert main_finetune.build_model(main_finetune.get_args_parser().parse_args(small)).global_pool == pool


@pytest.mark.parametrize("global_pool", [False, True])
def test_last_block_computes_only_the_rows_that_are_read(global_pool):
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES, num_classes=3, global_pool=global_pool).double()
    imgs = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(imgs)], dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    full = model.fc_norm(x[:, 1:].mean(dim=1)) if global_pool else model.norm(x)[:, 0]
    assert_close(model.forward_features(imgs), full, rtol=0, atol=1e-12)
