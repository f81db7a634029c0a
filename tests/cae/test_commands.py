"""The command of the authors' README and those of the paper's recipes, inside cae/ at toy size; evaluation; flags."""

import argparse
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cae import main_attentive, main_finetune, main_linprobe, main_pretrain
from cae.files import PROBES
from tests.support.cae import CODES, tokenizer_file
from tests.support.commands import commands_of, fill, flags, processes, run, uneven_images
from tests.support.helpers import ROOT, golden_files, load_golden
from tests.support.processes import launch
from tests.support.runs import run_main

# Pre-training is the README's; it names the settings of the others, which are those of the authors' scripts.
README = r"""
OMP_NUM_THREADS=1 $PYTHON -m torch.distributed.launch \
--nproc_per_node=8 \
tools/run_pretraining.py \
--data_path ${DATA_PATH} \
--output_dir ${OUTPUT_DIR} \
--model cae_base_patch16_224_8k_vocab --discrete_vae_weight_path ${TOKENIZER_PATH} \
--batch_size 64 --lr 1.5e-3 --warmup_epochs 20 --epochs 800 \
--clip_grad 3.0 --layer_scale_init_value 0.1 \
--imagenet_default_mean_and_std \
--color_jitter 0 \
--drop_path 0.1 \
--sincos_pos_emb \
--mask_generator block \
--num_mask_patches 98 \
--decoder_layer_scale_init_value 0.1 \
--no_auto_resume \
--save_ckpt_freq 100 \
--exp_name $my_name \
--regressor_depth 4 \
--decoder_depth 4 \
--align_loss_weight 2

OMP_NUM_THREADS=1 $PYTHON -m torch.distributed.launch \
--nproc_per_node=8 \
tools/run_linear.py \
--data_path ${DATA_PATH} --output_dir ${OUTPUT_DIR} --log_dir ${OUTPUT_DIR} \
--model cae_base_patch16_224 --finetune ${MODEL_PATH} --nb_classes 1000 \
--batch_size 512 --epochs 90 --blr 0.1 --weight_decay 0.0 --warmup_epochs 10 \
--enable_linear_eval --use_cls --disable_rel_pos_bias \
--dist_eval --save_freq 50

OMP_NUM_THREADS=1 $PYTHON -m torch.distributed.launch \
--nproc_per_node=8 \
tools/run_attentive.py \
--data_path ${DATA_PATH} --output_dir ${OUTPUT_DIR} --data_set IMNET \
--model cae_base_patch16_224 --finetune ${MODEL_PATH} --nb_classes 1000 \
--batch_size 256 --epochs 90 --warmup_epochs 10 \
--opt sgd --lr 0.4 --momentum 0.9 --weight_decay 0.0 --layer_decay 1 \
--drop_path 0 --smoothing 0.0 --mixup 0 --cutmix 0 --reprob 0 --color_jitter 0 \
--imagenet_default_mean_and_std --dist_eval \
--enable_linear_eval --linear_type attentive --use_cls

OMP_NUM_THREADS=1 $PYTHON -m torch.distributed.launch \
--nproc_per_node=8 \
tools/run_class_finetuning.py \
--data_path ${DATA_PATH} --output_dir ${OUTPUT_DIR} --data_set IMNET \
--model cae_base_patch16_224 --finetune ${MODEL_PATH} --nb_classes 1000 \
--batch_size 128 --epochs 100 --warmup_epochs 5 \
--lr 8e-3 --update_freq 1 --layer_decay 0.65 --drop_path 0.1 --weight_decay 0.05 \
--mixup 0.8 --cutmix 1.0 --smoothing 0.1 --reprob 0.25 \
--imagenet_default_mean_and_std --dist_eval
"""
NODES = 4  # 32 GPUs, says the README
COMMANDS = commands_of(README, "pretrain", "linear", "attentive", "finetune")
MAINS = {"pretrain": main_pretrain, "linear": main_linprobe, "attentive": main_attentive, "finetune": main_finetune}
PARSERS: dict[str, argparse.ArgumentParser] = {stage: main.get_args_parser() for stage, main in MAINS.items()}

