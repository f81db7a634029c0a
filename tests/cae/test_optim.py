"""Parameter groups and optimizers by name: their updates against formulas written here."""

import argparse
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim.lookahead import Lookahead
from torch import Tensor, nn

from cae import main_finetune, main_pretrain, optim
from cae.lars import LARS
from cae.models_cae import ContextAutoencoderViT
from cae.models_vit import VisionTransformer
from common import distributed
from tests.support.helpers import assert_close, golden_files, load_golden, tolerance
from tests.support.runs import CPU

# ---- goldens


@golden_files("cae", "layer_decay", ".json")
def test_layer_decay_groups(path):
    ref = load_golden(path)
    model = VisionTransformer(**ref["kwargs"])
    flags = ["--weight_decay", str(ref["weight_decay"]), "--layer_decay", str(ref["layer_decay"])]
    if ref.get("disable_weight_decay_on_rel_pos_bias"):
        flags.append("--disable_weight_decay_on_rel_pos_bias")
    args = main_finetune.get_args_parser().parse_args(flags)
    optimizer = main_finetune.build_optimizer(args, model, 1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: {"group": i, "lr_scale": group.get("lr_scale", 1.0), "weight_decay": group["weight_decay"]}
        for i, group in enumerate(optimizer.param_groups)
        for p in group["params"]
    }
    assert set(found) == set(ref["params"])
    for name, expected in ref["params"].items():
        assert found[name] == pytest.approx(expected, rel=1e-12), name


@golden_files("cae", "lars_steps")
def test_lars(path):
    ref = load_golden(path)
    steps = [key.removeprefix("in/grad").split("/")[0] for key in ref.arrays if key.startswith("in/grad")]
    params = {k: nn.Parameter(v) for k, v in ref.group("in").items() if not k.startswith("grad")}
    optimizer = LARS(params.values(), **ref.meta["hyper"])
    for step in dict.fromkeys(steps):
        for name, param in params.items():
            param.grad = ref[f"in/grad{step}/{name}"]
        optimizer.step()
        for name, param in params.items():
            ref.check(f"out/{name}{step}", param, **tolerance(ref), what=f"{name} {step}")


@golden_files("saim", "lars")
def test_lars__as_in_saims_repository(path):
    ref = load_golden(path)
    params = {name: nn.Parameter(ref[f"in/{name}"]) for name in ("w", "b")}
    optimizer, found = LARS(params.values(), **ref.meta["hp"]), {name: [] for name in params}
    for step in range(len(ref["in/gw"])):
        for name, param in params.items():
            param.grad = ref[f"in/g{name}"][step]
        optimizer.step()
        for name, param in params.items():
            found[name].append(param.detach().clone())
    for name, values in found.items():
        ref.check(f"out/{name}", torch.stack(values), rtol=0, atol=1e-6)


def test_lars_leaves_a_zero_weight_to_plain_momentum():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.1).step()
    assert_close(weight, torch.full((2, 2), -0.1), rtol=0, atol=1e-7)


# ---- updates by name, against formulas

LR, DECAY, EPS, MOMENTUM = 0.1, 0.05, 1e-3, 0.8
SHAPES = [(4, 3), (3,), (2, 2, 2)]


