"""How pre-training starts from weights (--initial_checkpoint): a pre-training file, or an encoder of any program."""

import re
from collections.abc import Callable
from typing import Any

import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor

from a2mim import openmixup
from a2mim.backbones import is_resnet, is_vit
from a2mim.models_a2mim import MaskedImageModel
from common import distributed

# OpenMixup's names of a ConvNeXt's parts, for those of its authors and of torchvision, to be replaced in turn.
OTHER_CONVNEXTS = (
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv([12])\.", r".pointwise_conv\1."),
    (r"^norm\.", "norm3."),
    (r"^features\.([0246])\.(\d)", lambda m: f"downsample_layers.{int(m[1]) // 2}.{m[2]}"),
    (r"^features\.([1357])\.(\d+)", lambda m: f"stages.{int(m[1]) // 2}.{m[2]}"),
    (r"\.block\.0\.", ".depthwise_conv."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".pointwise_conv1."),
    (r"\.block\.5\.", ".pointwise_conv2."),
    (r"\.layer_scale$", ".gamma"),
    (r"^classifier\.0\.", "norm3."),
)


def _vit(net: Any, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A ViT's weights under the names of `net`, and the others; without absolute positions they are zero."""
    own = net.state_dict()
    encoder, others = distributed.fitted_vit(weights, own)
    shared = next((k for k in others if k.endswith("rel_pos_bias.relative_position_bias_table")), None)
    if shared is not None:  # of all blocks, as in BEiT's and SimMIM's pre-training
        table = others.pop(shared)
        encoder |= {name: table for name in own if name.endswith("relative_position_bias_table")}
    if any(name.endswith("relative_position_bias_table") for name in encoder):
        encoder.setdefault("pos_embed", torch.zeros_like(own["pos_embed"]))
    return encoder, others


def _cnn(net: Any, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A ResNet's or ConvNeXt's weights under the names of `net`, and the others."""
    own = {openmixup.encoder_name(net, name): name for name in net.state_dict()}
    ours = own | {name: name for name in net.state_dict()}
    prefix = distributed.prefix_of(weights, ours)
    encoder, others = {}, {}
    for key, value in weights.items():
        name = key.removeprefix(prefix) if key.startswith(prefix) else ""
        for pattern, other in () if is_resnet(net) or name in ours else OTHER_CONVNEXTS:
            name = re.sub(pattern, other, name)
        part, name = (encoder, ours[name]) if name in ours else (others, key)
        part[name] = value
    return encoder, others


def start_from(model: MaskedImageModel, weights: dict[str, Tensor], path: str) -> None:
    """Take what fits: the encoder, and of a pre-training file the mask token and the decoder, too.

    Positions of another grid are resized, relative ones as by --resize_rel_pos of fine-tuning. Layer scale is 1, and
    relative positions are zero, where the file has none.
    Args:
        weights: as `distributed.initial_weights` gives them. path: of their file.
    Raises:
        distributed.UserError: nothing of the encoder fits.
    """
    net: Any = model.encoder
    live = {name: value for name, value in weights.items() if not name.startswith("ema_") and "momentum" not in name}
    names = openmixup.official_names(model) if any(name.startswith("neck.") for name in live) else {}
    outside = {k: own for k, own in names.items() if k in live and not own.startswith("encoder.")}
    encoder, others = (_vit if is_vit(net) else _cnn)(net, {k: v for k, v in live.items() if k not in outside})
    resize: dict[str, Callable[[Tensor], Tensor]] = {}
    fits = f"a {type(net).__name__}"
    if is_vit(net):
        fits = f"a ViT of {len(net.blocks)} blocks and width {net.embed_dim}"
        grid, tables = net.patch_embed.grid_size, [v for k, v in net.state_dict().items() if "bias_table" in k]
        resize = {
            "pos_embed": lambda pos: openmixup.resize_pos_embed(pos, grid),
            "relative_position_bias_table": lambda table: resize_rel_pos_bias_table(table, grid, tables[0].shape),
        }
    found = {f"encoder.{name}": value for name, value in encoder.items()}
    found |= {own: live[name] for name, own in outside.items()}
    distributed.take_weights(model, found, others, path, "encoder.", fits, resize)
