# same as cae/detection_heads.py
"""Mask R-CNN on the maps of any backbone: pyramid, proposals, classes, boxes, masks (He et al. 2017, Lin et al. 2017).

The rules and names are those of mmdetection, with which the papers' detectors were trained. torchvision brings the
operators; its own Mask R-CNN differs in most rules (rounded anchors, unaligned RoIAlign, other matches and losses).

Legend: B images, C channels, h w cells of a map, A anchors in a cell, N anchors of an image, G objects of an image,
R regions, K classes (0 ... K - 1, background K), m side of a mask. Boxes are (x0, y0, x1, y1) in pixels of the batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import (
    box_area,
    box_convert,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    nms,
    roi_align,
)

from common.dense_datasets.detection import ImageInfo

BACKGROUND, IGNORED = -1, -2  # matches of boxes that belong to no object
MAX_LOG_SCALE = math.log(1000 / 16)  # a box grows or shrinks by this factor at most
ANCHOR_STDS = (1.0, 1.0, 1.0, 1.0)  # what the RPN's changes of anchors are divided by
REGION_STDS = (0.1, 0.1, 0.2, 0.2)  # ... and the box head's changes of regions

Objects = list[dict[str, Tensor]]  # of each image: boxes (G, 4), labels (G,) from 0, masks; found ones: scores (G,)


def conv_unit(in_channels: int, out_channels: int, kernel_size: int, norm: bool, relu: bool = True) -> nn.Sequential:
    """Convolution of the same size, with a batch norm in place of its bias if `norm`, then ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=not norm)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    unit = nn.Sequential()
    unit.add_module("conv", conv)
    if norm:
        unit.add_module("bn", nn.BatchNorm2d(out_channels))
    if relu:
        unit.add_module("activate", nn.ReLU(inplace=True))
    return unit


def conv_units(in_channels: int, channels: int, number: int, norm: bool) -> nn.ModuleList:
    """3 x 3 units, one after the other."""
    return nn.ModuleList(conv_unit(channels if i else in_channels, channels, 3, norm) for i in range(number))


class FPN(nn.Module):
    """Feature pyramid: each map, fine to coarse, receives what the coarser ones know.

    Args:
        in_channels: of each map. num_outs: further maps halve the last one by skipping every second cell.
        norm: batch norms after the convolutions.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_outs: int, norm: bool = False):
        super().__init__()
        self.num_outs = num_outs
        self.lateral_convs = nn.ModuleList(conv_unit(c, out_channels, 1, norm, relu=False) for c in in_channels)
        self.fpn_convs = nn.ModuleList(conv_unit(out_channels, out_channels, 3, norm, relu=False) for _ in in_channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, h_i, w_i) -> `num_outs` maps (B, out_channels, h_i, w_i)."""
        sums = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], sums[i - 1].shape[-2:], mode="nearest")
        outs = [conv(x) for conv, x in zip(self.fpn_convs, sums, strict=True)]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], kernel_size=1, stride=2))
        return outs


# ---- boxes


def encode(boxes: Tensor, objects: Tensor, stds: Sequence[float]) -> Tensor:
    """What turns each box (n, 4) into its object (n, 4): moves in units of the box's size, logarithms of the growth."""
    source, target = box_convert(boxes, "xyxy", "cxcywh"), box_convert(objects, "xyxy", "cxcywh")
    moves = (target[:, :2] - source[:, :2]) / source[:, 2:]
    growth = (target[:, 2:] / source[:, 2:]).log()
    return torch.cat([moves, growth], dim=1) / boxes.new_tensor(stds)


