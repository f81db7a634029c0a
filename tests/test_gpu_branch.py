"""What a GPU would do differently, shown without one: no step waits for the device, and networks compile as a whole.

Under a FakeTensorMode tensors are on a CUDA device that does not exist, so that code takes its CUDA branch; operations
know shapes only, and one that needs a value is an error. Backward passes need a device, so that updates run on the CPU.
"""

import argparse
import importlib
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from common import distributed
from scripts.tools import bench, gpu_check
from semaim import orders
from tests.support.device_waits import NoWaiting, on_fake_gpu

NANO = {**gpu_check.NANO, "a2mim convnext": ("a2mim", "--backbone convnext_nano --input_size 64 --patch_size 8")}


def pretraining(key: str, data_path: str, *flags: str, **overrides) -> tuple[argparse.Namespace, Any, nn.Module, Any]:
    """Flags, main, network and loss of a batch of four images."""
    method, network = NANO[key]
    main, engine = (importlib.import_module(f"{method}.{name}_pretrain") for name in ("main", "engine"))
    words = [*bench.RECIPE[method].split(), *network.split(), "--batch_size", "4", "--num_workers", "0", *flags]
    args = main.get_args_parser().parse_args(words)
    args.data_path = data_path
    loader, context = main.build_data(args, torch.device("cpu"))
    return args, main, main.build_model(args, **overrides), (engine.batch_loss, next(loader.batches()), context)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> str:
    return bench.synthetic_images(tmp_path_factory.mktemp("photographs"), 4)


@pytest.mark.parametrize("key", NANO)
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_forward__the_host_never_waits(photographs, key):
    _, _, model, (batch_loss, batch, context) = pretraining(key, photographs)
    distributed.constant.cache_clear()
    with FakeTensorMode():
        model, batch = on_fake_gpu(model.train()), on_fake_gpu(batch)
        context = {name: on_fake_gpu(value) for name, value in context.items()}
        batch_loss(model, batch, **context)  # constants are copied once
        with NoWaiting("cuda"):
            loss = batch_loss(model, batch, **context)
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
def test_update__reads_no_value(photographs, key):
    """As on a GPU: the guard is a flag on the device that fused optimizers read, meters wait for a report."""
    args, main, model, (batch_loss, batch, context) = pretraining(key, photographs)
    optimizer = main.build_optimizer(args, model, 1e-4)
    updater = distributed.Updater(optimizer, torch.device("cpu"), clip_grad=args.clip_grad, buffers=model.buffers())
    assert all(group.get("fused") for group in optimizer.param_groups)
    updater.guard_on_device = True
    epoch_log = distributed.EpochLog("", 8, 4, torch.device("cuda"))
    if key == "udi":
        updater.on_gradients = partial(main.optim.clip_gradients, model, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    loss = batch_loss(model, batch, **context)
    with NoWaiting("cpu"):
        norm = updater.backward(loss, 0)
        epoch_log.update(0, loss=loss, norm=norm)
        if key == "udi":
            updater.move(list(context["teacher"].parameters()), list(model.parameters()), 0.1)
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
def test_compile__one_graph(photographs, key):
    """--compile: the whole network is one graph. On a CPU, where that is free, CAE looks at its masks first, and SemAIM
    at the ranks unless the attention of a GPU is asked for."""
    overrides = {"attn_impl": "mask"} if key == "semaim" else {}
    _, _, model, (batch_loss, batch, context) = pretraining(key, photographs, **overrides)
    calls: list[tuple[tuple, dict]] = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    batch_loss(model, batch, **context)
    hook.remove()
    torch._dynamo.reset()
    args, kwargs = calls[0]
    found = torch._dynamo.explain(model)(*args, **kwargs)
    looks = {"cae": 1}.get(key, 0)
    assert found.graph_break_count == looks, found.break_reasons
    if looks:
        assert "bool((counts == num_masked).all())" in str(found.break_reasons[0].user_stack[-1].line)
