"""Files of other programs: what loads into which method, and with which words the others are refused (FAQ.md)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from a2mim.backbones import vit
from a2mim.models_a2mim import Classifier
from a2mim.openmixup import load_encoder as load_a2mim
from cae import models_vit as cae_vit
from common.distributed import UserError, load, weights
from saim import models_vit as saim_vit
from semaim import models_vit as semaim_vit
from udi.backbone import load_backbone

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
Weights = dict[str, Tensor]


def timm_weights(**kwargs) -> Weights:
    torch.manual_seed(1)
    return VisionTransformer(**SIZES, num_classes=5, **kwargs).state_dict()


def prefixed(prefix: str) -> Weights:
    return {prefix + name: value for name, value in timm_weights().items()}


def in_parts(folder: Path) -> str:
    """Two safetensors files and their index."""
    plan: dict[str, str] = {}
    for i in (0, 1):
        part = dict(list(timm_weights().items())[i::2])
        save_file({name: value.contiguous() for name, value in part.items()}, folder / f"{i}.safetensors")
        plan |= dict.fromkeys(part, f"{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": plan}))
    return str(folder / "model.safetensors.index.json")


# A file by what wrote it; all hold the same ViT as timm and MAE name its weights.
FILES: dict[str, Callable[[], Any]] = {
    "a state dict": timm_weights,
    "MAE": lambda: {"model": timm_weights()},
    "timm's training": lambda: {"state_dict": timm_weights(), "state_dict_ema": timm_weights()},
    "DataParallel": lambda: {"model": prefixed("module.")},
    "torch.compile": lambda: {"model": prefixed("_orig_mod.")},
    "Lightning": lambda: {"state_dict": prefixed("model."), "epoch": 3},
    "DINO": lambda: {"student": prefixed("module.backbone."), "teacher": prefixed("backbone.")},
    "I-JEPA": lambda: {"encoder": {}, "target_encoder": prefixed("module.")},
    "a backbone of Lightning": lambda: {"state_dict": prefixed("model.encoder.") | {"model.head.bias": torch.ones(1)}},
    "OpenCLIP's trunk": lambda: prefixed("visual.trunk.") | {"logit_scale": torch.ones(())},
}
FOREIGN = {
    "transformers": ({"vit.embeddings.patch_embeddings.projection.weight": torch.ones(1)}, "the library transformers"),
    "DINOv2": ({f"blocks.{i}.ls{j}.gamma": torch.ones(24) for i in (0, 1) for j in (1, 2)}, "DINOv2"),
    "torchvision": ({"conv_proj.weight": torch.ones(1)}, "torchvision"),
    "ResNet": ({"layer1.0.conv1.weight": torch.ones(1)}, "a ResNet"),
}


def written(content: Any, folder: Path) -> str:
    torch.save(content, folder / "x.pth")
    return str(folder / "x.pth")


@pytest.mark.parametrize("kind", [*FILES, "parts of safetensors"])
@pytest.mark.parametrize("method", [saim_vit, semaim_vit], ids=["saim", "semaim"])
def test_every_common_file_loads(method, kind, tmp_path):
    """Queries, keys and values are split, and images give the features that timm's network gives."""
    path = in_parts(tmp_path) if kind not in FILES else written(FILES[kind](), tmp_path)
    model = method.VisionTransformer(**SIZES, num_classes=0).eval()
    method.load_encoder(model, path)
    reference = VisionTransformer(**SIZES, num_classes=5).eval()
    reference.load_state_dict(timm_weights())
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.forward_features(images), reference.forward_features(images)[:, 0])


@pytest.mark.parametrize("kind", FILES)
def test_every_common_file_of_a_plain_vit_loads_into_udi(kind, tmp_path):
    if kind in ("I-JEPA", "a backbone of Lightning", "OpenCLIP's trunk"):
        with pytest.raises(UserError, match="holds no ViT"):
            load_backbone(written(FILES[kind](), tmp_path))
        return
    found = load_backbone(written(FILES[kind](), tmp_path))
    assert torch.equal(found["blocks.1.attn.qkv.weight"], timm_weights()["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("method", [saim_vit, semaim_vit, cae_vit], ids=["saim", "semaim", "cae"])
def test_other_networks_are_named(method, kind, tmp_path):
    content, words = FOREIGN[kind]
    whole = timm_weights() | content if kind == "DINOv2" else content
    model = method.VisionTransformer(**SIZES, num_classes=3)
    with pytest.raises(UserError, match=f"x.pth .weights of {words}") as error:
        method.load_encoder(model, written(whole, tmp_path))
    if kind == "DINOv2" and method is not cae_vit:
        assert "the model's blocks have no ls1.gamma, as the checkpoint's have" in str(error.value)


def test_folders_of_other_programs_say_which_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=f"{tmp_path}: is a folder, expected a checkpoint file, such as .*safetensors"):
        load(str(tmp_path))


def test_a_resumed_file_of_another_network_says_what_fits(tmp_path):
    path = written({"model": timm_weights()}, tmp_path)
    with pytest.raises(UserError) as error:
        weights.load_weights(saim_vit.VisionTransformer(**SIZES, num_classes=5), path)
    kind = "(weights of a ViT, as timm's, MAE's, DINO's or UDI's)"
    words = "12 weights are missing (blocks.0.attn.q.weight), 4 weights are not of this network"
    assert str(error.value).startswith(f"{path}: 'model' does not fit this run: {words}")
    assert str(error.value).endswith(f" {kind}; check --model")
    assert "loading state_dict" not in str(error.value)


@pytest.mark.parametrize("author", ["SimMIM", "BEiT"])
def test_files_of_a2mims_baselines_load(author, tmp_path):
    """Relative positions shared by all blocks, no absolute ones; SimMIM's names begin with encoder."""
    torch.manual_seed(0)
    model = Classifier(vit(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3))
    own = {k: torch.randn_like(v) for k, v in model.net.state_dict().items() if v.is_floating_point()}
    drop = ("pos_embed", "head.", "fc_norm.")
    theirs = {k: v for k, v in own.items() if not k.startswith(drop) and "relative_position" not in k}
    table = torch.randn_like(own["blocks.0.attn.relative_position_bias_table"])
    theirs |= {"rel_pos_bias.relative_position_bias_table": table, "mask_token": torch.ones(1, 1, 24)}
    if author == "SimMIM":
        theirs = {f"encoder.{k}": v for k, v in theirs.items()} | {"decoder.0.weight": torch.ones(1)}
    load_a2mim(model, written({"model": theirs}, tmp_path))
    state = model.net.state_dict()
    for i in (0, 1):
        assert torch.equal(state[f"blocks.{i}.attn.relative_position_bias_table"], table)
    assert torch.equal(state["blocks.1.attn.qkv.weight"], own["blocks.1.attn.qkv.weight"])
    assert not state["pos_embed"].any()
