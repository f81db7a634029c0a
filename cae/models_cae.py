"""CAE pre-training network: a context autoencoder (arXiv 2202.03026).

The encoder sees a class token and the visible patches. The latent contextual regressor starts from one mask token per
masked patch and predicts that patch's latent: in every block these queries attend to the visible latents, which never
change, followed by the queries themselves as they are by then. The class token stays outside of it. Two losses:
alignment compares the predicted latents with those that the encoder itself gives to the masked patches alone, without
gradient (`alignment_target`); decoding classifies each masked patch's visual token from the predicted latents only.

Legend: B batch, N patches, M masked and V = N - M visible ones, C encoder width, D width of regressor and decoder,
K visual tokens, G side of the patch grid.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae.blocks import (
    Block,
    LayerNorm,
    PatchEmbed,
    RegressorBlock,
    rescale_by_depth,
    sincos_pos_embed,
)

Norm = Callable[[int], nn.Module]
REVISION_A = {  # names of modules in the authors' earlier revision
    "teacher.": "alignment_encoder.",
    "encoder_to_decoder.": "encoder_to_regresser.",
    "encoder_to_decoder_norm.": "encoder_to_regresser_norm.",
    "pretext_neck.regressor_blocks.": "regresser.regressor_blocks.",
    "pretext_neck.norm.": "regresser.norm.",
    "pretext_neck.decoder_blocks.": "decoder.decoder_blocks.",
    "pretext_neck.norm2.": "decoder.norm.",
    "pretext_neck.head.": "decoder.head.",
}


def name_today(name: str) -> str:
    """A weight's name in this network, from that in either of the authors' revisions."""
    old = next((old for old in REVISION_A if name.startswith(old)), "")
    return REVISION_A.get(old, "") + name.removeprefix(old)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, C) at index (B, n) -> (B, n, C); x may be a table (N, C) that all samples share."""
    return F.embedding(index, x) if x.ndim == 2 else x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def split_patches(mask: Tensor, num_masked: int) -> tuple[Tensor, Tensor]:
    """Indices (B, V) of the visible and (B, M) of the masked patches, in their order in the image.

    Args:
        mask: (B, N) bool, True = masked; num_masked of every row.
    """
    order = mask.int().argsort(dim=1, stable=True)  # (B, N), the visible ones first
    visible, masked = order.tensor_split([mask.shape[1] - num_masked], dim=1)
    return visible, masked


def truncated_(tensor: Tensor) -> Tensor:
    """Draw from a normal of deviation 0.02 that is cut at one deviation (as upstream)."""
    return nn.init.trunc_normal_(tensor, std=0.02, a=-0.02, b=0.02)


