"""Semi-supervised fine-tuning: network, heads, rates and groups against the authors' numbers; lists; the script."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from common import distributed, lr_decay
from tests.support.helpers import assert_close, blocks_in, golden_files, load_golden
from tests.support.runs import assert_same, mistake, run_main, spoil
from tests.support.udi_weights import NANO, pretrained
from udi import data, engine_deit, main_semi_supervised
from udi.models_eval import ClassProjHead, EvaluationViT, build_proj_head, load_head

# ---- the authors' numbers


@golden_files("udi", "semi_transfer")
@pytest.mark.parametrize("pooling", [0, 1])
def test_network(path, pooling):
    ref = load_golden(path)
    config = ref.meta["config"]
    model = EvaluationViT(
        pooling,
        img_size=[config["gs"]],
        patch_size=config["p"],
        embed_dim=config["d"],
        depth=config["depth"],
        num_heads=config["h"],
    ).eval()
    weights = ref.group(f"sd/avg{pooling}")
    assert set(model.state_dict()) == set(weights)
    model.load_state_dict(weights)
    x, tol = ref["in/x"], ref.meta["tolerance"]
    ref.check(f"out/avg{pooling}/forward", model(x), **tol)
    ref.check(f"out/avg{pooling}/all", model.all_tokens(x), **tol)
    ref.check(f"out/avg{pooling}/inter", model.get_intermediate_layers(x, 1)[0], **tol)


@golden_files("udi", "semi_transfer")
def test_heads(path):
    ref = load_golden(path)
    names = {name.split("/")[1] for name in ref.arrays if name.startswith("sd/head")}
    assert names
    for name in names:
        layer, weights = int(name.removeprefix("head")), ref.group(f"sd/{name}")
        prototypes = [int(n) for n in re.findall(r"(?:out|bottleneck)=(\d+)", ref.meta["what"])]
        if layer == 3:  # the only head with weights of prototypes
            prototypes = weights["last_layer.weight_v"].shape
        (hidden, dim), classes = weights["mlp.0.weight"].shape, len(weights["cls_head.bias"])
        head = ClassProjHead(dim, prototypes[0], classes, hidden, prototypes[1], layer)
        assert set(head.state_dict()) == set(weights)
        head.load_state_dict(weights)
        ref.check(f"out/{name}", head(ref["in/feat"]), **ref.meta["tolerance"], what=name)


def rates(flags: dict, epochs: int) -> list[float]:
    """The learning rate of each epoch."""
    args = main_semi_supervised.get_args_parser().parse_args([])
    vars(args).update(flags)
    optimizer = engine_deit.build_optimizer(args, nn.Linear(2, 2), args.lr)
    scheduler = engine_deit.build_scheduler(args, optimizer)
    found = []
    for epoch in range(epochs):
        engine_deit.set_lr(scheduler, epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@golden_files("udi", "semi_transfer")
def test_learning_rates(path):
    ref = load_golden(path)
    for i, flags in enumerate(ref.meta["deit_lr"]):
        ref.check(f"out/deit_lr/{i}", rates(flags, flags["epochs"]), rtol=1e-6, atol=1e-12)


@golden_files("udi", "semi_transfer")
def test_groups(path):
    """The golden's network is a block shorter than that of its forward passes."""
    ref = load_golden(path)
    config, groups = ref.meta["config"], ref.meta.get("adamw_groups", [])
    depth = blocks_in(dict.fromkeys(name for group in groups for name in group["params"]), "blocks")
    sizes = {"img_size": [config["gs"]], "patch_size": config["p"], "embed_dim": config["d"]}
    model = EvaluationViT(0, **sizes, depth=depth, num_heads=config["h"])
    names = {id(p): name for name, p in model.named_parameters()}
    args = main_semi_supervised.get_args_parser().parse_args([])
    own = engine_deit.build_optimizer(args, model, 1e-3).param_groups
    for group, expected in zip(own, groups, strict=True) if groups else ():
        assert group["weight_decay"] == expected["weight_decay"]
        assert [names[id(p)] for p in group["params"]] == expected["params"]


# ---- schedules, network, heads


