"""The downstream ViT against the authors' numbers, its probes, and the loading of encoders from files."""

import argparse
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae import main_finetune
from cae.main_linprobe import add_probe
from cae.models_cae import ContextAutoencoderViT
from cae.models_vit import (
    MODELS,
    ProbeBatchNorm,
    VisionTransformer,
    interpolate_pos_embed,
    load_encoder,
    load_pretrained,
    resize_relative_positions,
)
from common.distributed import UserError
from tests.support.helpers import (
    assert_close,
    assert_drawn_alike,
    golden_files,
    load_golden,
    tolerance,
)

# ---- goldens


def model_of(ref, weights: dict[str, Tensor]) -> VisionTransformer:
    """The golden's network; its head is behind a batch norm where the weights say so."""
    extra = ref.meta.get("extra", {})
    kwargs = {name: extra[name] for name in ("mlp_ratio", "qkv_bias") if name in extra}
    kwargs["norm_layer"] = partial(nn.LayerNorm, eps=extra.get("norm_eps", 1e-6))
    model = VisionTransformer(**{**kwargs, **ref.kwargs})
    if "head.1.weight" in weights:
        add_probe(model)
        model.requires_grad_(True)
    model.load_state_dict(weights)
    return model


def criterion_of(ref) -> nn.CrossEntropyLoss:
    smoothing = re.search(r"smoothing ([\d.]+)", ref.meta.get("extra", {}).get("loss", ""))
    return nn.CrossEntropyLoss(label_smoothing=float(smoothing[1]) if smoothing else 0.0)


def assert_loss_and_gradients(ref, model: VisionTransformer, logits: Tensor) -> None:
    tol = tolerance(ref)
    loss = criterion_of(ref)(logits, ref["in/y"])
    ref.check("out/loss", loss, **tol)
    loss.backward()
    for name, expected in ref.group("out/grad").items():
        assert_close(model.get_parameter(name).grad, expected, **tol, what=name)


def assert_forward(path) -> None:
    ref = load_golden(path)
    tol = tolerance(ref)
    model = model_of(ref, ref.weights).train(ref.meta.get("mode") == "train")
    ref.check("out/features", model.forward_features(ref["in/x"]), **tol, what="features")
    logits = model(ref["in/x"])
    ref.check("out/logits", logits, **tol, what="logits")
    assert_loss_and_gradients(ref, model, logits)


@golden_files("cae", "ft_fwd")
def test_fine_tuned_classifier(path):
    assert_forward(path)


@golden_files("cae", "linear_fwd")
def test_linear_probe(path):
    assert_forward(path)


@golden_files("cae", "attentive_fwd")
def test_attentive_probe(path):
    """With the batch's statistics, which join the running ones, and with the running ones."""
    ref = load_golden(path)
    tol, x = tolerance(ref), ref["in/x"]
    model = model_of(ref, ref.weights).train(ref.meta.get("mode") == "train")
    ref.check("out/features_train", model.forward_features(x), **tol, what="features")
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        ref.check(f"out/{name}_after", getattr(model.fc_norm, name), **tol, what=name)
    running = model(x, is_train=False)
    ref.check("out/logits_running", running, **tol, what="running statistics")
    model.load_state_dict(ref.weights)
    logits = model(x)
    ref.check("out/logits_train", logits, **tol, what="batch statistics")
    assert_loss_and_gradients(ref, model, logits)


@golden_files("cae", "ckpt_")
def test_pretrained_encoder_in_the_classifier(path):
    ref = load_golden(path)
    model = model_of(ref, ref.group("in/target")).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_pretrained(model, ref.weights, resize_positions=ref.meta["entry"] == "linear", keep_norm=False)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert sorted(changed) == sorted(ref.meta.get("replaced_keys", changed))
    ref.check("out/logits", model(ref["in/x"]), **tolerance(ref))


@golden_files("cae", "pos_embed_interp")
def test_interpolate_pos_embed(path):
    ref = load_golden(path)
    if "out/pos_embed" not in ref:
        pytest.skip("the file holds no table")
    expected = ref["out/pos_embed"]
    grid = round((expected.shape[1] - 1) ** 0.5)
    assert_close(interpolate_pos_embed(ref["in/pos_embed"], grid), expected, **tolerance(ref))


