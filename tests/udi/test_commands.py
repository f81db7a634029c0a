"""The commands of the authors' README inside a copy of udi/ at toy size; launchers, other names, flags."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from common import distributed
from tests.support.commands import commands_of, fill, finish, flags, processes, run, start, uneven_images
from tests.support.helpers import ROOT, golden_files, load_golden
from udi import (
    main_detection,
    main_finetune,
    main_knn,
    main_linprobe,
    main_logistic_regression,
    main_pretrain,
    main_segmentation,
    main_semi_supervised,
    main_transfer,
    main_video_segmentation,
    visualize_attention,
)
from udi.eval.eval_semantic_segmentation.tools.model_converters import vit2mmseg
from udi.eval_finetuning import extract_backbone_weights_for_finetuning as extract

README = r"""
torchrun --standalone --nproc_per_node=8 main_udi.py \
--data_path $DATASET_ROOT \
--output_dir $OUTPUT_ROOT \
--arch vit_small \
--teacher_temp 0.07 \
--warmup_teacher_temp_epochs 30 \
--warmup_epochs 10 \
--local_crops_number 10 \
--norm_last_layer false \
--epochs 300

torchrun --standalone --nproc_per_node=$NPROC_PER_NODE ./eval_knn/eval_knn.py \
--data_path $DATASET_ROOT \
--pretrained_weights $PRETRAINED_WEIGHTS \
--arch vit_small \
--batch_size_per_gpu 256

torchrun --standalone --nproc_per_node=$NPROC_PER_NODE ./eval_linear_probing/eval_linear.py \
--data_path $DATASET_ROOT \
--pretrained_weights $PRETRAINED_WEIGHTS \
--arch vit_small \
--lr 0.02 \
--epochs 100

python ./eval_finetuning/extract_backbone_weights_for_finetuning.py \
--checkpoint $CHECKPOINT \
--output $OUTPUT \
--checkpoint_key teacher

torchrun --standalone --nproc_per_node=4 ./eval_finetuning/eval_finetuning.py --data_path $DATASET_ROOT \
--finetune $OUTPUT \
--model vit_small --epochs 200 --batch_size 256 --warmup_epochs 20 --drop_path 0.1 --lr 0.001 --layer_decay 0.55 \
--mixup 0.8 --cutmix 1.0 --layer_scale_init_value 0.0 \
--disable_rel_pos_bias --abs_pos_emb --use_cls --imagenet_default_mean_and_std

python visualize_attention.py --pretrained_weights ${dir_to_model}
"""
COMMANDS = commands_of(README, "pretrain", "knn", "linear", "extract", "finetune", "attention")
# "on a single node with 8 gpus" the README says of linear probing; of k-NN "with a single GPU".
COMMANDS["linear"] = COMMANDS["linear"].replace("$NPROC_PER_NODE", "8")
MAINS = {
    "pretrain": main_pretrain,
    "knn": main_knn,
    "linear": main_linprobe,
    "extract": extract,
    "finetune": main_finetune,
    "attention": visualize_attention,
}
PARSERS = {stage: main.get_args_parser() for stage, main in MAINS.items()}
NANO = " --arch vit_nano --num_workers 0"
VIEWS = " --patch_size 8 --global_size 64 --local_size 32 --local_crops_number 2 --out_dim 64"
TOYS = {
    "pretrain": NANO + VIEWS + " --batch_size_per_gpu 6 --epochs 2 --warmup_epochs 0",
    "knn": NANO + " --batch_size_per_gpu 6 --input_size 64 --nb_knn 10 20 --nb_classes 10",
    "linear": NANO + " --batch_size_per_gpu 6 --input_size 64 --num_labels 10 --epochs 2",
    "finetune": " --num_workers 0 --model vit_nano --batch_size 6 --input_size 64 --nb_classes 10 --epochs 2"
    " --warmup_epochs 0",
    "attention": " --arch vit_nano --image_path $IMAGE --image_size 64 48 --output_dir attention",
}


# ---- the README


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """udi/ of a copy of the repository."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("udi", "common"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "udi"


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["fast", "shell"])
def readme(request, checkout, digits, tmp_path_factory) -> tuple[Path, Path, dict[str, str]]:
    """Folders of udi/ and of the pre-training, and what the README's commands printed; on 2 processes in place of 8."""
    folder = tmp_path_factory.mktemp("readme")
    images, out = uneven_images(digits, folder), folder / "out"
    variables: dict[str, Path | int] = {"DATASET_ROOT": images, "OUTPUT_ROOT": out, "NPROC_PER_NODE": 2}
    variables |= dict.fromkeys(("PRETRAINED_WEIGHTS", "CHECKPOINT", "dir_to_model"), out / "checkpoint.pth")
    variables |= {"OUTPUT": folder / "vit" / "backbone.pth", "IMAGE": min(images.glob("val/*/*.png"))}
    export = "".join(f"export {name}={shlex.quote(str(value))}; " for name, value in variables.items())
    printed = {}
    for stage, command in COMMANDS.items():
        command = fill(command, {})
        if not request.param and stage != "pretrain":
            command = command.replace("--nproc_per_node=2", "--nproc_per_node=1")
        printed[stage] = run(export + command + TOYS.get(stage, ""), checkout, request.param)
    return checkout, folder, printed


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def results(printed: str) -> list[str]:
    return re.findall(r"\d+-NN classifier result: Top1: [\d.]+, Top5: [\d.]+$", printed, re.MULTILINE)


