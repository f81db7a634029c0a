"""Imagenette's recipes: what they would launch, what they refuse, and the table of their results."""

import importlib
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from scripts.tools import imagenette_table
from tests.support.commands import flags
from tests.support.helpers import ROOT
from tests.support.rows import refused, row
from tests.support.runs import arguments, mistake

METHODS = ("saim", "semaim", "cae", "a2mim", "udi")
STAGES = ["pretrain", "linear", "random_linear", "knn", "random_knn", "supervised", "finetune"]
LATEST = {"a2mim": "latest.pth", "semaim": r"aim_(small|nano)\.exp\.temp\.pth"}
ENCODER = ("finetune", "pretrained", "pretrained_weights", "checkpoint")  # flags by which a stage takes its encoder


@pytest.fixture(scope="module")
def commands() -> Any:
    """Stages by name, of a method at one of both sizes: the script's module and its parsed command line. The commands
    must be those on record."""
    known: dict[tuple[str, str], dict[str, tuple[ModuleType, Any]]] = {}

    def get(method: str, size: str) -> dict[str, tuple[ModuleType, Any]]:
        if (method, size) not in known:
            done = row("imagenette", method, *size.split(), "--dry_run", GPUS="1", OUT="out", DATA="/imagenette")
            assert (done.returncode, done.stderr) == (0, "")
            lines = plain(done.stdout)
            assert lines == recorded(method, size)
            names = ["tokenizer", *STAGES] if method == "cae" else STAGES
            known[method, size] = dict(zip(names, map(parse, lines), strict=True))
        return known[method, size]

    return get


def plain(commands: str) -> list[str]:
    """A command per line, with single spaces and paths in the repository."""
    lines = commands.replace("\\\n", " ").replace(f"{ROOT}/", "").splitlines()
    return [" ".join(line.split()) for line in lines]


def recorded(method: str, size: str) -> list[str]:
    """The commands of a recipe that results were measured with."""
    text = (ROOT / "tests" / "scripts" / "imagenette_commands.txt").read_text()
    sections = dict(section.split("\n", 1) for section in text.removeprefix("# ").split("\n# "))
    return sections[f"{method} {size}".strip()].splitlines()


def parse(command: str) -> tuple[ModuleType, Any]:
    script = command.split()[1].removesuffix(".py").replace("/", ".")
    module = importlib.import_module(script)
    return module, arguments(module, *flags(command))


def encoder_of(args: Any) -> str:
    return next(getattr(args, flag) for flag in ENCODER if flag in args)


def differing(a: Any, b: Any) -> set[str]:
    return {key for key in vars(a) if vars(a)[key] != vars(b)[key]}


both = [pytest.mark.parametrize("size", ["", "--tiny"]), pytest.mark.parametrize("method", METHODS)]


def all_recipes(test):
    for mark in both:
        test = mark(test)
    return test


@all_recipes
def test_stages_belong_together(commands, method, size):
    """Equal budgets and networks; the encoders are the pre-trained one, or none."""
    args = {stage: args for stage, (_, args) in commands(method, size).items()}
    encoder = encoder_of(args["linear"])
    assert re.fullmatch(f"out/pretrain/{LATEST.get(method, 'checkpoint.pth')}", encoder)
    assert [encoder_of(args[stage]) for stage in ("knn", "finetune", "random_linear", "supervised")] == [
        *[encoder] * 2,
        *[""] * 2,
    ]
    probed = "" if method == "udi" else "out/random_linear/"
    assert encoder_of(args["random_knn"]).startswith(probed)
    assert args["pretrain"].epochs == args["supervised"].epochs == args["finetune"].epochs
    own = {"output_dir", *ENCODER, "layer_decay"}
    for a, b in (("linear", "random_linear"), ("supervised", "finetune")):
        assert differing(args[a], args[b]) <= own
    for stage, values in args.items():
        assert values.data_path == "/imagenette"
        if not stage.endswith("knn"):
            assert values.output_dir == f"out/{stage}"
    assert {args["knn"].nb_knn[0], args["random_knn"].nb_knn[0]} == {20}


