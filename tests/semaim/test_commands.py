"""The commands of the authors' README, inside semaim/ with toy sizes appended; evaluation; flags."""

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from semaim import main_finetune, main_knn, main_linprobe, main_pretrain
from tests.support.commands import commands_of, fill, flags, processes, run, uneven_images
from tests.support.helpers import ROOT, golden_files, load_golden
from tests.support.processes import launch
from tests.support.runs import run_main

README = r"""
python -m torch.distributed.launch --nproc_per_node 8 --nnodes 4 --node_rank 0 \
    main_pretrain.py \
    --batch_size 64 --epochs 800 --accum_iter 1 \
    --model aim_base --query_depth 12 --prediction_head_type MLP \
    --gaussian_kernel_size 9 --gaussian_sigma 1 --norm_pix_loss \
    --permutation_type attention_center --attention_type cls \
    --blr 2e-4 --warmup_epochs 30 --weight_decay 0.05 --clip_grad 3 \
    --data_path <imagenet-path> --output_dir <output-directory> \
    --log_dir <log-directory --experiment exp0 \

python -m torch.distributed.launch --nproc_per_node 8 --nnodes 2 --node_rank 0 \
    main_finetune.py \
    --model vit_base_patch16 --batch_size 64 --accum_iter 1 \
    --blr 5e-4 --layer_decay 0.65 --epochs 100 --warmup_epochs 20 \
    --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 \
    --dist_eval --data_path <imagenet-path> \
    --finetune <pretrained-ckpt> --output_dir <output-directory> \
    --log_dir <log-directory --experiment exp0 \

python -m torch.distributed.launch --nproc_per_node 8 main_linprobe.py \
    --model vit_base_patch16 --cls_token --batch_size 512 \
    --blr 0.1 --epochs 90 --warmup_epochs 0 --weight_decay 0.0 \
    --dist_eval --data_path <imagenet-path> \
    --finetune <pretrained-ckpt> --output_dir <output-directory> \
    --log_dir <log-directory --experiment exp0 \

python3 -m torch.distributed.launch --nproc_per_node=8 main_knn.py \
--model vit_large_patch16 --global_pool \
--batch_size_per_gpu 512 \
--pretrained_weights <pretrained-ckpt> \
--checkpoint_key state_dict \
--data_path <imagenet-path> \
--use_cuda \
"""
COMMANDS = commands_of(README, "pretrain", "finetune", "linprobe", "knn")
MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe, "knn": main_knn}
PARSERS: dict[str, argparse.ArgumentParser] = {stage: main.get_args_parser() for stage, main in MAINS.items()}
TOY = " --input_size 16 --patch_size 8 --num_workers 0"
TRAIN = TOY + " --batch_size 6 --warmup_epochs 0"
TOYS = {
    "pretrain": TRAIN + " --model aim_nano --query_depth 1 --epochs 1",
    "finetune": TRAIN + " --model vit_nano_patch16 --nb_classes 10 --epochs 2 --blr 5e-2",
    "linprobe": TRAIN + " --model vit_nano_patch16 --nb_classes 10 --epochs 2",
    "knn": TOY + " --batch_size_per_gpu 6 --model vit_nano_patch16 --nb_classes 10",
}
NAMES = {"pretrain": "aim_nano.exp0", "finetune": "vit_nano_patch16.exp0", "linprobe": "vit_nano_patch16.exp0"}
ENDINGS = {"pretrain": "temp", "finetune": "temp", "linprobe": "linear"}
LATEST = {stage: f"{name}.{ENDINGS[stage]}" for stage, name in NAMES.items()}  # the last epoch's .pth


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["fast", "shell"])
def shell(request) -> bool:
    """Whether the first command is run to the letter, by the launcher."""
    return request.param


@pytest.fixture(scope="module")
def folder(shell, tmp_path_factory) -> Path:
    """Outputs go to <folder>/<stage>, TensorBoard's to <folder>/<stage> logs, the k-NN's features to features."""
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def commands(folder, digits) -> dict[str, str]:
    """The README's commands on 2 processes with their placeholders filled, by stage."""
    encoder = folder / "pretrain" / f"{LATEST['pretrain']}.pth"
    paths = {"<imagenet-path>": uneven_images(digits, folder), "<pretrained-ckpt>": encoder}
    filled = {}
    for stage, command in COMMANDS.items():
        own = {"<output-directory>": folder / stage, "<log-directory": folder / f"{stage} logs"}
        filled[stage] = fill(command, {**paths, **own}) + TOYS[stage]
    return filled


@pytest.fixture(scope="module")
def runs(commands, folder, shell) -> dict[str, str]:
    """What the finished commands printed, by stage."""
    printed = {"pretrain": run(commands["pretrain"], ROOT / "semaim", shell)}
    extra = {"knn": ("--dump_features", f"{folder}/features")}
    return printed | {stage: forked(commands, folder, stage, *extra.get(stage, ())) for stage in list(COMMANDS)[1:]}


def forked(commands: dict[str, str], folder: Path, stage: str, *further: str) -> str:
    """What a stage prints on 2 processes."""
    log = folder / f"{stage}.out"
    log.unlink(missing_ok=True)
    argv = [f"main_{stage}.py", *flags(commands[stage]), *further]
    assert launch(log, *argv, processes=2, cwd=ROOT / "semaim") == [0, 0], log.read_text()
    return log.read_text()


def log_lines(folder: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / stage / f"{NAMES[stage]}.log.txt").read_text().splitlines()]


