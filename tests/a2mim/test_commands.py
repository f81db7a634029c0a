"""The commands of the authors' README inside a copy of a2mim/ at toy size; the whole chain; scripts, folders, flags."""

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from a2mim import config, main_finetune, main_linprobe, main_pretrain
from tests.support.commands import commands_of, finish, run, start
from tests.support.helpers import ROOT, golden_files, load_golden
from tests.support.processes import launch
from tests.support.runs import arguments, run_main

README = """
PORT=29500 bash tools/dist_train.sh \
configs/openmixup/pretrain/a2mim/imagenet/r50_l3_sz224_init_8xb256_cos_ep300.py 8

python tools/model_converters/extract_backbone_weights.py \
work_dirs/openmixup/pretrain/a2mim/imagenet/r50_l3_sz224_init_8xb256_cos_ep300/latest.pth ${PATH_TO_CHECKPOINT}

PORT=29500 bash tools/dist_train_ft_8gpu.sh \
configs/openmixup/finetune/imagenet/r50_rsb_a3_ft_sz160_4xb512_cos_fp16_ep100.py ${PATH_TO_CHECKPOINT}
"""
COMMANDS = commands_of(README, "pretrain", "extract", "finetune")
PRETRAINED = "work_dirs/openmixup/pretrain/a2mim/imagenet/r50_l3_sz224_init_8xb256_cos_ep300"
FINETUNE = "configs/openmixup/finetune/imagenet/r50_rsb_a3_ft_sz160_4xb512_cos_fp16_ep100.py"
LINEAR = "configs/openmixup/finetune/imagenet/r50_linear_sz224_4xb64_step_ep100.py"
TOY = " --backbone resnet_nano --batch_size 6 --epochs 2 --warmup_epochs 0 --num_workers 0"
LABELLED = " --train_size 32 --val_resize 36 --val_crop 32 --nb_classes 10"
TOYS = {"pretrain": TOY + " --input_size 64 --save_recon_every 4", "finetune": TOY + LABELLED}
CONFIGS = sorted((ROOT / "a2mim" / "configs").rglob("*.py"))


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def last_line(folder: Path) -> dict[str, float]:
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


# ---- the README


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, digits) -> Path:
    """a2mim/ of a copy of the repository, with images where upstream expects them: lists, and a flat data/.../val."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("a2mim", "common"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "work_dirs", "data"))
    data = folder / "a2mim" / "data"
    images, lists = data / "ImageNet", data / "meta" / "ImageNet"
    lists.mkdir(parents=True)
    shutil.copytree(Path(digits, "train"), images / "train")
    (images / "val").mkdir()
    train = sorted(path.relative_to(images / "train") for path in images.glob("train/*/*.png"))
    val = sorted(Path(digits, "val").glob("*/*.png"))[:19]  # which neither 2 processes nor batches of 6 divide
    for path in val:
        shutil.copy(path, images / "val")
    (lists / "train_full.txt").write_text("".join(f"{path}\n" for path in train))
    (lists / "train_labeled_full.txt").write_text("".join(f"{path} {path.parent}\n" for path in train))
    (lists / "val_labeled.txt").write_text("".join(f"{path.name} {path.parent.name}\n" for path in val))
    return folder / "a2mim"


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["fast", "shell"])
def readme(request, checkout) -> tuple[bool, Path]:
    """The README's commands have been run on 2 processes in place of 8."""
    script = checkout / "tools" / "dist_train_ft_8gpu.sh"
    text = (ROOT / "a2mim" / "tools" / script.name).read_text()
    assert text.count("finetune 8 ") == 1
    script.write_text(text.replace("finetune 8 ", "finetune 2 "))
    shutil.rmtree(checkout / "work_dirs", ignore_errors=True)
    for stage, command in COMMANDS.items():
        command = re.sub(r"\.py 8$", ".py 2", command.replace("29500", port()))
        run(f"PATH_TO_CHECKPOINT=weights/encoder.pth; {command}{TOYS.get(stage, '')}", checkout, request.param)
    return request.param, checkout


