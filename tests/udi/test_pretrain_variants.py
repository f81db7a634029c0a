"""Pre-training with every flag that changes its network, loss or optimizer, and what it says of a collapse."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch

from tests.support.runs import arguments
from tests.support.udi_runs import NAMES, log_of, state_of, train
from udi import main_pretrain
from udi.models_udi import MODELS, DINOHead

pytestmark = pytest.mark.usefixtures("narrow_head")

# ---- variants

NO_MCL = [name for name in NAMES if "mcl" not in name]
NO_LOCAL = [name for name in NAMES if "_l_" not in name]
VARIANTS = {
    "--include_patch false": ([name for name in NO_MCL if "pch" not in name], 1, 1),
    "--include_patch false --number_cls_token 2": ([name for name in NO_MCL if "pch" not in name], 1, 1),
    "--include_patch false --local_crops_number 0": (["train_loss", "train_g_cl", *NAMES[6:]], 1, 1),
    "--number_cls_token 1": (NO_MCL, 1, 2),
    "--number_cls_token 1 --local_crops_number 0": ([name for name in NO_LOCAL if "mcl" not in name], 1, 2),
    "--local_crops_number 0": (NO_LOCAL, 2, 3),
    "--use_bn_in_head true": (NAMES, 2, 3),
    "--norm_last_layer false": (NAMES, 2, 3),
    "--optimizer sgd": (NAMES, 2, 3),
    "--optimizer lars": (NAMES, 2, 3),
    "--clip_grad 0": (NAMES, 2, 3),
    "--use_fp16 false --amp_dtype bf16": (NAMES, 2, 3),
    "--amp_dtype bf16": (NAMES, 2, 3),
    "--exact_center --fix_crop_reference": (NAMES, 2, 3),
    "--global_sampling_window_size 4 --local_sampling_window_size 2": (NAMES, 2, 3),
    "--global_sampling_window_size 1 --local_sampling_window_size 1": (NAMES, 2, 3),
    "--local_size 8 --local_sampling_window_size 1 --local_crops_number 1": (NAMES, 2, 3),
    "--warmup_teacher_temp_epochs 30": (NAMES, 2, 3),
    "--warmup_teacher_temp_epochs 0 --alpha 0": (NAMES, 2, 3),
    "--freeze_last_layer 0 --momentum_teacher 1": (NAMES, 2, 3),
}


QUICK = [own for own in VARIANTS if re.search("false$|token 1$|bn|lars|clip", own)]
OTHERS = [pytest.param(own, marks=pytest.mark.slow) for own in VARIANTS if own not in QUICK]


@pytest.mark.parametrize("own", [*QUICK, *OTHERS])
def test_variants_train(digits, tmp_path, own):
    names, tokens, levels = VARIANTS[own]
    further = ["--batch_size", "24", "--epochs", "1", "--warmup_epochs", "0", "--freeze_last_layer", "0", *own.split()]
    train("plain", digits, tmp_path, *further)
    (line,) = log_of(tmp_path)
    assert list(line) == names
    assert all(isinstance(value, (int, float)) for value in line.values())
    state = state_of(tmp_path)
    assert state["udi_loss"]["centering.center"].shape == (levels, 256)
    student, teacher = state["student"], state["teacher"]
    assert student["module.backbone.backbone.cls_token"].shape[1] == tokens
    assert sum(name.endswith(".last_layer.weight_v") for name in teacher) == levels
    assert ("backbone.attn.qkv.weight" in teacher) == ("--include_patch false" not in own)
    free = "--norm_last_layer false" in own
    scales = student["module.head.0.last_layer.weight_g"]
    assert torch.equal(scales, torch.ones_like(scales)) != free
    assert ("head.0.mlp.1.running_mean" in teacher) == ("use_bn" in own)
    still = torch.equal(student["module.backbone.backbone.norm.weight"], teacher["backbone.backbone.norm.weight"])
    assert not still
    fresh = torch.equal(teacher["backbone.backbone.norm.weight"], torch.ones(96))
    assert fresh == ("--momentum_teacher 1" in own)
    moments = set().union(*(set(part) for part in state["optimizer"]["state"].values()))
    if "--optimizer" in own:
        assert "exp_avg" not in moments


@pytest.mark.slow
def test_compiled(digits, tmp_path):
    """Alike, but for the random draws of stochastic depth."""
    own = ["--batch_size", "24", "--epochs", "1", "--warmup_epochs", "0", "--drop_path_rate", "0", "--lr", "1e-3"]
    for further in ([], ["--compile"]):
        train("plain", digits, tmp_path / str(len(further)), *own, *further)
    (plain,), (compiled,) = (log_of(tmp_path / name) for name in "01")
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_teacher_warm_up_longer_than_the_run():
    flags = "--warmup_teacher_temp 0.04 --teacher_temp 0.07 --epochs 3 --warmup_teacher_temp_epochs"
    for epochs, expected in ((30, np.linspace(0.04, 0.07, 30)[:3]), (2, [0.04, 0.07, 0.07]), (0, [0.07] * 3)):
        args = arguments(main_pretrain, *flags.split(), str(epochs))
        assert main_pretrain.build_loss(args).temperatures == pytest.approx(list(expected))


HEADS = {"vit_tiny": 6, "vit_small": 6, "vit_base": 6, "vit_large": 16}


@pytest.mark.parametrize("arch", [*HEADS, "deit_tiny", "deit_small", "deit_base"])
def test_every_network_is_built(arch, monkeypatch):
    """At its real width and depth; the sampling has 6 heads, as upstream's, where 6 divides the width."""
    monkeypatch.setattr(DINOHead.__init__, "__defaults__", (False, True, 3, 2048, 256))
    with torch.device("meta"):
        student = main_pretrain.build_model(arguments(main_pretrain, "--arch", arch))
    vit, attn = student.backbone.backbone, student.backbone.attn
    assert attn is not None
    assert attn.num_heads == HEADS[arch.replace("deit", "vit")]
    own = MODELS[arch.replace("deit", "vit")].keywords
    assert (vit.embed_dim, len(vit.blocks)) == (own["embed_dim"], own["depth"])
    if arch.endswith("small"):
        assert sum(parameter.numel() for parameter in student.parameters()) == 44611456  # of the authors' code
        assert len(student.state_dict()) == 182


