"""Configuration files against upstream's resolved ones, how they are read, and the extraction of encoders."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from a2mim import config, main_finetune, main_linprobe, main_pretrain, optim
from a2mim.files import run_files
from a2mim.openmixup import extract_encoder
from a2mim.tools.model_converters import extract_backbone_weights
from common import distributed
from common.distributed import UserError
from tests.support.helpers import ROOT, golden_files, load_golden
from tests.support.runs import kept_signals, mistake, run_main

CONFIGS = ROOT / "a2mim" / "configs"
MAINS = {"main_pretrain.py": main_pretrain, "main_finetune.py": main_finetune, "main_linprobe.py": main_linprobe}
FILES = sorted(path.relative_to(CONFIGS.parent).as_posix() for path in CONFIGS.rglob("*.py"))
ONE = "configs/openmixup/pretrain/a2mim/imagenet/r50_l3_sz224_init_8xb256_cos_ep100.py"


def main_of(path: str) -> Any:
    """The main that a configuration is for."""
    return MAINS[config.MAINS[config.read(path)["method"]]]


def parsed(path: str, *flags: str) -> argparse.Namespace:
    path = str(ROOT / "a2mim" / path) if path.startswith("configs/") else path
    return config.parse_args(main_of(path).get_args_parser(), [path, *flags])


# ---- goldens: the values of every file

# Decided: its effective batch is that of the other recipes, 2048 (upstream's file has 4096 on its 8 GPUs, with a
# comment that it is meant for 4); so it accumulates nothing, and pictures come every 25 of its epochs.
DECIDED = {
    "configs/openmixup/pretrain/simmim/imagenet/convnext_base_sz224_8xb256_fp16_ep300.py": {
        "accum_iter": 1,
        "save_recon_every": 15650,
        "recon_iters_per_epoch": 626,
    }
}
VITS = {"SimMIMViT": "vit_", "MIMVisionTransformer": "vit_"}
CONVNEXTS = ("MIMConvNeXt", "ConvNeXt")


def backbone_of(options: dict) -> str:
    kind, arch = options["type"], str(options.get("arch")).replace("-", "_")
    if kind in VITS:
        return f"vit_{arch}" if options.get("use_window") else f"mae_vit_{arch}"
    return f"convnext_{arch}" if kind in CONVNEXTS else arch if "depth" not in options else f"resnet{options['depth']}"


def shared_values(ref: dict) -> dict[str, Any]:
    """What both kinds of training have, under our names."""
    opt, lr = ref["optimizer"], ref["lr_config"]
    values = {
        "backbone": backbone_of(ref["backbone"]),
        "drop_path": ref["backbone"].get("drop_path_rate", 0.0),
        "opt": opt["type"].lower(),
        "lr": opt["lr"],
        "weight_decay": opt["weight_decay"],
        "paramwise": list(ref["paramwise_options"].items()),
        "sched": lr["policy"],
        "min_lr": lr.get("min_lr", 0.0),
        "warmup_epochs": lr["warmup_iters"] if lr.get("warmup") else 0,
        "epochs": ref["epochs"],
        "batch_size": ref["batch_per_gpu"],
        "accum_iter": ref["update_interval"],
        "clip_grad": ref["grad_clip"],
        "amp": ref["use_fp16"],
    }
    if "patch_size" in ref["backbone"]:
        values["patch_size"] = ref["backbone"]["patch_size"]
    values |= {name: opt[name] for name in ("betas", "eps", "momentum") if name in opt}
    if lr.get("warmup"):
        assert lr["warmup"] == "linear"
        assert lr["warmup_by_epoch"]
        values["warmup_ratio"] = lr["warmup_ratio"]
    if lr["policy"] == "step":
        values |= {"steps": lr["step"], "gamma": lr.get("gamma", 0.1)}
    if lr["policy"] == "CosineAnnealing":
        values["by_epoch"] = lr.get("by_epoch", True)
    return values


def pretraining_values(ref: dict) -> dict[str, Any]:
    backbone, masks, head, every = (ref[key] for key in ("backbone", "mask", "head", "save_reconstruction"))
    assert ref["crop"]["size"] == masks["input_size"]
    assert (ref["crop"]["interpolation"], ref["hflip"], masks["mask_only"]) == ("bilinear", 0.5, False)
    values = {
        "method": ref["method"].lower(),
        "input_size": masks["input_size"],
        "mask_layer": backbone["mask_layer"],
        "mask_token": backbone["mask_token"],
        "mask_init": backbone.get("mask_init", 0.0),
        # ConvNeXt adds in any case; the others' default is to replace, as SimMIM's ResNets do.
        "mask_replace": backbone["type"] not in CONVNEXTS and backbone.get("replace", True),
        "crop_scale": ref["crop"]["scale"],
        "save_recon_every": every["every_iters"],
        "recon_iters_per_epoch": every["iter_per_epoch"],
    }
    values |= {k: masks[k] for k in ("mask_patch_size", "model_patch_size", "mask_ratio", "mask_color")}
    if head["type"] == "A2MIMHead":
        pixel = head["loss"]
        values["loss"] = pixel["mode"].removesuffix("_loss")
        values |= {f"focal_{k}": pixel[k] for k in ("alpha", "gamma") if k in pixel}
        fft = ("fft_weight", "fft_focal", "fft_unmask_weight", "fft_unmask_replace", "fft_reweight")
        values |= {k: head[k] for k in ("unmask_weight", *fft)}
        if not head["fft_weight"]:
            values = {k: v for k, v in values.items() if k not in fft[1:]}  # dead
    return values


def finetuning_values(ref: dict) -> dict[str, Any]:
    train = {step["type"]: step for step in ref["train_pipeline"]}
    val = {step["type"]: step for step in ref["val_pipeline"]}
    loss, alpha = ref["head"]["loss"], ref["mix"]["alpha"] or [0.0, 0.0]
    assert ref["mix"]["mix_mode"] in (None, ["mixup", "cutmix"])
    policy = train.get("RandAugment")
    values: dict[str, Any] = {
        "method": "linear" if ref["backbone"].get("frozen_stages", -1) == 4 else "finetune",
        "aug": "swin" if "RandAugment_timm" in train else "rsb" if policy else "plain",
        "train_size": train["RandAugment_timm"]["input_size"]
        if "RandAugment_timm" in train
        else train["RandomResizedCrop"]["size"],
        "val_resize": val["Resize"]["size"],
        "val_crop": val["CenterCrop"]["size"],
        "repeated_aug": ref["sampler"] == "RepeatAugSampler",
        "bce": bool(loss.get("use_sigmoid")),
        "mixup": alpha[0],
        "cutmix": alpha[1],
        "nb_classes": ref["head"]["num_classes"],
        "layer_decay": ref["optimizer"].get("layer_decay"),
        "ema": ref.get("ema", {}).get("momentum", 0.0),
    }
    if policy:
        values["ra_level"] = policy["magnitude_level"]
        assert (policy["num_policies"], policy["total_level"], policy["magnitude_std"]) == (2, 10, 0.5)
    if not values["bce"]:
        values["smoothing"] = loss["label_smooth_val"] if loss["type"] == "LabelSmoothLoss" else 0.0
    if "ema" in ref:
        assert (ref["ema"]["warmup"], ref["ema"]["warmup_ratio"]) == ("linear", 0.9)
        values |= {f"ema_{k}": ref["ema"][k] for k in ("warmup_iters", "update_interval")}
    return values


@golden_files("a2mim", "configs", ".json")
def test_configurations_match_upstream(path):
    cases = load_golden(path)["configs"]
    assert cases
    for name, ref in cases.items():
        args = vars(parsed(name))
        own = pretraining_values(ref) if "/pretrain/" in name else finetuning_values(ref)
        expected = shared_values(ref) | own | DECIDED.get(name, {})
        for key, value in expected.items():
            wanted = pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
            assert args[key] == wanted, f"{name}: {key}"
        gpus = 8 if name in DECIDED else ref["gpus"]
        images = gpus * args["batch_size"] * args["accum_iter"]
        assert images == (2048 if name in DECIDED else ref["effective_batch"]), name
        if args.get("layer_decay"):
            cfg = optim.optimizer_cfg(argparse.Namespace(**args))
            assert cfg["model_type"] == ref["optimizer"]["model_type"], name


@golden_files("a2mim", "configs", ".json")
def test_configurations_are_complete(path):
    """Every file of upstream's is there, under its path and for the main that its kind needs."""
    cases = load_golden(path)["configs"]
    assert set(cases) <= set(FILES)
    for name in cases:
        kind = "main_pretrain.py" if "/pretrain/" in name else "main_finetune.py"
        kind = "main_linprobe.py" if "_linear_" in name else kind
        assert main_of(str(ROOT / "a2mim" / name)) is MAINS[kind], name


