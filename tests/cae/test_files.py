"""Checkpoints: the authors' files, names, which one a run continues; rates and masks of the flags."""

import argparse
import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cae import engine_finetune, engine_pretrain, main_attentive, main_finetune, main_pretrain, main_visualize, optim
from cae.files import resume_path, run_files
from cae.models_cae import ContextAutoencoderViT
from cae.models_vit import VisionTransformer
from common import distributed
from common.distributed import UserError
from tests.support.cae import Tokens, autoencoder, batches, classifier
from tests.support.runs import CPU, FixedLoader


def official(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int | str = 7) -> dict:
    """A checkpoint as upstream writes it."""
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        adam, sgd = {"betas", "eps", "amsgrad"}, {"momentum", "dampening", "nesterov"}
        for key in set(group) - {"lr", "weight_decay", "params", "lr_scale", *adam, *sgd}:
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


def in_order(content: dict, model: nn.Module, optimizer: torch.optim.Optimizer, order: list[str]) -> None:
    """Give a checkpoint's weights and the parameters of its groups the order of these names, in place."""
    names = {id(p): name for name, p in model.named_parameters()}
    content["model"] = {name: content["model"][name] for name in order if name in content["model"]}
    for group, own in zip(content["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
        places = {names[id(p)]: place for place, p in zip(group["params"], own["params"], strict=True)}
        group["params"] = [places[name] for name in order if name in places]


@pytest.mark.parametrize("width", [8, 12], ids=["D = C", "D != C"])
def test_revision_a_resumes_by_name(tmp_path, width):
    """Its modules stand in another order: the mask token last, the stacks before their norms."""
    args = main_pretrain.get_args_parser().parse_args([])
    model = autoencoder(embed_dim=width)
    optimizer = main_pretrain.build_optimizer(args, model, 1e-2)
    take_step(model, optimizer)
    content = official(model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    ranks = [
        "encoder.",
        "encoder_to",
        "regresser.regressor_blocks",
        "decoder.decoder_blocks",
        "regresser.norm",
        "decoder",
    ]
    order = [n for start in [*ranks, "mask_token"] for n in names if n.startswith(start)]
    in_order(content, model, optimizer, list(dict.fromkeys(order)))
    content["model"] = revision_a(content["model"])
    torch.save(content, tmp_path / "official.pth")
    fresh = autoencoder(embed_dim=width)
    resumed = main_pretrain.build_optimizer(args, fresh, 1e-2)
    checkpoint = distributed.Checkpoint("", args, fresh, run_files(args, 5), optimizer=resumed)
    assert checkpoint.resume(str(tmp_path / "official.pth")) == distributed.Position(8)
    for net, opt in ((model, optimizer), (fresh, resumed)):
        engine_pretrain.set_rates(opt.param_groups, 3e-2, 0.1)
        take_step(net, opt)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def attentive() -> tuple[argparse.Namespace, VisionTransformer, torch.optim.Optimizer]:
    args = main_attentive.get_args_parser().parse_args(["--opt", "sgd", "--weight_decay", "0"])
    model = classifier(lin_probe=True, linear_type="attentive", use_mean_pooling=False)
    main_finetune.freeze(model, "query_token", "attentive_blocks", "head")
    return args, model, main_finetune.build_optimizer(args, model, 0.1)


@pytest.mark.parametrize("complete", [True, False])
def test_attentive_probe_of_revision_a_resumes_without_its_further_norm(tmp_path, complete):
    args, model, optimizer = attentive()
    imgs = torch.rand(4, 3, 8, 8)
    model(imgs).square().sum().backward()
    optimizer.step()
    content = official(model, optimizer)
    (group,) = content["optimizer"]["param_groups"]
    weights, block = {}, "attentive_blocks.0."
    for name, value in content["model"].items():
        weights[name.replace(f"{block}norm_", f"{block}norm1_")] = value
        if name == f"{block}norm_v.bias":
            weights |= {f"{block}norm2_cross.{part}": torch.zeros(8) for part in ("weight", "bias")}
    content["model"] = weights
    after = [name for name, _ in model.named_parameters()].index(f"{block}norm_v.bias") + 1
    group["params"] = [*range(after), *([900, 901] if complete else [900]), *range(after, len(group["params"]))]
    content["optimizer"]["state"][900] = {"momentum_buffer": torch.ones(8)}
    torch.save(content, tmp_path / "official.pth")
    _, fresh, resumed = attentive()
    checkpoint = distributed.Checkpoint("", args, fresh, run_files(args, 5), optimizer=resumed)
    if not complete:
        with pytest.raises(UserError, match="a group of the earlier revision has .* parameters, not "):
            checkpoint.resume(str(tmp_path / "official.pth"))
        return
    checkpoint.resume(str(tmp_path / "official.pth"))
    for net, opt in ((model, optimizer), (fresh, resumed)):
        net.zero_grad()
        net(imgs).square().sum().backward()
        opt.step()
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_states_of_other_parameters_are_refused(tmp_path):
    """The same numbers of parameters, in another order: a fused kernel would write beyond the smaller ones."""
    args = main_pretrain.get_args_parser().parse_args([])
    model = autoencoder()
    optimizer = main_pretrain.build_optimizer(args, model, 1e-2)
    take_step(model, optimizer)
    content = official(model, optimizer)
    content["optimizer"]["param_groups"][0]["params"].reverse()
    torch.save(content, tmp_path / "official.pth")
    fresh = autoencoder()
    resumed = main_pretrain.build_optimizer(args, fresh, 1e-2)
    checkpoint = distributed.Checkpoint("", args, fresh, run_files(args, 5), optimizer=resumed)
    with pytest.raises(
        UserError, match=r"'optimizer' does not fit this run: exp_avg of mask_token is \(5, 8\), expected"
    ):
        checkpoint.resume(str(tmp_path / "official.pth"))


@pytest.mark.parametrize("name", ["adafactor", "novograd", "adahessian", "lookahead_adamw"])
def test_states_of_other_forms_resume(tmp_path, name):
    """Sums over rows and columns, single numbers, slow weights."""
    args = main_finetune.get_args_parser().parse_args(["--opt", name])
    model = classifier()
    optimizer = main_finetune.build_optimizer(args, model, 1e-2)
    updater = distributed.Updater(optimizer, CPU, "fp32")
    with updater.forward(model, 0):
        loss = model(torch.rand(2, 3, 8, 8)).square().sum()
    updater.backward(loss, 0)
    checkpoint = distributed.Checkpoint(str(tmp_path), args, model, run_files(args, 5), optimizer=optimizer)
    checkpoint.save(distributed.Position(1))
    fresh = classifier()
    resumed = main_finetune.build_optimizer(args, fresh, 1e-2)
    checkpoint = distributed.Checkpoint(str(tmp_path), args, fresh, run_files(args, 5), optimizer=resumed)
    assert checkpoint.resume(str(tmp_path / "checkpoint.pth")) == distributed.Position(1)


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


def test_pictures_of_an_official_file(tmp_path):
    """Its flags are a Namespace whose patch size is a pair."""
    sizes = {"model": "cae_nano", "input_size": 32, "decoder_embed_dim": 96, "decoder_num_heads": 3}
    stored = argparse.Namespace(**sizes, patch_size=(8, 8), decoder_num_classes=5, regressor_depth=1, decoder_depth=1)
    given = main_visualize.get_args_parser().parse_args(["--checkpoint", str(tmp_path / "official.pth")])
    model = main_pretrain.build_model(main_visualize.pretrain_flags({"args": stored}, given))
    torch.save({"model": model.state_dict(), "args": stored}, tmp_path / "official.pth")
    loaded, flags = main_visualize.load_model(str(tmp_path / "official.pth"), given)
    assert (flags.patch_size, loaded.encoder.patch_embed.grid_size) == (8, 4)


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
    rates = optim.build_rates(args, 3)
    assert [rates(i)[0] for i in range(12)] == pytest.approx([0.1 * i / 14 for i in range(12)])


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


@pytest.mark.parametrize("stage", ["linear", "attentive"])
def test_an_unreadable_checkpoint_of_another_stage_is_named(stage, tmp_path, capsys):
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    args = argparse.Namespace(resume="", auto_resume=True, output_dir=str(tmp_path), finetune="", epochs=1)
    assert resume_path(args, stage) == ""
    warning = f"WARNING: {tmp_path}/checkpoint.pth: cannot be read; the {stage} probe does not continue it"
    assert warning in capsys.readouterr().out
