"""Fourier analysis: the authors' numbers, the latents of each kind of network, and the script with its files."""

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers.norm import LayerNorm
from timm.models.beit import Beit
from torch import nn

from a2mim import main_fourier
from a2mim.fourier import feature_variance, observed, relative_log_amplitude
from a2mim.losses import MIMLoss
from a2mim.models_a2mim import build_classifier, build_masked
from a2mim.openmixup import to_openmixup_state_dict
from tests.support.helpers import ROOT, assert_close, golden_files, load_golden
from tests.support.processes import launch
from tests.support.runs import mistake, run_main


@golden_files("a2mim", "fourier_analysis")
def test_matches_upstream(path):
    ref = load_golden(path)
    tol = {"rtol": 1e-4, "atol": 1e-5} | ref.meta.get("tolerance", {})
    for name, latent in ref.group("in").items():
        k = name.removeprefix("latent_")
        ref.check(f"out/rel_{k}", relative_log_amplitude(latent), **tol, what=name)
        ref.check(f"out/var_{k}", feature_variance(latent), **tol, what=name)


# ---- statistics


@pytest.mark.parametrize("side", [1, 2, 7, 8])
def test_amplitude__by_the_plain_transform(side):
    x = torch.randn(3, 4, side, side, dtype=torch.float64)
    shifted = torch.fft.fftshift((torch.fft.fft2(x).abs() + 1e-6).log(), dim=(2, 3)).mean(dim=(0, 1))
    expected = shifted.diagonal()[side // 2 :]
    assert_close(relative_log_amplitude(x), expected - expected[0], rtol=1e-4, atol=1e-4)
    tokens = x.flatten(2).transpose(1, 2)
    assert_close(relative_log_amplitude(tokens), relative_log_amplitude(x), rtol=0, atol=1e-5)


def test_amplitude__of_a_wave_peaks_at_its_frequency():
    at = torch.arange(16)
    wave = (2 * math.pi * 5 / 16 * (at[:, None] + at)).cos()[None, None]
    assert relative_log_amplitude(wave + 0.1 * torch.randn(1, 1, 16, 16)).argmax() == 5


def test_variance():
    x = torch.tensor([[[[0.0, 2], [0, 2]], [[1, 1], [1, 1]]]])
    assert feature_variance(x).item() == pytest.approx((4 / 3 + 0) / 2)
    assert feature_variance(x[..., :1, :1]) == 0


def test_statistics__tokens_of_no_square():
    with pytest.raises(ValueError, match="15 tokens are no square map"):
        feature_variance(torch.zeros(2, 15, 3))


# ---- latents


def latents(net: nn.Module, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.inference_mode(), observed(net.eval(), torch.clone) as seen:
        net.forward_features(imgs)  # type: ignore[operator]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    return seen


def test_latents_of_resnet():
    net: Any = timm.create_model("resnet18", num_classes=0)
    imgs = torch.randn(2, 3, 64, 64)
    seen = latents(net, imgs)
    assert list(seen) == ["stem", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1))]
    assert [x.shape[1:] for x in (seen["stem"], seen["layer4.1"])] == [(64, 16, 16), (512, 2, 2)]
    assert torch.equal(seen["layer4.1"], net.forward_features(imgs))


def test_latents_of_convnext():
    net: Any = timm.create_model("test_convnext", num_classes=0)
    imgs = torch.randn(2, 3, 64, 64)
    seen = latents(net, imgs)
    assert list(seen) == ["stem", *(f"stages.{s}.{i}" for s, d in enumerate((1, 2, 4, 2)) for i in range(d))]
    assert torch.equal(seen["stem"], net.stem(imgs))
    assert torch.equal(seen["stages.3.1"], net.norm_pre(net.stages(net.stem(imgs))))


def random_beit() -> Beit:
    norm: Any = partial(LayerNorm, eps=1e-6)
    net = Beit(32, 8, embed_dim=16, depth=2, num_heads=2, init_values=0.1, use_rel_pos_bias=True, norm_layer=norm)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def random_vit() -> nn.Module:
    net = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0, init_values=0.1, reg_tokens=2)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


