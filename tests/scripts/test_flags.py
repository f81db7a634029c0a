"""Every tool says what is wrong with a flag in one line, exit status 2."""

import importlib

import pytest

from common import distributed
from scripts.tools.flags import Parser
from tests.support.helpers import ROOT

FILES = sorted((ROOT / "scripts" / "tools").glob("*.py"))
TOOLS = [path.stem for path in FILES if "if __name__ ==" in path.read_text()]


@pytest.mark.parametrize("name", [name for name in TOOLS if name not in ("recipe", "quickstart")])
def test_a_wrong_flag_is_one_line(name, capsys):
    """recipe.py is called by scripts only; the quickstart's parser is the same."""
    parser = importlib.import_module(f"scripts.tools.{name}").get_args_parser()
    assert isinstance(parser, Parser)
    with pytest.raises(SystemExit) as end:
        distributed.run(print, lambda: parser.parse_args(["--no_such_flag"]))
    lines = capsys.readouterr().err.splitlines()
    assert (end.value.code, len(lines)) == (2, 1)


@pytest.mark.parametrize("name", TOOLS)
def test_the_flags_are_parsed_where_errors_become_lines(name):
    source = (ROOT / "scripts" / "tools" / f"{name}.py").read_text()
    assert "argparse.ArgumentParser(" not in source
    assert "parse_args())" not in source
