"""Invented checkouts of the authors' repositories: their files, flags, constructors and configurations, without code.

Flags come from tests/golden/<method>/manifest.json and configurations from tests/golden/a2mim/configs.json; what
parameters the authors' constructors and functions have stands in upstream_signatures.json.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from scripts.tools import diff_upstream as diff
from tests.support.helpers import ROOT

GOLDEN = ROOT / "tests" / "golden"
# Flags that the earlier revision of CAE has besides those of the later one, and one that it lacks.
EARLIER = {
    "run_pretraining": ("--sincos_pos_emb", "--abs_pos_emb", "--rel_pos_bias"),
    "run_class_finetuning": ("--abs_pos_emb",),
    "run_attentive": ("--abs_pos_emb",),
    "run_linear": ("--abs_pos_emb",),
}
LATER = ("--model_type", "--num_out_dim", "--latent_alignment_loss_weight")
# No Python 3 at the pinned commit.
UNPARSABLE = {"eval/eval_video_segmentation/eval_video_segmentation.py": "\n" * 24 + "from . import .utils\n"}


@cache
def read(path: str) -> Any:
    return json.loads((ROOT / path).read_text("utf-8"))


def flags(method: str, index: int) -> dict[str, dict[str, dict[str, Any]]]:
    """{file: {option: fields of add_argument}} of a repository."""
    folder = "tools/" if method == "cae" else ""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, options in read(f"tests/golden/{method}/manifest.json")["flags"].items():
        if name.endswith(".sh"):
            continue
        fields = {option: normal(option, given) for option, given in options.items()}
        if (method, index) == ("cae", 1):
            fields = {option: f for option, f in fields.items() if option not in LATER}
            fields |= dict.fromkeys(EARLIER[name], {"action": "store_true"})
            fields |= {"--base_momentum": {"type": "float", "default": 0}} if name == "run_pretraining" else {}
        found[folder + name.removesuffix(".py") + ".py"] = fields
    if (method, index) == ("a2mim", 0):
        found["analysis_tools/fourier_analysis/fourier_analysis.py"]["--test_dir"]["default"] = "data/val"
    if (method, index) == ("a2mim", 1):
        found = {file: options for file, options in found.items() if file in ("tools/train.py", "tools/test.py")}
    return found


def normal(option: str, given: dict[str, Any]) -> dict[str, Any]:
    """A manifest's fields, which it writes in the way of each method, as fields of add_argument."""
    kind, default = given.get("type"), given.get("default")
    dest = given.get("dest") or option.lstrip("-").replace("-", "_")
    own = dest == option.lstrip("-").replace("-", "_")
    if isinstance(default, bool) and kind in (None, "flag", "StoreTrue", "StoreFalse"):
        fields: dict[str, Any] = {"action": "store_true" if own else "store_false"}
        fields |= {} if default is not own else {"default": default}
        return fields | ({} if own else {"dest": dest})
    fields = {} if kind in (None, "Store") else {"type": kind}
    if option == "--cutmix_minmax":
        fields["nargs"] = "+"  # SAIM's manifest does not say it
    if option.endswith("options"):
        fields["action"] = "DictAction"
    fields |= {key: given[key] for key in ("nargs", "choices") if given.get(key)}
    return fields | {"default": default} | ({} if own or not option.startswith("-") else {"dest": dest})


def add_argument(name: str, fields: dict[str, Any]) -> str:
    """A line of a parser as the authors may have written it."""
    words = [repr(name)]
    for key, value in fields.items():
        bare = key == "type" or (key == "action" and not value.islower())
        words.append(f"{key}={value}" if bare else f"{key}={value!r}")
    return f"    parser.add_argument({', '.join(words)}, help='words')"


def signatures(method: str, index: int) -> dict[str, list[str]]:
    """{file or pattern: [class(parameters), function(parameters) -> keywords of the call that it returns]}."""
    return read("tests/support/upstream_signatures.json")[method][index]