@golden_files("a2mim", "extract_backbone", ".json")
def test_extraction_matches_upstream(path):
    ref = load_golden(path)
    state = {key: torch.full((1,), float(i)) for i, key in enumerate(ref["input_keys"])}
    found = extract_encoder({"meta": {}, "state_dict": state})
    assert list(found) == ref["output_keys"]
    assert extract_encoder(state) == found, "weights without a checkpoint around them"


# ---- every file


@pytest.mark.parametrize("name", FILES)
def test_every_file_fits(name):
    """Literals alone, of known flags; its schedule and masks fit; method and GPUs are those of path and name."""
    path = str(ROOT / "a2mim" / name)
    values, args = config.read(path), parsed(name)
    assert len(values) > 15
    optim.check_schedule(optim.lr_config(args))
    assert f"ep{args.epochs}" in name
    if "/pretrain/" in name:
        assert f"/{args.method}/" in name
        assert main_pretrain.build_masking(args).scale * args.model_patch_size == args.mask_patch_size
        assert values["model_patch_size"] == args.model_patch_size
    stem = Path(name).stem
    if "accu2" in stem:
        assert args.accum_iter == 2
    batch = next(part for part in stem.split("_") if "xb" in part)
    assert args.batch_size == int(batch.split("xb")[1])


