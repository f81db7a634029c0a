"""Pre-training with a moving average that is stopped, resumed and replayed; and users' mistakes with all scripts."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from common import distributed
from semaim import main_finetune, main_knn, main_linprobe, main_pretrain
from semaim.models_semaim import AimViT
from tests.support.processes import begin, launch
from tests.support.runs import FAULTS, assert_same, command, finish, kept_signals, mistake, run_main, start

SMALL = ["--input_size", "16", "--patch_size", "4", "--num_workers", "0"]
PRETRAIN = ["--model", "aim_nano", "--query_depth", "2", "--permutation_type", "attention_center", *SMALL]
PRETRAIN += ["--batch_size", "8", "--accum_iter", "2", "--epochs", "3", "--warmup_epochs", "1", "--blr", "1e-2"]
LATEST, LOG = "aim_nano.exp.temp.pth", "aim_nano.exp.log.txt"


def flags(digits: str, folder: Path, *further: str) -> list[str]:
    own = ["--data_path", digits, "--output_dir", str(folder), "--log_dir", str(folder)]
    return [*PRETRAIN, *own, *further]


def state_of(folder: Path, name: str = LATEST) -> dict:
    return distributed.load(str(folder / name))


def complete(processes: int, folder: Path, script: str, *argv: str) -> None:
    """Run a script to its end, which prints into <folder>/out; several processes are started by torchrun."""
    log = folder / "out"
    if processes > 1:
        return finish(command(processes, script, *argv), log)
    assert launch(log, script, *argv) == [0], log.read_text()
    return None


def stop_and_resume(digits: str, tmp_path: Path, processes: int, *further: str) -> None:
    """A run that a signal stops inside of its second epoch, between two micro-steps of an update, and a whole one."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    options = ["--use_ema_model", "--num_workers", "1", *further]
    script = "semaim/main_pretrain.py"
    complete(processes, whole, script, *flags(digits, whole, *options))
    argv = flags(digits, stopped, *options)
    if processes == 1:
        run = begin(stopped / "out", str(FAULTS), script, *argv, FAULT="signal_at:8")
        run.join(timeout=240)
        status = run.exitcode
    else:
        status = start(command(processes, str(FAULTS), script, *argv), stopped / "out", FAULT="signal_at:8").wait(240)
    text = (stopped / "out").read_text()
    assert status == 128 + signal.SIGTERM if processes == 1 else status != 0, text
    assert "saved epoch 1, step" in text
    state = state_of(stopped)
    assert (state["epoch"], state["images"] > 0, "ema_state_dict" in state) == (1, True, True)
    complete(processes, stopped, script, *argv)
    assert "resumed" in (stopped / "out").read_text()
    assert_same(whole, stopped, LATEST, LOG)
    final = state_of(whole)
    assert any(not torch.equal(final["ema_state_dict"][k], final["state_dict"][k]) for k in final["state_dict"])


@pytest.mark.slow
def test_stop_inside_an_epoch_loses_nothing(digits, tmp_path):
    stop_and_resume(digits, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["none", "ema"])
def test_stop_inside_an_epoch_loses_nothing__two_processes(digits, tmp_path, feature):
    stop_and_resume(digits, tmp_path, 2, "--batch_size", "4", "--predict_feature", feature)


# ---- in this process


def spoiled(monkeypatch, when: int, stop: bool) -> None:
    """Before the loss number `when` is computed a signal arrives, or it is NaN."""
    plain, calls = AimViT.forward, []

    def forward(self, *args, **kwargs):
        calls.append(None)
        if stop and len(calls) == when + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        loss, *others = plain(self, *args, **kwargs)
        return (loss * float("nan") if not stop and len(calls) == when + 1 else loss, *others)

    monkeypatch.setattr(AimViT, "forward", forward)


