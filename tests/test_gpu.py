"""What only a GPU shows: a step of each method there."""

import copy

import pytest
import torch

from common import distributed
from scripts.tools import gpu_check

pytestmark = pytest.mark.gpu


def flags(*words: str):
    return gpu_check.get_args_parser().parse_args(["--tiny", "--device", "cuda", *words])


@pytest.mark.parametrize("preset", gpu_check.NANO)
def test_step__waits_for_nothing(preset):
    run, batch = gpu_check.prepare(flags(), preset)
    assert run.updater.guard_on_device
    run.step(0, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with run.updater.forward(run.net, 1):
            loss = run.loss_of(run.net, batch)
        norm = run.updater.backward(loss, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm is not None and norm.isfinite() and loss.isfinite()


@pytest.mark.parametrize("preset", gpu_check.NANO)
def test_guard__on_the_device(preset):
    assert gpu_check.guard(flags(), preset)["guard"] == "on the device"


@pytest.mark.parametrize("preset", gpu_check.NANO)
def test_bf16__agrees_with_fp32(preset):
    assert gpu_check.agreement(flags(), preset)["largest difference"] < 0.02


def test_semaim__flex_is_the_mask():
    losses = {}
    for implementation in ("mask", "flex"):
        run, batch = gpu_check.prepare(flags(), "semaim", "fp32", attn_impl=implementation)
        distributed.seed_step(0, 0)
        losses[implementation] = run.loss_of(run.net, batch).item()
    assert losses["flex"] == pytest.approx(losses["mask"], rel=1e-4)


@pytest.mark.parametrize("preset", gpu_check.NANO)
def test_compile__gives_the_same_loss(preset):
    (plain, batch), (compiled, _) = (gpu_check.prepare(flags(), preset, "fp32", c) for c in (False, True))
    compiled.model.load_state_dict(copy.deepcopy(plain.model.state_dict()))
    losses = [run.step(0, batch).item() for run in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
