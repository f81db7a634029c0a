"""How pre-training starts from weights (--initial_checkpoint): a pre-training file, or the ViT of any program."""

import math

import torch
from torch import Tensor

from cae.blocks import sincos_pos_embed
from cae.models_cae import ContextAutoencoderViT, name_today
from common import distributed

OWN = ("regresser.", "pretext_neck.")  # names that only a pre-training file has, of either revision
COPIES = ("alignment_encoder.", "teacher.")  # modules that start as copies of the encoder


def start_from(model: ContextAutoencoderViT, weights: dict[str, Tensor], path: str) -> None:
    """Take what fits: the encoder, and of a pre-training file the regressor and the decoder, too.

    The targets' encoder becomes a copy of the encoder. Positions of another grid are resized as by fine-tuning: the
    fixed ones of sine and cosine are those of the network, others are interpolated; all stay fixed. The norm of pooled
    features is taken where the file has no other. Layer scale is 1 where the file has none.
    Args:
        weights: as `distributed.initial_weights` gives them. path: of their file.
    Raises:
        distributed.UserError: nothing of the encoder fits.
    """
    from cae.models_vit import interpolate_pos_embed  # SciPy, which it imports, takes a second

    own = model.encoder.state_dict()

    def resize(pos: Tensor) -> Tensor:
        """Positions (1, 1 + N, C) on the encoder's grid."""
        side, table = math.isqrt(pos.shape[1] - 1), own["pos_embed"]
        if pos.shape[1] == side**2 + 1 and pos.shape[2] == table.shape[2]:
            fixed = sincos_pos_embed(pos.shape[2], (side, side)).to(pos)
            if torch.allclose(pos, fixed, atol=1e-4):
                return table
        return interpolate_pos_embed(pos, model.encoder.patch_embed.grid_size)

    encoder, others = distributed.fitted_vit(weights, own)
    for kind in ("weight", "bias"):
        if f"fc_norm.{kind}" in others:
            encoder.setdefault(f"norm.{kind}", others.pop(f"fc_norm.{kind}"))
    found = {f"{copy}{name}": value for copy in ("encoder.", COPIES[0]) for name, value in encoder.items()}
    if any(name.startswith(OWN) for name in others):  # another program's mask_token, for one, does not fit
        others = {name: value for name, value in others.items() if not name.startswith(COPIES)}
        found |= {name_today(name): others.pop(name) for name in list(others)}
    distributed.take_weights(
        model,
        found,
        others,
        path,
        "encoder.",
        f"a ViT of {len(model.encoder.blocks)} blocks and width {model.encoder.cls_token.shape[-1]}",
        {"pos_embed": resize},
    )
