"""Encoders as timm's networks: which one, of which sizes, with which weights.

Legend: N images, D width of the features, K classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scripts.tools.encoders.backbone import Backbone


@dataclass(frozen=True)
class TimmForm:
    """A network under timm's names.

    timm.create_model(architecture, num_classes=num_classes, **model_args) takes `weights` strictly and gives logits
    (N, K), without classes the features (N, D). notes: sentences on what is left out or changed.
    """

    architecture: str
    num_classes: int
    model_args: dict[str, Any]
    weights: dict[str, Tensor]
    pool: str
    notes: list[str]


def fold(head: nn.Module | None) -> dict[str, Tensor]:
    """Weight and bias of a linear layer, with the batch norm of a probe inside; {} for what timm's heads are not."""
    norm, linear = head if isinstance(head, nn.Sequential) else (None, head)
    if not isinstance(linear, nn.Linear):
        return {}
    weight, bias = linear.weight.detach(), linear.bias.detach()
    if isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None:
        # In float64: the differences of large numbers.
        mean, std = norm.running_mean.double(), (norm.running_var.double() + norm.eps).sqrt()
        scaled = weight.double() / std
        weight, bias = scaled.to(weight.dtype), (bias.double() - scaled @ mean).to(bias.dtype)
    return {"head.weight": weight, "head.bias": bias}


def vit_form(
    backbone: Backbone,
    blocks: nn.ModuleList,
    architecture: str,
    weights: dict[str, Tensor],
    notes: list[str],
    **arguments: Any,
) -> TimmForm:
    """A ViT, with its head where timm can express that.

    Args:
        weights: under timm's names, without a head. arguments: of timm's network, besides its sizes and pooling.
    """
    head = fold(backbone.head)
    sizes = {
        "img_size": backbone.input_size,
        "patch_size": backbone.patch_size,
        "embed_dim": backbone.embed_dim,
        "depth": len(blocks),
        "num_heads": blocks[0].attn.num_heads,  # type: ignore[union-attr]
        "global_pool": backbone.pool,
    }
    if isinstance(backbone.head, nn.Sequential):
        notes = [*notes, "The probe's batch norm is folded into its linear layer."]
    weights = {name: value.detach() for name, value in {**weights, **head}.items()}
    return TimmForm(architecture, len(head.get("head.bias", ())), sizes | arguments, weights, backbone.pool, notes)


def vit_named(backbone: Backbone) -> str:
    """timm's name of a ViT of nearly this width; the sizes are given besides."""
    return f"{ {192: 'vit_tiny', 384: 'vit_small', 1024: 'vit_large'}.get(backbone.embed_dim, 'vit_base') }_patch16_224"


def vit_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of timm's VisionTransformer for those of its Beit; the keys' bias, which Beit lacks, is 0."""
    named = {}
    for name, value in weights.items():
        if name.endswith(".q_bias"):
            v_bias = weights[name.replace(".q_bias", ".v_bias")]
            named[name.replace(".q_bias", ".qkv.bias")] = torch.cat([value, torch.zeros_like(value), v_bias])
        elif not name.endswith(".v_bias"):
            named[name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")] = value
    return named


def beit_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of timm's Beit, without the bias of the keys, which shifts all logits of a query alike to no effect."""
    named = {}
    for name, value in weights.items():
        if name.endswith("qkv.bias"):
            stem = name.removesuffix("qkv.bias")
            named[f"{stem}q_bias"], _, named[f"{stem}v_bias"] = value.chunk(3)
        else:
            named[name] = value
    return named


def beit_positions(weights: dict[str, Tensor]) -> dict[str, bool]:
    """Arguments of timm's Beit: which positions the weights have."""
    tables = [name for name in weights if name.endswith("relative_position_bias_table")]
    return {
        "use_abs_pos_emb": "pos_embed" in weights,
        "use_rel_pos_bias": any(name.startswith("blocks.") for name in tables),
        "use_shared_rel_pos_bias": any(name.startswith("rel_pos_bias.") for name in tables),
    }
