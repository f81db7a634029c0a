"""Documents taken apart: the commands, files and links that they name."""

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.helpers import ROOT

METHODS = ("saim", "semaim", "cae", "a2mim", "udi")
CONFIGS = ROOT / "a2mim/configs/openmixup"
PRETRAIN = CONFIGS / "pretrain/a2mim/imagenet/r50_l3_sz224_init_8xb256_cos_ep100.py"
FINETUNE = CONFIGS / "finetune/imagenet/r50_rsb_a3_ft_sz160_4xb512_cos_fp16_ep100.py"
# Words with which a command begins; what is not ours is only looked at.
OURS = ("python", "python3", "torchrun", "bash", "srun")
FOREIGN = ("cd", "cp", "git", "pip", "mkdir", "wget", "sbatch", "tail", "kill", "tensorboard")
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"[\w./*-]+\.(?:py|sh|md|toml|png)")


class Command(NamedTuple):
    text: str  # as it is written
    cwd: Path
    env: dict[str, str]
    words: list[str]  # without `env`, placeholders filled


# ---- commands


def expand(text: str) -> list[str]:
    """All readings of a command's text: optional parts are there, each of a|b|c, each METHOD in turn."""
    text = re.sub(
        r"\[[^\[\]]*(?:\.\.\.|\bflags\b|\bstage\b|arguments)[^\[\]]*\]", "", text
    )  # [stage ...], [flags of x]
    text = re.sub(r"[\[\]]", " ", text)
    text = re.sub(r"\(([^()|]*)\|[^()]*\)", r"\1", text)  # (--a N | --b P)
    text = re.sub(r"<[\w -]+>|\$\{\w+\}|\$\w+", "1", text)  # a number is also a path
    choices = [word.split("|") if re.fullmatch(r"\w+(\|\w+)+", word) else [word] for word in text.split(" ")]
    if "METHOD" in text:
        choices = [
            [word.replace("METHOD", m) for m in METHODS] if "METHOD" in (word := choice[0]) else choice
            for choice in choices
        ]
    return [" ".join(words) for words in itertools.product(*choices)]


def read_command(text: str, cwd: Path) -> Iterator[Command]:
    """The readings of a command, if it is one of ours.

    Raises:
        AssertionError: it begins with a word that is neither ours nor known.
    """
    for reading in expand(text):
        words = [word for word in shlex.split(reading, comments=True) if word not in ("...", "\n")]
        env = {}
        while words and re.fullmatch(r"[A-Z0-9_]+=.*", words[0], re.DOTALL):
            name, env[name] = words[0].partition("=")[0], words.pop(0).partition("=")[2]
        if not words or words[0] in FOREIGN:
            continue
        assert words[0] in OURS or words[0].endswith((".py", ".sh")), f"{text}: what is {words[0]}?"
        if words[0] == "srun":
            words = words[next(i for i, word in enumerate(words) if word in OURS[:3]) :]
        config = str(PRETRAIN if re.search(r"main_pretrain|main_visualize|dist_train\.sh", text) else FINETUNE)
        words = [config if word == "CONFIG" else "1" if re.fullmatch(r"[A-Z_]+", word) else word for word in words]
        yield Command(text, cwd, env, words)


def commands(document: Path) -> list[Command]:
    """The commands of a Markdown file's shell blocks, and of `code` in its text that begins like one."""
    text = document.read_text()
    found = []
    for language, block in BLOCK.findall(text):
        cwd = ROOT
        for line in re.sub(r"\\\n", "", block).splitlines() if language == "bash" else ():
            line = line.strip()
            folder = re.fullmatch(r"cd (\w+|\.\.)", line)
            cwd = (cwd / folder[1]).resolve() if folder else cwd
            found += read_command(line, cwd)
    for code in spans(text):
        word = re.match(r"(?:[A-Z_]+=\S+ )*(\S+) ", code)
        if word and (word[1] in OURS or re.fullmatch(r"[\w/]+\.(py|sh)", word[1])):
            found += read_command(code, ROOT)
    return found


def usage_lines(script: Path) -> list[Command]:
    """The commands of the line "Usage: ..." in a script, and of lines below that begin like one."""
    lines = [line.lstrip("# ") for line in script.read_text().split("\nimport ")[0].splitlines()]
    first = next((i for i, line in enumerate(lines) if re.search(r"\bUsage: ", line)), None)
    if first is None:
        return []
    usage = [lines[first].split("Usage: ")[1]]
    usage += itertools.takewhile(lambda line: line.startswith(OURS), lines[first + 1 :])
    parts = [part for line in usage for part in re.split(r"[;,](?: or)? |, ", line)]
    begins = re.compile(r"(?:[A-Z_]+=\S+ |\[[^\]]*\] )*(?:" + "|".join(OURS) + ")")
    return [command for part in parts if begins.match(part) for command in read_command(part.rstrip(":,.;"), ROOT)]


# ---- files and links


def spans(text: str) -> list[str]:
    """What stands between `backticks` outside of blocks, each in one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


def braces(word: str) -> list[str]:
    """a{b,c} as ab and ac."""
    parts = re.fullmatch(r"(.*)\{(.*)\}(.*)", word)
    return [f"{parts[1]}{middle}{parts[3]}" for middle in parts[2].split(",")] if parts else [word]


def files(document: Path) -> list[str]:
    """Paths of this repository in a Markdown file's `code`, also patterns; not those that runs write."""
    named = [path for code in spans(document.read_text()) for path in FILE.findall(code) if "/" in path]
    ours = re.compile(rf"({'|'.join((*METHODS, 'scripts', 'tests', 'common', 'docs'))})/")
    named += [code.split()[0] for code in spans(document.read_text()) if ours.match(code)]
    named = [path.replace("<method>", "*") for path in named]
    return [path for path in named if not re.match(r"/|(DATA|OUT|RUN|runs|work_dirs)/", path) and "..." not in path]


def headings(document: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(document: Path) -> list[str]:
    """Targets of a Markdown file's links and pictures that are not addresses."""
    targets = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", document.read_text()))
    return [target for target in targets if not re.match(r"https?:", target)]


# ---- where the paper is in the code

PLACES = re.compile(r"^## Where the paper is in the code\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
PLACE = re.compile(r"`([\w./]+\.py): ([\w., ]+)`")


def places(page: Path) -> dict[str, list[tuple[str, set[str]]]]:
    """The rows of a method's table of places: idea -> (file, names in it)."""
    section = PLACES.search(page.read_text())
    rows = section[1].split("|---|---|\n")[-1].splitlines() if section else []
    cells = [row.strip().strip("|").rsplit(" | ", 1) for row in rows if row.startswith("|")]
    return {
        idea.strip(): [(file, {name.strip() for name in names.split(",")}) for file, names in PLACE.findall(where)]
        for idea, where in cells
    }


def definitions(path: Path) -> set[str]:
    """Names of a file's functions, classes and constants, and of its methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found
