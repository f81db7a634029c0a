"""The pre-training network against the authors' numbers, its targets' encoder, masks and initial weights."""

import copy
import math
import re
from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cae.blocks import DropPath, relative_position_index, sincos_pos_embed
from cae.models_cae import MODELS, ContextAutoencoderViT, cae_loss
from tests.support.helpers import (
    assert_close,
    assert_drawn_alike,
    blocks_in,
    golden_files,
    load_golden,
    tolerance,
)

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4}
SIZES |= {"decoder_embed_dim": 12, "decoder_num_heads": 3, "decoder_num_classes": 11}
SIZES |= {"regressor_depth": 2, "decoder_depth": 2}


def model_of(ref) -> ContextAutoencoderViT:
    """The golden's network with its weights; what CAE v2 alone reads is left out."""
    extra = ref.meta.get("extra", {})
    kwargs = {name: extra[name] for name in ("mlp_ratio", "qkv_bias") if name in extra}
    kwargs["norm_layer"] = partial(nn.LayerNorm, eps=extra.get("norm_eps", 1e-6))
    kwargs |= {name: value for name, value in ref.kwargs.items() if name != "num_out_dim"}
    model = ContextAutoencoderViT(**kwargs)
    model.load_state_dict(ref.weights)
    return model


# ---- goldens


def submodule(model: ContextAutoencoderViT, name: str) -> nn.Module:
    """The module whose output the golden calls `name`: encoder, regressor_block<i>, regresser, decoder_block<i>."""
    stacks = {"regressor": model.regresser, "decoder": model.decoder}
    block = re.fullmatch(r"(regressor|decoder)_block(\d+)", name)
    if block:
        return stacks[block[1]].get_submodule(f"{block[1]}_blocks.{block[2]}")
    return model.get_submodule(name)


@golden_files("cae", "pretrain_fwd")
def test_forward_losses_and_gradients(path):
    ref = load_golden(path)
    tol = tolerance(ref)
    model = model_of(ref).train(ref.meta.get("mode") == "train")
    seen = {}

    def keep(name: str):
        return lambda _module, _args, out: seen.update({name: out})

    for name in ref.group("out/inter"):
        submodule(model, name).register_forward_hook(keep(name))
    mask = ref["in/bool_masked_pos"]
    logits, predicted, target = model(ref["in/x"], mask)
    for name, expected in ref.group("out/inter").items():
        assert_close(seen[name], expected, **tol, what=name)
    outputs = {"logits": logits, "latent_predict": predicted, "latent_target": target}
    labels = ref["in/token_ids"].flatten(1)[mask.flatten(1)]
    ref.equal("out/labels", labels)
    weight = ref.meta["extra"]["align_loss_weight"]
    loss, main, align = cae_loss(logits, predicted, target, labels, weight)
    outputs |= {"loss": loss, "loss_main": main, "loss_align": align}
    outputs["mlm_acc"] = (logits.argmax(dim=1) == labels).float().mean()
    for name, value in outputs.items():
        ref.check(f"out/{name}", value, **tol, what=name)
    loss.backward()
    for name, expected in ref.group("out/grad").items():
        assert_close(model.get_parameter(name).grad, expected, **tol, what=name)
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == ref.meta.get("trainable_without_grad", [])


@golden_files("cae", "pretrain_droppath")
def test_stochastic_depth(path):
    ref = load_golden(path)
    model = model_of(ref).train()
    calls: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, keep in ref.group("in/keep").items():
        module, call = name.rsplit("/", 1)
        calls[module][int(call)] = keep
    for module, keeps in calls.items():
        drop = model.get_submodule(module)
        assert isinstance(drop, DropPath)
        drop.keep_override = [keeps[i] for i in range(len(keeps))]
    rates = {n: m.drop_prob for n, m in model.named_modules() if isinstance(m, DropPath) and m.drop_prob > 0}
    assert rates == pytest.approx(ref.meta.get("drop_probs", rates))
    outputs = model(ref["in/x"], ref["in/bool_masked_pos"])
    for name, value in zip(("logits", "latent_predict", "latent_target"), outputs, strict=True):
        ref.check(f"out/{name}", value, **tolerance(ref), what=name)
    assert not any(m.keep_override for m in model.modules() if isinstance(m, DropPath)), "every draw was used"


