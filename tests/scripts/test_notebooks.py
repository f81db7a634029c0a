"""docs/notebooks: complete, small, and their code runs, in this process and without Jupyter."""

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
QUICK = {"EPOCHS = 16, 4, 3": "EPOCHS = 16, 4, 1", "runs/first_look": "{folder}/first_look"}  # sizes of a test


def code(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text())["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_was_executed_and_is_small(path):
    cells = code(path)
    assert path.stat().st_size < 400_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert str(Path.home()) not in path.read_text() and "/work" not in path.read_text()
    for cell in cells:
        ast.parse(cell["source"])
        assert max(map(len, cell["source"].splitlines())) <= 120


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    names: dict[str, Any] = {}
    for cell in code(path):
        text = cell["source"]
        for old, new in QUICK.items():
            text = text.replace(old, new.format(folder=os.path.relpath(tmp_path, ROOT)))
        exec(compile(text, path.name, "exec"), names)
    assert names["OUT"] == Path(os.path.relpath(tmp_path, ROOT), "first_look") if "OUT" in names else names["views"]
