"""Blocks that method folders keep twice on purpose are equal: `# same as <method>/<file>.py` above a definition."""

import ast
import re
from functools import cache

import pytest

from tests.support.helpers import ROOT

METHODS = ("saim", "semaim", "cae", "a2mim", "udi")
COMMENT = re.compile(r"^\s*# same as (\w+/\w+\.py)$")


def name_of(node: ast.stmt) -> str:
    """Name of a top-level function, class or variable."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        return ast.unparse(node.targets[0])
    return ast.unparse(node.target) if isinstance(node, ast.AnnAssign) else getattr(node, "name", "")


@cache
def definitions(source: str) -> dict[str, str]:
    """Top-level definitions by name, without comments and layout; the whole module under ''."""
    tree = ast.parse(source)
    return {"": ast.unparse(tree)} | {name_of(node): ast.unparse(node) for node in tree.body}


def promises(source: str) -> tuple[list[tuple[str, str]], int]:
    """(name, other file) of each definition that must be equal there ('': the module), and the number of comments."""
    lines = source.splitlines()
    comments = [COMMENT.match(line) for line in lines]
    if not any(comments):
        return [], 0
    found = [("", comments[0][1])] if lines and comments[0] else []
    for node in ast.parse(source).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        comment = comments[first - 2] if first > 2 else None  # the module's comment is nobody else's
        if comment:
            found.append((name_of(node), comment[1]))
    return found, sum(comment is not None for comment in comments)


SOURCES = [path for method in METHODS for path in sorted((ROOT / method).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_promised_copies_are_equal(path):
    source = path.read_text()
    found, comments = promises(source)
    assert len(found) == comments, "a comment stands above no definition"
    for name, other in found:
        own = definitions(source)
        copy = definitions((ROOT / other).read_text())
        assert name in copy, f"{other} defines no {name}"
        assert own[name] == copy[name], f"{name or 'the module'} differs from {other}"


def test_promises_are_found():
    """The check itself: decorators, classes, variables, whole modules, and comments in the wrong place."""
    body = (
        "import x\n\n\n# same as a/b.py\n@x\ndef f():\n    pass\n\n\n# same as a/c.py\nK = 1\n\n\nclass C:\n    pass\n"
    )
    assert promises(body) == ([("f", "a/b.py"), ("K", "a/c.py")], 2)
    assert promises("# same as a/b.py\n" + body)[0][0] == ("", "a/b.py")
    found, comments = promises("class C:\n    # same as a/b.py\n    k = 1\n")
    assert (found, comments) == ([], 1)
    assert definitions("K = 1  # one\n") == definitions("K = (1)\n")
    assert definitions("def f(a): return a")["f"] != definitions("def f(b): return b")["f"]


def test_semaim_keeps_its_copies():
    counts = {p.stem: promises(p.read_text())[1] for p in SOURCES if p.parent.name == "semaim"}
    assert sum(counts.values()), "no copy is promised, the scan sees nothing"
