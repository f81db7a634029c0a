"""Compare a checkout of the authors' repository with this project: files, flags, constructors, and a checkpoint.

Nothing of the checkout is imported or executed; its Python files are read as syntax trees. What the pinned commit
holds, and where this project differs on purpose, is recorded in upstream/<method>.json:

repositories  name, url, commit (7 digits or more), licence; `marks`: paths that tell it from others. DIR is the
              repository of the pinned commit, else the first one all of whose marks exist. `inferred`: what is recorded
              was measured at another commit, so that deviations are told and not unexpected. It has
  files       path or pattern (*, **) -> {here, role}; the first match counts. Plain paths must exist, unless
              `optional`. Every .py and .sh file must match one; __init__.py and other endings are not compared
  parsers     [{file, here, flags, intended}]; flags: first option string -> {action, type, default, dest, nargs,
              choices, computed}, absent fields as in argparse; nargs and choices are compared where recorded, the
              default unless it is computed. here: our file with get_args_parser(), or file.py:function; several
              separated by ", ". intended: flag, or * -> reason
  definitions [{file, name, here, defaults, calls, complete, intended}]; file: of those that match (patterns, several
              separated by ", ") the first that has the name; defaults: parameter -> literal default (null: unknown);
              calls: keyword -> value in the constructor call that the function returns, or the called class's default.
              complete: a null is None, and what is not recorded is unexpected
  configs     [{file, values}]; values: dotted path through dict(...)s and `_base_` files -> literal
checkpoints   [{kind, weights, marks, without, holds, ...}], tried in order: the weights lie under one of the dotted
              keys `weights`; every mark begins one of their keys, none of `without` does; the file has the keys `holds`
  flags, set, infer, fixed, recipe, build
              flags: our file whose get_args_parser() describes the network. Its defaults are overridden by the
              checkpoint's own args, else by `infer` (flag -> {blocks: stack} | {size: [key, axis], names: {size:
              value}} | {has: key, yes, no}), then by `set` (flag -> dotted key) and `fixed` (flag -> value). recipe:
              dotted key of the name of one of our configurations. build: functions, the first makes the network of
              the flags, others change it
  prefix, rename, ignore, part, names
              of the file's keys: beginning that is cut, {beginning: other}, patterns that are left out; part of our
              network that the file holds; function that gives its weights the file's keys
  encoder     {flags, build, loader, models, set, path}: what fine-tuning takes of it. models: the network's name ->
              that for fine-tuning; set: its flag -> the network's; path: flag that names the file, without a loader
preface, shared, differences, kept, notes
              README's section on the differences (scripts/tools/readme.py); shared: ids of saim's differences that hold
              here, too; differences: [{id, topic, upstream, here}]

A reason is the id of a difference or a sentence. Exit status: 0, 1 if anything is unexpected, 2 for a user's mistake.
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
import sys
from collections import Counter
from collections.abc import Callable, Iterator
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
    recorded_flag,
    shown,
    source_flags,
    summary,
)

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(__file__).resolve().parent
METHODS = ("saim", "semaim", "cae", "a2mim", "udi")
SAME, PURPOSE, UNEXPECTED, SKIPPED, UNMEASURED = "same", "on purpose", "unexpected", "not compared", "not measured"
STATUSES = (SAME, PURPOSE, UNEXPECTED, SKIPPED, UNMEASURED)
HEADINGS = {
    PURPOSE: 'different on purpose, see README "Differences"',
    UNMEASURED: "other than inferred: what is recorded of this repository was measured at another one",
    SKIPPED: "not compared",
    SAME: "same",
}
ONLY_HERE = "only this project has it"


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
    p.add_argument("--checkpoint", default="", metavar="FILE", help="compare this checkpoint, too, theirs or ours")
    p.add_argument("--flags", default="", help="flags that the checkpoint's network was made with, if it does not tell")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    p.add_argument("--all", action="store_true", help="list what is the same, and each flag that only this project has")
    return p


# ---- the recorded differences

TEXT = {"name", "url", "commit", "licence"}
RECORD = {
    "": ({"repositories", "differences"}, {"checkpoints", "preface", "shared", "kept", "notes"}),
    "repositories": (TEXT | {"marks", "files"}, {"parsers", "definitions", "configs", "inferred"}),
    "files": ({"here", "role"}, {"optional"}),
    "parsers": ({"file", "here", "flags"}, {"intended"}),
    "flags": (set(), {"action", "type", "default", "dest", "nargs", "choices", "computed"}),
    "definitions": ({"file", "name", "here"}, {"defaults", "calls", "complete", "intended"}),
    "configs": ({"file", "values"}, {"here"}),
    "checkpoints": (
        {"kind", "marks", "flags", "build"},
        {"weights", "without", "holds", "set", "infer", "fixed", "recipe"}
        | {"prefix", "rename", "ignore", "part", "names", "encoder"},
    ),
    "encoder": ({"flags", "build"}, {"loader", "models", "set", "path"}),
    "differences": ({"id", "topic", "upstream", "here"}, set()),
}
PARTS = {
    "": ("repositories", "checkpoints", "differences"),
    "repositories": ("files", "parsers", "definitions", "configs"),
    "parsers": ("flags",),
    "checkpoints": ("encoder",),
}


def read_record(method: str) -> dict[str, Any]:
    """upstream/<method>.json.

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

    def check(part: Any, where: str, place: str) -> None:
        required, optional = RECORD[where]
        if not isinstance(part, dict):
            raise UserError(f"{path}: {place}is no object")
        wrong = [f"lacks {key}" for key in sorted(required - set(part))]
        wrong += [f"has the unknown key {key}" for key in sorted(set(part) - required - optional)]
        if wrong:
            raise UserError(f"{path}: {place}{wrong[0]}")
        for key in (key for key in PARTS.get(where, ()) if key in part):
            children = [part[key]] if key == "encoder" else part[key]
            for name, child in children.items() if isinstance(children, dict) else enumerate(children):
                check(child, key, f"{place}{key}[{name}] ")

    check(record, "", "")
    known = reasons(method, record)
    for repository in record["repositories"]:
        for part in repository.get("parsers", []) + repository.get("definitions", []):
            given = part.get("intended", {})
            for reason in [given] if isinstance(given, str) else given.values():
                if reason not in known and " " not in reason:
                    raise UserError(f"{path}: {part['file']}: reason {reason!r} is no id of a difference")
    return record


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