@pytest.mark.parametrize("sched", engine_deit.SCHEDULES)
def test_a_resumed_schedule_is_the_same(sched):
    """The rate depends on the epoch alone, also with noise."""
    flags = {"sched": sched, "epochs": 10, "warmup_epochs": 2, "lr": 1e-3, "decay_epochs": 3, "lr_noise": [0.2, 0.9]}
    whole = rates(flags, 10)
    args = main_semi_supervised.get_args_parser().parse_args([])
    vars(args).update(flags)
    optimizer = engine_deit.build_optimizer(args, nn.Linear(2, 2), args.lr)
    scheduler = engine_deit.build_scheduler(args, optimizer)
    engine_deit.set_lr(scheduler, 7)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(whole[7], rel=1e-12)
    if sched == "cosine":
        assert whole[0] == whole[1] == 1e-6


def test_dropout_is_for_training_only():
    torch.manual_seed(0)
    keywords: dict[str, Any] = {"img_size": [16], "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    plain = EvaluationViT(**keywords).eval()
    x = torch.randn(2, 3, 16, 16)
    for rate in ("drop_rate", "attn_drop_rate"):
        model = EvaluationViT(**{**keywords, rate: 0.5})
        model.load_state_dict(plain.state_dict())
        assert (model.train()(x) - model(x)).abs().max() > 1e-3
        assert_close(model.eval()(x), plain(x), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"dropout of 1\.0"):
        EvaluationViT(**keywords, drop_rate=1.0)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("key", ["teacher", "student"])
def test_head_starts_from_the_pretrained_one(layer, key, tmp_path, capsys):
    path = pretrained(tmp_path)
    state = torch.load(path, weights_only=True)[key]
    prefix = "module.head.0." if key == "student" else "head.0."
    head = build_proj_head(96, 10, layer, 8192, load_head(distributed.load(path), key, path))
    kept = {name: value for name, value in head.state_dict().items() if "cls_head" not in name}
    assert {name.split(".")[0] for name in kept} == ({"mlp", "last_layer"} if layer == 3 else {"mlp"})
    for name, value in kept.items():
        assert torch.equal(value, state[prefix + name])
    assert f"keeps {layer} layers of the pretrained projection head" in capsys.readouterr().out
    assert head.cls_head.in_features == (64 if layer == 3 else 2048)


def test_weights_reach_the_network(tmp_path):
    """Both poolings and both class-token modes; the patch mean has a norm of its own."""
    path = pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    for pooling in (0, 1):
        for tokens, count in (("all", 2), ("first", 1)):
            flags = [*NANO, "--avgpool_patchtokens", str(pooling), "--class_tokens", tokens, "--drop", "0.1"]
            args = main_semi_supervised.get_args_parser().parse_args(flags)
            model = engine_deit.build_model(args, path, "teacher").eval()
            state = torch.load(path, weights_only=True)["teacher"]
            assert torch.equal(model.blocks[3].attn.qkv.weight, state["backbone.backbone.blocks.3.attn.qkv.weight"])  # type: ignore[union-attr]
            assert model.num_class_token == count
            assert model.pos_embed.shape[1] == count + 16
            assert isinstance(model.norm, nn.Identity) == bool(pooling)
            tokens_ = model.forward_tokens(x)
            expected = model.fc_norm(tokens_[:, count:].mean(1)) if pooling else model.norm(tokens_[:, 0])
            assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [8, 32, 64])
def test_small_inputs_show_the_image(side):
    """Crops of up to 4 padded pixels, as upstream, of images of any size."""
    flags = ["--input-size", "32", "--aa", "none", "--color-jitter", "0", "--reprob", "0"]
    augment, evaluation = engine_deit.build_transforms(main_semi_supervised.get_args_parser().parse_args(flags))
    for transform, least in ((augment, (28 / 32) ** 2), (evaluation, 1.0)):
        white = transform(Image.new("RGB", (side, side), "white"))
        assert white.shape == (3, 32, 32)
        assert (white[0] > 2).float().mean() >= least


# ---- lists


def images(digits: str, folder: Path, text: str, class_num: int = 10) -> tuple:
    (folder / "list.txt").write_text(text)
    flags = ["--data_path", digits, "--target_list_path", str(folder / "list.txt"), "--class_num", str(class_num)]
    return data.semi_supervised_sets(main_semi_supervised.get_args_parser().parse_args(flags))


