"""Videos: the authors' propagation, the official scores, one command from frames to scores, and its mistakes."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from scripts.tools.shapes import write_video
from tests.support.helpers import assert_close, golden_files, load_golden
from tests.support.processes import launch
from tests.support.runs import arguments, mistake, run_main
from tests.support.udi_weights import NANO
from udi import davis_scores, main_video_segmentation, video
from udi.models_udi import VisionTransformer

# ---- propagation


@golden_files("udi", "video_propagation")
def test_propagation(path):
    ref = load_golden(path)
    meta, tolerance = ref.meta, ref.meta["tolerance"]
    h, w = meta["h"], meta["w"]
    tokens = ref["in/target_tokens"][0, 1:]
    ref.check("out/feat", tokens.T, **tolerance)
    near = video.neighborhood(h, w, meta["size_mask_neighborhood"], torch.arange(h * w))
    ref.equal("out/neighborhood_mask", near)
    context = list(ref["in/context_features"]), [seg[None] for seg in ref["in/context_segs"]]
    found = video.label_propagation(tokens, *context, h, w, meta["size_mask_neighborhood"], meta["topk"])
    ref.check("out/seg", found, **tolerance)
    full = F.interpolate(ref.get("out/seg", found), scale_factor=meta["patch"], mode="bilinear", align_corners=False)[0]
    ref.check("out/norm_mask", video.norm_mask(full), **tolerance)
    ref.equal("out/argmax", video.norm_mask(full).argmax(dim=0).byte())
    if "in/labels" in ref:
        ref.equal("out/one_hot", video.to_one_hot(ref["in/labels"]))
    if "in/rgb01" in ref:
        ref.check("out/color_normalize", video.color_normalize(ref["in/rgb01"]), **tolerance)
    for height, width, *scaled in ref.get("out/scaled_sizes", torch.empty(0)).tolist():
        assert list(video.scaled_size(height, width)) == scaled


def test_chunks_change_nothing(monkeypatch):
    """However few similarities are held at once; masks far away and features alone decide without a neighbourhood."""
    torch.manual_seed(0)
    h, w, n = 5, 7, 3
    feats, target = [torch.randn(6, h * w) for _ in range(n)], torch.randn(h * w, 6)
    segs = [torch.rand(1, 4, h, w) for _ in range(n)]
    for size in (0, 2):
        whole = video.label_propagation(target, feats, segs, h, w, size, 4)
        monkeypatch.setattr(video, "CHUNK", 4 * n * h * w)
        assert_close(video.label_propagation(target, feats, segs, h, w, size, 4), whole, rtol=1e-5, atol=1e-7)
        monkeypatch.undo()
    nearest = video.label_propagation(feats[1].T, feats, segs, h, w, 0, 1)
    assert_close(nearest, segs[1], rtol=1e-6, atol=0)


def test_all_ties_with_the_last_count():
    feats = [torch.ones(2, 4), torch.ones(2, 4)]
    segs = [torch.arange(4.0).view(1, 1, 2, 2), torch.full((1, 1, 2, 2), 5.0)]
    assert_close(video.label_propagation(feats[0].T, feats, segs, 2, 2, 0, 1), np.full((1, 1, 2, 2), 3.25), 1e-6, 0)


def test_a_channel_of_one_value_stays():
    """Upstream divides by zero there."""
    mask = torch.tensor([[[0.0, 0.0]], [[0.5, 0.5]], [[0.2, 0.6]]])
    assert video.norm_mask(mask).equal(torch.tensor([[[0.0, 0.0]], [[0.5, 0.5]], [[0.0, 1.0]]]))


# ---- scores


@golden_files("udi", "davis_scores")
def test_scores(path):
    ref = load_golden(path)
    tolerance = ref.meta["tolerance"]
    truth, pred = ref["in/truth"].numpy(), ref["in/pred"].numpy()
    j, f = davis_scores.frame_scores(truth, pred, ref.meta["boundary_threshold"])
    ref.check("out/J", j, **tolerance)
    ref.check("out/F", f, **tolerance)
    scores = davis_scores.object_scores("it", j, f)
    for name in ("J_mean", "J_recall", "F_mean", "F_recall"):
        ref.check(f"out/{name}", [getattr(score, name.lower()) for score in scores], **tolerance)
    ref.check("out/J_and_F", davis_scores.overall(scores)["J_and_F"], **tolerance)


def test_boundary_by_hand():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:3] = True
    rows = ["###..", "#.#..", "###..", "....."]
    assert davis_scores.boundary(mask).tolist() == [[c == "#" for c in row] for row in rows]
    assert not davis_scores.boundary(np.ones((4, 5), bool)).any(), "what lies beyond the frame is no neighbour"
    mask[3, 4] = True
    last = davis_scores.boundary(mask)
    assert last[3].tolist() == [False, False, False, True, False]
    assert last[:, 4].tolist() == [False, False, True, False]


def test_contours_by_a_literal_disk():
    """Against a dilation, pixel by pixel."""
    rng = np.random.default_rng(0)
    pred, truth = (np.kron(rng.random((6, 9)) > 0.6, np.ones((9, 7), bool)) for _ in range(2))
    tolerance = 0.03
    radius = math.ceil(tolerance * math.hypot(*pred.shape))
    edges = [np.argwhere(davis_scores.boundary(mask)) for mask in (pred, truth)]
    squares = ((edges[0][:, None] - edges[1][None]) ** 2).sum(-1)
    precision, recall = ((squares.min(axis=i) <= radius**2).mean() for i in (1, 0))
    expected = 2 * precision * recall / (precision + recall)
    assert 0 < expected < 1
    assert davis_scores.contour_accuracy(pred, truth, tolerance) == pytest.approx(expected, rel=1e-12)


def test_missing_objects_are_empty_and_others_an_error():
    truth, pred = np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)
    truth[:, :4], truth[:, 5:7] = 1, 2
    truth[1, 7] = davis_scores.VOID
    pred[:, :4] = 1
    j, f = davis_scores.frame_scores(truth, pred)
    assert j.tolist() == f.tolist() == [[1] * 3, [0] * 3]
    pred[1, 0, 0] = 3
    with pytest.raises(ValueError, match="object 3 is predicted where there are 2"):
        davis_scores.frame_scores(truth, pred)


# ---- the command


@pytest.fixture(scope="module")
def davis(tmp_path_factory) -> Path:
    """Two drawn videos of 10 frames."""
    root = tmp_path_factory.mktemp("davis")
    for i, name in enumerate(("first", "second")):
        write_video(root, name, np.random.default_rng(i), 64)
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("first\nsecond\n")
    return root


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


NAME = "topk-5-n-frames-7-mask-neighbors-12"


def flags_of(davis: Path, out: Path, *further: str) -> list[str]:
    own = [*NANO, "--pretrained_weights", "", "--short_side", "64", "--data_path", str(davis), "--output_dir", str(out)]
    return [*own, *further]


def rows_of(folder: Path) -> list[list[str]]:
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture(scope="module")
def masks(davis, tmp_path_factory) -> Path:
    """The masks of a random backbone, on one process."""
    out = tmp_path_factory.mktemp("out")
    run_main(main_video_segmentation, *flags_of(davis, out, "--save_pictures", "1"))
    return out / NAME


def test_files_and_scores(davis, masks, capsys):
    truth = davis / "Annotations/480p/first"
    assert sorted(path.name for path in (masks / "first").iterdir()) == sorted(path.name for path in truth.iterdir())
    first, given = (video.read_mask(folder / "00000.png") for folder in (masks / "first", truth))
    assert np.array_equal(first.numbers, given.numbers), "the first mask is the given one"
    assert first.palette[:12] == given.palette[:12]
    later = pixels(masks / "first/00005.png")
    assert later.shape == given.numbers.shape
    assert set(np.unique(later)) <= set(np.unique(given.numbers))
    header, *rows = rows_of(masks)
    assert header == ["name", "j_mean", "j_recall", "f_mean", "f_recall"]
    objects = {name: int(pixels(davis / f"Annotations/480p/{name}/00000.png").max()) for name in ("first", "second")}
    assert [row[0] for row in rows] == [f"{name}_{k + 1}" for name in objects for k in range(objects[name])]
    means = np.array([row[1:] for row in rows], float).mean(axis=0)
    line = json.loads((masks / "log.txt").read_text())
    assert line == pytest.approx(
        {"test_J_and_F": 50 * (means[0] + means[2]), "test_J": 100 * means[0], "test_F": 100 * means[2], "epoch": 0}
    )
    assert 0 < means[0] < 1
    assert getattr(Image.open(masks / "first.gif"), "n_frames", 1) == 10
    assert Image.open(masks / "first.png").width == 6 * main_video_segmentation.WIDTH
    assert not (masks / "second.gif").exists()


def test_two_processes_write_and_score_the_same(davis, masks, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    flags = flags_of(davis, out)
    assert launch(log, "udi/main_video_segmentation.py", *flags, processes=2) == [0, 0], log.read_text()
    assert rows_of(out / NAME) == rows_of(masks)
    assert (out / NAME / "second/00009.png").read_bytes() == (masks / "second/00009.png").read_bytes()


def test_existing_masks_are_scored(davis, masks, tmp_path, capsys):
    """The true ones are perfect; those of a folder, or of the same command."""
    before = rows_of(masks)
    run_main(main_video_segmentation, *flags_of(davis, masks.parent, "--eval"))
    assert rows_of(masks) == before
    shutil.copytree(davis / "Annotations/480p", tmp_path / "mine")
    run_main(main_video_segmentation, *flags_of(davis, tmp_path, "--eval", str(tmp_path / "mine")))
    assert all(float(value) == 1 for row in rows_of(tmp_path / "mine")[1:] for value in row[1:])
    assert "objects: J&F 100.00, J 100.00, F 100.00" in capsys.readouterr().out


def test_context(davis, monkeypatch):
    """The first frame and the last ones, each at most once; masks are those that were not enlarged."""
    seen = []
    plain = video.label_propagation

    def spy(target, feats, segs, *rest):
        seen.append([float(feat.sum()) for feat in feats])
        assert all(seg.shape[-2:] == rest[:2] for seg in segs)
        return plain(target, feats, segs, *rest)

    monkeypatch.setattr(video, "label_propagation", spy)
    torch.manual_seed(0)
    model = VisionTransformer([32], 8, embed_dim=12, depth=1, num_heads=2).eval()
    clip = video.read_videos(str(davis))[0]
    assert len(list(video.propagate(model, clip, torch.device("cpu"), n_last_frames=3, short_side=64))) == 10
    assert [len(context) for context in seen] == [1, 2, 3, 4, 4, 4, 4, 4, 4]
    assert all(context[0] == seen[0][0] for context in seen)
    assert seen[5][1:3] == seen[4][2:]


@pytest.mark.parametrize("shape", [(64, 64), (100, 64)])
def test_square_and_high_videos(shape, tmp_path):
    """Upstream resizes masks of square videos to another size than their frames."""
    for folder in ("JPEGImages/480p/it", "Annotations/480p/it", "ImageSets/2017"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("it\n")
    mask = np.zeros(shape, np.uint8)
    mask[20:40, 20:40], mask[0, 0] = 1, 3  # an object that is lost in the smaller mask, and a number that nobody has
    for i in range(2):
        frame = np.stack([np.roll(mask, i, 1) * 60 + 20] * 3, -1)
        Image.fromarray(frame).save(tmp_path / f"JPEGImages/480p/it/{i:05d}.jpg", quality=95)
    Image.fromarray(mask).save(tmp_path / "Annotations/480p/it/00000.png")
    run_main(main_video_segmentation, *flags_of(tmp_path, tmp_path / "out"))
    found = pixels(tmp_path / "out" / NAME / "it/00001.png")
    assert found.shape == shape
    assert set(np.unique(found)) == {0, 1}
    assert np.count_nonzero(found == 1) == pytest.approx(400, rel=0.5)
    assert not (tmp_path / "out" / NAME / "scores.csv").exists(), "no truth but the first mask"


def test_upstreams_defaults():
    args = arguments(main_video_segmentation)
    assert (args.n_last_frames, args.size_mask_neighborhood, args.topk, args.short_side) == (7, 12, 5, 480)
    assert main_video_segmentation.results_folder(args) == Path("small_video_segmentation", NAME)


# ---- mistakes


def broken(davis: Path, out: Path, change: Any) -> Path:
    shutil.copytree(davis, out)
    change(out)
    return out


def whole(root: Path) -> None:
    pass


def repaint(path: str, **options: Any):
    def change(root: Path) -> None:
        image = pixels(root / path)
        Image.fromarray(options["make"](image)).save(root / path)

    return change


MASK, FRAME = "Annotations/480p/first/00000.png", "JPEGImages/480p/second/00003.jpg"
MISTAKES: list[tuple[Any, list[str], str]] = [
    (lambda root: (root / "ImageSets/2017/val.txt").unlink(), [], "has no file ImageSets/2017/val.txt, expected the"),
    (lambda root: (root / "ImageSets/2017/val.txt").write_text("\n"), [], "val.txt: names no video"),
    (lambda root: (root / "ImageSets/2017/val.txt").write_text("x"), [], "480p/x: no such folder, or no .jpg in it"),
    (lambda root: (root / MASK).unlink(), [], "00000.png: no such file, expected the mask of the first frame"),
    (repaint(MASK, make=lambda mask: mask * 0), [], "00000.png: shows no object, expected numbers from 1 to 254"),
    (repaint(MASK, make=lambda mask: mask[:-1]), [], "00000.png: has 113 x 63 pixels, its frame 113 x 64"),
    (
        repaint(MASK, make=lambda mask: np.stack([mask] * 3, -1)),
        [],
        "is a mask in mode RGB, expected numbers of objects",
    ),
    (lambda root: (root / FRAME).write_bytes(b"no"), [], "00003.jpg: unreadable image"),
    (lambda root: (root / MASK).write_bytes(b"no"), [], "00000.png: unreadable mask"),
    (whole, ["--topk", "0"], "--topk 0: expected at least 1"),
    (whole, ["--short_side", "100"], "--short_side 100: is, or 64 is, no multiple of 8, the patch side"),
    (whole, ["--eval", "/nowhere"], "--eval: there is no folder /nowhere"),
    (whole, ["--output_dir", "/proc/x"], "/proc/x/topk-5-n-frames-7-mask-neighbors-12: cannot be written"),
    (whole, ["--pretrained_weights", "/no.pth"], "/no.pth: no such checkpoint file"),
]


@pytest.mark.parametrize(("change", "flags", "words"), MISTAKES, ids=[words for *_, words in MISTAKES])
def test_mistakes_are_one_line(change, flags, words, davis, tmp_path, capsys):
    root = broken(davis, tmp_path / "davis", change)
    assert words in mistake(main_video_segmentation, *flags_of(root, tmp_path / "out", *flags), capsys=capsys)


EVAL_MISTAKES: list[tuple[Any, str]] = [
    (lambda root: (root / "mine/first/00004.png").unlink(), "00004.png: unreadable mask"),
    (
        repaint("mine/first/00004.png", make=lambda mask: mask[:-1]),
        "first/00004.png: is of another size than the first",
    ),
    (repaint("mine/first/00004.png", make=lambda mask: mask + 7), "mine/first: object 9 is predicted where there are"),
    (
        lambda root: (root / "Annotations/480p/first/00004.png").unlink(),
        "00004.png: no such file, expected the true mask",
    ),
]


@pytest.mark.parametrize(("change", "words"), EVAL_MISTAKES, ids=[words for _, words in EVAL_MISTAKES])
def test_mistaken_masks(change, words, davis, tmp_path, capsys):
    shutil.copytree(davis, tmp_path / "davis")
    shutil.copytree(davis / "Annotations/480p", tmp_path / "davis/mine")
    change(tmp_path / "davis")
    flags = flags_of(tmp_path / "davis", tmp_path, "--eval", str(tmp_path / "davis/mine"))
    assert words in mistake(main_video_segmentation, *flags, capsys=capsys)