@golden_files("cae", "pretrain_droppath")
def test_stochastic_depth_is_drawn_in_upstreams_order(path):
    ref = load_golden(path)
    model, order = model_of(ref).train(), []
    for name, module in model.named_modules():
        if isinstance(module, DropPath) and module.drop_prob > 0:
            module.register_forward_hook(lambda *_, name=name: order.append(name))
    model(ref["in/x"], ref["in/bool_masked_pos"])
    assert order == [name for name, _ in ref.meta.get("call_order", zip(order, order, strict=True))]


@golden_files("cae", "sincos_relindex")
def test_fixed_tables(path):
    ref = load_golden(path)
    assert ref.meta["configs"]
    for i, (h, w, dim) in enumerate(ref.meta["configs"]):
        table = sincos_pos_embed(dim, (h, w))
        assert table.dtype == torch.float32
        ref.check(f"out/sincos/{i}", table, rtol=0, atol=tolerance(ref)["atol"], what=f"{h} x {w}")
        ref.check(f"out/rel_index/{i}", relative_position_index((h, w)), rtol=0, atol=0, what=f"{h} x {w}")


@golden_files("cae", "manifest", ".json")
def test_presets_have_upstreams_keys_and_sizes(path):
    presets = {k: v for k, v in load_golden(path)["presets"].items() if k.startswith("pretrain/cae_")}
    assert presets
    for name, preset in presets.items():
        kwargs = {k: v for k, v in preset["args"].items() if k != "num_out_dim"}
        with torch.device("meta"):
            model = MODELS[preset["constructor"]](**kwargs, init_values=preset["layer_scale_init_value"])
        state = model.state_dict()
        assert len(state) == preset["n_state_entries"], name
        if "state_dict" in preset:
            shapes = [(key, list(value.shape)) for key, value in state.items()]
            assert shapes == [(key, list(shape)) for key, shape in dict(preset["state_dict"]).items()], name
        assert sum(p.numel() for p in model.parameters()) == preset["params_total"], name
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == preset["params_trainable"], name
        parts: dict[str, int] = defaultdict(int)
        for key, param in model.named_parameters():
            parts[key.split(".")[0]] += param.numel()
        assert parts == preset["params_by_part"], name


@golden_files("cae", "init_stats", ".json")
def test_initial_weights(path):
    cases = {name: stats for name, stats in load_golden(path).items() if name.startswith("pretrain_")}
    assert cases
    for name, stats in cases.items():
        torch.manual_seed(1)
        model = MODELS[f"cae_{name.split('_')[1]}_patch16_224_8k_vocab"](
            regressor_depth=blocks_in(stats, "regresser.regressor_blocks"),
            decoder_depth=blocks_in(stats, "decoder.decoder_blocks"),
            decoder_embed_dim=stats["mask_token"]["shape"][-1],
            decoder_num_classes=stats["decoder.head.weight"]["shape"][0],
            init_values=stats.get("encoder.blocks.0.gamma_1", {"mean": 0})["mean"],
            decoder_layer_scale_init_value=stats.get("decoder.decoder_blocks.0.gamma_1", {"mean": 0})["mean"],
        )
        assert set(stats) == {key for key in model.state_dict() if not key.startswith("alignment_encoder.")}
        assert_drawn_alike(model, stats)


# ---- initial weights


def small(**kwargs) -> ContextAutoencoderViT:
    torch.manual_seed(0)
    return ContextAutoencoderViT(**{**SIZES, **kwargs})


@pytest.mark.parametrize("fix", [False, True])
def test_fix_init_weight_shrinks_with_the_depth(fix):
    wide: dict[str, Any] = {"embed_dim": 64, "decoder_embed_dim": 96, "depth": 3, "regressor_depth": 3}
    model = small(**wide, decoder_depth=3, fix_init_weight=fix)
    stacks: dict[str, Any] = {"encoder": model.encoder.blocks, "decoder": model.decoder.decoder_blocks}
    outputs = [(b.attn.proj, b.mlp.fc2) for blocks in stacks.values() for b in blocks]
    outputs += [(b.cross_attn.proj, b.mlp_cross.fc2) for b in model.regresser.regressor_blocks]  # type: ignore[union-attr]
    for i, linears in enumerate(outputs):
        for linear in linears:
            xavier = math.sqrt(6 / sum(linear.weight.shape))
            bound = 0.02 / math.sqrt(2 * (i % 3 + 1)) if fix else xavier
            assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.02), i
            assert not linear.bias.any()
    first: Any = model.encoder.blocks[0]
    own = {"qkv": first.attn.qkv, "fc1": first.mlp.fc1, "head": model.decoder.head}
    assert model.encoder_to_regresser is not None  # which upstream leaves at torch's initialisation
    own_bound = 1 / math.sqrt(64) if fix else math.sqrt(6 / (64 + 96))
    assert model.encoder_to_regresser.weight.abs().max().item() == pytest.approx(own_bound, rel=0.02)
    for name, linear in own.items():
        bound = 0.02 if fix else math.sqrt(6 / sum(linear.weight.shape))
        assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.02), name
    for tensor in (model.mask_token, model.encoder.cls_token, model.encoder.patch_embed.proj.weight):
        assert 0.015 < tensor.abs().max() <= 0.02
    for name, value in model.alignment_encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name]), name