# ---- flags


@functools.cache
def our_flags(here: str) -> list[Flag]:
    """The flags of our files "file.py" or "file.py:function", several separated by ", "."""
    return [f for place in here.split(", ") for f in effective(parser_flags(function(place, "get_args_parser")()))]


def function(place: str, default: str = "") -> Callable:
    """Our function "folder/file.py:name"."""
    file, _, name = place.partition(":")
    return getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name or default)


def compare_flags(record: dict[str, Any], source: Source, why: dict[str, str]) -> Iterator[Row]:
    """Each flag of one parser: the checkout's against the pinned commit's, and this against ours."""
    file, here = record["file"], record["here"]
    ours = our_flags(here) if here else []
    theirs = effective(source_flags(source))
    intended = record.get("intended", {})
    destinations: set[str] = set()
    for known in effective([recorded_flag(name, fields) for name, fields in record["flags"].items()]):
        name = known.options[0]
        if known.dest in destinations:  # its default is that of the first flag, and told there
            known = known._replace(unknown=("default",))
        destinations.add(known.dest)
        found = [flag for flag in theirs if name in flag.options]
        changes = [flag_changes(known, flag) for flag in found]
        mine = next((flag for flag in ours if name in flag.options), None)
        upstream, own = summary(known), summary(mine) if mine else "no such flag"
        reason = intended.get(name) or intended.get("*", "")
        if not found:
            yield Row("flag", file, name, UNEXPECTED, "is gone", own, f"the pinned commit has it: {upstream}")
        elif all(changes):
            text = "; ".join(f"{field} {new}, the pinned commit has {old}" for field, old, new in changes[0])
            yield Row("flag", file, name, UNEXPECTED, summary(found[0]), own, text)
        elif mine and not flag_changes(known, mine, ours=True):
            computed = "default" not in known.unknown and all("default" in flag.unknown for flag in found)
            text = f"its default is computed: {found[0].default}" if computed else ""
            yield Row("flag", file, name, SKIPPED if computed else SAME, upstream, own, text)
        elif reason:
            text = str(why.get(reason, reason)).removeprefix(f"`{name}`: ")
            yield Row("flag", file, name, PURPOSE, upstream, own, text)
        else:
            yield Row("flag", file, name, UNEXPECTED, upstream, own, "is not recorded as intended")
    recorded = set(record["flags"])
    for flag in dict.fromkeys(f.options for f in theirs if not recorded & set(f.options)):
        new = next(f for f in theirs if f.options == flag)
        mine = next((f for f in ours if set(f.options) & set(flag)), None)
        own = summary(mine) if mine else "no such flag"
        yield Row(
            "flag", file, ", ".join(flag), UNEXPECTED, summary(new), own, "is new: the pinned commit has no such flag"
        )
    for flag in ours:
        if not recorded & set(flag.options):
            yield Row("flag", file, flag.options[0], PURPOSE, "no such flag", summary(flag), ONLY_HERE)


