"""Golden cases of Mask R-CNN without its backbone, built from `meta` alone, and what holds for whole networks."""

from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from common.dense_datasets import coco
from common.dense_datasets.detection import DetectionImages, ImageInfo, collate
from common.dense_datasets.views import EvalTransform
from scripts.tools.shapes import write_stills
from tests.support.helpers import Golden, assert_close


class SharedHead(nn.Module):
    """What stands in for stage 5 and its extra norm (`meta.shared_head`)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.bn(self.conv(x)).relu())


def take(settings: dict, **known) -> dict:
    """The settings without those that are the same in all recipes, which must be as `known` says."""
    rest = dict(settings)
    for name, value in known.items():
        assert rest.pop(name, value) == value, (name, settings[name])
    return rest


def _nms(settings: dict) -> float:
    return take(settings, type="nms")["iou_threshold"]


def _matching(settings: dict, heads: ModuleType, with_objects: bool):
    a = take(settings["assigner"], type="MaxIoUAssigner", ignore_iof_thr=-1)
    s = take(settings["sampler"], type="RandomSampler", neg_pos_ub=-1, add_gt_as_proposals=with_objects)
    low = a.pop("min_pos_iou")
    low = low if a.pop("match_low_quality") else None
    positive, negative = a.pop("pos_iou_thr"), a.pop("neg_iou_thr")
    matching = heads.Matching(positive, negative, low, s.pop("num"), s.pop("pos_fraction"))
    assert not a | s
    return matching


def _coder(stds: tuple[float, ...]) -> dict:
    return {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": list(stds)}


def _neck(meta: dict, heads: ModuleType):
    if not meta["neck"]:
        return None
    neck = take(meta["neck"], type="FPN", norm_cfg={"type": "BN", "requires_grad": True})
    return heads.FPN(**neck, norm="norm_cfg" in meta["neck"])


def _rpn_head(meta: dict, heads: ModuleType):
    cross_entropy = {"type": "CrossEntropyLoss", "use_sigmoid": True, "loss_weight": 1.0}
    rpn = take(
        meta["rpn"],
        type="RPNHead",
        bbox_coder=_coder(heads.ANCHOR_STDS),
        loss_cls=cross_entropy,
        loss_bbox={"type": "L1Loss", "loss_weight": 1.0},
    )
    train = take(meta["train_cfg"]["rpn"], pos_weight=-1, debug=False)
    proposals = [take(c, min_bbox_size=0) for c in (meta["train_cfg"]["rpn_proposal"], meta["test_cfg"]["rpn"])]
    assert train["allowed_border"] in (-1, 0)
    assert proposals[0]["nms"] == proposals[1]["nms"]
    return heads.RPNHead(
        rpn["in_channels"],
        rpn["feat_channels"],
        **take(rpn["anchor_generator"], type="AnchorGenerator"),
        matching=_matching(train, heads, with_objects=False),
        inside_only=train["allowed_border"] == 0,
        train_proposals=(proposals[0]["nms_pre"], proposals[0]["max_per_img"]),
        test_proposals=(proposals[1]["nms_pre"], proposals[1]["max_per_img"]),
        nms_iou=_nms(proposals[0]["nms"]),
    )


BOX_HEADS = {  # convolutions and linear layers
    "BBoxHead": (0, 0),
    "Shared2FCBBoxHead": (0, 2),
    "Shared4Conv1FCBBoxHead": (4, 1),
    "ConvFCBBoxHead": (0, 0),
}


def _box_head(meta: dict, heads: ModuleType):
    box = take(
        meta["roi"]["box"],
        bbox_coder=_coder(heads.REGION_STDS),
        reg_class_agnostic=False,
        loss_cls={"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
    )
    num_convs, num_fcs = BOX_HEADS[box["type"]]
    return heads.BoxHead(
        box["in_channels"],
        box["num_classes"],
        size=box["roi_feat_size"],
        num_convs=box.get("num_shared_convs", num_convs),
        conv_channels=box.get("conv_out_channels", 0),
        num_fcs=box.get("num_shared_fcs", num_fcs),
        fc_channels=box.get("fc_out_channels", 0),
        norm="norm_cfg" in box,
        avg_pool=box.get("with_avg_pool", False),
    )


def _extractor(extractor: dict) -> tuple[list[int], int]:
    """Strides, and the side of the features."""
    layer = take(extractor["roi_layer"], type="RoIAlign", sampling_ratio=0)
    return extractor["featmap_strides"], layer["output_size"]


def _roi_head(meta: dict, heads: ModuleType):
    roi, test = meta["roi"], meta["test_cfg"]["rcnn"]
    train = take(meta["train_cfg"]["rcnn"], pos_weight=-1, debug=False)
    mask = take(
        roi["mask"],
        type="FCNMaskHead",
        loss_mask={"type": "CrossEntropyLoss", "use_mask": True, "loss_weight": 1.0},
    )
    mask_head = heads.MaskHead(
        mask["in_channels"], mask["num_classes"], mask["num_convs"], mask["conv_out_channels"], "norm_cfg" in mask
    )
    strides, box_size = _extractor(roi["box_roi"])
    mask_size = None
    if roi["mask_roi"]:
        assert roi["mask_roi"]["featmap_strides"] == strides
        _, mask_size = _extractor(roi["mask_roi"])
    assert train["mask_size"] == 2 * (mask_size or roi["box"]["roi_feat_size"])
    loss = roi["box"]["loss_bbox"]
    giou = loss["type"] == "GIoULoss"
    assert roi["box"].get("reg_decoded_bbox", False) == giou
    assert giou or loss == {"type": "L1Loss", "loss_weight": 1.0}
    assert test["mask_thr_binary"] == 0.5
    return heads.RoIHead(
        _box_head(meta, heads),
        mask_head,
        strides=strides,
        box_size=box_size,
        mask_size=mask_size,
        shared_head=SharedHead(roi["box_roi"]["out_channels"]) if meta["shared_head"] else None,
        matching=_matching(train, heads, with_objects=True),
        giou_weight=loss["loss_weight"] if giou else 0.0,
        score_threshold=test["score_thr"],
        nms_iou=_nms(test["nms"]),
        num_detections=test["max_per_img"],
    )


def build(ref: Golden, heads: ModuleType):
    """The network of a case; its backbone hands on the maps, which are given instead of images."""
    parts = [make(ref.meta, heads) for make in (_neck, _rpn_head, _roi_head)]
    model = heads.MaskRCNN(nn.Identity(), *parts)
    model.load_state_dict(ref.weights)
    return model


def inputs(ref: Golden) -> tuple[list[Tensor], list[ImageInfo], list[dict[str, Tensor]]]:
    """Maps, images and objects of a case."""
    maps = [ref[f"in/feat{i}"] for i in range(sum(name.startswith("in/feat") for name in ref.arrays))]
    infos, targets = [], []
    for i, size in enumerate(ref["in/img_shapes"].tolist()):
        padded, original = ref["in/pad_shapes"][i].tolist(), ref["in/ori_shapes"][i].tolist()
        scale = ref["in/scale_factors"][i].expand(2).tolist()
        infos.append(ImageInfo(tuple(size), tuple(padded), tuple(original), tuple(scale), i))
        targets.append({name: ref[f"in/gt_{name}{i}"] for name in ("boxes", "labels", "masks")})
    return maps, infos, targets


@contextmanager
def num_threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def recorded_maps(ref: Golden, heads: ModuleType) -> list[Tensor]:
    """The maps in the memory layout in which they were recorded, by a program of two threads.

    Layout and threads change the order in which a convolution sums, and so its last bits; among a million activations
    some stand so near zero that these bits decide whether ReLU lets a gradient pass. A file does not tell the layout:
    it is the one that reproduces the pyramid best.
    """
    model, errors = build(ref, heads).train(), {}
    held = "out/fpn0" if model.neck else "out/rpn_cls0"
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = [x.contiguous(memory_format=layout) for x in inputs(ref)[0]]
        with torch.no_grad(), num_threads(2):
            x = model.neck(maps)[0] if model.neck else model.rpn_head(maps)[0][0]
        errors[(x - ref.get(held, x)).abs().max().item()] = maps
    return errors[min(errors)]


def assert_proposals(ref: Golden, model, kind: str, maps: list[Tensor], infos: list[ImageInfo]) -> None:
    """`kind` is train or test; the module is in that mode."""
    found = model.rpn_head.proposals(*model.rpn_head(maps), infos)
    assert len(found) >= sum(name.startswith(f"out/{kind}_proposals") for name in ref.arrays)
    for i, (boxes, scores) in enumerate(found):
        if f"out/{kind}_proposals{i}" not in ref:
            continue
        expected = ref[f"out/{kind}_proposals{i}"]
        pair(ref, boxes, scores, torch.zeros(len(boxes)), expected[:, :4], expected[:, 4], torch.zeros(len(expected)))


def pair(ref: Golden, boxes, scores, labels, ref_boxes, ref_scores, ref_labels) -> list[int]:
    """Which box is which: equal boxes and labels in the order of the scores, which is free where scores tie.

    Returns:
        for each expected box the index of ours.
    """
    given = ref.meta["tolerances"]
    assert len(boxes) == len(ref_boxes)
    assert_close(scores, ref_scores, given["rtol"], given["atol"], "scores")
    distance = (boxes[None] - ref_boxes[:, None]).abs().amax(dim=2)  # (expected, ours)
    ties = (ref_scores[:, None] - ref_scores[None]).abs() <= given["scores_that_tie"]
    equal = (distance <= given["boxes_px"]) & (ref_labels[:, None] == labels[None])
    order = []
    for i in range(len(ref_boxes)):
        free = [j for j in (equal[i] & ties[i]).nonzero()[:, 0].tolist() if j not in order]
        assert free, f"box {i} of {len(ref_boxes)}: nearest at {distance[i].min():.2g} px"
        order.append(free[0])
    return order


def check_training(ref: Golden, heads: ModuleType) -> None:
    """Pyramid, anchors, the RPN's maps, proposals, losses and every gradient."""
    _, infos, targets = inputs(ref)
    given = {name: ref.meta["tolerances"][name] for name in ("rtol", "atol")}
    model, maps = build(ref, heads).train(), recorded_maps(ref, heads)
    with torch.no_grad():
        pyramid = model.neck(maps) if model.neck else maps
        logits, deltas = model.rpn_head(pyramid)
    outs = {f"out/fpn{i}": x for i, x in enumerate(pyramid)}
    for i, anchors in enumerate(model.rpn_head.anchors(logits)):
        outs |= {f"out/rpn_cls{i}": logits[i], f"out/rpn_reg{i}": deltas[i], f"out/anchors{i}": anchors}
    assert set(outs) >= {n for n in ref.arrays if n.startswith(("out/fpn", "out/rpn_", "out/anchors"))}
    for name, value in outs.items():
        ref.check(name, value, **given)
    assert_proposals(ref, model, "train", pyramid, infos)

    maps = [x.requires_grad_() for x in maps]
    with num_threads(2):
        losses = model(maps, infos, targets)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
    assert set(losses) >= set(ref.group("out/loss")) - {"total", "acc"}  # the accuracy is no loss
    for name, value in (losses | {"total": total}).items():
        ref.check(f"out/loss/{name}", value, **given, what=name)
    gradients = {f"grad/{name}": p.grad for name, p in model.named_parameters()}
    gradients |= {f"grad_feat{i}": x.grad for i, x in enumerate(maps)}
    assert set(gradients) >= {name[4:] for name in ref.arrays if name.startswith("out/grad")}
    for name, grad in gradients.items():
        assert grad is not None, name
        ref.check(f"out/{name}", grad, rtol=0, atol=1e-4 * float(grad.abs().max()) + 1e-6)