@pytest.mark.parametrize("build", [random_beit, random_vit])
def test_latents_of_vit__residual_stream_with_layer_scale(build):
    net = build().eval()
    imgs = torch.randn(2, 3, 32, 32)
    seen = latents(net, imgs)
    assert list(seen)[:3] == ["embedding", "blocks.0.attn", "blocks.0.mlp"]
    assert len(seen) == 1 + 2 * len(net.blocks)
    assert {tuple(x.shape[:2]) for x in seen.values()} == {(2, 16)}
    block, extra = net.blocks[0], net.num_prefix_tokens
    with torch.inference_mode():
        if isinstance(net, Beit):
            x = torch.cat([net.cls_token.expand(2, -1, -1), net.patch_embed(imgs)], dim=1)
            x = x if net.pos_embed is None else x + net.pos_embed
            attn, mlp = block.gamma_1 * block.attn(block.norm1(x)), block.gamma_2
            assert_close(seen["embedding"], x[:, extra:], rtol=1e-5, atol=1e-5)
        else:
            x = net._pos_embed(net.patch_embed(imgs))
            attn, mlp = block.ls1.gamma * block.attn(block.norm1(x)), block.ls2.gamma
        assert_close(seen["blocks.0.attn"], (x + attn)[:, extra:], rtol=1e-4, atol=1e-4)
        after = x + attn + mlp * block.mlp(block.norm2(x + attn))
        assert_close(seen["blocks.0.mlp"], after[:, extra:], rtol=1e-4, atol=1e-3)


def test_latents_of_others_are_unknown():
    for name in ("mixer_s16_224", "test_efficientnet"):
        with pytest.raises(ValueError, match="latents are known of ResNet, ConvNeXt and pre-norm ViTs"):
            latents(timm.create_model(name, num_classes=0), torch.zeros(1, 3, 224, 224))


# ---- the script

SMALL = ["--model_name", "test_vit", "--img_size", "32", "--scale_size", "36", "--batch_size", "6", "--batches", "2"]
SMALL += ["--num_workers", "0", "--device", "cpu"]