# ---- reading


def written(tmp_path: Path, text: str, name: str = "own.py") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_read(tmp_path):
    text = '"""Words."""\n\n# more\nmethod = "a2mim"\nbetas = [0.9, 0.95]\nclip_grad = None\n'
    text += "lr = -1e-3  # why\na = (1, {})\n"
    expected = {"method": "a2mim", "betas": [0.9, 0.95], "clip_grad": None, "lr": -1e-3, "a": (1, {})}
    assert config.read(written(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("lr = open({target!r}, 'w').write('x')", 2),
        ("__import__('os').system('touch {target}')", 2),
        ("import os", 2),
        ("lr = 0.1 * 8", 2),
        ("lr = base_lr", 2),
        ("lr = f'{{1}}'", 2),
        ("lr, epochs = 1, 2", 2),
        ("lr = epochs = 1", 2),
        ("args.lr = 1", 2),
        ("lr += 1", 2),
        ("lr: float = 0.1", 2),
        ("if True:\n    lr = 1", 2),
        ("_base_ = ['a.py'] + []", 2),
        ("lr = = 3", 2),
        ("betas = [0.9,\n", 2),
    ],
)
def test_read__refuses_what_is_no_literal(tmp_path, line, number):
    """In one line that names the line; nothing is executed."""
    target = tmp_path / "written"
    path = written(tmp_path, "epochs = 1\n" + line.format(target=str(target)) + "\n")
    with pytest.raises(UserError) as error:
        config.read(path)
    assert str(error.value).startswith(f"{path}: line {number}: expected ")
    assert "\n" not in str(error.value)
    assert not target.exists()


def test_read__missing_and_unreadable_files(tmp_path):
    for path in (str(tmp_path / "nowhere.py"), str(tmp_path)):
        with pytest.raises(UserError, match="cannot be read") as error:
            config.read(path)
        assert str(error.value).startswith(path)
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00 = 1")
    with pytest.raises(UserError, match="expected assignments") as error:
        config.read(str(tmp_path / "binary.py"))
    assert "\n" not in str(error.value)


# ---- precedence