@golden_files("cae", "relpos_interp")
def test_resize_relative_positions(path):
    ref = load_golden(path)
    if "out/table" not in ref:
        pytest.skip("the file holds no table")
    expected = ref["out/table"]
    grid = (round((len(expected) - 3) ** 0.5) + 1) // 2
    table = resize_relative_positions(ref["in/table"], grid)
    assert table.dtype == ref["in/table"].dtype
    assert_close(table, expected, **tolerance(ref))
    assert torch.equal(table[-3:], ref["in/table"][-3:])


@golden_files("cae", "manifest", ".json")
def test_presets_have_upstreams_keys_and_sizes(path):
    presets = load_golden(path)["presets"]
    stages = ("finetune", "linear", "attentive")
    presets = {name: preset for name, preset in presets.items() if name.split("/")[0] in stages}
    assert presets
    for name, preset in presets.items():
        with torch.device("meta"):
            model = MODELS[preset["constructor"]](**preset["kwargs"])
        state = model.state_dict()
        assert len(state) == preset["n_state_entries"], name
        if "state_dict" in preset:
            shapes = [(key, list(value.shape)) for key, value in state.items()]
            assert shapes == [(key, list(shape)) for key, shape in dict(preset["state_dict"]).items()], name
        assert sum(p.numel() for p in model.parameters()) == preset["params_total"], name
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == preset["params_trainable"], name


@golden_files("cae", "init_stats", ".json")
def test_initial_weights(path):
    cases = {n: s for n, s in load_golden(path).items() if n.split("_")[0] in ("finetune", "linear", "attentive")}
    assert cases
    for name, stats in cases.items():
        stage, size = name.split("_")[:2]
        torch.manual_seed(1)
        model = MODELS[f"cae_{size}_patch16_224"](
            num_classes=stats["head.weight"]["shape"][0],
            init_values=stats.get("blocks.0.gamma_1", {"mean": 0})["mean"],
            use_rel_pos_bias="blocks.0.attn.relative_position_bias_table" in stats,
            use_mean_pooling="norm.weight" not in stats,
            sin_pos_emb="pos_embed" in stats,
            lin_probe=stage != "finetune",
            linear_type="attentive" if stage == "attentive" else "standard",
        )
        assert list(model.state_dict()) == list(stats)
        assert_drawn_alike(model, stats)


# ---- the network

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 5}
SIZES |= {"init_values": 0.1}
PROBE: dict[str, Any] = {"lin_probe": True, "use_mean_pooling": False}
ATTENTIVE: dict[str, Any] = {**PROBE, "linear_type": "attentive"}


def small(seed: int = 0, **kwargs) -> VisionTransformer:
    """A network in which no tensor is left as constant as it is born."""
    torch.manual_seed(seed)
    model = VisionTransformer(**{**SIZES, **kwargs})
    for param in model.parameters():
        if param.requires_grad:
            param.data.add_(0.2 * torch.randn_like(param))
    return model


@pytest.mark.parametrize("rel_pos", [{}, {"use_rel_pos_bias": True}, {"use_shared_rel_pos_bias": True}], ids=str)
@pytest.mark.parametrize("kind", [{}, {"use_mean_pooling": False}, PROBE, {"lin_probe": True}, ATTENTIVE], ids=str)
def test_last_block_computes_only_the_rows_that_are_read(kind, rel_pos):
    model = small(**kind, **rel_pos).double().eval()
    imgs = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    assert model.pos_embed is not None
    x = torch.cat([model.cls_token.expand(3, -1, -1), model.patch_embed(imgs)], dim=1) + model.pos_embed
    for block in model.blocks:
        x = block(x, None if model.rel_pos_bias is None else model.rel_pos_bias())
    if "linear_type" in kind:
        attend: Any = model.attentive_blocks[0]
        q = attend(model.query_token.expand(3, -1, -1), model.norm(x))[:, 0]
        full = (q - q.mean(dim=0)) / (q.var(dim=0, unbiased=False) + 1e-5).sqrt()
    elif kind == {}:
        full = model.fc_norm(x[:, 1:].mean(dim=1))
    else:  # the class token, normed where the network has a norm
        full = x[:, 0] if kind == {"lin_probe": True} else model.norm(x[:, 0])
    assert_close(model.forward_features(imgs), full, rtol=0, atol=1e-10)
    assert_close(model(imgs), model.head(full), rtol=0, atol=1e-10)


