"""The training loops against the authors' trajectories, the transforms, groups and flags, and what guides training."""

import argparse
import contextlib
import copy
import random
import re
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from common import datasets, distributed, lr_decay
from semaim import engine_finetune, engine_pretrain, main_finetune, main_knn, main_linprobe, main_pretrain
from semaim.engine_pretrain import Guide
from semaim.files import run_files
from semaim.models_clip import load_teacher
from semaim.models_semaim import AimViT, calculate_similarity
from semaim.models_vit import VisionTransformer
from tests.support.helpers import (
    ROOT,
    assert_close,
    authors_default,
    golden_files,
    load_golden,
    without_key_bias,
)
from tests.support.runs import CPU, FixedLoader, RecordingLog, schedule_of

MAINS = {
    "main_pretrain.py": main_pretrain,
    "main_finetune.py": main_finetune,
    "main_linprobe.py": main_linprobe,
    "main_knn.py": main_knn,
}


def assert_state(model: nn.Module, expected: dict[str, Tensor], tol: float) -> None:
    """Entries of a state dict, but for key biases, which follow rounding noise."""
    state = model.state_dict()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype, name
        actual, wanted = without_key_bias(name, state[name]), without_key_bias(name, value)
        assert_close(actual, wanted, rtol=tol, atol=tol, what=name)


# ---- goldens: pre-training


class Recorder:
    """Gives a network's forwards their noise, one golden entry each, and remembers what went in and came out."""

    def __init__(self, model: AimViT, ref):
        names = [name for name in ("noise", "center_noise") if f"in/{name}" in ref]
        self.given = {name: iter(ref[f"in/{name}"]) for name in names}
        self.losses: list[float] = []
        self.permutations: list[Tensor] = []
        self.maps: list[Tensor | None] = []
        model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.register_forward_hook(self.after)

    def before(self, _model, args, kwargs):
        self.maps.append(kwargs["attention_maps"])
        return args, {**kwargs, **{name: next(values) for name, values in self.given.items()}}

    def after(self, _model, _args, out):
        self.losses.append(out[0].item())
        self.permutations.append(out[1])


@golden_files("semaim", "trajectory_")
@pytest.mark.parametrize("impl", ["auto", "authors"])
def test_pretraining_trajectory(path, impl, tmp_path):
    ref = load_golden(path)
    meta, args, tol = ref.meta, ref.meta["args"], ref.meta["tol"]
    same = {name: args[name] for name in ("permutation_type", "attention_type", "predict_feature") if name in args}
    model = AimViT(**{**ref.kwargs, **same, "attn_impl": impl})
    model.load_state_dict(ref.weights)
    teacher = None
    if ref.group("sd_clip"):
        torch.save(ref.group("sd_clip"), tmp_path / "clip.pth")
        teacher = load_teacher("clip", str(tmp_path / "clip.pth"), model.patch_embed.img_size)
    ema = ModelEmaV3(model) if args.get("use_ema_model", meta.get("ema")) else None
    guide = Guide(model, ema and ema.module, teacher)  # type: ignore[arg-type]
    record = Recorder(model, ref)
    flags = main_pretrain.get_args_parser().parse_args(["--weight_decay", str(meta["weight_decay"])])
    optimizer = main_pretrain.build_optimizer(flags, model, args["lr"])
    accum = args.get("accum_iter", 1)
    updater = distributed.Updater(optimizer, CPU, "fp32", accum, meta.get("clip_grad"))
    loader = FixedLoader(ref["in/imgs"], [None] * len(ref["in/imgs"]))
    history, stats = [], []
    for epoch in range(meta["epochs"]):
        log = RecordingLog(history, epoch, len(loader))
        stats.append(engine_pretrain.train_one_epoch(model, loader, updater, schedule_of(args), log, guide, ema))
    # Upstream writes at updates only.
    updates = [i for i in range(len(history)) if (i % len(loader) + 1) % accum == 0]
    ref.check("out/iteration", updates, rtol=0, atol=0)
    limits = {
        "loss": (record.losses, tol["loss"], 0),
        "lr": ([h["lr"] for h in history], 1e-9, 0),
        "grad_norm": ([h["total_norm"] for h in history], tol["grad_norm"], tol["grad_norm"]),
        "permutation": (record.permutations, 0, 1e-6 if model.follows_map else 0),
        "attention_maps": (record.maps, 1e-4, 1e-5),
    }
    for name, (values, rtol, atol) in limits.items():
        whole = f"out/{name}" in ref and len(ref[f"out/{name}"]) == len(values)  # a row for each forward
        found = [np.asarray(values[i]) for i in (range(len(values)) if whole else updates)]
        if found[0].dtype != object or model.follows_map:  # a network that follows no map is given none
            ref.check(f"out/{name}", np.stack(found), rtol, atol)
    assert all(list(got) == ["lr", "loss", "total_norm"] for got in stats)
    for got, expected in zip(stats, meta["train_stats"], strict=True) if "train_stats" in meta else ():
        assert got == pytest.approx(expected, rel=tol["grad_norm"])
    assert_state(model, ref.group("out/final"), tol["final"])
    if ref.group("out/final_ema"):
        assert ema is not None
        assert_state(ema.module, ref.group("out/final_ema"), tol["final"])


