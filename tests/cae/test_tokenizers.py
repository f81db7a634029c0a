"""Tokenizers against the authors' numbers, what the flags accept, and the training of small ones."""

import argparse
import inspect
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from cae import engine_tokenizer, main_tokenizer
from cae.convert_dalle import save
from cae.models_dalle import (
    Conv2d,
    DalleDecoder,
    DalleEncoder,
    DalleTokenizer,
    half_precision,
    map_pixels,
    unmap_pixels,
)
from cae.models_dvae import DiscreteVAE, load_tokenizer
from common import distributed
from common.distributed import UserError, exits
from tests.support.helpers import assert_close, golden_files, load_golden
from tests.support.runs import CPU, assert_same, mistake, run_main

# ---- the authors' numbers


def build_dalle(ref) -> DalleTokenizer:
    tokenizer = DalleTokenizer(**ref.kwargs)
    tokenizer.load_state_dict({name.replace("/", ".", 1): value for name, value in ref.weights.items()})
    return tokenizer


@golden_files("cae", "dalle_tokenizer")
def test_dalle_tokenizer(path):
    ref = load_golden(path)
    tokenizer, close = build_dalle(ref), ref.meta["tolerances"]
    imgs = map_pixels(ref["in/x"])
    ref.check("out/map_pixels", imgs, **close)
    logits = tokenizer.logits(imgs)
    ref.check("out/logits", logits, **close)
    ref.check("out/probs", logits.softmax(dim=1), **close)
    tokens = tokenizer.get_codebook_indices(imgs)
    ref.equal("out/tokens", tokens)
    assert tokenizer.decoder is not None
    one_hot = F.one_hot(tokens, tokenizer.num_tokens).permute(0, 3, 1, 2).float()
    ref.check("out/decoded_stats", tokenizer.decoder(one_hot), **close)
    ref.check("out/decoded_image", tokenizer.decode(tokens), **close)


@golden_files("cae", "discrete_vae")
def test_discrete_vae(path):
    ref = load_golden(path)
    model, close = DiscreteVAE(**ref.kwargs), ref.meta["tolerances"]
    model.load_state_dict(ref.weights)
    ref.check("out/logits", model.logits(ref["in/x"]), **close)
    indices = model.get_codebook_indices(ref["in/x"])
    ref.equal("out/indices", indices)
    ref.check("out/decoded", model.decode(indices), **close)
    assert_close(model.pictures(indices), (model.decode(indices) / 2 + 0.5).clamp(0, 1), **close)


TOKENIZERS = {
    "tokenizer/dalle_encoder": DalleEncoder,
    "tokenizer/dalle_decoder": DalleDecoder,
    "tokenizer/discrete_vae_customized": DiscreteVAE,
}


@golden_files("cae", "manifest", ".json")
def test_keys_and_sizes(path):
    for name, network in TOKENIZERS.items():
        ref = load_golden(path)["presets"][name]
        with torch.device("meta"):
            model = network()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        assert list(shapes.items()) == list(ref["state_dict"].items()), name
        assert sum(p.numel() for p in model.parameters()) == ref["params_total"]


# ---- the DALL-E tokenizer


def small_dalle(**kwargs) -> DalleTokenizer:
    return DalleTokenizer(**{"n_hid": 4, "vocab_size": 12, "n_blk_per_group": 1, "decoder_n_init": 8, **kwargs})


def test_pixels_are_mapped_back():
    imgs = torch.rand(2, 3, 8, 8)
    assert_close(unmap_pixels(map_pixels(imgs)), imgs, rtol=0, atol=1e-6)
    assert unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_all_convolutions_but_two_may_be_half():
    tokenizer = small_dalle()
    assert tokenizer.decoder is not None
    names = {name for name, conv in tokenizer.named_modules() if isinstance(conv, Conv2d) and not conv.may_be_half}
    assert names == {"encoder.blocks.output.conv", "decoder.blocks.input"}
    exact = small_dalle()
    exact.load_state_dict(tokenizer.state_dict())
    imgs = map_pixels(torch.rand(4, 3, 32, 32))
    half_precision(tokenizer)
    assert {value.dtype for value in tokenizer.encoder.blocks[1].parameters()} == {torch.float16}
    logits, tokens = tokenizer.logits(imgs), exact.get_codebook_indices(imgs)
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact.logits(imgs)).abs().max() < 0.01 * logits.abs().max()
    assert_close(tokenizer.decode(tokens), exact.decode(tokens), rtol=0, atol=0.01)
    tokenizer.to("cpu")  # a move decides anew
    assert {value.dtype for value in tokenizer.parameters()} == {torch.float32}


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    tokenizer = DalleTokenizer(n_hid=32, vocab_size=64)
    imgs = map_pixels(torch.rand(8, 3, 64, 64))
    tokens, pictures = tokenizer.get_codebook_indices(imgs), tokenizer.decode(tokenizer.get_codebook_indices(imgs))
    weights = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    for fp32 in (False, True):
        on_gpu = DalleTokenizer(n_hid=32, vocab_size=64, fp32=fp32)
        on_gpu.load_state_dict(weights)
        on_gpu.cuda()
        kinds = {conv.w.dtype for conv in on_gpu.modules() if isinstance(conv, Conv2d)}
        assert kinds == ({torch.float32} if fp32 else {torch.float32, torch.float16})
        with torch.autocast("cuda", torch.bfloat16):  # the caller's, which must not matter
            own = on_gpu.get_codebook_indices(imgs.cuda()).cpu()
            painted = on_gpu.decode(tokens.cuda()).cpu()
        assert (own == tokens).float().mean() > 0.97  # only near ties
        assert_close(painted, pictures, rtol=0, atol=0.02)