class VisionTransformerEncoder(nn.Module):
    """ViT over the class token and some of the patches: the visible ones, or, for the targets, the masked ones."""

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path_rate: float,
        init_values: float,
        norm_layer: Norm,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))  # (1, 1, C)
        grid = self.patch_embed.grid_size
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, (grid, grid)), requires_grad=False)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                drop_path=rate,
                init_values=init_values,
                norm_layer=norm_layer,
            )
            for rate in rates
        )
        self.norm = norm_layer(embed_dim)

    def forward(self, patches: Tensor, index: Tensor) -> Tensor:
        """Encode the patches at `index` (B, n) among all embedded `patches` (B, N, C) -> (B, 1 + n, C)."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)  # (B, 1, C)
        tokens = rows_at(patches, index) + rows_at(self.pos_embed[0, 1:], index)  # (B, n, C)
        x = torch.cat([cls, tokens], dim=1)  # (B, 1 + n, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class VisionTransformerRegressor(nn.Module):
    """Predicts the latents of the masked patches; keys and values are the visible latents and the current queries."""

    def __init__(self, dim: int, depth: int, num_heads: int, drop_path_rate: float, init_values: float, **kwargs):
        super().__init__()
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.regressor_blocks = nn.ModuleList(
            RegressorBlock(dim, num_heads, drop_path=rate, init_values=init_values, **kwargs) for rate in rates
        )
        self.norm = kwargs["norm_layer"](dim)

    def forward(self, q: Tensor, visible: Tensor, pos: Tensor) -> Tensor:
        """Predicted latents (B, M, D).

        Args:
            q: (B, M, D), mask tokens. visible: (B, V, D), the encoder's latents without the class token's.
            pos: (B, V + M, D), positions, those of the visible patches first.
        """
        pos_masked = pos[:, visible.shape[1] :]  # (B, M, D)
        for block in self.regressor_blocks:
            kv = torch.cat([visible, q], dim=1)  # (B, V + M, D): only q changes from block to block
            q = block(q, kv, pos_masked, pos)  # (B, M, D)
        return self.norm(q)


class VisionTransformerDecoder(nn.Module):
    """Classifies each masked patch's visual token from the predicted latents, by self-attention among them."""

    def __init__(
        self,
        num_classes: int,
        dim: int,
        depth: int,
        num_heads: int,
        drop_path_rate: float,
        init_values: float,
        **kwargs,
    ):
        super().__init__()
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.decoder_blocks = nn.ModuleList(
            Block(dim, num_heads, drop_path=rate, init_values=init_values, **kwargs) for rate in rates
        )
        self.norm = kwargs["norm_layer"](dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Predicted latents plus positions (B, M, D) -> logits (B M, K)."""
        for block in self.decoder_blocks:
            x = block(x)  # (B, M, D)
        return self.head(self.norm(x)).flatten(0, 1)  # (B M, K)


class ContextAutoencoderViT(nn.Module):
    """Context autoencoder: encoder, latent contextual regressor, decoder, and the encoder of the alignment targets.

    Args:
        init_values: initial layer scale of the encoder; 0 leaves it out.
        decoder_embed_dim: width D of regressor and decoder. decoder_num_heads: heads of both.
        decoder_layer_scale_init_value: initial layer scale of both.
        decoder_num_classes: number of visual tokens, K.
        fix_init_weight: keep the truncated normal initialisation, divided by sqrt(2 layer), instead of Xavier's.
        base_momentum: m; the targets come from a moving average of the encoder's weights, m average + (1 - m) encoder
            after each forward pass, as in the authors' earlier revision; None: from the encoder's weights themselves.
        num_out_dim: no effect; belongs to CAE v2.
    Raises:
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Norm = LayerNorm,
        init_values: float = 0.1,
        decoder_num_classes: int = 8192,
        decoder_embed_dim: int = 768,
        regressor_depth: int = 4,
        decoder_depth: int = 4,
        decoder_num_heads: int = 12,
        decoder_layer_scale_init_value: float = 0.1,
        fix_init_weight: bool = False,
        base_momentum: float | None = None,
        model_type: str = "cae",
        num_out_dim: int = 512,
    ):
        super().__init__()
        if model_type != "cae":
            raise ValueError(f"model_type is {model_type!r}, expected cae (CAE v2 is not supported)")
        if regressor_depth < 1 or decoder_depth < 1:
            raise ValueError(
                f"regressor_depth {regressor_depth} and decoder_depth {decoder_depth}: expected at least 1"
            )
        if base_momentum is not None and not 0 <= base_momentum <= 1:
            raise ValueError(f"base_momentum is {base_momentum}, expected 0 to 1")
        self.base_momentum = base_momentum
        common = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "norm_layer": norm_layer}
        common["drop_path_rate"] = drop_path_rate
        own = {"init_values": init_values, **common}

        def encoder() -> VisionTransformerEncoder:
            return VisionTransformerEncoder(img_size, patch_size, in_chans, embed_dim, depth, num_heads, **own)

        # Registration order is upstream's: optimizer states refer to parameters by position.
        grid = (img_size // patch_size, img_size // patch_size)
        # rd_pos_embed: positions (1, 1 + N, D) of regressor and decoder; the first row, the class token's, is not used.
        self.rd_pos_embed = nn.Parameter(sincos_pos_embed(decoder_embed_dim, grid), requires_grad=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))  # (1, 1, D)
        self.encoder = encoder()
        self.alignment_encoder = encoder().requires_grad_(False)
        self.encoder_to_regresser = self.encoder_to_regresser_norm = None
        if decoder_embed_dim != embed_dim:
            self.encoder_to_regresser = nn.Linear(embed_dim, decoder_embed_dim)
            self.encoder_to_regresser_norm = norm_layer(decoder_embed_dim)
        sizes = {"dim": decoder_embed_dim, "num_heads": decoder_num_heads, **common}
        sizes["init_values"] = decoder_layer_scale_init_value
        self.regresser = VisionTransformerRegressor(depth=regressor_depth, **sizes)
        self.decoder = VisionTransformerDecoder(decoder_num_classes, depth=decoder_depth, **sizes)
        self.initialise(fix_init_weight)
        self.alignment_encoder.load_state_dict(self.encoder.state_dict())
        self._tie()
        self.register_load_state_dict_pre_hook(self._complete)

    # ---- alignment: the targets and the encoder that makes them

    @torch.no_grad()
    def alignment_target(self, x: Tensor, patches: Tensor, masked: Tensor) -> Tensor:
        """Target latents: the masked patches alone, through the encoder.

        The network's only gradient stop. The weights are the encoder's own of this very step (`_tie`), or, with
        `base_momentum`, the moving average; the pass has its own draws of stochastic depth, as upstream.
        Args:
            x: (B, 3, H, W), images. patches: (B, N, C), as the encoder embedded them. masked: (B, M), indices.
        Returns:
            (B, M, D); the class token's row is left out.
        """
        if self.base_momentum is not None:
            patches = self.alignment_encoder.patch_embed(x)
        return self._to_regressor(self.alignment_encoder(patches, masked))[:, 1:]

    def _tie(self) -> None:
        """Let the targets' encoder share the encoder's weights, in the same memory, unless it averages them."""
        if self.base_momentum is None:
            for alias, param in zip(self.alignment_encoder.parameters(), self.encoder.parameters(), strict=True):
                alias.data = param.data

    def _apply(self, fn: Callable, recurse: bool = True) -> "ContextAutoencoderViT":
        super()._apply(fn, recurse)  # type: ignore[misc]
        self._tie()  # moving parameters to a device parts them
        return self

    def __deepcopy__(self, memo: dict) -> "ContextAutoencoderViT":
        """A copy whose targets' encoder shares the copy's weights."""
        memo[id(self)] = new = self.__class__.__new__(self.__class__)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new._tie()
        return new

    def _complete(self, _module: nn.Module, state: dict, prefix: str, *_) -> None:
        """Read files of the earlier revision, and those without the targets' encoder, or with an older state of it."""
        for key in [key for key in state if key.startswith(prefix)]:
            state[prefix + name_today(key.removeprefix(prefix))] = state.pop(key)
        state.setdefault(f"{prefix}rd_pos_embed", self.rd_pos_embed)
        source = f"{prefix}encoder."
        for key in [k for k in state if k.startswith(source)]:
            alias = f"{prefix}alignment_encoder.{key.removeprefix(source)}"
            if self.base_momentum is None or alias not in state:
                state[alias] = state[key]

    @torch.no_grad()
    def _update_teacher(self) -> None:
        """Move the average of `base_momentum`; with shared weights there is nothing to do."""
        if self.base_momentum is not None:
            for own, new in zip(self.alignment_encoder.parameters(), self.encoder.parameters(), strict=True):
                own.lerp_(new, 1 - self.base_momentum)

    # ---- initialisation

    @torch.no_grad()
    def initialise(self, fix_init_weight: bool) -> None:
        """Xavier-uniform linear layers, or, with fix_init_weight, truncated normal ones rescaled by depth.

        As upstream: with fix_init_weight the projection to the regressor's width keeps torch's initialisation.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and not (fix_init_weight and module is self.encoder_to_regresser):
                truncated_(module.weight) if fix_init_weight else nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if fix_init_weight:
            rescale_by_depth([(b.attn.proj, b.mlp.fc2) for b in self.encoder.blocks])  # type: ignore[union-attr]
            regressor, decoder = self.regresser.regressor_blocks, self.decoder.decoder_blocks
            rescale_by_depth([(b.cross_attn.proj, b.mlp_cross.fc2) for b in regressor])  # type: ignore[union-attr]
            rescale_by_depth([(b.attn.proj, b.mlp.fc2) for b in decoder])  # type: ignore[union-attr]
        truncated_(self.encoder.patch_embed.proj.weight)
        assert self.encoder.patch_embed.proj.bias is not None
        nn.init.zeros_(self.encoder.patch_embed.proj.bias)
        truncated_(self.encoder.cls_token)
        truncated_(self.mask_token)

    # ---- network

    def _to_regressor(self, x: Tensor) -> Tensor:
        """Latents at the regressor's width, (B, T, C) -> (B, T, D)."""
        if self.encoder_to_regresser is None:
            return x
        return self.encoder_to_regresser_norm(self.encoder_to_regresser(x))  # type: ignore[misc]

    def forward(
        self, x: Tensor, bool_masked_pos: Tensor, num_masked: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the masked patches.

        Args:
            x: (B, 3, H, W) float, normalised.
            bool_masked_pos: (B, N) or (B, G, G) bool, True = masked; equally many in every row.
            num_masked: M; None counts it, which makes a GPU wait.
        Returns:
            logits of the visual tokens (B M, K), predicted latents (B, M, D), target latents (B, M, D); masked patches
            in their order in the image.
        Raises:
            ValueError: images or masks are not of the size the model was built for, or the masks' counts do not fit.
        """
        mask = bool_masked_pos.flatten(1).bool()
        expected = (len(x), self.encoder.patch_embed.num_patches)
        if mask.shape != expected:
            raise ValueError(f"the masks are {tuple(mask.shape)}, expected {expected}")
        if num_masked is None or not mask.is_cuda:  # on a CPU a look at them is free
            counts = mask.sum(dim=1)
            num_masked = int(counts[0]) if num_masked is None else num_masked
            if not bool((counts == num_masked).all()) or not 0 < num_masked < expected[1]:
                raise ValueError(
                    f"the masks hide {counts.tolist()} of {expected[1]} patches, expected equally many, not none or all"
                )
        visible, masked = split_patches(mask, num_masked)  # (B, V), (B, M)
        patches = self.encoder.patch_embed(x)  # (B, N, C), embedded once for both passes
        latents = self._to_regressor(self.encoder(patches, visible))  # (B, 1 + V, D)
        # After the encoder: weights that autocast casts and keeps without gradient here would have none there.
        target = self.alignment_target(x, patches, masked)  # (B, M, D)
        self._update_teacher()
        pos = rows_at(self.rd_pos_embed[0, 1:], torch.cat([visible, masked], dim=1))  # (B, V + M, D)
        q = self.mask_token.expand(len(x), num_masked, -1)  # (B, M, D)
        predicted = self.regresser(q, latents[:, 1:], pos)  # (B, M, D); row 0 is the class token's
        logits = self.decoder(predicted + pos[:, visible.shape[1] :])  # (B M, K)
        return logits, predicted, target


def cae_loss(
    logits: Tensor, predicted: Tensor, target: Tensor, labels: Tensor, align_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """CAE's loss (arXiv 2202.03026): decoding + λ alignment, the authors' λ being 2 (README).

    Args:
        logits, predicted, target: as `ContextAutoencoderViT.forward` returns them; the target is a constant.
        labels: (B M,), the masked patches' visual tokens. align_weight: λ.
    Returns:
        the sum, () float32; cross entropy of the tokens, (); λ times the mean squared error of the latents, ().
    """
    main = F.cross_entropy(logits.float(), labels)
    align = align_weight * F.mse_loss(predicted.float(), target.detach().float())
    return main + align, main, align


def cae_tiny_patch16_224_8k_vocab(**kwargs) -> ContextAutoencoderViT:
    return ContextAutoencoderViT(**{"embed_dim": 192, "depth": 12, "num_heads": 12, **kwargs})


def cae_small_patch16_224_8k_vocab(**kwargs) -> ContextAutoencoderViT:
    return ContextAutoencoderViT(**{"embed_dim": 384, "depth": 12, "num_heads": 12, **kwargs})


def cae_base_patch16_224_8k_vocab(**kwargs) -> ContextAutoencoderViT:
    return ContextAutoencoderViT(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **kwargs})


def cae_large_patch16_224_8k_vocab(**kwargs) -> ContextAutoencoderViT:
    return ContextAutoencoderViT(**{"embed_dim": 1024, "depth": 24, "num_heads": 16, **kwargs})


def cae_nano(**kwargs) -> ContextAutoencoderViT:  # ours: for digits on a CPU
    sizes = {"embed_dim": 96, "depth": 4, "num_heads": 3, "decoder_embed_dim": 96, "decoder_num_heads": 3}
    return ContextAutoencoderViT(**{**sizes, **kwargs})


MODELS = {
    f.__name__: f
    for f in (
        cae_tiny_patch16_224_8k_vocab,
        cae_small_patch16_224_8k_vocab,
        cae_base_patch16_224_8k_vocab,
        cae_large_patch16_224_8k_vocab,
        cae_nano,
    )
}
