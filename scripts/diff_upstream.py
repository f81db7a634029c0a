"""Compare a checkout of the authors' repository with this project: files, flags, constructors, and a checkpoint.

Nothing of the checkout is imported or executed; its Python files are read as syntax trees. What the pinned commit
holds, and where this project differs on purpose, is recorded beside each method in upstream.json:

repositories    name, url, commit, licence; `marks`: paths that tell it from others. DIR is the repository of the pinned
                commit, else the first one all of whose marks exist. `inferred`: what is recorded was measured at
                another commit, so deviations are told and not unexpected. It has
  files         path or pattern (*, **) -> {here, role}; the first match counts. Plain paths must exist unless `optional`.
                Every .py and .sh file must match one; __init__.py and other endings are not compared
  parsers       [{file, here, flags, intended}]; flags: first option string -> {action, type, default, dest, nargs, choices},
                absent fields as in argparse; nargs and choices are compared where recorded. here: our file with
                get_args_parser(), or file.py:function; several separated by ", ". intended: flag, or * -> reason
  definitions   [{file, name, here, defaults, calls, complete, intended}]; file: the first of the files that match (patterns,
                several separated by ", ") and have the name; defaults: parameter -> literal default (null: it only
                exists); calls: keyword -> value of the constructor call that the function returns, or of the
                called class's default. complete: a parameter or literal keyword that is not recorded is unexpected
  configs       [{file, values}]; values: dotted path through dict(...)s and `_base_` files -> literal
checkpoints     [{kind, weights, marks, without, holds, ...}], tried in order: the weights lie under one of the dotted keys
                `weights` and have keys beginning with every mark and none of `without`; the file has the dotted keys `holds`
  flags, build  flags: our file whose get_args_parser() describes the network. Its defaults are overridden by the
                checkpoint's own args, then by `infer` (flag -> {blocks: stack} | {size: [key, axis], names: {size: value}}
                | {has: key, yes, no}), `set` (flag -> dotted key) and `fixed` (flag -> value). recipe: dotted key with the
                name of one of our configurations. build: functions, the first makes the network of the flags, others
                change it
  prefix, rename, ignore    of the file's keys: beginning that is cut, {beginning: other}, patterns that are left out.
                part: of the network that the file holds; names: function that gives its weights the file's keys
  encoder       {flags, build, loader, models, set, path}: what fine-tuning takes of it. models: the network's name -> that
                for fine-tuning; set: its flag -> the network's; path: flag that names the file, instead of a loader
preface, shared, differences, kept, notes    README's section on the differences (scripts/readme.py); shared: ids of
                saim's differences that hold here, too; differences: [{id, topic, upstream, here}]

A reason is the id of a difference or a sentence. Exit status: 0, 1 if anything is unexpected, 2 for a user's mistake.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import io
import json
import math
import operator
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
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import Tensor, nn

from common import distributed
from common.distributed import UserError

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("saim", "semaim", "cae", "a2mim", "udi")
SAME, PURPOSE, UNEXPECTED, SKIPPED, UNMEASURED = "same", "on purpose", "unexpected", "not compared", "not measured"
STATUSES = (SAME, PURPOSE, UNEXPECTED, SKIPPED, UNMEASURED)
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
        {"weights", "without", "prefix", "set", "infer", "encoder", "holds", "recipe", "fixed"}
        | {"names", "part", "rename", "ignore"},
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
    """<method>/upstream.json.

    Raises:
        UserError: it is missing or not of the form that this module's docstring describes.
    """
    path = ROOT / method / "upstream.json"
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
    saim = {d["id"]: d for d in json.loads((ROOT / "saim" / "upstream.json").read_text("utf-8"))["differences"]}
    unknown = [i for i in record["shared"] if i not in saim]
    if unknown:
        raise UserError(f"shared: {unknown[0]} is no id of a difference in saim/upstream.json")
    return [saim[i] for i in record["shared"]]


def reasons(method: str, record: dict[str, Any]) -> dict[str, str]:
    """Text of each reason that has an id."""
    rows = [*shared_differences(record), *record["differences"]]
    return {row["id"]: f"{row['topic']}: {row['here'] or 'not here'}" for row in rows}


# ---- reading Python without running it

BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY: dict[type, Callable] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
NUMBERS = {"math.inf": math.inf, "math.pi": math.pi, "np.inf": math.inf, "numpy.inf": math.inf, "torch.inf": math.inf}
CASTS: dict[str, Callable] = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "tuple": tuple}


class Source:
    """A Python file of the checkout as a syntax tree.

    Raises:
        UserError: it cannot be read or is no Python 3.
    """

    def __init__(self, root: Path, file: str):
        self.root, self.file = root, file
        try:
            self.tree = ast.parse((root / file).read_bytes())
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})") from error
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
            raise UserError(f"{line}is no Python 3 ({str(error).split(' (')[0].splitlines()[0]})") from error
        self.names: dict[str, list[ast.expr]] = {}
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                for target in targets:
                    if isinstance(target, ast.Name):
                        self.names.setdefault(target.id, []).append(node.value)

    def nodes(self, *kinds: type) -> list[Any]:
        """All nodes of these types, in the order of the text."""
        found: list[Any] = [node for node in ast.walk(self.tree) if isinstance(node, kinds)]
        return sorted(found, key=lambda node: (node.lineno, node.col_offset))

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """The value of a literal or of simple arithmetic on literals; raises ValueError for anything else."""
        fold = functools.partial(self.value, depth=depth + 1)
        if depth > 40:
            raise ValueError("nested too deeply")
        match node:
            case ast.Constant():
                return node.value
            case ast.UnaryOp() if type(node.op) in UNARY:
                return UNARY[type(node.op)](fold(node.operand))
            case ast.BinOp() if type(node.op) in BINARY:
                left, right = fold(node.left), fold(node.right)
                numbers = isinstance(left, int | float) and isinstance(right, int | float)
                if not numbers and not (isinstance(node.op, ast.Add) and isinstance(left, str | list | tuple)):
                    raise ValueError("is no arithmetic on numbers")
                return BINARY[type(node.op)](left, right)
            case ast.BinOp(op=ast.Pow()):
                left, right = fold(node.left), fold(node.right)
                if not (isinstance(left, int | float) and isinstance(right, int | float)) or abs(right) > 64:
                    raise ValueError("is no small power")
                return left**right
            case ast.List() | ast.Tuple() | ast.Set():
                values = [fold(item) for item in node.elts]
                return values if isinstance(node, ast.List) else tuple(values)
            case ast.Dict():
                return {fold(k): fold(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
            case ast.Call(func=ast.Name(id="dict"), args=[]):
                return {k.arg: fold(k.value) for k in node.keywords}
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in CASTS:
                return CASTS[name](fold(argument))
            case ast.Attribute() if ast.unparse(node) in NUMBERS:
                return NUMBERS[ast.unparse(node)]
            case ast.Name(id=name) if len(self.names.get(name, [])) == 1:
                return fold(self.names[name][0])
        raise ValueError("is no literal")


def fold(source: Source, node: ast.expr | None) -> tuple[bool, Any]:
    """Whether an expression has a known value, and the value or else the expression's text."""
    if node is None:
        return True, None
    try:
        return True, source.value(node)
    except (ValueError, TypeError, ArithmeticError, AttributeError, RecursionError):
        return False, shown_code(node)


