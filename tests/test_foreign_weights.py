"""Files of other programs: what loads into which method, and with which words the others are refused (FAQ.md)."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import udi.models_finetune
from a2mim.backbones import plain_vit, vit
from a2mim.models_a2mim import Classifier
from a2mim.openmixup import load_encoder as load_a2mim
from a2mim.openmixup import to_openmixup_state_dict
from cae import models_vit as cae_vit
from common.distributed import UserError, load, user_errors, weights
from saim import models_vit as saim_vit
from scripts.tools.encoders import load as encoders
from semaim import models_vit as semaim_vit
from udi import models_udi
from udi.backbone import load_backbone

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
Weights = dict[str, Tensor]


def timm_vit(**kwargs) -> VisionTransformer:
    """With biases that are not zero."""
    torch.manual_seed(1)
    model = VisionTransformer(**SIZES, num_classes=5, **kwargs).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return model


def timm_weights(prefix: str = "") -> Weights:
    return {prefix + name: value for name, value in timm_vit().state_dict().items()}


def apart() -> Weights:
    """Queries, keys and values as SAIM names them."""
    weights = timm_weights()
    for name in [name for name in weights if ".qkv." in name]:
        weights |= zip((name.replace("qkv", letter) for letter in "qkv"), weights.pop(name).chunk(3), strict=True)
    return weights


def without_key_biases() -> Weights:
    """As BEiT names them: keys have no biases, which have no effect."""
    weights = timm_weights()
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        q, _, v = weights.pop(name).chunk(3)
        weights |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
    return weights


def in_parts(folder: Path) -> str:
    """Two safetensors files and their index."""
    plan: dict[str, str] = {}
    for i in (0, 1):
        part = dict(list(timm_weights().items())[i::2])
        save_file({name: value.contiguous() for name, value in part.items()}, folder / f"{i}.safetensors")
        plan |= dict.fromkeys(part, f"{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": plan}))
    return str(folder / "model.safetensors.index.json")


# A file by what wrote it; all hold the same ViT.
FILES: dict[str, Callable[[], Any]] = {
    "a state dict": timm_weights,
    "MAE": lambda: {"model": timm_weights() | {"mask_token": torch.ones(1)}},
    "timm's training": lambda: {"state_dict": timm_weights(), "state_dict_ema": timm_weights()},
    "an average alone": lambda: {"model_ema": timm_weights(), "epoch": 3},
    "DataParallel": lambda: {"model": timm_weights("module.")},
    "torch.compile": lambda: {"model": timm_weights("_orig_mod.")},
    "Lightning": lambda: {"state_dict": timm_weights("model."), "epoch": 3},
    "DINO": lambda: {"student": timm_weights("module.backbone."), "teacher": timm_weights("backbone.")},
    "a backbone of Lightning": lambda: {
        "state_dict": timm_weights("model.encoder.") | {"model.head.bias": torch.ones(1)}
    },
    "OpenCLIP's trunk": lambda: timm_weights("visual.trunk.") | {"logit_scale": torch.ones(())},
    "SAIM": lambda: {"model": apart()},
    "BEiT's layout": lambda: {"model": without_key_biases()},
}
REFUSED = {
    "transformers": ({"vit.embeddings.patch_embeddings.projection.weight": torch.ones(1)}, "the library transformers"),
    "DINOv2": ({f"blocks.{i}.ls{j}.gamma": torch.ones(24) for i in (0, 1) for j in (1, 2)}, "DINOv2"),
    "torchvision": ({"conv_proj.weight": torch.ones(1)}, "torchvision"),
    "ResNet": ({"layer1.0.conv1.weight": torch.ones(1)}, "a ResNet"),
}


def written(content: Any, folder: Path) -> str:
    torch.save(content, folder / "x.pth")
    return str(folder / "x.pth")


def saim_features(path: str, images: Tensor, module: Any = saim_vit) -> Tensor:
    model = module.VisionTransformer(**SIZES, num_classes=0).eval()
    module.load_encoder(model, path)
    return model.forward_features(images)


def cae_features(path: str, images: Tensor) -> Tensor:
    model = cae_vit.VisionTransformer(**SIZES, num_classes=3, use_mean_pooling=False).eval()
    cae_vit.load_encoder(model, path)
    return model.forward_features(images)


def a2mim_features(path: str, images: Tensor) -> Tensor:
    """The final norm is the classifier's, which starts anew."""
    model = Classifier(plain_vit(**SIZES, num_classes=3, global_pool="token")).eval()
    load_a2mim(model, path)
    model.net.norm.load_state_dict(timm_vit().norm.state_dict())
    return model.net.forward_features(images)[:, 0]


