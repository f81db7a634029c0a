"""Drawn data sets.

For dense tasks: shapes on photographs and clouds, with masks, boxes and tracks. Classes differ by outline and by
pattern (stripes, dots, ...); colours, sizes and directions of both are random. Written in three layouts: OUT/ade20k
(index masks), OUT/coco (json of polygons and run lengths), OUT/davis (videos). And fields in five bands, whose classes
are outline and material.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

CATEGORIES = {"disc": 1, "square": 2, "triangle": 4, "star": 7, "cross": 8, "ring": 13}  # gaps, as in COCO's own ids
NAMES = list(CATEGORIES)
FOLDERS = ("ade20k/images", "coco/train2017", "coco/val2017", "davis/JPEGImages")
SCALE = 4  # outlines are drawn this much larger and reduced, so that edges are smooth
PERIODS = 18  # of a pattern along the shorter side of a picture, give or take a quarter
VIDEOS = {"train": 1, "val": 3}
FRAMES = 10

Polygon = np.ndarray  # (n, 2) float, x and y in pixels


class Shape(NamedTuple):
    """name: of CATEGORIES. centre (x, y) and radius: pixels. angle: radians. texture: (s, s, 3) uint8."""

    name: str
    centre: tuple[float, float]
    radius: float
    angle: float
    texture: np.ndarray


# ---- textures


def photographs() -> list[np.ndarray]:
    """The two photographs that come with scikit-learn, (427, 640, 3) uint8."""
    from sklearn.datasets import load_sample_images  # here: the other data sets do without scikit-learn

    data: Any = load_sample_images()
    return data.images


def clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) uint8: noise of all scales, brightest where the coarse one is."""
    total = np.zeros((size, size, 3), np.float32)
    for octave in range(2, 7):
        noise = rng.integers(0, 256, (2**octave, 2**octave, 3), np.uint8)
        total += np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)) / 2**octave
    low, high = total.min((0, 1)), total.max((0, 1))
    return (255 * (total - low) / (high - low)).astype(np.uint8)


def texture(rng: np.random.Generator, photos: list[np.ndarray], size: int) -> np.ndarray:
    """(size, size, 3) uint8: a turned part of a photograph, or clouds in a third of the cases."""
    if rng.random() < 1 / 3:
        return clouds(rng, size)
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(80, 400))
    y, x = (int(rng.integers(length - side + 1)) for length in photo.shape[:2])
    part = Image.fromarray(photo[y : y + side, x : x + side]).resize((size, size), Image.Resampling.BICUBIC)
    return np.rot90(np.asarray(part), int(rng.integers(4)))


def pattern(name: str, rng: np.random.Generator, size: int, period: float) -> np.ndarray:
    """(size, size, 3) uint8: the pattern of a class, turned at random, in a dark and a light colour.

    Args:
        period: pixels after which the pattern repeats.
    """
    angle, phase = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi, 2)
    y, x = np.mgrid[:size, :size] * (2 * math.pi / period)
    u, v = x * math.cos(angle) + y * math.sin(angle) + phase[0], y * math.cos(angle) - x * math.sin(angle) + phase[1]
    if name == "disc":  # stripes
        level = np.sin(u)
    elif name == "square":  # checks
        level = 2 * np.sin(u) * np.sin(v)
    elif name == "triangle":  # dots
        level = np.sin(u) + np.sin(v) - 0.7
    elif name == "star":  # grain
        grains = Image.fromarray(rng.integers(0, 2, (math.ceil(3 * size / period),) * 2, np.uint8))
        level = 2.0 * np.asarray(grains.resize((size, size), Image.Resampling.NEAREST)) - 1
    elif name == "cross":  # a grid of lines
        level = 3 * np.maximum(np.sin(u), np.sin(v)) - 2.2
    else:  # ring: plain, a little lighter on one side
        level = np.sin(u / 8) / 3
    share = np.clip(0.5 + level, 0, 1)[..., None]
    colours = rng.uniform((0, 150), (105, 255), (3, 2)).T[rng.permutation(2)]
    return (colours[0] + share * (colours[1] - colours[0])).astype(np.uint8)


