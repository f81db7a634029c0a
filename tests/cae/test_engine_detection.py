"""One epoch, the evaluation and its pictures, with networks that stand in for a detector."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cae.engine_detection import annotated, evaluate, save_picture, train_one_epoch
from common import distributed
from common.datasets import Loader
from common.dense_datasets.detection import DetectionImages, ImageInfo, collate
from common.dense_datasets.views import EvalTransform, TrainTransform
from scripts.tools import shapes

CPU = torch.device("cpu")
LOSSES = ("loss_cls", "loss_mask")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write_stills(folder, "validation", range(1, 6), 64, 0)
    return folder / "coco"


def images_of(drawn: Path, train: bool) -> DetectionImages:
    return DetectionImages(drawn / "annotations/instances_val2017.json", drawn / "val2017", train)


class Known(nn.Module):
    """Knows the objects of all images, and draws when it trains."""

    def __init__(self, images: DetectionImages):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.known = {number: images.objects(i) for i, (_, number) in enumerate(images.samples)}
        self.seen: list[tuple[int, ...]] = []

    def forward(self, imgs: Tensor, infos: list[ImageInfo], targets: list[dict[str, Tensor]] | None = None):
        self.seen.append(tuple(info.image_id for info in infos))
        if targets is None:
            return [
                {**self.known[i.image_id], "scores": torch.ones(len(self.known[i.image_id]["labels"]))} for i in infos
            ]
        areas = torch.cat([target["masks"].sum((1, 2)) for target in targets]).float().mean()
        scale = self.scale.sum()
        return {"loss_cls": scale * areas / 1e3, "loss_mask": scale * torch.rand(())}


def one_epoch(drawn: Path, epoch: int = 0, start: int = 0) -> tuple[Known, dict[str, float]]:
    images = images_of(drawn, True)
    model = Known(images)
    options = {"num_workers": 0, "joint": True, "collate": collate}
    loader = Loader(images, TrainTransform([64], crop_short_sides=()), 1, CPU, accum_iter=2, **options)
    updater = distributed.Updater(torch.optim.SGD(model.parameters(), 1.0), CPU, accum_iter=2)
    log = distributed.EpochLog("", len(loader), 1, CPU, epoch=epoch, start=start)
    return model, train_one_epoch(model, loader, updater, lambda epoch, step: 0.1 * (epoch + step + 1), log)


def test_one_epoch__rates_losses_and_updates(drawn):
    model, stats = one_epoch(drawn)
    assert len(model.seen) == 5
    assert set(stats) == {"lr", "loss", *LOSSES, "grad_norm"}
    assert stats["loss"] == pytest.approx(stats["loss_cls"] + stats["loss_mask"])
    assert stats["lr"] == pytest.approx(0.1 * (1 + 1 + 3 + 3 + 5) / 5)  # set where an update begins
    assert model.scale.item() != 1


def test_draws_depend_on_the_step_alone(drawn):
    """An epoch entered at its third step draws what it would have drawn."""
    whole, parts = one_epoch(drawn, epoch=1), one_epoch(drawn, epoch=1, start=2)
    assert parts[0].seen == whole[0].seen[2:]
    assert one_epoch(drawn, epoch=1)[1] == whole[1]


def test_evaluation_is_perfect_for_a_network_that_knows(drawn, tmp_path):
    images = images_of(drawn, False)
    model = Known(images)
    loader = Loader(images, EvalTransform(64), 1, CPU, train=False, num_workers=0, joint=True, collate=collate)
    stats = evaluate(model, loader, images, str(tmp_path), pictures=2)
    assert stats["box_AP"] == pytest.approx(100)
    assert stats["mask_AP"] == pytest.approx(100)
    assert model.seen == [(number,) for _, number in images.samples]
    names = [f"{Path(path).stem}.png" for path, _ in images.samples[:2]]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names
    assert {"predictions.bbox.json", "predictions.segm.json"} <= {path.name for path in tmp_path.iterdir()}


def test_pictures_show_truth_and_what_was_found(drawn, tmp_path):
    images = images_of(drawn, False)
    truth = images.objects(0)
    seen = []
    for score in (0.9, 0.2):
        found = {**truth, "scores": torch.full((len(truth["labels"]),), score)}
        save_picture(tmp_path / str(score), images, 0, found)
        picture = Image.open(next((tmp_path / str(score)).iterdir()))
        seen.append(np.split(np.asarray(picture).astype(int), 2, axis=1))
    (left, found), (same, nothing) = seen
    assert min(left.shape[:2]) >= 240
    assert np.array_equal(left, same)
    assert np.abs(left - found).mean() < 8  # the texts differ
    assert np.abs(nothing - found).max() > 100  # no masks, boxes and scores
    (tmp_path / "file").touch()
    with pytest.raises(distributed.UserError, match="cannot be written"):
        save_picture(tmp_path / "file", images, 0, {**truth, "scores": torch.ones(len(truth["labels"]))})


def test_objects_have_their_classes_colours():
    image, masks = torch.zeros(3, 480, 500, dtype=torch.uint8), torch.zeros(2, 480, 500)
    masks[:, 20:80, 100:200] = 1
    boxes, labels = torch.tensor([[100.0, 20, 200, 80]]), torch.tensor([3])
    one, same, other = (annotated(image, boxes, masks[:1], label, ["x"]) for label in (labels, labels, labels + 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one[:, 50, 150].any()
    assert not one[:, 50, 300].any()
    assert torch.equal(annotated(image, boxes[:0], masks[:0], labels[:0], []), image)