def args_of(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    optim.add_flags(parser)
    own = ["--weight_decay", str(DECAY), "--opt_eps", str(EPS), "--momentum", str(MOMENTUM)]
    return parser.parse_args([*own, *flags])


class Formula:
    """A written-down optimizer: `update` gives a parameter's step from its gradient, decay and state."""

    def __init__(self, params: list[Tensor], decays: list[float], update: Callable):
        self.params = [p.detach().clone().double() for p in params]
        self.decays, self.update = decays, update
        self.states: list[dict[str, Any]] = [{} for _ in params]
        self.count = 0

    def step(self, grads: list[Tensor], lr: float) -> None:
        self.count += 1
        grads = [g.double() for g in grads]
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        for p, g, decay, state in zip(self.params, grads, self.decays, self.states, strict=True):
            p -= lr * self.update(p, g, decay, state, self.count, norm)


def sgd(nesterov: bool) -> Callable:
    def update(p, g, decay, state, t, norm):
        g = g + decay * p
        state["v"] = MOMENTUM * state.get("v", 0) + g
        return g + MOMENTUM * state["v"] if nesterov else state["v"]

    return update


def adam(b1: float, b2: float, decoupled: bool) -> Callable:
    def update(p, g, decay, state, t, norm):
        g = g if decoupled else g + decay * p
        state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
        state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
        step = state["m"] / (1 - b1**t) / ((state["v"] / (1 - b2**t)).sqrt() + EPS)
        return step + decay * p if decoupled else step

    return update


def lamb(b1: float, b2: float) -> Callable:
    """LAMB as in apex: gradients cut to a global norm of 1; the trust ratio where there is weight decay."""
    plain = adam(b1, b2, decoupled=True)

    def update(p, g, decay, state, t, norm):
        step = plain(p, g / max(norm, 1.0), decay, state, t, norm)
        ratio = p.norm() / step.norm() if decay and p.norm() > 0 and step.norm() > 0 else 1.0
        return ratio * step

    return update


def novograd(b1: float, b2: float) -> Callable:
    """NovoGrad (arXiv 1905.11286): second moments are one number per tensor, and begin with the first gradient's."""

    def update(p, g, decay, state, t, norm):
        square = g.square().sum()
        state["v"] = b2 * state["v"] + (1 - b2) * square if "v" in state else square
        state["m"] = b1 * state.get("m", 0) + (g / (state["v"].sqrt() + EPS) + decay * p)
        return state["m"]

    return update


BETAS = ["--opt_betas", "0.7", "0.95"]
UPDATES = {
    "sgd": ([], sgd(True)),
    "nesterov": ([], sgd(True)),
    "momentum": ([], sgd(False)),
    "fusedsgd": ([], sgd(True)),
    "fusedmomentum": ([], sgd(False)),
    "adam": ([], adam(0.9, 0.999, False)),
    "adamw": ([], adam(0.9, 0.999, True)),
    "AdamW": (BETAS, adam(0.7, 0.95, True)),
    "fusedadam": ([], adam(0.9, 0.999, False)),
    "fusedadamw": ([], adam(0.9, 0.999, True)),
    "FusedAdamW": (BETAS, adam(0.7, 0.95, True)),
    "fusedlamb": ([], lamb(0.9, 0.999)),
    "fusedLAMB": (BETAS, lamb(0.7, 0.95)),
    "fusednovograd": ([], novograd(0.95, 0.98)),
    "nvnovograd": (BETAS, novograd(0.7, 0.95)),
}


@pytest.fixture(autouse=True)
def no_apex(monkeypatch):
    monkeypatch.setattr(optim, "_has_apex", lambda: False)


def two_groups(seed: int = 0) -> tuple[list[nn.Parameter], list[dict]]:
    """Parameters in two groups, the first one without weight decay."""
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return params, [{"params": params[1:2], "weight_decay": 0.0}, {"params": params[::2], "weight_decay": DECAY}]


@pytest.mark.parametrize("name", UPDATES)
def test_update_is_the_documented_one(name):
    """Over steps with a changing learning rate, and gradients both above and below a norm of 1."""
    flags, update = UPDATES[name]
    params, groups = two_groups()
    optimizer = optim.create_optimizer(args_of("--opt", name, *flags), groups, LR)
    formula = Formula(list(params), [DECAY, 0.0, DECAY], update)
    for step, scale in enumerate((3.0, 0.1, 1.0, 0.02, 2.0)):
        grads = [scale * torch.randn(shape) for shape in SHAPES]
        for group in optimizer.param_groups:
            group["lr"] = LR / (step + 1)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        formula.step(grads, LR / (step + 1))
        for param, expected in zip(params, formula.params, strict=True):
            assert_close(param, expected, rtol=1e-4, atol=1e-5, what=f"{name} step {step}")


@pytest.mark.parametrize("name", [n for n in optim.NAMES if n.startswith("fused")])
def test_fused_names_say_what_runs(name, capsys):
    optimizer = optim.create_optimizer(args_of("--opt", name), two_groups()[1], LR)
    module = type(optimizer).__module__
    assert module.startswith(("torch.optim", "timm.optim"))
    assert f"--opt {name}: apex is not installed, {module} runs instead" in capsys.readouterr().out


# ---- every name


def descend(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 3) -> list[float]:
    """Losses of a small regression trained as the loops do."""
    torch.manual_seed(1)
    x = torch.randn(32, 6)
    y = x @ torch.randn(6, 2)
    updater, losses = distributed.Updater(optimizer, CPU, "fp32"), []
    for step in range(steps):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        updater.backward(loss, step)
    return [*losses, (model(x) - y).square().mean().item()]


def regression() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 2))


