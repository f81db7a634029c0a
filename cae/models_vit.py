"""Vision Transformer for fine-tuning CAE's encoder and for linear and attentive probing, and how files become it.

Linear probing reads the class token of the frozen encoder; attentive probing reads what a learned query token gathers
from all of its tokens by cross-attention (`AttentiveBlock`, then `ProbeBatchNorm`).

Legend: B batch, N patches, T = N + 1 tokens, C width, h heads, G side of the patch grid, K classes.
"""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae.blocks import (
    Block,
    CrossAttention,
    LayerNorm,
    PatchEmbed,
    add_relative_positions,
    init_truncated,
    relative_position_bias,
    rescale_by_depth,
    sincos_pos_embed,
)
from common import distributed


class AttentiveBlock(nn.Module):
    """Attentive probe: cross-attention from a query token to all tokens of an image; no residual, no MLP."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, norm_layer: Callable[[int], nn.Module]):
        super().__init__()
        self.norm_q = norm_layer(dim)
        self.norm_k = norm_layer(dim)
        self.norm_v = norm_layer(dim)
        self.cross_attn = CrossAttention(dim, num_heads, qkv_bias)

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        """q (B, 1, C), kv (B, T, C) -> (B, 1, C)."""
        return self.cross_attn(self.norm_q(q), self.norm_k(kv), self.norm_v(kv))


class ProbeBatchNorm(nn.BatchNorm1d):
    """Batch norm of the attentive probe: no parameters; its caller, not the module's mode, chooses the statistics."""

    def __init__(self, dim: int):
        super().__init__(dim, affine=False)

    def forward(self, input: Tensor, is_train: bool = True) -> Tensor:
        """(B, C) -> (B, C).

        Args:
            is_train: use the batch's statistics and move the running ones by them; False: use the running ones. A
                batch of one image has no statistics and always takes the running ones.
        """
        is_train = is_train and len(input) > 1
        if is_train:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, None, None, is_train, self.momentum or 0.0, self.eps
        )


class RelativePositionBias(nn.Module):
    """Relative position bias that all blocks share."""

    def __init__(self, window_size: tuple[int, int], num_heads: int):
        super().__init__()
        add_relative_positions(self, window_size, num_heads)

    def forward(self) -> Tensor:
        """(h, T, T)"""
        return relative_position_bias(self)