# ---- classes, functions, constructors


def passed(found: Definition, target: Definition | None, key: str) -> tuple[bool, Any] | None:
    """A keyword of the call that a factory returns, else the called class's default; None if neither is there."""
    return found.calls[key] if key in found.calls else target.defaults.get(key) if target else None


@functools.cache
def our_definition(here: str) -> tuple[Definition | None, Definition | None]:
    """Our class or function "file.py:name", and the class whose object it returns."""
    file, _, name = here.partition(":")
    if not here:
        return None, None
    source = Source(ROOT, file)
    found = find_definition(source, name)
    return found, find_definition(source, found.called) if found and found.called else None


def compare_definition(
    record: dict[str, Any], source: Source, why: dict[str, str], classes: dict[str, dict[str, Any]]
) -> list[Row]:
    """One constructor: its recorded keywords in the checkout, and in ours.

    classes: recorded defaults by class of the same file; a factory does not repeat what a class's row tells.
    """
    file, name, here = record["file"], record["name"], record["here"]
    intended = record.get("intended", {})
    whole = intended if isinstance(intended, str) else ""

    def row(key: str, status: str, upstream: str, own: str, text: str) -> Row:
        return Row("definition", file, f"{name}({key})" if key else name, status, upstream, own, text)

    theirs = find_definition(source, name)
    if theirs is None:
        return [row("", UNEXPECTED, "is gone", here, "the pinned commit defines it")]
    their_class = find_definition(source, theirs.called) if theirs.called else None
    ours, our_class = our_definition(here)
    if here and ours is None:
        return [row("", UNEXPECTED, name, here, "is recorded here, but is not there")]
    defaults, calls = record.get("defaults", {}), record.get("calls", {})
    rows = []
    for key, value in {**defaults, **calls}.items():
        known = f"the pinned commit has {shown(value)}"
        if key in calls:
            found = passed(theirs, their_class, key)
            default = classes.get(theirs.called, {})
            if key not in theirs.calls and key in default and equal(default[key], value):
                found = None  # the class's row tells
        elif key not in theirs.defaults:
            rows.append(row(key, UNEXPECTED, "is gone", "", known))
            continue
        else:
            found = theirs.defaults[key]
            if found is None and value is not None and record.get("complete"):
                rows.append(row(key, UNEXPECTED, "no default", "", known))
                continue
        certain = value is not None or record.get("complete")
        if found is not None and found[0] and certain and not equal(found[1], value):
            rows.append(row(key, UNEXPECTED, shown(found[1]), "", known))
        elif ours is not None and not whole:
            mine = passed(ours, our_class, key) if key in calls else ours.defaults.get(key)
            there = mine is not None or key in ours.defaults or key in calls
            if not there or (mine is not None and mine[0] and value is not None and not equal(mine[1], value)):
                reason = "" if isinstance(intended, str) else intended.get(key, "")
                text = why.get(reason, reason) or "is not recorded as intended"
                own = shown(mine[1]) if mine else "no such keyword"
                rows.append(row(key, PURPOSE if reason else UNEXPECTED, shown(value), own, text))
    if record.get("complete"):
        news = {k: v for k, v in theirs.calls.items() if v[0] and v[1] is not None} if calls else theirs.defaults
        for key, found in news.items():
            if key not in defaults and key not in calls:
                text = "no default" if found is None else shown(found[1])
                rows.append(row(key, UNEXPECTED, text, "", "is new: the pinned commit has none"))
    status = PURPOSE if whole or not here else SAME
    return rows or [row("", status, name, here or "nothing", why.get(whole, whole))]