@pytest.mark.parametrize(
    ("stop", "feature"),
    [
        (True, "inference"),
        (False, "ema"),
        pytest.param(True, "ema", marks=pytest.mark.slow),
        pytest.param(False, "inference", marks=pytest.mark.slow),
    ],
)
def test_resumed_and_replayed_runs_end_alike(digits, tmp_path, monkeypatch, feature, stop):
    """Stopped by a signal, or by a NaN whose state is replayed; weights, optimizer, average and log are the same."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["--use_ema_model", "--predict_feature", feature]
    run_main(main_pretrain, *flags(digits, whole, *options))
    with monkeypatch.context() as patch:
        spoiled(patch, when=9, stop=stop)
        patch.setattr("common.distributed.exits._received", [])
        with pytest.raises(SystemExit) as end:
            run_main(main_pretrain, *flags(digits, broken, *options))
    assert end.value.code == (128 + signal.SIGTERM if stop else 1)
    name = LATEST if stop else "aim_nano.exp.temp-nonfinite.pth"
    bad = state_of(broken, name)
    assert (bad["epoch"], bad["images"]) == (1, 8 * 4 if stop else 8 * 2)
    for key in ("state_dict", "ema_state_dict"):
        assert all(value.isfinite().all() for value in bad[key].values())
    run_main(main_pretrain, *flags(digits, broken, *options, "--resume", str(broken / name)))
    assert_same(whole, broken, LATEST, LOG)


def test_run_without_the_average_goes_on_from_one_with_it(digits, tmp_path, capsys):
    run_main(main_pretrain, *flags(digits, tmp_path, "--use_ema_model", "--epochs", "2"))
    assert "ema_state_dict" in state_of(tmp_path)
    capsys.readouterr()
    run_main(main_pretrain, *flags(digits, tmp_path))
    assert "epoch 2, 0 images of it done" in capsys.readouterr().out
    state = state_of(tmp_path)
    assert state["epoch"] == 3
    assert "ema_state_dict" not in state
    assert [json.loads(line)["epoch"] for line in (tmp_path / LOG).read_text().splitlines()] == [0, 1, 2]


def test_average_starts_from_the_weights_of_a_run_without_it(digits, tmp_path):
    """Without a learning rate the weights stay, and so does an average that began as they are."""
    run_main(main_pretrain, *flags(digits, tmp_path, "--epochs", "2"))
    before = state_of(tmp_path)
    assert "ema_state_dict" not in before
    run_main(main_pretrain, *flags(digits, tmp_path, "--use_ema_model", "--lr", "0"))
    after = state_of(tmp_path)
    assert after["epoch"] == 3
    for name, value in before["state_dict"].items():
        assert torch.equal(after["state_dict"][name], value), name
        assert torch.allclose(after["ema_state_dict"][name], value, rtol=1e-6, atol=1e-7), name


def test_files_of_a_run(digits, tmp_path, capsys):
    """Names, keys, log lines and TensorBoard tags of the authors, through all four scripts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def tags(folder: str) -> dict[str, list[int]]:
        events = EventAccumulator(folder).Reload()
        return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    run_main(main_pretrain, *flags(digits, tmp_path, "--use_ema_model", "--saveckp_freq", "2", "--experiment", "a"))
    numbered = sorted(path.name for path in tmp_path.glob("aim_nano.a.0*.pth"))
    assert numbered == ["aim_nano.a.0002.pth", "aim_nano.a.0003.pth"]  # every second one, and the last
    assert [state_of(tmp_path, name)["epoch"] for name in numbered] == [2, 3]
    state = state_of(tmp_path, "aim_nano.a.temp.pth")
    assert {"epoch", "state_dict", "optimizer", "model", "ema_state_dict"} <= set(state)
    assert (state["epoch"], state["model"]) == (3, "aim_nano")
    assert set(state["ema_state_dict"]) == set(state["state_dict"])
    lines = [json.loads(line) for line in (tmp_path / "aim_nano.a.log.txt").read_text().splitlines()]
    assert [list(line) for line in lines] == [["train_lr", "train_loss", "train_total_norm", "epoch"]] * 3
    updates = [1, 3, 5, 7, 9, 11, 13, 15, 17]  # len(loader) * epoch + step, of the updates
    assert tags(str(tmp_path / "aim_nano.a")) == {"loss": updates, "lr": updates, "grad_norm": updates}
    # What follows starts from it.
    encoder = str(tmp_path / "aim_nano.a.temp.pth")
    common = [*SMALL, "--model", "vit_nano_patch16", "--data_path", digits, "--nb_classes", "10"]
    own = ["--batch_size", "24", "--epochs", "1", "--warmup_epochs", "0", "--finetune", encoder]
    own += ["--output_dir", str(tmp_path), "--log_dir", str(tmp_path)]
    for module, ending in ((main_finetune, "temp"), (main_linprobe, "linear")):
        experiment = module.__name__.rsplit("_", 1)[1]
        run_main(module, *common, *own, "--experiment", experiment)
        name = f"vit_nano_patch16.{experiment}"
        state = state_of(tmp_path, f"{name}.{ending}.pth")
        assert {"epoch", "state_dict", "optimizer", "model"} <= set(state)
        assert (state["epoch"], state["model"]) == (1, "vit_nano_patch16")
        line = json.loads((tmp_path / f"{name}.log.txt").read_text())
        expected = ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"]
        assert list(line) == expected
        assert "norm" in capsys.readouterr().out  # the report of what the checkpoint lacked or had too much
        scalars = tags(str(tmp_path / name))
        assert scalars == {
            "loss": [0, 500],
            "lr": [0, 500],
            **{f"perf/test_{key}": [0] for key in ("acc1", "acc5", "loss")},
        }
        evaluation = [*common, *own, "--eval", "--resume", str(tmp_path / f"{name}.{ending}.pth")]
        run_main(module, *evaluation)
        assert f"Accuracy of the network on the 20 test images: {line['test_acc1']:.1f}%" in capsys.readouterr().out
        # A trained checkpoint, with its head, is a start, too.
        trained = str(tmp_path / f"{name}.{ending}.pth")
        run_main(main_knn, *common, "--nb_knn", "3", "--pretrained_weights", trained, "--global_pool")
        assert "3-NN classifier result: Top1: " in capsys.readouterr().out
        run_main(main_linprobe, *common, *own, "--finetune", trained, "--experiment", f"{experiment}2")
        # It pooled, so that it has no norm for a class token.
        assert "norm.weight" in mistake(main_knn, *common, "--pretrained_weights", trained, capsys=capsys)
    for key in ("state_dict", "ema_state_dict"):
        run_main(main_knn, *common, "--nb_knn", "3", "--pretrained_weights", encoder, "--checkpoint_key", key)
        assert "3-NN classifier result: Top1: " in capsys.readouterr().out


