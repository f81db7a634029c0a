"""The training loops against the authors' trajectories: losses, learning rates, gradient norms, final weights."""

import argparse
import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common import distributed, lr_decay, lr_sched
from saim import engine_finetune, engine_pretrain, main_finetune, main_linprobe, main_pretrain
from saim.models_saim import SaimViT
from saim.models_vit import VisionTransformer
from tests.support.helpers import assert_close, authors_default, golden_files, load_golden
from tests.support.runs import CPU, FixedLoader, RecordingLog, run_main, schedule_of

MAINS = {"main_pretrain": main_pretrain, "main_finetune": main_finetune, "main_linprobe": main_linprobe}


class FixedNoise(nn.Module):
    """A SAIM model whose forward takes its noise from a list, and remembers its losses."""

    def __init__(self, model: SaimViT, noise: torch.Tensor):
        super().__init__()
        self.model, self.noise, self.losses = model, iter(noise), []

    def forward(self, imgs):
        loss = self.model(imgs, noise=next(self.noise))
        self.losses.append(loss.item())
        return loss


def assert_settings(optimizer: torch.optim.Optimizer, optim: dict[str, Any]):
    """The constants of the file are those that the main sets."""
    assert type(optimizer).__name__ == optim["opt"]
    for name in {"betas", "eps", "momentum"} & set(optim):
        assert all(list(np.atleast_1d(g[name])) == list(np.atleast_1d(optim[name])) for g in optimizer.param_groups), (
            name
        )


def assert_params(model, expected):
    for name, value in expected.items():
        assert_close(model.get_parameter(name), value, rtol=1e-3, atol=2e-5, what=name)


def assert_stats(stats: list[dict], expected: list[dict] | None):
    for got, ref in zip(stats, expected, strict=True) if expected else ():
        for name, value in ref.items():
            assert got[name] == pytest.approx(value, rel=1e-4 if name != "total_norm" else 1e-3), name


@golden_files("saim", "train_pretrain")
def test_pretraining_trajectory(path):
    ref = load_golden(path)
    meta = ref.meta
    model = SaimViT(**ref.kwargs)
    model.load_state_dict(ref.weights)
    net = FixedNoise(model, ref["in/noise"])
    args = main_pretrain.get_args_parser().parse_args(["--weight_decay", str(meta["optim"]["weight_decay"])])
    optimizer = main_pretrain.build_optimizer(args, model, meta["lr"])
    assert_settings(optimizer, meta["optim"])
    updater = distributed.Updater(optimizer, CPU, "fp32", meta.get("accum_iter", 1), meta.get("clip_grad"))
    loader = FixedLoader(ref["in/imgs"], ref["in/imgs"])
    history, stats = [], []
    for epoch in range(meta["epochs"]):
        log = RecordingLog(history, epoch, len(loader))
        stats.append(engine_pretrain.train_one_epoch(net, loader, updater, schedule_of(meta), log))
    ref.check("out/loss", net.losses, rtol=1e-4, atol=0)
    ref.check("out/lr", [h["lr"] for h in history], rtol=1e-9, atol=0)
    ref.check("out/total_norm", [h["total_norm"] for h in history], rtol=1e-3, atol=0)
    assert_params(model, ref.group("out/param"))
    assert_stats(stats, meta.get("epoch_stats"))


@golden_files("saim", "train_finetune")
def test_finetuning_trajectory(path):
    ref = load_golden(path)
    meta = ref.meta
    model = VisionTransformer(**ref.kwargs)
    model.load_state_dict(ref.weights)
    optim = meta["optim"]
    flags = ["--weight_decay", str(optim["weight_decay"]), "--layer_decay", str(optim["layer_decay"])]
    optimizer = main_finetune.build_optimizer(main_finetune.get_args_parser().parse_args(flags), model, meta["lr"])
    assert_settings(optimizer, optim)
    updater = distributed.Updater(optimizer, CPU, "fp32", meta.get("accum_iter", 1), meta.get("clip_grad"))
    losses, rates, norms, stats = [], [], [], []
    smoothing = meta.get("smoothing", authors_default("saim", "main_finetune", "--smoothing"))
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing if meta.get("criterion") == "smooth" else 0.0)

    def recorded(logits, targets):
        losses.append(criterion(logits, targets))
        rates.append(optimizer.param_groups[0]["lr"])
        return losses[-1]

    backward = updater.backward
    updater.backward = lambda loss, step: norms.append(backward(loss, step))
    loader = FixedLoader(ref["in/imgs"], ref["in/targets"])
    for epoch in range(meta["epochs"]):
        log = distributed.EpochLog("", len(loader), 1, CPU, epoch=epoch)
        stats.append(engine_finetune.train_one_epoch(model, recorded, loader, updater, schedule_of(meta), log))
    ref.check("out/loss", [loss.item() for loss in losses], rtol=1e-4, atol=0)
    ref.check("out/lr_group0", rates, rtol=1e-9, atol=0)
    ref.check("out/total_norm", [np.nan if n is None else n.item() for n in norms], rtol=1e-3, atol=0)
    assert_params(model, ref.group("out/param"))
    assert_stats(stats, meta.get("epoch_stats"))


