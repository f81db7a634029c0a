"""Every golden file is of a kind that a test runs, or that a reason excuses."""

import json

import numpy as np
import pytest
import torch

from tests.support import helpers


def test_a_misspelt_file_is_found(tmp_path, monkeypatch):
    for name in (
        "saim/pretrain_mine.npz",
        "saim/pretain_mine.npz",
        "saim/masks.json",
        "cae/caev2_fwd.npz",
        "udi/README.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(helpers, "GOLDEN_DIR", tmp_path)
    assert helpers.unregistered_files() == [
        str(tmp_path / "saim" / name) for name in ("masks.json", "pretain_mine.npz")
    ]


def test_all_files_here_are_registered():
    assert not helpers.unregistered_files()
    assert all(helpers.NOT_RUN.values())


def test_what_a_file_holds_is_compared_and_nothing_else_is_needed(tmp_path):
    np.savez(tmp_path / "a.npz", **{"out/x": np.ones(2), "meta": json.dumps({"keys": ["k"]})})
    ref = helpers.load_golden(tmp_path / "a.npz")
    ref.check("out/absent", torch.zeros(3), rtol=0, atol=0)
    ref.equal("absent", 5)
    ref.check("out/x", torch.ones(2), rtol=0, atol=0)
    ref.equal("keys", ["k"])
    assert ref.get("out/absent", 3) == 3
    for wrong in (
        lambda: ref.check("out/x", torch.full((2,), 1.1), rtol=0.01, atol=0),
        lambda: ref.check("out/x", torch.ones(3), rtol=0, atol=0),
        lambda: ref.equal("keys", []),
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            wrong()
