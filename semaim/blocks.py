"""The pre-norm transformer blocks of SemAIM: the content stream's, which the downstream ViT shares, and the query's.

Legend: N batch, T tokens, L patches, D width, H heads, d = D / H.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # upstream models_semaim.py@ade770f
CAUSAL = "causal"  # row r attends to keys 0..r
# What a row may attend to: everything, `CAUSAL`, a bool mask (True = visible) or an additive one that broadcast to
# (N, H, Tq, Tk), or FlexAttention's block mask.
Visible = None | str | Tensor | BlockMask


@cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)  # type: ignore[return-value]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible = None) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v over the visible keys, (N, H, T, d) each.

    An additive mask is applied to the explicit softmax matrix, the authors' formulation that speed is compared with.
    """
    if isinstance(visible, BlockMask):
        flex = compiled_flex_attention() if q.is_cuda else flex_attention
        return flex(q, k, v, block_mask=visible)  # type: ignore[return-value]
    if isinstance(visible, Tensor) and visible.dtype != torch.bool:
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + visible).softmax(dim=-1) @ v
    if isinstance(visible, str):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(N, T, D) -> (N, H, T, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads:
        raise ValueError(f"width {dim} is not a multiple of the number of heads {num_heads}")


# same as saim/blocks.py
def fused_linear(x: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """Apply several linear layers to the same x (..., D) in one matrix product; the parameters stay separate."""
    weight = torch.cat([m.weight for m in linears])
    bias = None if linears[0].bias is None else torch.cat([m.bias for m in linears])
    return F.linear(x, weight, bias).chunk(len(linears), dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, visible: Visible = None, rows: slice = slice(None)) -> Tensor:
        """(N, T, D) -> (N, T, D), or only the given rows of it."""
        q, k, v = (split_heads(y, self.num_heads) for y in self.qkv(x).chunk(3, dim=-1))
        return self.proj(attend(q[:, :, rows], k, v, visible).transpose(1, 2).flatten(2))

    def matrix(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Softmax matrix (N, H, T, T) of x (N, T, D), no key hidden, or only the given rows of it."""
        weight, bias = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k = F.linear(x[:, rows], weight[0], bias[0]), F.linear(x, weight[1], bias[1])
        q, k = split_heads(q, self.num_heads), split_heads(k, self.num_heads)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


class QueryAttention(nn.Module):
    """Multi-head cross-attention with separate projections of query, key and value."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, q: Tensor, kv: Tensor, visible: Visible = None, order: Tensor | None = None) -> Tensor:
        """Let q attend to kv (N, Tk, D).

        Args:
            q: (N, Tq, D), or a table (Tq, D) that all samples share.
            order: (N, Tq) long; row i of sample n is row order[n, i] of the table. None: in the table's own order.
        Returns:
            (N, Tq, D)
        """
        q, (k, v) = self.q(q), fused_linear(kv, self.k, self.v)
        q = sorted_table(q, order, len(kv)) if q.ndim == 2 else q
        q, k, v = (split_heads(x, self.num_heads) for x in (q, k, v))
        return self.proj(attend(q, k, v, visible).transpose(1, 2).flatten(2))


def sorted_table(table: Tensor, order: Tensor | None, n: int) -> Tensor:
    """(L, D) -> (N, L, D), sorted by order (N, L) if there is one."""
    return table.expand(n, -1, -1) if order is None else F.embedding(order, table)


class Block(nn.Module):
    """u = x + Attn(LN1(x)); out = u + MLP(LN2(u))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
        attention: type[nn.Module] = Attention,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attention(dim, num_heads)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, visible: Visible = None, rows: slice = slice(None)) -> Tensor:
        """(N, T, D) -> (N, T, D), or only the given rows of it."""
        u = x[:, rows] + self.drop_path(self.attn(self.norm1(x), visible, rows))
        return u + self.drop_path(self.mlp(self.norm2(u)))


class QueryBlock(Block):
    """u = g + Attn(LN1(g), LN1(h)); out = u + MLP(LN2(u)). One LN1 serves queries and keys/values, as upstream."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, attention=QueryAttention)

    def forward(  # type: ignore[override]
        self, g: Tensor, h: Tensor, visible: Visible = None, order: Tensor | None = None
    ) -> Tensor:
        """Update g (N, Tq, D), or a table (Tq, D) with its `order`, from h (N, Tk, D); as `QueryAttention`."""
        attended = self.attn(self.norm1(g), self.norm1(h), visible, order)
        u = (sorted_table(g, order, len(h)) if g.ndim == 2 else g) + self.drop_path(attended)
        return u + self.drop_path(self.mlp(self.norm2(u)))


# same as saim/blocks.py
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

    def unfold(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, C*p*p), patches row by row, inner order (channel, row, column).

        Raises:
            ValueError: the images are not img_size x img_size.
        """
        n, c, h, w = imgs.shape
        if (h, w) != (self.img_size, self.img_size):
            raise ValueError(f"images are {h}x{w}, the model was built for {self.img_size}x{self.img_size}")
        g, p = self.grid_size, self.patch_size
        return imgs.reshape(n, c, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(n, g * g, c * p * p)

    def embed(self, patches: Tensor) -> Tensor:
        """(..., C*p*p) -> (..., D)."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def forward(self, imgs: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, D)."""
        return self.embed(self.unfold(imgs))


# same as saim/blocks.py
def sincos_pos_embed(dim: int, grid_size: int, cls_token: bool = False) -> Tensor:
    """Fixed 2-D position table [sin(cw), cos(cw), sin(rw), cos(rw)] of column c and row r, column first.

    Args:
        dim: D, a multiple of 4; w_k = 10000^(-k / (D/4)).
    Returns:
        (G*G, D) float64, row-major; a row of zeros for the class token comes first if asked for.
    """
    if dim % 4:
        raise ValueError(f"width {dim} is not a multiple of 4, as the sin-cos position table needs")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    steps = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega  # (G, D/4)
    axis = torch.cat([steps.sin(), steps.cos()], dim=1)  # (G, D/2)
    columns = axis.expand(grid_size, -1, -1)
    rows = axis[:, None].expand(-1, grid_size, -1)
    table = torch.cat([columns, rows], dim=-1).flatten(0, 1)
    return torch.cat([table.new_zeros(1, dim), table]) if cls_token else table
