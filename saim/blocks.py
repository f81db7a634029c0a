"""The pre-norm transformer block that SAIM's encoder, its decoder and the downstream ViT share.

Legend: N batch, T tokens, L patches, D width, H heads, d = D / H.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # upstream models_saim.py@08d36c3


def fused_linear(x: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
    """Apply several linear layers to the same x (..., D) in one matrix product; the parameters stay separate."""
    weight = torch.cat([m.weight for m in linears])
    bias = None if linears[0].bias is None else torch.cat([m.bias for m in linears])
    return F.linear(x, weight, bias).chunk(len(linears), dim=-1)


class Attention(nn.Module):
    """Multi-head attention, softmax(q kᵀ / sqrt(d) + mask) v, with separate projections of query, key and value.

    Args:
        dim: D, a multiple of num_heads.
        qkv_bias: whether q, k and v have biases (always, in SAIM).
        attn_drop, proj_drop: dropout rates of the attention matrix and the output (0 in SAIM).
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of the number of heads {num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        return_attention: bool = False,
        is_causal: bool = False,
        order: Tensor | None = None,
    ) -> Tensor:
        """Let q attend to k and v.

        Args:
            q: (N, Tq, D), or (L, D) together with `order`. k, v: (N, Tk, D).
            mask: additive, broadcastable to (N, H, Tq, Tk); -inf hides a key. The matrix is then built explicitly.
            return_attention: return the softmax matrix (N, H, Tq, Tk) instead of the output.
            is_causal: row r attends to keys 0..r; no mask tensor is made.
            order: (N, Tq) long. q is then a table that all samples share; row i of sample n is q[order[n, i]].
        Returns:
            (N, Tq, D)
        """
        if q is k and k is v:
            q, k, v = fused_linear(q, self.q, self.k, self.v)
        elif k is v:
            q, (k, v) = self.q(q), fused_linear(k, self.k, self.v)
        else:
            q, k, v = self.q(q), self.k(k), self.v(v)
        if order is not None:
            q = F.embedding(order, q)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (N, H, T, d)
        if mask is None and not return_attention:
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)
        else:
            logits = (q @ k.transpose(-2, -1)) * self.scale
            attn = (logits if mask is None else logits + mask).softmax(dim=-1)  # (N, H, Tq, Tk)
            if return_attention:
                return attn
            x = self.attn_drop(attn) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """u = q + Attn(LN1(q), LN1(kv)); out = u + MLP(LN2(u)). One LN1 serves queries and keys/values, as upstream."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = LayerNorm,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, drop)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self,
        q: Tensor,
        kv: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        order: Tensor | None = None,
    ) -> Tensor:
        """Update q (N, Tq, D) from itself, or from kv (N, Tk, D); mask, is_causal and order as in `Attention`."""
        queries = self.norm1(q)
        if mask is None:
            context = queries if kv is None else self.norm1(kv)
            attended = self.attn(queries, context, context, is_causal=is_causal, order=order)
        else:  # the authors' formulation, kept whole as what speed is compared with: a norm and a product for each
            context = q if kv is None else kv
            attended = self.attn(queries, self.norm1(context), self.norm1(context), mask)
        u = (q if order is None else F.embedding(order, q)) + self.drop_path(attended)
        return u + self.drop_path(self.mlp(self.norm2(u)))


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