def test_no_output_folder_writes_nothing(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_main(main_pretrain, *flags(digits, tmp_path), "--output_dir", "", "--log_dir", "", "--epochs", "2")
    assert not list(tmp_path.iterdir())


def test_blur_with_one_flag_is_told(digits, tmp_path, capsys):
    run_main(main_pretrain, *flags(digits, tmp_path, "--gaussian_sigma", "1", "--epochs", "2"))
    assert "WARNING: no blur; it needs both --gaussian_kernel_size and --gaussian_sigma" in capsys.readouterr().out


def test_damaged_checkpoint_names_the_one_before(digits, tmp_path, capsys):
    run_main(main_pretrain, *flags(digits, tmp_path, "--epochs", "2"))
    path = tmp_path / LATEST
    path.write_bytes(path.read_bytes()[:1000])
    error = mistake(main_pretrain, *flags(digits, tmp_path), capsys=capsys)
    assert f"{path}: truncated or not a checkpoint; the newest other checkpoint is " in error
    with kept_signals():
        run_main(main_pretrain, *flags(digits, tmp_path, "--resume", error.strip().rsplit(" ", 1)[1]))
    assert state_of(tmp_path)["epoch"] == 3


# ---- users' mistakes on the command line: one line, exit status 2, nothing written

MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe, "knn": main_knn}
TRAINED = ["--batch_size", "8", "--epochs", "3", "--warmup_epochs", "1", "--nb_classes", "10", *SMALL]
BASES = {
    "pretrain": PRETRAIN,
    "finetune": ["--model", "vit_nano_patch16", "--mixup", "0.8", *TRAINED],
    "linprobe": ["--model", "vit_nano_patch16", *TRAINED],
    "knn": ["--model", "vit_nano_patch16", "--nb_classes", "10", "--nb_knn", "3", *SMALL],
}
BAD = [
    ("pretrain", ["--data_path", "/nowhere"], "--data_path /nowhere: no such folder"),
    ("pretrain", ["--permutation_type", "saliency"], "permutation_type is 'saliency', expected one of zigzag, raster"),
    ("pretrain", ["--permutation_type", "attention_guided"], "is defined for 14 x 14 patches, here are 4 x 4"),
    ("pretrain", ["--permutation_type", "stochastic_center"], "is defined for 14 x 14 patches, here are 4 x 4"),
    ("pretrain", ["--attention_type", "mean"], "attention_type is 'mean', expected one of cls, gap, self"),
    ("pretrain", ["--predict_feature", "mae"], "predict_feature is 'mae', expected one of none, inference, ema, dino"),
    ("pretrain", ["--prediction_head_type", "CNN"], "'CNN', expected one of MLP, LINEAR"),
    ("pretrain", ["--loss_type", "L0"], "'L0', expected one of L1, L2"),
    ("pretrain", ["--share_weight"], "share_weight"),
    ("pretrain", ["--query_depth", "3"], "query_depth 3 does not fit depth 4; possible: [1, 2, 4]"),
    ("pretrain", ["--gaussian_kernel_size", "8", "--gaussian_sigma", "1"], "kernel size 8 is not odd"),
    ("pretrain", ["--input_size", "18"], "image size 18 is not a multiple of the patch size 4"),
    ("pretrain", ["--attn_impl", "flex"], "--attn_impl flex: FlexAttention trains on CUDA only"),
    ("pretrain", ["--predict_feature", "ema"], "--predict_feature ema: needs --use_ema_model"),
    ("pretrain", ["--predict_feature", "clip"], "name the weights of OpenAI's ViT-B-16.pt with --teacher_path"),
    ("pretrain", ["--predict_feature", "dino"], "name the weights of dino_vitbase16_pretrain.pth with --teacher_path"),
    ("pretrain", ["--predict_feature", "clip", "--teacher_path", "no.pt"], "--teacher_path no.pt: no such file"),
    ("pretrain", ["--predict_feature", "dino", "--teacher_path", "/etc/hostname"], "/etc/hostname: not a checkpoint"),
    ("pretrain", ["--device", "cuda"], "--device cuda: no CUDA device"),
    ("pretrain", ["--amp_dtype", "fp16"], "--amp_dtype fp16: needs a GPU"),
    ("pretrain", ["--saveckp_freq", "0"], "--saveckp_freq 0: expected at least 1"),
    ("pretrain", ["--accum_iter", "7"], "--accum_iter 7: an epoch has only 6 batches"),
    ("pretrain", ["--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere: cannot be written"),
    ("pretrain", ["--log_dir", "/proc/nowhere"], "/proc/nowhere"),
    ("pretrain", ["--resume", "missing.pth"], "missing.pth: no such checkpoint file"),
    ("finetune", ["--finetune", "missing.pth"], "missing.pth: no such checkpoint file"),
    ("finetune", ["--nb_classes", "3"], "--nb_classes 3: the training images have 10 classes"),
    ("finetune", ["--eval"], "--eval: name the checkpoint to evaluate with --resume"),
    ("finetune", ["--batch_size", "7"], "--batch_size 7: Mixup and CutMix need an even number"),
    ("finetune", ["--layer_decay", "0"], "--layer_decay 0.0: expected"),
    ("finetune", ["--aa", "nonsense"], "--aa nonsense"),
    ("finetune", ["--input_size", "18"], "image size 18 is not a multiple of the patch size 4"),
    ("linprobe", ["--finetune", "/etc/hostname"], "/etc/hostname: not a checkpoint"),
    ("linprobe", ["--eval"], "--eval: name the checkpoint to evaluate with --resume"),
    ("linprobe", ["--eval", "--resume", "missing.pth"], "missing.pth: no such checkpoint file"),
    ("linprobe", ["--nb_classes", "9"], "--nb_classes 9: the training images have 10 classes"),
    ("knn", ["--data_path", "/nowhere"], "--data_path /nowhere: no such folder"),
    ("knn", ["--pretrained_weights", "missing.pth"], "missing.pth: no such checkpoint file"),
    ("knn", ["--nb_knn", "20", "49"], "--nb_knn 49: there are only 48 training images"),
    ("knn", ["--nb_knn", "0"], "--nb_knn 0: expected at least 1"),
    ("knn", ["--nb_classes", "3"], "--nb_classes 3: the training images have 10 classes"),
    ("knn", ["--temperature", "0"], "--temperature 0.0: expected"),
    ("knn", ["--batch_size_per_gpu", "0"], "--batch_size_per_gpu 0: expected at least 1"),
    ("knn", ["--load_features", "/nowhere"], "--load_features /nowhere: expected trainfeat.pth"),
    ("knn", ["--dump_features", "/proc/nowhere"], "--dump_features /proc/nowhere: cannot be written"),
    ("knn", ["--device", "cuda"], "--device cuda: no CUDA device"),
]


@pytest.mark.parametrize(("script", "own", "words"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(script, own, words, tmp_path, digits, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    folders = [] if script == "knn" else ["--output_dir", str(out), "--log_dir", str(out)]
    error = mistake(MAINS[script], *BASES[script], "--data_path", digits, *folders, *own, capsys=capsys)
    assert words in error
    assert not list(tmp_path.rglob("*.pth"))


def test_other_checkpoints_are_named(tmp_path, digits, capsys):
    torch.save({"state_dict": {}, "ema_state_dict": {}}, tmp_path / "file.pth")
    argv = [*BASES["knn"], "--data_path", digits, "--pretrained_weights", str(tmp_path / "file.pth")]
    error = mistake(main_knn, *argv, "--checkpoint_key", "teacher", capsys=capsys)
    assert "file.pth: holds no weights under 'teacher'; its keys: state_dict, ema_state_dict" in error
    assert "encoder weights are missing, first cls_token" in mistake(main_knn, *argv, capsys=capsys)
    torch.save({"state_dict": {}, "optimizer": {}, "epoch": 1}, tmp_path / LATEST)
    assert "'model' does not fit this run" in mistake(main_pretrain, *flags(digits, tmp_path), capsys=capsys)
