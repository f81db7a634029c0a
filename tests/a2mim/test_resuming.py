"""Files of a run, which of them it continues, weights that start one anew, and unreadable images."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from a2mim import main_finetune, main_pretrain
from a2mim.models_a2mim import MaskedImageModel, build_classifier
from a2mim.openmixup import to_openmixup_state_dict
from common import distributed
from tests.support.a2mim_runs import CASES, flags_of, log_of, state_of
from tests.support.runs import mistake, run_main, spoil


def test_the_last_numbered_file_is_kept(digits, tmp_path):
    run_main(main_pretrain, *flags_of("vit", digits, tmp_path, "--save_every", "2", "--epochs", "5"))
    assert {path.name for path in tmp_path.glob("*.pth")} == {"latest.pth", "latest-previous.pth", "epoch_5.pth"}
    latest, numbered = state_of(tmp_path), state_of(tmp_path, "epoch_5.pth")
    assert latest["meta"] == numbered["meta"] == {"epoch": 5, "iter": 30, "seed": 0, "exp_name": ""}
    assert all(torch.equal(value, numbered["state_dict"][name]) for name, value in latest["state_dict"].items())
    assert state_of(tmp_path, "latest-previous.pth")["meta"]["epoch"] == 4
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, MaskedImageModel, 19, stop=True)  # in the fourth epoch
        with pytest.raises(SystemExit):
            run_main(main_pretrain, *flags_of("vit", digits, tmp_path / "b", "--save_every", "2", "--epochs", "5"))
    assert [path.name for path in (tmp_path / "b").glob("epoch_*.pth")] == ["epoch_2.pth"]  # whole multiples


def official(path: Path, target: Path, steps_as_numbers: bool = True) -> None:
    """The file as upstream writes it: without our keys, whose optimizer has a group per parameter."""
    state = distributed.load(str(path))
    for moments in state["optimizer"]["state"].values():
        if "step" in moments and steps_as_numbers:
            moments["step"] = int(moments["step"])
    groups = [{"params": group["params"], "lr": 1.0, "initial_lr": 1.0} for group in state["optimizer"]["param_groups"]]
    for own, group in zip(groups, state["optimizer"]["param_groups"], strict=True):
        assert len(group["params"]) == 1
        own |= {k: group[k] for k in ("weight_decay", "betas", "eps", "step") if k in group}
    meta = {k: state["meta"][k] for k in ("epoch", "iter")} | {"mmcv_version": "1.7.2", "config": "model = dict()"}
    optimizer = {"state": state["optimizer"]["state"], "param_groups": groups}
    torch.save({"meta": meta, "state_dict": state["state_dict"], "optimizer": optimizer}, target)


VITS = [pytest.param(case, marks=pytest.mark.slow) for case in ("vit", "finetune_vit")]


@pytest.mark.parametrize("case", ["resnet", "finetune", *VITS])
def test_an_official_checkpoint_goes_on_at_its_epoch(digits, reference, tmp_path, case, capsys):
    """With its optimizer's moments and steps and, in fine-tuning, the live weights beside the average."""
    flags = flags_of(case, digits, tmp_path)
    # As if the run of 3 epochs had been ended after its second one.
    whole = reference(case)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, CASES[case][1], 14 if case in ("resnet", "finetune") else 12, stop=True)
        with pytest.raises(SystemExit):
            run_main(CASES[case][0], *flags)
    source = tmp_path / "latest-previous.pth"
    assert distributed.load(str(source))["meta"]["epoch"] == 2
    official(source, tmp_path / "official.pth")
    capsys.readouterr()
    own = ["--work_dir", str(tmp_path / "on"), "--resume_from", str(tmp_path / "official.pth")]
    run_main(CASES[case][0], *flags, *own)
    assert "official.pth: epoch 2, 0 images of it done" in capsys.readouterr().out
    expected, found = state_of(whole), state_of(tmp_path / "on")
    assert found["meta"] == expected["meta"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
    assert log_of(tmp_path / "on") == log_of(whole)[2:]


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_finished_one(digits, tmp_path, capsys):
    flags = flags_of("vit", digits, tmp_path, "--sched", "step", "--steps", "100", "--epochs", "2")
    run_main(main_pretrain, *flags)
    capsys.readouterr()
    run_main(main_pretrain, *flags)
    assert "2 epochs done" in capsys.readouterr().out
    run_main(main_pretrain, *flags, "--epochs", "4", "--lr", "1e-4", "--seed", "3", "--batch_size", "6")
    lines = log_of(tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [round(line["train_lr"], 6) for line in lines[1:]] == [1.2e-3, 1e-4, 1e-4]
    assert state_of(tmp_path)["meta"]["iter"] == 4 * 8


def test_another_network_in_the_same_folder_is_refused(digits, reference, tmp_path, capsys):
    shutil.copytree(reference("vit"), tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "latest.pth").read_bytes()
    error = mistake(main_pretrain, *flags_of("resnet", digits, tmp_path), capsys=capsys)
    assert "latest.pth: 'model' does not fit this run: " in error
    error = mistake(main_finetune, *flags_of("finetune", digits, tmp_path), capsys=capsys)
    assert "latest.pth: 'model' does not fit this run: " in error
    run_main(main_pretrain, *flags_of("vit", digits, tmp_path))
    assert distributed.load(str(tmp_path / "latest.pth"))["meta"]["epoch"] == 3
    assert before == (tmp_path / "latest.pth").read_bytes()


def test_another_optimizer_in_the_same_folder(digits, tmp_path, capsys):
    run_main(main_finetune, *flags_of("finetune", digits, tmp_path, "--epochs", "2"))
    error = mistake(main_finetune, *flags_of("finetune", digits, tmp_path, "--opt", "adamw"), capsys=capsys)
    assert "does not fit this run" in error


def test_average_can_be_added_and_left_out(digits, tmp_path):
    flags = flags_of("finetune", digits, tmp_path)
    run_main(main_finetune, *flags, "--epochs", "2")
    live = state_of(tmp_path)["state_dict"]["ema_head_fc_weight"]
    run_main(main_finetune, *flags, "--ema", "0", "--lr", "0", "--min_lr", "0")
    state = state_of(tmp_path)["state_dict"]
    assert torch.equal(state["head.fc.weight"], live)
    assert not [name for name in state if name.startswith("ema_")]
    run_main(main_finetune, *flags, "--epochs", "4", "--lr", "0", "--min_lr", "0")
    state = state_of(tmp_path)["state_dict"]
    assert torch.allclose(state["head.fc.weight"], live, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_resume_from_wins_over_the_folder(digits, reference, tmp_path, capsys):
    flags = flags_of("vit", digits, tmp_path / "own", "--epochs", "2")
    run_main(main_pretrain, *flags)
    capsys.readouterr()
    given = str(reference("vit") / "latest-previous.pth")
    for flag in ("--resume_from", "--resume"):
        run_main(main_pretrain, *flags_of("vit", digits, tmp_path / flag[2:]), flag, given)
        assert f"resumed {given}: epoch 2," in capsys.readouterr().out
    run_main(main_pretrain, *flags, "--resume_from", given, "--epochs", "3", "--auto_resume")
    assert f"resumed {given}: epoch 2," in capsys.readouterr().out
    mine, other = state_of(tmp_path / "own")["state_dict"], state_of(reference("vit"))["state_dict"]
    assert all(torch.equal(value, other[name]) for name, value in mine.items())


@pytest.mark.slow
def test_weights_alone_start_a_run_anew(digits, reference, tmp_path, capsys):
    """--load_checkpoint takes the whole network, --pretrained the encoder, --resume_from a file without optimizer."""
    source = state_of(reference("vit"))
    torch.save({"state_dict": source["state_dict"]}, tmp_path / "weights.pth")
    still = ["--lr", "0", "--epochs", "2", "--warmup_epochs", "0"]
    for flag, kept in (("--load_checkpoint", ""), ("--resume_from", ""), ("--pretrained", "backbone.layers")):
        folder = tmp_path / flag[2:]
        run_main(main_pretrain, *flags_of("vit", digits, folder, *still, flag, str(tmp_path / "weights.pth")))
        assert [line["epoch"] for line in log_of(folder)] == [1, 2]
        for name, value in state_of(folder)["state_dict"].items():
            if name.startswith(kept):
                assert torch.equal(value, source["state_dict"][name]), (flag, name)


def test_no_folder_writes_nothing(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = flags_of("vit", digits, tmp_path, "--epochs", "2", "--save_recon_every", "0")
    run_main(main_pretrain, *flags, "--work_dir", "")
    assert not list(tmp_path.iterdir())


# ---- unreadable images


@pytest.mark.parametrize("case", [pytest.param("vit", marks=pytest.mark.slow), "finetune"])
def test_a_truncated_image_stops_or_is_skipped(digits, tmp_path, case, capsys):
    images = Path(shutil.copytree(digits, tmp_path / "images"))
    victim = min((images / "train" / "3").iterdir())
    victim = victim.rename(victim.with_suffix(".jpg"))
    Image.effect_noise((40, 40), 50).save(victim)
    victim.write_bytes(victim.read_bytes()[:-300])
    main, _, _ = CASES[case]
    flags = flags_of(case, str(images), tmp_path / "run", "--epochs", "2")
    with pytest.raises(SystemExit) as end:
        run_main(main, *flags)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"{victim}: unreadable image" in error
    assert "--bad_images skip goes on without it" in error
    assert error.count("\n") == 1
    assert state_of(tmp_path / "run")["meta"]["epoch"] == 0  # the position is saved
    run_main(main, *flags, "--bad_images", "skip")
    assert f"{victim}: unreadable image" in capsys.readouterr().out
    assert [line["epoch"] for line in log_of(tmp_path / "run")] == [1, 2]


def test_a_damaged_checkpoint_names_the_one_before(digits, reference, tmp_path, capsys):
    shutil.copytree(reference("vit"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "latest.pth"
    path.write_bytes(path.read_bytes()[:1000])
    error = mistake(main_pretrain, *flags_of("vit", digits, tmp_path), capsys=capsys)
    assert f"{path}: truncated or not a checkpoint; the newest other checkpoint is " in error
    newest = error.strip().rsplit(" ", 1)[1]
    assert newest == str(tmp_path / "epoch_3.pth")
    run_main(main_pretrain, *flags_of("vit", digits, tmp_path, "--epochs", "4"), "--resume", newest)
    assert state_of(tmp_path)["meta"]["epoch"] == 4


def test_another_encoder_does_not_continue_a_run(digits, tmp_path, capsys):
    """A folder's run is continued without a flag, but not one that began with other weights."""
    encoders = [str(tmp_path / f"{k}.pth") for k in (0, 1)]
    for path in encoders:
        torch.save({"state_dict": to_openmixup_state_dict(build_classifier("resnet_nano", 10))}, path)
    own = flags_of("finetune", digits, tmp_path / "run", "--warmup_epochs", "0", "--epochs", "1", "--pretrained")
    run_main(main_finetune, *own, encoders[0])
    assert f"began with {encoders[0]}" in mistake(main_finetune, *own, encoders[1], capsys=capsys)
    run_main(main_finetune, *own, encoders[0])  # done: returns at once