def define(lines: list[str]) -> str:
    """Classes and functions of these signatures."""
    functions, classes = [], {}
    for line in lines:
        name, own, passed = re.fullmatch(r"([\w.]+)\((.*?)\)(?: -> (.*))?", line).groups()  # type: ignore[union-attr]
        owner, _, method = name.rpartition(".")
        if owner or (name[0].isupper() and not passed):
            name, method = (owner, method) if owner else (name, "__init__")
            classes.setdefault(name, []).append(f"    def {method}(self, {own}):\n        self.eps = 1e-6\n")
        elif passed:
            call = f"Network({passed}, norm_layer=partial(nn.LayerNorm, eps=1e-6), **kwargs)"
            functions.append(f"def {name}({own}{', ' if own else ''}**kwargs):\n    model = {call}\n    return model\n")
        else:
            functions.append(f"def {name}({own}):\n    pass\n")
    return "\n\n".join([f"class {n}(nn.Module):\n" + "\n".join(m) for n, m in classes.items()] + functions)


def nested(values: dict[str, Any]) -> str:
    """Assignments of dict(...)s."""

    def code(value: Any) -> str:
        if isinstance(value, dict) and all(str(key).isidentifier() for key in value):
            return f"dict({', '.join(f'{key}={code(v)}' for key, v in value.items())})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {code(v)}" for key, v in value.items()) + "}"
        return repr(value)

    return "\n".join(f"{name} = {code(value)}" for name, value in values.items()) + "\n"


def configurations(index: int) -> dict[str, str]:
    """{path: text} of the configurations of A2MIM or OpenMixup."""
    found = {}
    for path, given in read("tests/golden/a2mim/configs.json")["configs"].items():
        if given["source"] == "openmixup" and index == 0:
            continue
        optimizer = given["optimizer"] | {"paramwise_options": given["paramwise_options"]}
        values: dict[str, Any] = {
            "model": {key: given[key] for key in ("backbone", "neck", "head") if key in given},
            "optimizer": {key: value for key, value in optimizer.items() if value is not None},
            "lr_config": given["lr_config"],
            "runner": {"type": "EpochBasedRunner", "max_epochs": given["epochs"]},
            "data": {"imgs_per_gpu": given["batch_per_gpu"], "workers_per_gpu": 4},
            "optimizer_config": {"update_interval": given["update_interval"]},
        }
        values = json.loads(json.dumps(values))
        if given["grad_clip"]:
            values["optimizer_config"]["grad_clip"] = {"max_norm": given["grad_clip"]}
        for dotted, both in given.get("differs_between_repos", {}).items():
            *folders, last = dotted.split(".")
            place = values
            for folder in folders:
                place = place[folder]
            place[last] = both[("A2MIM", "openmixup")[index]]
        if index:
            path = path.replace("openmixup/pretrain", "selfsup").replace("openmixup/finetune", "benchmarks/mim")
        found[path] = nested(values)
    extra = "configs/openmixup/pretrain/a2mim/cifar100/r18_l3_sz224_cos_ep300.py"
    return found if index else found | {extra: "optimizer = dict(lr=1e-3)\n"}


def place(repository: dict[str, Any], pattern: str) -> str:
    """A file that a definition may stand in: one that is recorded, else an invented one."""
    patterns = pattern.split(", ")
    known = [file for file in repository["files"] if "*" not in file]
    found = [file for pattern in patterns for file in known if diff.matches(file, pattern)]
    return (found or [patterns[0].replace("**/", "").replace("**", "some.py").replace("*", "some")])[0]


def checkout(method: str, folder: Path, index: int = 0) -> Path:
    """A folder like the pinned commit of a method's repository."""
    repository = diff.read_record(method)["repositories"][index]
    texts: dict[str, list[str]] = {path: ["import argparse"] for path in repository["files"] if "*" not in path}
    texts |= {mark: ["import argparse"] for mark in repository["marks"] if Path(mark).suffix} | texts
    for pattern, lines in signatures(method, index).items():
        texts.setdefault(place(repository, pattern), []).append(define(lines))
    for file, options in flags(method, index).items():
        lines = [add_argument(name, fields) for name, fields in options.items()]
        head = ["def get_args_parser():", "    parser = argparse.ArgumentParser('name', add_help=False)"]
        texts.setdefault(file, []).append("\n".join([*head, *lines, "    return parser"]))
    if method == "udi":
        texts |= {file: [text] for file, text in UNPARSABLE.items()}
    if method == "a2mim":
        texts |= {file: [text] for file, text in configurations(index).items()}
    for path, parts in texts.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n\n\n".join(parts) + "\n")
    for mark in repository["marks"]:
        if not (folder / mark).exists():
            (folder / mark).mkdir(parents=True)
    return folder
