"""What a run's folder holds: logs that are torn or named otherwise, finished epochs of every author's checkpoints."""

import pytest

from common import distributed
from scripts.tools.runs import epochs_done, read_log


def test_read_log__skips_nulls_and_torn_lines(tmp_path):
    lines = [
        '{"train_loss": 9.0, "epoch": 1}',
        '{"train_loss": 2.0, "train_total_norm": null, "epoch": 0}',
        '{"train_loss": 1.0, "train_total_norm": Infinity, "note": "text", "epoch": 1}',
        "[1, 2]",
        '{"train_loss": 0.5',
    ]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    expected = {0: {"train_loss": 2.0, "epoch": 0}, 1: {"train_loss": 1.0, "epoch": 1}}
    assert read_log(str(tmp_path)) == read_log(str(tmp_path / "log.txt")) == expected


def test_read_log__finds_a_log_of_another_name_if_there_is_one(tmp_path):
    (tmp_path / "aim_nano.exp.log.txt").write_text('{"train_loss": 2.0, "epoch": 0}\n')
    assert read_log(str(tmp_path)) == {0: {"train_loss": 2.0, "epoch": 0}}
    (tmp_path / "aim_nano.exp2.log.txt").write_text("")
    with pytest.raises(distributed.UserError, match=r"/log.txt: cannot be read"):
        read_log(str(tmp_path))


@pytest.mark.parametrize(
    ("state", "done"),
    [
        ({"model": {}, "epoch": 2}, 3),
        ({"state_dict": {}, "epoch": 2}, 2),
        ({"teacher": {}, "student": {}, "epoch": 2}, 2),
        ({"state_dict": {}, "meta": {"epoch": 2}}, 2),
        ({"model": {}}, None),
    ],
)
def test_finished_epochs(state, done):
    assert epochs_done(state) == done
