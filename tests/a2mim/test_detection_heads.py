"""Mask R-CNN on given maps against mmdetection's heads."""

from a2mim import detection_heads as heads
from tests.support import detection
from tests.support.helpers import golden_files, load_golden


@golden_files("a2mim", "det_mask_rcnn")
def test_losses_and_gradients_as_mmdetection(path):
    detection.check_training(load_golden(path), heads)


@golden_files("a2mim", "det_mask_rcnn")
def test_detections_as_mmdetection(path):
    detection.check_detections(load_golden(path), heads)
