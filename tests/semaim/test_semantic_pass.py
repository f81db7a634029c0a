"""The pass without masks that draws the maps: against the authors' numbers, and what it computes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from semaim.models_semaim import ATTENTIONS, AimViT, calculate_similarity
from tests.support.helpers import assert_close, golden_files, load_golden
from tests.support.semaim_networks import build, images, small


@golden_files("semaim", "pretrain_orders")
def test_encoder_pass(path):
    ref = load_golden(path)
    tol, model = ref.meta["tol"]["others"], build(ref)

    def compare(value: Tensor, name: str) -> None:
        """With what the file holds under this name, if it does."""
        ref.check(f"out/{name}", value, rtol=tol, atol=tol)

    with torch.no_grad():
        tokens, similarity, attention = model(ref["in/imgs"], forward_encoder=True)
        for value, name in ((tokens, "enc_tokens"), (similarity, "feature_attention"), (attention, "self_attention")):
            compare(value, name)
        compare(calculate_similarity(tokens), "similarity_minmax")
        maps = {"gap": "feature_attention_gap", "self": "self_attention"}
        for kind, name in ({model.attention_type: "feature_attention"} | maps).items():
            model.attention_type = kind
            for features in (False, True):
                tokens, found = model.semantic_pass(ref["in/imgs"], features)
                compare(found, name)
                if features:
                    assert tokens is not None
                    compare(tokens, "enc_tokens")


# ---- by their formulas


def count_calls(model: AimViT) -> dict[str, list[int]]:
    """How often each block is called from here on."""
    calls = {"blocks": [0] * len(model.blocks), "query_blocks": [0] * len(model.query_blocks)}
    for name, counts in calls.items():
        for i, block in enumerate(getattr(model, name)):

            def count(*_, counts=counts, i=i):
                counts[i] += 1

            block.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_order_pass_runs_each_block_once_and_no_decoder(attention_type, features):
    model = small(attention_type=attention_type, permutation_type="attention_center")
    imgs = images(model)
    expected_tokens, similarity, attention = model(imgs, forward_encoder=True)
    calls = count_calls(model)
    tokens, found = model.semantic_pass(imgs, features)
    last = 1 if features or attention_type != "self" else 0  # the class token's attention needs no output
    assert calls == {"blocks": [1, 1, 1, last], "query_blocks": [0, 0]}
    assert_close(found, attention if attention_type == "self" else similarity, rtol=0, atol=1e-7)
    assert not found.requires_grad
    assert (tokens is not None) == (last == 1)
    assert tokens is None or torch.equal(tokens, expected_tokens)


@pytest.mark.parametrize("query_depth", [1, 2, 4])
def test_prediction_runs_each_block_once(query_depth):
    model = small(query_depth=query_depth)
    calls = count_calls(model)
    model(images(model))
    assert calls == {"blocks": [1] * 4, "query_blocks": [1] * query_depth}


@pytest.mark.parametrize("attention_type", ATTENTIONS)
def test_maps_by_their_formulas(attention_type):
    model = small(attention_type=attention_type).double()
    imgs = images(model).double()
    with torch.no_grad():
        tokens, similarity, attention = model(imgs, forward_encoder=True)
    whole = tokens[:, 1:].mean(dim=1, keepdim=True) if attention_type == "gap" else tokens[:, :1]
    expected = F.cosine_similarity(tokens[:, 1:], whole, dim=-1).softmax(dim=1)
    assert_close(similarity, expected, rtol=0, atol=1e-7)
    assert_close(similarity.sum(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    assert ((attention > 0) & (attention < 1)).all()
    assert (attention.sum(dim=1) < 1).all(), "the class token's own share is left out"


def test_similarity_is_stretched_to_0_and_1():
    tokens = torch.randn(3, 10, 8)
    found = calculate_similarity(tokens)
    assert_close(found.amin(dim=1), torch.zeros(3), rtol=0, atol=0)
    assert ((found.amax(dim=1) > 1 - 1e-5) & (found.amax(dim=1) <= 1)).all()
    cosines = F.cosine_similarity(tokens[:, 1:], tokens[:, :1], dim=-1)
    assert torch.equal(found.argsort(dim=1), cosines.argsort(dim=1))
    assert torch.isfinite(calculate_similarity(torch.ones(1, 5, 8))).all()
