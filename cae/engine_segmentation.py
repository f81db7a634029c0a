"""Semantic segmentation: the loss, training from one evaluation to the next, the evaluation, pictures, the whole run.

Legend: B batch, K classes, H W pixels of images or labels, h w those of logits.
"""

import argparse
import colorsys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.datasets import IMAGENET_MEAN, IMAGENET_STD, Loader
from common.dense_datasets.iterations import IterationLoader
from common.dense_datasets.scores import Confusion, table
from common.dense_datasets.transforms import IGNORED, to_picture


def resized(logits: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """(B, K, h, w) -> (B, K, H, W), bilinear."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def segmentation_loss(outputs: list[Tensor], labels: Tensor, auxiliary_weight: float = 0.4) -> dict[str, Tensor]:
    """Cross entropy of every pixel at the labels' resolution, in full precision.

    As upstream: ignored pixels count as zeros in a mean over all pixels.
    Args:
        outputs: logits (B, K, h, w) of the decode head, then of the auxiliary head where there is one.
        labels: (B, H, W) class indices, 255 ignored.
    Returns:
        loss, the sum with the auxiliary head's times its weight; loss_decode and loss_auxiliary without it; pixel_acc,
        the percentage of valid pixels that the decode head classifies right.
    """
    full = [resized(logits.float(), labels.shape[1:]) for logits in outputs]
    sums = [F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="sum") for logits in full]
    losses = [one / labels.numel() for one in sums]
    right = (full[0].detach().max(dim=1).indices == labels).sum()
    parts = dict(zip(("loss_decode", "loss_auxiliary"), losses, strict=False))
    accuracy = 100 * right / (labels != IGNORED).sum().clamp(min=1)
    return {"loss": losses[0] + auxiliary_weight * sum(losses[1:]), **parts, "pixel_acc": accuracy}


def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor], auxiliary_weight: float = 0.4) -> Tensor:
    """The loss () of a batch (images, labels)."""
    return segmentation_loss(model(batch[0]), batch[1], auxiliary_weight)["loss"]


def train_one_interval(
    model: nn.Module,
    loader: IterationLoader,
    updater: distributed.Updater,
    set_rates: Callable[[int], None],
    epoch_log: distributed.EpochLog,
    checkpoint: distributed.Checkpoint,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Train from the position of `epoch_log` to the end of its interval.

    Args:
        model: maps images (B, 3, H, W) to the outputs of `segmentation_loss`.
        set_rates: sets the learning rates of an update, counted from the start of the run.
        args: auxiliary_weight; save_interval, updates between checkpoints; seed, of draws that depend on (seed, rank,
            step) alone.
    Returns:
        means over the interval and all ranks.
    Raises:
        distributed.Exit: a stop signal, an unreadable image or a non-finite loss.
    """
    model.train()
    updater.start_epoch()
    for step, (images, labels) in epoch_log.steps(loader.batches(epoch_log.epoch, epoch_log.start)):
        if step > epoch_log.start and step % (args.save_interval * loader.accum_iter) == 0:
            checkpoint.save(epoch_log.position(step))
        done = epoch_log.epoch * len(loader) + step
        if updater.is_first(step):
            set_rates(done // loader.accum_iter)
        distributed.seed_step(args.seed, done)
        with updater.forward(model, step):
            outputs = model(images)
        losses = segmentation_loss(outputs, labels, args.auxiliary_weight)
        norm = updater.backward(losses["loss"], step)
        rate = max(group["lr"] for group in updater.optimizer.param_groups)
        epoch_log.update(step, updater.is_last(step), lr=rate, **losses, grad_norm=norm)
    return epoch_log.means()


def slide(model: Callable[[Tensor], list[Tensor]], images: Tensor, window: int, stride: int) -> Tensor:
    """Logits (B, K, H, W) as the mean of those of square windows, the last ones shifted inwards.

    An image that is smaller than the window has a smaller one.
    """
    size = images.shape[2:]
    ends = [[min(i * stride + window, n) for i in range(max(n - window + stride - 1, 0) // stride + 1)] for n in size]
    total, counts = torch.zeros(()), images.new_zeros(size)
    for bottom in ends[0]:
        for right in ends[1]:
            place = (..., slice(max(bottom - window, 0), bottom), slice(max(right - window, 0), right))
            logits = model(images[place])[0].float()
            if not total.ndim:
                total = logits.new_zeros(*logits.shape[:2], *size)
            total[place] += resized(logits, counts[place].shape)
            counts[place] += 1
    return total / counts


def predict(
    model: nn.Module, views: list[Tensor], size: torch.Size, window: int = 0, stride: int = 0, flip: bool = False
) -> Tensor:
    """Class indices (B, H, W) of images that are given at one or several scales.

    Args:
        views: the images (B, 3, h, w) at each scale; probabilities of all are averaged.
        size: (H, W). window, stride: of sliding windows, to which smaller images are padded; 0 sees images whole.
        flip: average with the mirrored images, too.
    """
    total = views[0].new_zeros(())
    for view in views:
        height, width = view.shape[2:]
        padded = F.pad(view, (0, max(window - width, 0), 0, max(window - height, 0)))
        for mirrored in (False, True) if flip else (False,):
            seen = padded.flip(-1) if mirrored else padded
            logits = slide(model, seen, window, stride) if window else resized(model(seen)[0].float(), seen.shape[2:])
            logits = (logits.flip(-1) if mirrored else logits)[..., :height, :width]
            total = total + resized(logits, size).softmax(dim=1)
    return total.max(dim=1).indices


def colours(number: int) -> np.ndarray:
    """(256, 3) uint8: well separated hues for the classes, black for label 255."""
    wheel = [colorsys.hsv_to_rgb(k * 0.618 % 1, 1 - 0.4 * (k % 2), 1 - 0.25 * (k // 2 % 3)) for k in range(number)]
    return (255 * np.array([*wheel, *[(0, 0, 0)] * (256 - number)])).astype(np.uint8)


def save_picture(
    path: Path,
    image: Tensor,
    labels: Tensor,
    prediction: Tensor,
    names: list[str],
    statistics: tuple = (IMAGENET_MEAN, IMAGENET_STD),
) -> None:
    """Draw a normalised image (N, h, w), its truth and the prediction (H, W) side by side, with a legend.

    Args:
        statistics: mean and deviation of each channel.
    Raises:
        distributed.UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # here, because importing it takes 0.4 s
    from matplotlib.patches import Patch

    pixels = resized(to_picture(image, *statistics)[None], labels.shape)[0].permute(1, 2, 0).cpu().numpy()
    truth, predicted, palette = labels.cpu().numpy(), prediction.cpu().numpy(), colours(len(names))
    figure = Figure(figsize=(12, 1 + 4 * labels.shape[0] / labels.shape[1]), layout="constrained")
    shown = {1: "image", 2: "channel 1 of 2", 3: "image"}.get(len(image), f"channels 1, 2, 3 of {len(image)}")
    panels = {shown: pixels, "truth": palette[truth], "prediction": palette[predicted]}
    for axes, (title, panel) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.imshow(panel)
        axes.set_title(title)
        axes.axis("off")
    seen = [k for k in np.union1d(truth, predicted).tolist() if k != IGNORED]
    patches = [Patch(color=tuple(palette[k] / 255), label=names[k]) for k in seen]
    figure.legend(handles=patches, loc="outside lower center", ncols=8, frameon=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise distributed.UserError(f"{path}: cannot be written ({error.strerror})") from error


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    names: list[str],
    pictures: int = 0,
    folder: str = "",
    statistics: tuple = (IMAGENET_MEAN, IMAGENET_STD),
    **inference,
) -> dict[str, float]:
    """Scores over all ranks' images, in full precision; prints the table of classes.

    Args:
        loader: batches (the image at each scale (1, 3, h, w), labels (1, H, W)).
        names: of the classes. pictures: how many images are drawn, into `folder`/pictures.
        statistics: mean and deviation of each channel.
        inference: window, stride, flip as in `predict`.
    Returns:
        mIoU, mAcc and aAcc, in percent.
    """
    model.eval()
    distributed.sync_buffers(model)  # rank 0's, which the checkpoint holds
    counted = Confusion(len(names), loader.device)
    test_log = distributed.EpochLog("Test:", len(loader), 1, loader.device)
    for step, (views, labels) in test_log.steps(loader.batches()):
        prediction = predict(model, views, labels.shape[1:], **inference)
        counted.update(prediction, labels)
        number = step * distributed.world_size() + distributed.rank()
        if number < pictures:
            place = Path(folder) / "pictures" / f"{number:04d}.png"
            save_picture(place, views[0][0], labels[0], prediction[0], names, statistics)
    means, iou, accuracy = counted.scores()
    distributed.log("scores by class, in percent\n" + table(names, iou, accuracy))
    distributed.log("mIoU {mIoU:.2f}  mAcc {mAcc:.2f}  aAcc {aAcc:.2f}".format(**means))
    return means


def evaluate_checkpoint(path: str, model: nn.Module, evaluation: Callable[[nn.Module], dict[str, float]]) -> None:
    """Load the weights of a segmentation checkpoint, ours or the authors', and evaluate them.

    Raises:
        distributed.UserError: no checkpoint was named, or it does not fit the model.
    """
    if not path:
        raise distributed.UserError("--eval: name the checkpoint to evaluate with --resume")
    distributed.load_weights(model, path)
    evaluation(model)


def fit(
    args: argparse.Namespace,
    model: nn.Module,
    loader: IterationLoader,
    updater: distributed.Updater,
    set_rates: Callable[[int], None],
    checkpoint: distributed.Checkpoint,
    resume: str,
    evaluation: Callable[[nn.Module], dict[str, float]],
) -> None:
    """Train from the checkpoint `resume` ('': anew) to the last update; evaluate, log and save every interval.

    Args:
        evaluation: as `evaluate` with all but the model.
    Raises:
        distributed.UserError: a batch norm would see a single value.
    """
    plain = distributed.unwrap(model)
    pooled = any(isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size == 1 for m in plain.modules())
    if pooled and args.batch_size * distributed.world_size() == 1:
        raise distributed.UserError(
            "--batch_size 1: on one process batch norm has a single value per channel behind the pooling to 1 x 1; "
            "expected at least 2"
        )
    args.epochs = loader.intervals  # which is what `Checkpoint` counts
    position = checkpoint.resume(resume)
    tags = {name: f"train/{name}" for name in ("loss", "loss_decode", "loss_auxiliary", "pixel_acc", "lr", "grad_norm")}
    title = f"Interval: [{{done}}/{loader.intervals}]"
    for interval, epoch_log in checkpoint.epochs(loader, position, tags, title, total=loader.total):
        with checkpoint.on_exit(epoch_log, updater):
            stats = train_one_interval(model, loader, updater, set_rates, epoch_log, checkpoint, args)
        checkpoint.save(epoch_log.position(epoch_log.total))  # an evaluation may be stopped: it is repeated from here
        test = evaluation(plain)
        updates = (interval * len(loader) + epoch_log.total) // loader.accum_iter
        epoch_log.run_log.scalars({f"val/{name}": value for name, value in test.items()}, updates)
        line = {f"train_{k}": v for k, v in stats.items()} | {f"val_{k}": v for k, v in test.items()}
        epoch_log.run_log.epoch(line | {"epoch": interval, "iter": updates})
        if test["mIoU"] > checkpoint.best:
            checkpoint.best = test["mIoU"]
            checkpoint.save(distributed.Position(interval + 1), "checkpoint-best.pth")
        checkpoint.save(distributed.Position(interval + 1))
    done = f"{args.iters} updates done, best mIoU {checkpoint.best:.2f}"
    distributed.log(f"{done}; {checkpoint.files.latest} is in {args.output_dir or 'no folder'}")
