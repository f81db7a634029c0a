"""Runs of the real scripts that are killed, stopped, starved of disk or fed nonsense."""

import argparse
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from common import distributed
from tests.support.processes import begin, launch
from tests.support.runs import FAULTS, FixedLoader, assert_same, command, finish, mistake, start, wait_for

PRETRAIN = ["--model", "saim_nano", "--query_depth", "1", "--input_size", "16", "--patch_size", "8"]
PRETRAIN += ["--batch_size", "8", "--warmup_epochs", "1", "--num_workers", "1", "--blr", "1e-2", "--clip_grad", "1"]
FINETUNE = ["--model", "vit_nano_patch16", "--input_size", "16", "--patch_size", "8", "--nb_classes", "10"]
FINETUNE += ["--batch_size", "8", "--warmup_epochs", "1", "--num_workers", "0", "--mixup", "0.8", "--cutmix", "1"]
FINETUNE += ["--finetune", ""]


def train(log: Path, processes: int, script: str, *flags: str) -> None:
    """A run that must end well; several processes are started by the launcher."""
    if processes > 1:
        finish(command(processes, script, *flags), log)
    else:
        assert launch(log, script, *flags) == [0], log.read_text()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, digits):
    """Folders of uninterrupted pre-training runs by number of processes."""
    runs = {}

    def get(processes: int) -> Path:
        if processes not in runs:
            folder = tmp_path_factory.mktemp("reference")
            flags = [*PRETRAIN, "--data_path", digits, "--output_dir", str(folder), "--epochs", "24"]
            train(folder / "out", processes, "saim/main_pretrain.py", *flags)
            runs[processes] = folder
        return runs[processes]

    return get


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_at_random_instants(tmp_path, digits, reference, processes):
    flags = [*PRETRAIN, "--data_path", digits, "--output_dir", str(tmp_path), "--epochs", "24"]
    argv = ["saim/main_pretrain.py", *flags]
    for attempt in range(2):
        log = tmp_path / f"killed{attempt}"
        process = start(command(processes, *argv), log) if processes > 1 else begin(log, *argv)
        wait_for(process, log, f"Epoch: [{10 * attempt + 3}]")
        time.sleep(random.random() / 5)
        os.killpg(process.pid, signal.SIGKILL)
        if processes > 1:  # the launcher's processes have groups of their own
            subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)])
        process.wait() if isinstance(process, subprocess.Popen) else process.join()
        assert distributed.load(str(tmp_path / "checkpoint.pth"))["epoch"] < 23
    train(tmp_path / "out", processes, *argv)
    assert "resumed" in (tmp_path / "out").read_text()
    assert_same(tmp_path, reference(processes))


def test_kill_inside_a_checkpoint_write(tmp_path, digits, reference):
    flags = [*PRETRAIN, "--data_path", digits, "--output_dir", str(tmp_path), "--epochs", "24"]
    faulty = [str(FAULTS), "saim/main_pretrain.py", *flags]
    assert launch(tmp_path / "out", *faulty, FAULT="kill_in_save:5") == [-signal.SIGKILL]
    assert (tmp_path / "checkpoint.tmp").exists()
    assert distributed.load(str(tmp_path / "checkpoint.pth"))["epoch"] == 2
    train(tmp_path / "out", 1, "saim/main_pretrain.py", *flags)
    assert_same(tmp_path, reference(1))


STOPS = [
    pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param(1, signal.SIGUSR1, marks=pytest.mark.slow),
    pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("processes", "signum"), STOPS)
def test_signal_saves_inside_the_epoch(tmp_path, digits, reference, processes, signum):
    flags = [*PRETRAIN, "--data_path", digits, "--output_dir", str(tmp_path), "--epochs", "24"]
    argv = command(processes, "saim/main_pretrain.py", *flags)
    process = start(argv, tmp_path / "out")
    wait_for(process, tmp_path / "out", "Epoch: [3]")
    if processes == 1:
        os.killpg(process.pid, signum)  # as a scheduler does: loader workers get it, too
    else:
        process.send_signal(signum)
    status = process.wait(timeout=60)
    text = (tmp_path / "out").read_text()
    assert status == 128 + signum if processes == 1 else status != 0, text
    assert f"stopped by {signum.name}" in text
    assert "saved epoch" in text
    assert "Traceback" not in text or processes > 1  # the launcher reports its own end
    finish(argv, tmp_path / "out")
    assert_same(tmp_path, reference(processes))


