"""The scripts of the papers' rows: what they would launch, what they refuse, and two of them run at toy size."""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from a2mim import config, main_finetune, main_pretrain
from a2mim.files import run_files as a2mim_files
from a2mim.tools.model_converters import extract_backbone_weights
from cae.files import run_files as cae_files
from common import distributed
from semaim.files import run_files
from tests.cae import test_commands as cae
from tests.saim import test_commands as saim
from tests.semaim import test_commands as semaim
from tests.support.commands import flags, processes
from tests.support.helpers import ROOT
from tests.udi import test_commands as udi

Parser = Callable[[list[str]], argparse.Namespace]


class Method(NamedTuple):
    commands: dict[str, str]  # of the authors' README, by stage
    parsers: dict[str, Parser]
    files: Callable[[argparse.Namespace], distributed.Files]  # of a pre-training run
    mains: dict[str, str] = {}  # by stage, where main_<stage>.py is not its script
    nodes: int = 1  # on which the README runs its commands, where they do not tell


class Recipe(NamedTuple):
    """A row of A2MIM's README: its configurations' names and the accuracy."""

    pretrain: str
    finetune: str
    published: float


def parsers(by_stage: dict[str, argparse.ArgumentParser]) -> dict[str, Parser]:
    return {stage: parser.parse_args for stage, parser in by_stage.items()}


