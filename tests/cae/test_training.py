"""The training loops against the authors' trajectories; transforms, checkpoints and rates of the mains."""

import argparse
import copy
import random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torchvision import transforms

from cae import engine_finetune, engine_pretrain, main_attentive, main_finetune, main_linprobe, main_pretrain, optim
from cae.augmentation import HALF
from cae.files import resume_path, run_files
from cae.models_cae import ContextAutoencoderViT
from cae.models_dalle import DalleTokenizer
from cae.models_dvae import DiscreteVAE
from cae.models_vit import ProbeBatchNorm, VisionTransformer
from common import datasets, distributed, lr_sched
from tests.support.helpers import assert_close, golden_files, load_golden, tolerance
from tests.support.runs import CPU, FixedLoader, RecordingLog

TAGS = {"loss/loss": "loss", "loss/mlm_acc": "mlm_acc", "loss/class_acc": "class_acc"}
TAGS |= {"loss_main/loss": "loss_main", "loss_align/loss": "loss_align"}


class Tokens:
    """A tokenizer that knows the answers, batch by batch."""

    def __init__(self, ids):
        self.ids = iter(ids)

    def get_codebook_indices(self, images: Tensor) -> Tensor:
        return next(self.ids)


# ---- goldens


def args_of(main: ModuleType, hyper: dict, optimizer: str) -> argparse.Namespace:
    """The flags of a trajectory: every hyper-parameter that is one."""
    args = main.get_args_parser().parse_args([])
    vars(args).update({name: value for name, value in hyper.items() if name in args})
    args.opt = optimizer
    return args


def assert_groups(ref, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        (group.get("lr_scale", 1.0), group["weight_decay"], [names[id(p)] for p in group["params"]])
        for group in optimizer.param_groups
    ]
    expected = [(g["lr_scale"] or 1.0, g["weight_decay"], g["params"]) for g in ref.meta["param_groups"]]
    assert [(pytest.approx(scale), decay, params) for scale, decay, params in found] == expected


def assert_history(ref, history: list[dict[str, float]]) -> None:
    """What upstream logs of every micro-step; NaN where it made no update."""
    tol = tolerance(ref, "loss")
    logs = ref.group("out/log")
    assert logs
    for tag, expected in logs.items():
        name = TAGS.get(tag) or tag.removeprefix("opt/")
        found = [step.get(name, float("nan")) for step in history]
        exact = name in ("lr", "min_lr", "weight_decay", "loss_scale")
        scale = {"rtol": 1e-6, "atol": 1e-12} if exact else tol
        assert_close(np.array(found, dtype=np.float32), expected, **scale, what=tag)


def assert_means(history: list[dict[str, float]], stats: dict[str, float], steps: int) -> None:
    for name, mean in stats.items():
        values = [step[name] for step in history[-steps:]]
        assert mean == pytest.approx(np.nanmean(values), rel=1e-6), name


def assert_final(ref, model: nn.Module) -> None:
    final, state = ref.group("out/final"), model.state_dict()
    assert final
    for name, expected in final.items():
        assert_close(state[name], expected, **tolerance(ref, "final"), what=name)


@golden_files("cae", "pretrain_traj")
def test_pretraining_trajectory(path):
    ref = load_golden(path)
    hyper = ref.meta["hyper"]
    args = args_of(main_pretrain, hyper, ref.meta.get("optimizer", hyper.get("opt")))
    given = {name: hyper[name] for name in ("base_momentum",) if name in hyper}
    model = ContextAutoencoderViT(**{**{k: v for k, v in ref.kwargs.items() if k != "num_out_dim"}, **given})
    model.load_state_dict(ref.weights)
    optimizer = main_pretrain.build_optimizer(args, model, args.lr)
    assert_groups(ref, model, optimizer)
    accum = hyper.get("update_freq", hyper.get("accum_iter", 1))
    per_epoch = hyper["niter_per_ep"]
    rates = optim.build_rates(args, per_epoch)
    for i, name in enumerate(("lr_schedule", "wd_schedule")):
        if f"out/{name}" in ref:
            expected = ref[f"out/{name}"]
            assert_close([rates(update)[i] for update in range(len(expected))], expected, rtol=1e-6, atol=0, what=name)
    updater = distributed.Updater(optimizer, CPU, "fp32", accum, args.clip_grad)
    tokenizer, history = Tokens(ref["in/token_ids"]), []
    for epoch in range(args.epochs):
        own = slice(epoch * per_epoch * accum, (epoch + 1) * per_epoch * accum)
        imgs, masks = ref["in/x"][own], ref["in/bool_masked_pos"][own]
        loader = FixedLoader([(x, x, mask) for x, mask in zip(imgs, masks, strict=True)], imgs)
        log = RecordingLog(history, epoch, len(loader))
        stats = engine_pretrain.train_one_epoch(model, loader, updater, rates, log, tokenizer, args.align_loss_weight)
        assert_means(history, stats, len(loader))
    assert_history(ref, history)
    assert_final(ref, model)