def test_fine_tuning_resumes_inside_an_epoch(tmp_path, digits):
    """Mixup, RandAugment and stochastic depth draw the same numbers again."""
    runs = [tmp_path / "whole", tmp_path / "stopped"]
    for run in runs:
        run.mkdir()
    flags = [*FINETUNE, "--data_path", digits, "--epochs", "6"]
    whole, stopped = ([*flags, "--output_dir", str(run)] for run in runs)
    train(runs[0] / "out", 1, "saim/main_finetune.py", *whole)
    faulty = [str(FAULTS), "saim/main_finetune.py", *stopped]
    assert launch(runs[1] / "out", *faulty, FAULT="signal_at:9") == [128 + signal.SIGTERM], (
        runs[1] / "out"
    ).read_text()
    assert "saved epoch 1, step 4" in (runs[1] / "out").read_text()
    train(runs[1] / "out", 1, "saim/main_finetune.py", *stopped)
    assert_same(*runs)


def test_non_finite_loss_stops_before_the_update(tmp_path, digits):
    flags = [*PRETRAIN, "--data_path", digits, "--output_dir", str(tmp_path), "--epochs", "4"]
    assert launch(tmp_path / "out", str(FAULTS), "saim/main_pretrain.py", *flags, FAULT="nan_at:9") == [1]
    text = (tmp_path / "out").read_text()
    assert "loss is nan, stopping training before the update of step 3" in text
    assert "Traceback" not in text
    bad = distributed.load(str(tmp_path / "checkpoint-nonfinite.pth"))
    assert all(value.isfinite().all() for value in bad["model"].values())
    assert (bad["epoch"], bad["images"]) == (0, 24)
    # Without the fault, the saved state replays the step and goes on as if nothing had happened.
    run = [*flags, "--resume", str(tmp_path / "checkpoint-nonfinite.pth")]
    train(tmp_path / "out", 1, "saim/main_pretrain.py", *run)
    whole = tmp_path / "whole"
    whole.mkdir()
    flags[flags.index(str(tmp_path))] = str(whole)
    train(whole / "out", 1, "saim/main_pretrain.py", *flags)
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, digits):
    flags = [*PRETRAIN, "--data_path", digits, "--output_dir", str(tmp_path), "--epochs", "4"]
    assert launch(tmp_path / "out", str(FAULTS), "saim/main_pretrain.py", *flags, FAULT="full_disk_at:3") == [2]
    text = (tmp_path / "out").read_text()
    assert text.count("cannot be written") == 1
    assert "Traceback" not in text
    assert distributed.load(str(tmp_path / "checkpoint.pth"))["epoch"] == 0
    assert not list(tmp_path.glob("*.tmp"))


def gradient_of(model: torch.nn.Linear, value: float) -> torch.Tensor:
    return (model(torch.full((1, 2), value)) ** 2).mean()


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_guard_on_the_device_freezes_from_the_bad_step_on(make):
    """What CUDA runs do with fused optimizers; the CPU's fused kernels understand the same flag."""
    model = torch.nn.Linear(2, 1)
    updater = distributed.Updater(make(model.parameters(), lr=0.1, fused=True), torch.device("cpu"))
    updater.guard_on_device = True
    log = distributed.EpochLog("", 8, 1, torch.device("cuda"))
    weights = []
    with pytest.raises(distributed.NonFinite, match="total norm is nan, stopping training before the update of step 3"):
        for step, value in log.steps([1.0, 2.0, 1.0, float("nan"), 1.0, 2.0, 1.0, 1.0]):
            loss = gradient_of(model, value)
            norm = updater.backward(loss, step)
            log.update(step, loss=torch.tensor(1.0), total_norm=norm)
            weights.append(model.weight.detach().clone())
    changed = [not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False)]
    assert changed == [True, True, False, False, False, False, False]
    assert model.weight.isfinite().all()


