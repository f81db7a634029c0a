"""The ViT as the backbone of detection and of semantic segmentation: maps of patches from several depths.

B batch, N patches, D width, p patch side, H W pixels, G_h x G_w patches.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.distributed import UserError, log
from udi.backbone import ALIASES, mmseg_name, plain_name, vit_weights
from udi.models_udi import MODELS, VisionTransformer

# Blocks, counted from 0, whose outputs are taken. 12: the authors' configurations; others: ours, evenly spaced.
DETECTION_TAPS = {4: (0, 1, 2, 3), 12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}
SEGMENTATION_TAPS = {4: (0, 1, 2, 3), 12: (2, 5, 8, 11), 24: (5, 11, 17, 23)}


def keep_patches(model: VisionTransformer, out_indices: Sequence[int]) -> None:
    """Remove the final norm of a ViT without class tokens, and the empty parameter that stands for these.

    Args:
        out_indices: blocks whose outputs will be asked for, counted from 0.
    Raises:
        ValueError: there is no such block.
    """
    if not set(out_indices) <= set(range(len(model.blocks))):
        raise ValueError(f"blocks {tuple(out_indices)}: expected numbers from 0 to {len(model.blocks) - 1}")
    del model.cls_token, model.norm


def block_outputs(
    model: VisionTransformer, x: Tensor, grid: tuple[int, int], out_indices: Sequence[int]
) -> list[Tensor]:
    """Tokens (B, N, D) of G_h x G_w patches -> the outputs of some blocks, each (B, D, G_h, G_w)."""
    outputs = []
    for block in model.blocks:
        x = block(x)
        outputs.append(x)
    return [outputs[i].transpose(1, 2).unflatten(2, grid) for i in out_indices]


class ViTDeiT(VisionTransformer):
    """Backbone of Mask R-CNN: four maps, made into a pyramid of strides 4, 8, 16 and 32.

    Args:
        img_size: of the stored positions, in pixels; every other input interpolates them.
    Raises:
        ValueError: the patch size is neither 8 nor 16, or there are not four maps.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.05,
        out_indices: Sequence[int] = DETECTION_TAPS[12],
        in_chans: int = 3,
    ):
        sizes: dict[str, Any] = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth}
        sizes |= {"num_heads": num_heads, "qkv_bias": qkv_bias, "drop_path_rate": drop_path_rate}
        sizes["in_chans"] = in_chans
        super().__init__([img_size], num_class_token=0, **sizes)
        keep_patches(self, out_indices)
        self.out_indices = tuple(out_indices)
        if patch_size not in (8, 16) or len(out_indices) != 4:
            raise ValueError(
                f"{len(out_indices)} maps of patches of {patch_size} pixels: expected 4 maps, 8 or 16 pixels"
            )

        def twice() -> nn.Module:
            return nn.ConvTranspose2d(embed_dim, embed_dim, 2, stride=2)

        if patch_size == 16:
            self.fpn1 = nn.Sequential(twice(), nn.BatchNorm2d(embed_dim), nn.GELU(), twice())
            self.fpn2, self.fpn3, self.fpn4 = nn.Sequential(twice()), nn.Identity(), nn.MaxPool2d(2)
        else:
            self.fpn1, self.fpn2 = nn.Sequential(twice()), nn.Identity()
            self.fpn3, self.fpn4 = nn.MaxPool2d(2), nn.MaxPool2d(4)

    def positions(self, height: int, width: int) -> Tensor:
        """Positions (1, N, D); the stored ones for square images of their size, else interpolated ones."""
        rows, columns = height // self.patch_size, width // self.patch_size
        if height != width and rows == columns:  # as upstream: sides of the image, not of the grid, are compared
            return self.interpolated(rows, columns)
        return super().positions(height, width)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> four maps (B, D, H / s, W / s) of strides s = 4, 8, 16, 32."""
        grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        tokens = self.patch_embed(x) + self.positions(*x.shape[-2:])
        levels = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        found = block_outputs(self, tokens, grid, self.out_indices)
        return [level(x) for level, x in zip(levels, found, strict=True)]


class SegmentationViT(VisionTransformer):
    """Backbone of Semantic FPN: four maps of stride p, under the names of mmsegmentation's ViT in state dicts.

    Args:
        img_size: of the stored positions, the training crops' side in pixels.
    """

    def __init__(
        self,
        img_size: int = 512,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        drop_path_rate: float = 0.1,
        out_indices: Sequence[int] = SEGMENTATION_TAPS[12],
        in_chans: int = 3,
    ):
        sizes: dict[str, Any] = {"patch_size": patch_size, "embed_dim": embed_dim, "depth": depth}
        sizes |= {"num_heads": num_heads, "drop_path_rate": drop_path_rate, "in_chans": in_chans}
        super().__init__([img_size], num_class_token=0, **sizes)
        keep_patches(self, out_indices)
        self.out_indices = tuple(out_indices)
        self.register_state_dict_post_hook(_name_as_mmseg)
        self.register_load_state_dict_pre_hook(_name_plainly)

    def positions(self, height: int, width: int) -> Tensor:
        """Positions (1, N, D) of an image whose last patches may be incomplete."""
        rows, columns = math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)
        # As upstream: a grid of another shape with as many patches is taken for the stored one.
        return self.pos_embed if rows * columns == self.pos_embed.shape[1] else resize(self.pos_embed, (rows, columns))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> maps (B, D, ceil(H / p), ceil(W / p)); what lacks to whole patches is 0."""
        height, width, p = *x.shape[-2:], self.patch_size
        tokens = self.patch_embed(F.pad(x, (0, -width % p, 0, -height % p))) + self.positions(height, width)
        return block_outputs(self, tokens, (math.ceil(height / p), math.ceil(width / p)), self.out_indices)