def assert_finetuning_trajectory(path) -> None:
    ref = load_golden(path)
    hyper = ref.meta["hyper"]
    args = args_of(main_finetune, hyper, hyper["opt"])
    model = VisionTransformer(**ref.kwargs)
    model.load_state_dict(ref.weights)
    before = copy.deepcopy(model.state_dict())
    trained = ("query_token", "attentive_blocks", "head")
    if hyper.get("attentive_freeze"):
        main_finetune.freeze(model, *trained)
    optimizer = main_finetune.build_optimizer(args, model, args.lr)
    assert_groups(ref, model, optimizer)
    accum, per_epoch = hyper.get("update_freq", 1), hyper["niter_per_ep"]
    lr = lr_sched.cosine_table(
        args.lr, args.min_lr, args.epochs, per_epoch, args.warmup_epochs, warmup_steps=args.warmup_steps
    )
    if "out/lr_schedule" in ref:
        assert_close(lr, ref["out/lr_schedule"], rtol=1e-6, atol=0)
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    decay = lr_sched.cosine_table(args.weight_decay, end, args.epochs, per_epoch)

    def rates(epoch: int, step: int) -> tuple[float, float]:
        update = epoch * per_epoch + step // accum
        return float(lr[update]), float(decay[update])

    updater = distributed.Updater(optimizer, CPU, "fp32", accum, args.clip_grad)
    soft = ref["in/y"].ndim == 3
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if soft else args.smoothing)
    history = []
    for epoch in range(args.epochs):
        own = slice(epoch * per_epoch * accum, (epoch + 1) * per_epoch * accum)
        loader = FixedLoader(ref["in/x"][own], ref["in/y"][own])
        log = RecordingLog(history, epoch, len(loader))
        stats = engine_finetune.train_one_epoch(model, criterion, loader, updater, rates, log)
        assert_means(history, stats, len(loader))
    assert_history(ref, history)
    assert_final(ref, model)
    if hyper.get("attentive_freeze"):
        for name, value in model.state_dict().items():
            frozen = name.split(".")[0] not in (*trained, "fc_norm")
            assert not frozen or torch.equal(value, before[name]), name


@golden_files("cae", "ft_traj")
def test_finetuning_trajectory(path):
    assert_finetuning_trajectory(path)


@golden_files("cae", "attentive_traj")
def test_attentive_probe_trajectory(path):
    assert_finetuning_trajectory(path)


@golden_files("cae", "linear_traj")
def test_linear_probe_trajectory(path):
    ref = load_golden(path)
    hyper, accum = ref.meta["hyper"], ref.meta["hyper"].get("accum_iter", 1)
    model = VisionTransformer(**ref.kwargs)
    head = main_linprobe.add_probe(model)
    model.load_state_dict(ref.weights)
    before = copy.deepcopy(model.state_dict())
    args = args_of(main_linprobe, hyper, "")
    optimizer = main_linprobe.build_optimizer(args, head, args.lr)
    updater, history = distributed.Updater(optimizer, CPU, "fp32", accum), []
    steps = len(ref["in/x"]) // args.epochs

    def rates(epoch: int, step: int) -> tuple[float, float]:
        at = epoch + step / steps
        return lr_sched.warmup_cosine(at, args.lr, args.min_lr, args.warmup_epochs, args.epochs), args.weight_decay

    for epoch in range(args.epochs):
        own = slice(epoch * steps, (epoch + 1) * steps)
        loader = FixedLoader(ref["in/x"][own], ref["in/y"][own])
        log = RecordingLog(history, epoch, steps)
        engine_finetune.train_one_epoch(model, nn.CrossEntropyLoss(), loader, updater, rates, log)
    assert_close([step["loss"] for step in history], ref["out/loss"], **tolerance(ref, "loss"))
    assert_close([step["lr"] for step in history], ref["out/lr"], rtol=1e-6, atol=0)
    assert_final(ref, model)
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, before[name]), name
    model.eval()
    assert_close(model(ref["in/x"][0]), ref["out/eval_logits"], **tolerance(ref, "final"))