def test_attentive_block_has_neither_residual_nor_positions():
    block: Any = small(**ATTENTIVE).attentive_blocks[0]
    q, kv = torch.randn(2, 1, 16), torch.randn(2, 17, 16)
    cross = block.cross_attn

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 4)).transpose(1, 2)

    queries = heads(block.norm_q(q) @ cross.q.weight.T + cross.q_bias) / 2
    keys, values = heads(block.norm_k(kv) @ cross.k.weight.T), heads(block.norm_v(kv) @ cross.v.weight.T + cross.v_bias)
    out = cross.proj((queries @ keys.transpose(2, 3)).softmax(dim=-1).matmul(values).transpose(1, 2).flatten(2))
    assert_close(block(q, kv), out, rtol=1e-4, atol=1e-5)
    permuted = block(q, kv[:, torch.randperm(17)])
    assert_close(permuted, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_probe_batch_norm__statistics_are_the_callers_choice(training):
    norm = ProbeBatchNorm(6).train(training)
    assert not list(norm.parameters())
    assert (norm.eps, norm.momentum) == (1e-5, 0.1)
    x = 3 * torch.randn(40, 6) + 5
    out = norm(x)
    assert_close(out, (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt(), rtol=1e-4, atol=1e-5)
    assert_close(norm.running_mean, 0.1 * x.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert_close(norm.running_var, 0.9 + 0.1 * x.var(dim=0), rtol=1e-5, atol=1e-6)
    assert norm.num_batches_tracked == 1
    mean, var = norm.running_mean.clone(), norm.running_var.clone()  # type: ignore[union-attr]
    assert_close(norm(x, is_train=False), (x - mean) / (var + 1e-5).sqrt(), rtol=1e-4, atol=1e-5)
    assert torch.equal(norm.running_mean, mean)  # type: ignore[arg-type]
    assert norm.num_batches_tracked == 1


def test_head_starts_small():
    for scale in (0.001, 1.0):
        torch.manual_seed(0)
        head: Any = VisionTransformer(**{**SIZES, "num_classes": 500}, init_scale=scale).head
        assert head.weight.std().item() == pytest.approx(0.02 * scale, rel=0.05)
        assert not head.bias.any()


def test_positions():
    fixed, none = VisionTransformer(**SIZES), VisionTransformer(**SIZES, sin_pos_emb=False)
    learned = VisionTransformer(**SIZES, abs_pos_emb=True)
    assert fixed.pos_embed is not None
    assert not fixed.pos_embed.requires_grad
    assert learned.pos_embed is not None
    assert learned.pos_embed.requires_grad
    assert learned.pos_embed.std().item() == pytest.approx(0.02, rel=0.2)
    assert none.pos_embed is None
    assert [list(m.state_dict())[:2] for m in (fixed, learned)] == [["cls_token", "pos_embed"]] * 2


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"linear_type": "mean"}, "linear_type is 'mean', expected standard or attentive"),
        ({"img_size": 18}, "image size 18 is not a multiple of the patch size 4"),
        ({"embed_dim": 18, "num_heads": 2}, "width 18 is not a multiple of 4"),
    ],
    ids=str,
)
def test_model__raises_on_what_does_not_fit(kwargs, words):
    with pytest.raises(ValueError, match=words):
        VisionTransformer(**{**SIZES, **kwargs})
    with pytest.raises(ValueError, match="images are 16x12, the model was built for 16x16"):
        small()(torch.rand(1, 3, 16, 12))


# ---- files


