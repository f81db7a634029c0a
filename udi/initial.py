"""How pre-training starts from weights (--initial_checkpoint): a pre-training file, or the ViT of any program."""

import math

import torch
from torch import Tensor

from common import distributed
from udi.models_udi import MultiCropWrapper

VIT = "backbone.backbone."


def start_from(student: MultiCropWrapper, weights: dict[str, Tensor], path: str) -> None:
    """Take what fits: the ViT, and of a pre-training file SRS and the head, too.

    Of a pre-training file the weights are the teacher's, which evaluations read, too. Positions of another grid are
    resized as by fine-tuning. A file with one class token gives the first one. Layer scale is multiplied into the
    layers before it; relative positions have no place here.
    Args:
        weights: as `distributed.initial_weights` gives them. path: of their file.
    Raises:
        distributed.UserError: nothing of the ViT fits.
    """
    from udi.models_finetune import interpolate_pos_embed  # SciPy, which it imports, takes a second

    vit = student.backbone.backbone
    own = {name: value.cpu() for name, value in vit.state_dict().items()}
    count = vit.num_class_token
    encoder, others = distributed.fitted_vit(weights, own, count)
    had = encoder["cls_token"].shape[1] if "cls_token" in encoder else 1
    if "pos_embed" in encoder and encoder["pos_embed"].shape[2] == vit.embed_dim:
        front, patches = encoder["pos_embed"].tensor_split([had], dim=1)
        encoder["pos_embed"] = torch.cat([front, own["pos_embed"][:, had:count], patches], dim=1)
    if "cls_token" in encoder and encoder["cls_token"].shape[2] == vit.embed_dim:
        encoder["cls_token"] = torch.cat([encoder["cls_token"], own["cls_token"][:, had:]], dim=1)
    grid = math.isqrt(own["pos_embed"].shape[1] - count)
    distributed.take_weights(
        student,
        {VIT + name: value for name, value in encoder.items()} | others,
        (),
        path,
        VIT,
        f"a ViT of {len(vit.blocks)} blocks and width {vit.embed_dim}",
        {"pos_embed": lambda pos: interpolate_pos_embed(pos, grid, count)},
    )
