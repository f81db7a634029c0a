"""Pre-training and fine-tuning that are stopped, resumed and replayed; and users' mistakes with all scripts."""

import json
import re
import shutil
import signal
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from cae import main_attentive, main_finetune, main_linprobe, main_pretrain
from cae.files import resume_path
from cae.models_cae import ContextAutoencoderViT
from cae.models_vit import VisionTransformer
from common import distributed
from tests.support.cae import CODES, tokenizer_file
from tests.support.runs import FAULTS, assert_same, command, finish, mistake, run_main, spoil, start

SMALL = ["--model", "cae_nano", "--input_size", "16", "--patch_size", "4", "--num_workers", "0", "--batch_size", "8"]
SMALL += ["--epochs", "3", "--warmup_epochs", "1"]
PRETRAIN = [*SMALL, "--second_input_size", "16", "--discrete_vae_type", "customized", "--lr", "1e-2"]
PRETRAIN += ["--decoder_num_classes", str(CODES), "--decoder_embed_dim", "96", "--decoder_num_heads", "3"]
PRETRAIN += ["--num_mask_patches", "8", "--min_mask_patches_per_block", "1", "--drop_path", "0.2"]
PRETRAIN += ["--regressor_depth", "1", "--decoder_depth", "1", "--clip_grad", "3"]
FINETUNE = [*SMALL, "--nb_classes", "10", "--lr", "1e-2", "--update_freq", "2", "--drop_path", "0.2"]
FINETUNE += ["--mixup", "0.8", "--cutmix", "1", "--model_ema", "--model_ema_decay", "0.9"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    return tokenizer_file(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pretrained(digits, tokenizer, tmp_path_factory) -> Path:
    """The folder of a whole pre-training run, not to be changed."""
    folder = tmp_path_factory.mktemp("pretrained")
    run_main(main_pretrain, *pretrain_flags(digits, tokenizer, folder))
    return folder


@pytest.fixture(scope="module")
def finetuned(digits, tmp_path_factory) -> Path:
    """The folder of a whole fine-tuning run, not to be changed."""
    folder = tmp_path_factory.mktemp("finetuned")
    run_main(main_finetune, *finetune_flags(digits, folder))
    return folder


def pretrain_flags(digits: str, tokenizer: str, folder: Path, *further: str) -> list[str]:
    own = ["--data_path", digits, "--discrete_vae_weight_path", tokenizer, "--output_dir", str(folder)]
    return [*PRETRAIN, *own, *further]


def finetune_flags(digits: str, folder: Path, *further: str) -> list[str]:
    return [*FINETUNE, "--data_path", digits, "--output_dir", str(folder), *further]


def state_of(folder: Path, name: str = "checkpoint.pth") -> dict:
    return distributed.load(str(folder / name))


# ---- in this process: 6 steps of 8 images per epoch


def stopped_and_resumed(
    main: ModuleType, network: type, flags: list[str], folder: Path, when: int, stop: bool, monkeypatch
) -> Path:
    """A run that a signal, or a NaN, ends before its training step `when`, and that goes on from there."""
    argv = [*flags, "--output_dir", str(folder), "--device", "cpu"]
    with monkeypatch.context() as patch:
        spoil(patch, network, when, stop)
        with pytest.raises(SystemExit) as end:
            run_main(main, *argv)
    assert end.value.code == (128 + signal.SIGTERM if stop else 1)
    name = "checkpoint.pth" if stop else "checkpoint-nonfinite.pth"
    state = state_of(folder, name)
    assert (state["epoch"], state["images"] > 0) == (0, True)
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())
    # A stopped run is found by itself.
    run_main(main, *argv, *([] if stop else ["--resume", str(folder / name)]))
    return folder


@pytest.mark.parametrize(
    "stop",
    # A signal is met in the next test, too, by a network with further weights.
    [pytest.param(True, marks=pytest.mark.slow, id="signal"), pytest.param(False, id="nan")],
)
def test_pretraining__stop_inside_an_epoch_loses_nothing(
    digits, tokenizer, pretrained, tmp_path, monkeypatch, stop, capsys
):
    flags = pretrain_flags(digits, tokenizer, tmp_path)
    broken = stopped_and_resumed(main_pretrain, ContextAutoencoderViT, flags, tmp_path, 9, stop, monkeypatch)
    assert "resumed" in capsys.readouterr().out
    assert_same(pretrained, broken)
    state = state_of(broken)["model"]
    assert all(torch.equal(state[f"alignment_{k}"], v) for k, v in state.items() if k.startswith("encoder.blocks."))


def test_pretraining__stop_inside_an_epoch_keeps_the_average(digits, tokenizer, tmp_path, monkeypatch, capsys):
    flags = pretrain_flags(digits, tokenizer, tmp_path, "--base_momentum", "0.9")
    run_main(main_pretrain, *flags, "--output_dir", str(tmp_path / "whole"))
    capsys.readouterr()
    broken = stopped_and_resumed(main_pretrain, ContextAutoencoderViT, flags, tmp_path / "broken", 9, True, monkeypatch)
    assert "resumed" in capsys.readouterr().out
    assert_same(tmp_path / "whole", broken)
    state = state_of(broken)["model"]
    assert not all(torch.equal(state[f"alignment_{k}"], v) for k, v in state.items() if k.startswith("encoder.blocks."))


@pytest.mark.parametrize(
    "stop",
    # What a NaN leaves behind is common's, met in pre-training, too.
    [pytest.param(True, id="signal"), pytest.param(False, marks=pytest.mark.slow, id="nan")],
)
def test_fine_tuning__stop_inside_an_epoch_loses_nothing(digits, finetuned, tmp_path, monkeypatch, stop, capsys):
    flags = finetune_flags(digits, tmp_path)
    broken = stopped_and_resumed(main_finetune, VisionTransformer, flags, tmp_path, 9, stop, monkeypatch)
    assert "resumed" in capsys.readouterr().out
    assert_same(finetuned, broken)
    state = state_of(broken)
    assert set(state["model_ema"]) == set(state["model"])
    assert any(not torch.equal(state["model_ema"][k], v) for k, v in state["model"].items())


@pytest.mark.parametrize("main", [main_attentive, pytest.param(main_linprobe, marks=pytest.mark.slow)])
def test_probes__go_on_from_an_epoch(digits, tmp_path, main):
    own = [*SMALL, "--nb_classes", "10", "--data_path", digits, "--enable_linear_eval", "--use_cls"]
    own += ["--opt", "sgd", "--linear_type", "attentive"] if main is main_attentive else ["--log_dir", str(tmp_path)]
    run_main(main, *own, "--output_dir", str(tmp_path / "whole"))
    part = tmp_path / "part"
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, VisionTransformer, 7, stop=True)
        with pytest.raises(SystemExit):
            run_main(main, *own, "--output_dir", str(part))
    run_main(main, *own, "--output_dir", str(part))
    stage = "attentive" if main is main_attentive else "linear"
    assert_same(tmp_path / "whole", part, f"checkpoint_{stage}.pth", f"{stage}.log.txt")


