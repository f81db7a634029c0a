"""The downstream ViT against the authors' numbers, and the loading of pre-trained encoders."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from saim.models_saim import SaimViT
from saim.models_vit import MODELS, VisionTransformer, interpolate_pos_embed, load_pretrained
from tests.support.helpers import assert_close, assert_gradients, authors_default, golden_files, load_golden


@golden_files("saim", "vit_")
def test_forward_and_gradients(path):
    ref = load_golden(path)
    model = VisionTransformer(**ref.kwargs).eval()
    model.load_state_dict(ref.weights)
    ref.check("out/features", model.forward_features(ref["in/imgs"]), rtol=1e-4, atol=2e-5)
    logits = model(ref["in/imgs"])
    ref.check("out/logits", logits, rtol=1e-4, atol=2e-5)
    smoothing = ref.meta.get("smoothing", authors_default("saim", "main_finetune", "--smoothing"))
    losses = {}
    if "in/hard" in ref:
        losses["ce"] = F.cross_entropy(logits, ref["in/hard"])
        losses["smooth"] = F.cross_entropy(logits, ref["in/hard"], label_smoothing=smoothing)
    if "in/soft" in ref:
        losses["soft"] = F.cross_entropy(logits, ref["in/soft"])
        losses["soft"].backward()
        assert_gradients(model, ref.group("out/grad"), ref.meta.get("params_without_grad", ()))
    for name in [key.removeprefix("out/loss_") for key in ref.arrays if key.startswith("out/loss_")]:
        ref.check(f"out/loss_{name}", losses[name], rtol=1e-5, atol=0)


@golden_files("saim", "vit_")
def test_attention_of_the_last_block(path):
    ref = load_golden(path)
    model = VisionTransformer(**ref.kwargs).eval()
    model.load_state_dict(ref.weights)
    attention = model.attention(ref["in/imgs"])
    ref.check("out/last_attention", attention, rtol=1e-4, atol=2e-5)
    grid = model.patch_embed.grid_size
    ref.check("out/cls_map", attention.mean(1)[:, 0, 1:].unflatten(1, (grid, grid)), rtol=1e-4, atol=2e-5)


@golden_files("saim", "load_pretrained_")
def test_load_pretrained(path):
    ref = load_golden(path)
    model = VisionTransformer(**ref.kwargs).eval()
    missing, unexpected = load_pretrained(model, ref.weights)
    ref.equal("missing_keys", sorted(missing))
    ref.equal("unexpected_keys", sorted(unexpected))
    ref.check("out/pos_embed", model.pos_embed, rtol=1e-4, atol=1e-5)
    for key in missing:
        model.get_parameter(key).data.copy_(ref[f"in/{key}"])
    ref.check("out/features", model.forward_features(ref["in/imgs"]), rtol=1e-4, atol=2e-5)
    ref.check("out/logits", model(ref["in/imgs"]), rtol=1e-4, atol=2e-5)


@golden_files("saim", "pos_embed")
def test_interpolate_pos_embed(path):
    ref = load_golden(path)
    for name, table in ref.group("in/interp").items():
        grid = int(name.split("to")[1])
        ref.check(f"out/interp/{name}", interpolate_pos_embed(table, grid), rtol=0, atol=1e-5)


@golden_files("saim", "manifest", ".json")
def test_presets_have_upstreams_keys_and_sizes(path):
    presets = {k: v for k, v in load_golden(path)["presets"].items() if v["constructor"] in MODELS}
    assert presets
    for name, preset in presets.items():
        with torch.device("meta"):
            model = MODELS[preset["constructor"]](**preset["kwargs"])
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        assert list(shapes.items()) == list(preset["state_dict"].items()), name
        assert sum(p.numel() for p in model.parameters()) == preset["params_total"], name
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == preset["params_trainable"], name


SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}


def test_load_pretrained__resizes_positions():
    state = SaimViT(**{**SIZES, "img_size": 24}, query_depth=2).state_dict()
    model = VisionTransformer(**SIZES, num_classes=3)
    load_pretrained(model, state)
    assert_close(model.pos_embed, interpolate_pos_embed(state["pos_embed"], 4), rtol=0, atol=0)


def test_load_pretrained__takes_a_fine_tuned_checkpoint():
    state = VisionTransformer(**SIZES, num_classes=5).state_dict()
    missing, unexpected = load_pretrained(VisionTransformer(**SIZES, num_classes=3), state)
    assert (sorted(missing), unexpected) == (["head.bias", "head.weight"], [])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"depth": 1}, "blocks.1"),
        ({"depth": 3}, "more blocks"),
        ({"patch_size": 8}, "patch_embed"),
        ({"embed_dim": 12}, "12"),
    ],
    ids=str,
)
def test_load_pretrained__refuses_other_architectures(kwargs, words):
    state = SaimViT(**{**SIZES, **kwargs}, query_depth=1).state_dict()
    with pytest.raises(ValueError, match=words):
        load_pretrained(VisionTransformer(**SIZES, num_classes=3), state)


@pytest.mark.parametrize("global_pool", [False, True])
def test_last_block_computes_only_the_rows_that_are_read(global_pool):
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES, num_classes=3, global_pool=global_pool).double()
    imgs = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    x = model.embed(imgs)
    for block in model.blocks:
        x = block(x)
    full = model.fc_norm(x[:, 1:].mean(dim=1)) if global_pool else model.norm(x)[:, 0]
    assert_close(model.forward_features(imgs), full, rtol=0, atol=1e-12)
