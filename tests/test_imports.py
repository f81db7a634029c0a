"""`import models_saim` from inside a method's folder works, as in the authors' repositories."""

import importlib
import os
import sys
from pathlib import Path

import pytest

from tests.support.documents import METHODS
from tests.support.helpers import ROOT
from tests.support.processes import CONTEXT


def import_inside(folder: str, names: list[str]) -> None:
    """`cd folder; python -c "import name, ..."`, where only the modules themselves can find the checkout."""
    os.chdir(folder)
    sys.path[:] = ["", *(path for path in sys.path if Path(path).resolve() != ROOT)]
    for module in [name for name in sys.modules if name.split(".")[0] in ("common", *METHODS)]:
        del sys.modules[module]
    for name in names:
        assert importlib.import_module(name).__file__ == f"{folder}/{name}.py"


@pytest.mark.parametrize("method", METHODS)
def test_models_are_importable_inside_their_folder(method):
    names = [path.stem for path in sorted((ROOT / method).glob("models_*.py"))]
    assert names
    process = CONTEXT.Process(target=import_inside, args=(str(ROOT / method), names))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