# ---- shapes


def corners(*one_turn: tuple[float, float], times: int) -> np.ndarray:
    """(n, 2) angles and radii of an outline that repeats `times` times in a full turn; angles as parts of one time."""
    parts = np.array([((i + part), radius) for i in range(times) for part, radius in one_turn])
    return parts * (2 * math.pi / times, 1)


ARM = math.atan(1 / 3) / (math.pi / 2)  # half the angle of a cross's arm, three times as long as half its width
OUTLINES = {  # of radius 1; the second one is a hole
    "disc": [corners((0, 1), times=40)],
    "square": [corners((0, 1), times=4)],
    "triangle": [corners((0, 1), times=3)],
    "star": [corners((0, 1), (0.5, 0.4), times=5)],
    "cross": [corners((-ARM, 1), (ARM, 1), (0.5, math.sqrt(0.2)), times=4)],
    "ring": [corners((0, 1), times=40), corners((0, 0.5), times=40)],
}


def polygons(shape: Shape) -> list[Polygon]:
    """The outline in pixels, then the hole of a ring."""
    return [
        np.stack([np.cos(angles + shape.angle), np.sin(angles + shape.angle)], 1) * radii[:, None] * shape.radius
        + shape.centre
        for angles, radii in (outline.T for outline in OUTLINES[shape.name])
    ]


def coverage(shape: Shape, height: int, width: int) -> np.ndarray:
    """(H, W) float in 0..1: the part of each pixel that lies in the shape."""
    canvas = Image.new("L", (width * SCALE, height * SCALE))
    for polygon, value in zip(polygons(shape), (255, 0), strict=False):
        points = [(float(x), float(y)) for x, y in polygon * SCALE - 0.5]  # Pillow's pixel centres are whole numbers
        ImageDraw.Draw(canvas).polygon(points, fill=value)
    return np.asarray(canvas.reduce(SCALE), np.float32) / 255


