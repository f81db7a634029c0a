"""The scripts of the papers' rows: every flag is the authors', on every number of GPUs."""

import json
import re
import shlex
from pathlib import Path

import pytest

from a2mim import main_detection as a2mim_detection
from cae import main_detection as cae_detection
from cae import main_segmentation as cae_segmentation
from tests.support.commands import flags, processes
from tests.support.helpers import ROOT
from tests.support.rows import (
    ALONE,
    FINETUNE_IMAGES,
    METHODS,
    PATHS,
    RECIPES,
    ROWS,
    dry_run,
    family,
    folder_of,
    images_per_update,
    method_of,
    parse,
)
from udi import main_detection, main_segmentation, main_video_segmentation


def test_rows__are_all_tested():
    families = [*METHODS, "a2mim", "simmim"]
    scripts = {path.stem for name in families for path in (ROOT / "scripts").glob(f"{name}_*.sh")}
    assert scripts == set(ROWS)


def test_published_numbers__are_those_of_the_scripts():
    """rows.json knows every script, and the numbers that its first lines tell."""
    known = []
    tables = json.loads((ROOT / "scripts" / "tools" / "rows.json").read_text())
    for method, data in tables.items():
        for entry in data["rows"]:
            name = Path(entry["script"]).stem
            known.append(name)
            assert (folder_of(name), entry["script"]) == (method, f"scripts/{name}.sh")
            head = (ROOT / entry["script"]).read_text().split("set -euo")[0]
            assert entry["published"].keys() <= data["metrics"].keys()
            assert all(f" {value} " in head for value in entry["published"].values() if value != "unknown"), name
            dense = {"segmentation", "detection", "mask", "video"}
            assert set(entry["published"]) - dense <= set(method_of(name).commands), name
            assert entry["ours"].keys() <= data["metrics"].keys()
            if name in RECIPES:
                assert {k: v for k, v in entry["published"].items() if k not in dense} == {
                    "finetune": RECIPES[name].published
                }
    assert sorted(known) == sorted(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_flags__are_those_of_the_readme(name):
    readme = method_of(name).commands
    gpus = {stage: str(processes(official) * method_of(name).nodes) for stage, official in readme.items()}
    commands: dict[str, str] = {}
    for count in set(gpus.values()):
        commands |= dry_run(name, *(stage for stage in readme if gpus[stage] == count), GPUS=count)
    assert commands.keys() == readme.keys()
    for stage, official in readme.items():
        found, expected = vars(parse(stage, commands[stage], name)), vars(parse(stage, official, name))
        own = {key: found[key] for key in PATHS & set(found)}
        assert found == expected | own | ROWS[name].get(stage, {})


@pytest.mark.parametrize("name", [name for name in ROWS if family(name) == "cae"])
def test_segmentation__is_the_row_of_the_authors_configuration(name):
    size, epochs = re.findall(r"cae_(\w+)_(\d+)e", name)[0]
    parser = cae_segmentation.get_args_parser()
    for gpus, batch in ((8, (2, 1)), (1, (2, 8)), (16, (1, 1))):
        command = dry_run(name, "segmentation", GPUS=str(gpus), OUT="out", ADE20K="/ade20k")["segmentation"]
        args = parser.parse_args(flags(command))
        assert (args.batch_size, args.accum_iter) == batch
    expected = vars(parser.parse_args(cae_segmentation.ROWS[size, int(epochs)].split()))
    own = {"data_path": "/ade20k", "output_dir": "out/segmentation", "finetune": "out/pretrain/checkpoint.pth"}
    assert vars(args) == expected | own | {"batch_size": 1, "input_size": 512}


@pytest.mark.parametrize("name", [name for name in ROWS if family(name) == "cae"])
def test_detection__is_the_row_of_the_authors_configuration(name):
    size, epochs = re.findall(r"cae_(\w+)_(\d+)e", name)[0]
    parser = cae_detection.get_args_parser()
    command = dry_run(name, "detection", GPUS="8", OUT="out", COCO="/coco")["detection"]
    expected = vars(parser.parse_args(cae_detection.ROWS[size, int(epochs)].split()))
    own = {"data_path": "/coco", "output_dir": "out/detection", "finetune": "out/pretrain/checkpoint.pth"}
    assert vars(parser.parse_args(flags(command))) == expected | own | {"accum_iter": 2}  # of 16 GPUs


@pytest.mark.parametrize("name", RECIPES)
def test_configurations__are_those_of_the_row(name):
    """Network, epochs, images per update and the script's first lines agree."""
    commands, (_, *model, epochs) = method_of(name).commands, name.split("_")
    pretrain, finetune = (parse(stage, commands[stage], name) for stage in ("pretrain", "finetune"))
    assert (pretrain.method, finetune.method) == (family(name), "finetune")
    assert pretrain.backbone == finetune.backbone == "_".join(model)
    assert epochs == f"{pretrain.epochs}e"
    images = FINETUNE_IMAGES[model[0].rstrip("0123456789")]
    assert images_per_update(pretrain, processes(commands["pretrain"])) == 2048
    assert images_per_update(finetune, processes(commands["finetune"])) == images
    title, told = (ROOT / "scripts" / f"{name}.sh").read_text().splitlines()[1:3]
    assert re.findall(r"Published: (\S+) ", title) == [str(RECIPES[name].published)]
    assert re.findall(r"(\d+) epochs", title) == [str(pretrain.epochs), str(finetune.epochs)]
    assert told.startswith(f"# Images per update: 2048 in pre-training, {images} in fine-tuning;")


@pytest.mark.parametrize("name", RECIPES)
def test_average__counts_updates(name):
    """A configuration's average of the weights counts micro-steps, whose number per update depends on GPUS."""
    official = parse("finetune", method_of(name).commands["finetune"], name)
    for gpus in ("1", "8", "16") if official.ema else ():
        args = parse("finetune", dry_run(name, "finetune", GPUS=gpus)["finetune"], name)
        assert args.ema_warmup_iters / args.accum_iter == official.ema_warmup_iters / official.accum_iter
        assert args.ema_update_interval in (1, args.accum_iter)  # each update moves it, nothing else does


# Every number of GPUs in one row of each method; the others' scripts, which differ in flags alone, take one.
FIRST = {folder_of(name): name for name in ROWS}.values()
COUNTS = [
    pytest.param(name, *counts, marks=[] if name in FIRST or counts == (8, 4) else pytest.mark.slow)
    for name in ROWS
    for counts in [(8, 4), (8, 1), (1, 1)] + [(32, 1), (64, 1), (8, 2)] * (name not in RECIPES)
]


@pytest.mark.parametrize("name, gpus, nodes", COUNTS)
def test_dry_run__keeps_the_images_per_update(name, gpus, nodes):
    commands = dry_run(name, GPUS=str(gpus), NNODES=str(nodes), NODE_RANK="0", MASTER_ADDR="node0", DATA="/imagenet")
    method = method_of(name)
    readme = method.commands
    assert list(commands) == list(readme)
    for stage, command in commands.items():
        launcher = f"-m torch.distributed.launch --nproc_per_node {gpus} --nnodes {nodes} --node_rank 0 "
        launcher += "--master_addr node0 --master_port 29500"
        main = f"{folder_of(name)}/{method.mains.get(stage, f'main_{stage}.py')}"
        expected = f"python {launcher if gpus * nodes > 1 and stage not in ALONE else ''} {main}".split()
        assert shlex.split(command)[: len(expected)] == expected
        args, official = parse(stage, command, name), parse(stage, readme[stage], name)
        processes_of_readme = processes(readme[stage]) * method.nodes
        assert images_per_update(args, gpus * nodes) == images_per_update(official, processes_of_readme)
        assert getattr(args, "data_path", "/imagenet") == "/imagenet"
        own = f"runs/{name}/{stage}"
        beside = "" if (family(name), stage) == ("udi", "knn") else own  # the weights
        assert getattr(args, "output_dir", own) == beside
        assert getattr(args, "log_dir", own) in (own, None, "./test_exp/")  # the others: with the checkpoints


@pytest.mark.parametrize("name", ROWS)
def test_later_stages__take_the_checkpoint_of_pre_training(name):
    args = {stage: parse(stage, command, name) for stage, command in dry_run(name, GPUS="8", OUT="out").items()}
    encoder = f"out/pretrain/{method_of(name).files(args.pop('pretrain')).latest}"
    assert len(args) >= 2
    extracted = encoder
    if "extract" in args:
        extract = args.pop("extract")
        extracted = f"out/extract/{'backbone' if family(name) == 'udi' else 'encoder'}.pth"
        assert (extract.checkpoint, extract.output) == (encoder, extracted)
    for stage, later in args.items():
        flag = next(flag for flag in ("finetune", "pretrained", "pretrained_weights") if flag in later)
        assert getattr(later, flag) == (extracted if stage == "finetune" else encoder)


@pytest.mark.parametrize("name", [name for name in ROWS if family(name) == "udi"])
def test_udi__dense_stages_are_the_programs_defaults(name):
    """On 4 processes, which the authors' configuration is for."""
    folders = {"ADE20K": "/ade", "DAVIS": "/davis", "OUT": "out"}
    commands = dry_run(name, "segmentation", "video", GPUS="4", **folders)
    for main, stage, data in (main_segmentation, "segmentation", "/ade"), (main_video_segmentation, "video", "/davis"):
        parser = main.get_args_parser()
        own = {"data_path": data, "output_dir": f"out/{stage}", "pretrained_weights": "out/pretrain/checkpoint.pth"}
        assert vars(parser.parse_args(flags(commands[stage]))) == vars(parser.parse_args([])) | own


@pytest.mark.parametrize("name", [name for name in ROWS if family(name) == "udi"])
def test_udi__detection_is_the_programs_default(name):
    (command,) = dry_run(name, "detection", GPUS="8", COCO="/coco", OUT="out").values()
    parser = main_detection.get_args_parser()
    own = {"data_path": "/coco", "output_dir": "out/detection", "pretrained_weights": "out/pretrain/checkpoint.pth"}
    assert vars(parser.parse_args(flags(command))) == vars(parser.parse_args([])) | own


@pytest.mark.parametrize(("name", "recipe"), [("a2mim_vit_base_800e", "vit_1x"), ("a2mim_resnet50_300e", "r50_c4_2x")])
def test_a2mim__detection_is_a_recipe(name, recipe):
    (command,) = dry_run(name, "detection", GPUS="8", COCO="/coco", OUT="out").values()
    parse = a2mim_detection.parse_args
    own = {"data_path": "/coco", "output_dir": "out/detection", "pretrained": "out/extract/encoder.pth"}
    assert vars(parse(flags(command))) == vars(parse(["--recipe", recipe])) | own
