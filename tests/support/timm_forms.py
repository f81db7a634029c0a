"""A network's form under timm's names, checked against the network."""

import json
from typing import Any

import timm
import torch
from torch import Tensor

from tests.support.helpers import assert_close


def timm_model(form: Any) -> Any:
    """timm's network of a form, by values that a config.json can hold."""
    model_args = json.loads(json.dumps(form.model_args))
    network = timm.create_model(form.architecture, num_classes=form.num_classes, **model_args)
    network.load_state_dict(form.weights)
    return network.eval()


@torch.no_grad()
def assert_timm_form(form: Any, backbone: Any, imgs: Tensor) -> None:
    """The same features and, with classes, the same logits to 1e-5."""
    network = timm_model(form)
    features = backbone(imgs)
    found = network.forward_head(network.forward_features(imgs), pre_logits=True)
    assert_close(found, features, rtol=1e-5, atol=1e-5)
    expected = features if not form.num_classes else backbone.head(features)
    assert_close(network(imgs), expected, rtol=1e-5, atol=1e-5)
    assert form.pool == backbone.pool
