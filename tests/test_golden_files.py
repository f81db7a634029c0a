"""Every golden file is of a kind that a test runs, or that a reason excuses."""

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
