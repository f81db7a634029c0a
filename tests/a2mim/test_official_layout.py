"""Optimizer states in the layout of upstream's files."""

import copy
from typing import Any

import pytest
import torch

from a2mim import optim
from a2mim.models_a2mim import build_classifier
from a2mim.openmixup import official_names
from tests.a2mim.test_optim import (
    args_of,
    cfg_of,
    imgs_and_mask,
    of_flags,
    options,
    pretraining,
    take_steps,
)
from tests.support.helpers import assert_close


@pytest.mark.parametrize("opt", optim.OPTIMIZERS)
def test_official_layout(opt):
    """One group per parameter, in the order of official names, with its hyper-parameters and initial_lr."""
    model = pretraining()
    optimizer = of_flags(opt, model)
    take_steps(model, optimizer, range(2))
    state = optim.OfficialOptimizer(optimizer, model).state_dict()
    rows = options(model, optimizer)
    assert len(state["param_groups"]) == len(rows)
    params = official_names(model, parameters_only=True)
    for i, (group, (name, lr, decay)) in enumerate(zip(state["param_groups"], rows, strict=True)):
        assert group["params"] == [i]
        assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (lr, lr, decay), name
        moments = {k: v for k, v in state["state"][i].items() if k != "step"}
        assert moments
        for value in moments.values():
            assert value.shape == model.get_parameter(params[name]).shape, name


@pytest.mark.parametrize("opt", optim.OPTIMIZERS)
def test_official_layout__does_not_depend_on_the_grouping(opt):
    """A state that was written with two groups goes on with many: rates by layer that are all but equal."""
    model = pretraining()
    optimizer = of_flags(opt, model)
    take_steps(model, optimizer, range(2))
    saved = copy.deepcopy(optim.OfficialOptimizer(optimizer, model).state_dict())
    other = pretraining()
    other.load_state_dict(model.state_dict())
    many = of_flags(opt, other, layer_decay=1 - 1e-9, model_type="vit")
    assert len(many.param_groups) > len(optimizer.param_groups)
    optim.OfficialOptimizer(many, other).load_state_dict(copy.deepcopy(saved))
    again = optim.OfficialOptimizer(many, other).state_dict()
    for i, moments in saved["state"].items():
        for key, value in moments.items():
            assert_close(again["state"][i][key], value, rtol=0, atol=0, what=key)
    for seed in range(2):  # of equal gradients: norms are summed in another order, which training would amplify
        for net, stepper in ((model, optimizer), (other, many)):
            generator = torch.Generator().manual_seed(seed)
            for param in net.parameters():
                param.grad = 0.01 * torch.randn(param.shape, generator=generator)
            stepper.step()
    for (name, value), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        assert_close(value, expected, rtol=1e-4, atol=1e-5, what=name)