# ---- pre-training

SIZES: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depth": 2, "num_heads": 2}
DECODER: dict[str, Any] = {"decoder_embed_dim": 8, "decoder_num_heads": 2, "decoder_num_classes": 5}
DECODER |= {"regressor_depth": 1, "decoder_depth": 1}


def autoencoder(**kwargs) -> ContextAutoencoderViT:
    torch.manual_seed(0)
    return ContextAutoencoderViT(**{**SIZES, **DECODER, **kwargs}).train()


def batches(steps: int = 4) -> tuple[list, Tensor, Tensor]:
    """Batches of the loader, their class labels, and the tokens of their patches."""
    torch.manual_seed(1)
    imgs = torch.rand(steps, 3, 3, 8, 8)
    masks = torch.stack([torch.stack([torch.randperm(16) < 6 for _ in range(3)]) for _ in range(steps)])
    return list(zip(imgs, imgs, masks, strict=True)), imgs, torch.randint(5, (steps, 3, 16))


def pretrain(model: ContextAutoencoderViT, epochs: int = 1, accum: int = 1, **kwargs) -> list[dict[str, float]]:
    inputs, labels, ids = batches()
    loader, history = FixedLoader(inputs, labels), []
    params = [p for p in model.parameters() if p.requires_grad]
    updater = distributed.Updater(torch.optim.SGD(params, 0.1), CPU, "fp32", accum)
    for epoch in range(epochs):
        log = RecordingLog(history, epoch, len(loader))
        engine_pretrain.train_one_epoch(model, loader, updater, lambda _: (0.1, 0.0), log, Tokens(ids), 2.0, **kwargs)
    return history


def test_batch_losses():
    model = autoencoder().eval()
    (batch, *_), _, (ids, *_) = batches()
    for shape in ((3, 16), (3, 4, 4)):  # tokenizers give either
        losses = engine_pretrain.batch_losses(model, (batch, torch.zeros(3)), Tokens([ids.view(shape)]), 2.0)  # type: ignore[arg-type]
        logits, predicted, target = model(batch[0], batch[2])
        labels = ids[batch[2]]
        main = nn.functional.cross_entropy(logits, labels)
        align = 2.0 * (predicted - target).square().mean()
        assert_close(losses["loss_main"], main, rtol=1e-6, atol=0)
        assert_close(losses["loss_align"], align, rtol=1e-6, atol=0)
        assert_close(losses["loss"], main + align, rtol=1e-6, atol=0)
        assert_close(losses["mlm_acc"], (logits.argmax(dim=1) == labels).float().mean(), rtol=1e-6, atol=0)
    given = engine_pretrain.batch_losses(model, (batch, torch.zeros(3)), Tokens([ids]), 2.0, num_masked=6)  # type: ignore[arg-type]
    assert torch.equal(given["loss"], losses["loss"])
    total = engine_pretrain.batch_loss(model, (batch, torch.zeros(3)), tokenizer=Tokens([ids]), align_weight=2.0)  # type: ignore[arg-type]
    assert torch.equal(total, losses["loss"])


def test_losses_are_float32_and_tokens_see_no_autocast():
    model = autoencoder()
    (batch, *_), _, (ids, *_) = batches()
    seen = []

    class Watching(Tokens):
        def get_codebook_indices(self, images: Tensor) -> Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return super().get_codebook_indices(images)

    with torch.autocast("cpu", torch.bfloat16):
        losses = engine_pretrain.batch_losses(model, (batch, torch.zeros(3)), Watching([ids]), 2.0)  # type: ignore[arg-type]
    assert seen == [(False, False)]
    assert {losses[name].dtype for name in ("loss", "loss_main", "loss_align")} == {torch.float32}