def shown_code(node: ast.expr) -> str:
    try:
        return ast.unparse(node)
    except RecursionError:
        return "<a deep expression>"


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples are lists."""
    if isinstance(value, list | tuple | set | frozenset | range):
        return [plain(v) for v in value]
    return {str(k): plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def equal(a: Any, b: Any) -> bool:
    """Equal as flags: 1 is 1.0 but not True."""
    a, b = plain(a), plain(b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    return a == b


# ---- flags


class Flag(NamedTuple):
    """A command-line flag; `unknown` names the fields whose expressions have no known value."""

    options: tuple[str, ...]
    action: str = "store"
    type: str = ""  # none is a text
    default: Any = None
    dest: str = ""
    nargs: Any = None
    choices: Any = None
    unknown: tuple[str, ...] = ()


def normalized(flag: Flag) -> Flag:
    """With the default that argparse would take: converted by a numeric type, on or off for a switch."""
    default = flag.default
    if isinstance(default, str) and flag.type in ("int", "float") and "default" not in flag.unknown:
        with contextlib.suppress(ValueError):
            default = float(default)
    long = next((option for option in flag.options if option.startswith("--")), flag.options[0])
    dest = flag.dest or long.lstrip("-").replace("-", "_")
    return flag._replace(type="" if flag.type == "str" else flag.type, default=plain(default), dest=dest)


def effective(flags: list[Flag]) -> list[Flag]:
    """As argparse does, flags of one destination take the default of the first of them."""
    first: dict[str, Flag] = {}
    for flag in flags:
        first.setdefault(flag.dest, flag)
    shared = [first[flag.dest] for flag in flags]
    return [
        flag if flag.options == head.options else flag._replace(default=head.default, unknown=head.unknown)
        for flag, head in zip(flags, shared, strict=True)
    ]


def recorded_flag(name: str, fields: dict[str, Any]) -> Flag:
    action = fields.get("action", "store")
    default = fields.get("default", {"store_true": False, "store_false": True}.get(action))
    rest = {key: fields[key] for key in ("dest", "nargs", "choices") if fields.get(key) is not None}
    unknown = ("default",) if fields.get("computed") else ()
    return normalized(Flag((name,), action, fields.get("type") or "", default, unknown=unknown, **rest))


def parser_flags(parser: argparse.ArgumentParser) -> list[Flag]:
    """The flags of one of our parsers."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(action).__name__.strip("_").removesuffix("Action")).lower()
        kind_of = action.type.__name__ if isinstance(action.type, type) else getattr(action.type, "__name__", "")
        options = tuple(action.option_strings) or (action.dest,)
        choices = (
            None if action.choices is None else [c if isinstance(c, int | float) else str(c) for c in action.choices]
        )
        found.append(normalized(Flag(options, kind, kind_of, action.default, action.dest, action.nargs, choices)))
    return found


