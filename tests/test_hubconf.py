"""torch.hub's view of the repository."""

from typing import Any

import pytest
import torch

import hubconf
from tests.support.documents import METHODS
from tests.support.helpers import ROOT

SMALL = {
    "saim": "saim_vit_nano_patch16",
    "semaim": "semaim_vit_nano_patch16",
    "cae": "cae_nano",
    "a2mim": "a2mim_vit_nano",
    "udi": "udi_vit_nano",
}


def load(name: str, **kwargs) -> Any:
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_of_every_method(method, tmp_path):
    network = load(SMALL[method], input_size=64)
    imgs = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = network(imgs)
    assert features.shape == (2, network.embed_dim)
    torch.save({"model": network.weights()}, tmp_path / "encoder.pth")
    again = load(SMALL[method], input_size=64, weights=str(tmp_path / "encoder.pth"))
    assert torch.equal(again(imgs), features)
    assert not torch.equal(load(SMALL[method], input_size=64)(imgs), features)


def test_names():
    entries = vars(hubconf)
    names = {name for name in entries if callable(entries[name]) and not name.startswith("_")}
    assert {"saim_vit_base_patch16", "semaim_vit_large_patch16", "cae_large_patch16_224", "udi_vit_small"} <= names
    assert {"a2mim_resnet50", "a2mim_vit_base", "a2mim_convnext_small"} <= names
    assert all(name.startswith(METHODS) for name in names)
    assert "https address" in (vars(hubconf)["udi_" + "vit_small"].__doc__ or "")  # what torch.hub.help prints