def test_lists(digits, tmp_path, capsys):
    """Lines are stripped, the last one needs no line end, and unknown names are told."""
    names = [f"{i:04d}.png" for i in range(12)]
    train, val = images(digits, tmp_path, " \r\n".join(names))
    assert [Path(path).name for path, _ in train.samples] == sorted(names, key=lambda n: (int(n[:4]) % 10, n))
    assert (len(train), len(val), train[0][1], len(train.classes)) == (12, 20, 0, 10)
    assert "WARNING" not in capsys.readouterr().out
    train, val = images(digits, tmp_path, "\n".join([*names, "absent.png"]), class_num=3)
    assert {label for _, label in train.samples} == {label for _, label in val.samples} == {0, 1, 2}
    assert "WARNING: 8 of 13 names" in capsys.readouterr().out


# ---- the script

SMALL = [*NANO, "--input-size", "32", "--num_workers", "0", "--class_num", "10", "--batch_size", "8", "--epochs", "2"]
SMALL += ["--warmup-epochs", "1", "--warmup-lr", "1e-3", "--lr", "0.5", "--device", "cpu"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return pretrained(tmp_path_factory.mktemp("semi"))


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("lists") / "forty.txt"
    path.write_text("\n".join(f"{i:04d}.png" for i in range(40)))
    return str(path)


def flags_of(digits: str, weights: str, names: str, *further: str) -> list[str]:
    own = ["--data_path", digits, "--pretrained_weights", weights, "--target_list_path", names]
    return [*SMALL, *own, *further]


def test_files_and_logs(digits, names, tmp_path, capsys):
    flags = flags_of(digits, pretrained(tmp_path), names, "--finetune_head_layer", "1")
    run_main(main_semi_supervised, *flags)
    name = "adamw_b_8_lr_5.00e-01_wd_5.00e-02_dp_0.10_ep_2_layer_1"
    folder = tmp_path / "semi_supervised_learning" / "forty" / name
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert set(lines[0]) >= {"train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "max_accuracy"}
    assert lines[0]["train_lr"] == pytest.approx(1e-3)
    log = (folder / "train.log").read_text().splitlines()
    assert [line.split(":")[0:2] for line in log] == [["INFO", "epoch 0"], ["INFO", "epoch 1"]]
    state = distributed.load(str(folder / "checkpoint.pth"))
    assert state["epoch"] == 1
    assert {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "args"} <= set(state)
    assert state["model"]["cls_token"].shape[1] == 2
    assert {"head.mlp.0.weight", "head.cls_head.bias"} <= set(state["model"])
    assert set(state["model_ema"]) == set(state["model"])
    moved = (state["model_ema"]["head.cls_head.weight"] - state["model"]["head.cls_head.weight"]).abs().max()
    assert moved > 0
    assert (folder / "checkpoint_best.pth").is_file()
    capsys.readouterr()
    run_main(main_semi_supervised, *flags, "--eval")
    assert f"* Acc@1 {lines[1]['test_acc1']:.3f}" in capsys.readouterr().out
    # A finished run has nothing left to do.
    run_main(main_semi_supervised, *flags)
    assert len((folder / "log.txt").read_text().splitlines()) == 2


def test_both_networks_in_one_command(digits, weights, names, tmp_path):
    flags = flags_of(digits, weights, names, "--checkpoint_key", "teacher,student", "--output_dir", str(tmp_path))
    further = ["--no-model-ema", "--aa", "none", "--mixup", "0", "--cutmix", "0", "--accum_iter", "2", "--epochs", "1"]
    run_main(main_semi_supervised, *flags, *further, "--opt", "sgd", "--drop", "0.1", "--attn_drop_rate", "0.1")
    for key in ("teacher", "student"):
        assert "model_ema" not in distributed.load(str(tmp_path / key / "checkpoint.pth"))


@pytest.mark.parametrize("stop", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["signal", "nan"])
def test_stop_inside_an_epoch_loses_nothing(digits, weights, names, tmp_path, monkeypatch, stop):
    flags = flags_of(digits, weights, names, "--finetune_head_layer", "1", "--lr-noise", "0.1")
    run_main(main_semi_supervised, *flags, "--output_dir", str(tmp_path / "whole"))
    broken = [*flags, "--output_dir", str(tmp_path / "broken")]
    with monkeypatch.context() as patch:
        spoil(patch, EvaluationViT, 7, stop)
        with pytest.raises(SystemExit) as end:
            run_main(main_semi_supervised, *broken)
    assert end.value.code == (128 + signal.SIGTERM if stop else 1)
    name = "checkpoint.pth" if stop else "checkpoint_nonfinite.pth"
    state = distributed.load(str(tmp_path / "broken" / name))
    assert (state["epoch"], state["images"] > 0) == (0, True)
    run_main(main_semi_supervised, *broken, *([] if stop else ["--resume", str(tmp_path / "broken" / name)]))
    assert_same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
def test_two_processes(digits, weights, names, tmp_path, launch):
    flags = flags_of(digits, weights, names, "--output_dir", str(tmp_path), "--batch_size", "4")
    launch(2, "udi/eval/eval_semi_supervised_learning/eval_semi_supervised_learning.py", *flags)
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2


def test_weight_decay_spares_biases_and_norms():
    model = EvaluationViT(0, img_size=[16], patch_size=8, embed_dim=24, depth=1, num_heads=2)
    plain, decayed = lr_decay.decay_groups(model, 0.1)
    assert any(p is model.cls_token for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])


MISTAKES = [
    (["--target_list_path", "/nowhere.txt"], "--target_list_path /nowhere.txt: No such file"),
    (["--class_num", "11"], "has 10 classes"),
    (["--class_num", "0"], "--class_num 0: "),
    (["--target_list_path", "ONE"], "names no image of class 1 in"),
    (["--target_list_path", "BINARY"], "is no UTF-8 text; expected a file name per line"),
    (["--data_path", "/nowhere"], "--data_path /nowhere: no such folder"),
    (["--pretrained_weights", "/nowhere.pth"], "/nowhere.pth: no such checkpoint file"),
    (["--checkpoint_key", ","], "--checkpoint_key: expected teacher, student or both"),
    (["--checkpoint_key", "teacher,student", "--resume", "x"], "--resume: expected one --checkpoint_key"),
    (["--finetune_head_layer", "4"], "--finetune_head_layer 4: expected 0 to 3"),
    (["--finetune_head_layer", "1", "--pretrained_weights", "PLAIN"], "holds no projection head under 'teacher'"),
    (["--distillation-type", "soft"], "--distillation-type soft: only none is supported"),
    (["--sched", "plateau"], "--sched plateau: expected one of cosine"),
    (["--opt", "nosuch"], "--opt nosuch and its flags: "),
    (["--batch_size", "7"], "--batch_size 7: Mixup and CutMix need an even number"),
    (["--batch_size", "64"], "--batch_size 64: 40 training images do not fill one batch"),
    (["--aa", "nonsense-policy"], "--aa nonsense-policy"),
    (["--drop", "1.5"], "--drop and --attn_drop_rate: dropout of 1.5"),
    (["--arch", "vit_tiny"], "--arch vit_tiny: "),
    (["--output_dir", "/proc/x"], "--output_dir /proc/x: cannot be written"),
    (["--eval", "--output_dir", "/nowhere"], "--eval: /nowhere has no checkpoint"),
    (["--resume", "PLAIN"], "'model' does not fit this run"),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(flags, words, digits, weights, names, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("0000.png\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    state = torch.load(weights, weights_only=True)["teacher"]
    backbone = {key: value for key, value in state.items() if key.startswith("backbone.backbone.")}
    torch.save(
        {"model": {k.removeprefix("backbone.backbone."): v for k, v in backbone.items()}}, tmp_path / "plain.pth"
    )
    places: dict[str, str] = {
        name.upper(): str(tmp_path / f"{name}.{end}") for name, end in (("one", "txt"), ("binary", "txt"))
    }
    places["PLAIN"] = str(tmp_path / "plain.pth")
    filled = [places.get(flag) or flag for flag in flags]
    own = flags_of(digits, weights, names, "--output_dir", str(tmp_path / "out"))
    assert words in mistake(main_semi_supervised, *own, *filled, capsys=capsys)