def source_flags(source: Source, depth: int = 0) -> list[Flag]:
    """The flags of every `add_argument` in a file, and in functions of the checkout that it imports and calls."""
    found: list[Flag] = []
    defaults: dict[str, tuple[bool, Any]] = {}
    for call in source.nodes(ast.Call):
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            flag = source_flag(source, call, defaults)
            found += [flag] if flag else []
        elif isinstance(call.func, ast.Attribute) and call.func.attr == "set_defaults":
            new = {k.arg: fold(source, k.value) for k in call.keywords if k.arg}
            defaults |= new
            for i, flag in enumerate(found):
                if flag.dest in new:
                    known, value = new[flag.dest]
                    unknown = tuple({*flag.unknown, "default"} - ({"default"} if known else set()))
                    found[i] = normalized(flag._replace(default=value, unknown=unknown))
    called = {node.func.id for node in source.nodes(ast.Call) if isinstance(node.func, ast.Name)}
    for node in source.nodes(ast.ImportFrom) if depth < 2 else []:
        names = {alias.name for alias in node.names if (alias.asname or alias.name) in called}
        for file in imported_files(source, node) if names else []:
            with contextlib.suppress(UserError):
                other = Source(source.root, file)
                for function in other.tree.body:
                    if isinstance(function, ast.FunctionDef) and function.name in names:
                        other.tree = ast.Module([function], [])
                        found += source_flags(other, depth + 1)
                        other = Source(source.root, file)
    return found


def imported_files(source: Source, node: ast.ImportFrom) -> list[str]:
    """Files of the checkout that `from module import ...` may mean."""
    module = (node.module or "").replace(".", "/")
    here = Path(source.file).parent
    folders = [here, Path()] if not node.level else [Path(*here.parts[: len(here.parts) - node.level + 1])]
    files = [(folder / f"{module}.py").as_posix() for folder in folders if module]
    return [file for file in dict.fromkeys(files) if (source.root / file).is_file()]