def test_statistics_are_in_upstreams_order():
    history = pretrain(autoencoder())
    names = ["lr", "min_lr", "mlm_acc", "loss", "loss_main", "loss_align", "loss_scale", "weight_decay", "grad_norm"]
    assert all(list(step) == names for step in history)


def test_draws_depend_on_seed_and_step_alone():
    weights = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = autoencoder(drop_path_rate=0.5)
        torch.manual_seed(noise)
        pretrain(model, seed=seed)
        weights.append(model.encoder.norm.weight.clone())  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_moving_average_moves_with_every_forward_pass():
    """Not only with updates: of 2 epochs of 4 batches, 2 per update, it sees 8."""
    model, seen, plain = autoencoder(base_momentum=0.5), [], ContextAutoencoderViT._update_teacher

    def counted(self):
        plain(self)
        seen.append(self.encoder.cls_token.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContextAutoencoderViT, "_update_teacher", counted)
        expected = model.alignment_encoder.cls_token.clone()
        pretrain(model, epochs=2, accum=2)
    assert len(seen) == 8
    for token in seen:
        expected = 0.5 * expected + 0.5 * token
    assert_close(model.alignment_encoder.cls_token, expected, rtol=0, atol=1e-6)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_rates_of_an_incomplete_update_are_those_of_the_last():
    """5 batches, 2 per update: the fifth batch makes none."""
    model, updates = autoencoder(), []
    inputs, labels, ids = batches(5)
    params = [p for p in model.parameters() if p.requires_grad]
    updater = distributed.Updater(torch.optim.SGD(params, 0.1), CPU, "fp32", 2)
    for epoch in range(2):
        log = RecordingLog([], epoch, 5)
        rates = lambda update: (updates.append(update) or 0.1, 0.0)  # noqa: E731
        engine_pretrain.train_one_epoch(model, FixedLoader(inputs, labels), updater, rates, log, Tokens(ids), 2.0)
    assert updates == [0, 1, 1, 2, 3, 3]


def test_weight_decay_is_written_where_there_is_any():
    groups = [{"weight_decay": 0.1, "lr": 0.0}, {"weight_decay": 0.0, "lr": 0.0, "lr_scale": 0.5}]
    engine_pretrain.set_rates(groups, 0.4, 0.3)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.4, 0.3), (0.2, 0.0)]
    assert engine_pretrain.current_rates(groups) == {"lr": 0.4, "min_lr": 0.2, "weight_decay": 0.3}


def test_tokenizer_views():
    x = torch.rand(3, 4, 4)
    tiny = DalleTokenizer(n_hid=4, vocab_size=8, n_blk_per_group=1, with_decoder=False)
    assert_close(main_pretrain.tokenizer_view(tiny)(x), 0.8 * x + 0.1, rtol=0, atol=1e-6)
    vae = DiscreteVAE(8, num_tokens=8, codebook_dim=4, num_layers=1, hidden_dim=4)
    assert_close(main_pretrain.tokenizer_view(vae)(x), 2 * x - 1, rtol=0, atol=1e-6)


def test_images_are_normalised_by_the_flag():
    parser = main_pretrain.get_args_parser()
    assert main_pretrain.mean_and_std(parser.parse_args([])) == (HALF, HALF)
    given = main_pretrain.mean_and_std(parser.parse_args(["--imagenet_default_mean_and_std"]))
    assert given == (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD)


# ---- fine-tuning and probing


def classifier(**kwargs) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SIZES, "num_classes": 3, **kwargs})


def finetune(model: VisionTransformer, steps: int = 4, accum: int = 1, **kwargs) -> list[dict[str, float]]:
    torch.manual_seed(1)
    loader, history = FixedLoader(torch.rand(steps, 4, 3, 8, 8), torch.randint(3, (steps, 4))), []
    params = [p for p in model.parameters() if p.requires_grad]
    updater = distributed.Updater(torch.optim.SGD(params, 0.1), CPU, "fp32", accum)
    criterion = nn.CrossEntropyLoss()
    log = RecordingLog(history, 0, steps)
    engine_finetune.train_one_epoch(model, criterion, loader, updater, lambda *_: (0.1, 0.0), log, **kwargs)
    return history


