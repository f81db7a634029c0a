"""The encoders for torch.hub, by method and network: saim_vit_base_patch16, cae_base_patch16_224, udi_vit_small, ...

`torch.hub.load(DIR, "saim_vit_base_patch16", source="local", weights=FILE)`, with the path of this folder as DIR, is a
module from images (N, 3, H, W), normalised by its attributes mean and std, to features (N, D).
"""

import functools  # modules alone: torch.hub.list shows what can be called

import a2mim.backbones
import cae.models_vit
import saim.models_vit
import semaim.models_vit
import udi.models_udi
from scripts.tools.encoders import backbone, load

dependencies = ["torch", "torchvision", "timm", "numpy"]


def _encoder(
    method: str, model: str, weights: str = "", input_size: int | None = None, key: str = "", pool: str = ""
) -> backbone.Backbone:
    """An encoder in eval mode, with the attributes input_size, mean, std, embed_dim and head (of a classifier).

    Args:
        weights: checkpoint of any stage, ours or the authors', as a file or an https address; '' gives random weights.
        input_size: side of the images in pixels, to which positions are resized; None: the checkpoint's, else 224.
        key: under which the file holds the weights; '': of the network that went on training.
        pool: token (the class token) or avg (the mean of the patches); '': as the method's own evaluations.
    Raises:
        common.distributed.UserError: the file cannot be read or holds no such encoder.
    """
    return load.load_backbone(method, weights, model, input_size, key, pool)


_MODELS = {
    "saim": saim.models_vit.MODELS,
    "semaim": semaim.models_vit.MODELS,
    "cae": cae.models_vit.MODELS,
    "a2mim": a2mim.backbones.BACKBONES,
    "udi": udi.models_udi.MODELS,
}
for _method, _models in _MODELS.items():
    for _model in _models:
        _entry = functools.partial(_encoder, _method, _model)
        globals()[f"{_method}_{_model.removeprefix(_method + '_')}"] = functools.update_wrapper(_entry, _encoder)
