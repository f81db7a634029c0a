"""Mistakes of users on the command line: one line, exit status 2, nothing written."""

import pytest
import torch
from torch import nn

from a2mim import main_finetune, main_linprobe, main_pretrain
from tests.support.a2mim_runs import CASES, EVAL, SMALL, UNEVEN, state_of
from tests.support.runs import mistake, run_main

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linear": main_linprobe}
BASES = {
    "pretrain": CASES["resnet"][2],
    "vit": CASES["vit"][2],
    "finetune": CASES["finetune"][2],
    "finetune_vit": CASES["finetune_vit"][2],
    "linear": [*SMALL, *UNEVEN, *EVAL],
}
ENCODER = "--backbone vit_nano --patch_size 8"
BAD = [
    ("pretrain", "--data_path /nowhere", "--data_path /nowhere: no such folder"),
    ("pretrain", "--data_path EMPTY", "has no class folders and no images"),
    ("pretrain", "--data_path HOLLOW", "has no class folders and no images"),
    ("finetune", "--data_path HOLLOW", "class folder without images; it is empty"),
    ("finetune", "--data_path EMPTY", "has no folder train/, expected"),
    ("finetune", "--data_path FLAT", "has 1 images but no class folders"),
    ("pretrain", "--dataset digits", "--dataset digits: expected one of torch/..."),
    ("pretrain", "--backbone resnet51", "--backbone resnet51: expected one of vit_small, vit_base, "),
    ("finetune", "--backbone resnet51", "resnet51: expected one of vit_small, vit_base, "),
    ("pretrain", "--backbone mae_vit_base", "--backbone mae_vit_base: is for fine-tuning only"),
    ("pretrain", "--mask_patch_size 24", "expected each to be a multiple of the next"),
    ("pretrain", "--mask_patch_size 8", "expected each to be a multiple of the next"),
    ("pretrain", "--mask_patch_size 0", "--mask_patch_size 0: expected at least 1"),
    ("pretrain", "--model_patch_size 8", "resnet_nano has features of 16 pixels at --mask_layer 3"),
    ("pretrain", "--mask_layer 4", "mask_layer 4: expected 0 to 3"),
    ("pretrain", "--mask_layer -1", "mask_layer -1: expected 0 to 3"),
    ("vit", "--mask_layer 4", "mask_layer 4: expected 0 to 3"),
    ("vit", "--patch_size 7", "expected each to be a multiple of the next"),
    ("vit", "--patch_size 0", "--patch_size 0: expected at least 1"),
    ("vit", "--input_size 68", "expected each to be a multiple of the next"),
    ("pretrain", "--input_size 0", "--input_size 0: expected at least 1"),
    ("pretrain", "--input_size 80 --mask_patch_size 16", "--input_size 80"),
    ("pretrain", "--mask_ratio 0", "--mask_ratio 0.0: expected"),
    ("pretrain", "--mask_ratio 1.5", "--mask_ratio 1.5: expected"),
    ("pretrain", "--mask_init -1", "--mask_init -1.0: expected at least 0"),
    ("pretrain", "--crop_scale 0.9 0.1", "--crop_scale [0.9, 0.1]: expected two shares"),
    ("pretrain", "--crop_scale 0 1", "--crop_scale [0.0, 1.0]: expected two shares"),
    ("pretrain", "--fft_weight -1", "--fft_weight -1.0: expected at least 0"),
    ("pretrain", "--fft_unmask_weight 2", "--fft_unmask_weight 2.0: expected 0 to 1"),
    ("pretrain", "--focal_alpha nan", "--focal_alpha nan: expected"),
    ("pretrain", "--focal_gamma -1", "--focal_gamma -1.0: expected"),
    ("pretrain", "--batch_size 0", "--batch_size 0: expected at least 1"),
    ("finetune", "--batch_per_gpu 0", "0: expected at least 1"),
    ("pretrain", "--accum 0", "0: expected at least 1"),
    ("pretrain", "--accum 8", "8: an epoch has only 7 batches"),
    ("pretrain", "--epochs 0", "--epochs 0: expected at least 1"),
    ("pretrain", "--warmup_ratio -1", "--warmup_ratio -1.0: expected 0 to 1"),
    ("pretrain", "--sched step", "--sched step: needs the epochs of --steps"),
    ("linear", "--sched step --steps", "--sched step: needs the epochs of --steps"),
    ("pretrain", "--sched step --steps 1 --gamma -1", "--gamma -1.0: expected"),
    ("pretrain", "--betas 0.9 1.0", "--betas 0.9 1.0: "),
    ("finetune", "--betas 2 0.9", "--betas 2.0 0.9: "),
    ("pretrain", "--eps -1", "--eps -1.0: expected"),
    ("linear", "--momentum -1", "--momentum -1.0: expected 0 to 1"),
    ("pretrain", "--lr nan", "--lr nan: expected 0 to"),
    ("pretrain", "--lr -1", "--lr -1.0: expected 0 to"),
    ("pretrain", "--clip_grad 0", "--clip_grad 0.0: expected"),
    ("pretrain", "--device cuda", "--device cuda: no CUDA device"),
    ("pretrain", "--amp_dtype fp16", "--amp_dtype fp16: needs a GPU"),
    ("pretrain", "--seed -1", "--seed -1: expected"),
    ("pretrain", "--num_workers -1", "--num_workers -1: expected at least 0"),
    ("pretrain", "--save_every 0", "--save_every 0: expected at least 1"),
    ("pretrain", "--work_dir /proc/nowhere", "--output_dir /proc/nowhere: cannot be written"),
    ("pretrain", "--work_dir FILE", "cannot be written"),
    ("pretrain", "--resume_from missing.pth", "missing.pth: no such checkpoint file"),
    ("pretrain", "--resume /etc/hostname", "/etc/hostname: not a checkpoint"),
    ("pretrain", "--resume TRUNCATED", "truncated or not a checkpoint"),
    ("pretrain", "--resume VIT", "'model' does not fit this run"),
    ("pretrain", "--load_checkpoint VIT", "tensors are missing"),
    ("pretrain", "--load_checkpoint TRUNCATED", "truncated or not a checkpoint"),
    ("pretrain", "--load_checkpoint missing.pth", "missing.pth: no such checkpoint file"),
    ("pretrain", "--pretrained VIT", "is not this encoder"),
    ("pretrain", "--pretrained VIT --load_checkpoint VIT", "--pretrained and --load_checkpoint: expected one of them"),
    ("finetune", "--pretrained missing.pth", "missing.pth: no such checkpoint file"),
    ("finetune", "--pretrained /etc/hostname", "/etc/hostname: not a checkpoint"),
    ("finetune", "--pretrained TRUNCATED", "truncated or not a checkpoint"),
    ("finetune", "--pretrained VIT", "is not this encoder"),
    ("finetune", "--pretrained FOREIGN", "is not this encoder"),
    ("finetune", "--pretrained LIST", "holds a list, expected a checkpoint"),
    ("finetune", "--pretrained RESNET --backbone resnet18", "is not this encoder"),
    ("finetune_vit", f"--pretrained VIT {ENCODER} --backbone vit_tiny", "is not this encoder"),
    ("finetune_vit", "--pretrained DEEPER", "is not this encoder"),
    ("finetune_vit", "--pretrained SHALLOWER", "is not this encoder"),
    ("finetune_vit", "--pretrained RESNET", "is not this encoder"),
    ("finetune", "--load_checkpoint RESNET", "tensors are missing"),
    ("finetune", "--nb_classes 3", "--nb_classes 3: the training images have 10 classes"),
    ("finetune", "--nb_classes -1", "--nb_classes -1: expected 0 to"),
    ("linear", "--nb_classes 9", "--nb_classes 9: the training images have 10 classes"),
    ("finetune_vit", "--val_crop 40", "--val_crop 40: a ViT is evaluated at its --train_size 32"),
    ("finetune_vit", "--train_size 30 --val_crop 30", "--train_size 30"),
    ("finetune", "--val_crop 0", "--val_crop 0: expected at least 1"),
    ("finetune", "--ra_level 11", "--ra_level 11: expected"),
    ("finetune", "--drop_path 1.5", "--drop_path 1.5: expected 0 to 1"),
    ("finetune", "--smoothing 2", "--smoothing 2.0: expected 0 to 1"),
    ("finetune", "--mixup -1", "--mixup -1.0: expected 0 to"),
    ("finetune", "--ema 2", "--ema 2.0: expected 0 to 1"),
    ("finetune", "--ema_update_interval 0", "--ema_update_interval 0: expected at least 1"),
    ("finetune", "--ema_warmup_iters -1", "--ema_warmup_iters -1: expected at least 0"),
    ("finetune_vit", "--layer_decay 0", "--layer_decay 0.0: expected"),
    ("finetune", "--layer_decay 0.5", "--layer_decay 0.5"),
    ("finetune", "--eval", "--eval: name the checkpoint to evaluate with --resume"),
    ("finetune", "--eval --resume missing.pth", "missing.pth: no such checkpoint file"),
    ("finetune", "--eval --resume RESNET", "tensors are missing"),
    ("linear", "--pretrained /etc/hostname", "/etc/hostname: not a checkpoint"),
    ("linear", "--eval", "--eval: name the checkpoint to evaluate with --resume"),
    ("pretrain", "missing.py", "missing.py: cannot be read (No such file or directory)"),
    ("pretrain", "UNKNOWN", "depth is no flag of this script, see --help"),
    ("pretrain", "CALL", "line 1: expected name = value, a number, text, list ..."),
    ("pretrain", "SYNTAX", "line 2: expected assignments, name = value"),
    ("pretrain", "WRONG", "argument --batch_per_gpu/--batch_size: invalid int value: 'many'"),
    ("pretrain", "CHOICE", "invalid choice: 'l3'"),
    ("pretrain", "/etc/hostname", "/etc/hostname: line 1: expected "),
    ("pretrain", "--cfg-options model.depth=3", "--cfg-options: depth is no flag of this script"),
    ("pretrain", "--cfg-options epochs", "--cfg-options epochs: expected name=value"),
    ("pretrain", "--cfg-options epochs=many", "invalid int value: 'many'"),
]


