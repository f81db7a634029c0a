"""What holds for the encoders of all methods: a file tells its method, and gives its network with fresh weights."""

import json

import pytest
import torch

from common import distributed
from scripts.tools.encoders import load as encoders
from tests.support.tiny_encoders import checkpoint


@pytest.mark.parametrize("method", encoders.METHODS)
def test_a_file_tells_its_method_and_gives_fresh_networks(method, tmp_path):
    path = checkpoint(method, tmp_path)
    state = distributed.load(path)
    assert encoders.method_of(path, state) == method
    nets = [encoders.load_backbone(method, path)]
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nets.append(encoders.load_backbone(method, path, state=state, fresh=True))
    imgs = torch.randn(2, 3, nets[0].input_size, nets[0].input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        file, first, again, other = (net(imgs) for net in nets)
    assert file.shape == first.shape
    assert torch.equal(first, again)
    assert not torch.allclose(first, other) and not torch.allclose(first, file)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("blocks.0.attn.qkv.weight", "udi"),
        ("blocks.0.attn.q.weight", "saim"),
        ("blocks.3.gamma_1", "cae"),
        ("layer1.0.conv1.weight", "a2mim"),
        ("encoder.layers.0.ln1.weight", "a2mim"),
    ],
)
def test_method_of_weights_alone(name, method):
    assert encoders.method_of("file", {"model": {name: torch.zeros(1)}}) == method


def test_method_of__the_run_beside_wins(tmp_path):
    command = "python -m torch.distributed.run saim/main_pretrain.py --model saim_nano"
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{"command": command}]}))
    assert encoders.method_of(str(tmp_path / "checkpoint.pth"), {"args": {"backbone": "x"}}) == "saim"


def test_method_of__raises_where_nothing_tells():
    with pytest.raises(distributed.UserError, match="odd.pth: does not say which method it is of; name it with"):
        encoders.method_of("odd.pth", {"model": {"w": torch.zeros(1)}})
