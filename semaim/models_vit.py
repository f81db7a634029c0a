"""Vision Transformer for fine-tuning, probing and k-NN with SemAIM's encoder.

Legend: N batch, L patches, T = L + 1 tokens, D width, H heads, K classes.
"""

import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from semaim.blocks import Block, LayerNorm, PatchEmbed


class VisionTransformer(nn.Module):
    """ViT with full attention; its blocks are those of the pre-training encoder.

    Args:
        global_pool: classify the mean of the patch tokens (after `fc_norm`) instead of the class token (after `norm`).
        num_classes: K; 0 leaves features.
    """

    norm: nn.Module
    fc_norm: nn.Module

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        global_pool: bool = False,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.global_pool = global_pool
        # Registration order is upstream's: optimizer states refer to parameters by position.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate, norm_layer) for rate in rates)
        if not global_pool:
            self.norm = norm_layer(embed_dim)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        if global_pool:
            self.fc_norm = norm_layer(embed_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters exempt from weight decay besides the 1-D ones."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, imgs: Tensor) -> Tensor:
        """(N, 3, H, W) -> features (N, D), the input of the head."""
        cls = self.cls_token.expand(len(imgs), -1, -1)
        x = torch.cat([cls, self.patch_embed(imgs)], dim=1) + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x)
        # Only the rows that are read leave the last block; keys and values come from all.
        x = self.blocks[-1](x, rows=slice(1, None) if self.global_pool else slice(0, 1))
        return self.fc_norm(x.mean(dim=1)) if self.global_pool else self.norm(x)[:, 0]

    def forward(self, imgs: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, K)."""
        return self.head(self.forward_features(imgs))


# same as saim/models_vit.py
def interpolate_pos_embed(pos_embed: Tensor, grid_size: int) -> Tensor:
    """Resize the patch part of a position table (1, 1+G², D) to grid_size² cells, bicubic; the class row is kept."""
    old = round((pos_embed.shape[1] - 1) ** 0.5)
    if old == grid_size:
        return pos_embed
    patches = pos_embed[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


# same as saim/models_vit.py
def load_pretrained(model: VisionTransformer, state: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Load an encoder from the state dict of a pre-training or fine-tuning checkpoint, name by name.

    A head of another shape is dropped, the position table resized, and weights of three channels adapted to others. In
    pool mode `norm` is left unused; in class-token mode it comes from the decoder's norm, the only one that
    pre-training has (as upstream).
    Returns:
        the missing keys (head, and fc_norm in pool mode) and the unexpected ones (decoder, prediction head, ...).
    Raises:
        ValueError: encoder weights are missing or have other shapes.
    """
    state, own = dict(state), model.state_dict()
    for key in ("head.weight", "head.bias"):
        if key in state and (key not in own or state[key].shape != own[key].shape):
            del state[key]
    if "pos_embed" in state:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], model.patch_embed.grid_size)
    state = distributed.adapt_channels(state, own)
    missing = [key for key in own if key not in state]
    lacking = [key for key in missing if not key.startswith(("head.", "fc_norm."))]
    if lacking:
        raise ValueError(f"{len(lacking)} encoder weights are missing, first {lacking[0]}")
    for key in own:
        if key in state and own[key].shape != state[key].shape:
            raise ValueError(f"{key} is {tuple(state[key].shape)}, the model expects {tuple(own[key].shape)}")
    more = [key for key in state if key.startswith("blocks.") and key not in own]
    deeper = [key for key in more if int(key.split(".")[1]) >= len(model.blocks)]
    if deeper:
        raise ValueError(f"the checkpoint has more blocks than the model's {len(model.blocks)}: {deeper[0]}")
    if more:
        raise ValueError(f"the model's blocks have no {more[0].split('.', 2)[2]}, as the checkpoint's have")
    result = model.load_state_dict(state, strict=False)
    return result.missing_keys, result.unexpected_keys


def load_encoder(model: VisionTransformer, path: str, head_std: float = 0.0, key: str = "") -> None:
    """Load an encoder from a checkpoint file as `load_pretrained` does, and say what matched.

    Args:
        head_std: the head is drawn anew from a normal of this width, cut at 2 (0 leaves it).
        key: the checkpoint's key of the weights; '' takes `state_dict`, else `model`.
    Raises:
        distributed.UserError: the file cannot be read or holds another architecture.
    """
    keys = (key,) if key else distributed.WEIGHT_KEYS
    found = distributed.weights_of(distributed.load(path), path, keys, bare=not key)
    state = distributed.fitted(found, model.state_dict())
    with distributed.user_errors(
        f"{path}{distributed.kind_of(found)}: check --model, --patch_size and --input_size, and --global_pool"
    ):
        missing, unexpected = load_pretrained(model, state)
    matched = len(model.state_dict()) - len(missing)
    distributed.log(f"encoder from {path}: {distributed.load_report(matched, missing, unexpected)}")
    if head_std and isinstance(model.head, nn.Linear):
        nn.init.trunc_normal_(model.head.weight, std=head_std)
        nn.init.zeros_(model.head.bias)


def vit_base_patch16(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


def vit_large_patch16(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, **kwargs})


def vit_huge_patch14(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16, **kwargs})


def vit_small_patch16(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, **kwargs})


def vit_tiny_patch16(**kwargs) -> VisionTransformer:  # ours: the encoder of aim_tiny
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, **kwargs})


def vit_nano_patch16(**kwargs) -> VisionTransformer:  # ours: the encoder of aim_nano
    return VisionTransformer(**{"patch_size": 16, "embed_dim": 96, "depth": 4, "num_heads": 3, **kwargs})


VITS = (vit_base_patch16, vit_large_patch16, vit_huge_patch14, vit_small_patch16, vit_tiny_patch16, vit_nano_patch16)
MODELS = {f.__name__: f for f in VITS}
MODELS["vit_small"] = vit_small_patch16  # main_knn.py's default, for which upstream has no constructor