@golden_files("semaim", "pretrain_param_groups", ".json")
def test_parameter_groups_of_pretraining(path):
    groups = load_golden(path)
    names = [name for group in groups for name in group["params"]]

    def count(stack: str) -> int:
        return 1 + max(int(name.split(".")[1]) for name in names if name.startswith(f"{stack}."))

    head = "MLP" if "prediction_head.fc1.weight" in names else "LINEAR"
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "num_heads": 2}
    model = AimViT(
        **sizes, depth=count("blocks"), query_depth=count("query_blocks"), prediction_head_type=head, loss_type="L2"
    )
    decay = max(group["weight_decay"] for group in groups)
    args = main_pretrain.get_args_parser().parse_args(["--weight_decay", str(decay)])
    optimizer = main_pretrain.build_optimizer(args, model, 1e-3)
    own = {id(p): name for name, p in model.named_parameters()}
    found = [([own[id(p)] for p in g["params"]], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(g["params"], g["weight_decay"]) for g in groups]
    for group, expected in zip(optimizer.param_groups, groups, strict=True):
        assert all(np.allclose(group[name], expected[name]) for name in {"betas", "eps"} & set(expected))


# ---- goldens: fine-tuning and probing


def steps_per_epoch(meta: dict) -> int:
    """The golden tells the schedule's argument: "s/2 for step s"."""
    return int(re.findall(r"s/(\d+)", meta["epoch_argument_of_schedule"])[0])


def criterion_of(meta: dict) -> nn.CrossEntropyLoss:
    """Soft targets and class indices go through the same loss; timm's smoothing is torch's."""
    text = meta.get("criterion", "")
    told = re.search(r"\d*\.\d+", text)
    default = float(told[0]) if told else authors_default("semaim", "main_finetune.py", "--smoothing")
    smoothing = meta.get("smoothing", default)
    return nn.CrossEntropyLoss(label_smoothing=smoothing if "Smoothing" in text else 0.0)


def train(ref, model: VisionTransformer, optimizer: torch.optim.Optimizer) -> tuple[list, list, list]:
    """Train on the golden's batches; losses and rates of the groups by step, and recorded values."""
    per_epoch = steps_per_epoch(ref.meta)
    updater = distributed.Updater(optimizer, CPU, "fp32", ref.meta.get("accum_iter", 1), ref.meta.get("clip"))
    losses, rates, history, criterion = [], [], [], criterion_of(ref.meta)

    def recorded(logits, targets):
        losses.append(criterion(logits, targets))
        rates.append([group["lr"] for group in optimizer.param_groups])
        return losses[-1]

    for epoch in range(len(ref["in/imgs"]) // per_epoch):
        own = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        loader = FixedLoader(ref["in/imgs"][own], ref["in/targets"][own])
        log = RecordingLog(history, epoch, len(loader))
        engine_finetune.train_one_epoch(model, recorded, loader, updater, schedule_of(ref.meta["lr"]), log)
    return [loss.item() for loss in losses], rates, history


@golden_files("semaim", "finetune_trajectory")
def test_finetuning_trajectory(path):
    ref = load_golden(path)
    meta, tol = ref.meta, ref.meta["tol"]
    model = VisionTransformer(**ref.kwargs)
    model.load_state_dict(ref.weights)
    flags = ["--weight_decay", str(meta["weight_decay"]), "--layer_decay", str(meta["layer_decay"])]
    args = main_finetune.get_args_parser().parse_args(flags)
    optimizer = main_finetune.build_optimizer(args, model, meta["lr"]["lr"])
    for b1, b2, eps in re.findall(r"betas \(([\d.]+), ?([\d.]+)\) eps ([\de.-]+)", meta.get("optimizer", "")):
        expected = ((float(b1), float(b2)), float(eps))
        assert {(g["betas"], g["eps"]) for g in optimizer.param_groups} == {expected}
    losses, rates, history = train(ref, model, optimizer)
    ref.check("out/loss", losses, rtol=tol["loss"], atol=0)
    ref.check("out/group_lr", rates, rtol=1e-9, atol=1e-15)
    if "out/grad_norm" in ref:
        norms = [h["total_norm"] for h in history]
        if len(norms) > len(ref["out/grad_norm"]):  # of the updates only
            norms = [norm for norm in norms if not np.isnan(norm)]
        ref.check("out/grad_norm", norms, rtol=1e-3, atol=0)
    assert_state(model, ref.group("out/final"), tol["final"])


@golden_files("semaim", "linprobe_trajectory")
def test_linear_probe_trajectory(path):
    ref = load_golden(path)
    meta, tol = ref.meta, ref.meta["tol"]
    model = VisionTransformer(**ref.kwargs)
    head = main_linprobe.add_probe(model)
    model.load_state_dict(ref.weights)
    before = copy.deepcopy(model.state_dict())
    args = main_linprobe.get_args_parser().parse_args(["--weight_decay", str(meta["weight_decay"])])
    optimizer = main_linprobe.build_optimizer(args, head, meta["lr"]["lr"])
    losses, _, _ = train(ref, model, optimizer)
    ref.check("out/loss", losses, rtol=tol["loss"], atol=0)
    assert_state(model, ref.group("out/final"), tol["final"])
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, before[name]), name
    logits = model.eval()(ref["in/imgs"][0])
    ref.check("out/eval_logits", logits, rtol=10 * tol["final"], atol=10 * tol["final"])


@pytest.mark.parametrize("global_pool", [False, True])
def test_probe_trains_its_head_only(global_pool):
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    model = VisionTransformer(**sizes, num_classes=3, global_pool=global_pool)
    head = main_linprobe.add_probe(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["head.1.weight", "head.1.bias"]
    args = main_linprobe.get_args_parser().parse_args([])
    optimizer = main_linprobe.build_optimizer(args, head, 0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    features = torch.randn(16, 8) * 3 + 5
    normalised = head[0].train()(features)
    assert_close(normalised, (features - features.mean(0)) / features.var(0, unbiased=False).sqrt(), rtol=0, atol=1e-4)


def test_ema_decay_ends_at_its_end():
    values = [engine_pretrain.ema_decay(epoch) for epoch in (0, 50, 100, 500)]
    assert values == pytest.approx([0.999, 0.99945, 0.9999, 0.9999], abs=1e-12)


@golden_files("semaim", "layer_decay", ".json")
def test_layer_decay_groups_in_upstreams_order(path):
    for case, ref in load_golden(path).items():
        # Such as vit_base_patch16.cls.ld0.75, or with the weight decay behind it: ....wd0.05
        form = r"(\w+)\.(\w+)\.ld(\d+(?:\.\d+)?)(?:\.wd(\d+(?:\.\d+)?))?"
        name, pool, decay, own_decay = re.fullmatch(form, case).groups()  # type: ignore[union-attr]
        with torch.device("meta"):
            model = main_finetune.MODELS[name](global_pool=pool == "global_pool")
        given = ref.get("param", {})
        decays = [own["weight_decay"] for own in (*given.values(), *ref.get("order", []))]
        weight_decay = float(own_decay or max(decays))
        depth, skip = len(model.blocks), model.no_weight_decay()
        groups = lr_decay.layer_decay_groups(model, weight_decay, float(decay), depth, skip)
        names = {id(p): n for n, p in model.named_parameters()}
        found = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        assert not given or set(found) == set(given), case
        for param, expected in given.items():
            assert found[param] == pytest.approx((expected["lr_scale"], expected["weight_decay"]), rel=1e-12), param
        order = [(g["lr_scale"], g["weight_decay"], len(g["params"]), names[id(g["params"][0])]) for g in groups]
        for group, expected in zip(order, ref.get("order", []), strict="order" in ref):
            assert group[:2] == pytest.approx((expected["lr_scale"], expected["weight_decay"]), rel=1e-12), case
            assert group[2:] == (expected["n"], expected["first"]), case


# ---- goldens: data and flags


@golden_files("semaim", "transforms")
def test_transforms(path):
    """Names are <stage>, <stage>_<size> (default 224) and <stage>_seed<seed>; outputs are sub-sampled."""
    makers = {
        "knn": main_knn.knn_transform,
        "finetune_val": datasets.eval_transform,
        "linprobe_val": datasets.eval_transform,
        "linprobe_train": main_linprobe.probe_transform,
        "pretrain": main_pretrain.pretrain_transform,
        "finetune_train": datasets.finetune_transform,
    }
    ref = load_golden(path)
    image: Any = Image.fromarray(ref["in/image"].numpy())
    same_pillow = PIL.__version__ == ref.meta.get("versions", {}).get("pillow")
    tol = ref.meta["tol"] if same_pillow else 2e-2  # other releases round by a grey level here and there
    names = [key.removeprefix("out/") for key in ref.arrays if key.startswith("out/")]
    assert names
    for name in names:
        stage, size, seed = re.fullmatch(r"(.+?)(?:_(\d+))?(?:_seed(\d+))?", name).groups()  # type: ignore[union-attr]
        expected = ref[f"out/{name}"]
        torch.manual_seed(int(seed or 0))
        random.seed(int(seed or 0))
        np.random.seed(int(seed or 0))  # noqa: NPY002
        out = makers[stage](int(size or 224))(image)
        step = -(-out.shape[-1] // expected.shape[-1])
        assert_close(out[:, ::step, ::step], expected, rtol=0, atol=tol, what=name)


@golden_files("semaim", "manifest", ".json")
def test_flags_and_defaults(path):
    flags = load_golden(path)["flags"]
    assert set(flags) == set(MAINS)
    for name, table in flags.items():
        parser = MAINS[name].get_args_parser()
        actions = {o: a for a in parser._actions for o in a.option_strings}
        defaults = vars(parser.parse_args([]))
        for flag, ref in table.items():
            action = actions[flag]
            assert action.dest == ref["dest"], flag
            assert action.nargs == ref["nargs"], flag
            if flag == "--device":  # ours: CUDA where present
                assert (ref["default"], defaults["device"]) == ("cuda", "auto")
                continue
            kind = "flag" if action.nargs == 0 else getattr(action.type or str, "__name__", "")
            if (name, flag) == ("main_knn.py", "--patch_size"):  # dead upstream; ours: the model's
                assert (ref["default"], defaults["patch_size"]) == (16, None)
                continue
            assert defaults[ref["dest"]] == ref["default"], f"{name} {flag}"
            if flag == "--gaussian_sigma":  # ours: fractions, too
                assert (ref["type"], kind) == ("int", "float")
            else:
                assert kind == ref["type"], f"{name} {flag}"
        assert "--local-rank" in actions


# ---- where orders and features come from

SIZES: dict[str, Any] = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "query_depth": 2}


def student(**kwargs) -> AimViT:
    torch.manual_seed(0)
    return AimViT(**{**SIZES, "permutation_type": "attention_center", "out_dim": 6, **kwargs}).train()


class Teacher(nn.Module):
    """Tokens of a fixed projection; remembers how it was called."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(12 * 12 * 3, 10 * width)
        self.calls: list[dict] = []

    def forward(self, imgs: Tensor) -> Tensor:
        self.calls.append({"grad": torch.is_grad_enabled(), "autocast": torch.is_autocast_enabled("cpu")})
        return self.proj(imgs.flatten(1)).unflatten(1, (10, -1))


def watch(model: AimViT) -> list[dict]:
    """How its semantic_pass is called from here on."""
    calls, plain = [], model.semantic_pass

    def watched(imgs, features=False):
        state = {"training": model.training, "grad": torch.is_grad_enabled(), "features": features}
        cache = torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()
        calls.append({**state, "autocast": torch.is_autocast_enabled("cpu"), "cache": cache})
        return plain(imgs, features)

    model.semantic_pass = watched  # type: ignore[method-assign]
    return calls


GUIDES = [  # predict_feature, order, with EMA, with teacher -> who is asked, tokens, maps
    ("none", "stochastic", False, False, None, False, False),
    ("none", "stochastic", True, False, None, False, False),
    ("none", "attention_center", False, False, "model", False, True),
    ("none", "attention", True, False, "ema", False, True),
    ("inference", "attention_center", False, False, "model", True, True),
    ("inference", "attention_center", True, False, "model", True, True),
    ("inference", "stochastic", False, False, "model", True, True),
    ("ema", "attention_center", True, False, "ema", True, True),
    ("ema", "stochastic", True, False, "ema", True, True),
    ("clip", "attention_center", False, True, "teacher", True, True),
    ("clip", "stochastic", True, True, "teacher", True, True),
    ("dino", "attention_center", False, True, "teacher", True, True),
]


@pytest.mark.parametrize(("feature", "order", "averaged", "taught", "asked", "has_tokens", "has_maps"), GUIDES)
def test_guide_asks_the_right_network(feature, order, averaged, taught, asked, has_tokens, has_maps):
    model = student(predict_feature=feature, permutation_type=order)
    ema: Any = ModelEmaV3(model) if averaged else None
    if ema is not None:
        for p in ema.module.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    teacher = Teacher({"clip": 6}.get(feature, 16)) if taught else None
    calls = {
        "model": watch(model),
        "ema": watch(ema.module) if ema else [],
        "teacher": teacher.calls if teacher else [],
    }
    imgs = torch.rand(2, 3, 12, 12)
    tokens, maps = Guide(model, ema and ema.module, teacher)(imgs)
    assert [name for name, entries in calls.items() for _ in entries] == ([asked] if asked else [])
    assert (tokens is not None, maps is not None) == (has_tokens, has_maps)
    for value in (tokens, maps):
        assert value is None or not value.requires_grad
    assert model.training, "the mode is put back"
    assert ema is None or not ema.module.training
    for call in calls["model"] + calls["ema"] + calls["teacher"]:
        assert not call["grad"]
        assert not call.get("training")
        assert call.get("features", has_tokens) == has_tokens
    if asked in ("model", "ema"):
        source = {"model": model, "ema": ema and ema.module}[asked].eval()
        expected_tokens, expected_maps, _ = source(imgs, forward_encoder=True)
        assert maps is not None
        assert torch.equal(maps, expected_maps)
        assert tokens is None or torch.equal(tokens, expected_tokens)
    elif asked == "teacher":
        assert tokens is not None
        assert maps is not None
        assert torch.equal(maps, calculate_similarity(tokens))
    loss = model.train()(imgs, tokens=tokens, attention_maps=maps)[0]
    assert loss.isfinite()


@pytest.mark.parametrize("attention_type", ["cls", "gap", "self"])
def test_guide_follows_the_attention_type(attention_type):
    model = student(attention_type=attention_type)
    imgs = torch.rand(2, 3, 12, 12)
    _, similarity, attention = copy.deepcopy(model).eval()(imgs, forward_encoder=True)
    maps = Guide(model)(imgs)[1]
    assert_close(maps, attention if attention_type == "self" else similarity, rtol=0, atol=1e-7)


def test_guide_keeps_an_evaluated_model_so():
    model = student().eval()
    Guide(model)(torch.rand(2, 3, 12, 12))
    assert not model.training


@pytest.mark.parametrize("feature", ["none", "inference"])
@pytest.mark.parametrize("amp", [False, True])
def test_guide_under_autocast(feature, amp):
    """Where the pass that makes the order runs in half precision, and that it leaves every weight its gradient.

    Autocast keeps casts of weights for reuse: casts made without autograd must not serve the pass that trains, as
    they did with some releases of torch.
    """
    model = student(predict_feature=feature)
    calls, imgs = watch(model), torch.rand(2, 3, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        loss = engine_pretrain.batch_loss(model, (imgs, imgs), Guide(model, amp=amp))
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
    assert [(call["autocast"], call["cache"]) for call in calls] == [(amp, False)]
    assert loss.dtype == torch.float32
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    tokens, maps = Guide(model, amp=True)(imgs)  # without autocast around it, everything is float32
    assert calls[-1]["autocast"] is False
    assert all(value is None or value.dtype == torch.float32 for value in (tokens, maps))


def test_guide_under_autocast_gives_the_float32_order():
    model = student()
    imgs = torch.rand(2, 3, 12, 12)
    plain = Guide(model)(imgs)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Guide(model)(imgs)[1], plain)  # type: ignore[arg-type]
        assert not torch.equal(Guide(model, amp=True)(imgs)[1], plain)  # type: ignore[arg-type]


# ---- the loop


def run_epochs(model: AimViT, imgs: Tensor, epochs: int = 1, accum: int = 1, with_ema: bool = True, **kwargs) -> Any:
    """Train with SGD of rate 0.1; the average's decay is upstream's."""
    ema = ModelEmaV3(model) if with_ema else None
    guide = Guide(model, ema and ema.module)  # type: ignore[arg-type]
    params = [p for p in model.parameters() if p.requires_grad]
    updater = distributed.Updater(torch.optim.SGD(params, 0.1), CPU, "fp32", accum)
    loader = FixedLoader(imgs, imgs)
    for epoch in range(epochs):
        log = RecordingLog([], epoch, len(loader))
        engine_pretrain.train_one_epoch(model, loader, updater, lambda _: 0.1, log, guide, ema, **kwargs)
    return ema


@pytest.mark.parametrize("accum", [1, 2])
def test_average_follows_every_update(accum):
    """e <- e d + (1 - d) m with d = 0.999 + 0.0009 epoch / 100, after the update and not between its micro-steps."""
    model, imgs = student(), torch.rand(4, 2, 3, 12, 12)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    weights, plain = [], torch.optim.SGD.step

    def step(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        weights.append({name: value.clone().double() for name, value in model.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        ema = run_epochs(model, imgs, epochs=2, accum=accum)
    assert len(weights) == 8 // accum
    for i, state in enumerate(weights):
        decay = 0.999 + 0.0009 * (i * accum // 4) / 100
        expected = {name: decay * value + (1 - decay) * state[name] for name, value in expected.items()}
    for name, value in ema.module.state_dict().items():
        assert_close(value, expected[name], rtol=0, atol=1e-6, what=name)


def test_average_is_frozen_with_the_weights():
    """CUDA notices a NaN steps later; until then neither weights nor average may move, or no replay is exact."""
    imgs, averages = torch.rand(6, 2, 3, 12, 12), []
    for bad in (False, True):
        model = student()
        ema = ModelEmaV3(model)
        optimizer = main_pretrain.build_optimizer(main_pretrain.get_args_parser().parse_args([]), model, 1e-2)
        updater = distributed.Updater(optimizer, CPU, "fp32")
        updater.guard_on_device = True
        loader = FixedLoader(imgs.clone() if bad else imgs[:3], imgs if bad else imgs[:3])
        if bad:
            loader.data[3][0].fill_(torch.nan)
        log = distributed.EpochLog("", 6, 1, torch.device("cuda"))  # reports every 20 steps
        guide = Guide(model, ema.module)  # type: ignore[arg-type]
        with pytest.raises(distributed.NonFinite) if bad else contextlib.nullcontext():
            engine_pretrain.train_one_epoch(model, loader, updater, lambda _: 1e-2, log, guide, ema)
        averages.append(ema.module.state_dict())
    for name, value in averages[0].items():
        assert torch.equal(value, averages[1][name]), name


def test_draws_depend_on_seed_and_step_alone():
    imgs = torch.rand(3, 2, 3, 12, 12)
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = student(permutation_type="stochastic")
        torch.manual_seed(noise)
        run_epochs(model, imgs, seed=seed, with_ema=False)
        runs.append(model.state_dict()["norm.weight"].clone())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_files_for_upstream__with_the_names_of_distributed_training(tmp_path):
    """The README's line makes of our file one that upstream's strict load takes into a wrapped network."""
    model = student()
    args = main_pretrain.get_args_parser().parse_args(["--model", "aim_base"])
    optimizer = main_pretrain.build_optimizer(args, model, 1e-3)
    model(torch.rand(2, 3, 12, 12), attention_maps=torch.rand(2, 9))[0].backward()
    optimizer.step()
    files = run_files(args)
    distributed.Checkpoint(str(tmp_path), args, model, files, optimizer=optimizer).save(distributed.Position(1))
    line = re.findall(r'^python -c "(.*)"$', (ROOT / "semaim/README.md").read_text(), re.MULTILINE)[0]
    exec(line.replace("OURS", str(tmp_path / files.latest)).replace("THEIRS", str(tmp_path / "theirs.pth")))
    theirs = torch.load(tmp_path / "theirs.pth", weights_only=True)
    wrapped = nn.Module()
    wrapped.module = student()  # as DistributedDataParallel names it
    wrapped.load_state_dict(theirs["state_dict"])
    for name, value in model.state_dict().items():
        assert torch.equal(wrapped.module.state_dict()[name], value), name
    assert (theirs["model"], theirs["epoch"]) == ("aim_base", 1)
    plain = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups], lr=1.0)
    plain.load_state_dict(theirs["optimizer"])
    assert [group["lr"] for group in plain.param_groups] == [1e-3, 1e-3]


def test_optimizer_state_of_upstream_resumes(tmp_path):
    """A file as upstream writes it: the model's name under `model`, prefixed weights, an average without prefix."""
    model = student()
    args = main_pretrain.get_args_parser().parse_args(["--model", "aim_base"])
    optimizer = main_pretrain.build_optimizer(args, model, 1e-3)
    ema = ModelEmaV3(model)
    imgs, given = torch.rand(2, 3, 12, 12), {"noise": torch.rand(2, 9), "attention_maps": torch.rand(2, 9)}
    model(imgs, **given)[0].backward()
    optimizer.step()
    ema.update(model, 5)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in set(group) - {"lr", "betas", "eps", "weight_decay", "amsgrad", "params"}:
            del group[key]
    upstream = {
        "epoch": 7,
        "state_dict": {f"module.{name}": value for name, value in model.state_dict().items()},
        "optimizer": state,
        "model": "aim_base",
        "loss_scaler": {},
        "ema_state_dict": ema.module.state_dict(),
        "args": argparse.Namespace(lr=0.1, x=np.float64(2)),
    }
    torch.save(upstream, tmp_path / "official.pth")
    fresh = student()
    resumed, average = main_pretrain.build_optimizer(args, fresh, 1e-3), ModelEmaV3(fresh)
    parts = {"optimizer": resumed, "loss_scaler": torch.amp.GradScaler("cpu", enabled=False)}
    checkpoint = distributed.Checkpoint("", args, fresh, run_files(args), **parts, ema_state_dict=average.module)
    assert checkpoint.resume(str(tmp_path / "official.pth")) == distributed.Position(7)
    for name, value in ema.module.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], value), name
    for net, opt in ((model, optimizer), (fresh, resumed)):
        opt.zero_grad()
        net(imgs, **given)[0].backward()
        opt.step()
    for (name, a), b in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b), name
