"""Compare a checkout of the authors' repository with this project: files, flags, constructors, and a checkpoint.

Nothing of the checkout is imported or executed; its Python files are read as syntax trees. What it holds is read from
it, what is ours is read from our code. upstream/<method>.json names what belongs together and where the two differ on
purpose; upstream/README.md says how.

Exit status: 0, 1 if anything is unexpected, 2 for a user's mistake.
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from torch import Tensor, nn

from common import distributed
from common.distributed import UserError
from scripts.tools.sources import (
    Definition,
    Flag,
    Source,
    config_value,
    effective,
    equal,
    find_definition,
    flag_changes,
    parser_flags,
    shown,
    source_flags,
    summary,
)

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(__file__).resolve().parent
METHODS = ("saim", "semaim", "cae", "a2mim", "udi")
SAME, MAPPED, PURPOSE, UNEXPECTED = "same", "mapped", "on purpose", "unexpected"
SKIPPED, UNJUDGED = "not compared", "not judged"
STATUSES = (SAME, MAPPED, PURPOSE, UNEXPECTED, SKIPPED, UNJUDGED)
HEADINGS = {
    PURPOSE: 'different on purpose, see README "Differences"',
    UNJUDGED: "differs, but what the pinned commit has was not known when the differences were written down",
    SKIPPED: "not compared",
    SAME: "same",
}
ONLY_HERE = "only this project has it"
NO_FLAG, NO_KEYWORD = "no such flag", "no such keyword"


class Row(NamedTuple):
    """One thing compared: what it is, the file of the checkout, its name there, and what was found."""

    kind: str  # file, flag, definition, config, checkpoint
    where: str
    name: str
    status: str
    upstream: str = ""
    here: str = ""
    why: str = ""


def get_args_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("Compare with the authors' repository", allow_abbrev=False)
    p.add_argument("method", choices=METHODS)
    p.add_argument("--upstream", required=True, metavar="DIR", help="checkout of the authors' repository")
    p.add_argument("--checkpoint", default="", metavar="FILE", help="also compare this checkpoint, theirs or ours")
    p.add_argument("--flags", default="", help="flags of the checkpoint's network, for what the file does not say")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    p.add_argument("--all", action="store_true", help="also list what is the same, and every flag that is only ours")
    return p


# ---- the recorded differences

TEXT = {"name", "url", "commit", "licence"}
RECORD = {
    "": ({"repositories", "differences"}, {"checkpoints", "values", "preface", "shared", "kept", "notes"}),
    "repositories": (
        TEXT | {"marks"},
        {"files", "unparsable", "flags", "definitions", "configs", "like", "read", "unread"},
    ),
    "flags": (set(), {"here", "names", "more", "differs", "why"}),
    "definitions": ({"here"}, {"differs", "read", "why"}),
    "configs": ({"folders"}, {"absent", "differs"}),
    "checkpoints": (
        {"kind", "marks", "flags", "build"},
        {"weights", "without", "holds", "set", "infer", "fixed", "recipe"}
        | {"prefix", "rename", "ignore", "part", "names", "encoder"},
    ),
    "encoder": ({"flags", "build"}, {"loader", "models", "set", "fixed", "path"}),
    "differences": ({"id", "topic", "upstream", "here"}, set()),
}


def read_record(method: str) -> dict[str, Any]:
    """upstream/<method>.json, its repositories completed by those that they are like.

    Raises:
        UserError: it is missing or not of the form that this module's docstring describes.
    """
    path = TOOLS / "upstream" / f"{method}.json"
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error})") from error

    def check(part: Any, where: str, place: str) -> Any:
        required, optional = RECORD[where]
        if not isinstance(part, dict):
            raise UserError(f"{path}: {place}is no object")
        wrong = [f"lacks {key}" for key in sorted(required - set(part))]
        wrong += [f"has the unknown key {key}" for key in sorted(set(part) - required - optional)]
        if wrong:
            raise UserError(f"{path}: {place}{wrong[0]}")
        return part

    check(record, "", "")
    for key in ("repositories", "checkpoints", "differences"):
        for number, part in enumerate(record.get(key, [])):
            check(part, key, f"{key}[{number}] ")
            if "encoder" in part:
                check(part["encoder"], "encoder", f"{key}[{number}] encoder ")
    known = reasons(method, record)
    by_name: dict[str, dict[str, Any]] = {}
    for repository in record["repositories"]:
        completed(repository, by_name.get(repository.get("like", ""), {}))
        by_name[repository["name"]] = repository
        parts = [(file, check(part, "flags", f"{file} ")) for file, part in repository["flags"].items()]
        for file, names in repository["definitions"].items():
            parts += [(file, check(part, "definitions", f"{file} {name} ")) for name, part in names.items()]
        parts += [("configs", check(repository["configs"], "configs", "configs "))] if repository["configs"] else []
        for file, part in parts:
            for reason in filter(None, [part.get("why"), *part.get("differs", {})]):
                if reason not in known and " " not in reason:
                    raise UserError(f"{path}: {file}: reason {reason!r} is no id of a difference")
    return record


def completed(repository: dict[str, Any], other: dict[str, Any]) -> None:
    """Fill in what a repository shares with another one, file by file, and the short forms."""
    for key in ("files", "flags", "definitions", "configs"):
        repository[key] = {**other.get(key, {}), **repository.get(key, {})}
    for file, part in repository["flags"].items():
        if "more" in part:
            part |= {**other["flags"][file], "names": other["flags"][file]["names"] + part["more"]}
    for names in repository["definitions"].values():
        names |= {name: {"here": here} for name, here in names.items() if isinstance(here, str)}


def shared_differences(record: dict[str, Any]) -> list[dict[str, str]]:
    """SAIM's differences that hold for a method, too."""
    if not record.get("shared"):
        return []
    saim = {d["id"]: d for d in json.loads((TOOLS / "upstream" / "saim.json").read_text("utf-8"))["differences"]}
    unknown = [i for i in record["shared"] if i not in saim]
    if unknown:
        raise UserError(f"shared: {unknown[0]} is no id of a difference in upstream/saim.json")
    return [saim[i] for i in record["shared"]]