METHODS = {
    "saim": Method(saim.COMMANDS, parsers(saim.PARSERS), lambda args: distributed.Files()),
    "semaim": Method(semaim.COMMANDS, parsers(semaim.PARSERS), run_files),
    "cae": Method(
        cae.COMMANDS,
        parsers(cae.PARSERS),
        lambda args: cae_files(args, args.save_ckpt_freq),
        mains={"linear": "main_linprobe.py"},
        nodes=cae.NODES,
    ),
    "udi": Method(
        udi.COMMANDS,
        parsers(udi.PARSERS),
        lambda args: distributed.Files(),
        mains={
            "linear": "main_linprobe.py",
            "extract": "eval_finetuning/extract_backbone_weights_for_finetuning.py",
            "attention": "visualize_attention.py",
        },
    ),
}
A2MIM_PARSERS: dict[str, Parser] = {
    "pretrain": lambda argv: config.parse_args(main_pretrain.get_args_parser(), argv),
    "extract": lambda argv: extract_backbone_weights.get_args_parser().parse_args(argv),
    "finetune": lambda argv: config.parse_args(main_finetune.get_args_parser(), argv),
}
CONFIGS = ROOT / "a2mim" / "configs" / "openmixup"
VIT_S, VIT_B, VIT_L = (f"vit_{size}_p16_swin_ft_simmim_sz224" for size in ("small", "base", "large"))
VIT_B, VIT_L = f"{VIT_B}_4xb128_accu2_cos", f"{VIT_L}_8xb64_accu2_cos"
RSB_A2 = "rsb_a2_ft_sz224_8xb256_cos_fp16_ep300"  # each depth's own; the authors link r50's for all
SPARK = "spark_ft_sz224_8xb256_cos_fp16_ep300"
RECIPES = {
    "simmim_vit_small_800e": Recipe("vit_small_sz224_8xb256_step_fp16_ep800", f"{VIT_S}_8xb128_cos_ep100", 81.7),
    "a2mim_vit_small_800e": Recipe("vit_small_l0_sz224_8xb256_step_ep800", f"{VIT_S}_8xb128_cos_ep200", 82.1),
    "simmim_vit_base_800e": Recipe("vit_base_sz224_8xb128_accu2_step_fp16_ep800", f"{VIT_B}_ep100", 83.8),
    "a2mim_vit_base_800e": Recipe("vit_base_l0_sz224_8xb128_accu2_step_ep800", f"{VIT_B}_ep100", 84.3),
    "simmim_vit_large_800e": Recipe("vit_large_sz224_8xb128_accu2_step_fp16_ep800", f"{VIT_L}_ep100", 85.6),
    "a2mim_vit_large_800e": Recipe("vit_large_l0_sz224_8xb128_accu2_step_ep800", f"{VIT_L}_ep150", 86.1),
    "simmim_resnet50_300e": Recipe("r50_sz224_8xb256_fp16_ep300", f"r50_{RSB_A2}", 79.9),
    "a2mim_resnet50_100e": Recipe(
        "r50_l3_sz224_init_8xb256_cos_ep100", "r50_rsb_a3_ft_sz160_4xb512_cos_fp16_ep100", 78.8
    ),
    "a2mim_resnet50_300e": Recipe("r50_l3_sz224_init_8xb256_cos_ep300", f"r50_{RSB_A2}", 80.4),
    "simmim_resnet101_300e": Recipe("r101_sz224_8xb256_fp16_ep300", f"r101_{RSB_A2}", 81.3),
    "a2mim_resnet101_300e": Recipe("r101_l3_sz224_init_8xb256_cos_ep300", f"r101_{RSB_A2}", 81.9),
    "simmim_resnet152_300e": Recipe("r152_sz224_8xb256_fp16_ep300", f"r152_{RSB_A2}", 81.9),
    "a2mim_resnet152_300e": Recipe("r152_l3_sz224_init_8xb256_cos_ep300", f"r152_{RSB_A2}", 82.5),
    "simmim_resnet200_300e": Recipe("r200_sz224_8xb256_fp16_ep300", f"r200_{RSB_A2}", 82.2),
    "a2mim_resnet200_300e": Recipe("r200_l3_sz224_init_8xb256_cos_ep300", f"r200_{RSB_A2}", 83.0),
    "simmim_convnext_small_300e": Recipe("convnext_small_sz224_8xb256_fp16_ep300", f"convnext_s_{SPARK}", 83.2),
    "a2mim_convnext_small_300e": Recipe("convnext_s_l3_sz224_init_8xb256_cos_ep300", f"convnext_s_{SPARK}", 83.7),
    "simmim_convnext_base_300e": Recipe("convnext_base_sz224_8xb256_fp16_ep300", f"convnext_b_{SPARK}", 83.6),
    "a2mim_convnext_base_300e": Recipe("convnext_b_l3_sz224_init_8xb256_cos_ep300", f"convnext_b_{SPARK}", 84.1),
}
FINETUNE_IMAGES = {"vit": 1024, "resnet": 2048, "convnext": 4096}  # per update
LARGE = {"model": "vit_large_patch16"}
LARGE_FINETUNE = LARGE | {"epochs": 50, "blr": 1e-3, "layer_decay": 0.75, "warmup_epochs": 5}
BASE_KNN = {"model": "vit_base_patch16"}
# No effect, a name of the user's own, and a script that is run again shall go on.
CAE = {"sincos_pos_emb": False, "exp_name": "", "auto_resume": True}
CAE_LARGE = {"model": "cae_large_patch16_224", "layer_scale_init_value": 1e-5}
CAE_LARGE_DECODER = {"decoder_embed_dim": 1024, "decoder_num_heads": 16, "fix_init_weight": True}
CAE_LARGE_DECODER |= {"decoder_layer_scale_init_value": 1e-5}
CLIP = {"predict_feature": "clip", "teacher_path": "/path/to/ViT-B-16.pt"}
# By row and stage: what differs from the command of the method's README.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "saim_vit_base_300e": {"pretrain": {"epochs": 300}},
    "saim_vit_base_800e": {},
    # The model of one stream has no decoder, whatever its depth.
    "saim_vit_igpt_base_300e": {"pretrain": {"epochs": 300, "model": "vit_igpt_base"}},
    "semaim_vit_base_400e": {"pretrain": {"epochs": 400}, "knn": BASE_KNN},
    "semaim_vit_base_800e": {"knn": BASE_KNN},
    "semaim_vit_base_clip_800e": {"pretrain": CLIP, "knn": BASE_KNN},
    "semaim_vit_large_400e": {
        "pretrain": {"model": "aim_large", "epochs": 400},
        "finetune": LARGE_FINETUNE,
        "linprobe": LARGE,
    },
    "semaim_vit_large_800e": {"pretrain": {"model": "aim_large"}, "finetune": LARGE_FINETUNE, "linprobe": LARGE},
    "semaim_vit_large_clip_800e": {
        "pretrain": {"model": "aim_large"} | CLIP,
        "finetune": LARGE_FINETUNE,
        "linprobe": LARGE,
    },
    "cae_base_300e": {"pretrain": CAE | {"epochs": 300, "warmup_epochs": 10}},
    "cae_base_800e": {"pretrain": CAE},
    "cae_base_1600e": {"pretrain": CAE | {"epochs": 1600, "warmup_epochs": 40}},
    "cae_large_1600e": {
        "pretrain": CAE
        | CAE_LARGE
        | CAE_LARGE_DECODER
        | {"model": "cae_large_patch16_224_8k_vocab", "epochs": 1600, "warmup_epochs": 40},
        "linear": CAE_LARGE | {"save_freq": 90},
        "attentive": CAE_LARGE,
        # 32 GPUs x 64 x 2: on 32 GPUs, as in the README's command, two micro-steps make up for the smaller batch.
        "finetune": CAE_LARGE
        | {"epochs": 50, "lr": 2e-3, "layer_decay": 0.75, "drop_path": 0.2, "batch_size": 64, "update_freq": 2},
    },
    **{name: {} for name in RECIPES},
    "udi_vit_small_100e": {"pretrain": {"epochs": 100}},
    "udi_vit_small_300e": {},
}
ALONE = ("extract", "attention")  # stages of one process
PATHS = {"data_path", "output_dir", "log_dir", "experiment", "finetune", "pretrained_weights"}  # each user's own
PATHS |= {"discrete_vae_weight_path", "pretrained", "checkpoint", "output", "image_path"}
VARIABLES = ["GPUS", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "DATA", "OUT", "EXTRA"]
VARIABLES += ["TEACHER", "TOKENIZER", "IMAGE"]
VARIABLES += {f"EXTRA_{stage.upper()}" for method in METHODS.values() for stage in method.commands}


