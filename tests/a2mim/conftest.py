"""Fixtures: uninterrupted runs, which several files compare others with."""

from pathlib import Path

import pytest

from tests.support.a2mim_runs import CASES, SCRIPTS, flags_of
from tests.support.processes import launch
from tests.support.runs import run_main


@pytest.fixture(scope="session")
def reference(tmp_path_factory, digits):
    """Folders of uninterrupted runs by case and number of processes."""
    runs = {}

    def get(case: str, processes: int = 1, *further: str) -> Path:
        key = (case, processes, *further)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("reference")
            flags = flags_of(case, digits, runs[key], *further)
            if processes == 1:
                run_main(CASES[case][0], *flags)
            else:
                assert launch(runs[key] / "out", SCRIPTS[case], *flags, processes=processes) == [0] * processes
        return runs[key]

    return get
