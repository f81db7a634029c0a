"""k-NN: the vote against the authors' numbers, its properties, and the script on one and on several processes."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from semaim import main_knn
from semaim.main_knn import DUMPS, accuracy, class_scores, interleave, knn_classifier, knn_transform, nearest
from semaim.models_semaim import MODELS
from tests.support.helpers import (
    assert_close,
    golden_files,
    load_golden,
)
from tests.support.processes import launch
from tests.support.runs import mistake, run_main


@golden_files("semaim", "knn")
def test_vote(path):
    ref = load_golden(path)
    meta = ref.meta
    train, test = (F.normalize(ref[f"in/{split}_features_raw"], dim=1) for split in ("train", "test"))
    train_labels, test_labels = ref["in/train_labels"], ref["in/test_labels"]
    for k in meta["k"]:
        cosines, labels = nearest(train, train_labels, test, k)
        scores = class_scores(cosines, labels, meta["temperature"], meta["num_classes"])
        ref.check(f"out/k{k}/scores", scores, rtol=meta["tol"]["scores"], atol=meta["tol"]["scores"])
        if f"out/k{k}/pred" in ref:
            assert (scores.argmax(dim=1) != ref[f"out/k{k}/pred"]).float().mean() * 100 <= meta["tol"]["top1"]
        top1, top5 = knn_classifier(
            train, train_labels, test, test_labels, k, meta["temperature"], num_classes=meta["num_classes"]
        )
        ref.check(f"out/k{k}/top1", top1, rtol=0, atol=meta["tol"]["top1"])
        ambiguous = ref[f"out/k{k}/ambiguous_top5"].item() if f"out/k{k}/ambiguous_top5" in ref else 0
        ref.check(f"out/k{k}/top5", top5, rtol=0, atol=meta["tol"]["top1"] + 100 * ambiguous / len(test))


# ---- the vote


def features(n: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit vectors near the axis of their class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return F.normalize(torch.eye(classes)[labels] + 0.2 * torch.randn(n, classes, generator=draw), dim=1), labels


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_shards_merge_to_the_whole(shards, k):
    """Neighbours of each share of the training images, merged as the script does; shares may be smaller than k."""
    (train, labels), (test, _) = features(20, 4), features(9, 4, seed=1)
    whole = nearest(train, labels, test, k)
    found = [nearest(train[i::shards], labels[i::shards], test, k) for i in range(shards)]
    cosines, merged = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    cosines, index = cosines.topk(k, dim=1)
    assert_close(cosines, whole[0], rtol=0, atol=1e-6)
    assert torch.equal(merged.gather(1, index), whole[1])


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_interleave_restores_the_order(processes):
    whole = torch.arange(14).reshape(7, 2)
    assert torch.equal(interleave([whole[i::processes] for i in range(processes)]), whole)


def test_chunks_change_nothing(monkeypatch):
    (train, labels), (test, _) = features(20, 4), features(9, 4, seed=1)
    whole = nearest(train, labels, test, 5)
    monkeypatch.setattr(main_knn, "CHUNK", 1)  # image by image
    for a, b in zip(nearest(train, labels, test, 5), whole, strict=True):
        assert_close(a, b, rtol=0, atol=1e-6)


def test_votes_are_weighted_by_cosine():
    cosines = torch.tensor([[0.9, 0.5, 0.5]])
    near, far = torch.tensor([[1, 0, 0]]), torch.tensor([[2, 0, 0]])
    assert class_scores(cosines, near, temperature=0.07, num_classes=3).argmax() == 1
    assert class_scores(cosines, far, temperature=10, num_classes=3).argmax() == 0
    expected = [2 * torch.tensor(0.5 / 0.3).exp(), torch.tensor(0.9 / 0.3).exp(), torch.tensor(0.0)]
    assert_close(class_scores(cosines, near, 0.3, 3), [torch.stack(expected).numpy()], rtol=1e-6, atol=0)


def test_top5_counts_as_many_classes_as_there_are_neighbours():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]]).expand(6, -1)
    targets = torch.arange(6)
    for k, hits in ((1, 1), (2, 2), (4, 4), (5, 5), (20, 5)):
        assert accuracy(scores, targets, k) == (pytest.approx(100 / 6), pytest.approx(100 * hits / 6))


@pytest.mark.parametrize("classes", [1, 2, 3, 4])
def test_fewer_than_five_classes(classes):
    (train, labels), (test, targets) = features(12, classes), features(7, classes, seed=1)
    for k in (1, 3, 5, 12):
        top1, top5 = knn_classifier(train, labels, test, targets, k, 0.07, num_classes=classes)
        assert top1 == 100
        assert top5 == 100


def test_equal_scores_keep_the_order_of_the_classes():
    assert accuracy(torch.zeros(7, 7), torch.arange(7), 20) == (pytest.approx(100 / 7), pytest.approx(500 / 7))


@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (384, 512), (16, 18)])
def test_transform_resizes_in_proportion(size, shorter):
    assert knn_transform(size).transforms[0].size == shorter


# ---- the script

NANO = ["--model", "vit_nano_patch16", "--input_size", "16", "--patch_size", "8", "--num_workers", "0"]
NANO += ["--nb_classes", "10", "--batch_size_per_gpu", "7", "--nb_knn", "5", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("knn") / "pretrained.pth"
    model = MODELS["aim_nano"](img_size=16, patch_size=8, query_depth=4, permutation_type="stochastic")
    torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


def results(output: str) -> dict[int, tuple[float, float]]:
    """Top-1 and top-5 accuracy by k, in the order in which they were printed."""
    lines = re.findall(r"(\d+)-NN classifier result: Top1: ([\d.]+), Top5: ([\d.]+)$", output, re.MULTILINE)
    return {int(k): (float(top1), float(top5)) for k, top1, top5 in lines}


def test_several_processes_find_the_same(digits, checkpoint, tmp_path, capsys):
    """68 images do not share out evenly over the batches; the files are those of one process."""
    flags = [*NANO, "--global_pool", "--data_path", digits, "--pretrained_weights", checkpoint]
    run_main(main_knn, *flags, "--dump_features", str(tmp_path / "one"))
    alone = results(capsys.readouterr().out)
    assert list(alone) == [5, 1]
    log = tmp_path / "out"
    own = [*flags, "--dump_features", str(tmp_path / "two")]
    assert launch(log, "semaim/main_knn.py", *own, processes=2) == [0, 0], log.read_text()
    together = results(log.read_text())
    assert list(together) == [5, 1]
    for k, values in together.items():
        assert values == pytest.approx(alone[k], abs=5.01)  # of 20 images one may have two equally near neighbours
    for name in DUMPS:
        one, two = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("one", "two"))
        assert_close(two, one, rtol=0, atol=1e-5, what=name)
    one = [torch.load(tmp_path / "one" / name, weights_only=True) for name in DUMPS]
    assert [len(x) for x in one] == [48, 48, 20, 20]
    assert_close(one[0].norm(dim=1), torch.ones(48), rtol=0, atol=1e-6)
    assert one[1].diff().ge(0).all(), "images come in the order of their folders"
    run_main(main_knn, *flags, "--load_features", str(tmp_path / "one"), "--data_path", "/nowhere")
    assert results(capsys.readouterr().out) == alone


def dump(folder: Path, **replaced) -> str:
    folder.mkdir()
    (train, labels), (test, targets) = features(12, 3), features(6, 3, seed=1)
    for name, value in zip(DUMPS, (train, labels, test, targets), strict=True):
        torch.save(replaced.get(name.removesuffix(".pth"), value), folder / name)
    return str(folder)


def test_features_from_files(tmp_path, capsys):
    run_main(main_knn, *NANO, "--nb_knn", "12", "2", "--load_features", dump(tmp_path / "dump"))
    assert results(capsys.readouterr().out) == {12: (100, 100), 2: (100, 100)}


def test_neighbours_of_all_processes_are_merged(tmp_path, monkeypatch, capsys):
    """What process 0 of 2 prints: the vote of the whole, not of its share."""
    labels = torch.randint(0, 10, (12,), generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 10, (40,), generator=torch.Generator().manual_seed(1))
    train, test = features(12, 6)[0], features(40, 6, seed=1)[0]
    folder = dump(tmp_path / "dump", trainfeat=train, trainlabels=labels, testfeat=test, testlabels=targets)
    flags = [*NANO, "--nb_knn", "4", "7", "--load_features", folder]
    run_main(main_knn, *flags)
    alone = results(capsys.readouterr().out)
    other = list(nearest(train[1::2], labels[1::2], test, 7))
    monkeypatch.setattr(main_knn, "load_dump", lambda *_: [train[::2], labels[::2], test, targets])
    monkeypatch.setattr(main_knn.distributed, "all_sum", lambda _: [12.0])
    monkeypatch.setattr(main_knn.distributed, "gather", lambda own: [own, other])
    run_main(main_knn, *flags)
    assert results(capsys.readouterr().out) == alone


MISTAKES = [
    (["--nb_knn", "13", "2"], {}, "--nb_knn 13: there are only 12 training images"),
    (["--nb_knn", "0"], {}, "--nb_knn 0: expected at least 1"),
    (["--nb_classes", "2"], {}, "--nb_classes 2: an image is labelled 2"),
    (["--temperature", "0"], {}, "--temperature 0.0: expected at least"),
    ([], {"testfeat": torch.zeros(6, 4)}, "the files do not belong together"),
    ([], {"trainlabels": torch.zeros(11, dtype=torch.long)}, "the files do not belong together"),
    ([], {"testlabels": [1, 2]}, "--load_features"),
    ([], {"trainfeat": torch.zeros(12)}, "--load_features"),
]


@pytest.mark.parametrize(("flags", "replaced", "words"), MISTAKES, ids=lambda v: " ".join(v) if v else "")
def test_mistakes_are_one_line(flags, replaced, words, tmp_path, capsys):
    folder = dump(tmp_path / "dump", **replaced)
    assert words in mistake(main_knn, *NANO, "--nb_knn", "2", "--load_features", folder, *flags, capsys=capsys)


def test_use_cuda_without_cuda_is_told(tmp_path, capsys):
    run_main(main_knn, *NANO, "--nb_knn", "2", "--load_features", dump(tmp_path / "dump"), "--use_cuda")
    out = capsys.readouterr().out
    assert "WARNING: --use_cuda" in out
    assert results(out) == {2: (100, 100)}


def test_damaged_or_missing_files_are_named(tmp_path, capsys):
    folder = dump(tmp_path / "dump")
    expected = f"--load_features {folder}: expected trainfeat.pth, trainlabels.pth, testfeat.pth, testlabels.pth ("
    (tmp_path / "dump" / "testfeat.pth").write_bytes(b"nonsense")
    assert expected in mistake(main_knn, *NANO, "--load_features", folder, capsys=capsys)
    (tmp_path / "dump" / "testfeat.pth").unlink()
    assert expected in mistake(main_knn, *NANO, "--load_features", folder, capsys=capsys)