def family(name: str) -> str:
    """First word of a row's name: saim, semaim, cae, a2mim, simmim or udi."""
    return name.split("_")[0]


def folder_of(name: str) -> str:
    """Of the row's scripts: SimMIM's are A2MIM's."""
    return "a2mim" if name in RECIPES else family(name)


def launched(stage: str, configuration: Path) -> str:
    """The command of a configuration, on the GPUs that its name says."""
    gpus = re.findall(r"_(\d+)xb", configuration.name)[0]
    return f"python -m torch.distributed.launch --nproc_per_node {gpus} main_{stage}.py {configuration}"


def method_of(name: str) -> Method:
    """What the authors tell of a row's method; of A2MIM, the row's configurations."""
    if name not in RECIPES:
        return METHODS[family(name)]
    pretrain = CONFIGS / "pretrain" / family(name) / "imagenet" / f"{RECIPES[name].pretrain}.py"
    finetune = CONFIGS / "finetune" / "imagenet" / f"{RECIPES[name].finetune}.py"
    extract = "tools/model_converters/extract_backbone_weights.py"
    commands = {
        "pretrain": launched("pretrain", pretrain),
        "extract": f"python {extract} CHECKPOINT OUTPUT",
        "finetune": launched("finetune", finetune),
    }
    return Method(commands, A2MIM_PARSERS, lambda args: a2mim_files(args, 1), mains={"extract": extract})