def _name_as_mmseg(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict) -> None:
    """Rename a backbone's weights in a state dict that is being made."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + mmseg_name(key.removeprefix(prefix))] = state.pop(key)


def _name_plainly(_module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Rename a backbone's weights in a state dict that is being loaded; our own names may stand in it, too."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + plain_name(key.removeprefix(prefix))] = state.pop(key)


def resize(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Positions (1, N, D) of a square grid for another grid, bicubic: (1, G_h G_w, D)."""
    side = math.isqrt(pos_embed.shape[1])
    table = pos_embed.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(table, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


# ---- weights


def load_patches(checkpoint: str, checkpoint_key: str = "teacher") -> dict[str, Tensor]:
    """The weights of a checkpoint's ViT, under plain names, without class tokens, their positions and the final norm.

    Args:
        checkpoint: a file or https address of our or the authors' pre-training, extraction, conversion (vit2mmseg.py),
            fine-tuning, segmentation or detection.
        checkpoint_key: which weights of a pre-training file: teacher or student.
    Raises:
        UserError: the file cannot be read or holds no ViT.
    """
    state = distributed.load(checkpoint)
    weights = vit_weights(state, checkpoint_key, checkpoint, ("pos_embed", "patch_embed.", "blocks."))
    tokens = weights["cls_token"].shape[1] if "cls_token" in weights else 0
    weights = {name: value for name, value in weights.items() if name != "cls_token" and not name.startswith("norm.")}
    weights["pos_embed"] = weights["pos_embed"][:, tokens:]
    if math.isqrt(weights["pos_embed"].shape[1]) ** 2 != weights["pos_embed"].shape[1]:
        raise UserError(f"{checkpoint}: {weights['pos_embed'].shape[1]} positions of patches are no square")
    return weights


def _build(
    network: type[ViTDeiT] | type[SegmentationViT],
    taps: dict[int, tuple[int, ...]],
    arch: str,
    patch_size: int,
    img_size: int,
    weights: dict[str, Tensor] | None,
    **kwargs,
) -> Any:
    """A backbone of a named size, with pre-trained weights if given; kwargs: drop_path_rate and in_chans."""
    arch = ALIASES.get(arch, arch)
    if arch not in MODELS:
        raise UserError(f"--arch {arch}: expected one of {', '.join([*MODELS, *ALIASES])}")
    sizes = MODELS[arch].keywords
    with distributed.user_errors(f"--arch {arch}"):
        model = network(img_size, patch_size, out_indices=taps[sizes["depth"]], **sizes, **kwargs)
        if weights is not None:
            weights = distributed.adapt_channels(weights, dict(model.named_parameters()))
            found = model.load_state_dict(weights, strict=False)
            lost = [name for name in found.missing_keys if not name.startswith("fpn")] + found.unexpected_keys
            if lost:
                raise ValueError(f"the checkpoint is of another ViT: {len(lost)} names differ, first {lost[0]}")
            log(f"backbone: {distributed.load_report(len(weights), found.missing_keys, [])}")
    return model


def build_detection_backbone(
    arch: str = "vit_small",
    patch_size: int = 16,
    weights: dict[str, Tensor] | None = None,
    img_size: int = 224,
    drop_path_rate: float = 0.05,
    in_chans: int = 3,
) -> ViTDeiT:
    """The backbone of Mask R-CNN; positions and patch size are those of the weights (`load_patches`), if given.

    Raises:
        UserError: the size is unknown, or the weights are of another ViT.
    """
    if weights is not None:
        patch_size = _patch_size(weights, patch_size)
        img_size = patch_size * math.isqrt(weights["pos_embed"].shape[1])
    kwargs = {"drop_path_rate": drop_path_rate, "in_chans": in_chans}
    return _build(ViTDeiT, DETECTION_TAPS, arch, patch_size, img_size, weights, **kwargs)


def build_segmentation_backbone(
    arch: str = "vit_small",
    patch_size: int = 16,
    weights: dict[str, Tensor] | None = None,
    img_size: int = 512,
    drop_path_rate: float = 0.1,
    in_chans: int = 3,
) -> SegmentationViT:
    """The backbone of Semantic FPN; positions of the weights (`load_patches`), if given, are resized to the crops.

    Args:
        img_size: the crops' side in pixels.
    Raises:
        UserError: the size is unknown, or the weights are of another ViT.
    """
    if weights is not None:
        patch_size = _patch_size(weights, patch_size)
        side = img_size // patch_size
        weights = weights | {"pos_embed": resize(weights["pos_embed"], (side, side))}
    kwargs = {"drop_path_rate": drop_path_rate, "in_chans": in_chans}
    return _build(SegmentationViT, SEGMENTATION_TAPS, arch, patch_size, img_size, weights, **kwargs)


def _patch_size(weights: dict[str, Tensor], patch_size: int) -> int:
    found = weights["patch_embed.proj.weight"].shape[-1]
    if found != patch_size:
        log(f"--patch_size {patch_size}: the checkpoint has patches of {found} pixels, which are taken")
    return found
