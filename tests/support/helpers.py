"""Golden cases and small comparisons shared by the tests."""

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))


class Golden:
    """One golden file: arrays of the authors' code by name, and `meta`."""

    def __init__(self, path: Path):
        self.arrays: dict[str, np.ndarray] = {}
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                try:
                    self.arrays[name] = file[name]
                except ValueError as error:  # None, where a gradient does not exist, is an object
                    if "Object arrays" not in str(error):
                        raise
        self.meta = json.loads(str(self.arrays.pop("meta")))

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def get(self, name: str, default: Any) -> Any:
        return self[name] if name in self.arrays else default

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Arrays named <prefix>/<key>, by key."""
        return {k.removeprefix(prefix + "/"): self[k] for k in self.arrays if k.startswith(prefix + "/")}

    def check(self, name: str, actual, rtol: float, atol: float, what: str = "") -> None:
        """|actual - array| <= atol + rtol |array|, where the file holds the array: a file may leave out any result."""
        if name in self:
            assert_close(actual, self[name], rtol, atol, f"{name} {what}")

    def equal(self, name: str, actual: Any) -> None:
        """Every entry of an array, or the value of that name in `meta`, where the file holds it."""
        if name in self:
            assert torch.equal(torch.as_tensor(actual), self[name]), name
        elif name in self.meta:
            assert actual == self.meta[name], name

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


def golden_files(method: str, prefix: str, suffix: str = ".npz"):
    """Parametrize `path` over every golden of a kind; a kind without files fails instead of vanishing."""
    paths = sorted((GOLDEN_DIR / method).glob(f"{prefix}*{suffix}"))
    cases = [pytest.param(p, id=f"{method}/{p.stem}") for p in paths] or [
        pytest.param(None, id=f"{method}: no {prefix}")
    ]
    return lambda test: pytest.mark.golden(pytest.mark.parametrize("path", cases)(test))


# Kinds that no test runs, by method and prefix, with the reason.
NOT_RUN = {
    ("semaim", "lars"): "the authors' programs import LARS and do not use it",
    ("cae", "caev2_"): "CAE v2 is not implemented",
    ("cae", "clip_visual"): "CAE v2 is not implemented",
}


def registered_kinds() -> set[tuple[str, str, str]]:
    """(method, prefix, suffix) of every kind that a test names, as golden_files("saim", "masks") does."""
    kinds = {(method, prefix, ".npz") for method, prefix in NOT_RUN}
    for path in (ROOT / "tests").glob("*/test_*.py"):
        text = path.read_text("utf-8")
        found = re.findall(r"""golden_files\(\s*"(\w+)", "(\w*)"(?:, "(\.\w+)")?""", text)
        kinds |= {(method, prefix, suffix or ".npz") for method, prefix, suffix in found}
        kinds |= {(method, "recipes", ".json") for method in re.findall(r"""\bcases\("(\w+)\"""", text)}
    return kinds


def unregistered_files() -> list[str]:
    """Golden files that no test would run and no reason excuses; a misspelt name shall not pass as checked."""
    kinds = registered_kinds()
    files = [path for path in sorted(GOLDEN_DIR.glob("*/*")) if path.suffix in (".npz", ".json")]
    known = [
        any((p.parent.name, p.suffix) == (m, end) and p.stem.startswith(start) for m, start, end in kinds)
        for p in files
    ]
    return [str(path) for path, is_known in zip(files, known, strict=True) if not is_known]


def authors_default(method: str, main: str, flag: str) -> Any:
    """A flag's default in the authors' program, for what a golden does not say."""
    return load_golden(GOLDEN_DIR / method / "manifest.json")["flags"][main][flag]["default"]


def load_golden(path: Path | None) -> Any:
    assert path is not None, "no golden file of this kind was found"
    return json.loads(path.read_text()) if path.suffix == ".json" else Golden(path)


def tolerance(ref: Golden, part: str = "") -> dict[str, Any]:
    """rtol and atol of a golden of CAE's, or of the named part of it."""
    given = ref.meta.get("tolerances", {})
    given = given.get(part, given) if isinstance(given, dict) else {}
    return {"rtol": 1e-4, "atol": 1e-5} | {k: v for k, v in given.items() if k in ("rtol", "atol")}


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


def assert_gradients(model: nn.Module, expected: dict[str, Tensor], without: Sequence[str] = ()) -> None:
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


def blocks_in(stats: dict, stack: str) -> int:
    """How many blocks a stack has in a table of parameters by name."""
    return len({name.removeprefix(f"{stack}.").split(".")[0] for name in stats if name.startswith(f"{stack}.")})


def assert_drawn_alike(model: nn.Module, stats: dict[str, dict]) -> None:
    """Fresh weights as in a table of one other draw: constants exactly, the rest by mean, spread and bounds."""
    state = model.state_dict()
    for name, ref in stats.items():
        value = state[name].double()
        assert list(value.shape) == ref["shape"], name
        if ref["max"] - ref["min"] < 1e-6:
            assert_close(value, np.full(ref["shape"], ref["mean"]), rtol=1e-6, atol=0, what=name)
            continue
        n, std = value.numel(), value.std().item()
        noise = 2**0.5 / n**0.5  # of two means, in deviations; of two small samples' deviations less than that
        assert std == pytest.approx(ref["std"], rel=max(0.05, 4 * noise)), name
        assert abs(value.mean().item() - ref["mean"]) <= 6 * noise * ref["std"] + 5e-4 * abs(ref["mean"]), name
        if max(-ref["min"], ref["max"]) < 2.2 * ref["std"]:  # a distribution that is cut, or uniform
            assert value.aminmax()[0].item() == pytest.approx(ref["min"], rel=0.03), name
            assert value.aminmax()[1].item() == pytest.approx(ref["max"], rel=0.03), name