def pretrained(**kwargs) -> dict[str, Tensor]:
    """State dict of a randomised pre-training network."""
    torch.manual_seed(1)
    own = {name: SIZES[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    small_decoder = {"decoder_embed_dim": 12, "decoder_num_heads": 3, "decoder_num_classes": 7}
    depths: dict[str, Any] = {"regressor_depth": 1, "decoder_depth": 1}
    model = ContextAutoencoderViT(**{**own, **small_decoder, **depths, **kwargs})
    for param in model.encoder.parameters():
        if param.requires_grad:
            param.data.add_(0.1 * torch.randn_like(param))
    return model.state_dict()


def revision_a(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of the older revision."""
    names = {
        "alignment_encoder.": "teacher.",
        "encoder_to_regresser": "encoder_to_decoder",
        "regresser.regressor_blocks": "pretext_neck.regressor_blocks",
        "regresser.norm": "pretext_neck.norm",
        "decoder.decoder_blocks": "pretext_neck.decoder_blocks",
        "decoder.norm": "pretext_neck.norm2",
        "decoder.head": "pretext_neck.head",
    }
    renamed = {}
    for key, value in state.items():
        new, old = next(((n, o) for n, o in names.items() if key.startswith(n)), ("", ""))
        renamed[old + key.removeprefix(new)] = value
    return renamed


LAYOUTS = {
    "revision B": lambda state: state,
    "without the targets' encoder": lambda state: {k: v for k, v in state.items() if not k.startswith("alignment_")},
    "revision A": revision_a,
    "DistributedDataParallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "encoder only": lambda state: {k: v for k, v in state.items() if k.startswith("encoder.")},
    "bare": lambda state: {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")},
}


def file_of(content: dict[str, Any], folder) -> str:
    path = folder / "checkpoint.pth"
    torch.save(content, path)
    return str(path)


def assert_encoder(model: VisionTransformer, state: dict[str, Tensor], norm: str) -> None:
    """The encoder's weights, and its final norm in `norm`."""
    own = model.state_dict()
    keys = [key for key in own if key.startswith(("blocks.", "patch_embed.", "cls_token"))]
    keys = [key for key in keys if "relative_position" not in key]
    assert keys
    for key in keys:
        assert torch.equal(own[key], state[f"encoder.{key}"]), key
    for part in ("weight", "bias"):
        assert torch.equal(own[f"{norm}.{part}"], state[f"encoder.norm.{part}"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "norm"), [({}, "fc_norm"), ({"use_mean_pooling": False}, "norm"), (PROBE, "norm"), (ATTENTIVE, "norm")]
)
def test_load_encoder__layouts_of_weights(tmp_path, layout, kind, norm, capsys):
    state = pretrained()
    content = {"model": LAYOUTS[layout](state), "epoch": 3, "args": argparse.Namespace(lr=0.1), "scaler": {}}
    for weights in (content, content["model"]):  # a checkpoint of a run, and weights alone
        model = small(use_rel_pos_bias=True, **kind)
        head = model.head.weight.clone()  # type: ignore[union-attr]
        load_encoder(model, file_of(weights, tmp_path))
        assert_encoder(model, state, norm)
        assert torch.equal(model.head.weight, head)  # type: ignore[arg-type]
    report = capsys.readouterr().out
    assert "tensors matched; missing: " in report
    assert "head (2)" in report


@pytest.mark.parametrize("key", ["model", "module", "state_dict"])
def test_load_encoder__first_key_that_is_there(tmp_path, key):
    state = pretrained()
    model = small()
    load_encoder(model, file_of({key: state, "epoch": "best"}, tmp_path))
    assert_encoder(model, state, "fc_norm")
    other = {name: value + 1 for name, value in state.items()}
    load_encoder(model, file_of({key: state, "ours": other}, tmp_path), keys=("ours", "model"))
    assert_encoder(model, other, "fc_norm")


def test_load_encoder__prefix(tmp_path):
    state = pretrained()
    prefixed = {f"backbone.{name}": value for name, value in state.items()} | {"neck.weight": torch.zeros(1)}
    model = small()
    load_encoder(model, file_of({"model": prefixed}, tmp_path), prefix="backbone.")
    assert_encoder(model, state, "fc_norm")


def test_class_token__keeps_the_final_norm_unless_told(tmp_path):
    """Upstream loses the norm of a class-token classifier; ours keeps it by default."""
    state = pretrained()
    path = file_of({"model": state}, tmp_path)
    for keep in (True, False):
        model = small(use_mean_pooling=False)
        before = model.norm.weight.clone()  # type: ignore[union-attr]
        load_encoder(model, path, keep_norm=keep)
        expected = state["encoder.norm.weight"] if keep else before
        assert torch.equal(model.norm.weight, expected)  # type: ignore[arg-type]
    for kind in (PROBE, ATTENTIVE):  # the probes load it in either case, as upstream
        model = small(**kind)
        load_encoder(model, path, keep_norm=False)
        assert_encoder(model, state, "norm")


TUNED: list[dict[str, Any]] = [{"use_rel_pos_bias": True}, {"use_mean_pooling": False}, PROBE, ATTENTIVE]


@pytest.mark.parametrize("classes", [5, 3])
@pytest.mark.parametrize("source", TUNED, ids=str)
@pytest.mark.parametrize("target", TUNED, ids=str)
def test_load_encoder__takes_fine_tuned_and_probed_files(tmp_path, source, target, classes, capsys):
    """Every kind of downstream checkpoint starts every kind; norms of tokens and of their mean serve for each other."""
    tuned = small(seed=1, **source)
    if source == PROBE:
        add_probe(tuned)
    state = tuned.state_dict()
    model = small(**{**target, "num_classes": classes})
    load_encoder(model, file_of({"model": state}, tmp_path))
    own, report = model.state_dict(), capsys.readouterr().out
    for key in [k for k in own if k.startswith(("blocks.", "patch_embed.", "cls_token")) and k in state]:
        assert torch.equal(own[key], state[key]), key
    for new in ("norm.weight", "fc_norm.weight"):
        others = ("norm.weight", "fc_norm.weight") if model.lin_probe else ("norm.weight",)
        given = [state[key] for key in (new, *others) if key in state]
        if new in own and given:
            assert torch.equal(own[new], given[0]), new
        elif new in own:
            assert re.search(rf"missing:[^;]* {new.split('.')[0]} \(2\)", report), report
    if "head.weight" in state and classes == 5:
        assert torch.equal(own["head.weight"], state["head.weight"])
    if target == ATTENTIVE and source == ATTENTIVE:
        assert torch.equal(own["query_token"], state["query_token"])


def test_load_encoder__attentive_probes_of_revision_a(tmp_path):
    """There the probe's norms have other names, and a norm that nothing uses."""
    tuned = small(seed=1, **ATTENTIVE)
    block = "attentive_blocks.0."
    state = {k.replace(f"{block}norm_", f"{block}norm1_"): v for k, v in tuned.state_dict().items()}
    state |= {f"{block}norm2_cross.{part}": torch.zeros(16) for part in ("weight", "bias")}
    model = small(**ATTENTIVE)
    load_encoder(model, file_of({"model": state}, tmp_path))
    for name, value in tuned.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("std", [0.01, 2e-5])
def test_load_encoder__draws_the_head_anew(tmp_path, std):
    tuned = small(num_classes=500)
    model = VisionTransformer(**{**SIZES, "num_classes": 500})
    load_encoder(model, file_of({"model": tuned.state_dict()}, tmp_path), head_std=std)
    head: Any = model.head
    assert head.weight.std().item() == pytest.approx(std, rel=0.1)
    assert not head.bias.any()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"depth": 1}, "8|blocks.1"),
        ({"depth": 4}, "more blocks than the model's 2: blocks.2"),
        ({"patch_size": 8}, "patch_embed"),
        ({"embed_dim": 12}, "cls_token is \\(1, 1, 12\\), the model expects \\(1, 1, 16\\)"),
        ({"init_values": 0.0}, "encoder weights are missing, first blocks.0.gamma_1"),
    ],
    ids=str,
)
def test_load_encoder__refuses_other_architectures(tmp_path, kwargs, words):
    path = file_of({"model": pretrained(**kwargs)}, tmp_path)
    with pytest.raises(UserError, match=f"check --model, --input_size and --patch_size.*({words})"):
        load_encoder(small(), path)


