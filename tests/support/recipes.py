"""What a command line would train with, taken from a real `main` without training, to be compared by value.

`capture` runs a main up to its first epoch, with networks that have shapes but no numbers, so that the largest one is
built at once; `Captured.facts` tells all of it in plain data, and `differences` names every place where that differs
from tests/golden/<method>/recipes.json. That file may say less than the facts; what it says must be equal.
"""

import contextlib
import enum
import inspect
import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common import datasets, distributed
from tests.support.helpers import GOLDEN_DIR

VAL_IMAGES = 50_000
ALONE = {  # functions of common.distributed that would need the other processes, and their answers without those
    "init": lambda *_, **__: torch.device("meta"),
    "wrap": lambda model, *_, **__: model,
    "amp_dtype": lambda *_: torch.float32,
    "agree": lambda problem=False: (0, bool(problem)),
    "all_sum": list,
    **dict.fromkeys(("sync_buffers", "catch_signals"), lambda *_: None),
}
INITS = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]


class _TrainingStarts(BaseException):
    """Ends a captured main; no `except Exception` on the way stops it."""


class _Numbers(TorchFunctionMode):
    """Tensors that are written out, such as a mean colour, keep their numbers inside `torch.device("meta")`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **({"device": "cpu"} if func is torch.tensor else {}) | (kwargs or {}))


@contextlib.contextmanager
def without_numbers() -> Iterator[None]:
    """Networks that are built inside have shapes but no numbers, and no initial values are drawn."""
    with contextlib.ExitStack() as stack:
        for name in INITS:
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        stack.enter_context(mock.patch("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor))
        stack.enter_context(torch.device("meta"))
        yield


class Images(torch.utils.data.Dataset):
    """Stands for a data set: its length and its classes, no images."""

    def __init__(self, images: int, classes: int):
        self.images, self.classes = images, [f"{i:04}" for i in range(classes)]

    def __len__(self) -> int:
        return self.images


@dataclass
class Captured:
    """What a main had made when its training began.

    call: the arguments of the function that was to train, by name. made: for each watched class or function the
    arguments of every call, by name, and the object itself under "made". seeds: of torch.manual_seed, in order.
    """

    args: Any
    call: dict[str, Any] = field(default_factory=dict)
    made: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    inits: dict[int, tuple[Tensor, str]] = field(default_factory=dict)  # by memory: views of it count, too

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.made["Updater"][0]["optimizer"]

    def loaders(self) -> list[dict[str, Any]]:
        """The loaders in the order in which they were made, in plain data."""
        return [_loader(made) for made in self.made["Loader"]]

    def init(self, parameter: Tensor) -> str:
        """How a parameter was last drawn anew, as 'trunc_normal_(std=0.02)'; '' if no init function was given it."""
        return self.inits.get(_memory(parameter), (parameter, ""))[1]

    def facts(self, model: nn.Module | None = None) -> dict[str, Any]:
        """The recipe in plain data.

        model: whose parameters the optimizer's are named by, default the first that the training function takes.
        """
        network: nn.Module = model or next(v for v in self.call.values() if _is_network(v))
        updater, parameters = self.made["Updater"][0], network.named_parameters()
        return {
            "seeds": self.seeds,
            "optimizer": describe_optimizer(self.optimizer, network),
            "updates": {k: updater[k] for k in ("precision", "accum_iter", "clip_grad")},
            "loaders": self.loaders(),
            "model": modules(network),
            "inits": {k: v["init"] for k, v in _by_pattern((n, {"init": self.init(p)}) for n, p in parameters).items()},
            "call": {k: describe(v) for k, v in self.call.items() if not _is_machinery(v)},
        }


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _loader(made: dict[str, Any]) -> dict[str, Any]:
    loader = made["made"]
    keys = ("train", "transform", "batch_size", "seed", "bad_images", "accum_iter", "drop_last", "collate")
    return {
        **{key: describe(made[key]) for key in keys},
        "sampler": describe(getattr(loader.sampler, "sampler", loader.sampler)),
        "batches": len(loader),
    }


def _is_machinery(value: Any) -> bool:
    """Whether `facts` has it elsewhere: networks (losses have no parameters), loaders, updates, logs."""
    return _is_network(value) or isinstance(value, (datasets.Loader, distributed.Updater, distributed.EpochLog))


def _is_network(value: Any) -> bool:
    return isinstance(value, nn.Module) and next(value.parameters(), None) is not None


@contextlib.contextmanager
def _everywhere(method: str, new: Mapping[Any, Any]) -> Iterator[None]:
    """Replace objects under every name that modules of the method, common and timm, and torch itself have for them."""
    by_id = {id(original): replacement for original, replacement in new.items()}
    modules = [sys.modules[name] for name in list(sys.modules) if name.split(".")[0] in (method, "common", "timm")]
    with contextlib.ExitStack() as stack:
        for module in [torch, nn.init, *modules]:
            for name in [name for name, value in vars(module).items() if id(value) in by_id]:
                stack.enter_context(mock.patch.object(module, name, by_id[id(getattr(module, name))]))
        yield


def capture(
    main: ModuleType,
    argv: Sequence[str],
    world: int = 1,
    rank: int = 0,
    images: int = 1_281_167,
    classes: int = 1000,
    watch: Sequence[Any] = (),
    replace: Mapping[Any, Any] | None = None,
    stops: Sequence[str] = ("train_one_epoch",),
    parse: Callable[[Any, Sequence[str]], Any] = lambda parser, argv: parser.parse_args(argv),
) -> Captured:
    """Run `main.main` of a command line until a function named in `stops` is called.

    Args:
        world, rank: the processes, and which of them this is. images, classes: of the training data.
        watch: further classes and functions whose calls `Captured.made` lists, by name.
        replace: functions to replace wherever the method has them, such as {distributed.load: lambda path: {...}}.
        stops: functions of the method's modules. parse: (parser, words) -> flags, where argparse alone is not enough.
    """
    method = main.__name__.split(".")[0]
    run = Captured(parse(main.get_args_parser(), list(argv)))

    def stop(function: Callable) -> Callable:
        def stopped(*args, **kwargs):
            run.call = _bound(function, args, kwargs)
            raise _TrainingStarts

        return stopped

    def watched(name: str, function: Callable) -> Callable:
        def calls(*args, **kwargs):
            made = _bound(function, args, kwargs)
            run.made.setdefault(name, []).append(made)
            result = function(*args, **kwargs)
            made["made"] = made.pop("self", result)
            return result

        return calls

    def drawn(function: Callable) -> Callable:
        def draws(tensor, *args, **kwargs):
            given = _bound(function, (tensor, *args), kwargs)
            words = ", ".join(f"{k}={v}" for k, v in given.items() if k not in ("tensor", "generator"))
            run.inits[_memory(tensor)] = tensor, f"{function.__name__}({words})"
            return tensor if tensor.is_meta else function(tensor, *args, **kwargs)

        return draws

    def seed(value: int) -> torch.Generator:
        run.seeds.append(int(value))
        return torch.default_generator

    def image_dataset(_path: str, train: bool, *_, **__) -> Images:
        return Images(images if train else min(images, VAL_IMAGES), classes)

    new: dict[Any, Any] = {getattr(distributed, name): answer for name, answer in ALONE.items()}
    new |= {distributed.world_size: lambda: world, distributed.rank: lambda: rank, distributed.is_main: lambda: False}
    new |= {distributed.gather: lambda value: [value] * world, distributed.gather_to_main: lambda _: []}
    new |= {torch.manual_seed: seed, datasets.image_dataset: image_dataset}
    new |= {distributed.check_default_file: lambda *_: None}  # no weights are read
    new |= {getattr(nn.init, name): drawn(getattr(nn.init, name)) for name in INITS}
    modules_of_method = [m for n, m in sys.modules.items() if n.split(".")[0] == method]
    for function in {getattr(m, name) for m in modules_of_method for name in stops if hasattr(m, name)}:
        new[function] = stop(function)
    new |= replace or {}

    with contextlib.ExitStack() as stack:
        for target in (datasets.Loader, distributed.Updater, *watch):
            if isinstance(target, type):
                stack.enter_context(mock.patch.object(target, "__init__", watched(target.__name__, target.__init__)))
            else:
                new[target] = watched(target.__name__, new.get(target, target))
        stack.enter_context(_everywhere(method, new))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(pytest.MonkeyPatch.context()).chdir(folder)
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # this machine's cores are none of the recipe's
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002 - what mains might seed
        stack.enter_context(mock.patch("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor))
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_Numbers())
        with contextlib.suppress(_TrainingStarts):
            main.main(run.args)
            raise AssertionError(f"{main.__name__} {' '.join(argv)}: called none of {', '.join(stops)}")
    return run


def _bound(function: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by name, defaults included."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


# ---- plain data


def describe(value: Any) -> Any:
    """An object as plain data: of functions the name, of others the class (ours: common.NAME) and public attributes."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (np.generic, Tensor, np.ndarray)):
        many = isinstance(value, Tensor) and (value.is_meta or value.numel() > 64)
        return list(value.shape) if many else value.tolist()  # type: ignore[union-attr]
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        if len(value) > 64:
            return {"count": len(value), "first": describe(value[0]), "last": describe(value[-1])}
        return [describe(v) for v in value]
    if isinstance(value, partial):
        return {"class": describe(value.func), "args": describe(value.args), **describe(value.keywords)}
    if inspect.isroutine(value) or isinstance(value, type):
        return value.__qualname__
    if isinstance(value, torch.optim.Optimizer):
        return describe_optimizer(value)
    hidden = {"training", "dataset", "ds"}
    public = {k: v for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("_") and k not in hidden}
    package = type(value).__module__.split(".")[0]
    prefix = "" if package in ("builtins", "timm", "torch", "torchvision") else f"{package}."
    return {"class": prefix + type(value).__name__, **{k: describe(v) for k, v in public.items()}}