def reasons(method: str, record: dict[str, Any]) -> dict[str, str]:
    """Text of each reason that has an id."""
    rows = [*shared_differences(record), *record["differences"]]
    return {row["id"]: f"{row['topic']}: {row['here'] or 'not here'}" for row in rows}


class Judge:
    """What is recorded about the differences of one part, and the texts of its reasons."""

    def __init__(self, part: dict[str, Any], why: dict[str, str], read: list[str] | None = None):
        self.why, self.read = why, read
        differs = part.get("differs", {}).items()
        self.known = {name: (reason, theirs) for reason, names in differs for name, theirs in names.items()}

    def text(self, reason: str) -> str:
        return self.why.get(reason, reason)

    def __call__(self, name: str, theirs: str, text: str = "") -> tuple[str, str]:
        """Status and reason of a difference: on purpose if it is recorded and theirs is as recorded."""
        reason, recorded = next((v for k, v in self.known.items() if fnmatchcase(name, k)), ("", ""))
        if reason and recorded in (None, theirs):
            return PURPOSE, self.text(reason).removeprefix(f"`{name}`: ")
        if reason:
            return UNEXPECTED, f"the pinned commit has {recorded}"
        return (UNEXPECTED if self.read is None or name in self.read else UNJUDGED), text or "no reason is recorded"


# ---- flags


@functools.cache
def our_flags(here: str) -> list[Flag]:
    """The flags of our files "file.py" or "file.py:function", several separated by ", "."""
    return [f for place in here.split(", ") for f in effective(parser_flags(function(place, "get_args_parser")()))]


def function(place: str, default: str = "") -> Callable:
    """Our function "folder/file.py:name"."""
    file, _, name = place.partition(":")
    return getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name or default)