TOY = " --input_size 16 --patch_size 4 --num_workers 0 --batch_size 6 --warmup_epochs 0 --model cae_nano"
PRETRAIN = TOY + f" --second_input_size 16 --discrete_vae_type customized --decoder_num_classes {CODES} --epochs 2"
PRETRAIN += " --num_mask_patches 8 --min_mask_patches_per_block 1 --decoder_embed_dim 96 --decoder_num_heads 3"
PROBE = TOY + " --nb_classes 10 --epochs 3"
TOYS = {
    "pretrain": PRETRAIN + " --regressor_depth 1 --decoder_depth 1",
    "linear": PROBE + " --save_freq 2",
    # Of 19 validation images, none stands alone in a batch of 1.5 times 8.
    "attentive": PROBE + " --batch_size 8 --save_ckpt_freq 2",
    "finetune": PROBE + " --save_ckpt_freq 2 --lr 2e-3",
}
NAME = "toy"  # --exp_name


def words(command: str, variables: Mapping[str, str]) -> list[str]:
    """The words after the script, its shell variables filled in."""
    return [re.sub(r"^\$(\w+|{\w+})$", lambda name: variables[name[1].strip("{}")], word) for word in flags(command)]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["fast", "shell"])
def shell(request) -> bool:
    """Whether the first command is run to the letter, by the launcher."""
    return request.param


@pytest.fixture(scope="module")
def folder(shell, tmp_path_factory) -> Path:
    """Outputs go to <folder>/<stage>."""
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def variables(folder, digits) -> dict[str, dict[str, str]]:
    """The shell variables that the commands read, by stage."""
    images = uneven_images(digits, folder)
    own = {"DATA_PATH": images, "MODEL_PATH": folder / "pretrain" / "checkpoint.pth", "my_name": NAME}
    own |= {"TOKENIZER_PATH": tokenizer_file(folder), "PYTHON": "python"}
    values = {stage: {**own, "OUTPUT_DIR": folder / stage} for stage in COMMANDS}
    values["pretrain"]["DATA_PATH"] = images / "train"
    return {stage: {name: str(value) for name, value in names.items()} for stage, names in values.items()}


@pytest.fixture(scope="module")
def commands() -> dict[str, str]:
    """The commands at toy size, on 2 processes."""
    return {stage: fill(command, {}) + TOYS[stage] for stage, command in COMMANDS.items()}


@pytest.fixture(scope="module")
def runs(commands, variables, folder, shell) -> None:
    """The commands have been run in cae/, pre-training in a shell in which its variables are set."""
    own = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables["pretrain"].items())
    run(f"{own}; {commands['pretrain']}", ROOT / "cae", shell)
    for stage, number in (("finetune", 2), ("attentive", 1), ("linear", 1)):
        script = re.findall(r"tools/\w+\.py", commands[stage])[0]
        own, log = words(commands[stage], variables[stage]), folder / f"{stage}.out"
        assert launch(log, script, *own, processes=number, cwd=ROOT / "cae") == [0] * number, log.read_text()


def log_lines(folder: Path, stage: str) -> list[dict[str, float]]:
    log = folder / stage / (f"{stage}.log.txt" if stage in PROBES else "log.txt")
    return [json.loads(line) for line in log.read_text().splitlines()]


def latest(folder: Path, stage: str) -> Path:
    return folder / stage / (f"checkpoint_{stage}.pth" if stage in PROBES else "checkpoint.pth")


@pytest.mark.parametrize(
    ("stage", "images", "lr"),
    [("pretrain", 2048, 1.5e-3), ("linear", 16384, 6.4), ("attentive", 8192, 0.4), ("finetune", 4096, 8e-3)],
)
def test_commands__give_the_papers_learning_rates(stage, images, lr):
    given: dict[str, str] = dict.fromkeys(("DATA_PATH", "OUTPUT_DIR", "TOKENIZER_PATH", "MODEL_PATH", "my_name"), "x")
    args = PARSERS[stage].parse_args(words(COMMANDS[stage], given))
    assert args.batch_size * processes(COMMANDS[stage]) * NODES == images
    assert (args.blr * images / 256 if stage == "linear" else args.lr) == pytest.approx(lr)


TRAINED = ["train_lr", "train_min_lr"]
UPDATED = ["train_loss_scale", "train_weight_decay", "train_grad_norm"]
TESTED = ["test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"]
LINES = {
    "pretrain": [*TRAINED, "train_mlm_acc", "train_loss", "train_loss_main", "train_loss_align", *UPDATED]
    + ["epoch", "n_parameters"],
    "finetune": [*TRAINED, "train_loss", *UPDATED, *TESTED],  # no accuracy of mixed images
    "attentive": [*TRAINED, "train_loss", "train_class_acc", "train_loss_scale", "train_grad_norm", *TESTED],
    "linear": ["train_lr", "train_loss", *TESTED],
}


