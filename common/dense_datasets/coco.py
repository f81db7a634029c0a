"""Average precision of boxes and masks by COCO's own program, pycocotools, over all processes."""

import contextlib
import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from common.dense_datasets.detection import DetectionImages, mask_tools, read_annotations
from common.distributed import UserError, gather, gather_to_main, is_main, log, main_does

NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")  # of pycocotools' first six numbers
KINDS = {"box": "bbox", "mask": "segm"}  # our names and COCO's


def predictions_of(image_id: int, found: dict[str, Tensor], category_ids: list[int]) -> list[dict[str, Any]]:
    """One image's results as COCO writes them.

    Args:
        found: boxes (n, 4) in pixels of the original image, scores (n,), labels (n,), masks (n, H, W) bool.
    """
    boxes, masks = found["boxes"].double().cpu(), found["masks"].cpu().numpy().astype(np.uint8)
    boxes[:, 2:] -= boxes[:, :2]
    runs = mask_tools().encode(np.asfortranarray(masks.transpose(1, 2, 0))) if len(masks) else []
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
            "segmentation": {"size": run["size"], "counts": run["counts"].decode()},
        }
        for box, score, label, run in zip(
            boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), runs, strict=True
        )
    ]


def of_kind(predictions: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Results of one kind: where masks have no box beside them, pycocotools takes their area by their pixels."""
    dropped = {"bbox": "segmentation", "segm": "bbox"}[kind]
    return [{key: value for key, value in entry.items() if key != dropped} for entry in predictions]


def average_precision(
    images: DetectionImages, predictions: list[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Box and mask AP in percent over all processes' predictions, each image once. Collective.

    Returns:
        box_AP, box_AP50, box_AP75, box_AP_small (below 32 x 32 pixels), box_AP_medium, box_AP_large (from 96 x 96),
        and so for mask; NaN where there are no such objects. AP per class: {"box": {name: AP}, "mask": {...}}.
    """
    parts = gather_to_main(predictions)
    result = _evaluate(images, [entry for part in parts for entry in part]) if is_main() else None
    stats, per_class = gather(result)[0]
    for kind in KINDS:
        log(f"* {kind} " + " ".join(f"{name} {stats[f'{kind}_{name}']:.1f}" for name in NAMES))
    return stats, per_class


@functools.lru_cache(maxsize=1)  # a run evaluates the same images again and again
def _truth(images: DetectionImages) -> Any:
    """The annotations as pycocotools holds them."""
    from pycocotools.coco import COCO

    truth = COCO()
    truth.dataset = read_annotations(images.path)  # type: ignore[assignment]
    truth.createIndex()
    return truth


def _evaluate(
    images: DetectionImages, predictions: list[dict[str, Any]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    from pycocotools.cocoeval import COCOeval

    stats: dict[str, float] = {}
    per_class: dict[str, dict[str, float]] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # tables that say the same
        truth = _truth(images)
        for kind, name in KINDS.items():
            if not predictions:
                stats |= {f"{kind}_{n}": 0.0 for n in NAMES}
                per_class[kind] = dict.fromkeys(images.classes, 0.0)
                continue
            evaluation = COCOeval(truth, truth.loadRes(of_kind(predictions, name)), name)  # type: ignore[arg-type]
            evaluation.params.imgIds = [number for _, number in images.samples]
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            stats |= {f"{kind}_{n}": _percent(v) for n, v in zip(NAMES, evaluation.stats[:6], strict=True)}
            precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes), of any area
            means = [_percent(p[p > -1].mean() if (p > -1).any() else -1) for p in precision.transpose(2, 0, 1)]
            per_class[kind] = dict(zip(images.classes, means, strict=True))
    return stats, per_class


def _percent(value: float) -> float:
    """pycocotools says -1 where there is nothing to find."""
    return 100 * float(value) if value > -1 else float("nan")


def save_predictions(folder: str, predictions: list[dict[str, Any]]) -> None:
    """Write predictions.bbox.json and predictions.segm.json of all processes, as COCO's server takes them. Collective.

    Raises:
        UserError: the folder cannot be written.
    """
    parts = gather_to_main(predictions)

    def write() -> None:
        for kind in KINDS.values():
            path = Path(folder) / f"predictions.{kind}.json"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(of_kind([entry for part in parts for entry in part], kind)))
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror})") from error
            log(f"{path} has {sum(map(len, parts))} predictions")

    main_does(write)
