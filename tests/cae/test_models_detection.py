"""CAE's Mask R-CNN: names, sizes and initial weights of the authors' networks, and what a small one learns."""

import pytest
import torch

from cae.models_detection import MODELS
from tests.support import detection

# Parameters of the authors' base network, frozen positions included.
PARTS = {"backbone": 94_930_944, "neck": 3_147_776, "rpn_head": 593_935, "roi_head": 15_618_449 + 2_643_280}


def test_parameters_of_the_papers_networks():
    with torch.device("meta"):
        base, large = MODELS["mask_rcnn_cae_base"](), MODELS["mask_rcnn_cae_large"]()
    assert detection.parameters(base) == PARTS
    assert detection.parameters(base.roi_head) == {"bbox_head": 15_618_449, "mask_head": 2_643_280}
    assert sum(detection.parameters(base).values()) == 116_934_384
    assert sum(detection.parameters(large).values()) == 340_901_616
    assert base.rpn_head.train_proposals == (2000, 2000)
    assert base.roi_head.giou_weight == 10


def test_names_and_initial_weights():
    model = MODELS["mask_rcnn_cae_nano"](num_classes=3)
    detection.assert_names(model, convs=4, fcs=1, box_norm=True)
    detection.assert_initial_weights(model)


def test_every_weight_learns():
    torch.manual_seed(0)
    detection.assert_learns(MODELS["mask_rcnn_cae_nano"](num_classes=3), frozen=("backbone.pos_embed",))


@pytest.mark.slow
def test_four_images_are_learned_by_heart(tmp_path):
    torch.manual_seed(0)
    scores = detection.overfit(MODELS["mask_rcnn_cae_nano"](num_classes=6, drop_path_rate=0.0), tmp_path, 200, 1e-3)
    assert scores["box_AP"] > 90, scores
    assert scores["mask_AP"] > 90, scores