def test_commands__run_inside_the_method_folder(runs, folder):
    for stage, names in LINES.items():
        lines = log_lines(folder, stage)
        assert [list(line) for line in lines] == [names] * (2 if stage == "pretrain" else 3), stage
        assert [line["epoch"] for line in lines] == list(range(len(lines)))
    first, last = log_lines(folder, "pretrain")
    assert last["train_loss"] < first["train_loss"]
    assert first["train_loss"] == pytest.approx(first["train_loss_main"] + first["train_loss_align"])


def test_commands__train_what_they_should(runs, folder):
    parameters = {stage: log_lines(folder, stage)[0]["n_parameters"] for stage in COMMANDS}
    state = {stage: torch.load(latest(folder, stage), weights_only=True)["model"] for stage in COMMANDS}
    sizes = {stage: {name: value.numel() for name, value in weights.items()} for stage, weights in state.items()}
    for stage, frozen in {"pretrain": ("rd_pos_embed", "alignment_encoder.", "encoder.pos_embed")}.items():
        assert parameters[stage] == sum(n for name, n in sizes[stage].items() if not name.startswith(frozen))
    assert parameters["linear"] == sum(sizes["linear"][f"head.1.{part}"] for part in ("weight", "bias")) == 970
    probe = ("query_token", "attentive_blocks.", "head.")
    assert parameters["attentive"] == sum(n for name, n in sizes["attentive"].items() if name.startswith(probe))
    for stage in ("linear", "attentive"):  # and their encoder is that of pre-training, its norm included
        for name, value in state["pretrain"].items():
            if name.startswith("encoder."):
                assert torch.equal(state[stage][name.removeprefix("encoder.")], value), name


def test_files__have_upstreams_names(runs, folder):
    always = {"run.json"}
    expected = {
        "pretrain": {"checkpoint.pth", "log.txt", "progress.jsonl", f"{NAME}_checkpoint-1.pth"},
        "attentive": {"checkpoint_attentive.pth", "attentive.log.txt", "attentive.progress.jsonl"}
        | {"_checkpoint-1.pth", "_checkpoint-2.pth", "checkpoint-best.pth"},
        "finetune": {"checkpoint.pth", "log.txt", "progress.jsonl"}
        | {"checkpoint-1.pth", "checkpoint-2.pth", "checkpoint-best.pth"},
    }
    for stage, own in expected.items():
        found = {path.name for path in (folder / stage).iterdir() if not path.name.startswith("events.")}
        assert found - {"checkpoint-previous.pth", "checkpoint_attentive-previous.pth"} == always | own, stage
        keys = {"model", "optimizer", "epoch", "args"}
        assert keys <= set(torch.load(latest(folder, stage), weights_only=True))


def test_files__of_linear_probing_are_kept_where_an_epoch_begins_a_period(runs, folder):
    """epoch % save_freq == 0, and the last one."""
    found = {path.name for path in (folder / "linear").glob("*checkpoint-[0-9]*.pth")}
    assert found == {"checkpoint-0.pth", "checkpoint-2.pth"}


def test_tensorboard__has_upstreams_tags_and_steps(runs, folder):
    common = ["loss/loss", *(f"opt/{name}" for name in ("loss_scale", "lr", "min_lr", "grad_norm"))]
    perf = dict.fromkeys([f"perf/test_{name}" for name in ("acc1", "acc5", "loss")], [0, 1, 2])
    pretrain = [*common, "loss/mlm_acc", "loss_main/loss", "loss_align/loss", "opt/weight_decay"]
    for stage, tags, steps in (  # 48 images: 4 steps of 2 x 6, or 6 steps of 8
        ("pretrain", pretrain, 2 * 4),
        ("finetune", [*common, "opt/weight_decay"], 3 * 4),
        ("attentive", [*common, "loss/class_acc"], 3 * 6),
    ):
        events = EventAccumulator(str(folder / stage)).Reload()
        found = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert found == dict.fromkeys(tags, list(range(steps))) | ({} if stage == "pretrain" else perf), stage


def result(printed: str) -> list[str]:
    return re.findall(r"Accuracy of the network on the .*", printed)


