"""Fixtures of UDI's pre-training runs."""

from pathlib import Path

import pytest

from tests.support.processes import launch
from tests.support.udi_narrow_head import WIDTHS
from tests.support.udi_runs import NARROW, SCRIPT, flags_of, train
from udi.models_udi import DINOHead


@pytest.fixture(scope="module")
def narrow_head():
    """Checkpoints are small, in this process; in others by udi_narrow_head.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DINOHead.__init__, "__defaults__", WIDTHS)
        yield


@pytest.fixture(scope="session")
def reference(tmp_path_factory, digits):
    """Folders of uninterrupted runs by case and number of processes."""
    runs = {}

    def get(case: str, processes: int = 1, *further: str) -> Path:
        key = (case, processes, *further)
        if key not in runs:
            folder = runs[key] = tmp_path_factory.mktemp("reference")
            if processes == 1:
                train(case, digits, folder, *further)
            else:
                argv = [NARROW, SCRIPT, *flags_of(case, digits, folder, *further)]
                ends = launch(folder / "out", *argv, processes=processes, RECORD=str(folder))
                assert ends == [0] * processes, (folder / "out").read_text()
        return runs[key]

    return get
