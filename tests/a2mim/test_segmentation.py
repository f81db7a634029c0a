"""A2MIM's segmentation: heads against the library that the authors use, recipes, and runs of the program."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from a2mim import config, main_segmentation
from a2mim.backbones import BACKBONES
from a2mim.engine_segmentation import resized, segmentation_loss
from a2mim.losses import MIMLoss
from a2mim.main_segmentation import build_optimizer, get_args_parser, param_groups
from a2mim.models_a2mim import MaskedImageModel
from a2mim.models_segmentation import MODELS, FCNHead, UPerHead
from a2mim.openmixup import to_openmixup_state_dict
from tests.support.dense import masked_images
from tests.support.helpers import ROOT, golden_files, load_golden, tolerance
from tests.support.processes import launch
from tests.support.runs import FAULTS, mistake, run_main, spoil

SCRIPT = "a2mim/main_segmentation.py"
CONFIGS = ROOT / "a2mim" / "seg_mmsegmentation" / "configs" / "ade20k"


# ---- networks


def head_of(settings: dict[str, Any]) -> UPerHead | FCNHead:
    kwargs: dict[str, Any] = {key: settings[key] for key in ("in_channels", "channels", "num_classes")}
    kwargs["dropout"] = settings["dropout_ratio"]
    if settings["type"] == "UPerHead":
        return UPerHead(**kwargs, pool_scales=settings["pool_scales"])
    return FCNHead(**kwargs, num_convs=settings["num_convs"], concat_input=settings["concat_input"])


def check_heads(path) -> None:
    """Losses and gradients by batch statistics, then logits by running ones."""
    ref = load_golden(path)
    names = [name for name in ("decode_head", "auxiliary_head") if ref.meta[name]]
    heads = nn.ModuleDict({name: head_of(ref.meta[name]) for name in names})
    heads.load_state_dict(ref.weights)
    maps = [ref[f"in/feat{i}"].requires_grad_() for i in range(len(ref.group("in")) - 1)]

    def logits() -> list[torch.Tensor]:
        index = [ref.meta[name]["in_index"] for name in names]
        seen = [[maps[i] for i in n] if isinstance(n, list) else maps[n] for n in index]
        return [head(x) for head, x in zip(heads.values(), seen, strict=True)]

    weights = [ref.meta[name]["loss_decode"]["loss_weight"] for name in names]
    losses = segmentation_loss(logits(), ref["in/labels"], *weights[1:])
    ref.check("out/loss/total", losses["loss"], **tolerance(ref))
    ref.check("out/loss/decode.loss_ce", losses["loss_decode"], **tolerance(ref))
    ref.check("out/loss/decode.acc_seg", losses["pixel_acc"], **tolerance(ref))
    if len(names) > 1:
        ref.check("out/loss/aux.loss_ce", weights[1] * losses["loss_auxiliary"], **tolerance(ref))
        accuracy = segmentation_loss(logits()[1:], ref["in/labels"])["pixel_acc"]
        ref.check("out/loss/aux.acc_seg", accuracy, **tolerance(ref))
    losses["loss"].backward()
    for name, p in heads.named_parameters():
        ref.check(f"out/grad/{name}", p.grad, **tolerance(ref), what=name)
    for i, x in enumerate(maps):
        if x.grad is not None:
            ref.check(f"out/grad_feat{i}", x.grad, **tolerance(ref), what=f"map {i}")
    heads.load_state_dict(ref.weights)
    heads.eval()
    outputs = logits()
    ref.check("out/logits", outputs[0], **tolerance(ref))
    ref.check("out/logits_full", resized(outputs[0], ref["in/labels"].shape[1:]), **tolerance(ref))
    if len(names) > 1:
        ref.check("out/aux_logits", outputs[1], **tolerance(ref))


@golden_files("a2mim", "seg_loss_uper")
def test_upernet_heads(path):
    check_heads(path)


@golden_files("a2mim", "seg_loss_fcn")
def test_convolutional_heads(path):
    check_heads(path)


@pytest.mark.parametrize("name", ["upernet_vit_nano", "fcn_resnet_nano"])
def test_outputs(name):
    kwargs = {"img_size": 64} if "vit" in name else {}
    network = MODELS[name](num_classes=7, **kwargs)
    images = torch.randn(2, 3, 64, 64)
    side, auxiliary = (16, 4) if "vit" in name else (8, 8)
    assert [x.shape for x in network(images)] == [(2, 7, side, side), (2, 7, auxiliary, auxiliary)]
    assert [x.shape for x in network.eval()(images)] == [(2, 7, side, side)]


def test_names_and_sizes():
    """Those of mmseg, of whose networks the authors' checkpoints are."""
    with torch.device("meta"):
        network = MODELS["fcn_resnet50"]()
    keys = set(network.state_dict())
    assert {"backbone.conv1.weight", "backbone.layer3.5.bn2.running_var", "decode_head.conv_cat.bn.bias"} <= keys
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    # 3 x 3 of 2048, of 512 and of both channels, and 1 x 1
    head = 9 * 512 * (2048 + 512 + 2560) + 3 * 2 * 512 + 513 * 150
    assert parts == {"backbone": 23_508_032, "decode_head": head, "auxiliary_head": 9 * 1024 * 256 + 512 + 257 * 150}
    keys = set(MODELS["upernet_vit_nano"](img_size=64).state_dict())
    expected = {
        "backbone.cls_token",
        "backbone.layers.3.ln2.bias",
        "backbone.layers.0.attn.relative_position_bias_table",
    }
    expected |= {"neck.upsample_4x.3.weight", "neck.upsample_2x.0.bias", "decode_head.psp_modules.3.1.bn.weight"}
    expected |= {"auxiliary_head.convs.0.conv.weight", "auxiliary_head.conv_seg.weight", "backbone.layers.0.gamma_1"}
    assert expected <= keys and "backbone.pos_embed" not in keys


