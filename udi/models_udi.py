"""UDI's networks: a ViT with one or two class tokens, stratified random sampling of patches, and the projection head.

B batch, c class tokens, N patches, D width, p patch side, h heads, s sampled patches per image, K prototypes.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
Draws = Iterator[Tensor] | None  # uniform draws (B, 1, 1) of stochastic depth, in place of random ones


def init_weights(module: nn.Module) -> None:
    """Linear: normal of 0.02, bias 0; LayerNorm: 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


# ---- ViT


class DropPath(nn.Module):
    """Drop a residual branch of whole samples with probability `rate`; the kept ones are scaled up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, draws: Draws = None) -> Tensor:
        if not self.rate or not self.training:
            return x
        shape = (len(x),) + (1,) * (x.ndim - 1)
        uniform = torch.rand(shape, dtype=x.dtype, device=x.device) if draws is None else next(draws)
        return x / (1 - self.rate) * (1 - self.rate + uniform).floor()


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_scale: float | None = None):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} does not divide into {num_heads} heads")
        self.num_heads, self.scale = num_heads, qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, h, N, D/h)."""
        q, k, v = (
            self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )  # 3 of (B, h, N, D/h)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """Attention (B, h, N, N)."""
        q, k, _ = self.split(x)
        return (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, qk_scale, drop_path: float, norm):
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale)
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, draws: Draws = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)), draws)
        return x + self.drop_path(self.mlp(self.norm2(x)), draws)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViT with any number of class tokens in front of the patches; all tokens attend to each other.

    UDI has two: z_cls, and the extra class token z_cls+ whose target knows the patches, too (`UDILoss.blended_level`).

    Args:
        img_size: of the stored positions, in pixels, as a list of one; inputs of other sizes interpolate them.
    Raises:
        ValueError: sizes that do not divide.
    """

    def __init__(
        self,
        img_size: Sequence[int] = (224,),
        patch_size: int = 16,
        in_chans: int = 3,
        num_class_token: int = 1,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path_rate: float = 0.0,
        norm_layer=LayerNorm,
    ):
        super().__init__()
        if img_size[0] % patch_size:
            raise ValueError(f"{img_size[0]} pixels do not divide into patches of {patch_size}")
        self.embed_dim, self.patch_size, self.num_class_token = embed_dim, patch_size, num_class_token
        self.cls_token = nn.Parameter(torch.zeros(1, num_class_token, embed_dim))
        patches = (img_size[0] // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + num_class_token, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, qk_scale, rate, norm_layer) for rate in rates
        )
        self.norm = norm_layer(embed_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def positions(self, height: int, width: int) -> Tensor:
        """Positions (1, c + N, D) for an image of `height` x `width` pixels."""
        stored = self.pos_embed.shape[1] - self.num_class_token
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows * columns == stored and rows == columns:
            return self.pos_embed
        return self.interpolated(rows, columns)

    def interpolated(self, rows: int, columns: int) -> Tensor:
        """The stored positions resized to a grid of `rows` x `columns` patches, (1, c + N, D)."""
        stored = self.pos_embed.shape[1] - self.num_class_token
        cls, patches = self.pos_embed.split([self.num_class_token, stored], dim=1)
        side = math.isqrt(stored)
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        # As upstream: the sampling step contains the 0.1 that was to guard against rounding.
        factor = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=factor, mode="bicubic")
        if grid.shape[-2:] != (rows, columns):
            raise ValueError(f"positions of {side} x {side} patches cannot be resized to {rows} x {columns}")
        return torch.cat([cls, grid.flatten(2).transpose(1, 2)], dim=1)

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (B, c + N, D) of images (B, 3, H, W)."""
        height, width = x.shape[-2:]
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.positions(height, width)

    def forward_tokens(self, x: Tensor, draws: Draws = None) -> Tensor:
        """All tokens (B, c + N, D) after the last block, not normalised."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, draws)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> normalised class tokens (B, c, D)."""
        return self.norm(self.forward_tokens(x)[:, : self.num_class_token])

    def get_intermediate_layers(self, x: Tensor, n: int = 1) -> list[Tensor]:
        """Normalised tokens (B, c + N, D) after each of the last n blocks."""
        x, outputs = self.embed(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(x))
        return outputs

    def get_last_selfattention(self, x: Tensor) -> Tensor:
        """Attention of the last block, (B, h, c + N, c + N)."""
        x = self.embed(x)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return last.attn.weights(last.norm1(x))  # type: ignore[union-attr]


