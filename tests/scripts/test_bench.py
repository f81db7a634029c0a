"""The benchmark's table of all networks: which rows, what they hold, what is left out."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import distributed
from scripts.tools import bench, bench_data, bench_dense, bench_start, doctor
from scripts.tools.bench import Variant
from tests.scripts.test_measured_run import recorded
from tests.support.helpers import ROOT


def arguments(*words: str):
    return bench.get_args_parser().parse_known_args(words)


def variant(name: str, seconds: float, **values) -> Variant:
    made = Variant(name, {}, "fp32", **values)
    for times in made.seconds.values():
        times.extend([seconds, 2 * seconds, seconds])
    return made


def test_networks__every_one_that_pre_trains_once():
    rows = [(method, name) for method, name, _ in bench.networks()]
    assert len(rows) == len(set(rows))
    assert {method for method, _ in rows} == {"saim", "semaim", "cae", "a2mim", "udi"}
    assert ("semaim", "aim_base") in rows
    assert ("semaim", "saim_base") not in rows  # the same network
    assert not any(name.startswith(("mae_", "deit_")) for _, name in rows)
    for _, name in rows:
        assert next(cpu for words, (cpu, _) in bench.BATCHES.items() if bench.re.search(words, name)) >= 1


def test_networks__flags_are_those_of_the_mains():
    for method, name, words in bench.networks():
        main = bench.importlib.import_module(f"{method}.main_pretrain")
        args = main.get_args_parser().parse_args([*bench.RECIPE[method].split(), *words])
        assert bench.describe(args)[0] == name


def test_row__cells(monkeypatch):
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e12)
    flags = SimpleNamespace(model="saim_nano", input_size=64, batch_size=8)
    variants = [variant("reference", 0.02), variant("default", 0.01, memory=2.5e9, flops=1e9, parameters=1_234_567)]
    cells = bench.row(variants, flags, torch.device("cpu"))  # type: ignore[arg-type]
    assert cells["network"] == "saim_nano"
    assert (cells["px"], cells["batch"], cells["param. M"]) == ("64", "8", "1.2")
    assert (cells["images/s"], cells["ms/step"], cells["forward"]) == ("200", "40", "10")
    assert (cells["peak GB"], cells["GFLOP/image"], cells["reference/default"]) == ("2.50", "1", "2.00")
    assert cells["of peak"] == "27%"  # 8 GFLOP in the 30 ms of forward, backward and optimizer
    alone = bench.row(variants[1:], flags, torch.device("cpu"))  # type: ignore[arg-type]
    assert alone["reference/default"] == ""


def test_variants_of__reference_in_the_same_precision():
    assert [v.precision for v in bench.variants_of("saim", "bf16", True)] == ["bf16", "bf16"]
    assert [v.precision for v in bench.variants_of("saim", "bf16", False)] == ["fp32", "fp32", "bf16"]
    assert [v.name for v in bench.variants_of("udi", "fp32", True)] == ["default, fp32"]


def test_table__rows_and_notes(monkeypatch, capsys):
    """What a row's process prints is a row; what it says on stderr, a note."""
    commands = []

    def run(command, **_kwargs):
        commands.append(command)
        if "aim_huge" in command:
            return SimpleNamespace(returncode=2, stdout="", stderr="bench.py: needs more than 17.00 GB of memory\n")
        cells = {"network": command[command.index("--model") + 1], "px": "64", "reference/default": "1.50"}
        return SimpleNamespace(returncode=0, stdout=f"a warning\n{json.dumps(cells)}\n", stderr="")

    monkeypatch.setattr(bench.subprocess, "run", run)
    bench.main(*arguments("all", "--markdown", "--only", "semaim aim_(huge|nano)", "--device", "cpu"))
    out = capsys.readouterr().out
    assert "| method | network | px | reference/default |\n|---|---|---|---|\n| semaim | aim_nano | 64 | 1.50 |" in out
    assert "- not measured: semaim aim_huge: needs more than 17.00 GB of memory" in out
    assert commands[1][-2:] == ["--device", "cpu"]
    assert commands[1][commands[1].index("--batch_size") + 1] == "32"
    bench.main(*arguments("all", "--only", "semaim aim_nano", "--device", "cpu"))
    assert "semaim aim_nano" in capsys.readouterr().out


def test_table__of_a_dense_task(monkeypatch, capsys):
    """Its real command is planned as it stands, and what was measured is a row."""

    def measure(plan, _folder, evaluates):
        assert (plan.args.batch_size, plan.folder, evaluates) == (2, "", False)
        run = recorded([1.0] * 9, host=3 * 10**9)
        run.images, run.output = 2, "x: 1,500,000 parameters on cpu"
        return run

    monkeypatch.setattr(bench_dense.measured_run, "measure", measure)
    bench.main(*arguments("all", "--markdown", "--only", "udi detection", "--device", "cpu"))
    out = capsys.readouterr().out
    assert "| method | network | px | batch | param. M | images/s | ms/step | data | peak GB |" in out
    assert "| udi | detection, vit_nano | 128 | 2 | 1.5 | 8 | 250 | 0 | 3.00 |" in out


def test_dense__every_program_once():
    mains = sorted(
        f"{p.parent.name} {p.stem[5:]}" for p in ROOT.glob("*/main_*.py") if p.stem[5:] in doctor.NAMED_STAGES
    )
    assert sorted(bench_dense.DENSE) == mains


