"""One epoch of fine-tuning and probing, evaluations, and which parameters train."""

from typing import Any

import numpy as np
import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from cae import engine_finetune, main_finetune, main_linprobe
from cae.models_vit import ProbeBatchNorm, VisionTransformer
from common import distributed
from tests.support.cae import classifier
from tests.support.helpers import assert_close
from tests.support.runs import CPU, FixedLoader, RecordingLog


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


def test_linear_evaluation_of_fine_tuning_trains_a_head_on_the_class_token(monkeypatch):
    seen: list[VisionTransformer] = []
    monkeypatch.setattr(main_finetune, "run", lambda _args, model, *_, **__: seen.append(model))
    monkeypatch.setattr(main_finetune, "build_loaders", lambda *_: (None, None))
    toy = ["--model", "cae_nano", "--input_size", "16", "--patch_size", "8", "--nb_classes", "5", "--device", "cpu"]
    main_finetune.main(main_finetune.get_args_parser().parse_args([*toy, "--enable_linear_eval"]))
    (model,) = seen
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert not [name for name in model.state_dict() if "norm." in name and not name.startswith("blocks.")]
    imgs = torch.rand(2, 3, 16, 16)
    assert_close(model.eval().forward_features(imgs), model.tokens(imgs)[:, 0], rtol=1e-5, atol=1e-6)


def test_linear_probe_trains_its_head_only():
    model = classifier(lin_probe=True, use_mean_pooling=False)
    head = main_linprobe.add_probe(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.1.weight", "head.1.bias"]
    norm: Any = head[0]
    assert (norm.eps, norm.momentum, norm.affine) == (1e-6, 0.1, False)
    optimizer = main_linprobe.build_optimizer(main_linprobe.get_args_parser().parse_args([]), head, 0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