def decode(boxes: Tensor, deltas: Tensor, stds: Sequence[float]) -> Tensor:
    """The boxes (..., 4) changed by `deltas` (..., 4), the inverse of `encode`; sizes change by 1000 / 16 at most."""
    source, deltas = box_convert(boxes, "xyxy", "cxcywh"), deltas * deltas.new_tensor(stds)
    centre = source[..., :2] + deltas[..., :2] * source[..., 2:]
    size = source[..., 2:] * deltas[..., 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp()
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


class Matching(NamedTuple):
    """Which boxes stand for which object, and how many boxes of an image enter the loss.

    Args:
        positive: a box stands for the object that it overlaps most, if their IoU is at least this.
        negative: it is background, if the largest IoU is below this.
        low_quality: beyond that, every object takes all boxes that tie its largest IoU, if that is at least this; of
            several objects the last one wins. None: no such matches.
        number: of boxes drawn. positive_fraction: at most this part of the number is positive.
    """

    positive: float
    negative: float
    low_quality: float | None
    number: int
    positive_fraction: float


def assign(boxes: Tensor, objects: Tensor, rule: Matching) -> Tensor:
    """Which object each box (n, 4) stands for: (n,) index into `objects` (G, 4), BACKGROUND or IGNORED."""
    if not len(boxes) or not len(objects):
        return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    overlap = box_iou(objects, boxes)  # (G, n)
    largest, index = overlap.max(dim=0)  # (n,)
    match = torch.where(largest < rule.negative, BACKGROUND, IGNORED)
    match = torch.where(largest >= rule.positive, index, match)
    if rule.low_quality is not None:
        best = overlap.max(dim=1, keepdim=True).values  # (G, 1)
        taken = (overlap == best) & (best >= rule.low_quality)  # (G, n)
        numbers = torch.arange(1, len(objects) + 1, device=boxes.device)[:, None]
        last = (taken * numbers).max(dim=0).values - 1  # (n,), -1 where no object takes the box
        match = torch.where(last >= 0, last, match)
    return match


def sample(match: Tensor, rule: Matching) -> tuple[Tensor, Tensor]:
    """Draw boxes by their matches (n,): indices of positives and of background, which fills up the number."""

    def draw(of: Tensor, most: int) -> Tensor:
        found = of.nonzero()[:, 0]
        return found if len(found) <= most else found[torch.randperm(len(found), device=found.device)[:most]]

    positive = draw(match >= 0, int(rule.number * rule.positive_fraction))
    return positive, draw(match == BACKGROUND, rule.number - len(positive))


def nms_within(groups: Tensor, boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Non-maximum suppression within each group: indices of the boxes (n, 4) that are kept, by falling score.

    Boxes of other groups are moved out of reach. (torchvision's batched_nms reorders boxes of equal scores.)
    """
    if not len(boxes):
        return groups
    return nms(boxes + (groups * (boxes.max() + 1))[:, None], scores, iou)


# ---- proposals


class RPNHead(nn.Module):
    """Region proposal network: which anchors hold an object, and how to fit them to it.

    Args:
        strides: pixels per cell of each map. scales: sides of the square anchors, in strides. ratios: height / width.
        inside_only: the loss leaves out anchors that cross the border of the unpadded image.
        train_proposals, test_proposals: proposals of a map before suppression, and of an image after it.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        scales: Sequence[float] = (8,),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        matching: Matching = Matching(0.7, 0.3, low_quality=0.3, number=256, positive_fraction=0.5),  # noqa: B008
        inside_only: bool = False,
        train_proposals: tuple[int, int] = (2000, 1000),
        test_proposals: tuple[int, int] = (1000, 1000),
        nms_iou: float = 0.7,
    ):
        super().__init__()
        self.strides, self.scales, self.ratios = strides, scales, ratios
        self.matching, self.inside_only = matching, inside_only
        self.train_proposals, self.test_proposals, self.nms_iou = train_proposals, test_proposals, nms_iou
        num_anchors = len(scales) * len(ratios)
        self.rpn_conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, num_anchors, 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * num_anchors, 1)
        for conv in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(conv.weight, std=0.01)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (B, C, h, w) -> per map: logits of an object (B, A, h, w), changes of the anchors (B, 4A, h, w)."""
        hidden = [F.relu(self.rpn_conv(x)) for x in maps]
        return [self.rpn_cls(x) for x in hidden], [self.rpn_reg(x) for x in hidden]

    def anchors(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """(h w A, 4) for each map of logits (B, A, h, w): cells row by row, in a cell ratio by ratio."""
        result = []
        for x, stride in zip(logits, self.strides, strict=True):
            sides = torch.tensor(self.scales, device=x.device) * stride
            roots = torch.tensor(self.ratios, device=x.device).sqrt()[:, None]
            half = torch.stack([sides * (1 / roots), sides * roots], dim=-1).reshape(-1, 2) / 2  # (A, 2) w and h
            rows, columns = (torch.arange(n, device=x.device) * stride for n in x.shape[-2:])
            centre = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)[:, :, None]  # (h, w, 1, 2) x, y
            result.append(torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4))
        return result

    def by_anchor(self, logits: Sequence[Tensor], deltas: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of `forward` in the order of `anchors`: per map (B, h w A) and (B, h w A, 4), full precision."""
        flat = [x.permute(0, 2, 3, 1).flatten(1).float() for x in logits]
        return flat, [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4).float() for x in deltas]

    def match(self, anchors: Tensor, info: ImageInfo, objects: Tensor) -> Tensor:
        """`assign` for anchors (N, 4) of an image; IGNORED in the padding that only the batch needs."""
        (height, width), (h, w) = info.padded, info.size
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        usable = (centres < anchors.new_tensor([width, height]) - 0.5).all(dim=1)  # whole pixels, but for rounding
        if self.inside_only:
            usable &= (anchors[:, :2] >= 0).all(dim=1) & (anchors[:, 2:] < anchors.new_tensor([w, h])).all(dim=1)
        match = torch.full((len(anchors),), IGNORED, device=anchors.device)
        match[usable] = assign(anchors[usable], objects, self.matching)
        return match

    def loss(
        self, logits: list[Tensor], deltas: list[Tensor], infos: list[ImageInfo], targets: Objects
    ) -> dict[str, Tensor]:
        """Cross-entropy of the sampled anchors and L1 of the positive ones' changes, both divided by their number."""
        anchors = torch.cat(self.anchors(logits))  # (N, 4)
        flat_logits, flat_deltas = (torch.cat(parts, dim=1) for parts in self.by_anchor(logits, deltas))
        class_loss, box_loss, count = flat_logits.new_zeros(()), flat_logits.new_zeros(()), 0
        for logit, delta, info, target in zip(flat_logits, flat_deltas, infos, targets, strict=True):
            match = self.match(anchors, info, target["boxes"])
            positive, negative = sample(match, self.matching)
            chosen = torch.cat([positive, negative])
            is_object = (match[chosen] >= 0).float()
            class_loss += F.binary_cross_entropy_with_logits(logit[chosen], is_object, reduction="sum")
            wanted = encode(anchors[positive], target["boxes"][match[positive]], ANCHOR_STDS)
            box_loss += F.l1_loss(delta[positive], wanted, reduction="sum")
            count += max(len(positive), 1) + max(len(negative), 1)
        return {"loss_rpn_cls": class_loss / count, "loss_rpn_bbox": box_loss / count}

    @torch.no_grad()
    def proposals(
        self, logits: list[Tensor], deltas: list[Tensor], infos: list[ImageInfo]
    ) -> list[tuple[Tensor, Tensor]]:
        """Boxes (n, 4) and scores (n,) of each image, by falling score; the module's mode chooses their number."""
        per_map, per_image = self.train_proposals if self.training else self.test_proposals
        levels = list(zip(self.anchors(logits), *self.by_anchor(logits, deltas), strict=True))
        result = []
        for i, info in enumerate(infos):
            parts = []  # of each map: boxes, scores, the map's number
            for level, (anchors, logit, delta) in enumerate(levels):
                score, top = logit[i].sigmoid().topk(min(per_map, len(anchors)))
                parts.append((decode(anchors[top], delta[i, top], ANCHOR_STDS), score, torch.full_like(top, level)))
            box, score, level = (torch.cat(x) for x in zip(*parts, strict=True))
            box = clip_boxes_to_image(box, info.size)
            solid = (box[:, 2:] > box[:, :2]).all(dim=1)
            box, score = box[solid], score[solid]
            keep = nms_within(level[solid], box, score, self.nms_iou)[:per_image]
            result.append((box[keep], score[keep]))
        return result