@pytest.mark.parametrize("prefix", ["", "lookahead_"])
@pytest.mark.parametrize("name", optim.NAMES)
def test_every_name_makes_steps(name, prefix):
    model = regression()
    groups = optim.param_groups(model, DECAY)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optim.create_optimizer(args_of("--opt", prefix + name, "--opt_eps", "1e-8"), groups, 1e-2)
    assert isinstance(optimizer, Lookahead) == bool(prefix)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0]
    losses = descend(optimizer, model)
    assert all(math.isfinite(loss) for loss in losses)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert losses[-1] < losses[0]
    assert optimizer.state_dict()["state"]


@pytest.mark.parametrize("name", ["sgd", "fusedsgd"])
def test_lookahead__half_way_back_every_sixth_step(name):
    """The slow weights begin with the sixth step's, as in timm."""
    model, plain = regression(), regression()
    optimizer = optim.create_optimizer(args_of("--opt", f"lookahead_{name}"), list(model.parameters()), 1e-2)
    descend(optimizer, model, 12)
    fast = torch.optim.SGD(plain.parameters(), 1e-2, MOMENTUM, weight_decay=DECAY, nesterov=True)
    descend(fast, plain, 6)
    slow = [p.detach().clone() for p in plain.parameters()]
    descend(fast, plain, 6)
    for p, old, new in zip(model.parameters(), slow, plain.parameters(), strict=True):
        assert_close(p, old + 0.5 * (new - old), rtol=1e-5, atol=1e-6)


def test_lookahead_of_second_order__with_the_oldest_timm():
    """Its Lookahead does not say what it wraps."""
    model = regression()

    class Oldest(Lookahead):
        @property
        def is_second_order(self):
            raise AttributeError

    plain = optim.create_optimizer(args_of("--opt", "adahessian"), list(model.parameters()), 1e-2)
    losses = descend(Oldest(plain), model)
    assert losses[-1] < losses[0]


def test_upstreams_settings_of_single_optimizers():
    def defaults(name: str) -> dict:
        return optim.create_optimizer(args_of("--opt", name), two_groups()[1], LR).defaults

    rms, adamp = defaults("rmsprop"), defaults("adamp")
    assert (rms["alpha"], rms["momentum"], rms["eps"]) == (0.9, MOMENTUM, EPS)
    assert (defaults("rmsproptf")["alpha"], defaults("rmsproptf")["momentum"]) == (0.9, MOMENTUM)
    assert (adamp["wd_ratio"], adamp["nesterov"]) == (0.01, True)
    assert defaults("sgdp")["nesterov"]
    assert defaults("adamw")["fused"]
    assert [defaults(n)["nesterov"] for n in ("sgd", "nesterov", "momentum")] == [True, True, False]


@pytest.mark.parametrize("name", ["lion9", "", "lookahead_", "lookahead_lookahead_sgd", "fused_adam_w", "sgd "])
def test_unknown_names(name):
    with pytest.raises(distributed.UserError, match=f"--opt {name}: expected one of sgd, nesterov, "):
        optim.create_optimizer(args_of("--opt", name), two_groups()[1], LR)


