"""Training and evaluation of Mask R-CNN: one epoch, COCO's average precision, pictures, the whole run."""

import argparse
import colorsys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from common import distributed, lr_sched
from common.datasets import Loader
from common.dense_datasets import coco
from common.dense_datasets.detection import DetectionImages

PICTURE_SIDE = 480  # pixels to which smaller sides are enlarged, so that names can be read
SHOWN_SCORE = 0.3  # the least score of an object in a picture


def batch_loss(model: nn.Module, batch: tuple[Tensor, list]) -> Tensor:
    """The loss () of a batch (images, [(info, target)]), in training mode, in which there are losses."""
    infos, objects = map(list, zip(*batch[1], strict=True))
    return torch.stack(list(model.train()(batch[0], infos, objects).values())).sum()


def train_one_epoch(
    model: nn.Module,
    loader: Loader,
    updater: distributed.Updater,
    rate: Callable[[int, int], float],
    epoch_log: distributed.EpochLog,
    seed: int = 0,
) -> dict[str, float]:
    """Train from the position of `epoch_log` to the end of its epoch.

    Args:
        model: maps images (B, 3, H, W), their infos and targets (as in `common.dense_datasets.detection`) to losses.
        rate: (epoch, micro-step) -> learning rate, set before each update.
        seed: random draws (samples of anchors and regions, stochastic depth) depend on (seed, rank, step) alone.
    Returns:
        means over the epoch and all ranks: lr, loss, and each of the losses that it is the sum of.
    Raises:
        distributed.Exit: a stop signal, an unreadable image or a non-finite loss.
    """
    model.train()
    updater.start_epoch()
    groups = updater.optimizer.param_groups
    for step, (images, targets) in epoch_log.steps(loader.batches(epoch_log.epoch, epoch_log.start)):
        if updater.is_first(step):
            lr_sched.set_lr(groups, rate(epoch_log.epoch, step))
        distributed.seed_step(seed, epoch_log.epoch * len(loader) + step)
        infos, objects = map(list, zip(*targets, strict=True))
        with updater.forward(model, step):
            losses = model(images, infos, objects)
        loss = torch.stack(list(losses.values())).sum()
        norm = updater.backward(loss, step)
        highest = max(group["lr"] for group in groups)
        epoch_log.update(step, updater.is_last(step), lr=highest, loss=loss, **losses, grad_norm=norm)
    return epoch_log.means()


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, images: DetectionImages, folder: str = "", pictures: int = 0
) -> dict[str, float]:
    """COCO's box and mask AP in full precision, each image once over all processes. Collective.

    Args:
        loader: batches of one of the `images`.
        folder: of predictions.{bbox,segm}.json and of pictures/ with the first `pictures` images; '' writes nothing.
    Returns:
        as `coco.average_precision`, in percent.
    """
    model.eval()
    distributed.sync_buffers(model)  # rank 0's, which the checkpoint holds
    numbers = {image_id: index for index, (_, image_id) in enumerate(images.samples)}
    predictions: list[dict[str, Any]] = []
    test_log = distributed.EpochLog("Test:", len(loader), loader.batch_size, loader.device)
    for _, (batch, targets) in test_log.steps(loader.batches()):
        infos = [info for info, _ in targets]
        for info, found in zip(infos, model(batch, infos), strict=True):
            predictions += coco.predictions_of(info.image_id, found, images.category_ids)
            if folder and numbers[info.image_id] < pictures:
                save_picture(Path(folder) / "pictures", images, numbers[info.image_id], found)
    if folder:
        coco.save_predictions(folder, predictions)
    stats, per_class = coco.average_precision(images, predictions)
    width = max(map(len, images.classes))
    for name in images.classes:
        distributed.log(f"{name:{width}}  " + "  ".join(f"{k} AP {v[name]:5.1f}" for k, v in per_class.items()))
    return stats