@pytest.mark.parametrize("accum", [1, 2])
def test_average_follows_every_update(accum):
    model, weights = classifier(), []
    ema = ModelEmaV3(model, 0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    plain = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        weights.append({name: value.clone() for name, value in model.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        finetune(model, accum=accum, ema=ema)
    assert len(weights) == 4 // accum
    for state in weights:
        expected = {name: 0.9 * value + 0.1 * state[name] for name, value in expected.items()}
    for name, value in ema.module.state_dict().items():
        assert_close(value, expected[name], rtol=0, atol=1e-6, what=name)


def test_accuracy_is_logged_for_class_indices_only():
    args = main_finetune.get_args_parser().parse_args(["--mixup", "0.8", "--nb_classes", "3", "--batch_size", "4"])
    mixed = finetune(classifier(), mixup=main_finetune.build_mixup(args))
    plain = finetune(classifier())
    assert all(np.isnan(step["class_acc"]) for step in mixed)
    assert all(0 <= step["class_acc"] <= 1 for step in plain)


def test_draws_of_mixup_depend_on_seed_and_step_alone():
    args = main_finetune.get_args_parser().parse_args(["--mixup", "0.8", "--cutmix", "1", "--nb_classes", "3"])
    losses = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = classifier(drop_path_rate=0.5, drop_rate=0.1)
        np.random.seed(noise)  # noqa: NPY002
        losses.append([s["loss"] for s in finetune(model, mixup=main_finetune.build_mixup(args), seed=seed)])
    assert losses[0] == losses[1] != losses[2]


def test_evaluation_takes_the_callers_statistics():
    """The attentive probe's batch norm follows `is_train`, not the mode of the network."""
    model = classifier(lin_probe=True, linear_type="attentive", use_mean_pooling=False)
    norm: Any = model.fc_norm
    assert isinstance(norm, ProbeBatchNorm)
    model.query_token.data.normal_()
    loader = FixedLoader(torch.rand(2, 4, 3, 8, 8), torch.randint(3, (2, 4)))
    updater = distributed.Updater(torch.optim.SGD(model.parameters(), 0.1), CPU, "fp32")
    running = engine_finetune.evaluate(model, loader, updater, is_train=False)
    assert norm.num_batches_tracked == 0
    batch = engine_finetune.evaluate(model, loader, updater, is_train=True)
    assert norm.num_batches_tracked == 2, "as upstream, evaluations move the running statistics"
    assert batch["loss"] != running["loss"]
    expected = np.mean([nn.functional.cross_entropy(model(x), y).item() for x, y in loader.data])
    assert batch["loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_of_a_single_image_with_batch_statistics():
    """The last batch of a validation set may hold one image; batch statistics do not exist for it."""
    model = classifier(lin_probe=True, linear_type="attentive", use_mean_pooling=False, num_classes=10)
    updater = distributed.Updater(torch.optim.SGD(model.parameters(), 0.1), CPU, "fp32")
    loader = FixedLoader(
        [torch.rand(4, 3, 8, 8), torch.rand(1, 3, 8, 8)], [torch.zeros(4).long(), torch.zeros(1).long()]
    )
    assert np.isfinite(engine_finetune.evaluate(model, loader, updater, is_train=True)["loss"])


def test_top5_of_few_classes():
    model = classifier()
    loader = FixedLoader(torch.rand(2, 4, 3, 8, 8), torch.randint(3, (2, 4)))
    updater = distributed.Updater(torch.optim.SGD(model.parameters(), 0.1), CPU, "fp32")
    stats = engine_finetune.evaluate(model, loader, updater)
    assert list(stats) == ["loss", "acc1", "acc5"]
    assert stats["acc5"] == 100


def test_linear_evaluation_of_fine_tuning_trains_head_and_norm():
    model = classifier(init_values=0.1)
    main_finetune.freeze(model, "head", "fc_norm")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]


def test_linear_probe_trains_its_head_only():
    model = classifier(lin_probe=True, use_mean_pooling=False)
    head = main_linprobe.add_probe(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    norm: Any = head[0]
    assert (norm.eps, norm.momentum, norm.affine) == (1e-6, 0.1, False)
    optimizer = main_linprobe.build_optimizer(main_linprobe.get_args_parser().parse_args([]), head, 0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


# ---- transforms of the flags


def finetune_transforms(*flags: str, main: ModuleType = main_finetune) -> tuple[list, list]:
    train, val = main_finetune.build_transforms(main.get_args_parser().parse_args(flags))
    return train.transforms, val.transforms


def kinds(steps: list) -> list[type]:
    return [type(step) for step in steps]


def test_fine_tuning_augments_by_default():
    train, val = finetune_transforms()
    assert [k for k in kinds(train) if k in (RandAugment, RandomErasing)] == [RandAugment, RandomErasing]
    assert not [k for k in kinds(train) if k is transforms.ColorJitter]
    assert kinds(val)[:2] == [transforms.Resize, transforms.CenterCrop]
    assert (val[0].size, tuple(val[1].size)) == (256, (224, 224))
    normalize = next(step for step in train if isinstance(step, transforms.Normalize))
    assert [round(float(x), 3) for x in normalize.mean] == [0.5, 0.5, 0.5]
    imagenet = finetune_transforms("--imagenet_default_mean_and_std")
    for steps in imagenet:
        normalize = next(step for step in steps if isinstance(step, transforms.Normalize))
        assert [round(float(x), 3) for x in normalize.mean] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(("size", "flags", "resized"), [(384, [], 384), (48, [], 54), (64, ["--crop_pct", "0.5"], 128)])
def test_evaluation_crops_by_size(size, flags, resized):
    _, val = finetune_transforms("--input_size", str(size), *flags)
    assert (val[0].size, tuple(val[1].size)) == (resized, (size, size))


def test_small_images_are_padded_instead_of_cropped():
    train, _ = finetune_transforms("--input_size", "32")
    assert isinstance(train[0], transforms.RandomCrop)
    assert (train[0].padding, train[0].size) == (4, (32, 32))


def test_attentive_probing_crops_and_flips_only():
    """Its recipe's --color_jitter 0 leaves a jitter that does nothing but draw, as upstream."""
    train, _ = finetune_transforms("--reprob", "0", "--color_jitter", "0", main=main_attentive)
    image: Any = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    own = [step for step in train if not isinstance(step, transforms.ColorJitter)]
    jitters = [step for step in train if isinstance(step, transforms.ColorJitter)]
    assert len(own) == 4
    for jitter in jitters:
        assert np.array_equal(np.asarray(jitter(image)), np.asarray(image))
    assert main_attentive.get_args_parser().parse_args([]).aa == ""


def test_mixup():
    parser = main_finetune.get_args_parser()
    small = ["--nb_classes", "3", "--batch_size", "4"]
    assert main_finetune.build_mixup(parser.parse_args(small)) is None
    for flags in (["--mixup", "0.8"], ["--cutmix", "1"], ["--cutmix_minmax", "0.2", "0.8"]):
        mixup = main_finetune.build_mixup(parser.parse_args([*small, "--smoothing", "0.2", *flags]))
        assert mixup is not None
        _, targets = mixup(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
        assert targets.shape == (4, 3)
        assert_close(targets.sum(dim=1), torch.ones(4), rtol=1e-5, atol=0)
        assert targets.min() == pytest.approx(0.2 / 3)
    with pytest.raises(distributed.UserError, match="--batch_size 5: Mixup and CutMix need an even number"):
        main_finetune.build_mixup(parser.parse_args(["--batch_size", "5", "--mixup", "0.8"]))


# ---- files


def official(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int | str = 7) -> dict:
    """A checkpoint as upstream writes it."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for key in set(group) - {"lr", "betas", "eps", "weight_decay", "amsgrad", "params", "lr_scale"}:
            del group[key]
        group.setdefault("lr_scale", 1.0)
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    return {
        "model": model.state_dict(),
        "optimizer": state,
        "epoch": epoch,
        "scaler": {**scaler, "_growth_tracker": 3},
        "args": argparse.Namespace(lr=0.1, opt_betas=None, x=np.float64(2)),
    }


def take_step(model: ContextAutoencoderViT, optimizer: torch.optim.Optimizer) -> None:
    (batch, *_), _, (ids, *_) = batches()
    optimizer.zero_grad()
    engine_pretrain.batch_losses(model, (batch, torch.zeros(3)), Tokens([ids]), 2.0)["loss"].backward()  # type: ignore[arg-type]
    optimizer.step()


def revision_a(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of a whole network in the older revision, whose files lack the targets' encoder."""
    names = {"encoder_to_regresser": "encoder_to_decoder", "regresser.": "pretext_neck."}
    names |= {"decoder.decoder_blocks": "pretext_neck.decoder_blocks", "decoder.norm": "pretext_neck.norm2"}
    names |= {"decoder.head": "pretext_neck.head"}
    renamed = {}
    for key, value in state.items():
        new, old = next(((n, o) for n, o in names.items() if key.startswith(n)), ("", ""))
        renamed[old + key.removeprefix(new)] = value
    return {k: v for k, v in renamed.items() if not k.startswith("alignment_encoder.") and k != "rd_pos_embed"}


@pytest.mark.parametrize("layout", ["revision B", "without alignment_encoder", "DistributedDataParallel", "revision A"])
def test_official_checkpoint_resumes(tmp_path, layout):
    args = main_pretrain.get_args_parser().parse_args([])
    model = autoencoder(embed_dim=12)
    optimizer = main_pretrain.build_optimizer(args, model, 1e-2)
    take_step(model, optimizer)
    content = official(model, optimizer)
    if layout == "without alignment_encoder":
        content["model"] = {k: v for k, v in content["model"].items() if not k.startswith("alignment_encoder.")}
    elif layout == "DistributedDataParallel":
        content["model"] = {f"module.{k}": v for k, v in content["model"].items()}
    elif layout == "revision A":
        content["model"] = revision_a(content["model"])
    torch.save(content, tmp_path / "official.pth")
    fresh = autoencoder(embed_dim=12)
    resumed = main_pretrain.build_optimizer(args, fresh, 1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    files = run_files(args, args.save_ckpt_freq, "_")
    checkpoint = distributed.Checkpoint("", args, fresh, files, optimizer=resumed, scaler=scaler)
    assert checkpoint.resume(str(tmp_path / "official.pth")) == distributed.Position(8)
    for net, opt in ((model, optimizer), (fresh, resumed)):
        engine_pretrain.set_rates(opt.param_groups, 3e-2, 0.1)
        take_step(net, opt)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_best_official_checkpoint_gives_its_weights_only(tmp_path):
    """Upstream writes "best" for the epoch, and then cannot resume from it."""
    args = main_finetune.get_args_parser().parse_args([])
    model = classifier()
    optimizer = main_finetune.build_optimizer(args, model, 1e-2)
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    torch.save(official(model, optimizer, "best"), tmp_path / "checkpoint-best.pth")
    fresh = classifier()
    checkpoint = distributed.Checkpoint(
        "", args, fresh, run_files(args, 5), optimizer=main_finetune.build_optimizer(args, fresh, 1e-2)
    )
    path = str(tmp_path / "checkpoint-best.pth")
    assert checkpoint.resume(path, 3) == distributed.Position(3)
    updater = distributed.Updater(torch.optim.SGD(fresh.parameters(), 0.1), CPU, "fp32")
    loader = FixedLoader(torch.rand(1, 4, 3, 8, 8), torch.randint(3, (1, 4)))
    other = classifier()
    other.head.weight.data.zero_()  # type: ignore[union-attr]
    engine_finetune.evaluate_checkpoint(path, other, loader, updater)
    for name, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
        assert torch.equal(other.state_dict()[name], value), name


def test_checkpoints_load_without_executing_anything(tmp_path):
    """Ours: tensors and plain values; the aliases of the targets' encoder are written and take no space."""
    args = main_pretrain.get_args_parser().parse_args(["--save_ckpt_freq", "1", "--epochs", "4"])
    model = autoencoder()
    optimizer = main_pretrain.build_optimizer(args, model, 1e-2)
    files = run_files(args, 1, "my name_")
    distributed.Checkpoint(str(tmp_path), args, model, files, optimizer=optimizer).save(distributed.Position(1))
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["checkpoint.pth", "my name_checkpoint-0.pth"]
    state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert list(state["model"]) == list(model.state_dict())
    assert isinstance(state["args"], dict)
    assert state["epoch"] == 0
    own = state["model"]
    assert own["encoder.cls_token"].data_ptr() == own["alignment_encoder.cls_token"].data_ptr()


def test_numbered_checkpoints_fall_due_as_upstreams(tmp_path):
    """After every so many epochs, and after the last one."""
    for every, epochs, prefix, expected in ((2, 5, "a_", ["1", "3", "4"]), (50, 2, "_", ["1"])):
        args = main_pretrain.get_args_parser().parse_args(["--epochs", str(epochs)])
        folder = tmp_path / prefix
        checkpoint = distributed.Checkpoint(str(folder), args, nn.Linear(1, 1), run_files(args, every, prefix))
        for epoch in range(epochs):
            checkpoint.save(distributed.Position(epoch + 1))
        assert sorted(p.name for p in folder.glob("*-[0-9]*.pth")) == [f"{prefix}checkpoint-{e}.pth" for e in expected]


def test_resume_path(tmp_path):
    """The explicit one; the latest file; else the highest number, whatever the prefix; never best or previous."""

    def found(*flags: str) -> str:
        return resume_path(main_pretrain.get_args_parser().parse_args(["--output_dir", str(tmp_path), *flags]))

    assert found() == ""
    for name in (
        "checkpoint-best",
        "checkpoint-previous",
        "my_checkpoint-x",
        "mycheckpoint-99",
        "checkpoint-nonfinite",
    ):
        (tmp_path / f"{name}.pth").touch()
    assert found() == ""
    for name in ("my_name_checkpoint-9", "my_name_checkpoint-10", "_checkpoint-2", "checkpoint-3"):
        (tmp_path / f"{name}.pth").touch()
    assert found() == str(tmp_path / "my_name_checkpoint-10.pth")
    (tmp_path / "checkpoint.pth").touch()
    assert found() == str(tmp_path / "checkpoint.pth")
    assert found("--no_auto_resume") == ""
    assert found("--resume", "other.pth") == found("--no_auto_resume", "--resume", "other.pth") == "other.pth"
    assert found("--output_dir", "") == ""


def test_rates_of_flags():
    args = main_pretrain.get_args_parser().parse_args(["--epochs", "4", "--warmup_epochs", "1", "--lr", "0.1"])
    rates = optim.build_rates(args, 3)
    assert rates(0) == (0.0, 0.05)
    assert rates(2)[0] == rates(3)[0] == 0.1
    args.warmup_steps, args.weight_decay_end = 2, 0.2
    rates = optim.build_rates(args, 3)
    assert [rates(i)[0] for i in (0, 1, 2)] == [0.0, 0.1, 0.1]
    assert rates(0)[1] == pytest.approx(0.05)
    assert rates(11)[1] > 0.19
    args.warmup_steps, args.warmup_epochs = -1, 5
    with pytest.raises(distributed.UserError, match="--epochs, --warmup_epochs and --warmup_steps: "):
        optim.build_rates(args, 3)


def test_masks_of_flags():
    parser = main_pretrain.get_args_parser()
    random.seed(0)
    masking = main_pretrain.build_masking(parser.parse_args([]))
    assert (masking.num_masked, masking().shape) == (98, (14, 14))
    flags = ["--input_size", "32", "--patch_size", "4", "--num_mask_patches", "30", "--min_mask_patches_per_block", "2"]
    masking = main_pretrain.build_masking(parser.parse_args([*flags, "--max_mask_patches_per_block", "5"]))
    assert (masking.min_num_patches, masking.max_num_patches) == (2, 5)  # type: ignore[union-attr]
    assert masking().sum() == 30
    flags = ["--mask_generator", "random", "--ratio_mask_patches", "0.4", "--input_size", "32"]
    masking = main_pretrain.build_masking(parser.parse_args(flags))
    assert (masking.num_masked, masking().shape) == (1, (4,))
