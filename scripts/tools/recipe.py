"""The recipes for small images, scripts/tools/recipes/<method>.json, and the stages that scripts/imagenette.sh runs.

Usage: python scripts/tools/recipe.py METHOD laptop|gpu OUT, which prints a line of shell for each stage.

A recipe names the flags of each stage: a value, a list of values, or true for a flag without value; `config` is one of
A2MIM's configuration files, and {out} the folder of the stages' folders. `as` takes over the flags of another stage.
`weights` says which file a stage leaves, with values of its flags in braces; `starts_from` says which flag of a stage
names the weights that it starts from.
"""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "a2mim" / "configs" / "openmixup"
MAINS = {"linear": "linprobe", "supervised": "finetune"}  # where a stage has another name than its main

Settings = dict[str, Any]  # numbers are text, as they are written in the file: 5e-4


def load(method: str, size: str) -> dict[str, Settings]:
    """The settings of each stage of a method's recipe, `laptop` or `gpu`, and its `weights` and `starts_from`."""
    text = (ROOT / "scripts" / "tools" / "recipes" / f"{method}.json").read_text("utf-8")
    recipe = json.loads(text, parse_float=str, parse_int=str)
    stages = recipe[size]
    for name, settings in stages.items():
        if "as" in settings:
            stages[name] = {**stages[settings.pop("as")], **settings}
    return {**stages, "weights": recipe["weights"], "starts_from": recipe["starts_from"]}


def flags(settings: Settings, out: str) -> list[str]:
    """The words of a command line."""
    words = []
    for name, value in settings.items():
        if name == "config":
            words.append(str(CONFIGS / value))
        elif value is True:
            words.append(f"--{name}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(text.replace("{out}", out) for text in values)]
    return words


def picture(method: str, encoder: str, images: list[str], out: str) -> list[str]:
    """The method's program that draws what a pre-trained encoder predicts or attends to, and its flags.

    The flags of A2MIM's and UDI's network are to be added.
    """
    files = ["--images", *images, "--output_dir", out]
    return {
        "saim": ["visualize_prediction", "--checkpoint", encoder, *files],
        "semaim": ["main_visualize", "--semantic", encoder, "--images", *images, "--output", f"{out}/orders.png"],
        "cae": ["main_visualize", "--checkpoint", encoder, *files],
        "a2mim": ["main_visualize", "--resume", encoder, *files],
        "udi": ["visualize_attention", "--pretrained_weights", encoder, "--output_dir", out, "--image_path", *images],
    }[method]


def stages(method: str, size: str, out: str) -> Iterator[list[str]]:
    """Words of imagenette.sh's functions: launch STAGE MAIN IMAGES_PER_UPDATE flags, neighbours STAGE SCRIPT flags."""
    recipe = load(method, size)
    starts = recipe["starts_from"]
    encoder, probed = (
        f"{out}/{folder}/{recipe['weights'][stage].format(**recipe[stage])}"
        for stage, folder in (("pretrain", "pretrain"), ("linear", "random_linear"))
    )

    def train(name: str, stage: str, *further: str) -> list[str]:
        main, settings = f"{method}/main_{MAINS.get(stage, stage)}.py", recipe[stage]
        return ["launch", name, main, settings["batch_size"], *flags(settings, out), *further]

    def neighbours(name: str, file: str) -> list[str]:
        if "knn" not in starts:
            return ["neighbours", name, "scripts/tools/knn.py", method, file, *flags(recipe["knn"], out)]
        files = [f"--{starts['knn']}", file, "--output_dir", f"{out}/{name}"]
        return ["neighbours", name, f"{method}/main_knn.py", *flags(recipe["knn"], out), *files]

    if "tokenizer" in recipe:
        yield train("tokenizer", "tokenizer")
    yield train("pretrain", "pretrain")
    for name, file in (("linear", encoder), ("random_linear", "")):
        yield train(name, "linear", f"--{starts['linear']}", file)
    yield neighbours("knn", encoder)
    yield neighbours("random_knn", "" if "knn" in starts else probed)  # UDI's probe keeps no encoder
    for stage, file in (("supervised", ""), ("finetune", encoder)):
        yield train(stage, stage, f"--{starts[stage]}", file)


if __name__ == "__main__":
    print("\n".join(shlex.join(words) for words in stages(*sys.argv[1:])))