def udi_features(path: str, images: Tensor) -> Tensor:
    sizes: dict[str, Any] = {**SIZES, "img_size": [16]}
    model = models_udi.VisionTransformer(**sizes, qkv_bias=True).eval()
    weights.restore(model, load_backbone(path), path, "model")
    return model(images)[:, 0]


def udi_finetuned_features(path: str, images: Tensor) -> Tensor:
    model = udi.models_finetune.VisionTransformer(**SIZES, use_abs_pos_emb=True, use_mean_pooling=False).eval()
    found = udi.models_finetune.read_weights(path)
    with user_errors(f"{path}{weights.kind_of(found)}"):  # as main_finetune.py
        udi.models_finetune.load_pretrained(model, found)
    return model.forward_features(images)


METHODS = {
    "saim": saim_features,
    "semaim": partial(saim_features, module=semaim_vit),
    "cae": cae_features,
    "a2mim": a2mim_features,
    "udi": udi_features,
    "udi fine-tuning": udi_finetuned_features,
}


@pytest.mark.parametrize("kind", [*FILES, "parts of safetensors"])
@pytest.mark.parametrize("method", METHODS)
def test_every_common_file_of_a_vit_loads(method, kind, tmp_path):
    """Images give the features that timm's network gives."""
    path = in_parts(tmp_path) if kind not in FILES else written(FILES[kind](), tmp_path)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(METHODS[method](path, images), timm_vit().forward_features(images)[:, 0])


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("method", METHODS)
def test_other_networks_are_named(method, kind, tmp_path):
    content, words = REFUSED[kind]
    whole = timm_weights() | content if kind == "DINOv2" else content
    path = written(whole, tmp_path)
    with pytest.raises(UserError, match=f"weights of {words}") as error:
        METHODS[method](path, torch.zeros(1, 3, 16, 16))
    assert str(error.value).startswith(path)
    if kind == "DINOv2" and method in ("saim", "semaim", "cae"):
        assert "the model's blocks have no ls1.gamma, as the checkpoint's have" in str(error.value)
    if kind == "transformers":
        assert "torch.save(timm.create_model(NAME, pretrained=True).state_dict(), FILE)" in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_vit_without_class_token_is_refused(method, tmp_path):
    """As I-JEPA's."""
    whole = {k: v for k, v in timm_weights().items() if k != "cls_token"}
    with pytest.raises((UserError, ValueError), match="cls_token"):
        METHODS[method](written({"target_encoder": whole, "encoder": whole}, tmp_path), torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("method", ["saim", "semaim", "cae", "a2mim"])
def test_udis_file_is_read_where_it_has_one_class_token(method, tokens, tmp_path):
    own = timm_weights()
    token, patches = own["cls_token"], own["pos_embed"][:, 1:]
    own |= {"cls_token": token.expand(-1, tokens, -1), "pos_embed": torch.cat([*[token] * tokens, patches], dim=1)}
    names = {f"backbone.backbone.{name}": value for name, value in own.items()}
    names |= {"backbone.norm1.weight": torch.ones(24), "head.last_layer.weight_v": torch.ones(5, 24)}
    path, images = written({"student": names, "teacher": names}, tmp_path), torch.randn(1, 3, 16, 16)
    if tokens == 1:
        assert METHODS[method](path, images).shape == (1, 24)
        return
    with pytest.raises(UserError, match=r"cls_token is \(1, 2, 24\)") as error:
        METHODS[method](path, images)
    assert str(error.value).startswith(path)


@pytest.mark.parametrize("method", ["saim", "semaim", "cae", "udi"])
def test_the_tools_read_them_too(method, tmp_path):
    sizes = {**SIZES, "embed_dim": 96, "depth": 4, "num_heads": 3}
    reference = VisionTransformer(**sizes, num_classes=0).eval()
    plain, images = reference.state_dict(), torch.randn(2, 3, 16, 16)
    for prefix in ("model.backbone.", "visual.trunk."):
        path = written({"state_dict": {prefix + k: v for k, v in plain.items()} | {"x": torch.ones(1)}}, tmp_path)
        backbone = encoders.load_backbone(method, path, pool="token")
        torch.testing.assert_close(backbone(images), reference.forward_features(images)[:, 0])


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


# ---- ViTs with layer scale or relative positions

SCALED: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def scaled_network(author: str) -> Classifier:
    """A2MIM's ViT with what the others' have of it: CAE no relative positions, SimMIM and BEiT no absolute ones."""
    torch.manual_seed(0)
    model = Classifier(vit(**SCALED, num_classes=3)).eval()
    net: Any = model.net
    own = {k: 0.3 * torch.randn_like(v) for k, v in net.state_dict().items() if not k.startswith("fc_norm.")}
    tables = [k for k in own if k.endswith("relative_position_bias_table")]
    if author in ("SimMIM", "BEiT"):
        own |= {"pos_embed": torch.zeros_like(own["pos_embed"]), tables[1]: own[tables[0]]}
    if author == "CAE":
        own |= {k: torch.zeros_like(own[k]) for k in tables}
    net.load_state_dict(own, strict=False)
    return model


def scaled_file(author: str) -> dict[str, Any]:
    """The network in the layout of its author, with further parts of the pre-training network."""
    model = scaled_network(author)
    if author == "A2MIM":
        return {"state_dict": to_openmixup_state_dict(model) | {"neck.decoder_pred.0.bias": torch.ones(1)}}
    state = model.net.state_dict()
    norm = {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24), "mask_token": torch.ones(1, 1, 24)}
    plain = {
        k: v for k, v in state.items() if "relative_position" not in k and not k.startswith(("fc_norm.", "head."))
    } | norm
    if author == "CAE":
        teacher = {f"alignment_encoder.{k}": torch.zeros_like(v) for k, v in plain.items()}
        further = {"regresser.norm.weight": torch.ones(24), "rd_pos_embed": torch.ones(1, 17, 24)}
        return {"model": {f"encoder.{k}": v for k, v in plain.items()} | teacher | further}
    del plain["pos_embed"]
    table = state["blocks.0.attn.relative_position_bias_table"]
    plain |= {"rel_pos_bias.relative_position_bias_table": table, "rel_pos_bias.relative_position_index": table}
    if author == "BEiT":
        return {"model": plain | {"lm_head.weight": torch.ones(5, 24), "lm_head.bias": torch.ones(5)}}
    return {"model": {f"encoder.{k}": v for k, v in plain.items()} | {"decoder.0.weight": torch.ones(1)}}


