"""timm's ViTs, ResNets and ConvNeXts by name, their initial weights, and the places inside them that masks reach.

B batch, C channels, D width, h w grid of features, K classes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers.norm import LayerNorm
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Backbone = Any  # one of timm's networks above; their attributes are typed too loosely to be named here
Piece = Callable[[Tensor], Tensor]

RESNET_BLOCKS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}


def vit(
    img_size: int = 224,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    patch_size: int = 16,
    init_values: float | None = 0.1,
    global_pool: str = "avg",
    **arch,
) -> Beit:
    """The ViT of BEiT with absolute and relative positions. A classifier sees the mean of the patch tokens after a
    norm of its own (global_pool avg), or the class token after the encoder's norm (token)."""
    return Beit(
        img_size=img_size,
        patch_size=patch_size,
        num_classes=num_classes,
        global_pool=global_pool if num_classes else "",
        drop_path_rate=drop_path_rate,
        init_values=init_values,
        use_abs_pos_emb=True,
        use_rel_pos_bias=True,
        norm_layer=partial(LayerNorm, eps=1e-6),  # type: ignore[arg-type]
        **arch,
    )


def plain_vit(
    img_size: int = 224,
    num_classes: int = 1000,
    drop_path_rate: float = 0.0,
    patch_size: int = 16,
    global_pool: str = "avg",
    **arch,
) -> VisionTransformer:
    """The ViT of MAE with absolute positions only; a classifier sees the mean of the patch tokens."""
    return VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        num_classes=num_classes,
        global_pool=global_pool,  # type: ignore[arg-type]
        drop_path_rate=drop_path_rate,
        **arch,
    )


def resnet(
    img_size: int = 224,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    depth: int = 50,
    base_channels: int = 64,
    block_counts: tuple[int, ...] | None = None,
    output_stride: int = 32,
    in_chans: int = 3,
) -> ResNet:
    """ResNet v1b of any image size, with a stem of 64 channels; stage i has base_channels * 2**i (x 4) channels.

    Below 32, output_stride replaces the strides of the last stages by dilations.
    """
    block, layers = RESNET_BLOCKS[depth]
    return ResNet(
        block,
        block_counts or layers,
        num_classes=num_classes,
        channels=tuple(base_channels * 2**i for i in range(4)),
        drop_path_rate=drop_path_rate,
        output_stride=output_stride,
        in_chans=in_chans,
    )