def describe_optimizer(optimizer: Any, model: nn.Module | None = None) -> dict[str, Any]:
    """Class and groups; of a group's parameters their number and the names of the first and the last."""
    while not hasattr(optimizer, "param_groups") or hasattr(optimizer, "base_optimizer"):  # of timm's Lookahead
        optimizer = optimizer.base_optimizer
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    groups = []
    for group in optimizer.param_groups:
        own = [names.get(id(p), "?") for p in group["params"]]
        rest = {k: describe(v) for k, v in group.items() if k != "params"}
        groups.append(
            {**rest, "tensors": len(own), "first": own[0], "last": own[-1]} if own else {**rest, "tensors": 0}
        )
    return {"class": type(optimizer).__name__, "groups": groups}


def modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every public number, text and pair of the modules by path, numbers of lists written as *.

    blocks.*.attn: {"count": 12, "class": "Attention", "num_heads": 12}; what differs between the paths is a list.
    """
    plain = []
    for path, module in model.named_modules(remove_duplicate=False):
        public = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
        public = {k: v for k, v in public.items() if v is None or isinstance(v, (bool, int, float, str, tuple))}
        plain.append((path, {"class": type(module).__name__, **public}))
    return _by_pattern(plain)


def _by_pattern(rows: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Join rows whose paths differ in numbers only: what they have in common once, what differs as a list."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path, row in rows:
        found.setdefault(".".join("*" if part.isdigit() else part for part in path.split(".")), []).append(row)
    facts: dict[str, dict[str, Any]] = {}
    for name, alike in found.items():
        values = {key: [describe(row.get(key)) for row in alike] for row in alike for key in row}
        same = {key: column[0] if all(v == column[0] for v in column) else column for key, column in values.items()}
        facts[name] = {"count": len(alike), **same}
    return facts


def preset(build: Callable[..., nn.Module], **kwargs) -> dict[str, Any]:
    """`modules` of a network that is built without numbers, and how many parameters it has ("parameters")."""
    with without_numbers():
        model = build(**kwargs)
    return {**modules(model), "parameters": sum(p.numel() for p in model.parameters())}


def at(schedule: Callable[..., Any], pairs: Any) -> list[list[Any]]:
    """A schedule's values at the positions of pairs [position, expected]; a position may be a list of arguments."""
    return [[where, schedule(*(where if isinstance(where, list) else [where]))] for where, _ in pairs]


