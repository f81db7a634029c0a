"""UDI's Mask R-CNN: names, sizes and initial weights of the authors' network, and what a small one learns."""

import pytest
import torch

from tests.support import detection
from udi.models_detection import HEADS, mask_rcnn

NANO = {"arch": "vit_nano", **HEADS["narrow"]}


def test_parameters_of_the_authors_network():
    with torch.device("meta"):
        model = mask_rcnn()
    parts = detection.parameters(model)
    assert parts["neck"] == 4 * (384 * 256 + 256 + 256 * 256 * 9 + 256)
    assert parts["rpn_head"] == 593_935
    two_layers = 256 * 49 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * (81 + 320) + 81 + 320
    assert detection.parameters(model.roi_head) == {"bbox_head": two_layers, "mask_head": 2_643_280}
    assert (model.rpn_head.train_proposals, model.roi_head.giou_weight) == ((2000, 1000), 0)


def test_names_and_initial_weights():
    model = mask_rcnn(num_classes=3, **NANO)
    detection.assert_names(model, convs=0, fcs=2, box_norm=False)
    detection.assert_initial_weights(model)


def test_every_weight_learns():
    torch.manual_seed(0)
    detection.assert_learns(mask_rcnn(num_classes=3, **NANO))


@pytest.mark.slow
def test_four_images_are_learned_by_heart(tmp_path):
    torch.manual_seed(0)
    scores = detection.overfit(mask_rcnn(num_classes=6, drop_path_rate=0.0, **NANO), tmp_path, 300, 1e-3)
    assert scores["box_AP"] > 90, scores
    assert scores["mask_AP"] > 90, scores
