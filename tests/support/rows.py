"""The papers' rows: the authors' commands and configurations that they must agree with, and their scripts' start."""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from a2mim import config, main_finetune, main_pretrain
from a2mim.files import run_files as a2mim_files
from a2mim.tools.model_converters import extract_backbone_weights
from cae.files import run_files as cae_files
from common import distributed
from semaim.files import run_files
from tests.cae import test_commands as cae
from tests.saim import test_commands as saim
from tests.semaim import test_commands as semaim
from tests.support import processes
from tests.support.commands import flags
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
            "video": "main_video_segmentation.py",
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
VARIABLES += ["TEACHER", "TOKENIZER", "IMAGE", "ADE20K", "COCO", "DAVIS"]
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


def row(name: str | Path, *arguments: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a row script, or another by its path without .sh, with `python` being this interpreter and nothing inherited
    of what the scripts read."""
    inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    script = ["bash", str(ROOT / "scripts" / f"{name}.sh")]
    return subprocess.run([*script, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def forked_python(log: Path) -> Iterator[dict[str, str]]:
    """Environment in which a row's `python` asks this process to fork the script, which takes no seconds to start.

    log: file that gets what the scripts print.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answered, python = (Path(folder) / name for name in ("asked", "answered", "python"))
        os.mkfifo(asked)
        os.mkfifo(answered)
        ask = f'printf "%s\\n" "$ROW_SCRIPT" "$PWD" "$@" >{asked}'
        python.write_text(f'#!/bin/sh\n{ask}\nread -r status <{answered}\nexit "$status"\n')
        python.chmod(0o755)

        def serve() -> None:
            while words := asked.read_text().splitlines():
                script, cwd, *argv = words
                status = 1
                with contextlib.suppress(AssertionError):  # the row fails, and the log says why
                    (status,) = processes.launch(log, *argv, cwd=Path(cwd), ROW_SCRIPT=script)
                answered.write_text(f"{status}\n")

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        try:
            yield {"PATH": f"{folder}:{os.environ['PATH']}"}
        finally:
            asked.write_text("")
            server.join()


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