def row(name: str, *arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a row script with `python` being this interpreter and nothing inherited of what the scripts read."""
    inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    script = ["bash", str(ROOT / "scripts" / f"{name}.sh")]
    return subprocess.run([*script, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def dry_run(name: str, *stages: str, **kwargs) -> dict[str, str]:
    """The printed commands by stage, their continued lines joined."""
    done = row(name, "--dry_run", *stages, **kwargs)
    assert (done.returncode, done.stderr) == (0, "")
    commands = done.stdout.replace("\\\n", " ").splitlines()
    names: dict[str, str] = {Path(main).stem: stage for stage, main in method_of(name).mains.items()}
    mains: list[str] = [re.findall(r"(\w+)\.py ", command)[0] for command in commands]
    stages_of = [names.get(main, main.removeprefix("main_")) for main in mains]
    return dict(zip(stages_of, commands, strict=True))


def parse(stage: str, command: str, name: str = "saim") -> argparse.Namespace:
    return method_of(name).parsers[stage](flags(command))


def images_per_update(args: argparse.Namespace, gpus: int) -> int | None:
    accum = getattr(args, "accum_iter", getattr(args, "update_freq", None))
    if accum is None:
        return None
    return (args.batch_size if "batch_size" in args else args.batch_size_per_gpu) * accum * gpus


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a script that ran nothing."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


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
            assert all(f" {value} " in head for value in entry["published"].values()), name
            assert set(entry["published"]) <= set(method_of(name).commands), name
            assert entry["ours"].keys() <= data["metrics"].keys()
            if name in RECIPES:
                assert entry["published"] == {"finetune": RECIPES[name].published}
    assert sorted(known) == sorted(ROWS)


@pytest.mark.parametrize(
    "name, gpus, nodes",
    [
        (name, *counts)
        for name in ROWS
        for counts in [(8, 1), (8, 4), (1, 1)] + [(32, 1), (64, 1), (8, 2)] * (name not in RECIPES)
    ],
)
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


@pytest.mark.parametrize("name", ROWS)
def test_flags__are_those_of_the_readme(name):
    for stage, official in method_of(name).commands.items():
        command = dry_run(name, stage, GPUS=str(processes(official) * method_of(name).nodes))[stage]
        found, expected = vars(parse(stage, command, name)), vars(parse(stage, official, name))
        own = {key: found[key] for key in PATHS & set(found)}
        assert found == expected | own | ROWS[name].get(stage, {})


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


def test_stages__are_selected_and_keep_their_order():
    for stages in (["finetune"], ["linprobe"], ["pretrain", "linprobe"]):
        assert list(dry_run("saim_vit_base_800e", *stages, GPUS="8")) == stages
    assert list(dry_run("saim_vit_base_800e", "linprobe", "finetune", GPUS="8")) == ["finetune", "linprobe"]


def test_gpus__default_to_the_devices_of_torch():
    assert dry_run("saim_vit_base_800e", "pretrain")["pretrain"].startswith("python saim/main_pretrain.py ")


def test_paths__are_quoted_and_independent_of_the_folder(tmp_path):
    names = {"DATA": "/my data/$HOME", "OUT": "it's here"}
    for cwd, script in ((tmp_path, f"{ROOT}/saim/main_finetune.py"), (ROOT / "saim", "main_finetune.py")):
        command = dry_run("saim_vit_base_800e", "finetune", cwd=cwd, GPUS="1", **names)["finetune"]
        assert shlex.split(command)[1] == script
        args = parse("finetune", command)
        assert (args.data_path, args.output_dir) == ("/my data/$HOME", "it's here/finetune")
        assert args.finetune == "it's here/pretrain/checkpoint.pth"
        # What a shell makes of the pasted text is what Python's shlex made of it.
        words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True).stdout
        assert words.splitlines() == shlex.split(command)
    args = parse("pretrain", dry_run("saim_vit_base_800e", "pretrain", cwd=tmp_path, GPUS="1")["pretrain"])
    assert args.output_dir == f"{ROOT}/runs/saim_vit_base_800e/pretrain"


def test_extra__comes_last_and_keeps_the_images_per_update():
    extra = {"EXTRA": "--num_workers 16 --compile", "EXTRA_PRETRAIN": "--num_workers 2\n--batch_size=16"}
    commands = dry_run("saim_vit_base_800e", GPUS="8", **extra)
    pretrain, finetune = (parse(stage, commands[stage]) for stage in ("pretrain", "finetune"))
    assert (pretrain.num_workers, pretrain.batch_size, pretrain.accum_iter) == (2, 16, 16)
    assert (finetune.num_workers, finetune.batch_size, finetune.accum_iter) == (16, 32, 4)
    assert pretrain.compile
    assert finetune.compile
    # An explicit --accum_iter is taken as it is.
    command = dry_run("saim_vit_base_800e", "linprobe", GPUS="3", EXTRA_LINPROBE="--accum_iter 5")["linprobe"]
    assert parse("linprobe", command).accum_iter == 5


def test_extra__may_use_other_names_of_a_flag():
    name = "a2mim_resnet50_300e"
    extra = {"EXTRA_PRETRAIN": "--batch_per_gpu=32", "EXTRA_FINETUNE": "--batch_size 64 --accum 3"}
    commands = dry_run(name, GPUS="8", **extra)
    pretrain, finetune = (parse(stage, commands[stage], name) for stage in ("pretrain", "finetune"))
    assert (pretrain.batch_size, pretrain.accum_iter) == (32, 8)
    assert (finetune.batch_size, finetune.accum_iter, finetune.ema_warmup_iters) == (64, 3, 3 * 12520)


def test_extra__of_an_evaluation_is_its_own():
    extra = {"EXTRA": "--compile", "EXTRA_KNN": "--temperature 0.1"}
    name = "semaim_vit_base_800e"
    commands = dry_run(name, "linprobe", "knn", GPUS="8", **extra)
    assert parse("linprobe", commands["linprobe"], name).compile
    assert "--compile" not in commands["knn"]
    assert commands["knn"].endswith("--temperature 0.1")


def test_more_gpus__get_a_smaller_batch():
    name = "semaim_vit_base_800e"
    args = [parse(*item, name) for item in dry_run(name, "pretrain", "finetune", "linprobe", GPUS="32").items()]
    assert [(a.batch_size, a.accum_iter) for a in args] == [(64, 1), (32, 1), (128, 1)]


def test_help__prints_both_headers():
    done = row("saim_vit_base_800e", "--help")
    assert done.returncode == 0
    assert "Published: 83.9 fine-tuned, 62.5 linear." in done.stdout
    assert "EXTRA_<STAGE>" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    "arguments, env, message",
    [
        (["--dry_run", "probe"], {}, "'probe' is neither --dry_run nor a stage (pretrain finetune linprobe)"),
        (["--dryrun"], {}, "'--dryrun' is neither"),
        ([], {}, "set DATA to the folder with train/ and val/: DATA=/imagenet bash "),
        ([], {"DATA": str(ROOT / "saim")}, f"DATA={ROOT}/saim: has no folder train/"),
        (["--dry_run"], {"GPUS": "0"}, "GPUS=0: expected a whole number of at least 1"),
        (["--dry_run"], {"NNODES": "two"}, "NNODES=two: expected a whole number of at least 1"),
        ([], {"NNODES": "4", "DATA": "data"}, "NNODES=4: on every node set NODE_RANK, 0 to 3, and MASTER_ADDR"),
        (
            ["--dry_run"],
            {"GPUS": "6"},
            "pretrain: 2048 images per update are no multiple of GPUS x NNODES x --batch_size = 6 x 1 x 64 = 384; "
            "GPUS that work: 1 2 4 8 16 32\n",
        ),
        (
            ["--dry_run"],
            {"GPUS": "64", "EXTRA_PRETRAIN": "--batch_size 64"},
            "= 64 x 1 x 64 = 4096; GPUS that work: 1 2 4 8 16 32\n",
        ),
        (["--dry_run"], {"NNODES": "3"}, "= 1 x 3 x 64 = 192; GPUS that work: none\n"),
        (["--dry_run", "linprobe"], {"EXTRA_LINPROBE": "--batch_size x"}, "linprobe: --batch_size x: expected a whole"),
        (["--dry_run", "linprobe"], {"EXTRA_LINPROBE": "--accum_iter=0"}, "linprobe: --accum_iter 0: expected a whole"),
        # A mistake in the last stage is told before the first one starts.
        ([], {"DATA": "data", "EXTRA_LINPROBE": "--batch_size 96"}, "linprobe: 2048 images per update are no multiple"),
    ],
)
def test_mistakes__are_one_line(tmp_path, arguments, env, message):
    (tmp_path / "data" / "train").mkdir(parents=True)
    done = row("saim_vit_base_800e", *arguments, cwd=tmp_path, **{"GPUS": "1", **env})
    assert message in refused(done)
    assert done.stderr.startswith("saim_vit_base_800e.sh: ")


@pytest.fixture
def fake(tmp_path) -> dict[str, Any]:
    """Arguments of `row` with which `python` only writes its arguments to the file calls; it exits with $STATUS."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@" >> calls\nexit ${STATUS:-0}\n')
    python.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    return {"cwd": tmp_path, "GPUS": "2", "DATA": "data", "OUT": "it's [here]", "PATH": path}


def calls(fake: dict[str, Any]) -> list[str]:
    path = fake["cwd"] / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "name, stage, encoder, flag",
    [
        ("saim_vit_base_800e", "linprobe", "pretrain/checkpoint.pth", "--finetune"),
        ("semaim_vit_base_800e", "finetune", "pretrain/aim_base.exp.temp.pth", "--finetune"),
        # The teacher is not asked for: pre-training alone reads it.
        ("semaim_vit_large_clip_800e", "knn", "pretrain/aim_large.exp.temp.pth", "--pretrained_weights"),
        ("simmim_resnet50_300e", "finetune", "extract/encoder.pth", "--pretrained"),
        ("udi_vit_small_300e", "knn", "pretrain/checkpoint.pth", "--pretrained_weights"),
        ("udi_vit_small_100e", "finetune", "extract/backbone.pth", "--finetune"),
    ],
)
def test_missing_encoder__is_one_line(fake, name, stage, encoder, flag):
    done = row(name, stage, **fake)
    expected = f"{stage}: it's [here]/{encoder} does not exist; run the stage {Path(encoder).parent} first, "
    expected += f'or set EXTRA_{stage.upper()}="{flag} FILE"\n'
    assert (done.returncode, done.stderr) == (2, f"{name}.sh: {expected}")
    assert not calls(fake)
    # One that the user names is the main's to check.
    assert row(name, stage, **{**fake, f"EXTRA_{stage.upper()}": f"{flag} other.pth"}).returncode == 0
    assert len(calls(fake)) == 1


