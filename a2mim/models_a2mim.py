"""A2MIM and SimMIM: an encoder that meets a mask token at one depth, a linear decoder, a loss; and the classifier.

A2MIM (arXiv 2205.13943), Fig. 3, from left to right: masked pixels take the image's mean colour (before the network,
`engine_pretrain.reconstruct`); a learnable mask token is added to the masked features at one depth
(`MaskedImageModel._insert`); one linear layer predicts all pixels (`MaskedImageModel.forward`); pixels and spectra are
compared (`losses.MIMLoss`). The table in `MaskedImageModel` says what SimMIM does instead.

The gate gamma comes from the authors' recipes named "init", not from the figure. No released recipe uses the other
options: tokens that are frozen or means, `mask_detach`, `residual` and a `kernel_size` above 1.

B batch, C channels, D width, H W pixels, h w grid of features, N patch tokens, K classes, s stride of the encoder.
"""

import sys
from pathlib import Path
from typing import Any

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2mim.backbones import (
    BACKBONES,
    Backbone,
    init_from_scratch,
    init_pretraining,
    insertion_channels,
    is_convnext,
    is_vit,
    pieces,
)
from a2mim.losses import MIMLoss

MASK_TOKENS = ("learnable", "zero", "randn", "mean", "instance_mean", "none")