def test_readme__runs_inside_the_method_folder(readme):
    _, folder = readme
    assert {path.name for path in (folder / PRETRAINED).glob("*.pth")} == {
        "latest.pth",
        "latest-previous.pth",
        "epoch_2.pth",
    }
    state = torch.load(folder / PRETRAINED / "latest.pth", weights_only=True)
    assert state["meta"] == {
        "epoch": 2,
        "iter": 2 * 4,
        "seed": 0,
        "exp_name": "r50_l3_sz224_init_8xb256_cos_ep300.py",
    }
    assert {"meta", "state_dict", "optimizer"} <= set(state)
    assert state["args"]["lr"] == 1.2e-3
    assert {"backbone.mask_token", "backbone.mask_gamma", "neck.decoder_pred.0.weight"} <= set(state["state_dict"])
    assert list(last_line(folder / PRETRAINED)) == [
        "train_lr",
        "train_loss",
        "train_loss_spatial",
        "train_loss_freq",
        "train_grad_norm",
        "epoch",
    ]
    # The encoder, whose folder names that of the fine-tuning.
    encoder = torch.load(folder / "weights/encoder.pth", weights_only=True)
    assert set(encoder) == {"state_dict", "author"}
    own = {name.removeprefix("backbone."): v for name, v in state["state_dict"].items() if name.startswith("backbone.")}
    assert own.keys() == encoder["state_dict"].keys()
    assert all(torch.equal(value, encoder["state_dict"][name]) for name, value in own.items())
    tuned = folder / FINETUNE.replace("configs", "work_dirs").removesuffix(".py") / "weights" / "encoder.pth"
    assert tuned.is_dir()
    assert list(last_line(tuned))[-3:] == ["val_head0_top1", "val_head0_top5", "epoch"]


def test_readme__draws_pictures(readme):
    """Four of the configuration's 626 iterations per epoch are less than one here: a picture of every epoch."""
    _, folder = readme
    pictures = sorted((folder / PRETRAINED / "reconstruction").iterdir())
    assert [path.name for path in pictures] == ["epoch_0.png", "epoch_1.png"]
    assert Image.open(pictures[0]).size == (8 * 150, 6 * 150)


def test_dist_test__counts_every_image_once(readme):
    """On any number of processes."""
    shell, folder = readme
    tuned = FINETUNE.replace("configs", "work_dirs").removesuffix(".py") + "/weights/encoder.pth"
    line = "head0_top1: {val_head0_top1:.3f}, head0_top5: {val_head0_top5:.3f}".format(**last_line(folder / tuned))
    for processes in (1, 2):
        command = f"PORT={port()} bash tools/dist_test.sh {FINETUNE} {processes} {tuned}/latest.pth"
        assert re.findall("head0_top1: .*", run(command + TOY + LABELLED, folder, shell)) == [line]


def test_linear_probe_of_the_encoder(readme, tmp_path):
    """By tools/train.py without a launcher, in upstream's folder, and there in one of the encoder's name."""
    _, folder = readme
    argv = [LINEAR, "--pretrained", "weights/encoder.pth", "--lr", "0.1", *shlex.split(TOY + LABELLED)]
    assert launch(tmp_path / "out", "tools/train.py", *argv, cwd=folder) == [0], (tmp_path / "out").read_text()
    run = folder / "work_dirs" / "openmixup" / Path(LINEAR).stem / "weights" / "encoder.pth"
    state = torch.load(run / "latest.pth", weights_only=True)["state_dict"]
    encoder = torch.load(folder / "weights/encoder.pth", weights_only=True)["state_dict"]
    assert torch.equal(state["backbone.layer4.0.conv2.weight"], encoder["layer4.0.conv2.weight"])
    assert not torch.equal(state["backbone.bn1.running_mean"], encoder["bn1.running_mean"])  # as upstream
    assert state["head.fc.weight"].abs().max() > 0
    shutil.rmtree(run)


