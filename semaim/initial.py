"""How pre-training starts from weights (--initial_checkpoint): a pre-training file, or the ViT of any program."""

from torch import Tensor

from common import distributed
from semaim.models_semaim import AimViT as Network
from semaim.models_vit import interpolate_pos_embed

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
DECODER = ("query_blocks.", "prediction_head.")


# same as saim/initial.py
def start_from(model: Network, weights: dict[str, Tensor], path: str) -> None:
    """Take what fits: the encoder, and of a pre-training file the decoder, too.

    Positions of another grid are resized as by fine-tuning, and stay fixed. As there, the encoder's final norm is the
    one called `norm`. Layer scale is multiplied into the layers before it; relative positions have no place here.
    Args:
        weights: as `distributed.initial_weights` gives them. path: of their file.
    Raises:
        distributed.UserError: nothing of the encoder fits.
    """
    decoder = {name: value for name, value in weights.items() if name.startswith(DECODER)}
    if model.query_blocks is model.blocks:
        decoder = {}  # shared blocks are the encoder's
    others = {name: value for name, value in weights.items() if not name.startswith((*DECODER, "gaussian_blur."))}
    own = [name for name in model.state_dict() if name.startswith(ENCODER)]
    encoder, others = distributed.fitted_vit(others, own)
    distributed.take_weights(
        model,
        encoder | decoder,
        others,
        path,
        ENCODER,
        f"a ViT of {len(model.blocks)} blocks and width {model.cls_token.shape[-1]}",
        {"pos_embed": lambda pos: interpolate_pos_embed(pos, model.patch_embed.grid_size)},
    )