@pytest.mark.parametrize(
    ("content", "words"),
    [({"epoch": 1}, "holds no weights"), (b"hello", "not a checkpoint"), ({"model": {}}, "cls_token")],
    ids=str,
)
def test_load_encoder__refuses_other_files(tmp_path, content, words):
    path = tmp_path / "file.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=words):
        load_encoder(small(), str(path))


def test_encoder_of_another_image_size(tmp_path):
    """Fine-tuning keeps the positions of its own grid; linear probing resizes the file's. Both resize biases."""
    tuned = small(seed=1, img_size=24, use_rel_pos_bias=True)
    path = file_of({"model": tuned.state_dict()}, tmp_path)
    model = small(use_rel_pos_bias=True)
    own = model.state_dict()["pos_embed"].clone()
    load_encoder(model, path)
    assert torch.equal(model.state_dict()["pos_embed"], own)
    table = "blocks.1.attn.relative_position_bias_table"
    assert torch.equal(model.state_dict()[table], resize_relative_positions(tuned.state_dict()[table], 4))
    load_encoder(model, path, resize_positions=True)
    expected = interpolate_pos_embed(tuned.state_dict()["pos_embed"], 4)
    assert torch.equal(model.state_dict()["pos_embed"], expected)


def test_learned_positions_are_loaded_and_stay(tmp_path):
    """As in the authors' earlier revision: resized bicubically from a file, and detached."""
    tuned = small(seed=1, img_size=24, abs_pos_emb=True)
    model = small(abs_pos_emb=True)
    load_encoder(model, file_of({"model": tuned.state_dict()}, tmp_path))
    assert model.pos_embed is not None
    assert torch.equal(model.pos_embed, interpolate_pos_embed(tuned.state_dict()["pos_embed"], 4))
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    assert model.pos_embed.grad is None
    assert model.cls_token.grad is not None