def pasted(shape: Shape, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float: the shape's texture around its centre, its edge repeated outwards."""
    x, y = (round(c - len(shape.texture) / 2) for c in shape.centre)
    rows, columns = (np.clip(np.arange(n) - start, 0, len(shape.texture) - 1) for n, start in ((height, y), (width, x)))
    return shape.texture[rows[:, None], columns].astype(np.float32)


def paint(background: np.ndarray, shapes: list[Shape]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paint shapes over each other.

    Returns:
        image (H, W, 3) uint8; owner (H, W) int, index of the shape in front or -1; mixed (H, W) bool, pixels of edges.
    """
    image = background.astype(np.float32)
    height, width = image.shape[:2]
    owner, mixed = np.full((height, width), -1), np.zeros((height, width), bool)
    for index, shape in enumerate(shapes):
        covered = coverage(shape, height, width)
        image += covered[..., None] * (pasted(shape, height, width) - image)
        owner[covered >= 0.5] = index
        mixed = (mixed & (covered < 1)) | ((covered > 0) & (covered < 1))
    return image.round().astype(np.uint8), owner, mixed


def make(rng: np.random.Generator, name: str, centre: tuple[float, float], radius: float, side: int) -> Shape:
    """A shape in a picture whose shorter side is `side`, turned at random."""
    period = side / PERIODS * rng.uniform(0.75, 1.25)
    return Shape(name, centre, radius, rng.uniform(0, 2 * math.pi), pattern(name, rng, math.ceil(2 * radius), period))


def place(
    rng: np.random.Generator, shapes: list[Shape], box: tuple[int, int], sizes: tuple[float, float] = (0.18, 0.36)
) -> Shape:
    """A random shape in a picture of (width, height), of ten places the one farthest from the other shapes.

    Args:
        sizes: smallest and largest radius, as parts of the shorter side.
    """
    name = NAMES[rng.integers(len(NAMES))]
    radius = min(box) * math.exp(rng.uniform(*np.log(sizes)))
    places = rng.uniform(0.7 * radius, np.array(box) - 0.7 * radius, (10, 2))
    gaps = [[math.dist(p, s.centre) - s.radius for s in shapes] or [0.0] for p in places]
    x, y = places[int(np.argmax([min(gap) for gap in gaps]))]
    return make(rng, name, (x, y), radius, min(box))


# ---- stills, as ADE20K and as COCO


def runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: column by column, beginning with the number of zeros."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, flat.size]).tolist()}


def annotation(mask: np.ndarray, name: str, segmentation: Any, crowd: bool) -> dict[str, Any]:
    ys, xs = np.nonzero(mask)
    x, y = int(xs.min()), int(ys.min())
    return {
        "category_id": CATEGORIES[name],
        "segmentation": segmentation,
        "area": int(mask.sum()),
        "bbox": [x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y],
        "iscrowd": int(crowd),
    }


def still(rng: np.random.Generator, photos: list, size: int, index: int) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """Draw a picture whose short side is `size`; every 20th is empty, every 20th has a crowd of discs.

    Returns:
        image (H, W, 3) uint8; labels (H, W) uint8: 0 on mixed pixels, 1 background, 2 + index in NAMES;
        annotations of the shapes: a polygon where the whole shape is seen and has no hole, else run lengths.
    """
    height, width = ((size, size), (size, size * 4 // 3), (size * 4 // 3, size))[rng.integers(3)]
    background = texture(rng, photos, max(height, width))[:height, :width]
    shapes: list[Shape] = []
    if index % 20 == 10:
        middle = rng.uniform(0.3, 0.7, 2) * (width, height)
        for x, y in middle + rng.normal(0, size / 12, (14, 2)):
            shapes.append(make(rng, "disc", (x, y), size / 24, size))
    crowd = len(shapes)
    for _ in range(int(rng.integers(1, 4)) if index % 20 else 0):
        shapes.append(place(rng, shapes, (width, height)))
    image, owner, mixed = paint(background, shapes)
    labels = np.array([*(2 + NAMES.index(s.name) for s in shapes), 1], np.uint8)[owner]
    labels[mixed] = 0
    annotations = []
    crowd_mask = (owner >= 0) & (owner < crowd)
    if crowd_mask.any():
        annotations.append(annotation(crowd_mask, "disc", runs(crowd_mask), True))
    for i, shape in enumerate(shapes[crowd:], crowd):
        mask, outline = owner == i, polygons(shape)
        whole = (mask == (coverage(shape, height, width) >= 0.5)).all()
        plain = whole and len(outline) == 1 and (outline[0] >= 0).all() and (outline[0] <= (width, height)).all()
        segmentation = [outline[0].round(2).ravel().tolist()] if plain else runs(mask)
        if mask.any():
            annotations.append(annotation(mask, shape.name, segmentation, False))
    return image, labels, annotations


def save(array: np.ndarray, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_stills(out: Path, split: str, numbers: range, size: int, seed: int) -> None:
    """The pictures of training or validation in both layouts."""
    photos, images, annotations = photographs(), [], []
    year = {"training": "train2017", "validation": "val2017"}[split]
    for i in tqdm(numbers, split):
        image, labels, found = still(np.random.default_rng([seed, 0, i]), photos, size, i)
        number = 100 + 3 * i
        save(image, out / "coco" / year / f"{number:012d}.jpg", quality=95)
        save(image, out / "ade20k/images" / split / f"shapes_{i:06d}.jpg", quality=95)
        save(labels, out / "ade20k/annotations" / split / f"shapes_{i:06d}.png")
        height, width = labels.shape
        images.append({"id": number, "file_name": f"{number:012d}.jpg", "width": width, "height": height})
        annotations += [{"id": len(annotations) + k + 1, "image_id": number, **entry} for k, entry in enumerate(found)]
    categories = [{"id": number, "name": name, "supercategory": "shape"} for name, number in CATEGORIES.items()]
    file = out / "coco/annotations" / f"instances_{year}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


# ---- videos, as DAVIS


def write_video(out: Path, name: str, rng: np.random.Generator, size: int) -> None:
    """FRAMES frames of two or three shapes that move, turn and cover each other before a background that moves too."""
    photos, height, width = photographs(), size, size * 16 // 9
    background = texture(rng, photos, width + FRAMES)
    first: list[Shape] = []
    for _ in range(int(rng.integers(2, 4))):
        first.append(place(rng, first, (width, height), sizes=(0.14, 0.24)))
    speed = (np.array([width / 2, height / 2]) - [s.centre for s in first]) * 0.7 / FRAMES  # towards the middle
    turn = rng.uniform(-0.1, 0.1, len(first))  # radians per frame
    colours = np.array([(0, 0, 0), (236, 95, 103), (249, 145, 87), (250, 200, 99)], np.uint8)
    for t in range(FRAMES):
        shapes = [
            s._replace(centre=tuple(s.centre + t * v), angle=s.angle + t * w)
            for s, v, w in zip(first, speed, turn, strict=True)
        ]
        image, owner, _ = paint(background[t : t + height, t : t + width], shapes)
        save(image, out / "JPEGImages/480p" / name / f"{t:05d}.jpg", quality=95)
        path = out / "Annotations/480p" / name / f"{t:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = Image.fromarray((owner + 1).astype(np.uint8))
        mask.putpalette(colours.ravel().tolist())
        mask.save(path)


def write_shapes(out: Path, images: int, size: int, seed: int) -> None:
    """Draw the whole data set; a fifth of the images is for validation. The same seed draws the same pictures."""
    held = max(1, images // 5)
    write_stills(out, "training", range(images - held), size, seed)
    write_stills(out, "validation", range(images - held, images), size, seed)
    (out / "ade20k/classes.txt").write_text("\n".join(["background", *NAMES]) + "\n")
    for split, count in VIDEOS.items():
        names = [f"{split}-{number}" for number in range(count)]
        for number, name in enumerate(tqdm(names, "videos")):
            write_video(out / "davis", name, np.random.default_rng([seed, 1 + len(split), number]), size)
        listing = out / "davis/ImageSets/2017" / f"{split}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(names) + "\n")


# ---- fields as a satellite sees them, five bands

# Reflected shares of blue, green, red, near infrared and short-wave infrared; lawns differ in the last two alone.
MATERIALS = {"grass": (0.06, 0.20, 0.08, 0.55, 0.20), "turf": (0.06, 0.20, 0.08, 0.12, 0.45)}
SOIL = (0.14, 0.18, 0.24, 0.30, 0.36)
FIELDS = ("disc", "square", "triangle")


def field(rng: np.random.Generator, outline: str, material: str, size: int) -> np.ndarray:
    """(size, size, 5) uint16: a field of one material on uneven soil, in changing light."""
    radius = rng.uniform(0.2, 0.35) * size
    shape = Shape(
        outline, tuple(rng.uniform(radius, size - radius, 2)), radius, rng.uniform(0, 2 * math.pi), np.empty(0)
    )
    covered = coverage(shape, size, size)[..., None]
    uneven = 0.6 + 0.8 * clouds(rng, size).mean(axis=2, keepdims=True) / 255
    shares = uneven * (covered * np.array(MATERIALS[material]) + (1 - covered) * np.array(SOIL))
    light = rng.uniform(0.7, 1.3) * shares + rng.normal(0, 0.02, shares.shape)
    return (light.clip(0, 1) * 65535).round().astype(np.uint16)


def write_fields(out: Path, images: int, size: int, seed: int) -> None:
    """Draw .npy files in six classes, outline and material, in turn; every fifth of a class is for validation."""
    classes = [(outline, material) for outline in FIELDS for material in MATERIALS]
    for i in tqdm(range(images), "fields"):
        outline, material = classes[i % len(classes)]
        split = "val" if i // len(classes) % 5 == 4 else "train"
        path = out / split / f"{material}_{outline}" / f"{i:05d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, field(np.random.default_rng([seed, i]), outline, material, size))
