"""Python files read as syntax trees: the many ways to write a flag and a constructor."""

from scripts.tools import sources


def test_every_way_to_add_an_argument(tmp_path):
    (tmp_path / "helper.py").write_text(
        "def add_more(p, width):\n"
        "    p.add_argument('--from_helper', default=7, type=int)\n"
        "    p.add_argument('--of_caller', default=width)\n"
        "def unused(p):\n"
        "    p.add_argument('--never')\n"
    )
    (tmp_path / "main.py").write_text(
        "import argparse, os, numpy as np\n"
        "from helper import add_more, unused\n"
        "from utils import bool_flag\n"
        "SIZE = 2 ** 5\n"
        "def get():\n"
        "    parser = argparse.ArgumentParser()\n"
        "    group = parser.add_argument_group('x').add_mutually_exclusive_group()\n"
        "    group.add_argument('-b', '--batch-size', '--bs', default=SIZE * 2, type=int, metavar='N')\n"
        "    group.add_argument('--third', default=1 / 3, type=float)\n"
        "    parser.add_argument('config')\n"
        "    parser.add_argument('--rank', type=int, default=-1)\n"
        "    parser.add_argument('--scale', default=(0.4, 1.), type=float, nargs='+')\n"
        "    parser.add_argument('--k', default=[10, 20], nargs='+', type=int, choices=range(100))\n"
        "    parser.add_argument('--flag', default=True, type=utils.bool_flag)\n"
        "    parser.add_argument('--off', dest='on', action='store_false')\n"
        "    parser.add_argument('--on', action='store_true')\n"
        "    parser.add_argument('--inf', default=float('inf'), type=float)\n"
        "    parser.add_argument('--text', default='a' 'b' + 'c')\n"
        "    parser.add_argument('--as_text', default='1e-3', type=float)\n"
        "    parser.add_argument('--cpus', default=os.cpu_count(), type=int)\n"
        "    parser.add_argument('--huge', default=10 ** 10 ** 10, type=int)\n"
        "    parser.add_argument('--options', action=DictAction, nargs='+')\n"
        "    parser.add_argument(**{'--x': 1})\n"
        "    for name in ('--a', '--c'):\n"
        "        parser.add_argument(name, type=str)\n"
        "    parser.set_defaults(on=True, config='c')\n"
        "    add_more(parser, width=3)\n"
        "    return parser\n"
    )
    flags = {f.options[-1]: f for f in sources.source_flags(sources.Source(tmp_path, "main.py"))}
    values = {name: flag.default for name, flag in flags.items() if not flag.unknown}
    assert values.pop("--third") == 1 / 3
    assert values == {
        "--bs": 64,
        "config": "c",
        "--rank": -1,
        "--scale": [0.4, 1.0],
        "--flag": True,
        "--off": True,
        "--on": True,
        "--inf": float("inf"),
        "--text": "abc",
        "--as_text": 1e-3,
        "--options": None,
        "--from_helper": 7,
    }
    assert {name: flag.unknown for name, flag in flags.items() if flag.unknown} == {
        "--k": ("choices",),
        "--cpus": ("default",),
        "--huge": ("default",),
        "--of_caller": ("default",),
    }
    assert (flags["--bs"].dest, flags["--flag"].type, flags["--options"].action) == (
        "batch_size",
        "bool_flag",
        "DictAction",
    )
    assert flags["--k"].default == [10, 20]


def test_definitions__by_another_name_and_in_branches(tmp_path):
    (tmp_path / "a.py").write_text(
        "if True:\n    class Net(Base):\n        def __init__(self, depth=3, *, width: int = 2 * 4, **kwargs): pass\n"
        "def net_small(pretrained=False, **kwargs):\n    return Net(depth=2, norm=partial(LN, eps=1), **kwargs)\n"
        "net = net_small\n"
        "def net_dict(**kwargs):\n    model = Net(**{'depth': 5, **kwargs})\n    return model\n"
        "net_partial = partial(Net, depth=6)\n"
    )
    source = sources.Source(tmp_path, "a.py")
    found = {
        n: sources.find_definition(source, n) for n in ("Net", "net", "net_dict", "net_partial", "Net.__init__", "x")
    }
    assert found["x"] is None
    nets = [found[n] for n in ("Net", "Net.__init__")]
    assert all(n is not None and n.keywords == {"depth": 3, "width": 8} for n in nets)
    assert {n for n, d in found.items() if d and not d.open} == {"net_partial"}
    factories = {n for n, d in found.items() if d and d.inherited.get("width") == 8}
    assert factories == {"net", "net_dict", "net_partial"}
    passed = {n: d.keywords.get("depth") for n, d in found.items() if d}
    assert passed == {"Net": 3, "Net.__init__": 3, "net": 2, "net_dict": 5, "net_partial": 6}