def differences(expected: Any, actual: Any, where: str = "") -> list[str]:
    """Every place at which what is expected differs, a line each; only keys that are expected are compared.

    Of a list some entries may be expected: {"count": 28, "0": ..., "27": ...}. Numbers agree to 1e-6 of their size: the
    rates of stochastic depth are float32.
    """
    if isinstance(expected, dict) and isinstance(actual, list):
        actual = {"count": len(actual), **{str(i): value for i, value in enumerate(actual)}}
    if isinstance(expected, dict) and isinstance(actual, dict):
        lines = [f"{where}.{key}: {expected[key]!r} expected, nothing here" for key in expected if key not in actual]
        both = [key for key in expected if key in actual]
        return lines + [line for key in both for line in differences(expected[key], actual[key], f"{where}.{key}")]
    if isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            return [f"{where}: {len(expected)} entries expected, {len(actual)} here: {str(actual)[:200]}"]
        pairs = enumerate(zip(expected, actual, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{where}[{i}]")]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (expected, actual))
    same = actual == pytest.approx(expected, rel=1e-6, abs=1e-300) if numbers else expected == actual
    return [] if same else [f"{where}: {expected!r} expected, {str(actual)[:300]} here"]


def accuracies(evaluate: Callable[..., dict[str, float]], ranks: Sequence[int], classes: int = 10) -> dict[str, float]:
    """What evaluate(model, loader, updater) gives where the true class of image i is the model's choice ranks[i]."""
    logits = -torch.arange(classes, dtype=torch.float32).expand(len(ranks), -1)  # class k is choice k
    loader = mock.MagicMock(batch_size=len(ranks), device=torch.device("cpu"), images=len(ranks))
    loader.__len__.return_value = 1
    loader.batches = lambda *_, **__: iter([(logits, torch.tensor(ranks))])
    updater = SimpleNamespace(device=loader.device, autocast=contextlib.nullcontext)
    return evaluate(nn.Identity(), loader, updater)


# ---- cases


def recipes(method: str) -> dict[str, Any]:
    """tests/golden/<method>/recipes.json; a text "@name" in it stands for the entry of that name under "shared"."""
    content = json.loads((GOLDEN_DIR / method / "recipes.json").read_text("utf-8"))
    shared = content.pop("shared", {})

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(v) for key, v in value.items()}
        if isinstance(value, list):
            return [filled(v) for v in value]
        return filled(shared[value[1:]]) if isinstance(value, str) and value.startswith("@") else value

    return filled(content)


def cases(method: str, part: str = "cases"):
    """Parametrize `case` over the entries of a part of recipes.json: SimpleNamespace(name, **entry)."""
    entries = recipes(method)[part].items()
    params = [pytest.param(SimpleNamespace(name=name, **entry), id=name) for name, entry in entries]
    return lambda test: pytest.mark.golden(pytest.mark.parametrize("case", params)(test))


def compare(expected: dict[str, Any], actual: dict[str, Any], name: str) -> None:
    """Fail with all differences."""
    lines = differences(expected, actual, name)
    assert not lines, "\n".join(lines)