def test_layer_scale():
    model = small(init_values=1e-5, decoder_layer_scale_init_value=0.3)
    for name, param in model.named_parameters():
        if "gamma" in name:
            expected = 1e-5 if "encoder.blocks" in name else 0.3
            assert_close(param, torch.full_like(param, expected), rtol=1e-6, atol=0, what=name)
            assert param.requires_grad == (not name.startswith("alignment_encoder."))
    without = small(init_values=0, decoder_layer_scale_init_value=0)
    left = {name: param for name, param in without.named_parameters() if "gamma" in name}
    assert set(left) == {f"regresser.regressor_blocks.{i}.gamma_{j}_cross" for i in (0, 1) for j in (1, 2)}
    for param in left.values():
        assert not param.requires_grad
        assert torch.equal(param, torch.ones_like(param))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"model_type": "caev2"}, "model_type is 'caev2', expected cae"),
        ({"regressor_depth": 0}, "regressor_depth 0 and decoder_depth 2: expected at least 1"),
        ({"decoder_depth": 0}, "decoder_depth 0: expected at least 1"),
        ({"base_momentum": 1.5}, "base_momentum is 1.5, expected 0 to 1"),
        ({"img_size": 18}, "image size 18 is not a multiple of the patch size 4"),
        ({"embed_dim": 18, "num_heads": 2}, "width 18 is not a multiple of 4"),
        ({"decoder_embed_dim": 18}, "width 18 is not a multiple of 4"),
    ],
    ids=str,
)
def test_model__raises_on_what_does_not_fit(kwargs, words):
    with pytest.raises(ValueError, match=words):
        small(**kwargs)


# ---- masks


def masks(batch: int, masked: int, patches: int = 16) -> Tensor:
    return torch.stack([torch.randperm(patches) for _ in range(batch)]) < masked


def test_forward__takes_masks_of_any_shape_and_type():
    model, imgs, mask = small(), torch.rand(3, 3, 16, 16), masks(3, 7)
    expected = model(imgs, mask)
    assert [tuple(x.shape) for x in expected] == [(21, 11), (3, 7, 12), (3, 7, 12)]
    for other in (mask.unflatten(1, (4, 4)), mask.int(), mask.double()):
        for value, ref in zip(model(imgs, other), expected, strict=True):
            assert torch.equal(value, ref)
    for value, ref in zip(model(imgs, mask, num_masked=7), expected, strict=True):
        assert torch.equal(value, ref)


@pytest.mark.parametrize("shape", [(3, 9), (3, 25), (2, 16), (3, 3, 3), (3, 5, 5)], ids=str)
def test_forward__refuses_masks_of_another_size(shape):
    mask = torch.zeros(shape).bool()
    mask.flatten(1)[:, :4] = True
    with pytest.raises(ValueError, match="mask"):
        small()(torch.rand(3, 3, 16, 16), mask)


def test_forward__refuses_unequal_masks():
    mask = masks(3, 7)
    mask[1, mask[1].int().argmin()] = True
    with pytest.raises(ValueError, match="hide \\[7, 8, 7\\] of 16 patches"):
        small()(torch.rand(3, 3, 16, 16), mask)


def test_forward__refuses_images_of_another_size():
    with pytest.raises(ValueError, match="images are 16x20, the model was built for 16x16"):
        small()(torch.rand(3, 3, 16, 20), masks(3, 7))