def test_tokenizer_stays_frozen_and_out_of_autocast():
    tokenizer = small_dalle()
    imgs = map_pixels(torch.rand(2, 3, 16, 16))
    parent = nn.ModuleList([tokenizer]).train()
    assert not any(part.training for part in tokenizer.modules())
    assert not any(p.requires_grad for p in parent.parameters())
    expected = tokenizer.logits(imgs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.logits(imgs), expected)
    assert not tokenizer.logits(imgs.requires_grad_()).requires_grad


def test_tokenizer__raises_on_other_images():
    with pytest.raises(ValueError, match="20x16 pixels, expected multiples of 8"):
        small_dalle().get_codebook_indices(torch.rand(1, 3, 20, 16))
    with pytest.raises(ValueError, match="expected torch.float32"):
        small_dalle().get_codebook_indices(torch.rand(1, 3, 16, 16).half())
    with pytest.raises(ValueError, match="has no decoder"):
        small_dalle(with_decoder=False).decode(torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="images are 8x8, the tokenizer was built for 16x16"):
        DiscreteVAE(16, 4, 4, 2, 4).get_codebook_indices(torch.rand(1, 3, 8, 8))


# ---- flags of pre-training


@pytest.mark.parametrize(
    ("kind", "path", "expected"),
    [
        ("clip", "x", "--discrete_vae_type clip: is CAE v2, which is not implemented; expected dall-e or customized"),
        ("vqgan_gumbel_f8_8192", "x", "--discrete_vae_type vqgan_gumbel_f8_8192: does not run in the authors' code"),
        ("to_tensor", "x", "--discrete_vae_type to_tensor: does not run in the authors' code"),
        ("dalle", "x", "--discrete_vae_type dalle: is unknown; expected dall-e or customized"),
        ("dall-e", None, "https://cdn.openai.com/dall-e/encoder.pkl"),
        ("dall-e", "", "https://cdn.openai.com/dall-e/decoder.pkl"),
        (
            "dall-e",
            "/none",
            "--discrete_vae_weight_path /none: is no folder; expected one with encoder.safetensors",
        ),
        ("customized", None, "name a checkpoint of main_tokenizer.py with --discrete_vae_weight_path"),
        ("customized", "/none.pth", "--discrete_vae_weight_path /none.pth: no such checkpoint file"),
    ],
)
def test_load_tokenizer__raises_on(kind, path, expected):
    with pytest.raises(UserError) as error:
        load_tokenizer(kind, path, 16, 3)
    assert expected in str(error.value)


def test_load_dalle_tokenizer(tmp_path):
    made = small_dalle()
    (tmp_path / "encoder.safetensors").write_bytes(save(made.encoder.state_dict()))
    tokenizer = load_tokenizer("dall-e", str(tmp_path), 16)
    imgs = map_pixels(torch.rand(2, 3, 16, 16))
    assert tokenizer.num_tokens == 12
    assert torch.equal(tokenizer.get_codebook_indices(imgs), made.get_codebook_indices(imgs))
    with pytest.raises(UserError, match="--second_input_size 20: expected a multiple of 8"):
        load_tokenizer("dall-e", str(tmp_path), 20)
    with pytest.raises(UserError, match=r"has no decoder.safetensors or decoder.pkl"):
        load_tokenizer("dall-e", str(tmp_path), 16, with_decoder=True)