def save_picture(folder: Path, images: DetectionImages, index: int, found: dict[str, Tensor]) -> None:
    """Write an image as <its name>.png: on the left its annotations, on the right what was found, with scores.

    Args:
        found: boxes (n, 4) in pixels of the image, scores (n,), labels (n,), masks (n, H, W).
    Raises:
        distributed.UserError: the folder cannot be written.
    """
    image, truth = images.picture(index), images.objects(index)
    found = {key: value.cpu() for key, value in found.items()}
    shown = found["scores"] >= SHOWN_SCORE
    names = [images.classes[label] for label in truth["labels"]]
    guesses = [
        f"{images.classes[label]} {score:.2f}" for label, score in zip(found["labels"], found["scores"], strict=True)
    ]
    guesses = [text for text, is_shown in zip(guesses, shown, strict=True) if is_shown]
    halves = [
        annotated(image, truth["boxes"], truth["masks"], truth["labels"], names),
        annotated(image, found["boxes"][shown], found["masks"][shown], found["labels"][shown], guesses),
    ]
    path = folder / f"{Path(images.samples[index][0]).stem}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(torch.cat(halves, dim=2)).save(path)
    except OSError as error:
        raise distributed.UserError(f"{path}: cannot be written ({error.strerror})") from error


def annotated(image: Tensor, boxes: Tensor, masks: Tensor, labels: Tensor, texts: list[str]) -> Tensor:
    """The image (3, H, W) uint8, enlarged by a whole number if it is small, with objects in their classes' colours."""
    factor = max(1, PICTURE_SIDE // min(image.shape[1:]))
    image, masks = (x.repeat_interleave(factor, -1).repeat_interleave(factor, -2) for x in (image, masks))
    if not len(boxes):
        return image
    hues = [label * 0.618 % 1 for label in labels.tolist()]  # steps of the golden ratio: any few differ much
    colours: Any = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.9, 1)) for hue in hues]
    image = draw_segmentation_masks(image, masks.bool(), alpha=0.5, colors=colours)
    words: Any = {"label_colors": "black", "label_background_colors": colours, "fill_labels": True}
    return draw_bounding_boxes(image, boxes * factor, texts, colours, width=2, **words)


def fit(
    args: argparse.Namespace,
    model: nn.Module,
    loader: Loader,
    val_loader: Loader,
    images: DetectionImages,
    updater: distributed.Updater,
    rate: Callable[[int, int], float],
    checkpoint: distributed.Checkpoint,
    resume: str,
    before_evaluation: Callable[[int], None] = lambda epoch: None,
) -> None:
    """Train from the checkpoint `resume` ('': anew) to the last epoch, logging and saving each.

    Evaluates every --eval_interval epochs and after the last; checkpoint-best.pth keeps the epoch of the best box AP.
    """
    plain = distributed.unwrap(model)
    position = checkpoint.resume(resume, args.start_epoch)
    names = ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask")
    tags = {name: f"loss/{name}" for name in ("loss", *names)} | {"lr": "opt/lr", "grad_norm": "opt/grad_norm"}
    for epoch, epoch_log in checkpoint.epochs(loader, position, tags):
        with checkpoint.on_exit(epoch_log, updater):
            stats = train_one_epoch(model, loader, updater, rate, epoch_log, args.seed)
        line = {f"train_{name}": value for name, value in stats.items()}
        last = epoch + 1 == args.epochs
        if last or (args.eval_interval and (epoch + 1) % args.eval_interval == 0):
            checkpoint.save(epoch_log.position(len(loader)))  # an evaluation may be stopped: it is repeated from here
            before_evaluation(epoch)
            folder, pictures = (args.output_dir, args.save_pictures) if last else ("", 0)
            test = evaluate(plain, val_loader, images, folder, pictures)
            epoch_log.run_log.scalars({f"perf/{name}": value for name, value in test.items()}, epoch)
            line |= {f"test_{name}": value for name, value in test.items()}
            if test["box_AP"] > checkpoint.best:
                checkpoint.best = test["box_AP"]
                checkpoint.save(distributed.Position(epoch + 1), "checkpoint-best.pth")
        epoch_log.run_log.epoch(line | {"epoch": epoch})
        checkpoint.save(distributed.Position(epoch + 1))
    distributed.log(f"{args.epochs} epochs done; {checkpoint.files.latest} is in {args.output_dir or 'no folder'}")
