"""One epoch of pre-training: losses, statistics, draws, the average that makes targets, what the flags give it."""

import pytest
import torch
from torch import Tensor, nn

from cae import engine_pretrain, main_pretrain
from cae.augmentation import HALF
from cae.models_cae import ContextAutoencoderViT
from cae.models_dalle import DalleTokenizer
from cae.models_dvae import DiscreteVAE
from common import datasets, distributed
from tests.support.cae import Tokens, autoencoder, batches
from tests.support.helpers import assert_close
from tests.support.runs import CPU, FixedLoader, RecordingLog


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