@all_recipes
def test_networks_can_be_built(commands, method, size):
    """The trained network has every tensor of the encoder that a probe or fine-tuning looks for, in its shape."""
    stages = commands(method, size)
    with torch.device("meta"):
        (pretrain, flags_of_pretrain), (finetune, flags_of_finetune) = stages["pretrain"], stages["finetune"]
        pretrained = pretrain.build_model(flags_of_pretrain)
        classifier = finetune.build_model(flags_of_finetune)
    shapes = {tuple(p.shape) for p in pretrained.parameters()}
    wide = [p for name, p in classifier.named_parameters() if p.ndim > 1 and "relative" not in name]
    missing = [tuple(p.shape) for p in wide if tuple(p.shape) not in shapes]
    heads = [shape for shape in missing if shape[0] == 10]
    assert len(heads) == 1
    others = {shape for shape in missing if shape[0] != 10}
    assert others <= ({(1, 1, classifier.pos_embed.shape[-1])} if method == "udi" else set()) | positions(classifier)


def positions(classifier: Any) -> set[tuple[int, ...]]:
    """Tables of positions are resized where the image sizes differ."""
    table = getattr(classifier, "pos_embed", None)
    return set() if table is None else {tuple(table.shape)}


@pytest.mark.parametrize("size", ["", "--tiny"])
def test_tokenizer_fits_its_model(commands, size):
    (_, tokenizer), (main, pretrain) = (commands("cae", size)[stage] for stage in ("tokenizer", "pretrain"))
    assert tokenizer.num_tokens == pretrain.decoder_num_classes
    assert tokenizer.input_size == pretrain.second_input_size
    assert tokenizer.input_size / 2**tokenizer.num_layers == main.grid_of(pretrain)
    assert pretrain.discrete_vae_weight_path == "out/tokenizer/checkpoint.pth"
    assert pretrain.num_mask_patches == main.grid_of(pretrain) ** 2 / 2


@pytest.mark.parametrize(
    "words, text",
    [
        ([], "name one method"),
        (["--tiny"], "name one method"),
        (["saim", "udi"], "name one method"),
        (["mae"], "name one method"),
        (["saim", "tokenizer"], "'tokenizer' is neither --dry_run nor a stage (pretrain linear"),
        (["saim"], "set DATA to the folder"),
    ],
)
def test_mistakes_are_one_line(words, text):
    assert text in refused(row("imagenette", *words, GPUS="1"))


@pytest.fixture
def results(tmp_path) -> Path:
    """Stages of a run that is not complete."""
    for stage, accuracy, seconds in (("pretrain", None, 600), ("linear", 47.8, 100), ("random_linear", 29.3, 90)):
        folder = tmp_path / stage
        folder.mkdir()
        line = {"train_loss": 1.0, "epoch": 0} | ({} if accuracy is None else {"test_acc1": accuracy})
        (folder / "log.txt").write_text(json.dumps(line) + "\n")
        starts = [{"seconds": seconds / 2, "command": "python main.py --epochs 1", "processes": 1}] * 2
        (folder / "run.json").write_text(json.dumps({"starts": starts}))
    (tmp_path / "knn").mkdir()
    (tmp_path / "knn" / "knn.json").write_text('{"knn20": 36.25, "seconds": 20}')
    return tmp_path


def test_table(results):
    table = imagenette_table.read(results)
    assert table == {
        "random weights": {"linear": 29.3, "seconds": 90},
        "pre-trained": {"linear": 47.8, "k-NN": 36.25, "seconds": 720},
    }
    lines = [line.split() for line in imagenette_table.text(table).splitlines()]
    assert lines[1] == ["random", "weights", "-", "29.3", "-", "90"]
    assert lines[2] == ["pre-trained", "36.2", "47.8", "-", "720"]
    assert lines[3] == ["supervised", "-", "-", "-", "-"]


def test_table__leaves_out_what_is_not_finished(results):
    run = json.loads((results / "linear" / "run.json").read_text())
    run["starts"][-1]["command"] = "python main.py --epochs 2"
    (results / "linear" / "run.json").write_text(json.dumps(run))
    assert imagenette_table.read(results)["pre-trained"] == {"k-NN": 36.25, "seconds": 620}


def test_table__of_another_folder(tmp_path, capsys):
    assert "holds no finished stage" in mistake(imagenette_table, str(tmp_path), capsys=capsys)


def test_syntax():
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / "imagenette.sh")]).returncode == 0


def test_readme__shows_what_was_measured():
    readme = (ROOT / "README.md").read_text()
    assert ("scripts/imagenette.sh" in readme) == (imagenette_table.measured() in readme)
