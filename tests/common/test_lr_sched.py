"""Every method's published schedules out of the same functions."""

import pytest

from common import lr_sched
from tests.helpers import assert_close, golden_files, load_golden


@golden_files("semaim", "lr_schedule")
def test_warmup_cosine__semaim(path):
    ref = load_golden(path)
    for i, case in enumerate(ref.meta["cases"]):
        rows = ref[f"in/{i}/epoch"].tolist()
        values = [
            lr_sched.warmup_cosine(e, case["lr"], case["min_lr"], case["warmup_epochs"], case["epochs"]) for e in rows
        ]
        assert_close(values, ref[f"out/{i}/lr"], rtol=1e-12, atol=1e-20)


@golden_files("cae", "lr_schedules")
def test_tables__cae(path):
    ref = load_golden(path)
    for i, case in enumerate(ref.meta["cosine"]):
        steps = case.get("wsteps", -1)
        table = lr_sched.cosine_table(
            case["base"], case["final"], case["epochs"], case["niter"], case["warm"], warmup_steps=steps
        )
        assert_close(table, ref[f"out/cosine/{i}/64"], rtol=1e-12, atol=0)
    for i, case in enumerate(ref.meta["linear"]):
        values = [
            lr_sched.warmup_cosine(e, case["lr"], case["min_lr"], case["warmup_epochs"], case["epochs"])
            for e in case["at"]
        ]
        assert_close(values, ref[f"out/linear/{i}/64"], rtol=1e-9, atol=0)


@golden_files("udi", "schedules")
def test_tables__udi(path):
    ref = load_golden(path)
    temperatures = 0
    for i, case in enumerate(ref.meta["calls"]):
        if "temp" in case:
            start, end, warmup, epochs = case["temp"]
            table, expected = lr_sched.ramp_table(start, end, warmup, epochs), ref[f"out/temp{temperatures}"]
            temperatures += 1
        else:
            table = lr_sched.cosine_table(
                case["base_value"],
                case["final_value"],
                case["epochs"],
                case["niter_per_ep"],
                case.get("warmup_epochs", 0),
            )
            expected = ref[f"out/{i}"]
        assert_close(table, expected, rtol=1e-12, atol=1e-15)
    assert temperatures


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
        assert_close(table, ref[f"out/{i}"], rtol=1e-12, atol=1e-15)


@golden_files("a2mim", "lr_schedule")
def test_compositions__a2mim(path):
    """Step and cosine policies with a linear warm-up, from multi_step, cosine and warmup_factor."""
    ref = load_golden(path)
    for name, case in ref.meta["cases"].items():
        config, per_epoch, epochs = case["lr_config"], case["iters_per_epoch"], case["epochs"]
        warmup, total = config["warmup_iters"] * per_epoch, epochs * per_epoch
        iters = ref[f"out/real_iters/{name.removeprefix('real/')}"] if name.startswith("real/") else range(total)
        for row, i in enumerate(int(i) for i in iters):
            for column, base in enumerate(case["base_lr"]):
                ratio = config["warmup_ratio"]
                if config["policy"] == "step":
                    value = lr_sched.multi_step(i // per_epoch, base, config["step"], config["gamma"])
                elif config["policy"] == "CosineAnnealing":
                    by_epoch = config.get("by_epoch", True)
                    position = (i // per_epoch) / epochs if by_epoch else i / total
                    value = lr_sched.cosine(position, base, config["min_lr"])
                else:
                    ratio = 0.0
                    value = lr_sched.cosine((i - warmup) / (total - warmup), base, config["min_lr"])
                value *= lr_sched.warmup_factor(i, warmup, ratio)
                assert_close(value, ref[f"out/{name}"][row, column], rtol=1e-9, atol=1e-18, what=f"{name} {i}")


def test_ramp_ends_at_its_end():
    values = [lr_sched.ramp(e, 0.999, 0.9999, 100) for e in (0, 50, 100, 500)]
    assert values == pytest.approx([0.999, 0.99945, 0.9999, 0.9999], abs=1e-12)


def test_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="10 epochs"):
        lr_sched.warmup_cosine(0, 1.0, 0.0, 10, 10)
    with pytest.raises(ValueError, match="30 steps"):
        lr_sched.cosine_table(1.0, 0.0, 2, 10, warmup_epochs=3)


def test_no_warmup_starts_at_the_base():
    assert lr_sched.warmup_cosine(0, 0.8, 0.0, 0, 90) == 0.8
    assert lr_sched.warmup_factor(0, 0) == 1.0