def expected_result(folder: Path, stage: str) -> list[str]:
    accuracy = log_lines(folder, stage)[-1]["test_acc1"]
    return [f"Accuracy of the network on the 19 test images: {accuracy:.1f}%"]


@pytest.mark.parametrize("stage", ["finetune", "attentive", "linear"])
def test_eval__counts_every_image_once(commands, variables, runs, folder, stage, capsys):
    """On 1 process; the training's own evaluations are those of 2 in fine-tuning."""
    own = words(commands[stage], variables[stage])
    run_main(MAINS[stage], *own, "--device", "cpu", "--eval", "--resume", str(latest(folder, stage)))
    printed = capsys.readouterr().out
    assert result(printed) == expected_result(folder, stage)
    trained = log_lines(folder, stage)[-1]
    assert f"* Acc@1 {trained['test_acc1']:.3f} Acc@5 {trained['test_acc5']:.3f} loss" in printed
    if stage == "attentive":
        own += ["--eval", "--resume", str(folder / stage / "checkpoint-best.pth"), "--eval_bn", "running"]
        run_main(main_attentive, *own, "--device", "cpu")
        assert "on the 19 test images" in capsys.readouterr().out


# ---- flags

# Upstream's flags that are others on purpose: CPU works, too; what it always runs with is the default of --aa.
OURS: dict[tuple[str, str], dict[str, Any]] = {
    ("run_class_finetuning", "--aa"): {"default": "rand-m9-mstd0.5-inc1"},
    ("run_attentive", "--linear_type"): {"choices": ["standard", "attentive"]},
}
OURS |= {
    (f"run_{n}", "--device"): {"default": "auto"} for n in ("pretraining", "class_finetuning", "linear", "attentive")
}
STAGES = {"run_pretraining": "pretrain", "run_class_finetuning": "finetune"}
STAGES |= {"run_linear": "linear", "run_attentive": "attentive"}
REVISION_A = {
    "pretrain": ["--sincos_pos_emb", "--abs_pos_emb", "--rel_pos_bias", "--base_momentum"],
    "finetune": ["--abs_pos_emb"],
    "attentive": ["--abs_pos_emb"],
    "linear": ["--abs_pos_emb"],
}


def kind_of(action: argparse.Action) -> str:
    """As the golden names them: a type, or the kind of a switch; texts without a type are Store."""
    if action.nargs == 0:
        return {True: "StoreTrue", False: "StoreFalse"}[bool(action.const)]
    return getattr(action.type, "__name__", "Store")


@golden_files("cae", "manifest", ".json")
def test_flags_and_defaults(path):
    for name, expected in load_golden(path)["flags"].items():
        parser = PARSERS[STAGES[name]]
        actions = {option: action for action in parser._actions for option in action.option_strings}
        defaults = vars(parser.parse_args([]))
        for flag, ref in expected.items():
            action = actions[flag]
            kind = ref["type"] if (kind_of(action), ref["type"]) == ("Store", "str") else kind_of(action)
            kind = "Store" if (kind, ref["type"]) == ("str", "Store") else kind
            found = {"dest": action.dest, "default": defaults[action.dest], "type": kind, "nargs": action.nargs}
            found["choices"] = None if action.choices is None else list(action.choices)
            assert found == {**ref, **OURS.get((name, flag), {})}, f"{name} {flag}"
        assert actions["--local-rank"] is actions["--local_rank"]
        assert set(REVISION_A[STAGES[name]]) <= set(actions)


def test_switches():
    for stage in ("finetune", "attentive", "linear"):
        args = PARSERS[stage].parse_args(["--disable_rel_pos_bias", "--disable_sin_pos_emb", "--use_cls"])
        assert (args.rel_pos_bias, args.sin_pos_emb, args.use_mean_pooling) == (False, False, False)
        args = PARSERS[stage].parse_args(["--rel_pos_bias", "--sin_pos_emb", "--use_mean_pooling"])
        assert (args.rel_pos_bias, args.sin_pos_emb, args.use_mean_pooling) == (True, True, True)
    args = PARSERS["finetune"].parse_args(["--accum_iter", "3", "--no_save_ckpt", "--no_auto_resume", "--no_pin_mem"])
    assert (args.update_freq, args.save_ckpt, args.auto_resume, args.pin_mem) == (3, False, False, False)
    assert PARSERS["pretrain"].parse_args([]).base_momentum is None
    assert PARSERS["pretrain"].parse_args(["--base_momentum", "0"]).base_momentum == 0.0