LAUNCHES = {
    "python in the folder": ("python main_pretrain.py", "a2mim"),
    "python in the root": ("python a2mim/main_pretrain.py", "."),
    "module": ("python -m a2mim.main_pretrain", "."),
    "torchrun": ("torchrun --standalone --nproc_per_node 2 tools/train.py", "a2mim"),
    "launch": ("python -m torch.distributed.launch --nproc_per_node 2 main_pretrain.py", "a2mim"),
    "dist_train in the root": ("PORT={port} bash a2mim/tools/dist_train.sh", "."),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHES)
def test_launchers(checkout, digits, tmp_path, launcher):
    command, cwd = LAUNCHES[launcher]
    path = next(path for path in CONFIGS if path.stem == "vit_base_sz224_8xb128_accu2_step_fp16_ep800")
    processes = " 2" if "dist_train" in launcher else ""
    own = f" {path}{processes} --data_path {shlex.quote(digits)} --work_dir {tmp_path} --backbone vit_nano"
    own += " --patch_size 8 --model_patch_size 8 --input_size 32 --mask_patch_size 16 --epochs 1 --warmup_epochs 0"
    out = finish(start(command.format(port=port()) + own + " --batch_size 6 --num_workers 0", checkout.parent / cwd))
    assert "1 epochs done" in out
    assert "neck.decoder.0.weight" in torch.load(tmp_path / "latest.pth", weights_only=True)["state_dict"]  # SimMIM's


# ---- the chain in this process, by the configurations of both methods

VIT = "--backbone vit_nano --patch_size 8 --batch_size 6 --epochs 2 --warmup_epochs 0 --num_workers 0"
CHAINS = {
    "a2mim/imagenet/vit_base_l0_sz224_8xb128_accu2_step_ep800": (VIT + " --input_size 32 --mask_patch_size 16", "ViT"),
    "simmim/imagenet/r50_sz224_8xb256_fp16_ep300": (TOY + " --input_size 64", "CNN"),
    "simmim/imagenet/vit_base_rgb_m_sz224_8xb128_accu2_step_fp16_ep800": (
        VIT + " --input_size 32 --mask_patch_size 16",
        "ViT",
    ),
    "a2mim/imagenet/convnext_t_l3_sz224_init_8xb256_cos_ep300": (
        TOY.replace("resnet", "convnext") + " --input_size 64",
        "ConvNeXt",
    ),
}
TUNING = {
    "ViT": "vit_base_p16_swin_ft_simmim_sz224_4xb128_accu2_cos_ep100",
    "CNN": "r50_rsb_a2_ft_sz224_8xb256_cos_fp16_ep300",
    "ConvNeXt": "convnext_t_spark_ft_sz224_8xb256_cos_fp16_ep400",
}