def test_load_customized_tokenizer(tmp_path):
    path = str(tmp_path / "a.pth")
    imgs = torch.randn(2, 3, 16, 16)
    # Ours: the sizes are in the file, whatever --dvae_num_layers says.
    made = DiscreteVAE(32, 10, 6, 2, 4)
    flags = {"num_tokens": 10, "codebook_dim": 6, "num_layers": 2, "hidden_dim": 4, "input_size": 32}
    torch.save({"model": made.state_dict(), "args": flags}, path)
    tokenizer = load_tokenizer("customized", path, 16, 3)
    assert isinstance(tokenizer, DiscreteVAE)
    assert (tokenizer.num_tokens, tokenizer.grid_size, tokenizer.training) == (10, 4, False)
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert torch.equal(tokenizer.get_codebook_indices(imgs), made.encoder(imgs).argmax(1).flatten(1))
    with pytest.raises(UserError, match=r"image size 18 is not a multiple of 2\^2"):
        load_tokenizer("customized", path, 18)
    # Upstream's: fixed sizes, a Namespace of other flags.
    official = DiscreteVAE(16, num_layers=2)
    for state in ({}, {"args": argparse.Namespace(lr=0.1)}):
        torch.save({"model": official.state_dict(), **state}, path)
        tokenizer = load_tokenizer("customized", path, 16, 2)
        assert torch.equal(tokenizer.get_codebook_indices(imgs), official.get_codebook_indices(imgs))
    with pytest.raises(UserError, match=r"is no discrete VAE of .*'num_layers': 3.* for 16-pixel images"):
        load_tokenizer("customized", path, 16, 3)
    torch.save({"weights": {}}, path)
    with pytest.raises(UserError, match=r"a.pth: holds no weights under 'model'"):
        load_tokenizer("customized", path, 16)


# ---- training


def test_reconstruction_loss():
    torch.manual_seed(0)
    model: Any = DiscreteVAE(8, 5, 6, 2, 4)
    imgs, noise = torch.randn(3, 3, 8, 8), torch.randn(3, 5, 2, 2)
    out = model(imgs, 0.5, 0.1, noise)
    logits = model.encoder(imgs)
    drawn = ((logits + noise) / 0.5).softmax(1)
    painted = model.decoder((drawn.permute(0, 2, 3, 1) @ model.codebook.weight).permute(0, 3, 1, 2))
    assert_close(out.error, (painted - imgs).square().mean(), rtol=1e-5, atol=0)
    use = logits.softmax(1).mean((0, 2, 3))
    assert_close(out.kl, (use * (use * 5).log()).sum(), rtol=1e-4, atol=1e-6)
    assert_close(out.loss, out.error + 0.1 * out.kl, rtol=1e-6, atol=0)
    assert torch.equal(out.indices.flatten(1), model.get_codebook_indices(imgs))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    # Towards temperature 0 the draws are codes.
    cold = model(imgs, 1e-5, 0.1, noise)
    indices = (logits + noise).argmax(1).flatten(1)
    assert_close(cold.error, F.mse_loss(model.decode(indices), imgs), rtol=1e-4, atol=0)


def test_draws_are_gumbels():
    """The largest logit plus Gumbel noise is a draw from the softmax."""
    shares = (0.7, 0.1, 0.1, 0.05, 0.05)
    model: Any = DiscreteVAE(8, 5, 1, 2, 4)
    seen = []
    with torch.no_grad():
        model.encoder[-1].weight.zero_()
        model.encoder[-1].bias.copy_(torch.tensor(shares).log())
        model.codebook.weight.copy_(torch.tensor([[1.0], [0], [0], [0], [0]]))
        model.decoder[0].register_forward_hook(lambda _module, args, _out: seen.append(args[0]))
        out = model(torch.zeros(512, 3, 8, 8), 1e-3)
    assert seen[0].mean().item() == pytest.approx(0.7, abs=0.03)
    assert out.kl.item() == pytest.approx(math.log(5) + sum(p * math.log(p) for p in shares), rel=1e-4)


def test_temperature():
    at = [engine_tokenizer.temperature_at(p, 1.0, 0.0625, 0.8) for p in (0, 0.4, 0.8, 1)]
    assert at == pytest.approx([1, 0.53125, 0.0625, 0.0625])


def test_code_usage():
    usage = engine_tokenizer.CodeUsage(8, CPU)
    usage.add(torch.tensor([[[0, 1], [1, 0]], [[3, 3], [5, 5]]]))
    assert usage.stats() == {"codes_used": 4, "perplexity": pytest.approx(4)}
    other = engine_tokenizer.CodeUsage(8, CPU)
    other.load_state_dict(usage.state_dict())
    other.add(torch.full((3, 2, 2), 7))
    assert other.counts.tolist() == [2, 2, 0, 2, 0, 2, 0, 12]


def test_view_is_that_of_pretraining():
    """Crops between the given shares, normalised by 0.5 and 0.5."""
    grey = Image.fromarray(np.full((40, 60, 3), 255, np.uint8))
    view: Any = main_tokenizer.tokenizer_transform(16)(grey)
    assert view.shape == (3, 16, 16)
    assert torch.equal(view, torch.ones(3, 16, 16))
    crop = main_tokenizer.tokenizer_transform(16, 0.2, 0.5, "bicubic").transforms[0]
    assert (crop.scale, crop.ratio, crop.interpolation.value) == ((0.2, 0.5), (3 / 4, 4 / 3), "bicubic")