@pytest.mark.parametrize(
    "name, checkpoint",
    [
        ("saim_vit_base_800e", "finetune/checkpoint.pth"),
        ("semaim_vit_base_800e", "finetune/vit_base_patch16.exp.temp.pth"),
        ("semaim_vit_base_800e", "linprobe/vit_base_patch16.exp.linear.pth"),
        ("a2mim_convnext_base_300e", "finetune/latest.pth"),
    ],
)
def test_encoder__is_not_needed_to_resume(fake, name, checkpoint):
    path = fake["cwd"] / fake["OUT"] / checkpoint
    path.parent.mkdir(parents=True)
    path.touch()
    done = row(name, path.parent.name, **fake)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(calls(fake)) == 1


def test_extract__runs_on_the_first_node(fake):
    """The other nodes, which share its files, go on to fine-tuning; that starts when the first node does."""
    fake |= {"NNODES": "2", "MASTER_ADDR": "node0"}
    name, stages = "a2mim_resnet101_300e", ("extract", "finetune")
    done = row(name, *stages, NODE_RANK="1", **fake)
    assert (done.returncode, done.stderr) == (0, "")
    assert ["--nnodes 2 --node_rank 1 " in call for call in calls(fake)] == [True]
    done = row(name, *stages, NODE_RANK="0", **fake)
    assert "finetune: it's [here]/extract/encoder.pth does not exist" in done.stderr  # this python makes none
    assert [Path(call.split()[0]).name for call in calls(fake)[1:]] == ["extract_backbone_weights.py"]