def source_flag(source: Source, call: ast.Call, defaults: dict[str, tuple[bool, Any]]) -> Flag | None:
    """The flag of one add_argument call; None if its name is no literal."""
    options = []
    for argument in call.args:
        known, value = fold(source, argument)
        if not known or not isinstance(value, str):
            return None
        options.append(value)
    if not options:
        return None
    given = {k.arg: k.value for k in call.keywords if k.arg}
    fields: dict[str, Any] = {}
    unknown = [] if len(given) == len(call.keywords) else ["action", "type", "default", "nargs", "choices"]
    for key in ("action", "default", "dest", "nargs", "choices"):
        if key in given:
            known, fields[key] = fold(source, given[key])
            if key == "action" and not known:
                fields[key] = fields[key].split(".")[-1]  # a class
            elif not known:
                unknown.append(key)
    if "type" in given:
        text = shown_code(given["type"])
        fields["type"] = (
            "<lambda>" if isinstance(given["type"], ast.Lambda) else text.split(".")[-1].replace("None", "")
        )
    flag = Flag(tuple(options), **fields)
    if "default" not in fields:
        implied = {"store_true": False, "store_false": True}.get(flag.action)
        known, value = defaults.get(normalized(flag).dest, (True, implied))
        flag = flag._replace(default=value)
        unknown += [] if known else ["default"]
    return normalized(flag._replace(unknown=tuple(unknown)))


def shown(value: Any) -> str:
    return json.dumps(plain(value), default=str, ensure_ascii=False)


def flag_changes(old: Flag, new: Flag, ours: bool = False) -> list[tuple[str, str, str]]:
    """(field, old, new) of each field that differs, where both are known.

    ours: the sides are theirs and ours; then choices differ only where ours lack one of theirs.
    """
    changes = []
    for field in ("action", "type", "default", "nargs", "choices"):
        a, b = getattr(old, field), getattr(new, field)
        if field in old.unknown or field in new.unknown:
            continue
        if field in ("nargs", "choices") and (a is None or (ours and b is None)):
            continue
        if field == "choices" and ours and set(map(str, a)) <= set(map(str, b)):
            continue
        if not equal(a, b):
            changes.append((field, shown(a), shown(b)))
    return changes


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
            yield Row("flag", file, name, PURPOSE, upstream, own, why.get(reason, reason))
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


def summary(flag: Flag) -> str:
    """A flag's type and default, or the action of a switch."""
    if flag.action != "store":
        return flag.action
    return f"{flag.type or 'str'} {flag.default if 'default' in flag.unknown else shown(flag.default)}"


# ---- classes, functions, constructors


class Definition(NamedTuple):
    """A class's constructor or a function: parameters with their defaults, keywords of the call that it returns."""

    defaults: dict[str, tuple[bool, Any] | None]  # None: no default
    calls: dict[str, tuple[bool, Any]]


def find_definition(source: Source, name: str, depth: int = 0) -> Definition | None:
    """A class, function, `Class.method` or module-level name of a file; None if it is not there."""
    body: list[ast.stmt] = source.tree.body
    node: ast.stmt | None = None
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        node = next((n for n in definitions_in(body) if isinstance(n, kinds) and n.name == part), None)
        if node is None:
            break
        body = getattr(node, "body", [])
    if node is None and name in source.names and depth < 5:
        value = source.names[name][-1]
        if isinstance(value, ast.Name):
            return find_definition(source, value.id, depth + 1)
        return Definition({}, keywords(source, value) if isinstance(value, ast.Call) else {})
    if isinstance(node, ast.ClassDef):
        node = next((n for n in definitions_in(node.body) if getattr(n, "name", "") == "__init__"), None)
        return Definition(parameters(source, node, skip_self=True), {}) if node else Definition({}, {})
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return Definition(parameters(source, node, skip_self="." in name), returned_call(source, node))
    return None