@golden_files("saim", "train_linprobe")
def test_linear_probe_trajectory(path):
    ref = load_golden(path)
    meta = ref.meta
    model = VisionTransformer(**ref.kwargs)
    model.load_state_dict(ref.weights)
    head = main_linprobe.add_probe(model)
    flags = ["--weight_decay", str(meta["optim"]["weight_decay"])]
    optimizer = main_linprobe.build_optimizer(main_linprobe.get_args_parser().parse_args(flags), head, meta["lr"])
    assert_settings(optimizer, meta["optim"])
    updater = distributed.Updater(optimizer, CPU, "fp32", meta.get("accum_iter", 1))
    losses, history, stats = [], [], []

    def recorded(logits, targets):
        losses.append(nn.functional.cross_entropy(logits, targets))
        return losses[-1]

    loader = FixedLoader(ref["in/imgs"], ref["in/targets"])
    for epoch in range(meta["epochs"]):
        log = RecordingLog(history, epoch, len(loader))
        stats.append(engine_finetune.train_one_epoch(model, recorded, loader, updater, schedule_of(meta), log))
    ref.check("out/loss", [loss.item() for loss in losses], rtol=1e-4, atol=0)
    ref.check("out/lr", [h["lr"] for h in history], rtol=1e-9, atol=0)
    assert_stats(stats, meta.get("epoch_stats"))
    state = model.state_dict()
    for name, value in ref.group("out/after").items():
        assert_close(state[name], value, rtol=1e-3, atol=1e-4, what=name)
    model.eval()
    ref.check("out/logits_eval", model(ref["in/imgs"][0]), rtol=1e-3, atol=1e-3)
    imgs, targets = ref["in/imgs"], ref["in/targets"]
    val = FixedLoader([imgs[0], imgs[1][:1]], [targets[0], targets[1][:1]])
    if "eval" in meta:
        assert engine_finetune.evaluate(model, val, updater) == pytest.approx(meta["eval"], rel=1e-3)


@golden_files("saim", "evaluate")
def test_evaluate_averages_as_upstream(path):
    ref = load_golden(path)
    batches = [list(torch.split(ref[f"in/{name}"], ref.meta["sizes"])) for name in ("logits", "targets")]
    updater = distributed.Updater(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), CPU)
    stats = engine_finetune.evaluate(nn.Identity(), FixedLoader(*batches), updater)
    for name, value in stats.items():
        ref.check(f"out/{name}", value, rtol=1e-5, atol=0, what=name)


def test_evaluate_with_fewer_than_five_classes():
    updater = distributed.Updater(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), CPU)
    stats = engine_finetune.evaluate(nn.Identity(), FixedLoader([torch.eye(3)], [torch.tensor([0, 1, 1])]), updater)
    assert (stats["acc1"], stats["acc5"]) == (pytest.approx(200 / 3), 100)


@golden_files("saim", "lr_schedule", ".json")
def test_learning_rates(path):
    for case in load_golden(path).values():
        args = case["args"]
        groups = [{}, {"lr_scale": 0.5}]
        for epoch, returned, plain, scaled in case["rows"]:
            value = lr_sched.warmup_cosine(epoch, args["lr"], args["min_lr"], args["warmup_epochs"], args["epochs"])
            assert value == pytest.approx(returned, rel=1e-9, abs=1e-18)
            lr_sched.set_lr(groups, value)
            assert [g["lr"] for g in groups] == pytest.approx([plain, scaled], rel=1e-9, abs=1e-18)


@golden_files("saim", "param_groups", ".json")
def test_parameter_groups_in_upstreams_order(path):
    for stage, ref in load_golden(path).items():
        with torch.device("meta"):
            if stage == "pretrain":
                model = main_pretrain.MODELS[ref["model"]](
                    share_weight=ref["share_weight"], prediction_head_type=ref["prediction_head_type"]
                )
                groups = lr_decay.decay_groups(model, ref["weight_decay"])
            elif stage == "finetune":
                model = main_finetune.MODELS[ref["model"]](global_pool=ref["global_pool"])
                depth = len(model.blocks)
                skip = model.no_weight_decay()
                groups = lr_decay.layer_decay_groups(model, ref["weight_decay"], ref["layer_decay"], depth, skip)
            else:
                model = main_linprobe.MODELS[ref.get("model", "vit_base_patch16")]()
                groups = [{"params": list(main_linprobe.add_probe(model).parameters()), "weight_decay": 0.0}]
        names = {p: n for n, p in model.named_parameters()}
        for group, expected in zip(groups, ref["groups"], strict=True):
            assert [names[p] for p in group["params"]] == expected["params"]
            assert group["weight_decay"] == expected["weight_decay"]
            assert group.get("lr_scale", 1.0) == pytest.approx(expected.get("lr_scale") or 1.0, rel=1e-12)
        for name, (scale, decay) in ref.get("per_param", {}).items():
            group = next(g for g in groups if any(names[p] == name for p in g["params"]))
            assert [group["lr_scale"], group["weight_decay"]] == pytest.approx([scale, decay], rel=1e-12)