# ---- recipes


def parsed(*words: str) -> Any:
    args = config.parse_args(get_args_parser(), list(words))
    args.nb_classes = args.nb_classes or 3
    return args


@pytest.mark.parametrize(
    ("name", "values"),
    [
        (
            "upernet_beit_base_8x2_512x512_160k",
            {"model": "upernet_vit_base", "input_size": 512, "opt": "adamw", "lr": 4e-4, "layer_decay": 0.65}
            | {
                "weight_decay": 0.05,
                "power": 1,
                "min_lr": 0,
                "warmup_iters": 1500,
                "abs_pos_emb": False,
                "batch_size": 2,
            }
            | {"layer_scale_init_value": 0.1, "drop_path": 0.1, "iters": 160000, "eval_interval": 16000},
        ),
        (
            "upernet_beit_base_8x2_640x640_160k",
            {"model": "upernet_vit_base", "input_size": 640, "scale": [2560, 640], "lr": 3e-5, "layer_decay": 0.9},
        ),
        (
            "upernet_mae_base_8x2_512x512_160k",
            {"lr": 1e-4, "layer_decay": 0.65, "abs_pos_emb": True, "layer_scale_init_value": 1, "amp_dtype": "auto"},
        ),
        (
            "fcn_r50_d8_4x4_512x512_160k",
            {"model": "fcn_resnet50", "opt": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 4}
            | {"power": 0.9, "min_lr": 1e-4, "warmup_iters": 0, "iters": 160000, "drop_path": 0},
        ),
    ],
)
def test_configurations(name, values):
    args = parsed(str(CONFIGS / f"{name}.py"))
    assert {key: getattr(args, key) for key in values} == values
    assert args.auxiliary_weight == 0.4 and args.data_path == "data/ade/ADEChallengeData2016"