@pytest.mark.parametrize("name", ["adamw", "adam", "fusedadamw"])
def test_values_that_do_not_suit(name):
    with pytest.raises(distributed.UserError, match=f"--opt {name} and its flags: "):
        optim.create_optimizer(args_of("--opt", name, "--opt_betas", "0.9", "1.5", "3"), two_groups()[1], LR)


# ---- groups


def pretraining() -> ContextAutoencoderViT:
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    decoder: dict[str, Any] = {"decoder_embed_dim": 8, "decoder_num_heads": 2, "decoder_num_classes": 5}
    return ContextAutoencoderViT(**sizes, **decoder, regressor_depth=1, decoder_depth=1)


def finetuning(**kwargs) -> VisionTransformer:
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**sizes, "num_classes": 3, "use_rel_pos_bias": True, **kwargs})


def names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def test_pretraining_decays_both_tokens():
    model = pretraining()
    args = main_pretrain.get_args_parser().parse_args(["--weight_decay", "0.3"])
    optimizer = main_pretrain.build_optimizer(args, model, 1e-3)
    decayed, plain = names_of(model, optimizer)
    assert decayed[:2] == ["mask_token", "encoder.cls_token"]
    assert all(model.get_parameter(name).ndim > 1 for name in decayed)
    assert all(model.get_parameter(name).ndim == 1 for name in plain)
    assert sorted(decayed + plain) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert not [name for name in decayed + plain if name.startswith("alignment_encoder.") or "pos_embed" in name]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {group["lr_scale"] for group in optimizer.state_dict()["param_groups"]} == {1.0}  # upstream reads it
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)


def test_without_weight_decay_there_is_one_group():
    """Of all parameters, frozen ones too, with one learning rate whatever the layer decay."""
    for model, main in ((pretraining(), main_pretrain), (finetuning(), main_finetune)):
        args = main.get_args_parser().parse_args(["--weight_decay", "0"])
        optimizer = main.build_optimizer(args, model, 1e-3)  # type: ignore[arg-type]
        assert names_of(model, optimizer) == [[name for name, _ in model.named_parameters()]]
        assert "lr_scale" not in optimizer.param_groups[0]
        assert optimizer.param_groups[0]["weight_decay"] == 0


def test_without_layer_decay_there_are_two_groups():
    model = finetuning()
    args = main_finetune.get_args_parser().parse_args(["--layer_decay", "1", "--weight_decay", "0.1"])
    optimizer = main_finetune.build_optimizer(args, model, 1e-3)
    plain, decayed = names_of(model, optimizer)
    assert plain[0] == "cls_token"
    assert "pos_embed" not in plain + decayed
    assert "blocks.0.attn.relative_position_bias_table" in decayed
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    assert {group["lr_scale"] for group in optimizer.state_dict()["param_groups"]} == {1.0}


@pytest.mark.parametrize("decay", ["1", "0.5"])
def test_biases_of_positions_can_be_spared_weight_decay(decay):
    model = finetuning(abs_pos_emb=True)
    flags = ["--layer_decay", decay, "--disable_weight_decay_on_rel_pos_bias", "--weight_decay", "0.1"]
    optimizer = main_finetune.build_optimizer(main_finetune.get_args_parser().parse_args(flags), model, 1e-3)
    for group, names in zip(optimizer.param_groups, names_of(model, optimizer), strict=True):
        exempt = [name for name in names if "relative_position" in name or name in ("cls_token", "pos_embed")]
        assert not exempt or group["weight_decay"] == 0


def test_layer_decay_scales_by_layer():
    model = finetuning()
    args = main_finetune.get_args_parser().parse_args(["--layer_decay", "0.5"])
    optimizer = main_finetune.build_optimizer(args, model, 1e-3)
    scales = {
        n: g["lr_scale"]
        for g, names in zip(optimizer.param_groups, names_of(model, optimizer), strict=True)
        for n in names
    }
    for name, scale in {"cls_token": 0.125, "blocks.0.norm1.weight": 0.25, "blocks.1.mlp.fc1.weight": 0.5}.items():
        assert scales[name] == scale
    assert scales["head.weight"] == scales["fc_norm.bias"] == 1.0