def compare_flags(file: str, part: dict[str, Any], source: Source, why: dict[str, str]) -> Iterator[Row]:
    """Each flag of one parser, theirs and ours."""
    judge, ours, told = Judge(part, why), our_flags(part["here"]) if "here" in part else [], set()
    theirs = {flag.options: flag for flag in effective(source_flags(source))}
    names = set(part.get("names", []))
    for name in part.get("names", []):
        if not any(name in options for options in theirs):
            mine = next((summary(flag) for flag in ours if name in flag.options), NO_FLAG)
            yield Row("flag", file, name, UNEXPECTED, "is gone", mine, "the pinned commit has it")
    for options, flag in theirs.items():
        name = next((option for option in options if option in names), ", ".join(options))
        computed = "default" in flag.unknown
        if flag.dest in told:  # its default is that of the first flag, and told there
            flag = flag._replace(unknown=(*flag.unknown, "default"))
        told.add(flag.dest)
        mine = next((f for f in ours if set(f.options) & set(options)), None)
        upstream, own = summary(flag), summary(mine) if mine else NO_FLAG
        changes = flag_changes(flag, mine) if mine else [NO_FLAG]
        if "why" in part:
            yield Row("flag", file, name, PURPOSE, upstream, own, str(why.get(part["why"], part["why"])))
        elif name not in names:
            yield Row("flag", file, name, UNEXPECTED, upstream, own, "is new: the pinned commit has no such flag")
        elif changes:
            status, text = judge(name, upstream, "; ".join(changes) if mine else "")
            yield Row("flag", file, name, status, upstream, own, text)
        elif computed:
            yield Row("flag", file, name, SKIPPED, upstream, own, f"its default is computed: {flag.default}")
        else:
            narrow = mine.choices if mine and flag.choices is None else None
            yield Row("flag", file, name, SAME, upstream, own, f"here one of {shown(narrow)}" if narrow else "")
    for flag in ours:
        if not names & set(flag.options) and not any(set(options) & set(flag.options) for options in theirs):
            yield Row("flag", file, flag.options[0], PURPOSE, NO_FLAG, summary(flag), ONLY_HERE)


# ---- classes, functions, constructors


def compare_definition(name: str, part: dict[str, Any], source: Source, judge: Judge) -> list[Row]:
    """One constructor or function: the keywords that it takes and passes on, theirs and ours."""
    file, here, rows, same = source.file, part["here"], [], 0

    def row(key: str, status: str, upstream: str, own: str, text: str = "") -> Row:
        return Row("definition", file, f"{name}({key})" if key else name, status, upstream, own, text)

    theirs = find_definition(source, name)
    if theirs is None:
        return [row("", UNEXPECTED, "is gone", here, "the pinned commit defines it")]
    if "why" in part:
        return [row("", PURPOSE, name, here or "nothing", judge.text(part["why"]))]
    our_file, _, our_name = here.partition(":")
    ours = find_definition(our_source(our_file), our_name)
    if ours is None:
        return [row("", UNEXPECTED, name, here, "is recorded here, but is not there")]
    for key in dict.fromkeys([*theirs.keywords, *ours.keywords]):
        lacking = [side for side in (theirs, ours) if not side.has(key)]
        if lacking and lacking[0].open:
            continue
        a, b = theirs.get(key), ours.get(key)
        shown_a, shown_b = shown_keyword(theirs, key), shown_keyword(ours, key)
        if not lacking and (shown_a == shown_b or (a and b and a[0] and b[0] and equal(a[1], b[1]))):
            same += 1
        elif a and b and not (a[0] and b[0]):
            rows.append(row(key, SKIPPED, shown_a, shown_b, "an expression"))
        else:
            status, text = judge(key, shown_a)
            rows.append(row(key, status, shown_a, shown_b, text))
    if same or not rows:
        rows.insert(0, row("", SAME, f"{same} keywords", here))
    if theirs.constants:
        a, b = (", ".join(map(shown, side.constants[:12])) for side in (theirs, ours))
        rows.append(row("", SKIPPED, a, b, "numbers in the body"))
    return rows


def shown_keyword(definition: Definition, key: str) -> str:
    value = definition.get(key)
    if value is None:
        return "no default" if definition.has(key) else NO_KEYWORD
    return shown(value[1]) if value[0] else value[1]


@functools.cache
def our_source(file: str) -> Source:
    return Source(ROOT, file)


# ---- configuration files


@functools.cache
def our_config(file: str) -> dict[str, Any]:
    """The assignments of one of our configuration files; a list of pairs is a dict."""
    source = our_source(file)
    values = {name: source.value(nodes[-1]) for name, nodes in source.names.items()}
    return {k: dict(v) if isinstance(v, list) and v and isinstance(v[0], tuple) else v for k, v in values.items()}


