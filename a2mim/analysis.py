"""What both analyses need: files that appear when they are complete, progress, a style of figures, timm's networks."""

import argparse
import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from common import distributed
from common.distributed import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """Open a file for writing; it gets its name when it is complete.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_file(path: Path, advice: str) -> Any:
    """Content of an .npy file or a file of torch; raises UserError if it is missing or damaged."""
    try:
        return np.load(path) if path.suffix == ".npy" else torch.load(path, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing; {advice}") from error
    except Exception as error:  # of many types
        raise UserError(f"{path}: is damaged; delete it and {advice}") from error


def progress(items: Sequence, what: str) -> Iterator:
    """Yield items with a bar on a terminal, elsewhere a line every ten seconds; a stop signal ends it between two."""
    bar = sys.stderr.isatty() and distributed.is_main()
    begun = last = time.perf_counter()
    for done, item in enumerate(tqdm(items, desc=what, disable=not bar, dynamic_ncols=True), 1):
        if signum := distributed.stop_signal():
            raise distributed.Stopped(signum)
        yield item
        now = time.perf_counter()
        if not bar and (now - last > 10 or done == len(items)):
            distributed.log(f"{what} {done}/{len(items)}  time: {(now - begun) / done:.4f}")
            last = now


def axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty figure of this folder's style."""
    fig = Figure(figsize=(5, 3.6), layout="constrained", dpi=160)
    ax = fig.subplots()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return fig, ax


def save_figure(fig: Figure, path: Path) -> None:
    with replacing(path) as file:
        fig.savefig(file, format="png")
    distributed.log(f"wrote {path}")


def timm_network(name: str, classes: int, size: int, path: str | None, pretrained: bool = False) -> nn.Module:
    """A network of timm for images of `size` pixels, with weights from a file with timm's names.

    Raises:
        UserError: the name is unknown, or the weights belong to another network (without classes: but for its head).
    """
    model: Any
    try:
        try:  # networks whose parameters depend on the image's size want to know it
            model = timm.create_model(name, pretrained=pretrained, num_classes=classes, img_size=size)
        except TypeError:
            model = timm.create_model(name, pretrained=pretrained, num_classes=classes)
    except Exception as error:  # timm and its downloads raise many types
        raise UserError(f"{name}: {' '.join(str(error).split())[:300] or type(error).__name__}") from error
    if not path:
        return model
    weights = distributed.weights_of(distributed.load(path), path, bare=True)
    if not classes:
        heads = model.pretrained_cfg["classifier"]  # one name, or several
        heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        weights = {k: v for k, v in weights.items() if not k.startswith(heads)}
    with distributed.user_errors(f"{path}: is no {name} for {size} pixels"):
        for key, own in model.state_dict().items():
            if key in weights and weights[key].shape != own.shape:
                raise ValueError(f"{key} is {tuple(weights[key].shape)}, expected {tuple(own.shape)}")
        model.load_state_dict(weights)
    return model


def patch_keywords(args: argparse.Namespace, backbone: str) -> dict[str, Any]:
    """--patch_size for `build_classifier`, where the backbone is a ViT."""
    return {"patch_size": args.patch_size} if "vit" in backbone or "deit" in backbone else {}


def fingerprint(model: nn.Module) -> str:
    """A short hash of the network's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
