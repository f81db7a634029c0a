"""What a checkpoint's file holds: flags and weights, in the layouts of all authors."""

import argparse

import pytest
import torch

from common import distributed

ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("args", "flags"),
    [({"lr": 1}, {"lr": 1}), (argparse.Namespace(lr=1), {"lr": 1}), (None, {}), ("lr 1", {})],
    ids=["dict", "namespace", "none", "text"],
)
def test_flags_of(args, flags):
    found = distributed.flags_of({"args": args})
    assert found == flags
    assert found is not args


def test_weights__of_the_first_key_and_without_prefix():
    state = {"model": {"module.a": ONE}, "module": {"b": ONE}, "epoch": 1}
    assert list(distributed.weights_of(state, "x")) == ["a"]
    assert list(distributed.weights_of(state, "x", ("module", "model"))) == ["b"]
    with pytest.raises(distributed.UserError, match="x: holds no weights under 'ema'; its keys: model, module, epoch"):
        distributed.weights_of(state, "x", ("ema",))


def test_weights__of_a_bare_file():
    bare = {"module.a": ONE, "b": ONE}
    assert list(distributed.weights_of(bare, "x", bare=True)) == ["a", "b"]
    for state, allowed in ((bare, False), (bare | {"epoch": 1}, True), ({}, True)):
        with pytest.raises(distributed.UserError, match="holds no weights under 'state_dict' or 'model' or 'module'"):
            distributed.weights_of(state, "x", bare=allowed)


def test_part__is_all_where_no_name_has_the_prefix():
    weights = {"encoder.a": ONE, "decoder.b": ONE}
    assert list(distributed.part_of(weights, "encoder.")) == ["a"]
    assert distributed.part_of(weights, "backbone.") == weights