@pytest.mark.parametrize(
    "name", [next(iter(CHAINS)), *(pytest.param(name, marks=pytest.mark.slow) for name in list(CHAINS)[1:])]
)
def test_chain(digits, tmp_path, name, monkeypatch, capsys):
    """Pre-train, extract, fine-tune, evaluate, probe."""
    monkeypatch.chdir(tmp_path)
    toy, kind = CHAINS[name]
    configs = ROOT / "a2mim" / "configs" / "openmixup"
    own = ["--data_path", digits, "--device", "cpu", *shlex.split(toy)]
    stride = ["--model_patch_size", "0"]
    run_main(main_pretrain, str(configs / "pretrain" / f"{name}.py"), *own, *stride, "--work_dir", "pretrain")
    assert "lr 4.00e-04" in (out := capsys.readouterr().out) or kind != "ViT", out
    assert ("masked targets are the mean colour" in out) == ("rgb_m" in name)
    argv = ["pretrain/latest.pth", "encoder.pth"]
    script = ROOT / "a2mim" / "tools" / "model_converters" / "extract_backbone_weights.py"
    assert launch(tmp_path / "out", str(script), *argv, cwd=tmp_path) == [0], (tmp_path / "out").read_text()
    size = "32" if kind != "ConvNeXt" else "64"
    labelled = ["--train_size", size, "--val_resize", size, "--val_crop", size, "--nb_classes", "10"]
    drop = ("--input_size", "--mask_patch_size", "--model_patch_size")
    own = [word for i, word in enumerate(own) if word not in drop and (i == 0 or own[i - 1] not in drop)] + labelled
    tuning = [str(configs / "finetune" / "imagenet" / f"{TUNING[kind]}.py"), *own, "--work_dir", "tuned"]
    run_main(main_finetune, *tuning, "--pretrained", "encoder.pth")
    assert "encoder.pth: " in capsys.readouterr().out
    run_main(main_finetune, *tuning, "--eval", "--resume", "tuned/latest.pth")
    line = "head0_top1: {val_head0_top1:.3f}, head0_top5: {val_head0_top5:.3f}".format(**last_line(Path("tuned")))
    assert line in capsys.readouterr().out
    run_main(main_linprobe, *own, "--lr", "0.1", "--pretrained", "encoder.pth", "--work_dir", "probed")
    state = torch.load("probed/latest.pth", weights_only=True)
    encoder = torch.load("encoder.pth", weights_only=True)["state_dict"]
    same = [torch.equal(encoder[name], value) for name, value in named(state["state_dict"]).items() if name in encoder]
    assert len(same) > 10
    assert all(same)
    # Weights of the whole network are found in the pre-training's own file, too.
    run_main(main_finetune, *tuning[:-1], "again", "--pretrained", "pretrain/latest.pth")
    assert last_line(Path("again")) == last_line(Path("tuned"))