# ---- sampled patches


class MaskedAttention(nn.Module):
    """SRS (UDI, framework figure): sampled patches are queries Q, all patches of their image keys K and values V.

    A map (B, s, N) picks the patches of Z that are sampled (student), or mixes those around a sampled place (teacher):
    ẑ = norm(proj(softmax(Q K^T / sqrt(D / h)) V) + M Z), Q = (M Z) W_q. Rows of M sum to 1, or are zero where nothing
    was sampled: the output of those has no meaning.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, norm_layer=LayerNorm):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"a width of {dim} does not divide into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.norm = norm_layer(dim)
        self.apply(init_weights)

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        """Patches Z (B, N, D) and a map M (B, s, N) -> ẑ (B, s, D)."""
        dim, bias = x.shape[-1], self.qkv.bias
        mixed = mix.to(x.dtype) @ x  # (B, s, D), before the projection: rows of a map sum to 1
        q = F.linear(mixed, self.qkv.weight[:dim], None if bias is None else bias[:dim])
        kv = F.linear(x, self.qkv.weight[dim:], None if bias is None else bias[dim:])
        k, v = kv.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, N, D/h)
        q = q.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, h, s, D/h)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(self.proj(y) + mixed)


class UDIWrapper(nn.Module):
    """A backbone f and the SRS module that samples its patches, Z = f(X) without the class tokens.

    Args:
        attn: None has no patches. embed_dim: of the backbone.
    """

    def __init__(self, backbone: VisionTransformer, attn: MaskedAttention | None = None, embed_dim: int = 384):
        super().__init__()
        self.backbone, self.attn = backbone, attn
        if attn is not None:
            self.norm1 = LayerNorm(embed_dim)

    def forward(self, x: Tensor, mix: Tensor | None = None, draws: Draws = None) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) and a map (B, s, N) -> class tokens (B, c, D) and sampled patches (B, s, D)."""
        tokens = self.backbone.forward_tokens(x, draws)
        c = self.backbone.num_class_token
        cls = self.backbone.norm(tokens[:, :c])
        if mix is None or self.attn is None:
            return cls, None
        return cls, self.attn(self.norm1(tokens[:, c:]), mix)


# ---- head


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are weight_g * weight_v / |weight_v|, under the names of old checkpoints."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach().clone())

    @property
    def weight(self) -> Tensor:
        """(out_dim, in_dim)."""
        # One pass, its gradient, too.
        return torch._weight_norm(self.weight_v, self.weight_g, 0)  # type: ignore[reportPrivateImportUsage]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class DINOHead(nn.Module):
    """Projection head: an MLP to a bottleneck on the unit sphere, then K prototypes."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        if nlayers <= 1:
            self.mlp = nn.Linear(in_dim, bottleneck_dim)
        else:
            widths = [in_dim, *[hidden_dim] * (nlayers - 1)]
            layers: list[nn.Module] = []
            for a, b in zip(widths, widths[1:], strict=False):
                layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if use_bn else []), nn.GELU()]
            self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        self.apply(init_weights)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def bottleneck(self, x: Tensor) -> Tensor:
        """(..., D) -> unit vectors (..., bottleneck_dim)."""
        z = self.mlp(x.flatten(0, -2))
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return F.normalize(z, dim=-1).unflatten(0, x.shape[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> logits (..., K)."""
        return self.last_layer(self.bottleneck(x))


# ---- multi-crop


