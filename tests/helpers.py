"""Golden cases and small comparisons shared by the tests."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))


class Golden:
    """One golden file: arrays of the authors' code by name, and `meta`."""

    def __init__(self, path: Path):
        self.arrays = dict(np.load(path, allow_pickle=False))
        self.meta = json.loads(str(self.arrays.pop("meta")))

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Arrays named <prefix>/<key>, by key."""
        return {k.removeprefix(prefix + "/"): self[k] for k in self.arrays if k.startswith(prefix + "/")}

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.group("sd")

    @property
    def kwargs(self) -> dict:
        """Constructor arguments, with the norm layer's text turned into the layer."""
        kwargs = dict(self.meta["kwargs"])
        if kwargs.get("norm_layer") == "LayerNorm(eps=1e-6)":
            kwargs["norm_layer"] = partial(nn.LayerNorm, eps=1e-6)
        return kwargs


@pytest.fixture(autouse=True)
def one_thread():
    """For modules that import it: tiny networks wait longer for a second thread than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def golden_files(method: str, prefix: str, suffix: str = ".npz"):
    """Parametrize `path` over every golden of a kind; a kind without files fails instead of vanishing."""
    paths = sorted((GOLDEN_DIR / method).glob(f"{prefix}*{suffix}"))
    cases = [pytest.param(p, id=f"{method}/{p.stem}") for p in paths] or [
        pytest.param(None, id=f"{method}: no {prefix}")
    ]
    return lambda test: pytest.mark.golden(pytest.mark.parametrize("path", cases)(test))


def load_golden(path: Path | None) -> Any:
    assert path is not None, "no golden file of this kind was found"
    return json.loads(path.read_text()) if path.suffix == ".json" else Golden(path)


def assert_close(actual, expected, rtol: float, atol: float, what: str = "") -> None:
    """|actual - expected| <= atol + rtol |expected|, whatever the two types; NaN equals NaN."""
    actual = actual.detach().cpu().numpy() if isinstance(actual, Tensor) else np.asarray(actual)
    expected = expected.detach().cpu().numpy() if isinstance(expected, Tensor) else np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=what)


def without_key_bias(name: str, value: Tensor) -> Tensor:
    """A parameter, its gradient or update without the key biases: those shift all logits of a row alike, so that their
    gradient is rounding noise around zero, which Adam turns into a random walk."""
    if name.endswith("attn.k.bias"):
        return value[:0]
    if name.endswith("attn.qkv.bias"):
        q, _, v = value.chunk(3)
        return torch.cat([q, v])
    return value


def assert_gradients(model: nn.Module, expected: dict[str, Tensor], without: list[str]) -> None:
    """Goldens' rule for gradients: 1e-4 of the tensor's largest entry; attn.k.bias is rounding noise around zero."""
    params = dict(model.named_parameters())
    for name, ref in expected.items():
        grad = params[name].grad
        assert grad is not None, name
        if name.endswith("attn.k.bias"):
            assert grad.abs().max() < 1e-6, name
        else:
            assert (grad - ref).abs().max() <= 1e-4 * ref.abs().max() + 1e-6, name
    for name in without:
        assert params[name].grad is None, name
