"""Images in tar files: every image once, whatever the workers, with labels or without; mistakes name the file."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from common import datasets
from common.datasets import Loader, tars
from common.distributed import Position, UserError

CPU = torch.device("cpu")


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(digits, tmp_path_factory) -> Path:
    """The digits' training images in two files, without labels in train-*.tar, with them in labelled-*.tar."""
    folder = tmp_path_factory.mktemp("tars")
    images = sorted(Path(digits, "train").rglob("*.png"))
    for shard in range(2):
        own = images[shard::2]
        bare = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in own}
        pack(folder / f"train-{shard:04}.tar", {"._x.png": b"", **bare})
        labels = {f"{path.parent.name}/{path.stem}.cls": path.parent.name.encode() for path in own}
        pack(folder / f"labelled-{shard:04}.tar", {**bare, **labels})
    return folder


def loader(shards: Path, workers: int = 0, labelled: bool = False, split: str = "train", **kwargs) -> Loader:
    images = datasets.image_dataset(str(shards), True, labelled, "wds/digits", split)
    return Loader(images, datasets.probe_transform(16), kwargs.pop("batch_size", 8), CPU, num_workers=workers, **kwargs)


def images_of(loader: Loader, epoch: int = 0, start: int = 0) -> torch.Tensor:
    return torch.cat([images for images, _ in loader.batches(epoch, start)])


def test_an_epoch_is_the_same_for_any_number_of_workers(shards):
    whole = images_of(loader(shards))
    assert len(loader(shards)) == 6
    for workers in (1, 3):
        assert torch.equal(images_of(loader(shards, workers)), whole)
    assert torch.equal(images_of(loader(shards), start=4), whole[32:])
    assert loader(shards).start(Position(0, 32)) == (4, {})
    assert not torch.equal(images_of(loader(shards), 1), whole)


def test_evaluation_reads_each_image_once_in_order(shards):
    data = loader(shards, labelled=True, split="labelled", train=False)
    labels = torch.cat([targets for _, targets in data.batches()]).tolist()
    samples = data.loader.dataset.base.samples  # type: ignore[attr-defined]
    assert labels == [int(Path(path).parent.name) for path, _ in samples]
    assert len(samples) == len({path for path, _ in samples}) == 48
    assert data.classes == list(range(10))


def test_splits_by_name_by_pattern_and_by_timms_list(shards, tmp_path):
    pytest.importorskip("braceexpand")
    (tmp_path / "a").symlink_to(shards)
    about = {"splits": {"small": {"filenames": ["a/train-0001.tar"], "num_samples": 24}}}
    (tmp_path / "_info.json").write_text(json.dumps(about))
    for split, count in (
        ("a/train-{0000..0001}.tar|48", 48),
        ("a/train-0000.tar::a/train-0001.tar", 48),
        ("small", 24),
    ):
        assert len(datasets.image_dataset(str(tmp_path), True, False, "wds/x", split)) == count
    with pytest.raises(UserError, match="48 images in 2 tar files, expected 60"):
        datasets.image_dataset(str(tmp_path), True, False, "wds/x", "a/train-{0000..0001}.tar|60")


def test_unreadable_images_are_named(shards, tmp_path):
    images = datasets.image_dataset(str(shards), True, False, "wds/x")
    good = {}
    for i in range(8):
        buffer = io.BytesIO()
        images[i][0].save(buffer, "PNG")
        good[f"{i}.png"] = buffer.getvalue()
    pack(tmp_path / "train.tar", {"bad.png": b"no image", **good})
    with pytest.raises(UserError, match=r"train.tar/bad.png: unreadable image"):
        images_of(loader(tmp_path, batch_size=9))
    skipping = loader(tmp_path, batch_size=9, bad_images="skip")
    assert len(images_of(skipping)) == 9
    assert len(skipping.bad) == 1


def test_mistakes_are_one_line(shards, tmp_path):
    whole = (shards / "train-0000.tar").read_bytes()
    for length in (2048, 3000, 3333):  # after a member, inside a header, inside an image
        (tmp_path / f"cut{length}.tar").write_bytes(whole[:length])
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    pack(tmp_path / "text.tar", {"a.png": b"", "a.cls": b"cat", "b.cls": b"1"})
    pack(tmp_path / "empty.tar", {"a.txt": b""})
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {}}))
    mistakes = {
        **{f"cut{length}.tar": f"cut{length}.tar: is damaged.*unexpected end" for length in (2048, 3000, 3333)},
        "packed.tar": "packed.tar: .* no uncompressed tar file",
        "text.tar": r"text.tar/a.png: has no class, expected its number in a .cls beside it",
        "empty.tar": "0 images in 1 tar files, expected some",
        "no.tar": "No such file",
        "other": "split other",
    }
    for split, words in mistakes.items():
        with pytest.raises(UserError, match=words) as error:
            datasets.image_dataset(str(tmp_path), True, True, "wds/x", split)
        assert str(tmp_path) in str(error.value)
    with pytest.raises(UserError, match="train-0000.tar/.*: has no class"):
        datasets.image_dataset(str(shards), True, True, "wds/x", "train")


def test_processes_share_the_reading(shards, monkeypatch):
    """Each reads one of the two files, and all have the images of both."""
    alone = datasets.image_dataset(str(shards), True, False, "wds/x").samples
    shares: list[list] = []
    for rank in (0, 1):
        monkeypatch.setattr(tars, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(tars, "world_size", lambda: 2)
        monkeypatch.setattr(tars, "gather", lambda own: shares.append(own) or shares)
        images = datasets.image_dataset(str(shards), True, False, "wds/x").samples
    assert [[i for i, _ in share] for share in shares] == [[0], [1]]
    assert images == alone