# ---- classes, boxes and masks of regions


def region_features(maps: Sequence[Tensor], strides: Sequence[int], regions: Sequence[Tensor], size: int) -> Tensor:
    """RoIAlign with half-pixel offset on the map that fits each region: (R, C, size, size).

    Args:
        maps: (B, C, h, w), one per stride. regions: the boxes (n, 4) of each image.
    """
    index = torch.cat([torch.full_like(boxes[:, :1], i) for i, boxes in enumerate(regions)])
    rois = torch.cat([index, torch.cat(list(regions))], dim=1)  # (R, 5)
    # Regions of up to 112 pixels are read from the first map, of up to 224 from the second.
    level = (box_area(rois[:, 1:]).sqrt() / 56 + 1e-6).log2().floor().clamp(0, len(strides) - 1)
    places = [(level == i).nonzero()[:, 0] for i in range(len(strides))]
    parts = [
        roi_align(x, rois[place], size, 1 / stride, sampling_ratio=0, aligned=True)
        for x, place, stride in zip(maps, places, strides, strict=True)
    ]
    return torch.cat(parts)[torch.cat(places).argsort()]


class BoxHead(nn.Module):
    """Class and change of each region.

    Args:
        size: side of the regions' features. num_convs, num_fcs: layers that classes and boxes share.
        norm: batch norms after the convolutions. avg_pool: the linear layers see the mean of the cells.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        size: int = 7,
        num_convs: int = 0,
        conv_channels: int = 256,
        num_fcs: int = 0,
        fc_channels: int = 1024,
        norm: bool = False,
        avg_pool: bool = False,
    ):
        super().__init__()
        self.num_classes, self.avg_pool = num_classes, avg_pool
        self.shared_convs = conv_units(in_channels, conv_channels, num_convs, norm)
        width = (conv_channels if num_convs else in_channels) * (1 if avg_pool else size**2)
        widths = [width] + [fc_channels] * num_fcs
        fcs = [nn.Linear(widths[i], widths[i + 1]) for i in range(num_fcs)]
        self.shared_fcs = nn.ModuleList(fcs)
        self.fc_cls = nn.Linear(widths[-1], num_classes + 1)
        self.fc_reg = nn.Linear(widths[-1], 4 * num_classes)
        for fc in fcs:
            nn.init.xavier_uniform_(fc.weight)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        for fc in (*fcs, self.fc_cls, self.fc_reg):
            nn.init.zeros_(fc.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, size, size) -> logits (R, K + 1), background last, and changes per class (R, K, 4); full precision."""
        for conv in self.shared_convs:
            x = conv(x)
        x = x.mean(dim=(2, 3)) if self.avg_pool else x.flatten(1)
        for fc in self.shared_fcs:
            x = F.relu(fc(x))
        return self.fc_cls(x).float(), self.fc_reg(x).unflatten(1, (self.num_classes, 4)).float()