def test_shared_biases_are_given_to_every_block(tmp_path):
    tuned = small(seed=1, use_shared_rel_pos_bias=True)
    model = small(use_rel_pos_bias=True)
    load_encoder(model, file_of({"model": tuned.state_dict()}, tmp_path))
    for block in model.blocks:
        assert torch.equal(
            block.attn.relative_position_bias_table,  # type: ignore[union-attr]
            tuned.rel_pos_bias.relative_position_bias_table,  # type: ignore[union-attr]
        )
    imgs = torch.rand(2, 3, 16, 16)
    assert_close(model(imgs), tuned(imgs), rtol=1e-4, atol=1e-5)


def test_resized_biases_keep_smooth_tables():
    """A table that is linear in the distance stays so where old and new distances agree."""
    table = torch.cat([torch.zeros(49, 2), torch.arange(6.0).view(3, 2)])
    assert torch.equal(resize_relative_positions(table, 4), table)
    resized = resize_relative_positions(table, 7)
    assert resized.shape == (13**2 + 3, 2)
    assert_close(resized[:-3], torch.zeros(169, 2), rtol=0, atol=1e-6)
    constant = resize_relative_positions(torch.cat([torch.full((49, 1), 2.5), torch.zeros(3, 1)]), 9)
    assert_close(constant[:-3], torch.full((17**2, 1), 2.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("pool", [True, False])
def test_class_token_features_are_those_of_pretraining(tmp_path, pool):
    """The classifier computes the encoder's own pass over all patches."""
    state = pretrained()
    source = ContextAutoencoderViT(
        **{name: SIZES[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")},
        decoder_embed_dim=12,
        decoder_num_heads=3,
        decoder_num_classes=7,
        regressor_depth=1,
        decoder_depth=1,
    ).eval()
    source.load_state_dict(state)
    model = small(use_mean_pooling=pool).eval()
    load_encoder(model, file_of({"model": state}, tmp_path))
    imgs = torch.rand(2, 3, 16, 16)
    order = torch.arange(16).expand(2, -1)
    tokens = source.encoder(source.encoder.patch_embed(imgs), order)
    if pool:
        source.encoder.norm = nn.Identity()  # type: ignore[assignment]
        plain = source.encoder(source.encoder.patch_embed(imgs), order)[:, 1:].mean(dim=1)
        norm = [state[f"encoder.norm.{part}"] for part in ("weight", "bias")]
        expected = F.layer_norm(plain, (16,), *norm, eps=1e-6)
    else:
        expected = tokens[:, 0]
    assert_close(model.forward_features(imgs), expected, rtol=1e-5, atol=1e-5)


# ---- the flags of the networks


def args_of(*flags: str) -> argparse.Namespace:
    toy = ["--model", "cae_nano", "--input_size", "16", "--patch_size", "8", "--nb_classes", "5"]
    return main_finetune.get_args_parser().parse_args([*toy, *flags])


def test_flags_reach_the_network():
    model = main_finetune.build_model(args_of())
    assert isinstance(model.fc_norm, nn.LayerNorm)
    assert "blocks.0.attn.relative_position_bias_table" in model.state_dict()
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.1)  # type: ignore[union-attr]
    assert model.blocks[0].gamma_1.mean().item() == pytest.approx(0.1)  # type: ignore[union-attr]
    flags = ["--use_cls", "--disable_rel_pos_bias", "--disable_sin_pos_emb", "--drop_path", "0.3", "--drop", "0.2"]
    flags += ["--attn_drop_rate", "0.1", "--layer_scale_init_value", "0"]
    model = main_finetune.build_model(args_of(*flags))
    assert set(model.state_dict()) & {"norm.weight", "fc_norm.weight", "pos_embed"} == {"norm.weight"}
    assert not [name for name in model.state_dict() if "relative" in name or "gamma" in name]
    block: Any = model.blocks[-1]
    assert (block.drop_path.drop_prob, block.attn.attn_drop) == pytest.approx((0.3, 0.1))
    assert [block.attn.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p, model.pos_drop.p] == [0.2, 0.0, 0.2, 0.2]
    with pytest.raises(UserError, match="--model deit_base_patch16_224: expected one of cae_tiny_patch16_224, "):
        main_finetune.build_model(args_of("--model", "deit_base_patch16_224"))
