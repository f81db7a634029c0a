"""What a GPU would do differently, shown without one: no step waits for the device, and networks compile as a whole.

Under a FakeTensorMode tensors are on a CUDA device that does not exist, so that code takes its CUDA branch; operations
know shapes only, and one that needs a value is an error. Backward passes need a device, so that updates run on the CPU.
"""

import argparse
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common import distributed
from scripts.tools import bench, gpu_check
from semaim import orders
from tests.support.device_waits import NoWaiting, on_fake_gpu
from udi import optim

NANO = {**gpu_check.NANO, "a2mim convnext": ("a2mim", "--backbone convnext_nano --input_size 64 --patch_size 8")}


@pytest.fixture(autouse=True)
def every_network(monkeypatch):
    monkeypatch.setattr(gpu_check, "NANO", NANO)


def prepared(key: str, **overrides) -> tuple[bench.Training, Any]:
    """A network in training, and a batch of four images, on the CPU."""
    return gpu_check.prepare(argparse.Namespace(tiny=True, device="cpu"), key, **overrides)


@pytest.mark.parametrize("key", NANO)
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_forward__the_host_never_waits(key):
    run, batch = prepared(key)
    distributed.constant.cache_clear()
    with FakeTensorMode():
        model, batch = on_fake_gpu(run.model.train()), on_fake_gpu(batch)
        loss_of = partial(run.loss_of, **{name: on_fake_gpu(value) for name, value in run.loss_of.keywords.items()})
        loss_of(model, batch)  # constants are copied once
        with NoWaiting("cuda"):
            loss = loss_of(model, batch)
    distributed.constant.cache_clear()
    assert loss.device.type == "cuda" and loss.shape == ()


@pytest.mark.parametrize("rule", sorted(orders.ORDERS))
def test_permutation__the_host_never_waits(rule):
    distributed.constant.cache_clear()
    with FakeTensorMode():
        patches, maps = torch.empty(2, 196, 8, device="cuda"), torch.empty(2, 196, device="cuda")
        orders.permutation(rule, patches, maps)  # constants are copied once
        with NoWaiting("cuda"):
            assert orders.permutation(rule, patches, maps).device.type == "cuda"
    distributed.constant.cache_clear()


@pytest.mark.parametrize("key", NANO)
def test_update__reads_no_value(key):
    """As on a GPU: the guard is a flag on the device that fused optimizers read, meters wait for a report."""
    run, batch = prepared(key)
    model, optimizer = run.model, run.updater.optimizer
    updater = distributed.Updater(optimizer, run.device, clip_grad=run.flags.clip_grad, buffers=model.buffers())
    assert all(group.get("fused") for group in optimizer.param_groups)
    updater.guard_on_device = True
    epoch_log = distributed.EpochLog("", 8, 4, torch.device("cuda"))
    if key == "udi":
        updater.on_gradients = partial(optim.clip_gradients, model, 0.1)  # type: ignore[assignment]
    before = [p.detach().clone() for p in model.parameters()]
    loss = run.loss_of(model, batch)
    with NoWaiting("cpu"):
        norm = updater.backward(loss, 0)
        epoch_log.update(0, loss=loss, norm=norm)
        if key == "udi":
            updater.move(list(run.loss_of.keywords["teacher"].parameters()), list(model.parameters()), 0.1)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_no_waiting__finds_what_waits():
    x = torch.arange(3.0)
    for read in (lambda x: x[0].item(), torch.nonzero, lambda x: x[x > 1], lambda x: torch.equal(x, x + 1)):
        with NoWaiting("cpu"), pytest.raises(AssertionError, match="wait"):
            read(x)
    with FakeTensorMode(), NoWaiting("cuda"):
        with pytest.raises(AssertionError, match="wait"):
            torch.tensor([1.0, 2.0], device="cuda")
        with pytest.raises(AssertionError, match="wait"):
            torch.empty(3, device="cuda").cpu()
        torch.empty(3).to("cuda", non_blocking=True)


@pytest.mark.slow
@pytest.mark.parametrize("key", NANO)
def test_compile__one_graph(key):
    """--compile: the whole network is one graph. On a CPU, where that is free, CAE looks at its masks first, and SemAIM
    at the ranks unless the attention of a GPU is asked for."""
    run, batch = prepared(key, **({"attn_impl": "mask"} if key == "semaim" else {}))
    calls: list[tuple[tuple, dict]] = []
    hook = run.model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    run.loss_of(run.model, batch)
    hook.remove()
    torch._dynamo.reset()
    args, kwargs = calls[0]
    found = torch._dynamo.explain(run.model)(*args, **kwargs)
    looks = {"cae": 1}.get(key, 0)
    assert found.graph_break_count == looks, found.break_reasons
    if looks:
        assert "bool((counts == num_masked).all())" in str(found.break_reasons[0].user_stack[-1].line)
