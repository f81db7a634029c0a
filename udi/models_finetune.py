"""Vision Transformer for fine-tuning, its optimizer groups by layer, and how pre-trained weights are loaded.

Legend: B batch, N patches, c class tokens, T = c + N tokens, C width, h heads, G side of the patch grid, K classes.
"""

import math
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from common import distributed, lr_decay
from udi.backbone import own_layout, vit_weights
from udi.models_udi import DropPath, LayerNorm, init_weights

# ---- positions


def sinusoid_pos_embed(dim: int, patches: int) -> Tensor:
    """Fixed position table [sin(t w_0), cos(t w_0), sin(t w_1), ...] of patch t = 0, 1, ... in raster order.

    Args:
        dim: C; w_k = 10000^(-2k / C).
    Returns:
        (1, 1 + patches, C) float32; the first row, the class token's, is 0.
    """
    pair = torch.arange(dim) // 2  # (C,): k of each column
    angles = torch.arange(patches)[:, None] / 10000 ** (2 * pair.double() / dim)  # (N, C)
    table = torch.where(torch.arange(dim) % 2 == 0, angles.sin(), angles.cos())  # (N, C)
    return F.pad(table.float(), (0, 0, 1, 0))[None]


# same as cae/blocks.py
def relative_position_index(grid: Sequence[int]) -> Tensor:
    """Row of the bias table for each (query, key) pair of tokens, (1+N, 1+N); the last 3 rows concern the class token.

    Args:
        grid: (rows, columns) of the patches.
    """
    rows, columns = grid
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # (N, 2)
    delta = place[:, None] - place[None]  # (N, N, 2), query - key
    index = (delta[..., 0] + rows - 1) * (2 * columns - 1) + delta[..., 1] + columns - 1
    last = (2 * rows - 1) * (2 * columns - 1) + 2
    index = F.pad(index, (1, 0, 1, 0))  # (1 + N, 1 + N)
    index[0, :], index[:, 0], index[0, 0] = last - 2, last - 1, last
    return index


# same as cae/blocks.py
def add_relative_positions(module: nn.Module, grid: tuple[int, int], num_heads: int) -> None:
    """Give a module the parameter `relative_position_bias_table`, of zeros, and the buffer of its index."""
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    module.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
    module.register_buffer("relative_position_index", relative_position_index(grid))


# same as cae/blocks.py
def relative_position_bias(module: nn.Module) -> Tensor:
    """(h, T, T) of a module with relative positions."""
    table, index = module.relative_position_bias_table, module.relative_position_index
    return F.embedding(index, table).permute(2, 0, 1)  # type: ignore[arg-type]