def definitions_in(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, and those inside `if` and `try`; the last definition of a name comes first."""
    for node in reversed(body):
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from definitions_in([*node.body, *getattr(node, "orelse", [])])


def parameters(source: Source, node: Any, skip_self: bool) -> dict[str, tuple[bool, Any] | None]:
    positional = [*node.args.posonlyargs, *node.args.args]
    first = [None] * (len(positional) - len(node.args.defaults))
    pairs = [*zip(positional, [*first, *node.args.defaults], strict=True)]
    pairs = pairs[1 if skip_self else 0 :] + [*zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
    return {argument.arg: None if default is None else fold(source, default) for argument, default in pairs}


def returned_call(source: Source, node: Any) -> dict[str, tuple[bool, Any]]:
    """Keywords of the call whose result a function returns, completed by the called class's defaults."""
    results = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None]
    names = {n.id for n in results if isinstance(n, ast.Name)}
    results += [
        n.value
        for n in ast.walk(node)
        if isinstance(n, ast.Assign) and any(isinstance(t, ast.Name) and t.id in names for t in n.targets)
    ]
    calls = [call for call in results if isinstance(call, ast.Call)]
    return keywords(source, calls[0]) if calls else {}


def keywords(source: Source, call: ast.Call) -> dict[str, tuple[bool, Any]]:
    """Keywords of a call, those of `**{...}` included."""
    found: dict[str, tuple[bool, Any]] = {}
    for keyword in call.keywords:
        if keyword.arg:
            found[keyword.arg] = fold(source, keyword.value)
        elif isinstance(keyword.value, ast.Dict):
            pairs = zip(keyword.value.keys, keyword.value.values, strict=True)
            found |= {k.value: fold(source, v) for k, v in pairs if isinstance(k, ast.Constant)}
    return found


def callee(source: Source, name: str) -> str:
    """Name of the class or function whose call a function returns."""
    classes = {node.name for node in source.tree.body if isinstance(node, ast.ClassDef)}
    for node in source.nodes(ast.FunctionDef):
        for call in ast.walk(node) if node.name == name else ():
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in classes:
                return call.func.id
    return ""


def passed(source: Source, name: str, found: Definition, key: str) -> tuple[bool, Any] | None:
    """A keyword of the call that a factory returns, else the called class's default; None if neither is there."""
    target = None if key in found.calls else find_definition(source, callee(source, name))
    return target.defaults.get(key) if target else found.calls.get(key)


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
    our_file, _, our_name = here.partition(":")
    our_source = Source(ROOT, our_file) if here else None
    ours = find_definition(our_source, our_name) if our_source else None
    if our_source and ours is None:
        return [row("", UNEXPECTED, name, here, "is recorded here, but is not there")]
    defaults, calls = record.get("defaults", {}), record.get("calls", {})
    rows = []
    for key, value in {**defaults, **calls}.items():
        known = f"the pinned commit has {shown(value)}"
        if key in calls:
            found = passed(source, name, theirs, key)
            if key not in theirs.calls and key in classes.get(callee(source, name), {}):
                known_default = classes[callee(source, name)][key]
                found = None if equal(known_default, value) else found
        elif key not in theirs.defaults:
            rows.append(row(key, UNEXPECTED, "is gone", "", known))
            continue
        else:
            found = theirs.defaults[key]
            if found is None and value is not None and record.get("complete"):
                rows.append(row(key, UNEXPECTED, "no default", "", known))
                continue
        if found is not None and found[0] and value is not None and not equal(found[1], value):
            rows.append(row(key, UNEXPECTED, shown(found[1]), "", known))
        elif ours is not None and our_source is not None and not whole:
            mine = passed(our_source, our_name, ours, key) if key in calls else ours.defaults.get(key)
            there = mine is not None or key in ours.defaults or key in calls
            if not there or (mine is not None and mine[0] and value is not None and not equal(mine[1], value)):
                reason = intended.get(key, "")
                text = why.get(reason, reason) or "is not recorded as intended"
                own = shown(mine[1]) if mine else "no such keyword"
                rows.append(row(key, PURPOSE if reason else UNEXPECTED, shown(value), own, text))
    if record.get("complete"):
        news = {k: v for k, v in theirs.calls.items() if v[0]} if calls else theirs.defaults
        for key, found in news.items():
            if key not in defaults and key not in calls:
                text = "no default" if found is None else shown(found[1])
                rows.append(row(key, UNEXPECTED, text, "", "is new: the pinned commit has none"))
    status = PURPOSE if whole or not here else SAME
    return rows or [row("", status, name, here or "nothing", why.get(whole, whole))]