def scaled_cae(path: str, author: str, **kwargs) -> Any:
    absolute: dict[str, Any] = {"sin_pos_emb": False, "abs_pos_emb": author in ("CAE", "A2MIM")}
    relative: dict[str, Any] = {"use_rel_pos_bias": author != "CAE", "init_values": 0.1}
    model = cae_vit.VisionTransformer(**SCALED, **absolute, **relative, num_classes=3, **kwargs).eval()
    cae_vit.load_encoder(model, path)
    return model


def scaled_udi(path: str, author: str) -> Any:
    positions: dict[str, Any] = {"use_abs_pos_emb": author in ("CAE", "A2MIM"), "use_rel_pos_bias": author != "CAE"}
    model = udi.models_finetune.VisionTransformer(**SCALED, **positions, init_values=0.1).eval()
    udi.models_finetune.load_pretrained(model, udi.models_finetune.read_weights(path))
    return model


def scaled_a2mim(path: str, author: str) -> Any:
    model = Classifier(vit(**SCALED, num_classes=3)).eval()
    load_a2mim(model, path)
    return model


READERS: dict[str, Callable[[str, str], Any]] = {
    "cae fine-tuning": scaled_cae,
    "cae linear probe": partial(scaled_cae, lin_probe=True, use_mean_pooling=False),
    "udi fine-tuning": scaled_udi,
    "a2mim": scaled_a2mim,
}


@pytest.mark.parametrize("author", ["BEiT", "SimMIM", "A2MIM", "CAE"])
@pytest.mark.parametrize("reader", READERS)
def test_vits_with_layer_scale_load(reader, author, tmp_path):
    """Images give the tokens that the file's network gives."""
    images = torch.randn(2, 3, 32, 32)
    tokens = scaled_network(author).net.forward_features(images)
    model = READERS[reader](written(scaled_file(author), tmp_path), author)
    if reader == "a2mim":
        torch.testing.assert_close(model.net.forward_features(images), tokens)
        return
    token = tokens[:, 0] if "probe" in reader else tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(model.forward_features(images), nn.functional.layer_norm(token, [24], eps=1e-6))


@pytest.mark.parametrize("author", ["BEiT", "SimMIM", "A2MIM", "CAE"])
@pytest.mark.parametrize("method", ["saim", "semaim", "udi"])
def test_vits_with_layer_scale_are_refused_by_networks_without(method, author, tmp_path):
    """By the encoders of SAIM and SemAIM, and by UDI's evaluations of frozen features."""
    path = written(scaled_file(author), tmp_path)
    with pytest.raises(UserError, match="weights of a network with (relative positions|LayerScale)") as error:
        METHODS[method](path, torch.zeros(1, 3, 16, 16))
    assert str(error.value).startswith(path)