SMALL = ["--input_size", "16", "--num_layers", "2", "--num_tokens", "32", "--codebook_dim", "16", "--hidden_dim", "16"]
SMALL += ["--batch_size", "8", "--num_workers", "0", "--crop_min_size", "0.5"]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.mark.slow
def test_training_improves_and_pretraining_reads_it(tmp_path, digits, capsys):
    flags = [*SMALL, "--data_path", digits, "--epochs", "40", "--output_dir", str(tmp_path)]
    run_main(main_tokenizer, *flags)
    log = lines(tmp_path)
    assert len(log) == 40
    assert log[-1]["train_code_error"] < 0.4 * log[-1]["train_variance"] < 0.6 * log[0]["train_code_error"]
    assert log[-1]["train_codes_used"] >= 12
    assert log[-1]["train_perplexity"] >= 8
    assert (log[0]["train_temperature"], log[-1]["train_temperature"]) == pytest.approx((1, 1 / 16), abs=0.01)
    said = capsys.readouterr().out
    assert f"Epoch 39: squared error from codes {log[-1]['train_code_error']:.4f}" in said
    assert "WARNING" not in said.splitlines()[-2]
    tokenizer = load_tokenizer("customized", str(tmp_path / "checkpoint.pth"), 16, 3)
    assert (tokenizer.num_tokens, tokenizer.get_codebook_indices(torch.rand(2, 3, 16, 16)).shape) == (32, (2, 16))


def test_a_stopped_run_ends_with_the_same_bits(tmp_path, digits, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*SMALL, "--data_path", digits, "--epochs", "4", "--accum_iter", "2", "--output_dir"]
    run_main(main_tokenizer, *flags, str(whole))
    forward, calls = DiscreteVAE.forward, []

    def signalling(self, *args):
        calls.extend([None] * self.training)  # not the estimate of memory
        if self.training and len(calls) == 9:  # the third of the second epoch's six
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args)

    monkeypatch.setattr(exits, "_received", [])
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as end:
        patched.setattr(DiscreteVAE, "forward", signalling)
        run_main(main_tokenizer, *flags, str(stopped))
    assert end.value.code == 128 + signal.SIGTERM
    assert distributed.load(str(stopped / "checkpoint.pth"))["images"] == 32
    exits._received.clear()
    run_main(main_tokenizer, *flags, str(stopped))
    assert_same(whole, stopped)


def test_collapse_is_warned_about(capsys):
    stats = {"code_error": 0.1, "variance": 0.5, "codes_used": 12, "perplexity": 4.1}
    main_tokenizer.report(stats, 512, epoch=3, epochs=8)
    assert "12 of 512 codes in use, perplexity 4.1" in (said := capsys.readouterr().out)
    assert "WARNING: most of the codebook is unused" in said
    main_tokenizer.report(stats, 512, epoch=2, epochs=8)  # too early to tell
    main_tokenizer.report({**stats, "perplexity": 100.0}, 512, epoch=7, epochs=8)
    assert "WARNING" not in capsys.readouterr().out


def test_length_of_a_run_by_default(tmp_path, digits, monkeypatch):
    """As many epochs as fill the updates, with a twentieth of them to warm up."""
    monkeypatch.setattr(main_tokenizer, "UPDATES", 5)
    run_main(main_tokenizer, *SMALL, "--data_path", digits, "--accum_iter", "3", "--output_dir", str(tmp_path))
    args = distributed.load(str(tmp_path / "checkpoint.pth"))["args"]
    assert (args["epochs"], args["warmup_epochs"]) == (3, pytest.approx(0.15))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--input_size", "18"], "image size 18 is not a multiple of 2^2"),
        (["--num_tokens", "0"], "expected positive numbers"),
        (["--crop_min_size", "0"], "--crop_min_size 0.0: expected"),
        (["--second_interpolation", "cubic"], "interpolation cubic, expected one of lanczos, bicubic"),
        (["--anneal", "0"], "expected 0 < t1 <= t0, 0 < share <= 1"),
        (["--min_temperature", "2"], "expected 0 < t1 <= t0, 0 < share <= 1"),
        (["--batch_size", "64"], "48 training images do not fill one batch"),
    ],
)
def test_mistakes_in_flags(tmp_path, digits, capsys, flags, expected):
    start = [*SMALL, "--data_path", digits, "--output_dir", str(tmp_path)]
    assert expected in mistake(main_tokenizer, *start, *flags, capsys=capsys)


def test_defaults_of_the_network_are_flags():
    """The checkpoint's flags are what `load_tokenizer` builds the network from."""
    args: Any = main_tokenizer.get_args_parser().parse_args([])
    names = set(inspect.signature(DiscreteVAE).parameters) - {"image_size"}
    assert names <= set(vars(args))