# ---- configuration files


def config_value(source: Source, path: list[str], depth: int = 0) -> tuple[bool, Any] | None:
    """The value at a dotted path of an mmcv configuration; None if neither it nor its `_base_` files have it."""
    nodes = source.names.get(path[0], [])
    node: Any = nodes[-1] if nodes else None
    for key in path[1:]:
        alone = node is not None and (config_item(node, "_delete_") is not None)
        node = config_item(node, key) if node is not None else None
        if node is None and alone:
            return None  # nothing of the base files is merged into it
    if node is not None:
        known, value = fold(source, node)
        return known and "{{" not in str(value), value
    known, bases = fold(source, (source.names.get("_base_") or [None])[-1])
    for base in [bases] if isinstance(bases, str) else bases or []:
        file = os.path.normpath(Path(source.file).parent / str(base))
        if known and depth < 8 and not file.startswith("..") and (source.root / file).is_file():
            with contextlib.suppress(UserError):
                found = config_value(Source(source.root, file), path, depth + 1)
                if found is not None:
                    return found
    return None


def config_item(node: ast.expr, key: str) -> ast.expr | None:
    if isinstance(node, ast.Call):
        return next((k.value for k in node.keywords if k.arg == key), None)
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return next((v for k, v in pairs if isinstance(k, ast.Constant) and k.value == key), None)
    if isinstance(node, ast.List | ast.Tuple) and key.isdigit() and int(key) < len(node.elts):
        return node.elts[int(key)]
    return None


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
    return found


def matches(path: str, pattern: str) -> bool:
    """* stays inside a folder, ** does not."""
    if "*" not in pattern:
        return path == pattern
    parts = (re.escape(part).replace(r"\*", "[^/]*").replace(r"\?", "[^/]") for part in pattern.split("**"))
    return re.fullmatch(".*".join(parts).replace(".*/", "(.*/)?"), path) is not None


def git_commit(root: Path) -> str:
    """The commit of HEAD, read from git's files; '' if there is none to be read."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        git = root / ".git"
        if git.is_file():  # a worktree or submodule
            git = (root / git.read_text().partition("gitdir:")[2].strip()).resolve()
        common = (git / (git / "commondir").read_text().strip()).resolve() if (git / "commondir").is_file() else git
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head if re.fullmatch("[0-9a-f]{40,64}", head) else ""
        name = head.removeprefix("ref:").strip()
        for folder in (git, common):
            if (folder / name).is_file():
                return (folder / name).read_text().strip()
        for line in (common / "packed-refs").read_text().splitlines():
            commit, _, ref = line.partition(" ")
            if ref == name:
                return commit
    return ""


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
    if pinned or marked or share(best) > 0.5:
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
    rows = list(compare_files(repository, files))

    @functools.cache
    def source_of(file: str) -> Source | None:
        try:
            return Source(root, file)
        except UserError as error:
            rows.append(Row("file", file, "", UNEXPECTED, str(error), "", "its contents are not compared"))
            return None

    for part in repository.get("parsers", []):
        source = source_of(part["file"]) if part["file"] in files else None  # what is gone is told among the files
        rows += compare_flags(part, source, why) if source else []
    found = {}
    for i, part in enumerate(repository.get("definitions", [])):
        candidates = [f for p in part["file"].split(", ") for f in files if matches(f, p)]
        known = [source for f in candidates if (source := source_of(f))]
        found[i] = next((source for source in known if find_definition(source, part["name"])), (known or [None])[0])
    for i, part in enumerate(repository.get("definitions", [])):
        source = found[i]
        if source is None:
            continue
        same_file = [d for j, d in enumerate(repository["definitions"]) if found[j] is source]
        classes = {d["name"]: d.get("defaults", {}) for d in same_file}
        rows += compare_definition({**part, "file": source.file}, source, why, classes)
    for part in repository.get("configs", []):
        source = source_of(part["file"]) if part["file"] in files else None
        rows += compare_config(part, source) if source else []
    if repository.get("inferred"):
        rows = [r._replace(status=UNMEASURED) if r.status == UNEXPECTED else r for r in rows]
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
    raise UserError(
        f"{path}: is no checkpoint of a kind that is known here ({', '.join(k['kind'] for k in kinds)}); its keys: {keys}"
    )


def inferred(rule: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """A flag's value read from the weights; None if they do not tell."""
    if "blocks" in rule:
        return (
            len(
                {
                    k.removeprefix(rule["blocks"] + ".").split(".")[0]
                    for k in weights
                    if k.startswith(rule["blocks"] + ".")
                }
            )
            or None
        )
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
    recipe = at(state, kind["recipe"]) if "recipe" in kind else None
    for file in (
        sorted((ROOT / Path(kind["flags"]).parts[0] / "configs").rglob(Path(str(recipe)).name)) if recipe else ()
    ):
        module = importlib.import_module(f"{Path(kind['flags']).parts[0]}.config")
        args = module.parse_args(parser, [str(file)])
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


