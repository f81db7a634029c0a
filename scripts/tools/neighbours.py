"""A picture of nearest neighbours: some images, and beside each those whose features are most similar.

Usage: python scripts/tools/neighbours.py FEATURES [--out PICTURE], FEATURES being a file of extract_features.py.
Similarity is the cosine of the features. An image is not its own neighbour.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from common import datasets, distributed
from common.distributed import UserError
from scripts.tools import extract_features
from scripts.tools.flags import Parser, writing

SIDE = 160  # pixels of a picture in the grid


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Nearest neighbours")
    p.add_argument("features", metavar="FEATURES", help="file that extract_features.py wrote")
    p.add_argument("--out", default="neighbours.png", help="picture to write; its ending chooses the format")
    p.add_argument("--queries", default=8, type=int, help="images whose neighbours are shown, spread over the classes")
    p.add_argument("--neighbours", default=5, type=int, help="neighbours of each")
    return p


def nearest(features: np.ndarray, queries: list[int], number: int) -> tuple[np.ndarray, np.ndarray]:
    """The most similar rows of some rows.

    Args:
        features: (n, D). queries: q rows. number: neighbours of each, at most n - 1.
    Returns:
        rows and cosines, (q, number), the most similar first.
    """
    vectors = np.asarray(features, np.float32)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    cosines = vectors[queries] @ vectors.T  # (q, n)
    cosines[np.arange(len(queries)), queries] = -np.inf
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :number]
    return rows, np.take_along_axis(cosines, rows, axis=1)


def spread(labels: np.ndarray, number: int) -> list[int]:
    """Rows that show every class in turn, and of a class rows far from each other."""
    count = min(number, len(labels))
    order = np.argsort(labels, kind="stable")
    return [int(order[i]) for i in np.linspace(0, len(labels) - 1, count).round().astype(int)]


def read_picture(path: Path, in_chans: int | None) -> Any:
    """An image to be shown: of other than three channels the first three, or the first."""
    image = datasets.read_image(path, in_chans)
    return (
        to_pil_image(image[:3] if len(image) > 3 else image[:1]).convert("RGB") if isinstance(image, Tensor) else image
    )


def draw(
    paths: list[Path],
    titles: list[str],
    queries: list[int],
    found: np.ndarray,
    cosines: np.ndarray,
    in_chans: int | None = None,
) -> Figure:
    """A row of pictures per query: itself, then its neighbours with their cosines.

    Args:
        paths, titles: of all images. queries: q images by their numbers. found, cosines: (q, neighbours), `nearest`.
        in_chans: of images of any depth; None: 8-bit RGB.
    """
    rows = np.column_stack([queries, found]).tolist()
    columns = len(rows[0])
    fig = Figure(figsize=(1.5 * columns, 1.75 * len(rows) + 0.3), layout="constrained", dpi=130)
    axes = fig.subplots(len(rows), columns, squeeze=False)
    for i, (line, row) in enumerate(zip(axes, rows, strict=True)):
        for j, (ax, index) in enumerate(zip(line, row, strict=True)):
            try:
                image = ImageOps.contain(read_picture(paths[index], in_chans), (SIDE, SIDE), Image.Resampling.BICUBIC)
            except (OSError, ValueError) as error:
                raise UserError(f"{paths[index]}: unreadable image ({error})") from error
            ax.imshow(image)
            ax.set_xticks([])
            ax.set_yticks([])
            title = titles[index] if len(titles[index]) <= 20 else f"{titles[index][:8]}...{titles[index][-9:]}"
            similar = f"\ncosine {cosines[i, j - 1]:.3f}" if j else ""
            ax.set_xlabel(title + similar, fontsize=7)
            for spine in ax.spines.values():
                spine.set_visible(j == 0)
                spine.set_linewidth(2)
        line[0].set_ylabel(f"query {i + 1}", fontsize=8)
    for ax, title in zip(axes[0], ["query", *(f"neighbour {n}" for n in range(1, columns))], strict=True):
        ax.set_title(title, fontsize=9)
    return fig


def main(args: argparse.Namespace) -> None:
    features, labels, about = extract_features.read(args.features)
    distributed.check_ranges(args, {"queries": (1, 100), "neighbours": (1, 100)})
    if len(features) < 2:
        raise UserError(f"{args.features}: has {len(features)} images, expected at least 2")
    root, names = Path(about["data_path"]), about["names"]
    if not (root / names[0]).is_file():
        raise UserError(f"{root / names[0]}: no such file; the images of {args.features} must be where they were")
    queries = spread(labels, args.queries)
    rows, cosines = nearest(features, queries, min(args.neighbours, len(features) - 1))
    classes = about.get("classes") or []
    titles = [classes[c] if 0 <= c < len(classes) else Path(n).name for c, n in zip(labels, names, strict=True)]
    figure = draw([root / name for name in names], titles, queries, rows, cosines, about.get("in_chans"))
    with writing(f"--out {args.out}", ValueError):  # of an unknown format
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out)
    print(f"wrote {args.out}: {len(queries)} images and their {rows.shape[1]} nearest of {len(features)}")


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