# ---- blocks


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        window_size: the patch grid (rows, columns); gives the attention a relative position bias.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} does not divide into {num_heads} heads")
        if not 0 <= attn_drop < 1:
            raise ValueError(f"a share of {attn_drop} of the attention cannot be dropped")
        self.num_heads, self.scale = num_heads, qk_scale or (dim // num_heads) ** -0.5
        self.relative_position_bias_table = None
        if window_size is not None:
            add_relative_positions(self, window_size, num_heads)
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, bias: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """(B, T, C) -> (B, T, C), or only the given rows of it. bias: (h, T, T), added to the logits."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, T, C/h)
        if self.relative_position_bias_table is not None:
            own = relative_position_bias(self)  # (h, T, T)
            bias = own if bias is None else own + bias
        if bias is not None:
            bias = bias[None, :, rows].to(q.dtype)  # (1, h, R, T) of R rows
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q[:, :, rows], k, v, bias, dropout, scale=self.scale)  # (B, h, R, C/h)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """x += γ1 Attn(LN1 x), then x += γ2 MLP(LN2 x); without γ if init_values is 0."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
        init_values: float,
        norm_layer: Callable[[int], nn.Module],
        window_size: tuple[int, int] | None,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, window_size)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=(0.0, drop))  # no dropout after the activation
        self.gamma_1 = layer_scale(dim, init_values) if init_values > 0 else None
        self.gamma_2 = layer_scale(dim, init_values) if init_values > 0 else None

    def forward(self, x: Tensor, bias: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """(B, T, C) -> (B, T, C), or only the given rows of it."""
        attended = self.attn(self.norm1(x), bias, rows)  # (B, R, C)
        x = x[:, rows] + self.drop_path(attended if self.gamma_1 is None else self.gamma_1 * attended)
        changed = self.mlp(self.norm2(x))  # (B, R, C)
        return x + self.drop_path(changed if self.gamma_2 is None else self.gamma_2 * changed)


# same as cae/blocks.py
def layer_scale(dim: int, init_value: float) -> nn.Parameter:
    """A branch's factors γ (C,), which start at init_value."""
    return nn.Parameter(torch.full((dim,), float(init_value)))


# same as cae/blocks.py
class PatchEmbed(nn.Module):
    """Cut images into p x p patches and project each: a stride-p convolution, computed as one matrix product."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"image size {img_size} is not a multiple of the patch size {patch_size}")
        self.img_size = img_size
        self.patch_size = patch_size
        self.grid_size = img_size // patch_size
        self.num_patches = self.grid_size**2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, imgs: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, C), patches row by row.

        Raises:
            ValueError: the images are not img_size x img_size.
        """
        b, c, h, w = imgs.shape
        if (h, w) != (self.img_size, self.img_size):
            raise ValueError(f"images are {h}x{w}, the model was built for {self.img_size}x{self.img_size}")
        g, p = self.grid_size, self.patch_size
        patches = imgs.reshape(b, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5)  # (B, g, g, 3, p, p)
        patches = patches.reshape(b, g * g, c * p * p)  # (B, N, 3 p p), in the order of the convolution's weight
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


# same as cae/blocks.py
@torch.no_grad()
def rescale_by_depth(outputs: Sequence[tuple[nn.Linear, nn.Linear]]) -> None:
    """Divide the weights of each block's two output projections by sqrt(2 l), l counting blocks from 1."""
    for layer, linears in enumerate(outputs, 1):
        for linear in linears:
            linear.weight.div_((2.0 * layer) ** 0.5)


# same as cae/models_vit.py
class RelativePositionBias(nn.Module):
    """Relative position bias that all blocks share."""

    def __init__(self, window_size: tuple[int, int], num_heads: int):
        super().__init__()
        add_relative_positions(self, window_size, num_heads)

    def forward(self) -> Tensor:
        """(h, T, T)"""
        return relative_position_bias(self)


# ---- network


class VisionTransformer(nn.Module):
    """ViT classifier.

    Args:
        init_values: initial layer scale; 0 has none.
        use_abs_pos_emb: positions are added to the tokens. use_learned_abs_pos_emb: learned ones, else fixed sin-cos.
        use_rel_pos_bias: a relative position bias in every block. use_shared_rel_pos_bias: one for all.
        use_mean_pooling: classify the mean of the patch tokens (after `fc_norm`), not the first class token
            (after `norm`).
        init_scale: factor on the initial head.
        num_class_token: 1; a pre-trained network's second class token can stay where no relative positions are.
    Raises:
        ValueError: an argument does not fit.
    """

    norm: nn.Module
    pos_embed: Tensor | None

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
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        init_values: float = 0.0,
        use_learned_abs_pos_emb: bool = True,
        use_abs_pos_emb: bool = True,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = False,
        use_mean_pooling: bool = True,
        init_scale: float = 0.001,
        num_class_token: int = 1,
    ):
        super().__init__()
        if num_class_token > 1 and (use_rel_pos_bias or use_shared_rel_pos_bias):
            raise ValueError(f"relative positions know 1 class token, not {num_class_token}")
        self.embed_dim, self.num_class_token = embed_dim, num_class_token
        self.use_mean_pooling = use_mean_pooling
        # Registration order is upstream's: optimizer states refer to parameters by position.
        self.cls_token = nn.Parameter(torch.zeros(1, num_class_token, embed_dim))
        grid_size = img_size // patch_size  # G
        if not use_abs_pos_emb:
            self.pos_embed = None
        elif use_learned_abs_pos_emb:
            self.pos_embed = nn.Parameter(torch.zeros(1, grid_size**2 + num_class_token, embed_dim))
        else:
            fixed = F.pad(sinusoid_pos_embed(embed_dim, grid_size**2), (0, 0, num_class_token - 1, 0))
            self.register_buffer("pos_embed", fixed, persistent=False)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)
        grid = (grid_size, grid_size)
        self.rel_pos_bias = RelativePositionBias(grid, num_heads) if use_shared_rel_pos_bias else None
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        sizes, window = (embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale), grid if use_rel_pos_bias else None
        drops = drop_rate, attn_drop_rate
        self.blocks = nn.ModuleList(Block(*sizes, *drops, rate, init_values, norm_layer, window) for rate in rates)
        self.norm = nn.Identity() if use_mean_pooling else norm_layer(embed_dim)
        self.fc_norm = norm_layer(embed_dim) if use_mean_pooling else None
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)
        for table in (self.cls_token, self.pos_embed):
            if isinstance(table, nn.Parameter):
                nn.init.trunc_normal_(table, std=0.02)
        rescale_by_depth([(b.attn.proj, b.mlp.fc2) for b in self.blocks])  # type: ignore[union-attr]
        if isinstance(self.head, nn.Linear):
            self.head.weight.data.mul_(init_scale)
            self.head.bias.data.mul_(init_scale)

    def no_weight_decay(self) -> set[str]:
        """Parameters exempt from weight decay besides the 1-D ones."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> features (B, C), the input of the head."""
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)  # (B, T, C)
        if self.pos_embed is not None:
            x = x + self.pos_embed  # (1, T, C)
        x = self.pos_drop(x)
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()  # (h, T, T)
        for block in self.blocks[:-1]:
            x = block(x, bias)
        # Only the rows that are read leave the last block; keys and values come from all.
        if self.fc_norm is not None:
            patches = self.blocks[-1](x, bias, slice(self.num_class_token, None))  # (B, N, C)
            return self.fc_norm(patches.mean(dim=1))  # (B, C)
        return self.norm(self.blocks[-1](x, bias, slice(0, 1))[:, 0])  # (B, C)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        return self.head(self.forward_features(x))