def test_non_finite_value_comes_before_a_stop():
    def batches():
        yield from range(4)
        raise distributed.Stopped(signal.SIGTERM)

    log = distributed.EpochLog("", 9, 1, torch.device("cuda"))
    with pytest.raises(distributed.NonFinite) as error:
        for step, _ in log.steps(batches()):
            log.update(step, loss=torch.tensor(float("nan") if step == 2 else 1.0))
    assert log.boundary(error.value.step) == 2
    assert log.sums(2) == {"loss": [2.0, 2.0]}


def test_tensorboard_gets_updates_only():
    class Tags(distributed.RunLog):
        def __init__(self):
            super().__init__("")
            self.steps = []

        def scalars(self, values, step):
            self.steps.append((step, values))

    tags = Tags()
    log = distributed.EpochLog("", 4, 1, torch.device("cpu"), run_log=tags, tags={"loss": "l"})
    for step, _ in log.steps(range(4)):
        log.update(step, step % 2 == 1, loss=float(step))
    assert tags.steps == [(250, {"l": 1.0}), (750, {"l": 3.0})]


def test_a_resumed_run_cuts_off_what_it_will_log_again(tmp_path):
    other = '{"epoch": 7}\n'  # another run's, in the same file
    (tmp_path / "log.txt").write_text(other)
    checkpoint = save_good(tmp_path)
    loader = FixedLoader(torch.zeros(1, 1))
    for epoch, log in checkpoint.epochs(loader, distributed.Position(), {}):
        log.run_log.epoch({"epoch": epoch})
        if epoch == 1:
            checkpoint.save(distributed.Position(2))
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1 + checkpoint.args.epochs
    next(checkpoint.epochs(loader, checkpoint.resume(str(tmp_path / "checkpoint.pth")), {}))
    assert (tmp_path / "log.txt").read_text() == other + '{"epoch": 0}\n{"epoch": 1}\n'


def test_meters_of_another_number_of_processes():
    meters = [{"loss": [1.0, 1.0]}, {"loss": [3.0, 1.0]}]
    assert distributed.Position(0, 8, meters).own_meters() == {"loss": [4.0, 2.0]}
    assert distributed.Position(0, 8, meters[:1]).own_meters() == meters[0]


def test_state_of_a_scaler_that_was_off_is_passed_over(tmp_path):
    checkpoint = save_good(tmp_path)
    checkpoint.parts["scaler"] = torch.amp.GradScaler("cpu", enabled=False)
    checkpoint.save(distributed.Position(3))
    path = tmp_path / "checkpoint.pth"
    state = distributed.load(str(path))
    assert "scaler" not in state  # an enabled GradScaler, such as the authors', raises on an empty state
    checkpoint.parts["scaler"] = torch.amp.GradScaler("cpu", enabled=True)
    assert checkpoint.resume(str(path)).epoch == 3
    torch.save(state | {"scaler": {}}, path)  # as earlier files have it
    assert checkpoint.resume(str(path)).epoch == 3
    checkpoint.save(distributed.Position(4))
    assert distributed.load(str(path))["scaler"] == torch.amp.GradScaler("cpu", enabled=True).state_dict()