# ---- configuration files


def compare_config(record: dict[str, Any], source: Source) -> Iterator[Row]:
    """The recorded values of one configuration file."""
    count = 0
    for path, value in record["values"].items():
        found = config_value(source, path.split("."))
        if found is None or not found[0]:
            text = "is not in the file" if found is None else str(found[1])
            yield Row("config", record["file"], path, SKIPPED, text, "", f"the pinned commit has {shown(value)}")
        elif not equal(found[1], value):
            text = f"the pinned commit has {shown(value)}"
            yield Row("config", record["file"], path, UNEXPECTED, shown(found[1]), "", text)
        else:
            count += 1
    if count:
        yield Row("config", record["file"], f"{count} values", SAME)


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


def git_commit(root: Path) -> str:
    """The commit of HEAD, read from git's files; '' if there is none to be read."""
    commits: list[str] = []
    with contextlib.suppress(OSError, UnicodeDecodeError):
        git = root / ".git"
        if git.is_file():  # a worktree or submodule
            git = (root / git.read_text().partition("gitdir:")[2].strip()).resolve()
        common = (git / (git / "commondir").read_text().strip()).resolve() if (git / "commondir").is_file() else git
        head = (git / "HEAD").read_text().strip()
        name = head.removeprefix("ref:").strip()
        files = [folder / name for folder in (git, common) if name != head]
        commits = [head, *(file.read_text().strip() for file in files if file.is_file())]
        lines = (common / "packed-refs").read_text().splitlines() if (common / "packed-refs").is_file() else []
        commits += [line.partition(" ")[0] for line in lines if line.partition(" ")[2] == name]
    return next((commit for commit in commits if re.fullmatch("[0-9a-f]{40,64}", commit)), "")


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
        paths = [p for p, f in repository["files"].items() if "*" not in p and not f.get("optional")]
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


def compare_files(repository: dict[str, Any], files: list[str]) -> Iterator[Row]:
    """Each pattern with what it means here; then files that none matches, whole unknown folders in one line."""
    patterns = repository["files"]
    match = {f: next((p for p in patterns if matches(f, p)), "") for f in files}
    counts = Counter(match.values())
    for pattern, entry in patterns.items():
        status = SAME if entry["here"] else PURPOSE
        here = entry["here"] or "nothing"
        if counts[pattern]:
            many = f" ({counts[pattern]} files)" if "*" in pattern else ""
            yield Row("file", pattern + many, "", status, "", here, entry["role"])
        elif "*" not in pattern and not entry.get("optional") and pattern.endswith((".py", ".sh")):
            yield Row("file", pattern, "", UNEXPECTED, "is gone", here, f"the pinned commit has it: {entry['role']}")
    known_folders = {str(p) for f, pattern in match.items() if pattern for p in Path(f).parents}
    known_folders |= {str(p) for pattern in patterns if "*" not in pattern for p in Path(pattern).parents}
    groups: dict[str, list[str]] = {}
    for file in (f for f, pattern in match.items() if not pattern and Path(f).name != "__init__.py"):
        unknown = [str(p) for p in Path(file).parents if str(p) not in known_folders]
        groups.setdefault(unknown[-1] + "/" if unknown else file, []).append(file)
    for name, members in groups.items():
        where = members[0] if len(members) == 1 else f"{name} ({len(members)} files)"
        yield Row("file", where, "", UNEXPECTED, "is new", "nothing", "the pinned commit has no such file")