def probe_flags(digits: str, folder: Path, encoder: str, kind: str) -> list[str]:
    own = [*PROBE, "--data_path", digits, "--output_dir", str(folder), "--finetune", encoder, "--epochs", "2"]
    return own + (["--log_dir", str(folder)] if kind == "linear" else ["--linear_type", kind, "--lr", "0.1"])


def test_stages_share_a_folder_as_in_the_authors_scripts(digits, tokenizer, pretrained, tmp_path, capsys):
    """Pre-training and both probes; each continues its own files only, and a finished probe is of one encoder."""
    shutil.copytree(pretrained, tmp_path, dirs_exist_ok=True)
    encoder, other = str(tmp_path / "checkpoint.pth"), str(pretrained / "checkpoint.pth")
    before = Path(encoder).read_bytes()
    for main, kind in ((main_linprobe, "linear"), (main_attentive, "attentive")):
        own = probe_flags(digits, tmp_path, encoder, kind)
        run_main(main, *own)
        state = state_of(tmp_path, f"checkpoint_{kind}.pth")
        assert (state["epoch"], len((tmp_path / f"{kind}.log.txt").read_text().splitlines())) == (1, 2)
        assert resume_path(main.get_args_parser().parse_args(own), kind) == str(tmp_path / f"checkpoint_{kind}.pth")
        capsys.readouterr()
        run_main(main, *own)  # it is done
        assert "epochs done" in capsys.readouterr().out
        error = mistake(main, *own, "--finetune", other, capsys=capsys)
        assert f"--finetune {other}: {tmp_path / f'checkpoint_{kind}.pth'} holds a finished probe of {encoder}" in error
        (tmp_path / f"checkpoint_{kind}.pth").rename(tmp_path / f"{kind}_checkpoint-7.pth")
    assert Path(encoder).read_bytes() == before
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3
    # Numbered files: the stage's own, whatever the numbers of the others.
    Path(encoder).rename(tmp_path / "toy_checkpoint-2.pth")
    found = {
        "linear": "linear_checkpoint-7.pth",
        "attentive": "attentive_checkpoint-7.pth",
        "pretrain": "toy_checkpoint-2.pth",
    }
    for kind, name in found.items():
        args = MAINS[kind].get_args_parser().parse_args(["--output_dir", str(tmp_path)])
        assert resume_path(args, kind) == str(tmp_path / name)