def test_teacher__is_told_by_its_variable(fake):
    done = row("semaim_vit_base_clip_800e", **fake)
    assert "pretrain: set TEACHER, see --help: TEACHER=/path/to/ViT-B-16.pt bash " in refused(done)
    assert not calls(fake)
    done = row("semaim_vit_base_clip_800e", "pretrain", TEACHER="my clip.pt", **fake)
    assert done.returncode == 0
    command = done.stdout.replace("\\\n", " ")
    assert parse("pretrain", command, "semaim").teacher_path == "my clip.pt"


def test_image__is_told_by_its_variable(fake):
    """Before the first stage starts; only the stage that draws it asks for it, on the first node alone."""
    done = row("udi_vit_small_300e", **fake)
    assert "attention: set IMAGE, see --help: IMAGE=/path/to/photo.jpg bash " in refused(done)
    assert not calls(fake)
    pretrained = fake["cwd"] / fake["OUT"] / "pretrain" / "checkpoint.pth"
    pretrained.parent.mkdir(parents=True)
    pretrained.touch()
    assert row("udi_vit_small_300e", "linear", **fake).returncode == 0
    nodes = {"NNODES": "2", "MASTER_ADDR": "node0", "IMAGE": "my photo.jpg"}
    for number in ("1", "0"):
        done = row("udi_vit_small_300e", "attention", NODE_RANK=number, **{**fake, **nodes})
        assert (done.returncode, done.stderr) == (0, "")
        assert len(calls(fake)) == 1 + (number == "0")
    args = parse("attention", done.stdout.replace("\\\n", " "), "udi")
    assert (args.image_path, args.output_dir) == ("my photo.jpg", f"{fake['OUT']}/attention")