@pytest.fixture
def flags(digits, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.distributed.exits._received", [])
    return [*SMALL, "--test_dir", digits]


def load(path: str) -> dict:
    return torch.load(path, weights_only=True)


def test_both_experiments(flags, tmp_path, capsys):
    run_main(main_fourier, *flags)
    written = {str(path.relative_to(tmp_path)) for path in Path("report").resolve().rglob("*.*")}
    fourier, variance = (f"report/{exp}/test_vit/random/" for exp in ("fourier", "variance"))
    figures = {fourier + "fft_features.png", fourier + "high_freq_fft_features.png", variance + "variance_features.png"}
    assert written == figures | {fourier + "fourier_latents.pt", variance + "variance_latents.pt"}
    curves, variances = load(fourier + "fourier_latents.pt"), load(variance + "variance_latents.pt")
    assert curves["images"] == 12
    assert len(curves["names"]) == len(curves["fourier"]) == len(variances["variance"]) == 13
    assert all(curve[0] == 0 for curve in curves["fourier"])
    assert "variance" not in curves
    # ---- reused
    before = Path(fourier + "fourier_latents.pt").read_bytes()
    Path(variance + "variance_latents.pt").unlink()
    run_main(main_fourier, *flags, "--exp_name", "fourier")
    assert "Latents:" not in capsys.readouterr().out.split("variance_features.png")[-1]
    assert not Path(variance + "variance_latents.pt").exists()
    run_main(main_fourier, *flags, "--overwrite")
    assert Path(fourier + "fourier_latents.pt").read_bytes() == before
    # ---- other flags
    error = mistake(main_fourier, *flags, "--batches", "1", capsys=capsys)
    assert "fourier_latents.pt: is of other batches; choose another --name, or --overwrite it" in error
    assert "is of other weights" in mistake(main_fourier, *flags, "--seed", "1", capsys=capsys)
    # ---- together
    run_main(main_fourier, *flags, "--seed", "1", "--name", "mim_other", "--exp_name", "fourier")
    saved = [fourier + "fourier_latents.pt", "report/fourier/test_vit/mim_other/fourier_latents.pt"]
    run_main(main_fourier, "--summary", *saved, "--save_path", "together")
    assert Path("together/fourier/high_freq_fft_features.png").stat().st_size > 5000
    error = mistake(main_fourier, "--summary", saved[0], variance + "variance_latents.pt", capsys=capsys)
    assert "expected files of one experiment, found fourier and variance" in error


def test_statistics_are_means_over_the_first_full_batches(flags, digits):
    run_main(main_fourier, *flags)
    loader_args = main_fourier.get_args_parser().parse_args([*flags, "--batch_size", "12"])
    net = main_fourier.build_encoder(loader_args)
    loader = main_fourier.build_loader(loader_args, torch.device("cpu"))
    whole = main_fourier.measure(net, loader, 1)
    for exp in ("fourier", "variance"):
        saved = load(f"report/{exp}/test_vit/random/{exp}_latents.pt")[exp]
        for a, b in zip(saved, whole[exp], strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert main_fourier.measure(net, loader, 26)["images"] == 12  # of 20: the rest fills no batch


def test_own_encoder__of_any_checkpoint(flags, tmp_path):
    """A fine-tuned checkpoint, its encoder alone, one of timm's names and one of pre-training give the same."""
    torch.manual_seed(3)
    model = build_classifier("resnet_nano", 10)
    official = to_openmixup_state_dict(model)
    torch.save({"state_dict": official}, "finetuned.pth")
    encoder = {k.removeprefix("backbone."): v for k, v in official.items() if k.startswith("backbone.")}
    torch.save({"state_dict": encoder}, "encoder.pth")
    torch.save(model.net.state_dict(), "plain.pth")
    masked = build_masked("resnet_nano", MIMLoss(), mask_layer=3)
    masked.encoder.load_state_dict(model.net.state_dict(), strict=False)
    torch.save({"state_dict": to_openmixup_state_dict(masked)}, "pretrained.pth")
    names = ("finetuned", "encoder", "plain", "pretrained")
    for name in names:
        more = ["--exp_name", "variance", "--model_name", "resnet_nano", "--pretrained_path", f"{name}.pth"]
        run_main(main_fourier, *flags, *more)
    found = [load(f"report/variance/resnet_nano/{name}/variance_latents.pt") for name in names]
    for other in found[1:]:
        assert torch.equal(torch.stack(other["variance"]), torch.stack(found[0]["variance"]))


def test_timm_weights__with_any_classes(flags):
    torch.save(timm.create_model("test_vit", img_size=32, num_classes=7).state_dict(), "seven.pth")
    run_main(main_fourier, *flags, "--pretrained_path", "seven.pth", "--num_classes", "7")
    assert Path("report/fourier/test_vit/seven/fourier_latents.pt").exists()


def test_alias_and_flags_without_effect(flags, digits, tmp_path):
    script = ROOT / "a2mim/analysis_tools/fourier_analysis/fourier_analysis.py"
    names = "\n".join(f"{path.parent.name}/{path.name} 0" for path in sorted(Path(digits).glob("val/*/*.png")))
    (tmp_path / "list.txt").write_text(names)
    more = ["--shuffle_size", "14", "7", "--dino", "--drop_count", "3", "--test_list", "list.txt"]
    words = [*SMALL, "--test_dir", f"{digits}/val", *more, "--exp_name", "variance"]
    assert launch(tmp_path / "out", str(script), *words, cwd=tmp_path) == [0], (tmp_path / "out").read_text()
    assert load("report/variance/test_vit/random/variance_latents.pt")["images"] == 12


MISTAKES = [
    ([], "expected --test_dir FOLDER"),
    (["--test_dir", "nowhere"], "nowhere: no such folder"),
    (["--test_dir", ".", "--test_list", "none.txt"], "--test_list none.txt: no such file"),
    (["--model_name", "nonsense"], "nonsense"),
    (
        ["--model_name", "mixer_s16_224", "--img_size", "224"],
        "MlpMixer: latents are known of ResNet, ConvNeXt and pre-norm ViTs",
    ),
    (["--pretrained_path", "none.pth"], "none.pth: no such checkpoint file"),
    (["--pretrained_path", "other.pth"], "other.pth: is no test_vit for 32 pixels"),
    (["--pretrained_path", "other.pth", "--model_name", "resnet50"], "other.pth: is not this encoder"),
    (["--batches", "0"], "--batches 0: expected at least 1"),
    (["--img_size", "8"], "test_vit"),
    (["--summary", "none.pt"], "none.pt: is missing; expected a file <exp_name>_latents.pt"),
    (["--summary", "other.pth"], "other.pth: expected a file <exp_name>_latents.pt"),
]


@pytest.mark.parametrize(("more", "words"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(more, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("resnet18", num_classes=2).state_dict(), "other.pth")
    assert words in mistake(main_fourier, *SMALL, *more, capsys=capsys)


def test_unreadable_image_is_named(flags, digits, tmp_path, capsys):
    other = shutil.copytree(digits, tmp_path / "digits")
    next(other.glob("val/0/*")).write_bytes(b"no image")
    assert "unreadable image" in mistake(main_fourier, *flags, "--test_dir", str(other), capsys=capsys)


def test_by_depth():
    found = {"fourier": [torch.tensor([0.0, -1, -2]), torch.tensor([0.0]), torch.tensor([0.0, 4])]}
    depth, values = main_fourier.by_depth("fourier", found)
    assert depth.tolist() == [0, 0.5, 1]
    assert values == [-2, 0, 4]
    assert np.isfinite(values).all()


def test_patch_size_reaches_the_encoder():
    flags = ["--model_name", "vit_nano", "--patch_size", "8", "--img_size", "32"]
    net = main_fourier.build_encoder(main_fourier.get_args_parser().parse_args(flags))
    assert net.patch_embed.grid_size == (4, 4)