def check_detections(ref: Golden, heads: ModuleType) -> None:
    """Proposals, boxes, scores, labels and every pixel of the masks."""
    model, (_, infos, _) = build(ref, heads).eval(), inputs(ref)
    maps = recorded_maps(ref, heads)
    with torch.no_grad():
        assert_proposals(ref, model, "test", model.neck(maps) if model.neck else maps, infos)
        found = model(maps, infos)
    assert len(found) >= sum(name.startswith("out/test_boxes") for name in ref.arrays)
    for i, image in enumerate(found):
        names = [f"out/test_{name}{i}" for name in ("boxes", "scores", "labels")]
        if any(name not in ref for name in names):
            continue
        expected = [ref[name] for name in names]
        order = pair(ref, image["boxes"], image["scores"], image["labels"], *expected)
        masks = np.packbits(image["masks"][order].numpy(), axis=-1)
        ref.equal(f"out/test_masks{i}", torch.from_numpy(masks))
        ref.check(f"out/test_mask_area{i}", image["masks"][order].sum(dim=(1, 2)), rtol=0, atol=0)


# ---- whole networks


def parameters(model: nn.Module) -> dict[str, int]:
    """Number of parameters of each part."""
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}


def unit(name: str, norm: bool) -> set[str]:
    """Names of a convolution's parameters and those of its batch norm, which stands for its bias."""
    return {f"{name}.conv.weight"} | ({f"{name}.bn.weight", f"{name}.bn.bias"} if norm else {f"{name}.conv.bias"})


