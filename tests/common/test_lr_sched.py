"""Every method's published schedules out of the same functions."""

import pytest

from common import lr_sched
from tests.support.helpers import golden_files, load_golden


@golden_files("semaim", "lr_schedule")
def test_warmup_cosine__semaim(path):
    ref = load_golden(path)
    for i, case in enumerate(ref.meta["cases"]):
        rows = ref[f"in/{i}/epoch"].tolist()
        values = [
            lr_sched.warmup_cosine(e, case["lr"], case["min_lr"], case["warmup_epochs"], case["epochs"]) for e in rows
        ]
        ref.check(f"out/{i}/lr", values, rtol=1e-12, atol=1e-20)


@golden_files("cae", "lr_schedules")
def test_tables__cae(path):
    ref = load_golden(path)
    for i, case in enumerate(ref.meta["cosine"]):
        steps = case.get("wsteps", -1)
        table = lr_sched.cosine_table(
            case["base"], case["final"], case["epochs"], case["niter"], case["warm"], warmup_steps=steps
        )
        ref.check(f"out/cosine/{i}/64", table, rtol=1e-12, atol=0)
    for i, case in enumerate(ref.meta["linear"]):
        values = [
            lr_sched.warmup_cosine(e, case["lr"], case["min_lr"], case["warmup_epochs"], case["epochs"])
            for e in case["at"]
        ]
        ref.check(f"out/linear/{i}/64", values, rtol=1e-9, atol=0)


@golden_files("udi", "finetune_schedules")
def test_finetune_tables__udi(path):
    ref = load_golden(path)
    for i, case in enumerate(ref.meta["calls"]):
        table = lr_sched.cosine_table(
            case["base_value"],
            case["final_value"],
            case["epochs"],
            case["niter_per_ep"],
            case.get("warmup_epochs", 0),
            warmup_steps=case.get("warmup_steps", -1),
        )
        ref.check(f"out/{i}", table, rtol=1e-12, atol=1e-15)


def test_warmup_as_long_as_the_run_or_longer():
    """The rate rises to the end, as in the authors' programs; a table is the beginning of its warm-up."""
    assert [lr_sched.warmup_cosine(e, 1.0, 0.0, 10, 10) for e in (0, 2.5, 9.5, 10)] == [0, 0.25, 0.95, 1]
    assert [lr_sched.warmup_cosine(e, 1.0, 0.0, 40, 30) for e in (0, 10, 29)] == [0, 0.25, 0.725]
    assert lr_sched.cosine_table(1.0, 0.0, 1, 4, warmup_epochs=1).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    long = lr_sched.cosine_table(1.0, 0.0, 2, 10, warmup_epochs=3)
    assert long.tolist() == pytest.approx([i / 29 for i in range(20)])
    assert lr_sched.cosine_table(1.0, 0.0, 2, 10, warmup_steps=30).tolist() == long.tolist()


def test_no_warmup_starts_at_the_base():
    assert lr_sched.warmup_cosine(0, 0.8, 0.0, 0, 90) == 0.8


def test_warmup_poly():
    """160,000 steps, 1,500 of warm-up from a millionth: the segmentation recipes' values, worked out by hand."""
    rates = [lr_sched.warmup_poly(step, 2e-4, 160000, 1500) for step in (0, 750, 1499, 1500, 80000, 159999)]
    half = 2e-4 * (1 - 750 / 160000) * (0.5 + 0.5e-6)
    last = 2e-4 * (1 - 1499 / 160000) * (1 - (1 - 1e-6) / 1500)
    assert rates == pytest.approx([2e-10, half, last, 2e-4 * (1 - 1500 / 160000), 1e-4, 2e-4 / 160000], rel=1e-12)
    assert lr_sched.warmup_poly(50, 0.01, 100, 0, power=0.9, final=1e-4) == pytest.approx(0.0099 * 0.5**0.9 + 1e-4)


def test_warmup_drops():
    """A detector's twelve epochs: 500 updates of warm-up from a thousandth, a tenth from the tenth and twelfth on."""
    rates = [lr_sched.warmup_drops(step, 0, 3e-4, (9, 11), 500) for step in (0, 250, 499, 500, 9000)]
    assert rates == pytest.approx([3e-7, 3e-4 * 0.5005, 3e-4 * (1 - 0.999 / 500), 3e-4, 3e-4], rel=1e-9)
    later = [lr_sched.warmup_drops(40_000, epoch, 3e-4, (9, 11), 500) for epoch in (8, 9, 10, 11)]
    assert later == pytest.approx([3e-4, 3e-5, 3e-5, 3e-6], rel=1e-9)
    assert lr_sched.warmup_drops(0, 0, 0.02, (), 0) == 0.02