def test_file_is_overridden_by_flags_and_those_by_options(tmp_path):
    path = written(
        tmp_path, 'method = "a2mim"\nlr = 1.0\nepochs = 7\nsteps = [3, 4]\nfft_focal = False\nbetas = (0.5, 0.6)'
    )
    args = parsed(path)
    assert (args.lr, args.epochs, args.steps, args.fft_focal, args.betas) == (1.0, 7, [3, 4], False, [0.5, 0.6])
    assert args.weight_decay == 0.05, "what the file leaves out is the flag's default"
    args = parsed(path, "--lr", "2", "--fft_focal", "true", "--steps")
    assert (args.lr, args.epochs, args.fft_focal, args.steps) == (2.0, 7, True, [])
    args = parsed(path, "--lr", "2", "--cfg-options", "optimizer.lr=3", "epochs=9", "steps=[1]")
    assert (args.lr, args.epochs, args.steps) == (3.0, 9, [1])


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        ("data.imgs_per_gpu.batch_per_gpu=3", "batch_size", 3),
        ("data.imgs_per_gpu=32", "batch_size", 32),
        ("data.workers_per_gpu=2", "num_workers", 2),
        ("runner.max_epochs=5", "epochs", 5),
        ("optimizer_config.update_interval=4", "accum_iter", 4),
        ("lr_config.warmup_iters=3", "warmup_epochs", 3),
        ("model.backbone.depth=101", "backbone", "resnet101"),
        ("accum=4", "accum_iter", 4),
        ("accum_iter=5", "accum_iter", 5),
        ("clip_grad=None", "clip_grad", None),
        ("clip_grad=2.5", "clip_grad", 2.5),
        ("amp=False", "amp", False),
        ("backbone=vit_small", "backbone", "vit_small"),
        ("backbone='vit_small'", "backbone", "vit_small"),
        ("betas=(0.8,0.9)", "betas", [0.8, 0.9]),
        ("deterministic=True", "deterministic", True),
        ("paramwise=[('bias', {'weight_decay': 0})]", "paramwise", [("bias", {"weight_decay": 0.0})]),
        ("resume=a.pth", "resume", "a.pth"),
        ("work_dir=runs/x", "output_dir", "runs/x"),
    ],
)
def test_cfg_options(option, name, value):
    assert getattr(parsed(ONE, "--cfg-options", option), name) == value


def test_upstreams_flags():
    args = parsed(ONE, "--seed", "0", "--launcher", "pytorch", "--local_rank", "0", "--gpus", "1", "--auto_resume")
    assert args.seed == 0
    assert parsed(ONE, "--gpu_ids", "0", "1", "--port", "1", "--diff-seed", "--deterministic").deterministic
    assert parsed(ONE, "--resume_from", "a.pth").resume == parsed(ONE, "--resume", "a.pth").resume == "a.pth"
    assert parsed(ONE, "--pretrained", "b.pth").pretrained == "b.pth"
    with pytest.raises(UserError, match="--pretrained and --load_checkpoint: expected one of them"):
        parsed(ONE, "--pretrained", "b.pth", "--load_checkpoint", "c.pth")


def test_parsing_twice_is_parsing_once():
    parser = main_pretrain.get_args_parser()
    path = str(ROOT / "a2mim" / ONE)
    assert config.parse_args(parser, [path]) == config.parse_args(main_pretrain.get_args_parser(), [path])
    with pytest.raises(SystemExit):  # argparse's own complaint, not the file's
        config.parse_args(parser, [path, "--lr", "much"])


# ---- mistakes

