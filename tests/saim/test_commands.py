"""The commands of the authors' README, run to the letter inside saim/ with toy sizes appended; evaluation; -m."""

import argparse
import json
import re
from pathlib import Path

import pytest

from saim import main_finetune, main_linprobe, main_pretrain
from tests.support.commands import commands_of, fill, flags, processes, run, uneven_images
from tests.support.helpers import ROOT
from tests.support.processes import launch

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
COMMANDS = commands_of(README, "pretrain", "finetune", "linprobe")
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


@pytest.fixture(scope="module")
def commands(tmp_path_factory, digits) -> dict[str, str]:
    """The README commands on 2 processes with their placeholders filled, by stage; outputs go to <folder>/<stage>."""
    folder = tmp_path_factory.mktemp("commands")
    paths = {"<imagenet-path>": uneven_images(digits, folder), "<pretrained-ckpt>": folder / "pretrain/checkpoint.pth"}
    return {
        stage: fill(command, {**paths, "<output-directory>": folder / stage}) + TOYS[stage]
        for stage, command in COMMANDS.items()
    }


@pytest.fixture(scope="module")
def runs(commands) -> dict[str, Path]:
    """Folders of the three finished runs; the first by the launcher, the others from processes without imports."""
    for stage, command in commands.items():
        run(command, ROOT / "saim", shell=stage == "pretrain")
    parsed = {stage: PARSERS[stage].parse_args(flags(command)) for stage, command in commands.items()}
    return {stage: Path(args.output_dir) for stage, args in parsed.items()}


def last_line(folder: Path) -> dict[str, float]:
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


@pytest.mark.parametrize("stage, lr", [("pretrain", 1.6e-3), ("finetune", 2e-3), ("linprobe", 0.8)])
def test_readme_commands__give_the_papers_learning_rates(stage, lr):
    args = PARSERS[stage].parse_args(flags(COMMANDS[stage]))
    assert args.blr * args.batch_size * processes(COMMANDS[stage]) / 256 == pytest.approx(lr)


def test_readme_commands__run_inside_the_method_folder(runs):
    assert list(last_line(runs["pretrain"])) == ["train_lr", "train_loss", "train_total_norm", "epoch"]
    for stage in ("finetune", "linprobe"):
        line = last_line(runs[stage])
        assert list(line)[:5] == ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5"]
        assert line["epoch"] == 1
    assert all((folder / "checkpoint.pth").is_file() for folder in runs.values())


@pytest.mark.parametrize("stage", ["finetune", "linprobe"])
def test_eval__counts_every_image_once_on_any_number_of_processes(commands, runs, stage, tmp_path):
    evaluate = [*flags(commands[stage]), "--eval", "--resume", f"{runs[stage]}/checkpoint.pth"]
    trained = last_line(runs[stage])
    for number in (1, 2):
        log = tmp_path / f"on_{number}"
        assert not any(launch(log, f"main_{stage}.py", *evaluate, processes=number, cwd=ROOT / "saim"))
        out = log.read_text()
        found = re.findall(r"Accuracy of the network on the .*", out)
        assert found == [f"Accuracy of the network on the 19 test images: {trained['test_acc1']:.1f}%"]
        assert f"* Acc@1 {trained['test_acc1']:.3f} Acc@5 {trained['test_acc5']:.3f} loss" in out