def compare_checkout(method: str, record: dict[str, Any], root: Path, commit: str) -> tuple[dict[str, Any], list[Row]]:
    """The repository that `root` is, and everything compared with it.

    Raises:
        UserError: `root` is no checkout of the authors' repositories.
    """
    repository = recognise(record, root, commit)
    why = reasons(method, record)
    files = files_of(root)
    rows = list(compare_files(repository, files))  # what is gone is told here, and not again below

    @functools.cache
    def source_of(file: str) -> Source | None:
        try:
            return Source(root, file)
        except UserError as error:
            rows.append(Row("file", file, "", UNEXPECTED, str(error), "", "its contents are not compared"))
            return None

    def first_with(part: dict[str, Any]) -> Source | None:
        candidates = [file for pattern in part["file"].split(", ") for file in files if matches(file, pattern)]
        known = [source for file in candidates if (source := source_of(file))]
        return next((source for source in known if find_definition(source, part["name"])), (known or [None])[0])

    for part in repository.get("parsers", []):
        source = source_of(part["file"]) if part["file"] in files else None
        rows += compare_flags(part, source, why) if source else []
    found = [(part, first_with(part)) for part in repository.get("definitions", [])]
    for part, source in found:
        if source is not None:
            classes = {other["name"]: other.get("defaults", {}) for other, place in found if place is source}
            rows += compare_definition({**part, "file": source.file}, source, why, classes)
    for part in repository.get("configs", []):
        source = source_of(part["file"]) if part["file"] in files else None
        rows += compare_config(part, source) if source else []
    if repository.get("inferred"):
        rows = [row._replace(status=UNMEASURED) if row.status == UNEXPECTED else row for row in rows]
    return repository, rows


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


def report(method: str, repository: dict[str, Any], root: Path, commit: str, rows: list[Row], everything: bool) -> str:
    """All rows by status, as text."""
    pinned = repository["commit"]
    right = bool(commit) and commit.startswith(pinned)
    lines = [f"{method}: {root} {'is' if right else 'against'} {repository['url']} at commit {pinned[:12]}"]
    if commit and not right:
        lines.append(f"NOTE: the checkout is at commit {commit[:12]}, this project was made from {pinned[:12]}")
    elif not commit:
        lines.append("NOTE: the checkout's commit is not known (no git folder)")
    kinds = list(dict.fromkeys(row.kind for row in rows))
    counts = Counter((row.kind, row.status) for row in rows)
    lines += ["", f"{'':<14}" + "".join(f"{status:>14}" for status in STATUSES)]
    lines += [f"{kind + 's':<14}" + "".join(f"{counts[kind, status]:>14}" for status in STATUSES) for kind in kinds]
    for kind in kinds:
        part = [row for row in rows if row.kind == kind and row.status != UNEXPECTED]
        listed = [r for r in part if everything or kind in ("file", "checkpoint") or r.status != SAME]
        own = [r for r in listed if r.why == ONLY_HERE and not everything]
        listed = [r for r in listed if r not in own]
        titles = {
            "file": "Files and what plays their role here",
            "flag": "Flags: theirs | ours, and why" if not everything else "Flags: theirs | ours",
            "definition": "Definitions: theirs | ours, and why",
            "config": "Configurations",
            "checkpoint": "Checkpoint: theirs | ours",
        }
        if listed or own:
            lines += ["", titles[kind]]
        for status in HEADINGS if kind not in ("file", "checkpoint") else (None,):
            some = [r for r in listed if status in (None, r.status)]
            lines += [f" {HEADINGS[status]}"] if some and status else []
            lines += [table(some)] if some else []
        if own:
            by_file: dict[str, list[str]] = {}
            for row in own:
                by_file.setdefault(row.where, []).append(row.name)
            lines.append(" only here (--all tells their defaults)")
            lines += [f"  {file}: {', '.join(names)}" for file, names in by_file.items()]
    bad = [row for row in rows if row.status == UNEXPECTED]
    lines += ["", "Unexpected: none" if not bad else f"Unexpected: {len(bad)}"]
    lines += [table(bad)] if bad else []
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    root = Path(args.upstream)
    record = read_record(args.method)
    commit = git_commit(root)
    repository, rows = compare_checkout(args.method, record, root, commit)
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
            "checkout": {"folder": str(root), "commit": commit or None},
            "counts": {status: counts[status] for status in STATUSES},
            "rows": [row._asdict() for row in rows],
        }
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        print(report(args.method, repository, root, commit, rows, args.all))
    if any(row.status == UNEXPECTED for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