MISTAKES = [
    ("learning_rate = 1", "learning_rate is no flag of this script, see --help"),
    ("config = 'other.py'", "config is no flag of this script"),
    ("cfg_options = ['lr=1']", "cfg_options is no flag of this script"),
    ("lr = 'much'", "argument --lr: invalid float value: 'much'"),
    ("epochs = 1.5", "argument --epochs: invalid int value: '1.5'"),
    ("epochs = [1, 2]", "argument --epochs: invalid int value"),
    ("betas = [0.9]", "argument --betas: expected 2 arguments"),
    ("betas = 0.9", "argument --betas: expected 2 arguments"),
    ("sched = 'poly'", "argument --sched: invalid choice: 'poly'"),
    ("amp = 'perhaps'", "argument --amp: perhaps: expected true or false"),
    ("paramwise = [('bias', 0)]", "argument --paramwise: [('bias', 0)]: expected [(\"pattern\""),
    ("paramwise = 'open(1)'", 'argument --paramwise: open(1): expected [("pattern"'),
    ("paramwise = [('(', {'weight_decay': 0})]", "argument --paramwise: [('(', {'weight_decay': 0})]: expected"),
    ("paramwise = [('bias', {'decay': 0})]", "argument --paramwise: [('bias', {'decay': 0})]: expected"),
    ("deterministic = 3", "deterministic 3: expected True or False"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistakes_in_a_file(tmp_path, line, words):
    path = written(tmp_path, f'method = "a2mim"\n{line}\n')
    with pytest.raises(UserError) as error:
        parsed(path)
    assert str(error.value).startswith(f"{path}: {words}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("lr", "--cfg-options lr: expected name=value"),
        ("rate=1", "--cfg-options: rate is no flag of this script"),
        ("model.lr=much", "--cfg-options: argument --lr: invalid float value"),
        ("lr=open('x')", "--cfg-options: argument --lr: invalid float value"),
        ("epochs=2.5", "--cfg-options: argument --epochs: invalid int value"),
    ],
)
def test_mistakes_in_cfg_options(option, words):
    with pytest.raises(UserError) as error:
        parsed(ONE, "--cfg-options", option)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("name", ["pin_mem", "no_pin_mem"])
def test_switches_mean_what_they_say(name, value, tmp_path):
    """Also those that turn something off."""
    path = written(tmp_path, f'method = "a2mim"\n{name} = {value}\n')
    assert parsed(path).pin_mem == (value if name == "pin_mem" else not value)
    assert parsed(ONE, "--cfg-options", f"{name}={value}").pin_mem == (value if name == "pin_mem" else not value)


@pytest.mark.parametrize("name", ["switch", "number"])
@pytest.mark.parametrize("value", ["None", "False"])
def test_values_that_are_off(tmp_path, name, value):
    """False switches a flag off; a number's is no number; None is a value where it is the flag's default."""
    flag = {"switch": "deterministic", "number": "lr"}[name]
    path = written(tmp_path, f'method = "a2mim"\n{flag} = {value}\n')
    if name == "number" and value == "False":
        with pytest.raises(UserError, match="argument --lr: invalid float value: 'False'"):
            parsed(path)
    elif value == "None":
        with pytest.raises(UserError, match=f"{flag} None: expected a value"):
            parsed(path)
        assert parsed(written(tmp_path, 'method = "a2mim"\nclip_grad = None\n')).clip_grad is None
    else:
        assert getattr(parsed(path), flag) in (None, False)


@pytest.mark.parametrize("line", ["lr = open({0!r}, 'w').write('x')", "rate = 1", "lr = 'much'"])
def test_mistakes_end_a_script_in_one_line(tmp_path, line, capsys):
    target = tmp_path / "written"
    path = written(tmp_path, f'method = "a2mim"\n{line.format(str(target))}\n')
    parser = main_pretrain.get_args_parser()
    with pytest.raises(SystemExit) as end, kept_signals():
        distributed.run(main_pretrain.main, lambda: config.parse_args(parser, [path]))
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert path in error
    assert error.count("\n") == 1, error
    assert not target.exists()


# ---- the script, the folder


def test_script(capsys, monkeypatch, tmp_path):
    path = str(ROOT / "a2mim" / ONE)
    assert config.script(["--seed", "0", path]) == str(ROOT / "a2mim" / "main_pretrain.py")
    for method, main in config.MAINS.items():
        own = written(tmp_path, f"method = {method!r}")
        assert config.script([own]) == str(ROOT / "a2mim" / main)
    monkeypatch.setattr(sys, "argv", ["tools/train.py"])
    nothing, other = [], [written(tmp_path, "method = 'moco'")]
    missing = [str(tmp_path / "nowhere.py")]
    for argv, words in (
        (nothing, "expected a configuration"),
        (other, "method moco: expected"),
        (missing, "cannot be"),
    ):
        with pytest.raises(SystemExit) as end:
            config.script(argv)
        assert words in str(end.value.code)
        assert str(end.value.code).startswith("train.py: ")
        assert "\n" not in str(end.value.code)


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("configs/openmixup/pretrain/a2mim/imagenet/x_ep100.py", "work_dirs/openmixup/x_ep100"),
        ("configs/x.py", "work_dirs/x"),
        ("x.py", "work_dirs/x"),
    ],
)
def test_work_dir(path, folder):
    """Upstream's: work_dirs, the second folder of the path, the file's name."""
    assert config.work_dir(path) == folder


def test_work_dir__is_that_of_the_flags():
    assert parsed(ONE).output_dir.endswith("r50_l3_sz224_init_8xb256_cos_ep100")
    assert parsed(ONE).output_dir.startswith("work_dirs/")
    assert parsed(ONE, "--work_dir", "a").output_dir == parsed(ONE, "--output_dir", "a").output_dir == "a"
    assert config.parse_args(main_finetune.get_args_parser(), ["--output_dir", ""]).output_dir == ""


@pytest.mark.parametrize("main", MAINS.values(), ids=MAINS)
def test_no_configuration(main, capsys):
    """Flags alone will do, in a folder of their own or in one to be named."""
    try:
        args = config.parse_args(main.get_args_parser(), ["--epochs", "3"])
    except UserError as error:
        assert "--work_dir" in str(error) or "--output_dir" in str(error)
    else:
        assert args.epochs == 3
        assert isinstance(args.output_dir, str)
    with pytest.raises(SystemExit) as end:
        config.parse_args(main.get_args_parser(), ["--print_config"])
    assert end.value.code == 0
    assert "epochs = " in capsys.readouterr().out