def results(printed: str) -> list[str]:
    return re.findall(r"\d+-NN classifier result: Top1: [\d.]+, Top5: [\d.]+$", printed, re.MULTILINE)


@pytest.mark.parametrize("stage, lr", [("pretrain", 1.6e-3), ("finetune", 2e-3), ("linprobe", 1.6)])
def test_readme_commands__give_the_papers_learning_rates(stage, lr):
    args = PARSERS[stage].parse_args(flags(COMMANDS[stage]))
    assert args.lr is None
    assert args.blr * args.batch_size * args.accum_iter * processes(COMMANDS[stage]) / 256 == pytest.approx(lr)


def test_readme_commands__run_inside_the_method_folder(runs, folder):
    (line,) = log_lines(folder, "pretrain")
    assert list(line) == ["train_lr", "train_loss", "train_total_norm", "epoch"]
    for stage in ("finetune", "linprobe"):
        lines = log_lines(folder, stage)
        names = ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"]
        assert [list(line) for line in lines] == [names, names]
        assert [line["epoch"] for line in lines] == [0, 1]
    assert [line.split("-")[0] for line in results(runs["knn"])] == ["20", "10", "30"]


def test_files__have_upstreams_names(runs, folder):
    for stage, latest in LATEST.items():
        numbered = {f"{NAMES[stage]}.0001.pth"} if stage == "pretrain" else set()
        found = {path.name for path in (folder / stage).iterdir()} - {f"{latest}-previous.pth"}
        logs = {f"{NAMES[stage]}.log.txt", f"{NAMES[stage]}.progress.jsonl", "run.json"}
        assert found == {f"{latest}.pth"} | logs | numbered
        assert [path.name for path in (folder / f"{stage} logs").iterdir()] == [NAMES[stage]]


def test_tensorboard__has_upstreams_tags_and_steps(runs, folder):
    steps, ticks = [0, 1, 2, 3], [0, 250, 500, 750, 1000, 1250, 1500, 1750]  # 4 steps per epoch, or 1000 ticks
    perf = dict.fromkeys(["perf/test_acc1", "perf/test_acc5", "perf/test_loss"], [0, 1])
    for stage, expected in {
        "pretrain": {"loss": steps, "lr": steps, "grad_norm": steps},
        "finetune": {"loss": ticks, "lr": ticks, **perf},
        "linprobe": {"loss": ticks, "lr": ticks, **perf},
    }.items():
        events = EventAccumulator(str(folder / f"{stage} logs" / NAMES[stage])).Reload()
        assert {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == expected


@pytest.fixture(scope="module")
def again(commands, runs, folder, shell) -> dict[str, str]:
    """What the probe's --eval on 2 processes prints, and the k-NN from its dump, run from the root."""
    from_dump = f"python semaim/main_knn.py {shlex.join(flags(commands['knn']))} --data_path nowhere"
    knn = run(f"{from_dump} --load_features {folder}/features", ROOT, shell)
    return {"linprobe": forked(commands, folder, "linprobe", "--eval"), "knn": knn}


@pytest.mark.parametrize("stage, number", [("finetune", 1), ("linprobe", 1), ("linprobe", 2)])
def test_eval__counts_every_image_once_on_any_number_of_processes(commands, again, folder, stage, number, capsys):
    if number == 1:  # the training's own evaluations are those of 2 processes
        checkpoint = folder / stage / f"{LATEST[stage]}.pth"
        run_main(MAINS[stage], *flags(commands[stage]), "--device", "cpu", "--eval", "--resume", str(checkpoint))
    printed = capsys.readouterr().out if number == 1 else again[stage]
    trained = log_lines(folder, stage)[-1]
    found = re.findall(r"Accuracy of the network on the .*", printed)
    assert found == [f"Accuracy of the network on the 19 test images: {trained['test_acc1']:.1f}%"]
    assert f"* Acc@1 {trained['test_acc1']:.3f} Acc@5 {trained['test_acc5']:.3f} loss" in printed


def test_knn__is_the_same_on_any_number_of_processes_and_from_a_dump(commands, runs, again, capsys):
    expected = results(runs["knn"])
    run_main(main_knn, *flags(commands["knn"]), "--device", "cpu")
    assert results(capsys.readouterr().out) == expected
    assert results(again["knn"]) == expected


# Upstream's flags that are others on purpose: CPU works, too; fractions; the model's own (upstream does not read it).
OURS: dict[tuple[str, str], dict[str, Any]] = {
    ("main_pretrain.py", "--device"): {"default": "auto"},
    ("main_finetune.py", "--device"): {"default": "auto"},
    ("main_linprobe.py", "--device"): {"default": "auto"},
    ("main_pretrain.py", "--gaussian_sigma"): {"type": "float"},
    ("main_knn.py", "--patch_size"): {"default": None},
}


@golden_files("semaim", "manifest", ".json")
def test_flags_and_defaults(path):
    for name, expected in load_golden(path)["flags"].items():
        parser = PARSERS[name.removeprefix("main_").removesuffix(".py")]
        actions = {option: action for action in parser._actions for option in action.option_strings}
        defaults = vars(parser.parse_args([]))
        for flag, ref in expected.items():
            action = actions[flag]
            kind = "flag" if action.nargs == 0 else getattr(action.type or str, "__name__", "")
            found = {"dest": action.dest, "default": defaults[action.dest], "type": kind, "nargs": action.nargs}
            assert found == {**ref, **OURS.get((name, flag), {})}, f"{name} {flag}"
        assert actions["--local-rank"] is actions["--local_rank"]
