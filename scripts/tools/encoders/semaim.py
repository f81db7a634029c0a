"""SemAIM's encoders: the ViT of pre-training, of its moving average, of fine-tuning and of linear probes."""

from scripts.tools.encoders import saim
from scripts.tools.encoders.backbone import Backbone, Source
from semaim.models_vit import MODELS, load_pretrained

# The encoders of pre-training networks.
ENCODERS = {f"aim_{size}": f"vit_{size}_patch16" for size in ("base", "large", "small", "tiny", "nano")}
ENCODERS |= {"aim_huge": "vit_huge_patch14", "saim_base": "vit_base_patch16"}  # the last is upstream's default name


def load_backbone(source: Source) -> Backbone:
    return saim.load_vit(source, MODELS, ENCODERS, load_pretrained, resized=512)  # by k-NN


timm_form = saim.timm_form
