"""What the documents and the scripts' usage lines say: commands parse, files exist, links lead somewhere."""

import importlib
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import launch as old_launcher
from torch.distributed import run as launcher

from tests.support import documents
from tests.support.documents import FILE, METHODS, Command
from tests.support.helpers import ROOT

PAGES = [ROOT / method / "README.md" for method in METHODS]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests/golden/README.md", *PAGES]
SCRIPTS = sorted(
    p for folder in ("scripts", *METHODS) for p in ROOT.glob(f"{folder}/**/*.*") if p.suffix in (".py", ".sh")
)
FORWARDS = {"tests/support/udi_literal_loss.py": "udi/main_pretrain.py"}  # scripts whose flags are another one's
# Stands in for the interpreter in a shell script: writes down what it is called with.
STUB = '#!/bin/sh\n{ printf python; for word; do printf " %s" "$word"; done; echo; } >>"$CALLS"\n'


@pytest.fixture
def parse(monkeypatch, tmp_path) -> Callable[[Command], None]:
    """Parse a command as its program would; fails where that complains, or there is no such program or network."""
    monkeypatch.setattr("sys.argv", ["pytest"])
    parsed: list[Any] = []
    for module in ("common.distributed", "common.distributed.command"):
        monkeypatch.setattr(f"{module}.run", lambda main, args: parsed.append(args() if callable(args) else args))
    monkeypatch.setattr("common.distributed.command._content", lambda path: {})  # of --config, a user's file

    def python(words: list[str], cwd: Path) -> None:
        if words[:2] in (["-m", "torch.distributed.launch"], ["-m", "torch.distributed.run"]):
            words = launched(old_launcher.parse_args if words[1].endswith("launch") else launcher.parse_args, words[2:])
        if words[0] == "-m":
            if words[1].split(".")[0] not in ("common", "scripts", "tests", *METHODS):
                return  # an installed program
            words = [str(ROOT / (words[1].replace(".", "/") + ".py")), *words[2:]]
        if words[0] == "-c":
            return
        script = cwd / words[0]
        assert script.is_file(), f"no script {script}"
        script = ROOT / FORWARDS.get(str(script.relative_to(ROOT)), str(script))
        monkeypatch.chdir(cwd)
        sys.argv = [str(script), *words[1:]]
        try:
            names = runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            assert not end.code, shlex.join(sys.argv)
            return
        if "--model" in words and "MODELS" in names:
            assert parsed[-1].model in names["MODELS"], shlex.join(sys.argv)
        known: Any = names.get("known")
        if known is not None and known.method in METHODS:  # the flags of a main, behind those of a tool for all methods
            main = importlib.import_module(f"{known.method}.main_{getattr(known, 'stage', 'pretrain')}")
            try:
                main.get_args_parser().parse_args(names["unknown"])
            except SystemExit:
                pytest.fail(shlex.join(sys.argv))

    def launched(read: Callable[..., Any], words: list[str]) -> list[str]:
        args = read(words)
        module = ["-m"] if args.module else []
        return [*module, args.training_script, *args.training_script_args]

    def shell(command: Command, script: Path) -> None:
        dry = ["--dry_run"] if "lib/row.sh" in script.read_text() else []
        calls = tmp_path / "calls"
        calls.write_text("")
        for name in ("python", "python3"):
            (tmp_path / name).write_text(STUB)
            (tmp_path / name).chmod(0o755)
        env = {
            **os.environ,
            "GPUS": "1",
            "CALLS": str(calls),
            **command.env,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        }
        line = ["bash", str(script), *command.words[command.words.index(script_of(command)) + 1 :], *dry]
        done = subprocess.run(line, cwd=command.cwd, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        for call in calls.read_text().splitlines():
            words = shlex.split(call)[1:]
            if words[0].endswith(".py") or words[0] == "-m":
                python(words, command.cwd if (command.cwd / words[0]).exists() or words[0] == "-m" else ROOT)

    def script_of(command: Command) -> str:
        return next(word for word in command.words if word.endswith(".sh"))

    def call(command: Command) -> None:
        first, *rest = command.words
        if first in ("python", "python3"):
            python(rest, command.cwd)
        elif first == "torchrun":
            python(launched(launcher.parse_args, rest), command.cwd)
        elif first.endswith(".py"):
            python(command.words, command.cwd)
        else:
            script = command.cwd / script_of(command)
            assert script.is_file(), f"no script {script}"
            shell(command, script)

    return call


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_of_documents__parse(document, parse):
    found = documents.commands(document)
    assert len(found) >= {"README.md": 10, "FAQ.md": 20}.get(name_of(document), 4 if document in PAGES else 0)
    for command in found:
        parse(command)


def test_usage_lines__parse(parse):
    found = [command for script in SCRIPTS for command in documents.usage_lines(script)]
    assert len({command.text for command in found}) > 30
    for command in found:
        parse(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_of_documents__exist(document):
    for path in documents.files(document):
        assert any(
            True for folder in (ROOT, *(ROOT / m for m in METHODS)) for _ in folder.glob(path.replace("METHOD", "*"))
        ), path


def test_layout__names_what_exists():
    blocks = documents.BLOCK.findall((ROOT / "README.md").read_text())
    layout = next(block for language, block in blocks if not language)
    named = [
        name
        for word in layout.split()
        for name in documents.braces(word.strip(":;,()"))
        if FILE.fullmatch(name) or name[-1] == "/"
    ]
    assert {"common/", "main_pretrain.py", "distributed/metrics.py"} <= set(named)
    for name in named:
        assert any(True for _ in ROOT.rglob(name)), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_of_documents__lead_somewhere(document):
    for target in documents.links(document):
        path, _, anchor = target.partition("#")
        other = document.parent / path if path else document
        assert other.exists(), target
        assert not anchor or anchor in documents.headings(other), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_places_of_the_paper__exist(page):
    """The table that says where the paper's ideas are in the code names files, functions and methods that are there."""
    places = documents.places(page)
    assert len(places) >= 8
    for idea, named in places.items():
        assert named, f"no place in the code for: {idea}"
        for file, names in named:
            defined = documents.definitions(page.parent / file)
            assert names <= defined, f"{file} does not define {', '.join(sorted(names - defined))}"
