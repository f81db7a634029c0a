"""Users' mistakes on the command line of pre-training: one line, exit status 2, nothing written."""

import os
import shutil

import pytest
import torch
from torch import nn

from common import distributed
from tests.support.runs import mistake, run_main
from tests.support.udi_runs import flags_of
from udi import main_pretrain

pytestmark = pytest.mark.usefixtures("narrow_head")

BAD = [
    ("--data_path /nowhere", "--data_path /nowhere: no such folder"),
    ("--data_path EMPTY", "has no class folders and no images"),
    ("--data_path HOLLOW", "HOLLOW/train: has no class folders and no images"),
    ("--dataset digits", "--dataset digits: expected one of torch/..."),
    ("--global_crops_scale 0.9 0.1", "--global_crops_scale [0.9, 0.1]: expected two shares, 0 to 1, increasing"),
    ("--global_crops_scale 0 1", "--global_crops_scale [0.0, 1.0]: expected two shares"),
    ("--global_crops_scale 0.5", "--global_crops_scale [0.5]: expected two shares"),
    ("--local_crops_scale 0.05 2", "--local_crops_scale [0.05, 2.0]: expected two shares"),
    ("--local_crops_scale 0.05 0.1 0.2", "--local_crops_scale [0.05, 0.1, 0.2]: expected two shares"),
    ("--local_crops_scale nan nan", "--local_crops_scale [nan, nan]: expected two shares"),
    ("--global_size 60", "expected multiples of 8"),
    ("--local_size 30", "expected multiples of 8"),
    ("--patch_size 7", "expected multiples of 7"),
    ("--patch_size 0", "--patch_size 0: expected at least 1"),
    ("--global_size 0", "--global_size 0: expected at least 1"),
    ("--local_size -8", "--local_size -8: expected at least 1"),
    ("--global_sampling_window_size 9", "sampling windows of 9 and 1 patches: the views have 4 and 2 per side"),
    ("--global_sampling_window_size 0", "0: expected at least 1"),
    ("--local_sampling_window_size 5", "sampling windows of 2 and 5 patches: the views have 4 and 2 per side"),
    ("--local_sampling_window_size -1", "-1: expected at least 1"),
    ("--local_crops_number -1", "--local_crops_number -1: expected at least 0"),
    ("--out_dim 0", "--out_dim 0: expected at least 1"),
    ("--batch_size_per_gpu 0", "--batch_size 0: expected at least 1"),
    ("--batch_size 49", "48 training images do not fill one batch"),
    ("--accum_iter 0", "--accum_iter 0: expected at least 1"),
    ("--accum_iter 7", "--accum_iter 7: an epoch has only 6 batches"),
    ("--epochs 0", "--epochs 0: expected at least 1"),
    ("--warmup_epochs -1", "--warmup_epochs -1: expected at least 0"),
    ("--lr nan", "--lr nan: expected 0 to"),
    ("--min_lr -1", "--min_lr -1.0: expected 0 to"),
    ("--weight_decay -1", "--weight_decay -1.0: expected 0 to"),
    ("--weight_decay_end nan", "--weight_decay_end nan: expected 0 to"),
    ("--clip_grad -1", "--clip_grad -1.0: expected at least"),
    ("--momentum_teacher 1.1", "--momentum_teacher 1.1: expected 0 to 1"),
    ("--alpha 2", "--alpha 2.0: expected 0 to 1"),
    ("--teacher_temp 0", "--teacher_temp 0.0: expected at least"),
    ("--warmup_teacher_temp nan", "--warmup_teacher_temp nan: expected at least"),
    ("--warmup_teacher_temp_epochs -1", "--warmup_teacher_temp_epochs -1: expected at least 0"),
    ("--drop_path_rate 1.5", "--drop_path_rate 1.5: expected 0 to 1"),
    ("--freeze_last_layer -1", "--freeze_last_layer -1: expected at least 0"),
    ("--device cuda", "--device cuda: no CUDA device"),
    ("--device tpu", "--device tpu: expected auto, cpu, cuda"),
    ("--amp_dtype fp16", "--amp_dtype fp16: needs a GPU"),
    ("--seed -1", "--seed -1: expected"),
    ("--num_workers -1", "--num_workers -1: expected at least 0"),
    ("--saveckp_freq -1", "--saveckp_freq -1: expected at least 0"),
    ("--start_epoch -1", "--start_epoch -1: expected at least 0"),
    ("--output_dir /proc/nowhere", "--output_dir /proc/nowhere: cannot be written"),
    ("--output_dir FILE", "cannot be written"),
    ("--resume missing.pth", "missing.pth: no such checkpoint file"),
    ("--resume EMPTY", "is a folder, expected a checkpoint file"),
    ("--resume /etc/hostname", "/etc/hostname: not a checkpoint"),
    ("--resume TRUNCATED", "truncated or not a checkpoint"),
    ("--resume LIST", "holds a list, expected a checkpoint"),
    ("--resume FOREIGN", "'model' does not fit this run"),
    ("--resume BACKBONE", "holds no weights under 'student'"),
    ("--resume CODE", "it would execute posix.system; refused"),
    ("--resume WHOLE --number_cls_token 1", "'model' does not fit this run"),
    ("--resume WHOLE --include_patch false", "'model' does not fit this run"),
    ("--resume WHOLE --arch vit_tiny", "'model' does not fit this run"),
    ("--resume WHOLE --out_dim 128", "'model' does not fit this run"),
    ("--resume WHOLE --optimizer sgd", "'optimizer' does not fit this run"),
    ("--resume WHOLE --norm_last_layer false", "'optimizer' does not fit this run"),
]