def test_readme__runs_inside_the_method_folder(readme):
    checkout, folder, printed = readme
    out = folder / "out"
    names = {"checkpoint.pth", "checkpoint-previous.pth", "checkpoint0000.pth", "checkpoint0001.pth"}
    assert {path.name for path in out.glob("*.pth")} == names
    assert [line["epoch"] for line in log_of(out)] == [0, 1]
    state = distributed.load(str(out / "checkpoint.pth"))
    assert state["args"]["norm_last_layer"] is False
    assert "48 images, 12 per update" in printed["pretrain"]
    # k-NN and linear probe leave their results beside the weights, fine-tuning beside what it starts from.
    assert [line.split("-")[0] for line in results(printed["knn"])] == ["10", "20"]
    logs = [path.relative_to(folder).parts for path in folder.rglob("*.log")]
    assert ("out", "knn.log") in [(parts[0], parts[-1]) for parts in logs]
    evaluated = {path.parent for path in folder.rglob("log.txt")} - {out}
    assert len(evaluated) == 2
    for path in evaluated:
        assert path.parent in (out, folder / "vit")
        assert [line["epoch"] for line in log_of(path)] == [0, 1]
    # The ViT of the teacher, with both of its class tokens.
    weights = torch.load(folder / "vit" / "backbone.pth", weights_only=True)
    prefix = "backbone.backbone."
    vit = {name.removeprefix(prefix): value for name, value in state["teacher"].items() if name.startswith(prefix)}
    assert weights.keys() == vit.keys()
    assert all(torch.equal(value, vit[name]) for name, value in weights.items())
    assert weights["cls_token"].shape == (1, 2, 96)
    assert sorted(path.name for path in (checkout / "attention").iterdir()) == [
        "attn-head0.png",
        "attn-head1.png",
        "attn-head2.png",
        "img.png",
        "overview.png",
    ]
    assert Image.open(checkout / "attention" / "img.png").size == (48, 64)


def test_readme__evaluations_count_every_image_once(readme):
    """19 validation images: of the probe's accuracies each is a multiple of 1/19."""
    _, folder, _ = readme
    for path in {path.parent for path in folder.rglob("log.txt")} - {folder / "out"}:
        for line in log_of(path):
            assert 19 * line["test_acc1"] / 100 == pytest.approx(round(19 * line["test_acc1"] / 100), abs=1e-6)


@pytest.mark.parametrize("stage, per_update, lr", [("pretrain", 1024, 2e-3), ("linear", 2048, 0.16)])
def test_readme__gives_the_papers_learning_rates(stage, per_update, lr):
    args = PARSERS[stage].parse_args(flags(COMMANDS[stage]))
    assert vars(args).get("batch_size", vars(args).get("batch_size_per_gpu")) * processes(COMMANDS[stage]) == per_update
    assert args.lr * per_update / 256 == pytest.approx(lr)


LAUNCHES = {
    "python": ("python main_udi.py", "udi"),
    "root": ("python udi/main_udi.py", "."),
    "main in the root": ("python udi/main_pretrain.py", "."),
    "launch": ("python -m torch.distributed.launch --nproc_per_node=2 main_udi.py", "udi"),
    "launch in the root": ("python -m torch.distributed.launch --nproc_per_node=2 udi/main_udi.py", "."),
    "module": ("python -m udi.main_pretrain", "."),
    "torchrun in the root": ("torchrun --standalone --nproc_per_node=2 udi/main_pretrain.py", "."),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHES)