@pytest.mark.parametrize("opt", optim.OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one(opt):
    whole = pretraining()
    optimizer = of_flags(opt, whole)
    take_steps(whole, optimizer, range(4))
    first = pretraining()
    half = of_flags(opt, first)
    take_steps(first, half, range(2))
    saved = copy.deepcopy(optim.OfficialOptimizer(half, first).state_dict())
    second = pretraining(mask_token="learnable")
    second.load_state_dict(first.state_dict())
    rest = of_flags(opt, second)
    optim.OfficialOptimizer(rest, second).load_state_dict(saved)
    take_steps(second, rest, range(2, 4))
    for (name, value), expected in zip(second.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(value, expected), name


def test_official_layout__reads_upstreams_adamw():
    """A state of torch.optim.AdamW with one group per parameter in upstream's order, as upstream's constructor makes
    it: goes on as that optimizer would."""
    theirs = pretraining("convnext_nano", mask_layer=3, mask_init=1e-3)
    names = official_names(theirs, parameters_only=True)
    groups = []
    for official, own in names.items():
        lr, decay = optim.param_options(official, cfg_of())
        groups.append({"params": [theirs.get_parameter(own)], "lr": lr, "weight_decay": decay})
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    def steps(model: Any, optimizer: torch.optim.Optimizer, seeds: Any) -> None:
        for seed in seeds:
            imgs, mask = imgs_and_mask(seed)
            optimizer.zero_grad()
            model(imgs, mask[:, :2, :2])["loss"].backward()
            optimizer.step()

    steps(theirs, reference, range(3))
    state = copy.deepcopy(reference.state_dict())
    ours = pretraining("convnext_nano", mask_layer=3, mask_init=1e-3)
    ours.load_state_dict(theirs.state_dict())
    optimizer = of_flags("adamw", ours)
    official = optim.OfficialOptimizer(optimizer, ours)
    official.load_state_dict(state)
    assert len(optimizer.param_groups) == 2
    steps(theirs, reference, range(3, 6))
    steps(ours, optimizer, range(3, 6))
    for (name, value), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(value, expected, rtol=1e-5, atol=1e-6, what=name)


def test_official_layout__reads_upstreams_lamb():
    """One group per parameter, each with its number of steps as an int."""
    model = pretraining()
    optimizer = of_flags("lamb", model)
    take_steps(model, optimizer, range(2))
    saved = copy.deepcopy(optim.OfficialOptimizer(optimizer, model).state_dict())
    for group in saved["param_groups"]:
        group["step"] = int(group["step"])
        assert group["step"] == 2
    other = pretraining()
    other.load_state_dict(model.state_dict())
    fresh = of_flags("lamb", other)
    optim.OfficialOptimizer(fresh, other).load_state_dict(saved)
    take_steps(model, optimizer, range(2, 4))
    take_steps(other, fresh, range(2, 4))
    for (name, value), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(value, expected), name


def test_official_layout__of_a_linear_probe():
    """Upstream's holds every parameter, the frozen ones without state; it is read by either program, as is ours."""

    def probe() -> Any:
        torch.manual_seed(0)
        model = build_classifier("resnet_nano", 10)
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        return model

    def theirs_of(model: Any) -> torch.optim.Optimizer:
        names = official_names(model, parameters_only=True).values()
        groups = [{"params": [model.get_parameter(name)], "lr": 0.1} for name in names]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def ours_of(model: Any) -> torch.optim.Optimizer:
        return optim.build_optimizer(args_of("sgd"), optim.param_groups(model, {"lr": 0.1, "weight_decay": 0.0}))

    def steps(model: Any, optimizer: torch.optim.Optimizer, seeds: Any) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for param in model.head.parameters():
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()

    first, second = probe(), probe()
    theirs, ours = theirs_of(first), ours_of(second)
    steps(first, theirs, range(2))
    second.load_state_dict(first.state_dict())
    official = optim.OfficialOptimizer(ours, second)
    official.load_state_dict(copy.deepcopy(theirs.state_dict()))
    saved = official.state_dict()
    assert len(saved["param_groups"]) == len(list(first.parameters()))
    assert set(saved["state"]) == set(theirs.state_dict()["state"])
    third = probe()
    third.load_state_dict(first.state_dict())
    back = theirs_of(third)
    back.load_state_dict(copy.deepcopy(saved))
    for model, optimizer in ((first, theirs), (second, ours), (third, back)):
        steps(model, optimizer, range(2, 4))
        assert_close(model.head.weight, first.head.weight, rtol=1e-6, atol=1e-7)
    trained = [i for i in range(len(saved["param_groups"])) if i in saved["state"]]  # a file of the head alone
    small = {
        "state": {k: saved["state"][i] for k, i in enumerate(trained)},
        "param_groups": [{**saved["param_groups"][i], "params": [k]} for k, i in enumerate(trained)],
    }
    official.load_state_dict(small)


def test_official_layout__keeps_this_runs_hyperparameters():
    model = pretraining()
    optimizer = of_flags("adamw", model)
    take_steps(model, optimizer, range(1))
    saved = optim.OfficialOptimizer(optimizer, model).state_dict()
    other = of_flags("adamw", model, lr=0.5, weight_decay=0.25)
    optim.OfficialOptimizer(other, model).load_state_dict(saved)
    assert {group["lr"] for group in other.param_groups} == {0.5}
    assert {group["initial_lr"] for group in other.param_groups} == {0.5}
    assert {group["weight_decay"] for group in other.param_groups} == {0.25, 0.0}


def test_official_layout__refuses_another_number_of_parameters():
    model = pretraining()
    saved = optim.OfficialOptimizer(of_flags("adamw", model), model).state_dict()
    other = pretraining(mask_init=1e-3)
    count = len(list(model.parameters()))
    with pytest.raises(ValueError, match=f"holds {count} parameters, expected {count + 1}"):
        optim.OfficialOptimizer(of_flags("adamw", other), other).load_state_dict(saved)


def test_official_layout__before_the_first_step():
    model = pretraining()
    saved = optim.OfficialOptimizer(of_flags("adamw", model), model).state_dict()
    assert saved["state"] == {}
    optimizer = of_flags("adamw", model)
    optim.OfficialOptimizer(optimizer, model).load_state_dict(saved)
    take_steps(model, optimizer, range(1))
