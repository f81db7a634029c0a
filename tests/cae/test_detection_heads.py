"""Mask R-CNN on given maps against mmdetection's heads, and what its parts do with unusual boxes."""

import pytest
import torch
from torch import nn

from cae import detection_heads as heads
from common.dense_datasets.detection import ImageInfo
from tests.support import detection
from tests.support.helpers import assert_close, golden_files, load_golden

RULE = heads.Matching(0.7, 0.3, low_quality=0.3, number=4, positive_fraction=0.5)


@golden_files("cae", "det_mask_rcnn")
def test_losses_and_gradients_as_mmdetection(path):
    detection.check_training(load_golden(path), heads)


@golden_files("cae", "det_mask_rcnn")
def test_detections_as_mmdetection(path):
    detection.check_detections(load_golden(path), heads)


def test_changes_of_boxes_are_undone():
    boxes, objects = torch.tensor([[10.0, 20, 30, 80]]), torch.tensor([[12.0, 8, 40, 60]])
    deltas = heads.encode(boxes, objects, heads.REGION_STDS)
    assert_close(heads.decode(boxes, deltas, heads.REGION_STDS), objects, rtol=1e-5, atol=0)
    changed = heads.decode(boxes, torch.tensor([[0.0, 0, 99, -99]]), heads.REGION_STDS)
    w, h = (changed[0, 2:] - changed[0, :2]).tolist()
    assert (w, h) == pytest.approx((20 * 62.5, 60 / 62.5))


def test_each_object_takes_all_boxes_that_tie_its_best_overlap():
    objects = torch.tensor([[0.0, 0, 10, 10], [100, 0, 110, 10], [100, 0, 110, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 5], [0, 5, 10, 10], [0, 4, 10, 8], [100, 0, 110, 10], [50, 50, 60, 60]])
    # Halves of the first object tie at 0.5; the last of two equal objects wins; 0.4 is neither; the rest is background.
    assert heads.assign(boxes, objects, RULE).tolist() == [0, 0, heads.IGNORED, 2, heads.BACKGROUND]
    alone = heads.assign(boxes, objects, RULE._replace(low_quality=None))
    assert alone.tolist() == [heads.IGNORED] * 3 + [1, heads.BACKGROUND]


def test_samples_are_filled_up_with_background():
    match = torch.tensor([heads.BACKGROUND] * 9 + [0, 1, 2, heads.IGNORED])
    positive, negative = heads.sample(match, RULE)
    assert len(positive) == len(negative) == 2
    assert (match[positive] >= 0).all()
    assert (match[negative] == heads.BACKGROUND).all()
    positive, negative = heads.sample(match[:10], RULE)
    assert (len(positive), len(negative)) == (1, 3)


def test_suppression_stays_within_groups_and_keeps_the_order_of_ties():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).expand(4, 4)
    scores, groups = torch.tensor([0.5, 0.5, 0.5, 0.9]), torch.tensor([0, 1, 1, 2])
    assert heads.nms_within(groups, boxes, scores, 0.5).tolist() == [3, 0, 1]
    assert len(heads.nms_within(groups[:0], boxes[:0], scores[:0], 0.5)) == 0


def test_masks_are_pasted_at_pixel_centres_and_cropped_back():
    box = torch.tensor([[2.0, 1, 6, 5]])
    pasted = heads.paste_masks(torch.tensor([[[1.0, 0], [1, 0]]]), box, (6, 8))
    assert pasted.nonzero()[:, 1:].tolist() == [[y, x] for y in range(1, 5) for x in (2, 3)]
    assert heads.crop_masks(pasted, box, 2).tolist() == [[[1.0, 0], [1, 0]]]
    outside = torch.tensor([[-9.0, -9, -1, -1], [3, 3, 3, 3]])
    assert not heads.paste_masks(torch.ones(2, 2, 2), outside, (6, 8)).any()


def small_network(**kwargs) -> heads.MaskRCNN:
    torch.manual_seed(0)
    box_head = heads.BoxHead(8, 3, num_convs=1, conv_channels=8, num_fcs=1, fc_channels=8, norm=True)
    mask_head = heads.MaskHead(8, 3, num_convs=1, channels=8, norm=True)
    neck, rpn = heads.FPN([4] * 4, 8, num_outs=5), heads.RPNHead(8, 8)
    return heads.MaskRCNN(nn.Identity(), neck, rpn, heads.RoIHead(box_head, mask_head, **kwargs))


@pytest.mark.parametrize("giou_weight", [0.0, 10.0])
def test_images_without_objects_give_finite_losses_and_gradients(giou_weight):
    model = small_network(giou_weight=giou_weight).train()
    maps = [torch.randn(1, 4, 32 // s, 32 // s) for s in (1, 2, 4, 8)]
    info = ImageInfo((128, 128), (128, 128), (128, 128), (1.0, 1.0), 0)
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "masks": torch.zeros(0, 128, 128).byte()}
    losses = model(maps, [info], [none])
    assert losses["loss_bbox"] == losses["loss_mask"] == losses["loss_rpn_bbox"] == 0
    torch.stack(list(losses.values())).sum().backward()
    for name, p in model.named_parameters():  # every process of several takes part in every sum of gradients
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert all(x.isfinite().all() for x in model.buffers())


def test_nothing_found_is_no_object():
    model = small_network(score_threshold=1.0).eval()
    info = ImageInfo((100, 90), (128, 96), (50, 45), (2.0, 2.0), 0)
    with torch.no_grad():
        (found,) = model([torch.randn(1, 4, 32 // s, 24 // s) for s in (1, 2, 4, 8)], [info])
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
        "masks": (0, 50, 45),
    }
