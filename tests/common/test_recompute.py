"""--use_checkpoint: activations that are computed again, with the same numbers."""

import pytest
import torch
from torch import Tensor

from common import distributed
from scripts.tools import gpu_check

TRANSFORMERS = ["saim", "semaim", pytest.param("cae", marks=pytest.mark.slow), "a2mim vit", "udi"]


def step(preset: str, recompute: bool) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients and bytes of the tensors that wait for the backward pass."""
    run, batch = gpu_check.prepare(gpu_check.get_args_parser().parse_args(["--tiny", "--device", "cpu"]), preset)
    if recompute:
        distributed.recompute_blocks(run.model)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    distributed.seed_step(0, 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = run.loss_of(run.net, batch)
        waiting = sum(kept.values())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}, waiting


@pytest.mark.parametrize("preset", TRANSFORMERS)
def test_recompute_blocks__same_gradients_from_less_memory(preset):
    (loss, gradients, memory), (again, repeated, less) = (step(preset, recompute) for recompute in (False, True))
    assert loss == again
    assert gradients.keys() == repeated.keys()
    assert all(torch.equal(gradients[name], repeated[name]) for name in gradients)
    assert less < 0.8 * memory


def test_recompute_blocks__not_of_batch_norms():
    run, _ = gpu_check.prepare(gpu_check.get_args_parser().parse_args(["--tiny", "--device", "cpu"]), "a2mim resnet")
    with pytest.raises(distributed.UserError, match="--use_checkpoint: MaskedImageModel has no transformer blocks"):
        distributed.recompute_blocks(run.model)
