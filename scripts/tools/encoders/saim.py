"""SAIM's encoders: the ViT of pre-training, fine-tuning and linear probes; SemAIM's have the same names of weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.distributed import UserError
from saim.models_vit import MODELS, load_pretrained
from scripts.tools.encoders.backbone import Backbone, Source, linear_head
from scripts.tools.encoders.timm_form import TimmForm, vit_form, vit_named

# The encoders of pre-training networks.
ENCODERS = {f"saim_{size}": f"vit_{size}_patch16" for size in ("base", "small", "tiny", "nano")}
ENCODERS["vit_igpt_base"] = "vit_base_patch16"
VIT = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")


def features(network: Any, imgs: Tensor, pool: str) -> Tensor:
    return network.forward_features(imgs)


def load_vit(
    source: Source,
    models: Mapping[str, Callable[..., Any]],
    aliases: dict[str, str],
    load: Callable[[Any, dict[str, Tensor]], tuple[list[str], list[str]]],
    resized: int | None = None,
) -> Backbone:
    """The ViT of a checkpoint.

    Pooling avg norms the mean of the patches by `fc_norm`, of which a pre-trained encoder has no weights; default: what
    the checkpoint classifies, of pre-training the class token.
    Args:
        models: builders by name. aliases: names of pre-training networks. load: the method's `load_pretrained`.
        resized: shorter side of the images in the evaluation of a pre-trained encoder that sees more than 224 pixels.
    """
    found = source.weights()
    weights = distributed.fitted(found, VIT)
    if source.path and not {"patch_embed.proj.weight", "pos_embed"} <= set(weights):
        kind = distributed.kind_of(found)
        raise UserError(
            f"{source.path}{kind}: holds no ViT; its weights: {', '.join(list(weights)[:4]) or 'none'}, ..."
        )
    name = source.name(models, aliases) or source.name_by_sizes(models, len(weights["patch_embed.proj.weight"]))
    channels, sizes = source.channels(), {}
    if weights:
        projection = weights["patch_embed.proj.weight"]
        sizes = {"patch_size": projection.shape[-1], "in_chans": projection.shape[1]}
    size = source.image_side(weights, sizes.get("patch_size", 0))
    trained = "avg" if "fc_norm.weight" in weights else "token"
    pool = source.pool or trained
    path = f"{source.path or 'random weights'}{distributed.kind_of(found)}"
    with distributed.user_errors(f"{path}: check METHOD, --model, --input_size and --pool"):
        network = models[name](img_size=size, **sizes, num_classes=0, global_pool=pool == "avg")
        head = linear_head(weights)
        if weights and not source.fresh:
            source.log_loaded(name, network, *load(network, distributed.fitted(weights, network.state_dict())))
    whole = 1.0 if head is not None or resized is None else size / resized
    return Backbone(
        network,
        features,
        name,
        input_size=size,
        patch_size=network.patch_embed.patch_size,
        embed_dim=network.embed_dim,
        pool=pool,
        crop_pct=224 / 256 if size <= 224 else whole,
        args=source.args,
        head=head if pool == trained else None,
        **channels,
    )


def load_backbone(source: Source) -> Backbone:
    return load_vit(source, MODELS, ENCODERS, load_pretrained)


def timm_form(backbone: Backbone) -> TimmForm:
    """timm's VisionTransformer, which projects query, key and value at once; its numbers agree to 1e-5."""
    state, weights = backbone.network.state_dict(), {}
    for name, value in state.items():
        if ".attn.q." in name:
            weights[name.replace(".q.", ".qkv.")] = torch.cat([state[name.replace(".q.", f".{x}.")] for x in "qkv"])
        elif ".attn.k." not in name and ".attn.v." not in name:
            weights[name] = value
    return vit_form(backbone, backbone.network.blocks, vit_named(backbone), weights, [])