def layer(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def assert_names(model, convs: int, fcs: int, box_norm: bool, neck_norm: bool = False, mask_norm: bool = False):
    """mmdetection's names of all parameters of a network with a pyramid but its backbone's, and no others."""
    expected = layer(*(f"rpn_head.{name}" for name in ("rpn_conv", "rpn_cls", "rpn_reg")))
    for i in range(4):
        expected |= unit(f"neck.lateral_convs.{i}", neck_norm) | unit(f"neck.fpn_convs.{i}", neck_norm)
        expected |= unit(f"roi_head.mask_head.convs.{i}", mask_norm)
    expected |= layer("roi_head.mask_head.upsample", "roi_head.mask_head.conv_logits")
    expected |= {name for i in range(convs) for name in unit(f"roi_head.bbox_head.shared_convs.{i}", box_norm)}
    expected |= layer(*(f"roi_head.bbox_head.shared_fcs.{i}" for i in range(fcs)))
    expected |= layer("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg")
    names = {n for n, _ in model.named_parameters() if not n.startswith(("backbone.", "neck.pyramid."))}
    assert names == expected


def assert_initial_weights(model) -> None:
    """Spread of the fresh weights of every layer behind the backbone; biases are zero, norms the identity."""
    normal = {"rpn_conv": 0.01, "rpn_cls": 0.01, "rpn_reg": 0.01, "fc_cls": 0.01, "fc_reg": 0.001}
    for name, p in model.named_parameters():
        if name.startswith(("backbone.", "neck.pyramid.")) or ".layer4." in name:
            continue
        module = name.split(".")[-2]
        if name.endswith("bias"):
            assert not p.any(), name
            continue
        if module in ("bn", "norm"):
            assert (p == 1).all(), name
            continue
        fan_in, fan_out = p[0].numel(), len(p) * p[0, 0].numel()
        std = normal.get(module, (2 / fan_out) ** 0.5)  # Kaiming's
        if name.startswith("neck.") or ".shared_fcs." in name:
            std = (2 / (fan_in + fan_out)) ** 0.5  # Xavier's
            bound = 3**0.5 * std  # of a uniform distribution
            assert 0.95 * bound < p.abs().max() <= bound * 1.001, name
        assert abs(p.std().item() / std - 1) < max(0.05, 4 / p.numel() ** 0.5), name


def assert_learns(model, frozen: tuple[str, ...] = ()) -> None:
    """Every weight has a part in the losses of two images, and a finite gradient; then objects are found in them."""
    infos = [
        ImageInfo((64, 96), (64, 96), (64, 96), (1.0, 1.0), 0),
        ImageInfo((50, 60), (64, 64), (25, 30), (2.0, 2.0), 1),
    ]
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[:, 8:40, 4:44] = 1
    target = {"boxes": torch.tensor([[4.0, 8, 44, 40]]), "labels": torch.tensor([1]), "masks": masks}
    images = torch.randn(2, 3, 64, 96)
    for name, p in model.named_parameters():
        if name.endswith("weight") and not p.any():  # the last norm of a residual branch
            nn.init.ones_(p)
    losses = model.train()(images, infos, [target, target])
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}
    torch.stack(list(losses.values())).sum().backward()
    for name, p in model.named_parameters():
        if name in frozen:
            continue
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name
    model.roi_head.score_threshold = 0.0
    with torch.no_grad():
        found = model.eval()(images, infos)
    for image, info in zip(found, infos, strict=True):
        assert len(image["boxes"]) == 100
        assert image["masks"].shape == (100, *info.original)
        h, w = info.original
        assert (image["boxes"] >= 0).all()
        assert (image["boxes"] <= torch.tensor([w, h, w, h]) + 1e-4).all()


def overfit(model, folder, steps: int, rate: float) -> dict[str, float]:
    """COCO's figures, in percent, on four drawn images of 128 pixels after that many updates on them."""
    write_stills(folder, "training", range(1, 5), 128, seed=0)
    annotations = folder / "coco/annotations/instances_train2017.json"
    images = DetectionImages(annotations, folder / "coco/train2017", train=True)
    view = EvalTransform(128, 192)
    batch, pairs = collate([view(*images[i]) for i in range(4)])
    infos, targets = [info for info, _ in pairs], [target for _, target in pairs]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 20, 1.0 if step < 0.8 * steps else 0.1)
        loss = torch.stack(list(model(batch, infos, targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(batch, infos)
    predictions = [
        coco.predictions_of(info.image_id, image, images.category_ids) for info, image in zip(infos, found, strict=True)
    ]
    return coco.average_precision(images, sum(predictions, []))[0]