class MaskedImageModel(nn.Module):
    """Masked image modelling with any backbone (A2MIM, arXiv 2205.13943, Fig. 3).

    SimMIM is the same class with other settings, here those of the authors' recipes (flags of main_pretrain.py):

    |                                | SimMIM                          | A2MIM                                      |
    |--------------------------------|---------------------------------|--------------------------------------------|
    | masked pixels (--mask_color)   | stay as they are: zero          | take the image's mean colour: mean         |
    | mask token (--mask_replace)    | replaces the features: true     | is added to them: false                    |
    |                                | (ConvNeXt, too, adds it: false) |                                            |
    | its depth (--mask_layer)       | 0                               | ViT 0; CNN 3, the input of the last stage  |
    | gate gamma (--mask_init)       | none: 0                         | CNN recipes named "init": starts at 1e-6   |
    | loss of pixels (--loss)        | L1                              | ViT L1; CNN focal L1                       |
    | loss of spectra (--fft_weight) | none: 0                         | ViT 0.1; ResNet-50 0.5, -101 0.1; others 0 |

    Args:
        encoder: a backbone without classes.
        loss: compares the prediction with the target; its channels are those of the images.
        mask_layer: depth at which masked positions get the mask token, an index into `backbones.pieces`: 0 to 3 are the
            outputs of [stem, layer1, layer2, layer3] of a ResNet.
        mask_token: learnable, zero or randn (frozen), mean (of the batch), instance_mean (of each image), or none.
        mask_init: above 0, masked features are first scaled by a learnt gamma per channel that starts at this value;
            only where the token is added.
        mask_replace: put the token in the place of the features instead of adding it.
        mask_detach: stop the gradient into the layers below at masked positions.
        residual: add the mean colour of the target to the prediction.
        kernel_size: of the decoder, odd.
        method: a2mim or simmim. In this class it only says under which name checkpoints hold the decoder (OpenMixup's
            neck.decoder_pred or neck.decoder); --method of main_pretrain.py also chooses loss and target.
        channels_last: memory layout of a CNN, the faster one on GPUs.
    Raises:
        ValueError: an unknown token, or no such depth.
    """

    def __init__(
        self,
        encoder: Backbone,
        loss: MIMLoss,
        mask_layer: int = 0,
        mask_token: str | None = "learnable",
        mask_init: float = 0.0,
        mask_replace: bool = False,
        mask_detach: bool = False,
        residual: bool = False,
        kernel_size: int = 1,
        method: str = "a2mim",
        channels_last: bool = False,
    ):
        super().__init__()
        mask_token = mask_token or "none"
        if mask_token not in MASK_TOKENS:
            raise ValueError(f"mask_token {mask_token}: expected one of {', '.join(MASK_TOKENS)}")
        self.encoder, self.loss, self.method = encoder, loss, method
        self.mask_layer, self.mask_mode = mask_layer, mask_token
        self.mask_replace, self.mask_detach, self.residual = mask_replace, mask_detach, residual
        self.channels_last = channels_last and not is_vit(encoder)
        channels = insertion_channels(encoder, mask_layer)
        shape = (1, 1, channels) if is_vit(encoder) else (1, channels, 1, 1)
        self.mask_token = self.mask_gamma = None
        if mask_token not in ("none", "instance_mean"):
            self.mask_token = nn.Parameter(torch.zeros(shape), requires_grad=mask_token == "learnable")
        if mask_init > 0 and not mask_replace and mask_token != "none":
            self.mask_gamma = nn.Parameter(torch.full(shape[2:] if is_vit(encoder) else shape, mask_init))
        self.stride = encoder.patch_embed.patch_size[0] if is_vit(encoder) else 32
        self.decoder = nn.Conv2d(
            encoder.num_features, loss.channels * self.stride**2, kernel_size, padding=kernel_size // 2
        )
        self._init_weights()

    def _init_weights(self) -> None:
        init_pretraining(self.encoder)
        nn.init.trunc_normal_(self.decoder.weight, std=0.02)
        assert self.decoder.bias is not None
        nn.init.zeros_(self.decoder.bias)
        if self.mask_token is not None and self.mask_mode == "randn":
            nn.init.normal_(self.mask_token)
        elif self.mask_mode == "learnable" and not is_convnext(self.encoder):  # as upstream: ConvNeXt's is zero
            assert self.mask_token is not None
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def _insert(self, x: Tensor, mask: Tensor) -> Tensor:
        """Give masked features the mask token.

        Added: x (1 - m) + gamma x m + token m, gamma being 1 if there is none. In their place: x (1 - m) + token m.
        Args:
            x: (B, C, h, w) of a CNN, or (B, N, D), patch tokens of a ViT. mask m: (B, h, w), 1 = masked.
        """
        tokens = x.ndim == 3
        if (mask[0].numel() != x.shape[1]) if tokens else (mask.shape[1:] != x.shape[2:]):
            raise ValueError(f"a mask of {tuple(mask.shape[1:])} cells does not fit features {tuple(x.shape)}")
        mask = (mask.flatten(1)[..., None] if tokens else mask[:, None]).to(x.dtype)  # (B, N, 1) or (B, 1, h, w)
        if self.mask_mode == "none":
            return x
        token = self._token(x)  # (1, 1, D) or (1, C, 1, 1), of instance_mean B instead of the first 1
        if self.mask_replace:
            return x * (1 - mask) + token * mask
        if self.mask_detach:  # an option: what stands at masked positions does not train the layers below
            x = x * (1 - mask) + x.detach() * mask
        if self.mask_gamma is not None:
            x = x * (1 - mask) + (x * mask) * self.mask_gamma
        return x + token * mask

    def _token(self, x: Tensor) -> Tensor:
        """The mask token; the two kinds of means are made of the features x."""
        positions = (1,) if x.ndim == 3 else (2, 3)
        if self.mask_mode == "instance_mean":
            return x.mean(dim=positions, keepdim=True)
        assert self.mask_token is not None
        if self.mask_mode == "mean":
            self.mask_token.data = x.detach().mean(dim=(0, *positions), keepdim=True).to(self.mask_token.dtype)
        return self.mask_token

    def encode(self, img: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images whose features get the mask token at depth `mask_layer`.

        Args:
            img: (B, 3, H, W). mask: (B, h', w') on the grid of the features at that depth, 1 = masked.
        Returns:
            latent: (B, C, h, w). mask_out: the features just after the insertion.
        Raises:
            ValueError: the mask is on another grid.
        """
        x, mask_out = img, img
        for depth, piece in enumerate(pieces(self.encoder)):
            x = piece(x)  # (B, C, h', w') or (B, N, D), from depth 1 on (B, 1 + N, D)
            if depth == self.mask_layer:
                if is_vit(self.encoder) and depth > 0:  # the class token is never masked
                    x = torch.cat([x[:, :1], self._insert(x[:, 1:], mask)], dim=1)
                else:
                    x = self._insert(x, mask)
                mask_out = x
        if is_vit(self.encoder):
            grid = self.encoder.patch_embed.grid_size
            x = x[:, 1:].transpose(1, 2).unflatten(2, grid)  # (B, D, h, w), without the class token
        return x, mask_out

    def forward(self, img: Tensor, mask: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        """Reconstruct masked pixels.

        Args:
            img: (B, 3, H, W), normalised. mask: (B, h', w') on the grid at `mask_layer`, 1 = masked.
            target: (B, 3, H, W), the images to reconstruct; default: img.
        Returns:
            loss, loss_spatial, loss_freq: (). pred: (B, 3, H, W). latent: (B, C, h, w). mask_out: see `encode`.
        """
        target = img if target is None else target
        if self.channels_last:
            img = img.contiguous(memory_format=torch.channels_last)
        latent, mask_out = self.encode(img, mask)  # (B, C, h, w)
        pred = F.pixel_shuffle(self.decoder(latent), self.stride)  # (B, 3 s s, h, w) -> (B, 3, H, W)
        if self.residual:
            pred = pred + target.mean(dim=(2, 3), keepdim=True)
        return {**self.loss(target, pred, mask), "pred": pred, "latent": latent, "mask_out": mask_out}


class Classifier(nn.Module):
    """A backbone with classes, for fine-tuning and probing.

    Args:
        net: a network of timm. fp32_encoder: compute in float32 under autocast, too (as upstream).
        channels_last: as in `MaskedImageModel`.
    """

    def __init__(self, net: Backbone, fp32_encoder: bool = False, channels_last: bool = False):
        super().__init__()
        self.net, self.fp32_encoder = net, fp32_encoder
        self.channels_last = channels_last and not is_vit(net)
        init_from_scratch(net)

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C), the input of the last layer."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        autocast = torch.is_autocast_enabled(x.device.type) and not self.fp32_encoder
        with torch.autocast(x.device.type, enabled=autocast):
            return self.head(self.features(x))

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return self.net.get_classifier()


def build_masked(backbone: str, loss: MIMLoss, img_size: int = 224, drop_path: float = 0.0, **keywords) -> Any:
    """A pre-training network; keywords of `MaskedImageModel`, and patch_size of a ViT.

    Raises:
        ValueError: an unknown backbone, or values that do not fit together.
    """
    arch = {k: keywords.pop(k) for k in ("patch_size",) if k in keywords}
    arch["in_chans"] = loss.channels
    net = build_backbone(backbone, img_size=img_size, num_classes=0, drop_path_rate=drop_path, **arch)
    model = MaskedImageModel(net, loss, **keywords)
    if img_size % model.stride:
        raise ValueError(f"image size {img_size} is not a multiple of the encoder's {model.stride} pixels")
    return model


def build_classifier(
    backbone: str,
    num_classes: int,
    img_size: int = 224,
    drop_path: float = 0.0,
    fp32_encoder: bool = False,
    channels_last: bool = False,
    **arch,
) -> Classifier:
    """A classifier; arch: keywords of the backbone, such as patch_size and global_pool of a ViT.

    Raises:
        ValueError: an unknown backbone, or values that do not fit together.
    """
    net = build_backbone(backbone, img_size=img_size, num_classes=num_classes, drop_path_rate=drop_path, **arch)
    return Classifier(net, fp32_encoder, channels_last)


def build_backbone(name: str, **keywords) -> Backbone:
    """A network of `BACKBONES`; raises ValueError for an unknown name."""
    if name not in BACKBONES:
        raise ValueError(f"backbone {name}: expected one of {', '.join(BACKBONES)}")
    size, patch = keywords.get("img_size", 224), keywords.get("patch_size", 1)
    if size % patch:
        raise ValueError(f"image size {size} is not a multiple of the patch size {patch}")
    return BACKBONES[name](**keywords)


# ---- upstream's nested configurations


def _official_backbone(options: dict[str, Any], block_counts: Any, num_classes: int) -> Backbone:
    kind, arch = options["type"], options.get("arch", "base")
    keywords: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": options.get("drop_path_rate", 0.0)}
    if kind in ("MIMResNet", "ResNet"):
        keywords |= {"base_channels": options.get("base_channels", 64), "block_counts": block_counts}
        return BACKBONES[f"resnet{options['depth']}"](**keywords)
    if "ConvNeXt" in kind:
        if isinstance(arch, dict):
            keywords |= {"depths": tuple(arch["depths"]), "dims": tuple(arch["channels"])}
            arch = "tiny"
        return BACKBONES[f"convnext_{arch}"](**keywords)
    if kind not in ("SimMIMViT", "MIMVisionTransformer", "VisionTransformer"):
        raise ValueError(f"backbone {kind}: expected a ViT, ResNet or ConvNeXt of OpenMixup")
    keywords |= {"img_size": options.get("img_size", 224), "patch_size": options.get("patch_size", 16)}
    if isinstance(arch, dict):
        ratio = arch["feedforward_channels"] / arch["embed_dims"]
        keywords |= {"embed_dim": arch["embed_dims"], "depth": arch["num_layers"], "mlp_ratio": ratio}
        keywords |= {"num_heads": arch["num_heads"]}
        arch = "base"
    if kind == "VisionTransformer":
        return BACKBONES["deit_small"](**keywords, init_values=options.get("init_values"))
    if not options.get("use_window"):
        return BACKBONES[f"mae_vit_{arch}"](**keywords)
    return BACKBONES[f"vit_{arch}"](**keywords, init_values=options.get("init_values"))


def build_from_openmixup(constructor: dict[str, Any], block_counts: Any = None) -> MaskedImageModel | Classifier:
    """The network of an OpenMixup configuration's `model`.

    Args:
        constructor: nested dict with type A2MIM, SimMIM, MixUpClassification or Classification.
        block_counts: blocks per stage of a ResNet, if not those of its depth.
    Raises:
        ValueError: a part is unknown.
    """
    kind, backbone, head = (constructor[key] for key in ("type", "backbone", "head"))
    if kind in ("MixUpClassification", "Classification"):
        return Classifier(_official_backbone(backbone, block_counts, head["num_classes"]))
    if kind not in ("A2MIM", "SimMIM"):
        raise ValueError(f"model {kind}: expected A2MIM, SimMIM, MixUpClassification or Classification")
    net = _official_backbone(backbone, block_counts, 0)
    return MaskedImageModel(
        net,
        MIMLoss(**head),
        mask_layer=backbone.get("mask_layer", 0),
        mask_token=backbone.get("mask_token", "learnable"),
        mask_init=backbone.get("mask_init", 0.0),
        mask_replace="ConvNeXt" not in backbone["type"] and backbone.get("replace", True),  # as upstream
        mask_detach=backbone.get("detach", False),
        residual=constructor.get("residual", False),
        kernel_size=constructor["neck"].get("kernel_size", 1),
        method=kind.lower(),
    )