class VisionTransformer(nn.Module):
    """ViT classifier.

    Args:
        init_values: initial layer scale; 0 leaves it out.
        use_rel_pos_bias: a table of relative position biases in every block. use_shared_rel_pos_bias: one for all.
        use_mean_pooling: classify the mean of the patch tokens (after `fc_norm`), not the class token (after `norm`).
        sin_pos_emb: add fixed sin-cos positions. abs_pos_emb: add positions that a file brings, else random ones.
        init_scale: factor on the initial weight and bias of the head.
        lin_probe: classify frozen features: the class token after `norm`, or, with linear_type "attentive", what a
            query token gathers from all tokens, after a batch norm.
    Raises:
        ValueError: an argument does not fit.
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
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        init_values: float = 0.0,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = False,
        use_mean_pooling: bool = True,
        sin_pos_emb: bool = True,
        abs_pos_emb: bool = False,
        init_scale: float = 0.001,
        lin_probe: bool = False,
        linear_type: str = "standard",
    ):
        super().__init__()
        if linear_type not in ("standard", "attentive"):
            raise ValueError(f"linear_type is {linear_type!r}, expected standard or attentive")
        self.embed_dim = embed_dim
        self.use_mean_pooling = use_mean_pooling
        self.lin_probe = lin_probe
        self.attentive = lin_probe and linear_type == "attentive"
        # Registration order is upstream's: optimizer states refer to parameters by position.
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.grid = grid = (self.patch_embed.grid_size, self.patch_embed.grid_size)
        self.pos_embed = None
        if abs_pos_emb:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        elif sin_pos_emb:
            self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, grid), requires_grad=False)
        self.pos_drop = nn.Dropout(drop_rate)
        self.rel_pos_bias = RelativePositionBias(grid, num_heads) if use_shared_rel_pos_bias else None
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        window = grid if use_rel_pos_bias else None
        sizes = embed_dim, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate
        self.blocks = nn.ModuleList(Block(*sizes, rate, init_values, norm_layer, window) for rate in rates)
        if not use_mean_pooling:
            self.norm = norm_layer(embed_dim)
        if self.attentive:
            self.query_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.attentive_blocks = nn.ModuleList([AttentiveBlock(embed_dim, num_heads, qkv_bias, norm_layer)])
            self.fc_norm = ProbeBatchNorm(embed_dim)
        elif use_mean_pooling and not lin_probe:
            self.fc_norm = norm_layer(embed_dim)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._initialise(init_scale)
        self.register_load_state_dict_pre_hook(lambda _module, state, *_: rename_revision_a(state))

    def _initialise(self, init_scale: float) -> None:
        """Draw the weights, the head's times `init_scale`."""
        self.apply(init_truncated)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None and self.pos_embed.requires_grad:  # learned, not sin-cos
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rescale_by_depth([(b.attn.proj, b.mlp.fc2) for b in self.blocks])  # type: ignore[union-attr]
        if isinstance(self.head, nn.Linear):
            self.head.weight.data.mul_(init_scale)
            self.head.bias.data.mul_(init_scale)

    def no_weight_decay(self) -> set[str]:
        """Parameters exempt from weight decay besides the 1-D ones."""
        return {"pos_embed", "cls_token"}

    def tokens(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(B, 3, H, W) -> the given rows of the tokens (B, T, C) after the last block."""
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)  # (B, T, C)
        if self.pos_embed is not None:
            x = x + self.pos_embed.detach()  # (1, T, C); as upstream: learned positions stay as they are loaded, too
        x = self.pos_drop(x)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()  # (h, T, T)
        for block in self.blocks[:-1]:
            x = block(x, bias)  # (B, T, C)
        return self.blocks[-1](x, bias, rows)  # (B, rows, C)

    def forward_features(self, x: Tensor, is_train: bool = True) -> Tensor:
        """(B, 3, H, W) -> features (B, C), the input of the head. is_train: as in `ProbeBatchNorm`."""
        if self.attentive:
            tokens = self.tokens(x) if self.use_mean_pooling else self.norm(self.tokens(x))  # (B, T, C)
            q = self.attentive_blocks[0](self.query_token.expand(len(x), -1, -1), tokens)  # (B, 1, C)
            return self.fc_norm(q[:, 0], is_train)  # (B, C)
        # Only the rows that are read leave the last block; keys and values come from all.
        if self.use_mean_pooling and not self.lin_probe:
            return self.fc_norm(self.tokens(x, slice(1, None)).mean(dim=1))  # (B, N, C) -> (B, C)
        token = self.tokens(x, slice(0, 1))[:, 0]  # (B, C)
        return token if self.use_mean_pooling else self.norm(token)

    def forward(self, x: Tensor, is_train: bool = True) -> Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        return self.head(self.forward_features(x, is_train))


# ---- checkpoints

KEYS = ("model", "module", "state_dict")  # a file's first of these holds the weights


def _spline(knots: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Matrix (targets, knots) of not-a-knot cubic interpolation; targets beyond the knots take the outermost value."""
    from scipy.interpolate import make_interp_spline  # here, because importing it takes 0.4 s

    spline = make_interp_spline(knots, np.eye(len(knots)), k=3)
    return spline(targets.clip(knots[0], knots[-1]))


def resize_relative_positions(table: Tensor, grid_size: int) -> Tensor:
    """Resize a table of relative position biases ((2G-1)² + 3, h) to another grid; the last 3 rows are kept.

    Old distances are placed in geometric progression, dense in the middle, and interpolated by cubic splines. The
    bisection ends at its last midpoint (as upstream).
    """
    source, target = math.isqrt(len(table) - 3), 2 * grid_size - 1
    if source == target:
        return table
    low, high, q = 1.01, 1.5, 1.01
    while high - low > 1e-6:  # bisection for the ratio at which the old distances span the new grid
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (source // 2)) / (1 - q) > target // 2 else (q, high)
    distances = np.cumsum(q ** np.arange(source // 2))
    knots = np.concatenate([-distances[::-1], [0.0], distances])
    weights = _spline(knots, np.arange(target, dtype=np.float64) - target // 2)
    old = table[:-3].double().numpy().reshape(source, source, -1)  # (2G-1, 2G-1, h) of the old grid
    new = np.einsum("ai,bj,ijh->abh", weights, weights, old).reshape(target**2, -1)
    return torch.cat([torch.from_numpy(new).to(table.dtype), table[-3:]])


def interpolate_pos_embed(pos_embed: Tensor, grid: int | tuple[int, int]) -> Tensor:
    """Resize the patch part of a position table (1, 1+G², C) to another grid, bicubic; the class row is kept.

    Args:
        grid: the new grid's side, or its (rows, columns).
    Raises:
        ValueError: the table is neither that of a square grid nor that of the new one.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    count = pos_embed.shape[1] - 1
    old = math.isqrt(count)
    if (old, old) == (rows, columns) or old**2 != count == rows * columns:
        return pos_embed
    if old**2 != count:
        raise ValueError(f"pos_embed has {count} positions, expected those of a square grid")
    patches = pos_embed[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, C, G, G)
    patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def encoder_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights in a pre-training state dict of either revision, the backbone's in that of a dense task, or
    all of any other, without prefixes."""
    weights = {key.removeprefix("module."): value for key, value in state.items()}
    return distributed.part_of(distributed.part_of(weights, "encoder."), "backbone.")


def rename_revision_a(state: dict[str, Tensor], *_) -> None:
    """Give the attentive probe of the authors' earlier revision its names of today, in place."""
    for key in [key for key in state if key.startswith("attentive_blocks.")]:
        value = state.pop(key)
        if ".norm2_cross." not in key:
            state[re.sub(r"\.norm1_([qkv])\.", r".norm_\1.", key)] = value


def load_pretrained(
    model: VisionTransformer, state: dict[str, Tensor], resize_positions: bool = False, keep_norm: bool = True
) -> tuple[list[str], list[str]]:
    """Load an encoder from the state dict of a pre-training, fine-tuning or probing checkpoint, name by name.

    Relative position biases of another grid are resized, weights of three channels adapted to others, and a head of
    another shape is dropped. The encoder's final norm becomes `fc_norm` where the model pools, and `norm` where it
    classifies the class token.
    Args:
        resize_positions: resize positions of another grid, bicubic (linear probing, and learned positions in any case);
            else the model's own stay.
        keep_norm: False leaves `norm` of a model for fine-tuning by the class token as it is, as upstream.
    Returns:
        the missing keys and the unexpected ones.
    Raises:
        ValueError: encoder weights are missing or have other shapes.
    """
    state, own = encoder_weights(state), model.state_dict()
    rename_revision_a(state)
    if model.lin_probe and "norm.weight" in own and "norm.weight" not in state and "fc_norm.weight" in state:
        # of a fine-tuned model that pools
        state |= {key: state.pop(f"fc_{key}") for key in ("norm.weight", "norm.bias")}
    if "fc_norm.weight" in own and "norm.weight" in state:
        state |= {f"fc_{key}": state.pop(key) for key in ("norm.weight", "norm.bias")}
    elif not keep_norm and not model.lin_probe:
        state = {key: value for key, value in state.items() if not key.startswith("norm.")}
    if "rel_pos_bias.relative_position_bias_table" in state and model.rel_pos_bias is None:
        shared = state.pop("rel_pos_bias.relative_position_bias_table")
        state |= {f"blocks.{i}.attn.relative_position_bias_table": shared for i in range(len(model.blocks))}
    for key in list(state):
        if key.endswith("relative_position_index") or (
            key.startswith("head.") and (key not in own or state[key].shape != own[key].shape)
        ):
            del state[key]
        elif key.endswith("relative_position_bias_table") and key in own:
            state[key] = resize_relative_positions(state[key], model.grid[0])
    if "pos_embed" in state and "pos_embed" in own:
        if resize_positions or (model.pos_embed is not None and model.pos_embed.requires_grad):
            state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], model.grid)
        elif state["pos_embed"].shape != own["pos_embed"].shape:
            del state["pos_embed"]
    state = distributed.adapt_channels(state, own)
    missing = [key for key in own if key not in state]
    lacking = [key for key in missing if key.startswith(("cls_token", "patch_embed.", "blocks."))]
    lacking = [key for key in lacking if "relative_position" not in key]
    if lacking:
        plain = all(".gamma_" in key for key in lacking)
        way = "; --layer_scale_init_value 0 makes a network without them" if plain else ""
        raise ValueError(f"{len(lacking)} encoder weights are missing, first {lacking[0]}{way}")
    for key in own:
        if key in state and own[key].shape != state[key].shape:
            raise ValueError(f"{key} is {tuple(state[key].shape)}, the model expects {tuple(own[key].shape)}")
    more = [key for key in state if key.startswith("blocks.") and key not in own and "relative_position" not in key]
    deeper = [key for key in more if int(key.split(".")[1]) >= len(model.blocks)]
    if deeper:
        raise ValueError(f"the checkpoint has more blocks than the model's {len(model.blocks)}: {deeper[0]}")
    if more:
        raise ValueError(f"the model's blocks have no {more[0].split('.', 2)[2]}, as the checkpoint's have")
    result = model.load_state_dict(state, strict=False)
    return result.missing_keys, result.unexpected_keys


def named_weights(
    state: dict[str, Any], path: str, keys: tuple[str, ...] = KEYS, prefix: str = ""
) -> dict[str, Tensor]:
    """The weights in a checkpoint read from path whose names begin with prefix, without it.

    Args:
        keys: the first of these keys that the file has holds the weights, else the file itself does.
    Raises:
        distributed.UserError: neither holds weights.
    """
    weights = distributed.weights_of(state, path, keys, bare=True)
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def load_encoder(
    model: VisionTransformer,
    path: str,
    head_std: float = 0.0,
    keys: tuple[str, ...] = KEYS,
    prefix: str = "",
    **kwargs,
) -> None:
    """Load an encoder from a checkpoint file as `load_pretrained` does, and say what matched.

    Args:
        head_std: the head is drawn anew from a normal of this width, cut at 2 (0 leaves it).
        keys, prefix: as in `named_weights`. kwargs: as in `load_pretrained`.
    Raises:
        distributed.UserError: the file cannot be read or holds another architecture.
    """
    found = named_weights(distributed.load(path), path, keys, prefix)
    weights = distributed.fitted(encoder_weights(found), model.state_dict())
    with distributed.user_errors(f"{path}{distributed.kind_of(found)}: check --model, --input_size and --patch_size"):
        missing, unexpected = load_pretrained(model, weights, **kwargs)
    matched = len(model.state_dict()) - len(missing)
    distributed.log(f"encoder from {path}: {distributed.load_report(matched, missing, unexpected)}")
    if head_std and isinstance(model.head, nn.Linear):
        nn.init.trunc_normal_(model.head.weight, std=head_std)
        nn.init.zeros_(model.head.bias)


def cae_tiny_patch16_224(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"embed_dim": 192, "depth": 12, "num_heads": 12, **kwargs})


def cae_small_patch16_224(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"embed_dim": 384, "depth": 12, "num_heads": 12, **kwargs})


def cae_base_patch16_224(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


def cae_base_patch16_384(**kwargs) -> VisionTransformer:
    return cae_base_patch16_224(**{"img_size": 384, **kwargs})


def cae_large_patch16_224(**kwargs) -> VisionTransformer:
    return VisionTransformer(**{"embed_dim": 1024, "depth": 24, "num_heads": 16, **kwargs})


def cae_large_patch16_384(**kwargs) -> VisionTransformer:
    return cae_large_patch16_224(**{"img_size": 384, **kwargs})


def cae_large_patch16_512(**kwargs) -> VisionTransformer:
    return cae_large_patch16_224(**{"img_size": 512, **kwargs})


def cae_nano(**kwargs) -> VisionTransformer:  # ours: the encoder of the pre-training cae_nano
    return VisionTransformer(**{"embed_dim": 96, "depth": 4, "num_heads": 3, **kwargs})


MODELS = {
    f.__name__: f
    for f in (
        cae_tiny_patch16_224,
        cae_small_patch16_224,
        cae_base_patch16_224,
        cae_base_patch16_384,
        cae_large_patch16_224,
        cae_large_patch16_384,
        cae_large_patch16_512,
        cae_nano,
    )
}