class MaskHead(nn.Module):
    """A mask of each region for each class."""

    def __init__(self, in_channels: int, num_classes: int, num_convs: int = 4, channels: int = 256, norm: bool = False):
        super().__init__()
        self.convs = conv_units(in_channels, channels, num_convs, norm)
        self.upsample = nn.ConvTranspose2d(channels if num_convs else in_channels, channels, kernel_size=2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        for conv in (self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, m / 2, m / 2) -> logits (R, K, m, m), full precision."""
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(F.relu(self.upsample(x))).float()


def crop_masks(masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Targets of the mask head (n, size, size), 0 or 1: the bitmaps (n, H, W) within the boxes (n, 4)."""
    index = torch.arange(len(boxes), device=boxes.device)[:, None]
    height, width = masks.shape[-2:]
    rois = torch.cat([index, clip_boxes_to_image(boxes, (height, width))], dim=1)
    return (roi_align(masks[:, None].float(), rois, size, sampling_ratio=0, aligned=True)[:, 0] >= 0.5).float()


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (n, m, m) of probabilities drawn into images of `size` (h, w) at their boxes: (n, h, w) bool.

    A pixel belongs to the object if the mask, interpolated at the pixel's centre, is at least 0.5. Outside the box it
    fades to zero and is less, so that only the box's pixels are sampled.
    """

    def along(low: float, high: float, end: int) -> tuple[int, Tensor]:
        """First pixel of the box, and its pixels' centres, from -1 to 1 across the box."""
        first = max(math.floor(low), 0)
        pixels = torch.arange(first, max(min(math.ceil(high), end), first), device=masks.device)
        return first, (pixels + 0.5 - low) / max(high - low, 1e-6) * 2 - 1

    result = torch.zeros((len(masks), *size), dtype=torch.bool, device=masks.device)
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        (left, x), (top, y) = along(x0, x1, size[1]), along(y0, y1, size[0])
        if len(x) and len(y):
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
            drawn = F.grid_sample(masks[i][None, None], grid, align_corners=False)[0, 0] >= 0.5
            result[i, top : top + len(y), left : left + len(x)] = drawn
    return result


class RoIHead(nn.Module):
    """The second stage: classes, boxes and masks of regions.

    Args:
        strides: of the maps from which regions are read. box_size, mask_size: side of the regions' features for boxes
            and for masks; mask_size None: the mask head sees the box head's features of the same regions.
        shared_head: layers between the regions' features and both heads.
        giou_weight: the box loss is GIoU of the changed boxes, times this; 0: L1 of the changes.
        score_threshold, nms_iou, num_detections: which boxes of a class are reported, and how many of an image.
    """

    def __init__(
        self,
        bbox_head: BoxHead,
        mask_head: MaskHead,
        strides: Sequence[int] = (4, 8, 16, 32),
        box_size: int = 7,
        mask_size: int | None = 14,
        shared_head: nn.Module | None = None,
        matching: Matching = Matching(0.5, 0.5, low_quality=0.5, number=512, positive_fraction=0.25),  # noqa: B008
        giou_weight: float = 0.0,
        score_threshold: float = 0.05,
        nms_iou: float = 0.5,
        num_detections: int = 100,
    ):
        super().__init__()
        self.bbox_head, self.mask_head, self.shared_head = bbox_head, mask_head, shared_head
        self.strides, self.box_size, self.mask_size = strides, box_size, mask_size
        self.matching, self.giou_weight = matching, giou_weight
        self.score_threshold, self.nms_iou, self.num_detections = score_threshold, nms_iou, num_detections

    def features(self, maps: Sequence[Tensor], regions: Sequence[Tensor], size: int) -> Tensor:
        """(R, C, size, size), or what the shared head makes of it."""
        x = region_features(maps[: len(self.strides)], self.strides, regions, size)
        return x if self.shared_head is None else self.shared_head(x)

    def sample_regions(self, proposals: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Draw regions (n, 4) of an image from its objects and proposals, positives first, and their matches (n,)."""
        own = torch.arange(len(target["boxes"]), device=proposals.device)
        match = torch.cat([own, assign(proposals, target["boxes"], self.matching)])
        chosen = torch.cat(sample(match, self.matching))
        return torch.cat([target["boxes"], proposals])[chosen], match[chosen]

    def loss(self, maps: Sequence[Tensor], proposals: list[Tensor], targets: Objects) -> dict[str, Tensor]:
        """Cross-entropy of the sampled regions, box loss of the positive ones, both divided by the number sampled, and
        cross-entropy of the positive ones' masks, the mean over their pixels.

        Args:
            maps: (B, C, h, w). proposals: (n, 4) of each image.
        """
        drawn = [self.sample_regions(p, t) for p, t in zip(proposals, targets, strict=True)]
        x = self.features(maps, [regions for regions, _ in drawn], self.box_size)
        logits, deltas = self.bbox_head(x)
        size = 2 * (self.mask_size or x.shape[-1])
        positives, labels, objects, masks = [], [], [], []
        for (regions, match), target in zip(drawn, targets, strict=True):
            positives.append(regions[match >= 0])
            labels.append(F.pad(target["labels"], (0, 1), value=self.bbox_head.num_classes)[match])  # -1: background
            match = match[match >= 0]
            objects.append(target["boxes"][match])
            masks.append(crop_masks(target["masks"][match], positives[-1], size))
        label = torch.cat(labels)  # (R,)
        is_positive = label < self.bbox_head.num_classes
        own, index = label[is_positive], torch.arange(int(is_positive.sum()), device=label.device)
        box_loss = self.box_loss(torch.cat(positives), deltas[is_positive][index, own], torch.cat(objects))
        x = x[is_positive] if self.mask_size is None else self.features(maps, positives, self.mask_size)
        mask_logits = self.mask_head(x)[index, own]  # (positives, m, m)
        mask_loss = F.binary_cross_entropy_with_logits(mask_logits, torch.cat(masks), reduction="sum")
        return {
            "loss_cls": F.cross_entropy(logits, label, reduction="sum") / max(len(label), 1),
            "loss_bbox": box_loss / max(len(label), 1),
            "loss_mask": mask_loss / max(mask_logits.numel(), 1),
        }

    def box_loss(self, regions: Tensor, deltas: Tensor, objects: Tensor) -> Tensor:
        """Sum over the positive regions (n, 4)."""
        if self.giou_weight:
            boxes = decode(regions, deltas, REGION_STDS)
            return self.giou_weight * generalized_box_iou_loss(boxes, objects, reduction="sum", eps=1e-6)
        return F.l1_loss(deltas, encode(regions, objects, REGION_STDS), reduction="sum")

    @torch.no_grad()
    def detect(self, maps: Sequence[Tensor], proposals: list[Tensor], infos: list[ImageInfo]) -> Objects:
        """What is found, boxes and masks (n, h, w) in pixels of the original images."""
        counts = [len(boxes) for boxes in proposals]
        logits, deltas = self.bbox_head(self.features(maps, proposals, self.box_size))
        each = zip(proposals, logits.softmax(dim=1).split(counts), deltas.split(counts), infos, strict=True)
        results, regions = [], []
        for region, score, delta, info in each:
            scale = delta.new_tensor(info.scale).repeat(2)  # x, y, x, y
            box = clip_boxes_to_image(decode(region[:, None], delta, REGION_STDS), info.size) / scale  # (R, K, 4)
            row, label = (score[:, :-1] > self.score_threshold).nonzero(as_tuple=True)
            keep = nms_within(label, box[row, label], score[row, label], self.nms_iou)[: self.num_detections]
            row, label = row[keep], label[keep]
            results.append({"boxes": box[row, label], "scores": score[row, label], "labels": label})
            regions.append(box[row, label] * scale)
        masks = self.mask_head(self.features(maps, regions, self.mask_size or self.box_size))
        for result, mask, info in zip(results, masks.split([len(x) for x in regions]), infos, strict=True):
            mask = mask[torch.arange(len(mask), device=mask.device), result["labels"]].sigmoid()
            result["masks"] = paste_masks(mask, result["boxes"], info.original)
        return results


class MaskRCNN(nn.Module):
    """Backbone, pyramid (`neck`, or none), `rpn_head` and `roi_head`."""

    def __init__(self, backbone: nn.Module, neck: FPN | None, rpn_head: RPNHead, roi_head: RoIHead):
        super().__init__()
        self.backbone, self.neck, self.rpn_head, self.roi_head = backbone, neck, rpn_head, roi_head

    def forward(
        self, images: Tensor, infos: list[ImageInfo], targets: Objects | None = None
    ) -> dict[str, Tensor] | Objects:
        """Losses by name if there are targets, with masks (G, H, W), else the objects found in each image.

        Args:
            images: (B, 3, H, W), normalised, with the image in the upper left corner.
        """
        maps = self.backbone(images)
        if self.neck is not None:
            maps = self.neck(maps)
        logits, deltas = self.rpn_head(maps)
        proposals = [boxes for boxes, _ in self.rpn_head.proposals(logits, deltas, infos)]
        if targets is None:
            return self.roi_head.detect(maps, proposals, infos)
        return self.rpn_head.loss(logits, deltas, infos, targets) | self.roi_head.loss(maps, proposals, targets)