@pytest.fixture(scope="module")
def files(reference, tmp_path_factory) -> dict[str, str]:
    """What the mistakes name in capitals."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("EMPTY", "HOLLOW/train/0", "FLAT/train", "FLAT/val"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "val"):
        (folder / "FLAT" / split / "0.png").touch()
    texts = {"UNKNOWN": "depth = 3", "CALL": "epochs = int('3')", "SYNTAX": "epochs = 3\nfor", "FILE": ""}
    for name, text in {**texts, "WRONG": "batch_size = 'many'", "CHOICE": "loss = 'l3'"}.items():
        (folder / name).write_text(text + "\n")
    vit, net = (state_of(reference(case)) for case in ("vit", "resnet"))
    data = (reference("vit") / "latest.pth").read_bytes()
    (folder / "TRUNCATED").write_bytes(data[: len(data) // 2])
    layers = {k: v for k, v in vit["state_dict"].items() if k.startswith("backbone.layers.3")}
    deeper = {k.replace("layers.3", "layers.4"): v for k, v in layers.items()}
    checkpoints = {"VIT": vit, "RESNET": net, "LIST": [1], "FOREIGN": {"model": nn.Linear(2, 2).state_dict()}}
    checkpoints["DEEPER"] = {"state_dict": vit["state_dict"] | deeper}
    checkpoints["SHALLOWER"] = {"state_dict": {k: v for k, v in vit["state_dict"].items() if k not in layers}}
    for name, state in checkpoints.items():
        torch.save(state, folder / name)
    names = [path.name for path in folder.iterdir()]
    return {name: str(folder / name) for name in names}


@pytest.mark.parametrize(("script", "own", "expected"), BAD, ids=[f"{script} {own}" for script, own, _ in BAD])
def test_mistakes_are_one_line(script, own, expected, tmp_path, digits, files, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [files.get(word, word) for word in own.split()]
    first = [word for word in words[:1] if not word.startswith("-")]  # a configuration
    given = ["--data_path", digits, "--work_dir", str(tmp_path / "out")]
    main = MAINS["pretrain" if script == "vit" else script.removesuffix("_vit")]
    base = BASES[script] if not first else [word for word in BASES[script] if word != "--loss"]
    base = [word for word in base if word != "focal_l1"] if first else base
    error = mistake(main, *first, *base, *given, *words[len(first) :], capsys=capsys)
    assert expected in error
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(
    ("script", "own", "expected"),
    [
        ("pretrain", ["--method", "mae"], "--method: invalid choice: 'mae'"),
        ("pretrain", ["--loss", "l3"], "--loss: invalid choice: 'l3'"),
        ("pretrain", ["--mask_color", "red"], "--mask_color: invalid choice: 'red'"),
        ("pretrain", ["--mask_token", "ones"], "--mask_token: invalid choice: 'ones'"),
        ("pretrain", ["--betas", "0.9"], "--betas: expected 2 arguments"),
        ("pretrain", ["--sync_bn", "maybe"], "maybe: expected true or false"),
        ("pretrain", ["--paramwise", "bias"], "bias: expected [("),
        ("pretrain", ["--paramwise", '[("bias[", {"weight_decay": 0})]'], '"weight_decay": 0})]: expected [('),
        ("pretrain", ["--paramwise", '[("bias", {"weight_decy": 0})]'], '"weight_decy": 0})]: expected [('),
        ("finetune", ["--aug", "beit"], "--aug: invalid choice: 'beit'"),
        ("finetune", ["--mask_ratio", "0.6"], "unrecognized arguments: --mask_ratio"),
        ("finetune", ["--mix", "0.8"], "unrecognized arguments: --mix"),
    ],
)
def test_unknown_flags_and_choices(script, own, expected, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(MAINS[script], *BASES[script], *own)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 2  # usage, and what is wrong