def test_launchers(checkout, digits, tmp_path, launcher):
    """In a shell; a train/ folder itself may be named, as upstream's default does."""
    command, cwd = LAUNCHES[launcher]
    own = f" --data_path {shlex.quote(digits)}/train --output_dir {tmp_path}{TOYS['pretrain']} --epochs 1"
    out = finish(start(command + own, checkout.parent / cwd))
    assert "1 epochs done" in out
    assert log_of(tmp_path)[0]["epoch"] == 0


@pytest.mark.slow
def test_root(checkout, digits, tmp_path):
    command, cwd = LAUNCHES["main in the root"]
    own = f" --data_path {shlex.quote(digits)}/train --output_dir {tmp_path}{TOYS['pretrain']} --epochs 1"
    assert "1 epochs done" in run(f"{command}{own} --batch_size 24", checkout.parent / cwd, shell=False)


# ---- other names

SEMI = "eval_semi_supervised_learning/eval_semi_supervised_learning.py"
REGRESSION = "eval_semi_supervised_learning/eval_logistic_regression.py"
TRANSFER = "eval_transfer_learning/eval_transfer_learning.py"
EXTRACT = "eval_finetuning/extract_backbone_weights_for_finetuning.py"
VIDEO = "eval_video_segmentation/eval_video_segmentation.py"
NAMES: dict[str, Any] = {"main_udi.py": main_pretrain, "visualize_attention.py": visualize_attention}
for place in ("", "eval/"):  # README and repository
    NAMES |= {
        f"{place}eval_knn/eval_knn.py": main_knn,
        f"{place}{'eval_linear' if place else 'eval_linear_probing'}/eval_linear.py": main_linprobe,
        f"{place}{EXTRACT}": extract,
        f"{place}eval_finetuning/eval_finetuning.py": main_finetune,
        f"{place}{SEMI}": main_semi_supervised,
        f"{place}{REGRESSION}": main_logistic_regression,
        f"{place}{TRANSFER}": main_transfer,
        f"{place}{VIDEO}": main_video_segmentation,
    }
SEGMENTATION = "eval/eval_semantic_segmentation/tools"
NAMES |= {f"{SEGMENTATION}/{name}.py": main_segmentation for name in ("train", "test")}
NAMES |= {f"eval/eval_object_detection/tools/{name}.py": main_detection for name in ("train", "test")}
NAMES[f"{SEGMENTATION}/model_converters/vit2mmseg.py"] = vit2mmseg


@pytest.mark.parametrize("name", NAMES)
def test_names(name, monkeypatch, capsys):
    """All commands of README and repository lead to the main."""
    path, main = ROOT / "udi" / name, NAMES[name]
    text = path.read_text()
    own = Path(str(main.__file__)) == path
    assert own or len(text.splitlines()) <= 10
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    monkeypatch.setattr("sys.argv", [str(path)])
    assert main.get_args_parser().format_help().split("options:")[1] in capsys.readouterr().out


# ---- pre-training's flags

# What differs from upstream's on purpose.
OURS: dict[str, dict[str, Any]] = {
    "--arch": {"choices": ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_nano"]},  # no list from the network
    "--out_dim": {"choices": None},  # any number
    "--number_cls_token": {"choices": [1, 2]},  # what the loss is defined for
    "--batch_size_per_gpu": {"dest": "batch_size"},
    "--clip_grad": {"type": "limit"},  # float, 0 being none
}
ALIASES = ["deit_tiny", "deit_small", "deit_base"]


@golden_files("udi", "manifest", ".json")
def test_flags_and_defaults(path):
    parser = PARSERS["pretrain"]
    actions = {option: action for action in parser._actions for option in action.option_strings}
    defaults = vars(parser.parse_args([]))
    expected = load_golden(path)["flags"]["main_udi.py"]
    assert len(expected) == 36
    for flag, ref in expected.items():
        action = actions[flag]
        found = {
            "dest": action.dest,
            "default": defaults[action.dest],
            "type": getattr(action.type or str, "__name__", "").replace("boolean", "bool_flag"),
            "nargs": action.nargs,
            "choices": list(action.choices) if action.choices is not None else None,
        }
        if flag == "--arch":
            assert found["choices"][-3:] == ALIASES
            del found["choices"][-3:]
            assert set(ref["choices"]) < set(found["choices"])
        ref = {"nargs": None, "choices": None} | {key: value for key, value in ref.items() if key != "action"}
        assert found == ref | OURS.get(flag, {}), flag
    assert actions["--local-rank"] is actions["--local_rank"]


@pytest.mark.parametrize("text, expected", [("on", True), ("TRUE", True), ("1", True), ("Off", False), ("0", False)])
def test_booleans(text, expected):
    assert PARSERS["pretrain"].parse_args(["--include_patch", text]).include_patch is expected