def test_prediction_sees_visible_patches_only():
    model, imgs, mask = small().eval(), torch.rand(2, 3, 16, 16), masks(2, 6)
    pixels = mask.view(2, 1, 4, 1, 4, 1).expand(-1, 3, -1, 4, -1, 4).reshape(imgs.shape)
    logits, predicted, target = model(imgs, mask)
    other = model(torch.where(pixels, torch.rand_like(imgs), imgs), mask)
    assert torch.equal(other[0], logits)
    assert torch.equal(other[1], predicted)
    assert not torch.isclose(other[2], target).all(dim=2).any()
    other = model(torch.where(pixels, imgs, torch.rand_like(imgs)), mask)
    assert torch.equal(other[2], target)
    assert not torch.isclose(other[1], predicted).all(dim=2).any()


def test_order_of_the_outputs_is_that_of_the_patches():
    """Masked patches come row by row: the same image with more of it hidden, patch by patch."""
    model, imgs = small().eval(), torch.rand(1, 3, 16, 16)
    mask = torch.zeros(1, 16).bool()
    mask[0, [11, 2, 5]] = True
    _, _, target = model(imgs, mask)
    swapped = imgs.clone()
    swapped[..., 0:4, 8:12] = 0  # patch 2
    difference = (model(swapped, mask)[2] - target).abs().amax(dim=2)[0]
    assert difference.argmax() == 0, "patch 2 is the first masked one"


def test_patch_embedding_is_the_convolution():
    embed = small().encoder.patch_embed
    imgs = torch.randn(2, 3, 16, 16)
    assert_close(embed(imgs), embed.proj(imgs).flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-6)


# ---- the targets' encoder


def loss_of(model: ContextAutoencoderViT, imgs: Tensor, mask: Tensor) -> Tensor:
    logits, predicted, target = model(imgs, mask)
    labels = torch.arange(len(logits)) % 11
    return cae_loss(logits, predicted, target, labels, align_weight=2.0)[0]


def assert_tied(model: ContextAutoencoderViT) -> None:
    pairs = list(zip(model.alignment_encoder.parameters(), model.encoder.parameters(), strict=True))
    assert pairs
    assert all(a.data_ptr() == b.data_ptr() and a.dtype == b.dtype for a, b in pairs)


def randomised(model: ContextAutoencoderViT) -> ContextAutoencoderViT:
    for name, param in model.named_parameters():
        if param.requires_grad and not name.startswith("alignment_encoder."):
            param.data.add_(0.3 * torch.randn_like(param))
    return model


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_a_copy_has_a_targets_encoder_of_its_own_weights(momentum):
    model = randomised(small(base_momentum=momentum))
    other = copy.deepcopy(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert other.encoder.norm.weight is not model.encoder.norm.weight
    with torch.no_grad():
        other.encoder.norm.weight.add_(1)  # type: ignore[operator]
    shares = torch.equal(other.alignment_encoder.norm.weight, other.encoder.norm.weight)  # type: ignore[arg-type]
    assert shares == (momentum is None)
    assert not torch.equal(other.encoder.norm.weight, model.encoder.norm.weight)  # type: ignore[arg-type]
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.encoder.norm.weight, model.encoder.norm.weight)  # type: ignore[arg-type]


def test_targets_carry_no_gradient():
    model, imgs, mask = small().train(), torch.rand(2, 3, 16, 16), masks(2, 6)
    _, predicted, target = model(imgs, mask)
    assert not target.requires_grad
    assert not any(p.requires_grad for p in model.alignment_encoder.parameters())
    (predicted - target).square().mean().backward()
    assert all(p.grad is None for p in model.alignment_encoder.parameters())


def test_align_loss_stops_the_gradient_of_its_target():
    predicted, target = (torch.rand(2, 3, 4, requires_grad=True) for _ in range(2))
    loss, main, align = cae_loss(torch.zeros(6, 5), predicted, target, torch.zeros(6).long(), align_weight=3)
    assert align.item() == pytest.approx(3 * (predicted - target).square().mean().item())
    assert loss.item() == pytest.approx((main + align).item())
    loss.backward()
    assert target.grad is None
    assert_close(predicted.grad, 3 * 2 * (predicted - target) / 24, rtol=1e-5, atol=1e-7)