def build(places: list[str], args: argparse.Namespace) -> nn.Module:
    """The network of the flags; each further function changes it."""
    model = function(places[0])(args)
    for place in places[1:]:
        function(place)(model)
    return model


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
    name = network_name(args)
    rows = [
        Row(
            "checkpoint", path, "format", SAME, f"{kind['kind']}, {len(weights)} tensors", f"{kind['build'][0]}, {name}"
        )
    ]
    try:
        with torch.device("meta"):
            model, _ = quietly(lambda: build(kind["build"], args))
    except (NotImplementedError, RuntimeError):
        model, _ = quietly(lambda: build(kind["build"], args))
    except (UserError, SystemExit) as error:
        raise UserError(f"{path}: its flags make no network here: {error}; --flags overrides them") from error
    part = model.get_submodule(kind.get("part", ""))
    own = function(kind["names"])(part) if "names" in kind else part.state_dict()
    ignored = kind.get("ignore", [])
    own, weights = (
        {k: v for k, v in tensors.items() if isinstance(v, Tensor) and not any(fnmatchcase(k, p) for p in ignored)}
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
    if not missing and not unexpected and not shapes:
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
    except (UserError, SystemExit) as error:
        return Row("checkpoint", path, "encoder", UNEXPECTED, str(error), taker)
    said = next((line for line in reversed(text.splitlines()) if " tensors" in line or ": " in line), "")
    return Row("checkpoint", path, "encoder", SAME, said.split(": ", 1)[-1], f"{taker}, {network_name(wanted)}")


# ---- output


def table(rows: list[Row]) -> str:
    """Rows as lines: file, name, both sides, reason."""
    lines, where = [], None
    for row in rows:
        if row.kind == "file":
            lines.append(f"  {row.where:<40} {row.upstream or '->':<9} {row.here:<34} {row.why}".rstrip())
            continue
        if row.where != where:
            where = row.where
            lines.append(f"  {where}")
        sides = f"{row.upstream} | {row.here}" if row.here else row.upstream
        lines.append(f"    {row.name:<26} {sides:<48} {row.why}".rstrip())
    return "\n".join(lines)


def report(method: str, repository: dict[str, Any], root: Path, commit: str, rows: list[Row], everything: bool) -> str:
    """All rows by status, as text."""
    pinned = repository["commit"]
    at_commit = (
        f"at the pinned commit {pinned[:12]}" if commit.startswith(pinned) else f"compared with commit {pinned[:12]}"
    )
    lines = [f"{method}: {root} against {repository['url']}, {at_commit}"]
    if commit and not commit.startswith(pinned):
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
        for status in (PURPOSE, UNMEASURED, SKIPPED, SAME) if kind not in ("file", "checkpoint") else (None,):
            some = [r for r in listed if status in (None, r.status)]
            if some:
                headings = {
                    PURPOSE: ' different on purpose, see README "Differences"',
                    UNMEASURED: " other than inferred: what is recorded of this repository was measured at another one",
                    SKIPPED: " not compared",
                    SAME: " same",
                }
                lines += [headings[status]] if status else []
                lines.append(table(some))
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