def test_probes_of_earlier_versions_resume(digits, pretrained, tmp_path, capsys):
    """They were written as checkpoint.pth; a file that cannot be read is none of theirs."""
    own = probe_flags(digits, tmp_path, str(pretrained / "checkpoint.pth"), "linear")
    run_main(main_linprobe, *own)
    (tmp_path / "checkpoint_linear.pth").rename(tmp_path / "checkpoint.pth")
    capsys.readouterr()
    run_main(main_linprobe, *own, "--epochs", "3")
    assert f"resumed {tmp_path / 'checkpoint.pth'}: epoch 2" in capsys.readouterr().out
    (tmp_path / "checkpoint_linear.pth").unlink()
    (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
    args = main_linprobe.get_args_parser().parse_args(["--output_dir", str(tmp_path)])
    assert "checkpoint.pth" not in resume_path(args, "linear")


def test_run_without_the_average_goes_on_from_one_with_it_and_back(digits, finetuned, tmp_path, capsys):
    shutil.copytree(finetuned, tmp_path, dirs_exist_ok=True)
    assert "model_ema" in state_of(tmp_path)
    flags = [flag for flag in finetune_flags(digits, tmp_path, "--epochs", "4") if flag != "--model_ema"]
    run_main(main_finetune, *flags)
    state = state_of(tmp_path)
    assert (state["epoch"], "model_ema" in state) == (3, False)
    run_main(main_finetune, *finetune_flags(digits, tmp_path, "--epochs", "5", "--lr", "0", "--min_lr", "0"))
    state = state_of(tmp_path)
    assert state["epoch"] == 4
    for name, value in state["model"].items():
        assert torch.allclose(state["model_ema"][name].double(), value.double(), rtol=1e-5, atol=1e-7), name
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_a_run_that_is_not_to_resume_starts_anew(digits, tokenizer, pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path, dirs_exist_ok=True)
    first = (tmp_path / "log.txt").read_text()
    run_main(main_pretrain, *pretrain_flags(digits, tokenizer, tmp_path, "--no_auto_resume"))
    assert (tmp_path / "log.txt").read_text().endswith(first)


def test_fine_tuning_without_checkpoints_or_evaluations(digits, tmp_path):
    flags = finetune_flags(digits, tmp_path, "--no_save_ckpt", "--disable_eval_during_finetuning", "--epochs", "2")
    run_main(main_finetune, *flags)
    assert not list(tmp_path.glob("*.pth"))
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert len(lines) == 2
    assert not [name for name in lines[0] if name.startswith("test_")]


def test_fine_tuning_skips_what_fills_no_update(digits, tmp_path, monkeypatch):
    """48 images, 5 per batch, 4 batches per update: 2 updates of an epoch; the ninth batch is not computed."""
    seen, plain = [], VisionTransformer.forward

    def counted(self, *args, **kwargs):
        seen.append(self.training)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(VisionTransformer, "forward", counted)
    flags = finetune_flags(digits, tmp_path, "--batch_size", "5", "--update_freq", "4", "--mixup", "0", "--cutmix", "0")
    run_main(main_finetune, *flags)
    assert sum(seen) == 3 * 8
    assert state_of(tmp_path)["optimizer"]["state"][0]["step"] == 3 * 2


def test_eval_takes_the_file_of_finetune_where_the_folder_has_none(digits, finetuned, tmp_path, capsys):
    own = ["--eval", "--finetune", str(finetuned / "checkpoint.pth")]
    run_main(main_finetune, *finetune_flags(digits, tmp_path, *own))
    found = capsys.readouterr().out
    run_main(main_finetune, *finetune_flags(digits, finetuned, "--eval"))
    expected = re.findall(r"\* Acc@1.*", capsys.readouterr().out)
    assert re.findall(r"\* Acc@1.*", found) == expected
    assert len(expected) == 1
    assert not list(tmp_path.glob("*.pth"))


def test_training_without_evaluations_needs_no_validation_images(digits, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(Path(digits) / "train", data / "train")
    flags = finetune_flags(str(data), tmp_path / "out", "--epochs", "2")
    run_main(main_finetune, *flags, "--disable_eval_during_finetuning")
    assert state_of(tmp_path / "out")["epoch"] == 1
    assert "has no folder val/" in mistake(main_finetune, *flags, "--output_dir", str(tmp_path / "b"), capsys=capsys)


def test_no_output_folder_writes_nothing(digits, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_main(main_pretrain, *pretrain_flags(digits, tokenizer, tmp_path), "--output_dir", "", "--epochs", "2")
    assert not list(tmp_path.iterdir())


def test_linear_evaluation_of_fine_tuning_leaves_the_encoder_alone(digits, pretrained, tmp_path):
    """And draws the head anew where it starts from a checkpoint."""
    encoder = str(pretrained / "checkpoint.pth")
    flags = [*SMALL, "--nb_classes", "10", "--data_path", digits, "--finetune", encoder, "--enable_linear_eval"]
    run_main(main_finetune, *flags, "--output_dir", str(tmp_path / "tuned"))
    before, after = state_of(pretrained)["model"], state_of(tmp_path / "tuned")["model"]
    for name, value in after.items():
        if name.startswith(("blocks.", "patch_embed.", "cls_token")) and "relative" not in name:
            assert torch.equal(value, before[f"encoder.{name}"]), name
    assert "fc_norm.weight" not in after


def test_damaged_checkpoint_names_the_one_before(digits, tokenizer, pretrained, tmp_path, capsys):
    flags = pretrain_flags(digits, tokenizer, tmp_path)
    shutil.copytree(pretrained, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:1000])
    error = mistake(main_pretrain, *flags, capsys=capsys)
    assert f"{path}: truncated or not a checkpoint; the newest other checkpoint is " in error
    run_main(main_pretrain, *flags, "--epochs", "4", "--resume", error.strip().rsplit(" ", 1)[1])
    assert state_of(tmp_path)["epoch"] == 3


# ---- in processes of their own


@pytest.mark.slow
@pytest.mark.parametrize("script", ["main_pretrain.py", "main_finetune.py"])
@pytest.mark.parametrize("processes", [1, 2])
def test_stop_inside_an_epoch_loses_nothing(digits, tokenizer, tmp_path, script, processes):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    argv = {}
    for folder in (whole, stopped):
        folder.mkdir()
        flags = finetune_flags(digits, folder)
        if script == "main_pretrain.py":
            flags = pretrain_flags(digits, tokenizer, folder, "--accum_iter", "2", "--base_momentum", "0.9")
        argv[folder] = [*flags, "--batch_size", str(8 // processes), "--num_workers", "1"]
    finish(command(processes, f"cae/{script}", *argv[whole]), whole / "out")
    run = start(command(processes, str(FAULTS), f"cae/{script}", *argv[stopped]), stopped / "out", FAULT="signal_at:8")
    status = run.wait(timeout=240)
    text = (stopped / "out").read_text()
    assert status == 128 + signal.SIGTERM if processes == 1 else status != 0, text
    assert "saved epoch 1, step" in text
    finish(command(processes, f"cae/{script}", *argv[stopped]), stopped / "out")
    assert "resumed" in (stopped / "out").read_text()
    assert_same(whole, stopped)


# ---- users' mistakes on the command line: one line, exit status 2, nothing written

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "attentive": main_attentive, "linear": main_linprobe}


@pytest.mark.parametrize("flag", ["--warmup_epochs 4", "--warmup_steps 100"])
def test_a_warmup_longer_than_the_run_trains(flag, digits, tokenizer, tmp_path, capsys):
    run_main(main_pretrain, *pretrain_flags(digits, tokenizer, tmp_path), "--epochs", "1", *flag.split())
    assert f"WARNING: {flag} of --epochs 1: the learning rate only rises" in capsys.readouterr().out


PROBE = [*SMALL, "--nb_classes", "10", "--enable_linear_eval", "--use_cls"]
BASES = {
    "pretrain": PRETRAIN,
    "finetune": FINETUNE,
    "attentive": [*PROBE, "--linear_type", "attentive"],
    "linear": PROBE,
}
BAD = [
    ("pretrain", ["--data_path", "/nowhere"], "--data_path /nowhere: no such folder"),
    ("pretrain", ["--model", "deit_base_patch16_224"], "--model deit_base_patch16_224: expected one of cae_tiny_"),
    ("pretrain", ["--model_type", "caev2"], "CAE v2 is not supported"),
    ("pretrain", ["--input_size", "18"], "image size 18 is not a multiple of the patch size 4"),
    ("pretrain", ["--decoder_depth", "0"], "decoder_depth 0: expected at least 1"),
    ("pretrain", ["--regressor_depth", "0"], "regressor_depth 0 and decoder_depth 1: expected at least 1"),
    ("pretrain", ["--decoder_embed_dim", "18"], "width 18 is not a multiple of 4"),
    ("pretrain", ["--decoder_num_heads", "0"], "--model cae_nano: "),
    ("pretrain", ["--decoder_num_heads", "97"], "--model cae_nano: "),
    ("pretrain", ["--base_momentum", "2"], "base_momentum is 2.0, expected 0 to 1"),
    ("pretrain", ["--drop_path", "2"], "--drop_path 2.0: expected 0 to 1"),
    ("pretrain", ["--mask_generator", "random"], "--mask_generator random: needs --ratio_mask_patches, such as 0.5"),
    (
        "pretrain",
        ["--mask_generator", "random", "--ratio_mask_patches", "0.01"],
        "--ratio_mask_patches 0.01: mask ratio 0.01 masks 0 of 16 patches",
    ),
    ("pretrain", ["--mask_generator", "stripes"], "--mask_generator stripes: expected block or random"),
    ("pretrain", ["--num_mask_patches", "16"], "16 masked patches, expected 1 to 15 of 4 x 4"),
    ("pretrain", ["--min_mask_patches_per_block", "1000000000"], "no blocks of 1000000000 to 8 patches mask exactly 8"),
    ("pretrain", ["--max_mask_patches_per_block", "0"], "no blocks of 1 to 0 patches mask exactly 8 of 4 x 4"),
    (
        "pretrain",
        ["--second_input_size", "32"],
        "gives 8 x 8 of 12 tokens, the model predicts 4 x 4 of 12; --second_input_size 16 --decoder_num_classes 12",
    ),
    ("pretrain", ["--decoder_num_classes", "13"], "gives 4 x 4 of 12 tokens, the model predicts 4 x 4 of 13; --sec"),
    ("pretrain", ["--second_input_size", "15"], "image size 15 is not a multiple of 2^2 pixels"),
    ("pretrain", ["--discrete_vae_type", "clip"], "--discrete_vae_type clip: is CAE v2"),
    ("pretrain", ["--discrete_vae_type", "vqgan"], "--discrete_vae_type vqgan: is unknown; expected dall-e or custom"),
    ("pretrain", ["--discrete_vae_weight_path", ""], "customized: name a checkpoint of main_tokenizer.py with --discr"),
    (
        "pretrain",
        ["--discrete_vae_type", "dall-e", "--discrete_vae_weight_path", ""],
        "dall-e: name the folder with https://cdn.openai.com/dall-e/encoder.pkl",
    ),
    (
        "pretrain",
        ["--discrete_vae_weight_path", "no.pth"],
        "--discrete_vae_weight_path no.pth: no such checkpoint file",
    ),
    ("pretrain", ["--discrete_vae_weight_path", "/etc/hostname"], "/etc/hostname: not a checkpoint"),
    (
        "pretrain",
        ["--discrete_vae_type", "dall-e", "--discrete_vae_weight_path", "/nowhere"],
        "--discrete_vae_weight_path /nowhere",
    ),
    ("pretrain", ["--train_interpolation", "cubic"], "interpolation cubic: expected one of bicubic, lanczos, "),
    ("pretrain", ["--second_interpolation", "area"], "interpolation area: expected one of bicubic, lanczos, "),
    ("pretrain", ["--crop_min_size", "-1"], "--crop_min_size"),
    ("pretrain", ["--opt", "lion9"], "--opt lion9: expected one of sgd, nesterov, "),
    ("pretrain", ["--opt_betas", "0.9", "2"], "--opt adamw and its flags: "),
    ("pretrain", ["--opt_betas", "0.9"], "--opt adamw and its flags: "),
    ("pretrain", ["--device", "cuda"], "--device cuda: no CUDA device"),
    ("pretrain", ["--amp_dtype", "fp16"], "--amp_dtype fp16: needs a GPU"),
    ("pretrain", ["--accum_iter", "7"], "--accum_iter 7: an epoch has only 6 batches"),
    ("pretrain", ["--accum_iter", "0"], "--accum_iter 0: expected at least 1"),
    ("pretrain", ["--batch_size", "49"], "--batch_size 49: 48 training images do not fill one batch"),
    ("pretrain", ["--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere: cannot be written"),
    ("pretrain", ["--log_dir", "/proc/nowhere"], "/proc/nowhere"),
    ("pretrain", ["--resume", "missing.pth"], "missing.pth: no such checkpoint file"),
    ("finetune", ["--nb_classes", "-1"], "--nb_classes -1: expected"),
    ("attentive", ["--nb_classes", "-1"], "--nb_classes -1: expected"),
    ("finetune", ["--nb_classes", "3"], "--nb_classes 3: the training images have 10 classes"),
    ("finetune", ["--data_set", "IMNET100"], "--data_set IMNET100: has no definition upstream"),
    ("finetune", ["--data_set", "image_folder"], "--data_set image_folder: needs --eval_data_path"),
    ("finetune", ["--eval_data_path", "/nowhere"], "/nowhere: no such folder"),
    ("finetune", ["--data_set", "CIFAR", "--data_path", "/proc/nowhere"], "/proc/nowhere"),
    ("finetune", ["--enable_deepspeed"], "--enable_deepspeed: DeepSpeed is not supported; leave it out"),
    ("finetune", ["--batch_size", "7"], "--batch_size 7: Mixup and CutMix need an even number"),
    ("finetune", ["--cutmix_minmax", "0.5"], "--cutmix_minmax 0.5: expected two shares, 0 to 1"),
    ("finetune", ["--update_freq", "7"], "7: an epoch has only 6 batches"),
    ("finetune", ["--update_freq", "0"], "0: expected at least 1"),
    ("finetune", ["--layer_decay", "0"], "--layer_decay 0.0: expected"),
    ("finetune", ["--aa", "nonsense"], "--aa nonsense"),
    ("finetune", ["--remode", "nonsense"], "--remode nonsense"),
    ("finetune", ["--train_interpolation", "cubic", "--input_size", "36"], "--train_interpolation"),
    ("finetune", ["--opt", "lion9"], "--opt lion9: expected one of sgd, nesterov, "),
    ("finetune", ["--input_size", "18"], "image size 18 is not a multiple of the patch size 4"),
    ("finetune", ["--finetune", "missing.pth"], "missing.pth: no such checkpoint file"),
    ("finetune", ["--finetune", "TOKENIZER"], "encoder weights are missing"),
    (
        "finetune",
        ["--finetune", "TOKENIZER", "--model_key", "teacher"],
        "holds no weights under 'teacher'; its keys: model",
    ),
    ("finetune", ["--eval"], "--eval: name the checkpoint to evaluate with --resume"),
    ("finetune", ["--eval", "--resume", "TOKENIZER"], "'model' does not fit this run"),
    ("attentive", ["--nb_classes", "9"], "--nb_classes 9: the training images have 10 classes"),
    ("attentive", ["--enable_deepspeed"], "--enable_deepspeed: DeepSpeed is not supported; leave it out"),
    ("attentive", ["--eval"], "--eval: name the checkpoint to evaluate with --resume"),
    ("attentive", ["--model", "vit_base"], "--model vit_base: expected one of cae_tiny_patch16_224, "),
    ("attentive", ["--finetune", "/etc/hostname"], "/etc/hostname: not a checkpoint"),
    ("linear", ["--model", "vit_large_patch16"], "--model vit_large_patch16: expected one of cae_tiny_patch16_224, "),
    ("linear", ["--nb_classes", "9"], "--nb_classes 9: the training images have 10 classes"),
    ("linear", ["--save_freq", "0"], "--save_freq 0: expected at least 1"),
    ("linear", ["--finetune", "/etc/hostname"], "/etc/hostname: not a checkpoint"),
    ("linear", ["--finetune", "TOKENIZER"], "encoder weights are missing"),
    ("linear", ["--eval"], "--eval: name the checkpoint to evaluate with --resume"),
    ("linear", ["--eval", "--resume", "missing.pth"], "missing.pth: no such checkpoint file"),
    ("linear", ["--input_size", "18"], "image size 18 is not a multiple of the patch size 4"),
]


@pytest.mark.parametrize(("script", "own", "expected"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(script, own, expected, tmp_path, digits, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = str(tmp_path / "out")
    given = ["--data_path", digits, "--output_dir", out, "--log_dir", out]
    if script == "pretrain":
        given += ["--discrete_vae_weight_path", tokenizer]
    own = [tokenizer if word == "TOKENIZER" else word for word in own]
    error = mistake(MAINS[script], *BASES[script], *given, *own, capsys=capsys)
    assert expected in error
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(
    ("script", "own", "expected"),
    [
        ("attentive", ["--linear_type", "mean"], "--linear_type: invalid choice: 'mean'"),
        ("attentive", ["--eval_bn", "both"], "--eval_bn: invalid choice: 'both'"),
        ("pretrain", ["--model_type", "mae"], "--model_type: invalid choice: 'mae'"),
        ("finetune", ["--data_set", "INAT"], "--data_set: invalid choice: 'INAT'"),
        ("finetune", ["--linear_type", "attentive"], "unrecognized arguments: --linear_type attentive"),
        ("finetune", ["--mix", "0.8"], "unrecognized arguments: --mix 0.8"),
    ],
)
def test_unknown_flags_and_choices(script, own, expected, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(MAINS[script], *BASES[script], *own)
    assert end.value.code == 2
    assert expected in capsys.readouterr().err


def test_checkpoints_of_other_networks_are_refused(digits, tokenizer, tmp_path, capsys):
    torch.save({"model": nn.Linear(2, 2).state_dict(), "optimizer": {}, "epoch": 1}, tmp_path / "checkpoint.pth")
    error = mistake(main_pretrain, *pretrain_flags(digits, tokenizer, tmp_path), capsys=capsys)
    assert "'model' does not fit this run" in error