def named(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's parameters under the names of an extracted one."""
    own = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    return {name: value for name, value in own.items() if not re.search("running|tracked", name)}


def test_pictures_are_not_overwritten(digits, tmp_path):
    """The interval is told in iterations of --recon_iters_per_epoch: every epoch, whose number is the picture's."""
    (tmp_path / "reconstruction").mkdir()
    (tmp_path / "reconstruction" / "epoch_1.png").write_text("mine")
    own = shlex.split(VIT + " --input_size 32 --mask_patch_size 16 --save_recon_every 4 --recon_iters_per_epoch 4")
    own += ["--batch_size", "8", "--data_path", digits, "--work_dir", str(tmp_path)]
    run_main(main_pretrain, *own)
    names = sorted(path.name for path in (tmp_path / "reconstruction").iterdir())
    assert names == ["epoch_0.png", "epoch_1.png"]
    assert (tmp_path / "reconstruction" / "epoch_1.png").read_text() == "mine"
    before = (tmp_path / "reconstruction" / "epoch_0.png").read_bytes()
    run_main(main_pretrain, *own, "--resume", str(tmp_path / "latest.pth"), "--epochs", "3")
    assert (tmp_path / "reconstruction" / "epoch_0.png").read_bytes() == before


# ---- the shell scripts, which only tell what they would run: PYTHON=echo


def shell(script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The script inside a2mim/."""
    env = {**os.environ, "PYTHON": "echo", **env}
    argv = ["bash", f"tools/{script}", *words]
    return subprocess.run(argv, cwd=ROOT / "a2mim", env=env, capture_output=True, text=True)


def dry(script: str, *words: str, **env: str) -> list[str]:
    """The words after python."""
    done = shell(script, *words, **env)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


LAUNCHER = "-m torch.distributed.launch --nproc_per_node {} --master_port 29500 --nnodes 1 --node_rank 0 "
LAUNCHER += "--master_addr 127.0.0.1 tools/"


def test_dist_train__maps_the_folder():
    path = "configs/openmixup/pretrain/a2mim/imagenet/r50_l3_sz224_init_8xb256_cos_ep300.py"
    expected = f"{LAUNCHER.format(8)}train.py {path} --work_dir {PRETRAINED}/ --seed 0 --launcher pytorch --auto_resume"
    assert dry("dist_train.sh", path, "8", "--auto_resume") == expected.split()
    env = {"PORT": "1234", "NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "node0"}
    words = " ".join(dry("dist_train.sh", path, "2", **env))
    assert "--nproc_per_node 2 --master_port 1234 --nnodes 4 --node_rank 3 --master_addr node0" in words


@pytest.mark.parametrize("gpus", [4, 8])
@pytest.mark.parametrize("weights", ["runs/x/encoder.pth", "encoder.pth", "/a b/encoder.pth"])
def test_dist_train_ft__names_the_folder_after_the_encoder(gpus, weights):
    folder = FINETUNE.replace("configs", "work_dirs").removesuffix(".py")
    name = {"runs/x/encoder.pth": "x/encoder.pth", "encoder.pth": "encoder.pth"}.get(weights, "a b/encoder.pth")
    words = [*LAUNCHER.format(gpus).split(), FINETUNE, "--pretrained", weights, "--work_dir", f"{folder}/{name}"]
    words[-6] += "train.py"
    done = shell(f"dist_train_ft_{gpus}gpu.sh", FINETUNE, weights, "--epochs", "3")
    expected = " ".join([*words, "--seed 0 --launcher pytorch --epochs 3"])
    assert (done.returncode, done.stdout.strip()) == (0, expected)


def test_dist_test__works_in_the_folder_of_the_checkpoint():
    words = f"{FINETUNE} runs/x/latest.pth --work_dir runs/x --launcher pytorch"
    assert dry("dist_test.sh", FINETUNE, "8", "runs/x/latest.pth") == f"{LAUNCHER.format(8)}test.py {words}".split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dist_train.sh", "dist_train.sh: expected CONFIG GPUS [flags]"),
        (f"dist_train.sh {FINETUNE}", "dist_train.sh: expected CONFIG GPUS [flags]"),
        (f"dist_train.sh {FINETUNE} many", "dist_train.sh: GPUS many: expected a whole number of at least 1"),
        (f"dist_train.sh {FINETUNE} 0", "dist_train.sh: GPUS 0: expected a whole number of at least 1"),
        ("dist_train.sh configs/none.py 8", "dist_train.sh: configs/none.py: no such configuration"),
        ("dist_train_ft_8gpu.sh", "dist_train_ft_8gpu.sh: expected CONFIG PRETRAIN [flags]"),
        (f"dist_train_ft_4gpu.sh {FINETUNE}", "dist_train_ft_4gpu.sh: expected CONFIG PRETRAIN [flags]"),
        (f"dist_test.sh {FINETUNE} 8", "dist_test.sh: expected CONFIG GPUS CHECKPOINT [flags]"),
    ],
)
def test_scripts__name_what_is_missing(words, expected):
    done = shell(*words.split())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected + "\n")


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        ("tools/train.py", 1, "train.py: expected a configuration, such as configs/"),
        ("tools/train.py --epochs 3", 1, "train.py: expected a configuration, such as configs/"),
        ("tools/train.py none.py", 1, "train.py: none.py: cannot be read (No such file or directory)"),
        ("tools/train.py tools/test.py", 1, "train.py: tools/test.py: line "),
        ("tools/test.py", 1, "test.py: expected a configuration, such as configs/"),
        (f"tools/test.py {FINETUNE}", 2, "error: argument --resume: expected one argument"),
        (f"tools/test.py {FINETUNE} none.pth --data_path /nowhere", 2, "--data_path /nowhere: no such folder"),
        ("tools/model_converters/extract_backbone_weights.py", 2, "arguments are required: checkpoint, output"),
        ("tools/model_converters/extract_backbone_weights.py a.pth b", 2, ": b: expected a name that ends in .pth"),
        ("tools/model_converters/extract_backbone_weights.py a.pth b.pth", 2, "a.pth: no such checkpoint file"),
    ],
)
def test_aliases__name_what_is_missing(tmp_path, argv, status, expected):
    log = tmp_path / "out"
    assert launch(log, *argv.split(), cwd=ROOT / "a2mim") == [status], log.read_text()
    assert expected in log.read_text()
    assert "Traceback" not in log.read_text()


# ---- configurations and flags


def test_configurations_are_kept_in_the_repository():
    """Their folders are named pretrain and finetune, as those of runs."""
    names = [str(path.relative_to(ROOT)) for path in CONFIGS]
    assert len(names) >= 48
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    argv = ["git", "check-ignore", *names]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "", "ignored by .gitignore"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_train_chooses_the_script(path):
    """And the script understands the configuration."""
    name = Path(config.script(["--local-rank=0", str(path), "--seed", "0"])).name
    expected = "main_pretrain.py" if "pretrain" in path.parts else "main_finetune.py"
    assert name == ("main_linprobe.py" if "linear" in path.stem else expected)
    main = {"main_pretrain.py": main_pretrain, "main_finetune.py": main_finetune}.get(name, main_linprobe)
    args = arguments(main, str(path))
    assert args.method == ("finetune" if name == "main_finetune.py" else args.method)
    if name == "main_pretrain.py":
        assert args.method == path.parts[-3]


def test_train__unknown_method(tmp_path, capsys):
    (tmp_path / "own.py").write_text("method = 'mae'\n")
    with pytest.raises(SystemExit) as end:
        config.script([str(tmp_path / "own.py")])
    assert "own.py: method mae: expected one of a2mim, simmim, finetune, linear" in str(end.value)


SAMPLES = {"str": "x", "int": "0", None: "x"}


@golden_files("a2mim", "manifest", ".json")
@pytest.mark.parametrize("script", ["tools/train.py", "tools/test.py"])
def test_official_flags_are_accepted(path, script):
    expected = load_golden(path)["flags"][script]
    mains = (main_pretrain, main_finetune, main_linprobe) if script == "tools/train.py" else (main_finetune,)
    for main in mains:
        parser: argparse.ArgumentParser = main.get_args_parser()
        for flag, ref in expected.items():
            if not flag.startswith("--"):
                continue  # positional: the configuration, and the checkpoint that test.py makes --resume of
            words = [SAMPLES[ref.get("type")]] * (1 if ref.get("nargs") is None else 2)
            if ref.get("default") is False:
                words = []
            if flag == "--cfg-options":
                words = ["model.lr=0.5", "data.epochs=3"]
            if "choices" in ref:
                words = [ref["choices"][-1]]
            args, left = parser.parse_known_args(["x.py", flag, *words])
            assert not left, (flag, left)
            assert args.config == "x.py"


def test_official_flags_have_their_effect(tmp_path):
    (tmp_path / "own.py").write_text("epochs = 7\nlr = 0.1\n")
    own = str(tmp_path / "own.py")
    args = arguments(main_pretrain, own, "--cfg-options", "optimizer.lr=0.5", "runner.epochs=3", "--resume_from", "x")
    assert (args.lr, args.epochs, args.resume) == (0.5, 3, "x")
    assert arguments(main_pretrain, own, "--epochs", "9").epochs == 9
    assert arguments(main_pretrain, own, "--work_dir", "here").output_dir == "here"
    for path, folder in {
        "configs/openmixup/pretrain/a2mim/imagenet/x.py": "work_dirs/openmixup/x",
        "x.py": "work_dirs/x",
        "simmim": "work_dirs/simmim",
    }.items():
        assert config.work_dir(path) == folder