@golden_files("saim", "manifest", ".json")
def test_flags_and_defaults(path):
    for name, flags in load_golden(path)["flags"].items():
        actions = {o: a for a in MAINS[name].get_args_parser()._actions for o in a.option_strings}
        defaults = vars(MAINS[name].get_args_parser().parse_args([]))
        for flag, ref in flags.items():
            assert actions[flag].dest == ref["dest"], flag
            assert type(actions[flag]).__name__.strip("_") == ref["action"], flag
            if flag == "--device":  # ours: CUDA where present
                assert (ref["default"], defaults["device"]) == ("cuda", "auto")
                continue
            assert defaults[ref["dest"]] == ref["default"], flag
            kind = actions[flag].type or str
            if flag == "--gaussian_sigma":  # ours: fractions, too
                assert (ref["type"], kind) == ("int", float)
            elif ref["type"]:
                assert kind.__name__ == ref["type"], flag
        assert "--local-rank" in actions


def test_optimizer_state_of_upstream_resumes(tmp_path):
    """A file as upstream writes it: Namespace, Adam state by parameter position, groups without newer keys."""
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}
    model = SaimViT(**sizes, query_depth=2)
    args = main_pretrain.get_args_parser().parse_args([])
    optimizer = main_pretrain.build_optimizer(args, model, 1e-3)
    model(torch.rand(2, 3, 16, 16)).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in set(group) - {"lr", "betas", "eps", "weight_decay", "amsgrad", "params"}:
            del group[key]
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])
    upstream = {
        "model": model.state_dict(),
        "optimizer": state,
        "epoch": 7,
        "scaler": {},
        "args": argparse.Namespace(lr=0.1, x=np.float64(2)),
    }
    torch.save(upstream, tmp_path / "official.pth")
    fresh = SaimViT(**sizes, query_depth=2)
    resumed = main_pretrain.build_optimizer(args, fresh, 1e-3)
    checkpoint = distributed.Checkpoint("", args, model=fresh, optimizer=resumed)
    position = checkpoint.resume(str(tmp_path / "official.pth"))
    assert position == distributed.Position(8)
    imgs, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 4)
    for net, opt in ((model, optimizer), (fresh, resumed)):
        opt.zero_grad()
        net(imgs, noise).backward()
        opt.step()
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_warmup_as_long_as_the_run_trains(tmp_path, digits, capsys):
    """--epochs 30 with the default warm-up of 30 is a run of the authors' program, too."""
    small = ["--model", "saim_nano", "--query_depth", "1", "--input_size", "16", "--patch_size", "8"]
    small += ["--batch_size", "24", "--num_workers", "0", "--lr", "1e-3", "--epochs", "1", "--warmup_epochs", "1"]
    run_main(main_pretrain, *small, "--data_path", digits, "--output_dir", str(tmp_path))
    assert "WARNING: --warmup_epochs 1 of --epochs 1: the learning rate only rises" in capsys.readouterr().out
    assert json.loads((tmp_path / "log.txt").read_text())["train_lr"] == pytest.approx(1e-3 * (0 + 0.5) / 2)


@golden_files("saim", "formats", ".json")
def test_formats(path, tmp_path, digits):
    """One epoch of each main writes upstream's files, keys and tags."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ref = load_golden(path)
    small = [
        "--input_size",
        "16",
        "--patch_size",
        "8",
        "--batch_size",
        "8",
        "--num_workers",
        "0",
        "--data_path",
        digits,
    ]
    encoder = tmp_path / "main_pretrain" / "checkpoint.pth"
    commands = {
        "main_pretrain": ["--model", "saim_nano", "--query_depth", "1", "--epochs", "2", "--warmup_epochs", "1"],
        "main_finetune": ["--model", "vit_nano_patch16", "--finetune", str(encoder), "--epochs", "1"],
        "main_linprobe": ["--model", "vit_nano_patch16", "--finetune", str(encoder), "--epochs", "1"],
    }
    for name, flags in commands.items():
        out = tmp_path / name
        warmup = [] if name == "main_pretrain" else ["--warmup_epochs", "0", "--nb_classes", "10"]
        run_main(MAINS[name], *small, *flags, *warmup, "--output_dir", str(out))
        last = int(flags[flags.index("--epochs") + 1]) - 1
        lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
        assert [list(line) for line in lines] == [ref["log_txt"][name]] * (last + 1)
        state = distributed.load(str(out / "checkpoint.pth"))
        assert set(ref["checkpoint_keys"]) - set(state) == {"scaler"}  # off on a CPU; the authors' scaler refuses {}
        assert state["epoch"] == last
        for file in ref["checkpoint_files"]:
            assert (out / file.replace("<epoch>", str(last))).exists()
        events = EventAccumulator(str(out)).Reload()
        assert sorted(events.Tags()["scalars"]) == sorted(ref["tensorboard"][name])
        assert MAINS[name].get_args_parser().get_default("save_freq") == ref["save_every"][name]