class Projected(NamedTuple):
    """What a network makes of a batch of B images: bottleneck vectors, and the prototypes (K, E) that give logits."""

    global_cls: Tensor  # (c, 2 B, E), first crop first for the student; (1, 2 B, E), second first for the teacher
    local_cls: Tensor | None  # (c, nl, B, E), student
    patches: Tensor | None  # student (2 B, s, E); teacher (2 B, s + nl s_l, E)
    weight: Tensor  # (K, E)


class MultiCropWrapper(nn.Module):
    """Backbone and head on several crops of each image.

    The head stands under several names (head.0, head.1, ...), one per level of the loss, but is one module.
    """

    def __init__(
        self,
        backbone: UDIWrapper,
        head: DINOHead,
        num_local_crops: int,
        include_patch: bool,
        local_patch: bool = False,
        decouple_head: bool = False,
    ):
        super().__init__()
        if local_patch or decouple_head:
            raise ValueError("local_patch and decouple_head are not supported")
        self.backbone, self.num_local_crops, self.include_patch = backbone, num_local_crops, include_patch
        self.head = nn.ModuleList([head] * (backbone.backbone.num_class_token + include_patch))

    def forward(
        self,
        crops: list[Tensor],
        mix: Tensor | None,
        rows: Tensor | None = None,
        branch: int = 0,
        drop_path_rand: list[Tensor] | None = None,
    ) -> Projected:
        """Bottleneck vectors of class tokens and sampled patches.

        Args:
            crops: two global views (B, 3, H, W), then local ones (B, 3, h, w), for the student.
            mix: maps (2 B, s, N) of the global views' patches, those of both views concatenated.
            rows: numbers (R,) of the maps' rows, 0 to 2 B s - 1, that are not zero; only those reach the head.
            branch: 0 student, 1 teacher: global views only, the second one first.
            drop_path_rand: uniform draws in place of random ones.
        """
        draws = None if drop_path_rand is None else iter(drop_path_rand)
        head: DINOHead = self.head[0]  # type: ignore[assignment]
        views = crops[:2] if branch == 0 else crops[1::-1]
        cls, patches = self.backbone(torch.cat(views), mix if self.include_patch else None, draws)
        parts = [cls.transpose(0, 1) if branch == 0 else cls[None, :, 0]]  # (c, 2 B, D)
        if branch == 0 and len(crops) > 2:
            local, _ = self.backbone(torch.cat(crops[2:]), None, draws)
            parts.append(local.transpose(0, 1))
        if patches is not None:
            sampled = patches.flatten(0, 1)
            parts.append(sampled[None] if rows is None else sampled[None, rows])
        # One call of the head on all tokens.
        z = head.bottleneck(torch.cat([part.flatten(0, 1) for part in parts]))
        pieces = [
            piece.unflatten(0, part.shape[:2])
            for piece, part in zip(z.split([part.shape[0] * part.shape[1] for part in parts]), parts, strict=True)
        ]
        vectors = None
        if patches is not None:
            vectors = pieces.pop()[0]
            if rows is not None:
                every = vectors.new_zeros(patches.shape[0] * patches.shape[1], z.shape[1])
                vectors = every.index_copy(0, rows, vectors)
            vectors = vectors.unflatten(0, patches.shape[:2])
        local_cls = pieces[1].unflatten(1, (len(crops) - 2, -1)) if len(pieces) > 1 else None
        return Projected(pieces[0], local_cls, vectors, head.last_layer.weight)


MODELS = {
    "vit_tiny": partial(VisionTransformer, embed_dim=192, depth=12, num_heads=3),
    "vit_small": partial(VisionTransformer, embed_dim=384, depth=12, num_heads=6),
    "vit_base": partial(VisionTransformer, embed_dim=768, depth=12, num_heads=12),
    "vit_large": partial(VisionTransformer, embed_dim=1024, depth=24, num_heads=16),
    # for small machines
    "vit_nano": partial(VisionTransformer, embed_dim=96, depth=4, num_heads=3),
}