def compare_config(here: str, values: dict[str, Any], source: Source, judge: Judge) -> Iterator[Row]:
    """The values of one configuration file of theirs, and ours."""
    file, ours, same, alone = source.file, our_config(here), 0, []
    for path, rule in values.items():
        name, words = (rule, {}) if isinstance(rule, str) else rule
        found, mine = config_value(source, path.split(".")), lookup(ours, name)
        if found is None or mine is None:
            alone += [path] if found else [name] if mine is not None else []
        elif not found[0]:
            yield Row("config", file, path, SKIPPED, found[1], f"{name} {shown(mine)}", "an expression")
        elif any(equal(one, mine) or near(one, mine) for one in words.get(str(found[1]), [found[1]])):
            same += 1
        else:
            status, text = judge(f"{file}: {path}", shown(found[1]))
            yield Row("config", file, path, status, shown(found[1]), f"{name} {shown(mine)}", text)
    if alone:
        yield Row("config", file, "set on one side only", SKIPPED, ", ".join(alone), "", "by default on the other")
    yield Row("config", file, f"{same} values", SAME, "", here)


def near(a: Any, b: Any) -> bool:
    """Equal numbers but for rounding: some of theirs are quotients."""
    return isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-12 * abs(b)


def lookup(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def config_pairs(folders: dict[str, str], files: list[str]) -> dict[str, str]:
    """Their configuration files and ours of the same name; the first folder that matches counts."""
    pairs = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        ours = next((here for pattern, here in folders.items() if matches(folder, pattern)), None)
        if ours and (ROOT / ours / name).is_file():
            pairs[file] = f"{ours}/{name}"
    return pairs


# ---- the checkout


def files_of(root: Path) -> list[str]:
    """Python and shell files, relative, hidden folders left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        path = Path(folder).relative_to(root)
        found += [(path / name).as_posix() for name in sorted(names) if name.endswith((".py", ".sh"))]
    return [name.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in found]


def matches(path: str, pattern: str) -> bool:
    """* stays inside a folder, ** does not."""
    if "*" not in pattern:
        return path == pattern
    parts = (re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]") for part in pattern.split("**"))
    return re.fullmatch(".*".join(parts).replace(".*/", "(.*/)?"), path) is not None


def git(root: Path, *words: str) -> str:
    """What git says of a checkout; "" if it has no git folder or git cannot say it."""
    command = ["git", "-C", str(root), "-c", "core.fsmonitor=false", *words]  # starts no program of the checkout
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout.decode(
                "utf-8", "replace"
            )
    return ""


def git_commit(root: Path) -> str:
    """The commit of a checkout; "" if it is not known."""
    return git(root, "rev-parse", "--verify", "--quiet", "HEAD").strip()


def local_edits(root: Path) -> list[str]:
    """The files of a checkout that differ from its commit."""
    return [name for name in git(root, "diff", "--name-only", "-z", "HEAD").split("\0") if name]


def recognise(record: dict[str, Any], root: Path, commit: str) -> dict[str, Any]:
    """The repository that a folder is a checkout of.

    Raises:
        UserError: it is no folder, or none of them.
    """
    if not root.is_dir():
        raise UserError(
            f"--upstream {root}: {'is no folder' if root.exists() else 'no such folder'}, expected a checkout"
        )

    def share(repository: dict[str, Any]) -> float:
        paths = [p for p, f in repository["files"].items() if "*" not in p and "optional" not in f[2:]]
        return sum((root / path).is_file() for path in paths) / max(len(paths), 1)

    def missing(repository: dict[str, Any]) -> list[str]:
        return [mark for mark in repository["marks"] if not (root / mark).exists()]

    repositories = record["repositories"]
    pinned = [r for r in repositories if commit.startswith(r["commit"])]
    marked = [r for r in repositories if not missing(r)]
    best = max(repositories, key=share)
    if pinned or marked or share(best) > 0.75:
        return (pinned or marked or [best])[0]
    names = " or ".join(f"{r['url']} (no {', '.join(missing(r)[:3])})" for r in repositories)
    raise UserError(f"--upstream {root}: is no checkout of {names}")


def compare_files(repository: dict[str, Any], files: list[str], pairs: dict[str, str]) -> Iterator[Row]:
    """Each pattern with what it means here; then files that none matches, whole unknown folders in one line."""
    patterns = {pattern: [*entry, "", ""][:3] for pattern, entry in repository["files"].items()}
    for file, here in pairs.items():
        yield Row("file", file, "", MAPPED, "", here, "recipe")
    files = [file for file in files if file not in pairs]
    match = {f: next((p for p in patterns if matches(f, p)), "") for f in files}
    counts = Counter(match.values())
    for pattern, (here, role, word) in patterns.items():
        status = MAPPED if here else PURPOSE
        if counts[pattern] and word == "each":
            yield from (Row("file", f, "", status, "", here or "nothing", role) for f in files if match[f] == pattern)
        elif counts[pattern]:
            many = f" ({counts[pattern]} files)" if "*" in pattern else ""
            yield Row("file", pattern + many, "", status, "", here or "nothing", role)
        elif "*" not in pattern and word != "optional" and pattern.endswith((".py", ".sh")):
            yield Row(
                "file", pattern, "", UNEXPECTED, "is gone", here or "nothing", f"the pinned commit has it: {role}"
            )
    configs = repository["configs"]
    for ours in configs.get("folders", {}).values():
        known = set(pairs.values())
        for path in sorted((ROOT / ours).glob("*.py")):
            file = f"{ours}/{path.name}"
            if file not in known and not any(fnmatchcase(file, pattern) for pattern in configs.get("absent", [])):
                yield Row("file", path.name, "", UNEXPECTED, "is gone", file, "the pinned commit has such a recipe")
    known_folders = {str(p) for f, pattern in match.items() if pattern for p in Path(f).parents}
    known_folders |= {str(p) for pattern in patterns if "*" not in pattern for p in Path(pattern).parents}
    groups: dict[str, list[str]] = {}
    for file in (f for f, pattern in match.items() if not pattern and Path(f).name != "__init__.py"):
        unknown = [str(p) for p in Path(file).parents if str(p) not in known_folders]
        groups.setdefault(unknown[-1] + "/" if unknown else file, []).append(file)
    for name, members in groups.items():
        where = members[0] if len(members) == 1 else f"{name} ({len(members)} files)"
        yield Row("file", where, "", UNEXPECTED, "is new", "nothing", "the pinned commit has no such file")


def compare_checkout(
    method: str, record: dict[str, Any], root: Path, commit: str, edited: Iterable[str] = ()
) -> tuple[dict[str, Any], list[Row]]:
    """The repository that `root` is, and everything compared with it.

    Args:
        commit: of the checkout; "" if it is not known.
        edited: its files that are locally modified.
    Raises:
        UserError: `root` is no checkout of the authors' repositories.
    """
    repository = recognise(record, root, commit)
    why, files = reasons(method, record), files_of(root)
    configs = repository["configs"]
    pairs = config_pairs(configs.get("folders", {}), files)
    rows = list(compare_files(repository, files, pairs))  # what is gone is told here, and not again below

    @functools.cache
    def source_of(file: str) -> Source | None:
        try:
            return Source(root, file) if file in files else None
        except UserError as error:
            status = SKIPPED if file in repository.get("unparsable", []) else UNEXPECTED
            rows.append(Row("file", file, "", status, str(error), "", "cannot be parsed there"))
            return None

    for file, part in repository["flags"].items():
        source = source_of(file)
        rows += compare_flags(file, part, source, why) if source else []
    for place, names in repository["definitions"].items():
        candidates = [file for pattern in place.split(", ") for file in files if matches(file, pattern)]
        known = [source for file in candidates if (source := source_of(file))]
        for name, part in names.items() if known else ():
            source = next((source for source in known if find_definition(source, name)), known[0])
            rows += compare_definition(name, part, source, Judge(part, why, part.get("read", repository.get("read"))))
    for file, here in pairs.items():
        source = source_of(file)
        rows += compare_config(here, record["values"], source, Judge(configs, why)) if source else []
    if repository.get("unread"):
        rows = [row._replace(status=UNJUDGED) if row.status == UNEXPECTED else row for row in rows]
    return repository, [r._replace(why=f"locally modified; {r.why}") if r.where in edited else r for r in rows]


# ---- a checkpoint


def at(state: Any, dotted: str) -> Any:
    """The entry of nested dicts under a dotted key; None if there is none."""
    for key in dotted.split(".") if dotted else []:
        state = vars(state) if isinstance(state, argparse.Namespace) else state
        state = state.get(key) if isinstance(state, dict) else None
    return state


def recognise_checkpoint(
    kinds: list[dict[str, Any]], state: dict[str, Any], path: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The first known format of a checkpoint, and its weights; raises UserError if there is none."""
    for kind in kinds:
        if any(at(state, key) is None for key in kind.get("holds", [])):
            continue
        for key in kind.get("weights", [""]):
            weights = at(state, key)
            if not isinstance(weights, dict):
                continue
            weights = {str(k).removeprefix("module."): v for k, v in weights.items() if isinstance(v, Tensor)}
            prefix = kind.get("prefix", "")
            if prefix and any(k.startswith(prefix) for k in weights):
                weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            found = all(any(k.startswith(mark) for k in weights) for mark in kind["marks"])
            if weights and found and not any(k.startswith(tuple(kind.get("without", ["\0"]))) for k in weights):
                for old, new in kind.get("rename", {}).items():
                    weights = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in weights.items()}
                return kind, weights
    keys = ", ".join(map(str, list(state)[:6])) or "none"
    known = ", ".join(kind["kind"] for kind in kinds) or "none"
    raise UserError(f"{path}: is no checkpoint of a kind that is known here ({known}); its keys: {keys}")