def test_targets_encoder_shares_the_encoders_weights():
    model, imgs, mask = small(), torch.rand(2, 3, 16, 16), masks(2, 6)
    assert_tied(model)
    assert_tied(model.double())
    assert_tied(model.float())
    other = randomised(small()).state_dict()
    model.load_state_dict(other)
    assert_tied(model)
    params = [p for p in model.parameters() if p.requires_grad]
    for family in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = family(params, lr=0.1)
        before = model.alignment_encoder.cls_token.clone()
        loss_of(model, imgs, mask).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_tied(model)
        assert not torch.equal(model.alignment_encoder.cls_token, before)
    # Its pass over the masked patches is the encoder's own.
    model.eval()
    target = model(imgs, mask)[2]
    order = mask.int().argsort(dim=1, stable=True)[:, -6:]
    latents = model.encoder(model.encoder.patch_embed(imgs), order)
    assert_close(target, model._to_regressor(latents)[:, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_state_dicts_load_with_and_without_the_targets_encoder(momentum):
    """Strictly. A file's own targets' encoder counts where it is a moving average; else it is the encoder."""
    source = randomised(small()).state_dict()
    aliases = {name for name in source if name.startswith("alignment_encoder.")}
    assert len(aliases) == sum(name.startswith("encoder.") for name in source)
    without = {name: value for name, value in source.items() if name not in aliases}
    older = {name: value + 1 if name in aliases else value for name, value in source.items()}
    for state, moved in ((source, 0), (without, 0), (older, 0 if momentum is None else 1)):
        model = small(base_momentum=momentum)
        given = dict(state)
        model.load_state_dict(state)
        assert list(state) == list(given), "the caller's state dict is left alone"
        for name, value in model.encoder.state_dict().items():
            assert torch.equal(value, source[f"encoder.{name}"]), name
            expected = source[f"encoder.{name}"] + moved
            assert torch.equal(model.alignment_encoder.state_dict()[name], expected), name
        if momentum is None:
            assert_tied(model)
    with pytest.raises(RuntimeError, match="encoder.cls_token"):
        small().load_state_dict({k: v for k, v in without.items() if k != "encoder.cls_token"})


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_moving_average_follows_after_each_forward_pass(momentum):
    """teacher <- m teacher + (1 - m) encoder at the end of a forward pass: targets lag a step even for m = 0."""
    model, imgs, mask = randomised(small(base_momentum=momentum)), torch.rand(2, 3, 16, 16), masks(2, 6)
    model.eval()
    teacher = {n: v.clone() for n, v in model.alignment_encoder.state_dict().items()}
    for _ in range(3):
        reference = small().eval()
        reference.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("alignment_")})
        reference.encoder.load_state_dict(teacher)
        _, predicted, target = model(imgs, mask)
        assert_close(target, reference(imgs, mask)[2], rtol=1e-5, atol=1e-6)
        assert not target.requires_grad
        for name, value in model.encoder.state_dict().items():
            teacher[name] = momentum * teacher[name] + (1 - momentum) * value
            assert_close(model.alignment_encoder.state_dict()[name], teacher[name], rtol=1e-5, atol=1e-6, what=name)
        assert predicted.requires_grad
        for param in model.encoder.parameters():
            if param.requires_grad:
                param.data.add_(0.1 * torch.randn_like(param))
    assert not any(p.requires_grad for p in model.alignment_encoder.parameters())


def test_predictions_are_those_without_the_moving_average():
    plain, averaged = randomised(small()).eval(), small(base_momentum=0.0).eval()
    averaged.load_state_dict(plain.state_dict())
    imgs, mask = torch.rand(2, 3, 16, 16), masks(2, 6)
    for _ in range(2):
        for value, ref in zip(averaged(imgs, mask), plain(imgs, mask), strict=True):
            assert_close(value, ref, rtol=0, atol=1e-6)


def test_autocast_leaves_every_weight_its_gradient():
    """Casts that autocast keeps for reuse must not come from the pass without gradients."""
    model, imgs, mask = small().train(), torch.rand(2, 3, 16, 16), masks(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, imgs, mask)
    assert loss.dtype == torch.float32
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_branches_draw_stochastic_depth_of_their_own():
    model = small(drop_path_rate=0.5, depth=4, regressor_depth=4, decoder_depth=4)
    expected = [0, 1 / 6, 1 / 3, 0.5]
    for name in ("encoder.blocks", "alignment_encoder.blocks", "regresser.regressor_blocks", "decoder.decoder_blocks"):
        rates = [block.drop_path.drop_prob for block in model.get_submodule(name).children()]  # type: ignore[union-attr]
        assert rates == pytest.approx(expected), name
    imgs, mask = torch.rand(2, 3, 16, 16), masks(2, 6)
    assert torch.equal(model.eval()(imgs, mask)[2], model(imgs, mask)[2])
    assert not torch.equal(model.train()(imgs, mask)[2], model(imgs, mask)[2])
