"""The commands of the authors' README, run to the letter inside saim/ with toy sizes appended; evaluation; -m."""

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from saim import main_finetune, main_linprobe, main_pretrain
from tests.helpers import ROOT

README = r"""
python -m torch.distributed.launch --nproc_per_node 32 main_pretrain.py \
    --batch_size 64 --epochs 800 \
    --model saim_base --query_depth 12 --prediction_head_type MLP \
    --gaussian_kernel_size 9 --gaussian_sigma 1 --norm_pix_loss \
    --blr 2e-4 --warmup_epochs 30 --weight_decay 0.5 \
    --data_path <imagenet-path> --output_dir <output-directory>

python -m torch.distributed.launch --nproc_per_node 32 main_finetune.py \
    --model vit_base_patch16 --cls_token --batch_size 32 \
    --blr 5e-4 --layer_decay 0.65 --epochs 100 --warmup_epochs 20 \
    --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 \
    --dist_eval --data_path <imagenet-path> \
    --finetune <pretrained-ckpt> --output_dir <output-directory>

python -m torch.distributed.launch --nproc_per_node 32 main_linprobe.py \
    --model vit_base_patch16 --cls_token --batch_size 64 \
    --blr 0.1 --epochs 90 --warmup_epochs 0 --weight_decay 0.0 \
    --dist_eval --data_path <imagenet-path> \
    --finetune <pretrained-ckpt> --output_dir <output-directory>
"""
COMMANDS: dict[str, str] = dict(zip(("pretrain", "finetune", "linprobe"), README.strip().split("\n\n"), strict=True))
PARSERS: dict[str, argparse.ArgumentParser] = {
    "pretrain": main_pretrain.get_args_parser(),
    "finetune": main_finetune.get_args_parser(),
    "linprobe": main_linprobe.get_args_parser(),
}
TOY = " --input_size 16 --patch_size 8 --batch_size 6 --num_workers 0 --warmup_epochs 0"
TOYS = {
    "pretrain": TOY + " --model saim_nano --query_depth 1 --epochs 1",
    "finetune": TOY + " --model vit_nano_patch16 --nb_classes 10 --epochs 2 --blr 5e-2",
    "linprobe": TOY + " --model vit_nano_patch16 --nb_classes 10 --epochs 2",
}


def flags(command: str) -> list[str]:
    """The words after the script of a shell line."""
    return shlex.split(command.replace("\\\n", " ").split(".py ", 1)[1])


def start(command: str, cwd: Path) -> subprocess.Popen:
    """A shell line, `python` being this interpreter; the port comes as the launcher's own environment variable."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PET_MASTER_PORT": port}
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", "-c", command], cwd=cwd, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    try:
        out = process.communicate(timeout=240)[0]
    finally:
        process.kill()
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def commands(tmp_path_factory, digits) -> dict[str, str]:
    """The README commands on 2 processes with their placeholders filled, by stage; outputs go to <folder>/<stage>."""
    folder = tmp_path_factory.mktemp("commands")
    images = folder / "images"
    shutil.copytree(digits, images)
    next(images.glob("val/9/*.png")).unlink()  # 19 validation images: neither 2 processes nor batches of 6 divide them
    filled = {}
    for stage, command in COMMANDS.items():
        command = command.replace("--nproc_per_node 32", "--nproc_per_node 2").replace("<imagenet-path>", str(images))
        command = command.replace("<pretrained-ckpt>", f"{folder}/pretrain/checkpoint.pth")
        filled[stage] = command.replace("<output-directory>", f"{folder}/{stage}") + TOYS[stage]
    return filled


@pytest.fixture(scope="module")
def runs(commands) -> dict[str, Path]:
    """Folders of the three finished runs."""
    finish(start(commands["pretrain"], ROOT / "saim"))
    for process in [start(commands[stage], ROOT / "saim") for stage in ("finetune", "linprobe")]:
        finish(process)
    parsed = {stage: PARSERS[stage].parse_args(flags(command)) for stage, command in commands.items()}
    return {stage: Path(args.output_dir) for stage, args in parsed.items()}


def last_line(folder: Path) -> dict[str, float]:
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


@pytest.mark.parametrize("stage, lr", [("pretrain", 1.6e-3), ("finetune", 2e-3), ("linprobe", 0.8)])
def test_readme_commands__give_the_papers_learning_rates(stage, lr):
    args = PARSERS[stage].parse_args(flags(COMMANDS[stage]))
    assert args.blr * args.batch_size * 32 / 256 == pytest.approx(lr)


def test_readme_commands__run_inside_the_method_folder(runs):
    assert list(last_line(runs["pretrain"])) == ["train_lr", "train_loss", "train_total_norm", "epoch"]
    for stage in ("finetune", "linprobe"):
        line = last_line(runs[stage])
        assert list(line)[:5] == ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5"]
        assert line["epoch"] == 1
    assert all((folder / "checkpoint.pth").is_file() for folder in runs.values())


@pytest.mark.parametrize("stage, alone", [("finetune", "saim/main_finetune.py"), ("linprobe", "-m saim.main_linprobe")])
def test_eval__counts_every_image_once_on_any_number_of_processes(commands, runs, stage, alone):
    evaluate = f" --eval --resume {runs[stage]}/checkpoint.pth"
    single = f"python {alone} " + shlex.join(flags(commands[stage])) + evaluate
    processes = [start(single, ROOT), start(commands[stage] + evaluate, ROOT / "saim")]
    trained = last_line(runs[stage])
    for out in map(finish, processes):
        found = re.findall(r"Accuracy of the network on the .*", out)
        assert found == [f"Accuracy of the network on the 19 test images: {trained['test_acc1']:.1f}%"]
        assert f"* Acc@1 {trained['test_acc1']:.3f} Acc@5 {trained['test_acc5']:.3f} loss" in out


def test_module__runs_from_the_repository_root():
    assert "--query_depth" in finish(start("python -m saim.main_pretrain --help", ROOT))