def inferred(rule: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """A flag's value read from the weights; None if they do not tell."""
    if "blocks" in rule:
        stack = rule["blocks"] + "."
        return len({k.removeprefix(stack).split(".")[0] for k in weights if k.startswith(stack)}) or None
    if "size" in rule:
        key, axis = rule["size"]
        size = weights[key].shape[axis] if key in weights and weights[key].ndim > axis else None
        return rule["names"].get(str(size)) if "names" in rule else size
    return rule.get("yes" if any(k.startswith(rule["has"]) for k in weights) else "no")


def network_flags(
    kind: dict[str, Any], state: dict[str, Any], weights: dict[str, Tensor], given: str, path: str
) -> argparse.Namespace:
    """The flags that describe a checkpoint's network: its own, read from it, or given."""
    parser = function(kind["flags"], "get_args_parser")()
    args = parser_defaults(parser)
    method = kind["flags"].split("/")[0]
    recipe = at(state, kind["recipe"]) if "recipe" in kind else None
    for file in sorted((ROOT / method / "configs").rglob(Path(str(recipe)).name)) if recipe else []:
        args = importlib.import_module(f"{method}.config").parse_args(parser, [str(file)])
    stored = at(state, "args")
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else stored if isinstance(stored, dict) else {}
    for name, rule in kind.get("infer", {}).items():
        value = inferred(rule, weights)
        if value is not None and name not in stored and not recipe:
            setattr(args, name, value)
    for name, value in stored.items():
        if isinstance(value, list | tuple) and len(set(value)) == 1 and str(name).endswith("_size"):
            value = value[0]  # upstream keeps a side as (height, width)
        if hasattr(args, str(name)):
            setattr(args, str(name), value)
    for name, key in kind.get("set", {}).items():
        value = at(state, key)
        if isinstance(value, str | int | float):
            setattr(args, name, value)
    for name, value in kind.get("fixed", {}).items():
        setattr(args, name, value)
    if given:
        parser.error = lambda message: (_ for _ in ()).throw(UserError(f"--flags {given}: {message}"))  # type: ignore
        try:
            words = shlex.split(given)
        except ValueError as error:
            raise UserError(f"--flags {given}: {error}") from error
        parser.parse_args(words, args)
    return args


def parser_defaults(parser: argparse.ArgumentParser) -> argparse.Namespace:
    defaults = {a.dest: a.default for a in parser._actions if a.default is not argparse.SUPPRESS}
    return argparse.Namespace(**{**defaults, **parser._defaults})


def build(places: list[str], args: argparse.Namespace, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """The network of the flags, and of the weights where its builder takes them; each further function changes it."""
    builder = function(places[0])
    takes_weights = weights is not None and "weights" in inspect.signature(builder).parameters
    model = builder(args, weights=weights) if takes_weights else builder(args)
    for place in places[1:]:
        function(place)(model)
    return model


# What flags that do not fit together raise, besides a message for the user.
WRONG_FLAGS = (UserError, SystemExit, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def our_network(kind: dict[str, Any], args: argparse.Namespace, weights: dict[str, Tensor], path: str) -> nn.Module:
    """Our network of a checkpoint's flags, without memory where its initialisation allows; raises UserError."""
    why: object = None
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                return quietly(lambda: build(kind["build"], args, weights))[0]
        except (NotImplementedError, RuntimeError) as error:
            why = str(error).partition("\n")[0]
        except WRONG_FLAGS as error:
            why = error if isinstance(error, UserError) else repr(error)
            break
    raise UserError(f"{path}: its flags make no network here: {why}; --flags overrides them")


def quietly(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        result = call()
    return result, out.getvalue().strip()


def compare_checkpoint(record: dict[str, Any], path: str, given: str) -> list[Row]:
    """What a checkpoint holds, and what our network and our loader take of it.

    Raises:
        UserError: the file is missing, damaged, or of no known kind; or its flags describe no network of ours.
    """
    state = distributed.load(path)
    kind, weights = recognise_checkpoint(record.get("checkpoints", []), state, path)
    args = network_flags(kind, state, weights, given, path)
    size, network = (
        f"{kind['kind']}, {len(weights)} tensors",
        ", ".join(filter(None, (kind["build"][0], network_name(args)))),
    )
    rows = [Row("checkpoint", path, "format", SAME, size, network)]
    model = our_network(kind, args, weights, path)
    part = model.get_submodule(kind.get("part", ""))
    own = function(kind["names"])(part) if "names" in kind else part.state_dict()
    own = {key: value for key, value in own.items() if isinstance(value, Tensor)}
    whole = part is model and set(own) <= set(weights)
    own, weights = (
        {key: value for key, value in tensors.items() if not any(fnmatchcase(key, p) for p in kind.get("ignore", []))}
        for tensors in (own, weights)
    )
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    shapes = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    matched = len(own) - len(missing) - len(shapes)
    rows.append(Row("checkpoint", path, "matched", SAME, f"{matched} of {len(own)} tensors, by name and shape"))
    for what, keys in (("missing", missing), ("not in our network", unexpected), ("of another shape", shapes)):
        if keys:
            first = ", ".join(f"{k} {tuple(weights[k].shape)}" if k in weights else k for k in keys[:4])
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            here = ", ".join(f"{k} {tuple(own[k].shape)}" for k in keys[:2]) if what == "of another shape" else ""
            rows.append(Row("checkpoint", path, f"{len(keys)} {what}", UNEXPECTED, first + more, here))
    if whole and not unexpected and not shapes:
        rows.append(Row("checkpoint", path, "loads", SAME, "strictly", "a run continues from it with --resume"))
    if "encoder" in kind:
        rows.append(encoder_row(kind["encoder"], args, path))
    return rows


def network_name(args: argparse.Namespace) -> str:
    return next((str(getattr(args, name)) for name in ("model", "arch", "backbone") if getattr(args, name, "")), "")


def encoder_row(encoder: dict[str, Any], args: argparse.Namespace, path: str) -> Row:
    """What fine-tuning loads of a pre-training checkpoint, by loading it."""
    wanted = parser_defaults(function(encoder["flags"], "get_args_parser")())
    for name in ("input_size", "patch_size"):
        if hasattr(wanted, name) and hasattr(args, name):
            setattr(wanted, name, getattr(args, name))
    for name, own in encoder.get("set", {}).items():
        setattr(wanted, name, getattr(args, own))
    for name, value in encoder.get("fixed", {}).items():
        setattr(wanted, name, value)
    models = encoder.get("models", {})
    name = network_name(args)
    if models and name not in models:
        return Row("checkpoint", path, "encoder", SKIPPED, name, "", f"no fine-tuning network goes with --model {name}")
    if models:
        wanted.model = models[name]
    if "path" in encoder:
        setattr(wanted, encoder["path"], path)
    taker = encoder.get("loader", encoder["build"][0])
    try:
        model, text = quietly(lambda: build(encoder["build"], wanted))
        if "loader" in encoder:
            _, text = quietly(lambda: function(taker)(model, path))
    except (*WRONG_FLAGS, RuntimeError) as error:
        return Row("checkpoint", path, "encoder", UNEXPECTED, str(error).partition("\n")[0], taker)
    said = next((line for line in reversed(text.splitlines()) if ": " in line), "")
    return Row("checkpoint", path, "encoder", SAME, said.split(": ", 1)[-1], f"{taker}, {network_name(wanted)}")


# ---- output


def table(rows: list[Row]) -> str:
    """Rows as lines: file, name, both sides, reason."""
    if all(row.kind == "file" for row in rows):
        cells = [(f"  {row.where}", row.upstream or "->", row.here, row.why) for row in rows]
    else:
        sides = [f"{row.upstream} | {row.here}" if row.here else row.upstream for row in rows]
        cells = [(f"    {row.name}", side, row.why, "") for row, side in zip(rows, sides, strict=True)]
    widths = [min(max(len(line[i]) for line in cells), 60) for i in range(3)]
    lines, where = [], ""
    for row, line in zip(rows, cells, strict=True):
        if row.where != where and not line[0].startswith(f"  {row.where}"):
            lines.append(f"  {row.where}")
        where = row.where
        lines.append("  ".join(f"{cell:<{width}}" for cell, width in zip(line, [*widths, 0], strict=True)).rstrip())
    return "\n".join(lines)


TITLES = {
    "file": "Files and what plays their role here",
    "flag": "Flags: theirs | ours, and why",
    "definition": "Definitions: theirs | ours, and why",
    "config": "Configurations: theirs | ours, and why",
    "checkpoint": "Checkpoint: theirs | ours",
}


def report(head: list[str], behaviour: list[str], rows: list[Row], everything: bool) -> str:
    """All rows by status, as text; the differences in behaviour stand below the flags."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    counts = Counter((row.kind, row.status) for row in rows)
    lines = [*head, "", f"{'':<14}" + "".join(f"{status:>14}" for status in STATUSES)]
    lines += [f"{kind + 's':<14}" + "".join(f"{counts[kind, status]:>14}" for status in STATUSES) for kind in kinds]
    for kind in kinds:
        lists_all = everything or kind in ("file", "checkpoint")
        part = [r for r in rows if r.kind == kind and r.status != UNEXPECTED and (lists_all or r.status != SAME)]
        own = [r for r in part if r.why == ONLY_HERE and not everything]
        part = [r for r in part if r not in own]
        lines += ["", TITLES[kind]] if part or own else []
        for status in HEADINGS if kind not in ("file", "checkpoint") else (None,):
            some = [r for r in part if status in (None, r.status)]
            lines += [f" {HEADINGS[status]}"] if some and status else []
            lines += [table(some)] if some else []
        by_file: dict[str, list[str]] = {}
        for row in own:
            by_file.setdefault(row.where, []).append(row.name)
        lines += [" only here (--all lists their defaults)"] if own else []
        lines += [f"  {file}: {', '.join(names)}" for file, names in by_file.items()]
        lines += ["", "Behaviour: theirs | ours", *behaviour] if kind == "flag" or kinds == ["file"] else []
    bad = [row for row in rows if row.status == UNEXPECTED]
    lines += ["", "Unexpected: none" if not bad else f"Unexpected: {len(bad)}"]
    return "\n".join(lines + ([table(bad)] if bad else []))


def heading(method: str, repository: dict[str, Any], root: Path, commit: str, edited: list[str]) -> list[str]:
    """What is compared with what."""
    pinned = repository["commit"]
    right = bool(commit) and commit.startswith(pinned)
    lines = [f"{method}: {root} {'is' if right else 'against'} {repository['url']} at commit {pinned[:12]}"]
    if not commit:
        lines.append("NOTE: the checkout's commit is not known (no git folder)")
    elif not right:
        lines.append(f"NOTE: the checkout is at commit {commit[:12]}, this project was made from {pinned[:12]}")
    return lines + ([f"NOTE: locally modified: {', '.join(edited)}"] if edited else [])


def say(text: str) -> None:
    """Print; quietly if the reader, such as `head`, has enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor at the end of the program


def main(args: argparse.Namespace) -> None:
    root = Path(args.upstream)
    record = read_record(args.method)
    commit = git_commit(root)
    edited = local_edits(root)
    repository, rows = compare_checkout(args.method, record, root, commit, edited)
    if args.checkpoint:
        rows += compare_checkpoint(record, args.checkpoint, args.flags)
    elif args.flags:
        raise UserError(f"--flags {args.flags}: describe the network of a --checkpoint, which is not given")
    if args.json:
        found = {key: repository[key] for key in ("name", "url", "commit", "licence")}
        counts = Counter(row.status for row in rows)
        result = {
            "method": args.method,
            "repository": found,
            "checkout": {"folder": str(root), "commit": commit or None, "locally modified": edited},
            "counts": {status: counts[status] for status in STATUSES},
            "rows": [row._asdict() for row in rows],
        }
        say(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        differences = [*shared_differences(record), *record["differences"]]
        behaviour = [f"  {d['topic']}: {d['upstream']} | {d['here'] or 'not here'}" for d in differences]
        say(report(heading(args.method, repository, root, commit, edited), behaviour, rows, args.all))
    if any(row.status == UNEXPECTED for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