def test_groups_of_the_optimizer():
    network = MODELS["upernet_vit_nano"](num_classes=3, img_size=64)
    names = {id(p): name for name, p in network.named_parameters()}
    found = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in param_groups(network, 0.05, 0.5)
        for p in group["params"]
    }
    assert len(found) == len(names)
    for name, expected in {
        "backbone.cls_token": (0.5**5, 0.05),
        "backbone.patch_embed.bias": (0.5**5, 0.0),
        "backbone.blocks.0.attn.relative_position_bias_table": (0.5**4, 0.05),
        "backbone.blocks.3.gamma_1": (0.5, 0.0),
        "backbone.blocks.3.attn.q_bias": (0.5, 0.0),
        "neck.upsample_4x.0.weight": (1.0, 0.05),
        "decode_head.conv_seg.bias": (1.0, 0.0),
    }.items():
        assert found[name] == expected, name
    args = parsed(str(CONFIGS / "fcn_r50_d8_4x4_512x512_160k.py"), "--model", "fcn_resnet_nano")
    optimizer = build_optimizer(args, MODELS["fcn_resnet_nano"](num_classes=3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4]


# ---- runs


def flags_of(data: Path, out: Path, *further: str) -> list[str]:
    words = f"--data_path {data} --work_dir {out} --device cpu --num_workers 0 --input_size 32 --scale 64 32 --iters 5"
    return [*words.split(), "--eval_interval", "3", "--warmup_iters", "2", *further]


VIT = ["--model", "upernet_vit_nano", "--batch_size", "2"]
FCN = ["--model", "fcn_resnet_nano", "--batch_size", "2", "--opt", "sgd", "--lr", "0.01", "--warmup_iters", "0"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "latest.pth", weights_only=True)["state_dict"]


def test_a_run_from_a_pretrained_encoder_is_resumed_to_the_same_bits(tmp_path, monkeypatch, capsys):
    data = masked_images(tmp_path / "data")
    encoder = MaskedImageModel(BACKBONES["vit_nano"](img_size=64), MIMLoss())
    torch.save({"state_dict": to_openmixup_state_dict(encoder)}, tmp_path / "pretrained.pth")
    start = ["--pretrained", str(tmp_path / "pretrained.pth")]
    run_main(main_segmentation, *flags_of(data, tmp_path / "whole", *VIT, *start, "--save_pictures", "1"))
    assert "missing: none" in capsys.readouterr().out
    assert (tmp_path / "whole" / "pictures" / "0000.png").exists()
    spoil(monkeypatch, main_segmentation.SegmentationNetwork, 3, stop=True)
    with pytest.raises(SystemExit):
        run_main(main_segmentation, *flags_of(data, tmp_path / "halves", *VIT, *start))
    monkeypatch.undo()
    run_main(main_segmentation, *flags_of(data, tmp_path / "halves", *VIT))
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "halves").items())
    last = json.loads((tmp_path / "whole" / "log.txt").read_text().splitlines()[-1])
    capsys.readouterr()
    evaluated = ["--eval", "--resume", str(tmp_path / "halves" / "latest.pth")]
    run_main(main_segmentation, *flags_of(data, tmp_path / "whole", *VIT, *evaluated))
    assert f"mIoU {last['val_mIoU']:.2f}" in capsys.readouterr().out


def test_a_convolutional_run_sees_whole_images(tmp_path, capsys):
    data = masked_images(tmp_path / "data")
    run_main(main_segmentation, *flags_of(data, tmp_path / "run", *FCN, "--iters", "2", "--tta"))
    assert "2 updates done" in capsys.readouterr().out
    further = ["--iters", "1", "--load_checkpoint", str(tmp_path / "run" / "latest.pth")]
    run_main(main_segmentation, *flags_of(data, tmp_path / "again", *FCN, *further))


def test_two_processes_count_what_one_does(tmp_path):
    data = masked_images(tmp_path / "data")
    flags = flags_of(data, tmp_path / "run", *VIT, "--iters", "2")
    assert launch(tmp_path / "log", SCRIPT, *flags, processes=2) == [0, 0]
    trained = (tmp_path / "log").read_text()
    scores = [line for line in trained.splitlines() if "mIoU" in line and "mAcc" in line][-1].split("] ")[1]
    assert launch(tmp_path / "one", SCRIPT, *flags, "--eval") == [0]
    assert scores in (tmp_path / "one").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("model", [VIT, FCN], ids=["vit", "resnet"])
def test_two_processes_are_resumed_to_the_same_bits(tmp_path, model):
    """Batch norms share their statistics; both are stopped inside the first interval."""
    data = masked_images(tmp_path / "data", train=13)
    assert launch(tmp_path / "log", SCRIPT, *flags_of(data, tmp_path / "whole", *model), processes=2) == [0, 0]
    flags = flags_of(data, tmp_path / "halves", *model)
    stopped = launch(tmp_path / "log", str(FAULTS), SCRIPT, *flags, processes=2, FAULT="signal_at:1")
    assert stopped == [143, 143]
    assert launch(tmp_path / "log", SCRIPT, *flags, processes=2) == [0, 0]
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "halves").items())


def test_mistakes(tmp_path, capsys):
    data = masked_images(tmp_path / "data")

    def error(*words: str) -> str:
        return mistake(main_segmentation, *flags_of(data, tmp_path / "run", *words), capsys=capsys)

    assert "--batch_size 1: on one process batch norm has a single value" in error(*VIT, "--batch_size", "1")
    assert "--batch_size 9: 7 training images do not fill one batch" in error(*VIT, "--batch_size", "9")
    assert "--eval: name the checkpoint to evaluate with --resume" in error(*VIT, "--eval")
    assert "--iters 0: expected at least 1" in error(*VIT, "--iters", "0")
    assert "--stride 0: expected at least 1" in error(*VIT, "--stride", "0")
    (tmp_path / "other.pth").write_bytes(b"nothing")
    assert "other.pth: not a checkpoint" in error(*VIT, "--pretrained", str(tmp_path / "other.pth"))
