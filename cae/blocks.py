"""The transformer blocks that CAE's encoder, regressor, decoder and the downstream ViT are made of.

Legend: B batch, T tokens, C width, h heads, d = floor(C / h) width of a head, H = h d (at most C), N patches, M masked
and V visible ones.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers.drop import drop_path
from timm.layers.mlp import Mlp
from torch import Tensor, nn

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class DropPath(nn.Module):
    """Stochastic depth per sample: the branch is dropped with probability drop_prob, else divided by 1 - drop_prob.

    `keep_override`, a list of (B,) tensors of 0 and 1, replaces the draws, call by call.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob
        self.keep_override: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> the same shape."""
        if not self.training or self.drop_prob == 0:
            return x
        if self.keep_override is None:
            return drop_path(x, self.drop_prob, training=True)
        keep = self.keep_override.pop(0).to(x).view(-1, *[1] * (x.ndim - 1))
        return x * keep / (1 - self.drop_prob)


def layer_scale(dim: int, init_value: float) -> nn.Parameter:
    """A branch's factors γ (C,), which start at init_value."""
    return nn.Parameter(torch.full((dim,), float(init_value)))


def inner_width(dim: int, num_heads: int) -> int:
    """H; raises ValueError where no head would be left a width."""
    if not 1 <= num_heads <= dim:
        raise ValueError(f"{num_heads} heads, expected 1 to the width {dim}")
    return dim // num_heads * num_heads


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, H) -> (B, h, T, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention; query and value have biases, keys have none.

    Args:
        qkv_bias: False leaves q and v without biases, too.
        window_size: the patch grid (rows, columns); gives the attention a relative position bias.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.num_heads = num_heads
        inner = inner_width(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias else None
        self.relative_position_bias_table = None
        if window_size is not None:
            add_relative_positions(self, window_size, num_heads)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(inner, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, bias: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """(B, T, C) -> (B, T, C), or only the given rows of it. bias: (h, T, T), added to the logits."""
        qkv_bias = None
        if self.q_bias is not None:
            keys = torch.zeros_like(self.q_bias)
            qkv_bias = torch.cat([self.q_bias, keys, self.v_bias])  # type: ignore[list-item]  # (3 H,)
        qkv = F.linear(x, self.qkv.weight, qkv_bias)  # (B, T, 3 H)
        q, k, v = (split_heads(y, self.num_heads) for y in qkv.chunk(3, dim=-1))  # (B, h, T, d) each
        if self.relative_position_bias_table is not None:
            own = relative_position_bias(self)  # (h, T, T)
            bias = own if bias is None else own + bias
        if bias is not None:
            bias = bias[None, :, rows].to(q.dtype)  # (1, h, rows, T)
        dropout = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q[:, :, rows], k, v, bias, dropout)  # (B, h, rows, d)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # (B, rows, C)


class CrossAttention(nn.Module):
    """Multi-head cross-attention; query and value have biases, keys have none."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        inner = inner_width(dim, num_heads)
        self.q = nn.Linear(dim, inner, bias=False)
        self.k = nn.Linear(dim, inner, bias=False)
        self.v = nn.Linear(dim, inner, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(inner)) if qkv_bias else None
        self.attn_drop = attn_drop
        self.proj = nn.Linear(inner, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, Tq, C) attends to k and v (B, Tk, C) -> (B, Tq, C)."""
        q, k, v = (
            split_heads(F.linear(x, layer.weight, bias), self.num_heads)
            for x, layer, bias in ((q, self.q, self.q_bias), (k, self.k, None), (v, self.v, self.v_bias))
        )
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)  # (B, h, Tq, d)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))  # (B, Tq, C)


class Block(nn.Module):
    """x += γ1 Attn(LN1 x), then x += γ2 MLP(LN2 x); without γ if init_values is 0."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        window_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, drop, window_size)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = mlp(dim, mlp_ratio, drop)
        self.gamma_1 = layer_scale(dim, init_values) if init_values > 0 else None
        self.gamma_2 = layer_scale(dim, init_values) if init_values > 0 else None

    def forward(self, x: Tensor, bias: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """(B, T, C) -> (B, T, C), or only the given rows of it."""
        attended = self.attn(self.norm1(x), bias, rows)  # (B, rows, C)
        x = x[:, rows] + self.drop_path(attended if self.gamma_1 is None else self.gamma_1 * attended)
        changed = self.mlp(self.norm2(x))
        return x + self.drop_path(changed if self.gamma_2 is None else self.gamma_2 * changed)


def mlp(dim: int, ratio: float, drop: float) -> Mlp:
    """(B, T, C) -> (B, T, C) through ratio C hidden units and GELU."""
    return Mlp(dim, int(dim * ratio), drop=(0.0, drop))  # no dropout after the activation


class RegressorBlock(nn.Module):
    """One block of CAE's latent contextual regressor: y = q + γ1 CrossAttn(q, kv); z = LN2(y); out = z + γ2 MLP(z).

    Each of queries, keys and values has a norm of its own. As upstream: the second residual starts from the normalised
    z, not from y.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
    ):
        super().__init__()
        self.norm1_q = norm_layer(dim)
        self.norm1_k = norm_layer(dim)
        self.norm1_v = norm_layer(dim)
        self.norm2_cross = norm_layer(dim)
        self.cross_attn = CrossAttention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.mlp_cross = mlp(dim, mlp_ratio, drop)
        self.drop_path = DropPath(drop_path)
        self.gamma_1_cross = layer_scale(dim, init_values if init_values > 0 else 1.0)
        self.gamma_2_cross = layer_scale(dim, init_values if init_values > 0 else 1.0)
        if init_values <= 0:  # as upstream: then they exist, but do not learn
            self.gamma_1_cross.requires_grad_(False)
            self.gamma_2_cross.requires_grad_(False)

    def forward(self, q: Tensor, kv: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        """The queries of the next block, (B, M, D).

        Args:
            q: (B, M, D), queries of the masked patches. kv: (B, V + M, D), the visible latents and then the queries.
            pos_q, pos_k: positions, shaped like q and kv; they are added to queries and keys, not to values.
        """
        attended = self.cross_attn(self.norm1_q(q + pos_q), self.norm1_k(kv + pos_k), self.norm1_v(kv))  # (B, M, D)
        z = self.norm2_cross(q + self.drop_path(self.gamma_1_cross * attended))
        return z + self.drop_path(self.gamma_2_cross * self.mlp_cross(z))


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


# ---- positions


def sincos_pos_embed(dim: int, grid: Sequence[int]) -> Tensor:
    """Fixed 2-D position table [sin(aw), cos(aw), sin(bw), cos(bw)], a row and b column of token t, row first.

    As upstream: a = t // rows and b = t % rows, so other than square grids are not walked row by row.
    Args:
        dim: C, a multiple of 4; w_k = 10000^(-k / (C/4)). grid: (rows, columns).
    Returns:
        (1, 1 + rows * columns, C) float32; the first row, the class token's, is 0.
    """
    if dim % 4:
        raise ValueError(f"width {dim} is not a multiple of 4, as the sin-cos position table needs")
    rows, columns = grid
    t = torch.arange(rows * columns)  # (N,)
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    a, b = (x.float()[:, None] * omega for x in (t // rows, t % rows))  # (N, C / 4) each
    return F.pad(torch.cat([a.sin(), a.cos(), b.sin(), b.cos()], dim=1), (0, 0, 1, 0))[None]


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


def add_relative_positions(module: nn.Module, grid: tuple[int, int], num_heads: int) -> None:
    """Give a module the parameter `relative_position_bias_table`, of zeros, and the buffer of its index."""
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    module.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
    module.register_buffer("relative_position_index", relative_position_index(grid))


def relative_position_bias(module: nn.Module) -> Tensor:
    """(h, T, T) of a module with relative positions."""
    table, index = module.relative_position_bias_table, module.relative_position_index
    return F.embedding(index, table).permute(2, 0, 1)  # type: ignore[arg-type]


def init_truncated(module: nn.Module) -> None:
    """Linear weights from a normal of 0.02, biases 0, norms 1 and 0 (`Module.apply`)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def rescale_by_depth(outputs: Sequence[tuple[nn.Linear, nn.Linear]]) -> None:
    """Divide the weights of each block's two output projections by sqrt(2 l), l counting blocks from 1."""
    for layer, linears in enumerate(outputs, 1):
        for linear in linears:
            linear.weight.div_((2.0 * layer) ** 0.5)