def test_names_of_a_runs_files():
    args = parsed(ONE)
    files = run_files(args, iters_per_epoch=626)
    assert (files.latest, files.numbered, files.keep_all, files.every, files.weights) == (
        "latest.pth",
        "epoch_{done}.pth",
        False,
        10,
        "state_dict",
    )
    assert callable(files.values)
    found = files.values(distributed.Position(epoch=3, images=4 * args.batch_size))
    assert found == {"meta": {"epoch": 3, "iter": 3 * 626 + 4, "seed": args.seed, "exp_name": Path(ONE).name}}


# ---- --print_config


@pytest.mark.parametrize("name", FILES[::6] + [ONE])
def test_printed_configurations_are_read_again(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(name, "--print_config", "--seed", "5", "--clip_grad", "3")
    assert end.value.code == 0
    text = capsys.readouterr().out
    path = written(tmp_path, text)
    first, second = vars(parsed(name, "--seed", "5", "--clip_grad", "3")), vars(parsed(path))
    left_out = {"config", "print_config", "cfg_options"}
    assert {k: v for k, v in first.items() if k not in left_out} == {
        k: v for k, v in second.items() if k not in left_out
    }
    assert (second["seed"], second["clip_grad"]) == (5, 3.0)


def test_print_config__shows_what_has_an_effect(capsys):
    with pytest.raises(SystemExit):
        parsed(ONE, "--print_config")
    names = [line.split(" = ")[0] for line in capsys.readouterr().out.splitlines()]
    assert len(names) == len(set(names))
    assert {"method", "batch_per_gpu", "accum", "lr", "paramwise", "mask_replace"} <= set(names)
    assert not {"config", "print_config", "cfg-options", "port", "gpus", "launcher", "auto_resume"} & set(names)


# ---- extraction of encoders


def test_extraction__prefixes_and_what_is_left_out():
    keys = {
        "module.backbone.a": "a",
        "encoder_q.b.weight": "b.weight",  # upstream makes q.b.weight of it
        "base_encoder.c": "c",
        "encoder.d": "d",
        "timm_model.e": "e",
        "backbone.timm_model.f": "f",
        "backbone.encoder_momentum.g": None,
        "neck.decoder.0.weight": None,
        "head.fc.weight": None,
        "ema_backbone_a": None,
    }
    state = {key: torch.full((2,), float(i)) for i, key in enumerate(keys)}
    found = extract_encoder({"state_dict": state})
    assert list(found) == [new for new in keys.values() if new]
    for key, new in keys.items():
        assert new is None or torch.equal(found[new], state[key])
    with pytest.raises(ValueError, match="holds no encoder"):
        extract_encoder({"state_dict": {"neck.a": torch.zeros(1)}})


def test_extraction__as_a_script(tmp_path, capsys):
    source, target = tmp_path / "epoch_100.pth", tmp_path / "new" / "encoder.pth"
    torch.save({"meta": {}, "state_dict": {"backbone.a": torch.ones(2), "neck.b": torch.ones(1)}}, source)
    run_main(extract_backbone_weights, str(source), str(target))
    assert capsys.readouterr().out == f"{target}: 1 tensors\n"
    assert list(target.parent.iterdir()) == [target]
    saved = torch.load(target, weights_only=True)
    assert set(saved) == {"state_dict", "author"}
    assert saved["author"] == "openmixup"
    assert list(saved["state_dict"]) == ["a"]
    assert torch.equal(saved["state_dict"]["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("epoch_1.pth", "encoder.pt"), "expected a name that ends in .pth"),
        (("nowhere.pth", "encoder.pth"), "no such checkpoint file"),
        (("empty.pth", "encoder.pth"), "holds no encoder"),
        (("epoch_1.pth", "epoch_1.pth/encoder.pth"), "cannot be written"),
    ],
)
def test_extraction__mistakes_end_in_one_line(tmp_path, names, words, capsys):
    for name, key in (("epoch_1.pth", "backbone.a"), ("empty.pth", "neck.a")):
        torch.save({"state_dict": {key: torch.ones(1)}}, tmp_path / name)
    line = mistake(extract_backbone_weights, *(str(tmp_path / name) for name in names), capsys=capsys)
    assert words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.pth", "epoch_1.pth"]