@pytest.mark.parametrize(
    ("layer", "side"),
    [
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), 10),
        (nn.Conv2d(8, 16, 3, stride=2, padding=1), 10),
        (nn.Conv2d(8, 16, 3, groups=4), 10),
        (nn.ConvTranspose2d(8, 16, 2, stride=2), 5),
    ],
)
def test_flop_counter__gradients_of_grouped_convolutions(layer, side):
    with bench.flop_counter() as counter:
        out = layer(torch.randn(2, 8, side, side, requires_grad=True))
        forward = counter.get_total_flops()
        out.sum().backward()
    products = out.numel() // out.shape[1] * layer.weight.numel()  # multiplications, for a plain convolution
    assert forward == 2 * (products if not layer.transposed else 2 * 8 * side * side * layer.weight[0].numel())
    assert counter.get_total_flops() == 3 * forward  # one as large for each gradient


def test_table__raises_on_a_name_without_networks():
    with pytest.raises(distributed.UserError, match="^--only nothing: no network has that in its name$"):
        bench.main(*arguments("all", "--only", "nothing", "--device", "cpu"))


def test_measure__raises_without_memory(monkeypatch):
    monkeypatch.setattr(bench, "available_bytes", lambda device: 1e6)
    words = [
        "--model",
        "saim_nano",
        "--query_depth",
        "1",
        "--input_size",
        "16",
        "--patch_size",
        "8",
        "--num_workers",
        "0",
    ]
    with pytest.raises(distributed.UserError, match="needs more than .* MB of memory"):
        bench.main(*arguments("saim", *words, "--batch_size", "2", "--device", "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "only", ["saim saim_nano", "semaim aim_nano", "cae cae_nano", "a2mim resnet_nano", "udi vit_nano"]
)
def test_table__of_small_networks(only, run_script):
    done = run_script("scripts/tools/bench.py", "all", "--only", only, "--steps", "1", "--markdown", timeout=600)
    header, _, cells = (line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|"))
    assert (cells[0], cells[1]) == tuple(only.split())
    values = dict(zip(header, cells, strict=False))
    for column in ("images/s", "ms/step", "peak GB", "GFLOP/image", "param. M"):
        assert float(values[column]) > 0
    assert ("reference/default" in values) == (only.split()[0] in bench.REFERENCE)


@pytest.mark.slow
def test_bench__of_one_method():
    words = ["saim", "--model", "saim_nano", "--query_depth", "1", "--input_size", "16", "--patch_size", "8"]
    words += ["--num_workers", "0", "--steps", "1", "--device", "cpu"]
    command = [sys.executable, "scripts/tools/bench.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference (attn_impl=mask), fp32" in done.stdout
    assert "default, fp32" in done.stdout


def test_data__what_an_image_costs(tmp_path, capsys):
    """Parts add up to the samples' time, and each is where it belongs."""
    folder = bench.synthetic_images(tmp_path, 8)
    args, rest = arguments("data", "--data_path", folder, "saim", "--input_size", "32", "--batch_size", "4")
    bench.main(args, rest)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("saim, 32 px, 8 images, batches of 4")
    numbers = {line[:20].strip(): float(line[20:].split()[0]) for line in lines[3:] if line.strip()}
    own = [numbers[name] for name in ("samples", "collate", "on the device")]
    assert numbers["all"] == pytest.approx(sum(own), rel=0.01)
    parts = [numbers[name] for name in (*bench_data.PARTS, "Python and draws")]
    assert sum(parts) == pytest.approx(numbers["samples"], rel=0.02)
    assert numbers["decode"] > numbers["colour"]
    with pytest.raises(distributed.UserError, match="data mae: expected data and one of a2mim"):
        bench.main(*arguments("data", "mae"))


# ---- start


def test_start__programs_add_little_to_their_libraries():
    """0.3 s of processor time is what --help of a program may add; a busy machine has twice that."""
    libraries, *helps = bench_start.seconds_to_help(
        *(f"{method}/main_pretrain.py" for method in bench.METHODS)
    ).values()
    assert len(helps) == len(bench.METHODS) and 0.01 < max(helps) < min(libraries, 2 * bench_start.MOST_OF_HELP)


@pytest.mark.slow
def test_start__of_small_networks(tmp_path):
    """Twice the 2 s from the first line to the first step are allowed, too; a run that ends says why."""
    chosen = [row for row in bench.networks() if row[1] == "saim_nano"]
    folder = bench.synthetic_images(tmp_path, 8)
    [(method, _, words)] = chosen
    assert 0 < bench_start.seconds_to_step(method, [*words, "--batch_size", "4"], folder) < 2 * bench_start.MOST_TO_STEP
    with pytest.raises(distributed.UserError, match="--batch_size 0: expected at least 1"):
        bench_start.seconds_to_step(method, [*words, "--batch_size", "0"], folder)


@pytest.mark.parametrize(
    ("function", "part"),
    [
        ("<method 'decode' of 'ImagingDecoder' objects>", "decode"),
        ("<method 'resize' of 'ImagingCore' objects>", "crop, resize, flip"),
        ("<method 'gaussian_blur' of 'ImagingCore' objects>", "colour"),
        ("<built-in method PIL._imaging.blend>", "colour"),
        ("<method 'contiguous' of 'torch._C.TensorBase' objects>", "tensor"),
        ("seeded", "Python and draws"),
    ],
)
def test_data__parts(function, part):
    assert bench_data.part_of(function) == part