def test_failed_stage__stops_the_script(fake):
    done = row("saim_vit_base_800e", STATUS="3", **fake)
    assert done.returncode == 3
    # What ran is what the dry run shows.
    shown = dry_run("saim_vit_base_800e", "pretrain", **fake)["pretrain"]
    assert [f"python {call}".split() for call in calls(fake)] == [" ".join(shlex.split(shown)).split()]


def test_signal_for_all_processes__lets_the_run_save(fake):
    saves = "trap 'sleep 0.5; echo $PET_SIGNALS_TO_HANDLE >saved; exit 138' USR1"
    (fake["cwd"] / "bin" / "python").write_text(f"#!/bin/sh\n{saves}\n>started\nwhile :; do sleep 0.05; done\n")
    script = ["bash", str(ROOT / "scripts" / "saim_vit_base_800e.sh"), "pretrain"]
    env = {**os.environ, **{k: v for k, v in fake.items() if k != "cwd"}}
    process = subprocess.Popen(script, cwd=fake["cwd"], env=env, start_new_session=True)
    while not (fake["cwd"] / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.wait(timeout=60) == 138
    assert "SIGUSR1" in (fake["cwd"] / "saved").read_text()


def test_row__runs_and_resumes_at_toy_size(tmp_path, digits):
    (tmp_path / "images of digits").symlink_to(digits)
    toy = "--input_size 16 --patch_size 8 --batch_size 8 --accum_iter 1 --epochs 1 --warmup_epochs 0 --num_workers 0"
    env = {
        "GPUS": "1",
        "DATA": "images of digits",
        "OUT": "out",
        "EXTRA": toy,
        "EXTRA_PRETRAIN": "--model saim_nano --query_depth 1",
        "EXTRA_FINETUNE": "--model vit_nano_patch16 --nb_classes 10",
        "EXTRA_LINPROBE": "--model vit_nano_patch16 --nb_classes 10",
    }
    done = row("saim_vit_base_300e", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in saim.COMMANDS:
        lines = (tmp_path / "out" / stage / "log.txt").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [0]
    again = row("saim_vit_base_300e", "finetune", cwd=tmp_path, **env)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len((tmp_path / "out" / "finetune" / "log.txt").read_text().splitlines()) == 1


@pytest.mark.slow
def test_udi__runs_at_toy_size_and_returns_at_once(tmp_path, digits):
    """All stages; a second run adds nothing."""
    common = "--epochs 1 --warmup_epochs 0 --batch_size 8 --accum_iter 1 --num_workers 0"
    env = {
        "GPUS": "1",
        "DATA": digits,
        "OUT": "out",
        "IMAGE": str(min(Path(digits).glob("val/*/*.png"))),
        "EXTRA_PRETRAIN": f"{common} --arch vit_nano{udi.VIEWS}",
        "EXTRA_KNN": "--arch vit_nano --input_size 64 --nb_classes 10 --nb_knn 10 --num_workers 0",
        "EXTRA_LINEAR": "--epochs 1 --batch_size 8 --accum_iter 1 --num_workers 0 --arch vit_nano --input_size 64"
        " --num_labels 10",
        "EXTRA_FINETUNE": f"{common} --model vit_nano --input_size 64 --nb_classes 10",
    }
    stages = ["pretrain", "knn", "linear", "extract", "finetune"]  # attention has no EXTRA_..., and vit_small's name
    done = row("udi_vit_small_100e", *stages, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("pretrain", "linear", "finetune"):
        lines = (tmp_path / "out" / stage / "log.txt").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [0]
    assert (tmp_path / "out" / "extract" / "backbone.pth").is_file()
    assert "10-NN classifier result" in done.stdout
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*.pth") if path.parent.name != "extract"}
    again = row("udi_vit_small_100e", *stages, cwd=tmp_path, **env)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in files} == files


@pytest.fixture(scope="module")
def toy_simmim(tmp_path_factory, digits) -> Callable[[], Path]:
    """Run SimMIM's row of ResNet-50 at toy size; the folder of its stages."""
    folder = tmp_path_factory.mktemp("simmim")
    toy = "--backbone resnet_nano --input_size 64 --batch_size 8 --accum_iter 1 --epochs 1 --warmup_epochs 0"
    toy += " --num_workers 0"
    env = {"GPUS": "1", "DATA": digits, "OUT": "out", "EXTRA_PRETRAIN": toy}
    env["EXTRA_FINETUNE"] = f"{toy} --val_resize 64 --val_crop 64 --nb_classes 10"

    def run() -> Path:
        done = row("simmim_resnet50_300e", cwd=folder, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        for stage in ("pretrain", "finetune"):
            lines = (folder / "out" / stage / "log.txt").read_text().splitlines()
            assert [json.loads(line)["epoch"] for line in lines] == [1]
        return folder / "out"

    return run


@pytest.mark.slow
def test_extracted_encoder__is_fine_tuned(toy_simmim):
    out = toy_simmim()
    names = ("pretrain/latest.pth", "extract/encoder.pth", "finetune/latest.pth")
    trained, encoder, tuned = (distributed.load(str(out / name))["state_dict"] for name in names)
    expected = {key.removeprefix("backbone."): value for key, value in trained.items() if key.startswith("backbone.")}
    assert encoder.keys() == expected.keys()
    for key, value in encoder.items():
        assert value.equal(expected[key]), key
    # Six updates move the weights, but not far from where they start.
    start, end = encoder["conv1.weight"], tuned["backbone.conv1.weight"]
    assert 0 < (end - start).norm() < 0.2 * start.norm()


@pytest.mark.slow
def test_complete_row__returns_at_once(toy_simmim):
    out = toy_simmim()
    files = {path: path.stat().st_mtime_ns for path in out.glob("*/*.pth") if path.parent.name != "extract"}
    assert len(files) >= 4
    toy_simmim()
    assert {path: path.stat().st_mtime_ns for path in files} == files


@pytest.mark.parametrize("path", [*(f"{name}.sh" for name in ROWS), "lib/row.sh"])
def test_syntax(path):
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / path)]).returncode == 0