# ---- learning rates by layer


class LayerDecayValueAssigner:
    """Factors on the learning rate by layer.

    Args:
        values: of layer 0 (tokens, positions, patch embedding), the blocks, and the rest.
    """

    def __init__(self, values: Sequence[float]):
        self.values = values

    def get_scale(self, layer_id: int) -> float:
        return self.values[layer_id]

    def get_layer_id(self, var_name: str) -> int:
        return lr_decay.vit_layer_id(var_name, len(self.values) - 2)


def get_parameter_groups(
    model: nn.Module,
    weight_decay: float = 1e-5,
    skip_list: Collection[str] = (),
    get_num_layer: Callable[[str], int] | None = None,
    get_layer_scale: Callable[[int], float] | None = None,
) -> list[dict]:
    """Optimizer groups with `lr_scale`, one per (layer, decayed or not), in the order of first appearance.

    Args:
        skip_list: parameters without weight decay, besides biases and others of one dimension.
        get_num_layer: layer of a parameter's name; None: all are of one. get_layer_scale: its factor; None: 1.
    """
    layer_of, scale_of = get_num_layer or (lambda name: 0), get_layer_scale or (lambda layer: 1.0)
    return lr_decay.layer_groups(model, weight_decay, layer_of, scale_of, skip_list)


# ---- checkpoints