def convnext(
    img_size: int = 224,
    num_classes: int = 0,
    drop_path_rate: float = 0.0,
    depths: tuple[int, ...] = (3, 3, 9, 3),
    dims: tuple[int, ...] = (96, 192, 384, 768),
    in_chans: int = 3,
) -> ConvNeXt:
    """ConvNeXt of any image size; a classifier sees the mean of the last map, after a norm."""
    return ConvNeXt(in_chans, num_classes, depths=depths, dims=dims, drop_path_rate=drop_path_rate)


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "vit_small": partial(vit, embed_dim=768, depth=8, num_heads=8, mlp_ratio=3),
    "vit_base": partial(vit, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4),
    "vit_large": partial(vit, embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4),
    **{f"resnet{depth}": partial(resnet, depth=depth) for depth in RESNET_BLOCKS},
    "convnext_tiny": partial(convnext, depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "convnext_small": partial(convnext, depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "convnext_base": partial(convnext, depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "mae_vit_base": partial(plain_vit, embed_dim=768, depth=12, num_heads=12),
    "mae_vit_large": partial(plain_vit, embed_dim=1024, depth=24, num_heads=16),
    # OpenMixup's DeiT-S has relative positions and layer-scale, but no biases of queries and values
    "deit_small": partial(vit, embed_dim=384, depth=12, num_heads=6, mlp_ratio=4, global_pool="token", qkv_bias=False),
    # for small machines
    "vit_tiny": partial(vit, embed_dim=192, depth=12, num_heads=3, mlp_ratio=4),
    "vit_nano": partial(vit, embed_dim=96, depth=4, num_heads=3, mlp_ratio=4),
    "resnet_nano": partial(resnet, depth=18, base_channels=16, block_counts=(1, 1, 1, 1)),
    "convnext_nano": partial(convnext, depths=(1, 1, 2, 1), dims=(24, 48, 96, 192)),
}
FINE_TUNED = ("mae_vit_base", "mae_vit_large", "deit_small")  # not pre-trained here


def is_vit(net: Backbone) -> bool:
    return isinstance(net, (Beit, VisionTransformer))


def is_deit(net: Backbone) -> bool:
    """Whether it is a ViT with relative positions that has no biases of queries and values."""
    return isinstance(net, Beit) and net.blocks[0].attn.q_bias is None  # type: ignore[union-attr]


def is_resnet(net: Backbone) -> bool:
    return isinstance(net, ResNet)


def is_convnext(net: Backbone) -> bool:
    return isinstance(net, ConvNeXt)


def pieces(net: Backbone) -> list[Piece]:
    """The encoder as functions to be applied in turn; a mask token at depth k enters the output of piece k.

    ResNet: [stem with pooling, layer1, layer2, layer3, layer4], maps (B, C, h, w): depth 3 is the input of layer4.
    ConvNeXt: [stem, stages 0, 1 and 2, each with the down-sampling after it, stage 3 and norm]: depth k is the input of
    stage k.
    ViT: [patches (B, N, D), class token and positions (B, 1 + N, D), block 0, block 1, ..., last block and norm].
    """
    if is_resnet(net):
        return [lambda x: net.maxpool(net.act1(net.bn1(net.conv1(x)))), net.layer1, net.layer2, net.layer3, net.layer4]
    if is_convnext(net):
        stages = list(net.stages)

        def through(x: Tensor, i: int) -> Tensor:
            x = stages[i].blocks(x)  # (B, C, h, w)
            return stages[i + 1].downsample(x) if i < 3 else net.head.norm(x)

        return [lambda x: stages[0].downsample(net.stem(x)), *(partial(through, i=i) for i in range(4))]

    def positions(x: Tensor) -> Tensor:
        x = torch.cat([net.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, D)
        return net.pos_drop(x + net.pos_embed)

    *blocks, last = net.blocks
    return [net.patch_embed, positions, *blocks, lambda x: net.norm(last(x))]


def insertion_stride(backbone: str, mask_layer: int, patch_size: int = 16) -> int:
    """Pixels per feature, along one side, at depth `mask_layer` (see `pieces`) of a backbone of `BACKBONES`.

    Raises:
        ValueError: there is no such depth.
    """
    family = getattr(BACKBONES[backbone], "func", None)
    if family in (resnet, convnext) and not 0 <= mask_layer <= 3:
        raise ValueError(f"mask_layer {mask_layer}: expected 0 to 3")
    if family is resnet:
        return 4 * 2 ** max(mask_layer - 1, 0)
    return 4 * 2**mask_layer if family is convnext else patch_size


def insertion_channels(net: Backbone, mask_layer: int) -> int:
    """Channels of the features at depth `mask_layer` (see `pieces`); raises ValueError if there is none."""
    last = len(net.blocks) - 1 if is_vit(net) else 3
    if not 0 <= mask_layer <= last:
        raise ValueError(f"mask_layer {mask_layer}: expected 0 to {last}")
    return net.embed_dim if is_vit(net) else net.feature_info[mask_layer]["num_chs"]


# ---- initial weights


@torch.no_grad()
def init_from_scratch(net: Backbone) -> None:
    """Initial weights of PyTorch's own layers, for classifiers; tokens and positions are zero (as upstream)."""
    for module in net.modules():
        if hasattr(module, "reset_parameters") and module is not net:
            module.reset_parameters()
    if is_vit(net):
        for token in (net.cls_token, net.pos_embed):
            nn.init.zeros_(token)


@torch.no_grad()
def init_pretraining(net: Backbone) -> None:
    """Weights with which pre-training starts (the values that remain after upstream's double initialisation)."""
    init_from_scratch(net)
    for name, module in net.named_modules():
        if is_resnet(net):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (BasicBlock, Bottleneck)):
                module.zero_init_last()
        elif isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and not name.startswith("patch_embed")):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if is_vit(net):
        for token in (net.cls_token, net.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