def test_a_width_that_6_does_not_divide(digits, tmp_path, monkeypatch):
    """As vit_large's, at toy size: 16 heads sample its patches."""
    small = partial(MODELS["vit_nano"], embed_dim=64, depth=2, num_heads=4)
    monkeypatch.setitem(MODELS, "vit_large", small)
    own = ["--arch", "vit_large", "--batch_size", "24", "--epochs", "1", "--warmup_epochs", "0"]
    train("plain", digits, tmp_path, *own)
    assert state_of(tmp_path)["teacher"]["backbone.attn.qkv.weight"].shape == (192, 64)


# ---- collapse


@pytest.mark.parametrize(
    ("mean_entropy", "entropy", "expected"),
    [
        (0.5, 0.1, "predicts one prototype of all images"),
        (math.log(256), 0.995 * math.log(256), "predictions are uniform"),
        (3.0, 2.9995, "do not depend on the image"),
        (3.0, 2.0, ""),
        (math.log(256), 2.0, ""),
    ],
)
def test_collapse_is_told(mean_entropy, entropy, expected, capsys):
    main_pretrain.warn_of_collapse({"mean_entropy": mean_entropy, "entropy": entropy}, 256, images=8)
    out = capsys.readouterr().out
    assert out.count("WARNING: collapse: the teacher") == bool(expected)
    assert expected in out


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("--teacher_temp 100 --warmup_teacher_temp_epochs 0", "predictions are uniform"),
        # Features that say nothing.
        ("--warmup_teacher_temp_epochs 0 --teacher_temp 1e-3", "predicts one prototype of all images"),
        pytest.param(
            "--warmup_teacher_temp_epochs 0 --teacher_temp 0.05",
            "do not depend on the image",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_collapse_is_told_of_a_run(digits, tmp_path, own, expected, monkeypatch, capsys):
    plain = DINOHead.bottleneck

    def blind(self, x):
        return plain(self, torch.ones_like(x) + 0 * x)

    if "uniform" not in expected:
        monkeypatch.setattr(DINOHead, "bottleneck", blind)
    further = ["--batch_size", "24", "--epochs", "1", "--warmup_epochs", "0", "--lr", "0", "--output_dir", ""]
    train("plain", digits, tmp_path, *further, *own.split())
    out = capsys.readouterr().out
    assert out.count("WARNING: collapse: the teacher") == 1
    assert expected in out
