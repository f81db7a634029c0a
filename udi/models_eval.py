"""The ViT of the semi-supervised and transfer evaluations, and a head that keeps layers of the projection head.

B batch, c class tokens, N patches, D width, K classes.
"""

import sys
from pathlib import Path

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.distributed import UserError, log
from udi.backbone import build_backbone
from udi.models_udi import Attention, LayerNorm, Mlp, VisionTransformer, WeightNormLinear, init_weights


class DropAttention(Attention):
    """Attention with dropout of its weights and of its output."""

    def __init__(self, like: Attention, attn_drop: float, drop: float):
        dim = like.proj.in_features
        super().__init__(dim, like.num_heads, like.qkv.bias is not None, like.scale)
        self.attn_drop, self.drop = attn_drop, drop

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        rate = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, scale=self.scale).transpose(1, 2).flatten(2)
        return F.dropout(self.proj(y), self.drop, self.training)


class DropMlp(Mlp):
    """Dropout after both layers."""

    def __init__(self, like: Mlp, drop: float):
        super().__init__(like.fc1.in_features, like.fc1.out_features)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.gelu(self.fc1(x)), self.drop, self.training)
        return F.dropout(self.fc2(x), self.drop, self.training)


class EvaluationViT(VisionTransformer):
    """ViT with a head on the first class token, or on the mean of the patches.

    Args:
        avgpool_patchtokens: 1 puts the normalised mean of the patches in place of the first class token.
        drop_rate, attn_drop_rate: dropout of layers and of attention. kwargs: of `VisionTransformer`.
    """

    def __init__(self, avgpool_patchtokens: int = 0, drop_rate: float = 0.0, attn_drop_rate: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        if not (0 <= drop_rate < 1 and 0 <= attn_drop_rate < 1):
            raise ValueError(f"dropout of {drop_rate} and {attn_drop_rate}: expected at least 0, less than 1")
        self.avgpool_patchtokens, self.drop_rate = avgpool_patchtokens, drop_rate
        if avgpool_patchtokens:
            self.norm = nn.Identity()
            self.fc_norm = LayerNorm(self.embed_dim)
        if drop_rate or attn_drop_rate:
            for block in self.blocks:
                block.attn = DropAttention(block.attn, attn_drop_rate, drop_rate)  # type: ignore[arg-type]
                block.mlp = DropMlp(block.mlp, drop_rate)  # type: ignore[arg-type]
            self.blocks.apply(init_weights)
        self.head: nn.Module = nn.Identity()

    def embed(self, x: Tensor) -> Tensor:
        """Tokens (B, c + N, D) of images (B, 3, H, W)."""
        return F.dropout(super().embed(x), self.drop_rate, self.training)

    def all_tokens(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> tokens (B, c + N, D), the first one being the head's input."""
        tokens = self.norm(self.forward_tokens(x))
        if not self.avgpool_patchtokens:
            return tokens
        mean = self.fc_norm(tokens[:, self.num_class_token :].mean(dim=1))
        return torch.cat([mean[:, None], tokens[:, 1:]], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> what the head makes of their features: logits (B, K)."""
        return self.head(self.all_tokens(x)[:, 0])


class ClassProjHead(nn.Module):
    """The first layers of a projection head, then a linear classifier.

    Args:
        out_dim: prototypes. cls_dim: classes.
        finetune_layer: 1 to nlayers - 1 keep that many layers of the MLP; nlayers keeps all, and the prototypes.
    Raises:
        ValueError: there are fewer layers.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        cls_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        finetune_layer: int = 1,
        nlayers: int = 3,
    ):
        super().__init__()
        if not 1 <= finetune_layer <= nlayers:
            raise ValueError(f"{finetune_layer} layers of a projection head: expected 1 to {nlayers}")
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim][: finetune_layer + 1]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False), 1):
            layers += [nn.Linear(a, b), *([nn.GELU()] if i < nlayers else [])]
        self.mlp = nn.Sequential(*layers)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim) if finetune_layer == nlayers else None
        self.cls_head = nn.Linear(widths[-1] if self.last_layer is None else out_dim, cls_dim)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> logits (B, K)."""
        x = self.mlp(x)
        if self.last_layer is not None:
            x = self.last_layer(F.normalize(x, dim=-1))
        return self.cls_head(x)


def build_evaluation_vit(
    arch: str, patch_size: int, weights: dict[str, Tensor] | None, img_size: int = 224, **keywords
) -> EvaluationViT:
    """An `EvaluationViT` without a head; keywords are its own, the rest as `build_backbone`.

    Raises:
        UserError: the weights are of another ViT.
    """
    own = {name: keywords.pop(name) for name in ("avgpool_patchtokens", "drop_rate", "attn_drop_rate")}
    plain = build_backbone(arch, patch_size, weights, img_size, **keywords)
    with distributed.user_errors("--drop and --attn_drop_rate"):
        model = EvaluationViT(
            **own,
            img_size=[plain.patch_size * round((plain.pos_embed.shape[1] - plain.num_class_token) ** 0.5)],
            patch_size=plain.patch_size,
            in_chans=plain.patch_embed.proj.in_channels,
            num_class_token=plain.num_class_token,
            embed_dim=plain.embed_dim,
            depth=len(plain.blocks),
            num_heads=plain.blocks[0].attn.num_heads,  # type: ignore[union-attr,arg-type]
            drop_path_rate=keywords.get("drop_path_rate", 0.0),
        )
    found = plain.state_dict()
    if own["avgpool_patchtokens"]:  # has its own norm
        found = {name: value for name, value in found.items() if not name.startswith("norm.")}
    model.load_state_dict({**model.state_dict(), **found})
    return model


def linear_head(dim: int, classes: int) -> nn.Linear:
    """A classifier with fresh weights."""
    head = nn.Linear(dim, classes)
    init_weights(head)
    return head


def load_head(checkpoint: dict, checkpoint_key: str, path: str) -> dict[str, Tensor]:
    """The weights of a checkpoint's projection head, `mlp.*` and `last_layer.*`.

    Raises:
        UserError: it has none.
    """
    found = checkpoint.get(checkpoint_key)
    state = found if isinstance(found, dict) else checkpoint
    head = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        if name.startswith("head.") and isinstance(value, Tensor):
            # All levels of the loss share the head that upstream stores as head.0, head.1, ...
            head.setdefault(name.removeprefix("head.").removeprefix("0."), value)
    head = {name: value for name, value in head.items() if name.startswith(("mlp.", "last_layer."))}
    if "mlp.0.weight" not in head:
        raise UserError(f"{path}: holds no projection head under '{checkpoint_key}'; --random_head takes a fresh one")
    return head


def build_proj_head(
    dim: int, classes: int, layer: int, out_dim: int, weights: dict[str, Tensor] | None
) -> ClassProjHead:
    """A `ClassProjHead` that keeps `layer` layers of a projection head's weights, or fresh ones of the usual size.

    Raises:
        UserError: it has no so many layers, or is of another backbone.
    """
    sizes = {"out_dim": out_dim}
    if weights is not None:
        names = [name for name in ("mlp.0.weight", "mlp.2.weight", "mlp.4.weight") if name in weights]
        sizes["hidden_dim"] = weights[names[0]].shape[0]
        if "mlp.4.weight" in weights:
            sizes["bottleneck_dim"] = weights["mlp.4.weight"].shape[0]
        if layer == 3 and "last_layer.weight_v" in weights:
            found = weights["last_layer.weight_v"].shape[0]
            if found != out_dim:
                log(f"--out_dim {out_dim}: the checkpoint has {found} prototypes, which are taken")
            sizes["out_dim"] = found
    with distributed.user_errors(f"--finetune_head_layer {layer}"):
        head = ClassProjHead(in_dim=dim, cls_dim=classes, finetune_layer=layer, **sizes)
        if weights is not None:
            state = head.state_dict()
            kept = [name for name in state if not name.startswith("cls_head.")]
            missing = [name for name in kept if name not in weights]
            if missing:
                raise ValueError(f"the checkpoint's projection head has no {missing[0]}")
            head.load_state_dict({**state, **{name: weights[name] for name in kept}})
            log(f"the head keeps {layer} layers of the pretrained projection head: {', '.join(kept)}")
    return head