class Code:
    """What a hostile pickle runs."""

    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def files(reference, tmp_path_factory) -> dict[str, str]:
    """What the mistakes name in capitals."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("EMPTY", "HOLLOW/train/0"):
        (folder / name).mkdir(parents=True)
    (folder / "FILE").touch()
    source = reference("plain") / "checkpoint.pth"
    shutil.copy(source, folder / "WHOLE")
    data = source.read_bytes()
    (folder / "TRUNCATED").write_bytes(data[: len(data) // 2])
    teacher = distributed.load(str(source))["teacher"]
    prefix = "backbone.backbone."
    vit = {name.removeprefix(prefix): value for name, value in teacher.items() if name.startswith(prefix)}
    contents = {"LIST": [1], "FOREIGN": {"model": nn.Linear(2, 2).state_dict()}, "BACKBONE": vit, "CODE": {"x": Code()}}
    for name, content in contents.items():
        torch.save(content, folder / name)
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize(("own", "expected"), BAD, ids=[own for own, _ in BAD])
def test_mistakes_are_one_line(own, expected, tmp_path, digits, files, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [files.get(word, word) for word in own.split()]
    error = mistake(main_pretrain, *flags_of("plain", digits, tmp_path / "out", *words), capsys=capsys)
    assert expected in error
    assert not list(tmp_path.rglob("*.pth"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("--arch resnet50", "--arch: invalid choice: 'resnet50'"),
        ("--number_cls_token 3", "--number_cls_token: invalid choice: 3"),
        ("--optimizer adam", "--optimizer: invalid choice: 'adam'"),
        ("--include_patch maybe", "maybe: expected true or false"),
        ("--norm_last_layer", "--norm_last_layer: expected one argument"),
        ("--out_dim many", "--out_dim: invalid int value: 'many'"),
        ("--amp_dtype fp8", "--amp_dtype: invalid choice: 'fp8'"),
        ("--local_crops 3", "unrecognized arguments: --local_crops 3"),  # no abbreviations
    ],
)
def test_unknown_flags_and_choices(own, expected, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(main_pretrain, *own.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 2  # usage, and what is wrong


def test_another_network_in_the_same_folder_is_refused(digits, reference, tmp_path, capsys):
    shutil.copytree(reference("plain"), tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    error = mistake(main_pretrain, *flags_of("no patches", digits, tmp_path), capsys=capsys)
    assert "checkpoint.pth: 'model' does not fit this run: " in error
    assert before == (tmp_path / "checkpoint.pth").read_bytes()


def test_a_damaged_checkpoint_names_the_one_before(digits, reference, tmp_path, capsys):
    shutil.copytree(reference("plain"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:1000])
    error = mistake(main_pretrain, *flags_of("plain", digits, tmp_path), capsys=capsys)
    assert f"{path}: truncated or not a checkpoint; the newest other checkpoint is " in error
    assert error.strip().rsplit(" ", 1)[1].endswith(("checkpoint0001.pth", "checkpoint-previous.pth"))