def test_no_output_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(2, 2)
    distributed.Checkpoint("", argparse.Namespace(), model).save(distributed.Position(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_evaluation_can_be_stopped_and_is_repeated(tmp_path, digits):
    runs = [tmp_path / "whole", tmp_path / "stopped"]
    for run in runs:
        run.mkdir()
    flags = [*FINETUNE, "--data_path", digits, "--epochs", "3"]
    whole, stopped = ([*flags, "--output_dir", str(run)] for run in runs)
    train(runs[0] / "out", 1, "saim/main_finetune.py", *whole)
    faulty = [str(FAULTS), "saim/main_finetune.py", *stopped]
    status = launch(runs[1] / "out", *faulty, FAULT="stop_in_eval:1")
    assert status == [128 + signal.SIGTERM], (runs[1] / "out").read_text()
    train(runs[1] / "out", 1, "saim/main_finetune.py", *stopped)
    assert_same(*runs)


# ---- damaged and hostile checkpoints


def save_good(folder: Path) -> distributed.Checkpoint:
    model = torch.nn.Linear(2, 2)
    args, files = argparse.Namespace(lr=0.1, epochs=9), distributed.Files(every=5)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = distributed.Checkpoint(str(folder), args, model, files, optimizer=optimizer)
    checkpoint.save(distributed.Position(1))
    checkpoint.save(distributed.Position(2))
    return checkpoint


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_truncated_checkpoint_is_one_line_and_the_previous_one_loads(tmp_path, keep):
    checkpoint = save_good(tmp_path)
    path = tmp_path / "checkpoint.pth"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(distributed.UserError) as error:
        checkpoint.resume(distributed.find_checkpoint(str(tmp_path), ""))
    message = str(error.value)
    assert "truncated" in message or "not a checkpoint" in message
    assert "\n" not in message and "the newest other checkpoint is" in message
    assert checkpoint.resume(message.rsplit(" ", 1)[1]).epoch in (1, 2)
    for name in ("checkpoint-previous.pth", "checkpoint-0.pth"):
        assert checkpoint.resume(str(tmp_path / name)) == distributed.Position(1)


class Hostile:
    def __init__(self, victim: str):
        self.victim = victim

    def __reduce__(self):
        return (os.system, (f"touch {self.victim}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_refused(tmp_path, zipped):
    path, victim = tmp_path / "evil.pth", tmp_path / "victim"
    torch.save({"model": {}, "args": Hostile(str(victim))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(distributed.UserError, match=r"would execute (posix|os)\.system; refused"):
        distributed.load(str(path))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello", "not a checkpoint"),
        ([1, 2], "holds a list"),
        ({"weights": 1}, "holds no weights under 'state_dict' or 'model' or 'module'; its keys: weights"),
        ({"model": 5}, "holds no weights"),
        ({"model": {"weight": 5}}, "'model' does not fit this run"),
    ],
)
def test_other_files_are_named(tmp_path, content, words):
    path = tmp_path / "file.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(distributed.UserError, match=words):
        distributed.load_weights(torch.nn.Linear(1, 1), str(path))


def test_checkpoint_of_another_model_is_named(tmp_path):
    save_good(tmp_path)
    with pytest.raises(distributed.UserError, match="'model' does not fit this run"):
        distributed.load_weights(torch.nn.Linear(3, 2), str(tmp_path / "checkpoint.pth"))


# ---- users' mistakes on the command line: one line, exit status 2, nothing written

BAD = [
    ("main_pretrain", ["--data_path", "/nowhere"], "--data_path /nowhere: no such folder"),
    ("main_pretrain", ["--query_depth", "3"], "query_depth 3 does not fit depth 4"),
    ("main_pretrain", ["--gaussian_kernel_size", "8", "--gaussian_sigma", "1"], "kernel size 8 is not odd"),
    ("main_pretrain", ["--input_size", "20"], "image size 20 is not a multiple of the patch size 8"),
    ("main_pretrain", ["--prediction_head_type", "CNN"], "'CNN', expected one of MLP, LINEAR"),
    ("main_pretrain", ["--loss_type", "L0"], "'L0', expected one of L1, L2"),
    ("main_pretrain", ["--device", "cuda"], "--device cuda: no CUDA device"),
    ("main_pretrain", ["--device", "gpu"], "--device gpu: expected auto, cpu, cuda"),
    ("main_pretrain", ["--amp_dtype", "fp16"], "--amp_dtype fp16: needs a GPU"),
    ("main_pretrain", ["--batch_size", "0"], "--batch_size 0: expected at least 1"),
    ("main_pretrain", ["--accum_iter", "-1"], "--accum_iter -1: expected at least 1"),
    ("main_pretrain", ["--num_workers", "-1"], "--num_workers -1: expected at least 0"),
    ("main_pretrain", ["--patch_size", "0"], "--patch_size 0: expected at least 1"),
    ("main_pretrain", ["--lr", "nan"], "--lr nan: expected 0 to"),
    ("main_pretrain", ["--clip_grad", "-1"], "--clip_grad -1.0: expected"),
    ("main_pretrain", ["--seed", "-1"], "--seed -1: expected"),
    ("main_pretrain", ["--save_freq", "0"], "--save_freq 0: expected at least 1"),
    ("main_pretrain", ["--device", "meta"], "--device meta: expected auto, cpu, cuda"),
    ("main_pretrain", ["--batch_size", "1000"], "--batch_size 1000: 48 training images"),
    ("main_pretrain", ["--accum_iter", "7"], "--accum_iter 7: an epoch has only 6 batches"),
    ("main_pretrain", ["--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere: cannot be written"),
    ("main_pretrain", ["--resume", "missing.pth"], "missing.pth: no such checkpoint file"),
    ("main_pretrain", ["--dataset", "torch/none"], "--dataset torch/none"),
    ("main_finetune", ["--finetune", "missing.pth"], "missing.pth: no such checkpoint file"),
    ("main_finetune", ["--nb_classes", "3"], "--nb_classes 3: the training images have 10 classes"),
    ("main_finetune", ["--eval"], "--eval: name the checkpoint to evaluate with --resume"),
    ("main_finetune", ["--batch_size", "7"], "--batch_size 7: Mixup and CutMix need an even number"),
    ("main_finetune", ["--drop_path", "1.5"], "--drop_path 1.5: expected 0 to 1"),
    ("main_finetune", ["--smoothing", "2"], "--smoothing 2.0: expected 0 to 1"),
    ("main_finetune", ["--cutmix_minmax", "0.5"], "--cutmix_minmax 0.5: expected two shares"),
    ("main_finetune", ["--remode", "foo"], "--remode foo"),
    ("main_finetune", ["--dataset", "digits"], "--dataset digits: expected one of torch/..."),
    ("main_finetune", ["--aa", "nonsense"], "--aa nonsense"),
    ("main_linprobe", ["--finetune", "/etc/hostname"], "/etc/hostname: "),
    ("main_linprobe", ["--eval", "--resume", "missing.pth"], "missing.pth: no such checkpoint file"),
]


@pytest.mark.parametrize(("script", "flags", "words"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(script, flags, words, tmp_path, digits, monkeypatch, capsys):
    from saim import main_finetune, main_linprobe, main_pretrain

    module = {"main_pretrain": main_pretrain, "main_finetune": main_finetune, "main_linprobe": main_linprobe}[script]
    base = PRETRAIN if script == "main_pretrain" else FINETUNE
    if script == "main_linprobe":
        base = [*base[: base.index("--mixup")], "--finetune", ""]
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    argv = [*base, "--data_path", digits, "--output_dir", str(out), "--epochs", "3", "--num_workers", "0", *flags]
    assert words in mistake(module, *argv, capsys=capsys)
    assert not list(out.glob("*.pth"))


def test_unknown_flag_is_two_lines(capsys):
    from saim import main_pretrain

    with pytest.raises(SystemExit) as end:
        main_pretrain.get_args_parser().parse_args(["--batchsize", "3"])
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (2, 2)
    assert "--batchsize" in error


def test_bad_image_stops_and_saves(tmp_path, digits):
    import shutil

    folder = Path(shutil.copytree(digits, tmp_path / "images"))
    victim = sorted((folder / "train" / "3").iterdir())[0]
    victim.write_bytes(b"no image")
    flags = [*PRETRAIN, "--data_path", str(folder), "--output_dir", str(tmp_path), "--epochs", "2"]
    pair = ["saim/main_pretrain.py", *flags, "--batch_size", "4"]
    assert all(launch(tmp_path / "out", *pair, processes=2))
    text = (tmp_path / "out").read_text()
    assert f"{victim}: unreadable image" in text
    assert "--bad_images skip goes on without it" in text
    assert distributed.load(str(tmp_path / "checkpoint.pth"))["epoch"] == -1
    assert launch(tmp_path / "out", *pair, "--bad_images", "skip", processes=2) == [0, 0]
    assert json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])["epoch"] == 1