# same as cae/models_vit.py
def _spline(knots: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Matrix (targets, knots) of not-a-knot cubic interpolation; targets beyond the knots take the outermost value."""
    from scipy.interpolate import make_interp_spline  # here, because importing it takes 0.4 s

    spline = make_interp_spline(knots, np.eye(len(knots)), k=3)
    return spline(targets.clip(knots[0], knots[-1]))


# same as cae/models_vit.py
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


def interpolate_pos_embed(pos_embed: Tensor, grid_size: int, tokens: int = 1) -> Tensor:
    """Resize the patches of a position table (1, tokens + G², C) to grid_size² cells, bicubic; class rows are kept."""
    old = math.isqrt(pos_embed.shape[1] - tokens)
    if old == grid_size:
        return pos_embed
    patches = pos_embed[:, tokens:].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, C, G, G) of the old grid
    patches = F.interpolate(patches, size=(grid_size, grid_size), mode="bicubic", align_corners=False)  # of the new one
    return torch.cat([pos_embed[:, :tokens], patches.flatten(2).transpose(1, 2)], dim=1)


def read_weights(
    path: str,
    checkpoint_key: str = "teacher",
    model_key: str = "model|module",
    model_prefix: str = "",
    state: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """The weights of a ViT in a file or https address, by plain names.

    Args:
        checkpoint_key: which weights of a pre-training file: teacher or student.
        model_key: keys, separated by |, of which the first that the file has holds the weights, else the file itself.
        model_prefix: of the weights' names.
        state: the file's content, where it has been read.
    Raises:
        distributed.UserError: the file cannot be read or holds no ViT.
    """
    state = distributed.load(path) if state is None else state
    found = next((state[key] for key in model_key.split("|") if isinstance(state.get(key), dict)), state)
    weights = {
        name.removeprefix(model_prefix).removeprefix("module."): value
        for name, value in found.items()
        if isinstance(value, Tensor) and name.startswith(model_prefix)
    }
    # A ViT under its own names may be fine-tuned, with parts that pre-training does not have.
    if any(name.startswith("blocks.") for name in weights) and {"cls_token", "patch_embed.proj.weight"} <= set(weights):
        return own_layout(weights)
    if model_prefix:
        raise distributed.UserError(f"{path}: holds no ViT under names that start with {model_prefix}")
    return vit_weights(state, checkpoint_key, path, parts=("cls_token", "patch_embed.", "blocks."))


def first_class_token(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without what belongs to further class tokens."""
    tokens, cut = weights["cls_token"].shape[1], {"cls_token": weights["cls_token"][:, :1]}
    if "pos_embed" in weights:
        pos = weights["pos_embed"]
        cut["pos_embed"] = torch.cat([pos[:, :1], pos[:, tokens:]], dim=1)
    return weights | cut


def load_pretrained(model: VisionTransformer, weights: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Load a ViT's weights by name.

    Positions, absolute and relative, of another grid are resized, weights of three channels adapted to others; a head
    of another shape is left out. As upstream, `fc_norm` of a model that pools does not take over the final norm.
    Returns:
        the missing keys and the unexpected ones.
    Raises:
        ValueError: weights of the blocks or in front of them are missing or have other shapes.
    """
    weights, own = dict(weights), model.state_dict()
    grid, tokens = model.patch_embed.grid_size, model.num_class_token
    shared = weights.get("rel_pos_bias.relative_position_bias_table")
    if shared is not None and model.rel_pos_bias is None:
        del weights["rel_pos_bias.relative_position_bias_table"]
        weights |= {f"blocks.{i}.attn.relative_position_bias_table": shared for i in range(len(model.blocks))}
    for key in list(weights):
        if key.endswith("relative_position_index") or (
            key.startswith("head.") and (key not in own or weights[key].shape != own[key].shape)
        ):
            del weights[key]
        elif key.endswith("relative_position_bias_table") and key in own:
            weights[key] = resize_relative_positions(weights[key], grid)
    if "pos_embed" in weights and "pos_embed" in own and weights["cls_token"].shape[1] == tokens:
        weights["pos_embed"] = interpolate_pos_embed(weights["pos_embed"], grid, tokens)
    weights = distributed.adapt_channels(weights, own)
    missing = [key for key in own if key not in weights]
    lacking = [key for key in missing if key.startswith(("cls_token", "pos_embed", "patch_embed.", "blocks."))]
    lacking = [key for key in lacking if "relative_position" not in key and ".gamma_" not in key]
    if lacking:
        raise ValueError(f"{len(lacking)} weights of the ViT are missing, first {lacking[0]}")
    for key in own:
        if key in weights and own[key].shape != weights[key].shape:
            raise ValueError(f"{key} is {tuple(weights[key].shape)}, the model expects {tuple(own[key].shape)}")
    more = [key for key in weights if key.startswith("blocks.") and key not in own and "relative_position" not in key]
    deeper = [key for key in more if int(key.split(".")[1]) >= len(model.blocks)]
    if deeper:
        raise ValueError(f"the checkpoint has more blocks than the model's {len(model.blocks)}: {deeper[0]}")
    if more:
        raise ValueError(f"the model's blocks have no {more[0].split('.', 2)[2]}, as the checkpoint's have")
    result = model.load_state_dict(weights, strict=False)
    return result.missing_keys, result.unexpected_keys


MODELS = {
    "vit_tiny": partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3),
    "vit_small": partial(VisionTransformer, embed_dim=384, depth=12, num_heads=6),
    "vit_base": partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12),
    "vit_large": partial(VisionTransformer, embed_dim=1024, depth=24, num_heads=16),
    # for small machines
    "vit_nano": partial(VisionTransformer, embed_dim=96, depth=4, num_heads=3),
}
