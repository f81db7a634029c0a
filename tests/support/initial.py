"""Tiny pre-training networks of the five methods, their encoders' outputs, and files of other programs' encoders."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import a2mim.initial
import cae.initial
import saim.initial
import semaim.initial
import udi.initial
from a2mim import backbones, openmixup
from a2mim.losses import MIMLoss
from a2mim.models_a2mim import Classifier, MaskedImageModel
from cae import models_vit as cae_vit
from cae.models_cae import ContextAutoencoderViT
from saim import models_vit as saim_vit
from saim.models_saim import SaimViT
from semaim import models_vit as semaim_vit
from semaim.models_semaim import AimViT
from udi import models_finetune, models_udi

SIZES: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER: dict[str, Any] = {"decoder_embed_dim": 24, "decoder_num_heads": 2, "decoder_num_classes": 5}
DECODER |= {"regressor_depth": 1, "decoder_depth": 1}
Weights = dict[str, Tensor]


def _udi(img_size: int = 16, patch_size: int = 8, num_class_token: int = 1) -> models_udi.MultiCropWrapper:
    tokens = num_class_token
    vit = models_udi.VisionTransformer([img_size], patch_size, num_class_token=tokens, **SIZES)
    wrapped = models_udi.UDIWrapper(vit, models_udi.MaskedAttention(24, 2, qkv_bias=True), 24)
    head = models_udi.DINOHead(24, 8, hidden_dim=16, bottleneck_dim=8)
    return models_udi.MultiCropWrapper(wrapped, head, 0, True)


def _two_streams(model: Any, imgs: Tensor) -> Tensor:
    x = torch.cat([model.cls_token.expand(len(imgs), -1, -1), model.patch_embed(imgs)], dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x)
    return model.norm(x)


def _cae_tokens(model: Any, imgs: Tensor) -> Tensor:
    patches = model.encoder.patch_embed(imgs)
    return model.encoder(patches, torch.arange(patches.shape[1]).expand(len(imgs), -1))


def _a2mim_tuned(weights: Weights, **sizes) -> nn.Module:
    model = Classifier(backbones.vit(**sizes, **SIZES, num_classes=3, global_pool="token"))
    openmixup.load_encoder_weights(model, weights, "x", resize_rel_pos=True)
    return model.net


def _tuned(module: Any, **options) -> Callable[..., nn.Module]:
    def load(weights: Weights, **sizes) -> nn.Module:
        model = module.VisionTransformer(**sizes, **SIZES, num_classes=0, **options.get("network", {}))
        module.load_pretrained(model, weights, **options.get("load", {}))
        return model

    return load


@dataclass
class Method:
    """What differs between the methods.

    Args:
        build: (img_size, patch_size) -> a pre-training network. start: its `start_from`.
        encoder: what names of the encoder begin with. vit: the part of a network that has the encoder's own names.
        tokens: (network, images) -> all tokens after the final norm.
        tuned: (weights, img_size, patch_size) -> the network that fine-tuning or probing makes of a file's weights.
        stored: a network's weights as its checkpoints hold them.
    """

    build: Callable[..., Any]
    start: Callable[[Any, Weights, str], None]
    encoder: str | tuple[str, ...]
    vit: Callable[[Any], Any]
    tokens: Callable[[Any, Tensor], Tensor]
    tuned: Callable[..., Any]
    stored: Callable[[Any], Weights] = lambda model: model.state_dict()


METHODS = {
    "saim": Method(
        lambda **sizes: SaimViT(**{"img_size": 16, "patch_size": 8, "query_depth": 2, **SIZES, **sizes}),
        saim.initial.start_from,
        saim.initial.ENCODER,
        lambda model: model,
        _two_streams,
        _tuned(saim_vit),
    ),
    "semaim": Method(
        lambda **sizes: AimViT(
            **{"img_size": 16, "patch_size": 8, "query_depth": 2, "permutation_type": "stochastic", **SIZES, **sizes}
        ),
        semaim.initial.start_from,
        semaim.initial.ENCODER,
        lambda model: model,
        _two_streams,
        _tuned(semaim_vit),
    ),
    "cae": Method(
        lambda **sizes: ContextAutoencoderViT(**{"img_size": 16, "patch_size": 8, **SIZES, **DECODER, **sizes}),
        cae.initial.start_from,
        ("encoder.", "alignment_encoder."),
        lambda model: model.encoder,
        _cae_tokens,
        _tuned(
            cae_vit,
            network={"init_values": 0.1, "use_mean_pooling": False, "lin_probe": True, "abs_pos_emb": True},
            load={"resize_positions": True},
        ),
    ),
    "a2mim": Method(
        lambda **sizes: MaskedImageModel(
            backbones.vit(**{"img_size": 16, "patch_size": 8, **SIZES, **sizes}), MIMLoss()
        ),
        a2mim.initial.start_from,
        "encoder.",
        lambda model: model.encoder,
        lambda model, imgs: model.encoder.forward_features(imgs),
        _a2mim_tuned,
        openmixup.to_openmixup_state_dict,
    ),
    "udi": Method(
        _udi,
        udi.initial.start_from,
        udi.initial.VIT,
        lambda model: model.backbone.backbone,
        lambda model, imgs: model.backbone.backbone.get_intermediate_layers(imgs)[0],
        _tuned(models_finetune, network={"use_mean_pooling": False, "use_learned_abs_pos_emb": True}),
    ),
}


# ---- encoders of other programs


def drawn(model: nn.Module) -> Any:
    """The network with every weight drawn anew, so that none is at its initial value."""
    torch.manual_seed(1)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.randn_like(value) * 0.2 + (1 if "norm" in name and name.endswith("weight") else 0))
    return model.eval()


def timm_vit(img_size: int = 16, patch_size: int = 8, **kwargs) -> VisionTransformer:
    sizes = {"img_size": img_size, "patch_size": patch_size, "num_classes": 5, **SIZES, **kwargs}
    return drawn(VisionTransformer(**sizes))


def beit(img_size: int = 16, patch_size: int = 8, **kwargs) -> Beit:
    options = {"init_values": 0.1, "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, **kwargs}
    return drawn(Beit(img_size=img_size, patch_size=patch_size, num_classes=5, global_pool="token", **SIZES, **options))
