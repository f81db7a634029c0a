"""Fine-tuning: flags, extraction, whole runs from a pre-training checkpoint, stops, and users' mistakes."""

import json
import runpy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from common import datasets, distributed
from tests.support import udi_weights as files
from tests.support.helpers import ROOT, golden_files, load_golden
from tests.support.runs import assert_same, mistake, run_main, spoil
from udi import main_finetune, main_linprobe
from udi.backbone import load_backbone
from udi.eval_finetuning import extract_backbone_weights_for_finetuning as extract
from udi.models_finetune import VisionTransformer

SMALL = ["--model", "vit_nano", "--input_size", "16", "--patch_size", "4", "--num_workers", "0", "--batch_size", "8"]
SMALL += ["--nb_classes", "10", "--epochs", "2", "--warmup_epochs", "1", "--lr", "1e-2", "--layer_decay", "0.8"]
PAPER = ["--layer_scale_init_value", "0", "--disable_rel_pos_bias", "--abs_pos_emb", "--use_cls"]
PAPER += ["--imagenet_default_mean_and_std", "--mixup", "0.8", "--cutmix", "1"]


EXTRACT = "eval_finetuning/extract_backbone_weights_for_finetuning.py"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> str:
    return files.pretrained(tmp_path_factory.mktemp("pretraining"), *files.SIXTEEN)


def state_of(folder: Path, name: str = "checkpoint.pth") -> dict[str, Any]:
    return distributed.load(str(folder / name))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# ---- goldens

MAINS = {
    "eval/eval_finetuning/eval_finetuning.py": main_finetune,
    "eval/eval_finetuning/extract_backbone_weights_for_finetuning.py": extract,
    "eval/eval_linear/eval_linear.py": main_linprobe,
}


@golden_files("udi", "manifest", ".json")
def test_flags_and_defaults(path):
    flags = load_golden(path)["flags"]
    for name, module in MAINS.items():
        parser = module.get_args_parser()
        actions = {option: action for action in parser._actions for option in action.option_strings}
        defaults = vars(parser.parse_args([]))
        for flag, ref in flags[name].items():
            action = actions[flag]
            assert action.dest == ref["dest"], flag
            assert action.nargs == (0 if ref["action"] in ("StoreTrue", "StoreFalse") else ref.get("nargs")), flag
            kind = getattr(action.type or str, "__name__", "")
            assert kind == {"bool_flag": "boolean", None: "str"}.get(ref["type"], ref["type"]), flag
            if flag == "--device":  # ours: CUDA where present
                assert (ref["default"], defaults["device"]) == ("cuda", "auto")
            else:
                assert defaults[ref["dest"]] == ref["default"], f"{name} {flag}"


@golden_files("udi", "eval_two_cls")
def test_extraction(path, tmp_path):
    """Upstream's names with --raw, those of the ViT without; nothing is left unchanged in value."""
    ref = load_golden(path)
    teacher = {name.removeprefix("sd/teacher/"): ref[name] for name in ref.arrays if name.startswith("sd/teacher/")}
    source, target = tmp_path / "checkpoint.pth", tmp_path / "new" / "vit.pth"
    torch.save({"teacher": teacher, "epoch": 3}, source)
    flags = ["--checkpoint", str(source), "--output", str(target), "--checkpoint_key", "teacher"]
    run_main(extract, *flags, "--raw")
    raw = distributed.load(str(target))
    ref.equal("all_extracted", sorted(raw))
    assert all(torch.equal(value, teacher[f"backbone.{name}"]) for name, value in raw.items())
    again = load_backbone(str(target))
    run_main(extract, *flags)
    plain = distributed.load(str(target))
    assert plain.keys() == again.keys()
    assert all(torch.equal(value, teacher[f"backbone.backbone.{name}"]) for name, value in plain.items())
    assert all(torch.equal(value, again[name]) for name, value in plain.items())
    assert [p.name for p in target.parent.iterdir()] == ["vit.pth"]


# ---- from a pre-training checkpoint to an accuracy


def test_extract_fine_tune_evaluate(digits, pretrained, tmp_path, capsys):
    vit = tmp_path / "vit.pth"
    run_main(extract, "--checkpoint", pretrained, "--output", str(vit), "--checkpoint_key", "teacher")
    own = [*SMALL, *PAPER, "--data_path", digits, "--finetune", str(vit)]
    run_main(main_finetune, *own)
    out = capsys.readouterr().out
    assert "2 class tokens, all are fine-tuned, the first one is classified" in out
    assert "tensors matched; missing: head (2); unexpected: none" in out
    folder = tmp_path / "fine-tuning-2-1-b-8-lr-1.000e-02-0.10-0.80-0.00-pos-1-cls-0-aug-0.8-1.0"
    state = state_of(folder)
    assert {"model", "optimizer", "epoch", "args"} <= set(state)
    assert (state["epoch"], state["model"]["cls_token"].shape) == (1, (1, 2, 96))
    assert (folder / "checkpoint-best.pth").exists()
    log = lines(folder)
    names = ["train_lr", "train_min_lr", "train_loss", "train_loss_scale", "train_weight_decay", "train_grad_norm"]
    assert [list(line) for line in log] == [
        [*names, "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"]
    ] * 2
    assert list(folder.glob("events.out.tfevents*"))
    run_main(main_finetune, *own, "--eval")
    assert f"* Acc@1 {log[-1]['test_acc1']:.3f}" in capsys.readouterr().out
    best = max(log, key=lambda line: line["test_acc1"])
    run_main(main_finetune, *own, "--eval", "--resume", str(folder / "checkpoint-best.pth"))
    assert f"* Acc@1 {best['test_acc1']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("own", "words", "tokens"),
    [
        (PAPER, "2 class tokens, all are fine-tuned, the first one is classified", 2),
        pytest.param(
            [*PAPER, "--class_tokens", "first"],
            "only the first one is fine-tuned: --class_tokens first",
            1,
            marks=pytest.mark.slow,
        ),
        ([], "only the first one is fine-tuned: relative positions know only one", 1),
        (["--disable_rel_pos_bias"], "2 class tokens, all are fine-tuned, none is classified", 2),
        pytest.param(
            ["--disable_rel_pos_bias", "--abs_pos_emb", "--disable_learned_abs_pos_emb"],
            "none is classified",
            2,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["paper", "first", "defaults", "no-positions", "fixed-positions"],
)
def test_class_tokens(digits, pretrained, tmp_path, own, words, tokens, capsys):
    """Of a pre-training checkpoint as it is; its patch size is taken, and kept by the run that goes on."""
    flags = [*SMALL, *own, "--data_path", digits, "--finetune", pretrained, "--output_dir", str(tmp_path)]
    flags += ["--patch_size", "16", "--disable_eval_during_finetuning"]
    run_main(main_finetune, *flags, "--epochs", "1", "--warmup_epochs", "0", "--lr", "0", "--min_lr", "0")
    out = capsys.readouterr().out
    assert words in out
    assert "--patch_size 16: the checkpoint has patches of 4 pixels, taken" in out
    state, before = state_of(tmp_path)["model"], load_backbone(pretrained)
    assert state["cls_token"].shape == (1, tokens, 96)
    for name in state:
        if name.startswith("blocks.") and name in before:
            assert torch.equal(state[name], before[name]), name
    run_main(main_finetune, *flags)
    assert "is not read" in capsys.readouterr().out
    assert state_of(tmp_path)["epoch"] == 1


def test_student_and_scratch(digits, pretrained, tmp_path, monkeypatch):
    own = [*SMALL, *PAPER, "--data_path", digits, "--epochs", "1", "--warmup_epochs", "0", "--lr", "0", "--min_lr", "0"]
    own += ["--disable_eval_during_finetuning", "--mixup", "0", "--cutmix", "0", "--log_dir", str(tmp_path / "events")]
    folder = tmp_path / "student"
    run_main(main_finetune, *own, "--finetune", pretrained, "--checkpoint_key", "student", "--output_dir", str(folder))
    expected = load_backbone(pretrained, "student")
    state = state_of(folder)["model"]
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert list((tmp_path / "events").iterdir())
    assert list(lines(folder)[0])[3] == "train_class_acc"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_main(main_finetune, *own, "--output_dir", "", "--log_dir", "./test_exp/")
    assert not list(Path().iterdir())
    run_main(main_finetune, *own, "--no_save_ckpt", "--log_dir", "./test_exp/")
    (folder,) = Path().iterdir()
    assert folder.name.startswith("fine-tuning-1-0-b-8-")
    assert not list(folder.glob("*.pth"))


# ---- stops


@pytest.mark.parametrize("stop", [pytest.param(True, marks=pytest.mark.slow), False], ids=["signal", "nan"])
def test_stop_inside_an_epoch_loses_nothing(digits, tmp_path, monkeypatch, stop, capsys):
    own = [*SMALL, "--data_path", digits, "--epochs", "3", "--update_freq", "2", "--drop_path", "0.2"]
    own += ["--drop", "0.1", "--mixup", "0.8", "--cutmix", "1", "--model_ema", "--model_ema_decay", "0.9"]
    run_main(main_finetune, *own, "--output_dir", str(tmp_path / "whole"))
    part = [*own, "--output_dir", str(tmp_path / "part")]
    with monkeypatch.context() as patch:
        spoil(patch, VisionTransformer, 9, stop)
        with pytest.raises(SystemExit) as end:
            run_main(main_finetune, *part)
    assert end.value.code == (128 + signal.SIGTERM if stop else 1)
    broken = str(tmp_path / "part" / "checkpoint-nonfinite.pth")
    run_main(main_finetune, *part, *([] if stop else ["--resume", broken]))
    assert "resumed" in capsys.readouterr().out
    assert_same(tmp_path / "whole", tmp_path / "part")
    state = state_of(tmp_path / "part")
    assert any(not torch.equal(state["model_ema"][k], v) for k, v in state["model"].items())


def test_empty_resume_starts_anew(digits, tmp_path):
    own = [*SMALL, "--data_path", digits, "--epochs", "1", "--warmup_epochs", "0", "--output_dir", str(tmp_path)]
    own += ["--disable_eval_during_finetuning"]
    run_main(main_finetune, *own)
    run_main(main_finetune, *own)
    assert len(lines(tmp_path)) == 1
    run_main(main_finetune, *own, "--resume", "")
    assert len(lines(tmp_path)) == 2


def test_surplus_batches_are_skipped(digits, tmp_path, monkeypatch, capsys):
    """48 images make 5 batches of 9, which are 2 updates of 2: neither computed nor counted is the fifth."""
    own = [*SMALL, "--data_path", digits, "--batch_size", "9", "--update_freq", "2", "--lr", "0.01", "--min_lr", "0.01"]
    own += ["--disable_eval_during_finetuning", "--output_dir", str(tmp_path)]
    plain, calls = VisionTransformer.forward, []

    def counted(self, imgs):
        calls.extend([len(imgs)] * self.training)  # not the forward pass that measures memory
        return plain(self, imgs)

    monkeypatch.setattr(VisionTransformer, "forward", counted)
    run_main(main_finetune, *own)
    assert calls == [9] * 8
    state = state_of(tmp_path)
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {4}
    assert (state["epoch"], state["images"]) == (1, 0)
    # Of 2 processes each has 9 of 17 images, of which upstream counts 17 // 6 = 2 updates.
    images: Any = [None] * 17
    options = {"num_workers": 0, "accum_iter": 1, "whole_updates": True}
    assert len(datasets.Loader(images, str, 3, torch.device("cpu"), **options)) == 5
    monkeypatch.setattr("common.datasets.loader.world_size", lambda: 2)
    assert len(datasets.Loader(images, str, 3, torch.device("cpu"), **options)) == 2


def test_eval_takes_what_finetune_names(digits, tmp_path, capsys):
    """Where the output folder has no checkpoint."""
    own = [*SMALL, "--data_path", digits, "--epochs", "1", "--warmup_epochs", "0"]
    run_main(main_finetune, *own, "--output_dir", str(tmp_path / "first"))
    (line,) = lines(tmp_path / "first")
    capsys.readouterr()
    own += ["--eval", "--finetune", str(tmp_path / "first" / "checkpoint.pth")]
    run_main(main_finetune, *own, "--output_dir", str(tmp_path / "second"))
    assert f"* Acc@1 {line['test_acc1']:.3f}" in capsys.readouterr().out


# ---- transforms


def test_transforms_of_flags():
    parser = main_finetune.get_args_parser()
    train, val = main_finetune.build_transforms(parser.parse_args([]))
    names = [type(step).__name__ for step in train.transforms]
    assert names[1:3] == ["RandomHorizontalFlip", "RandAugment"]
    assert isinstance(train.transforms[-1], RandomErasing)
    for size, flags, resized in ((224, [], 256), (384, [], 384), (64, ["--crop_pct", "0.5"], 128)):
        train, val = main_finetune.build_transforms(parser.parse_args(["--input_size", str(size), *flags]))
        assert val.transforms[0].size == resized
        assert val.transforms[0].interpolation == transforms.InterpolationMode.BILINEAR
    train, _ = main_finetune.build_transforms(parser.parse_args(["--input_size", "32"]))
    resize, crop, *_ = train.transforms
    assert (resize.size, crop.size, crop.padding) == (32, (32, 32), 4)


# ---- aliases


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["eval_finetuning", "eval/eval_finetuning"])
def test_aliases_with_two_processes(digits, pretrained, tmp_path, launch, run_script, folder):
    cwd = ROOT / "udi" / folder
    vit = str(tmp_path / "vit.pth")
    flags = ["--checkpoint", pretrained, "--output", vit, "--checkpoint_key", "teacher"]
    run_script("extract_backbone_weights_for_finetuning.py", *flags, cwd=cwd)
    own = [*SMALL, *PAPER, "--batch_size", "4", "--data_path", digits, "--output_dir", str(tmp_path / "out")]
    done = launch(2, "eval_finetuning.py", *own, "--finetune", vit, cwd=cwd)
    assert "48 images, 8 per update" in done.stdout
    assert len(lines(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("alias", "script"),
    [
        ("eval_linear_probing/eval_linear.py", "main_linprobe.py"),
        ("eval/eval_linear/eval_linear.py", "main_linprobe.py"),
        ("eval_finetuning/eval_finetuning.py", "main_finetune.py"),
        ("eval/eval_finetuning/eval_finetuning.py", "main_finetune.py"),
        (f"eval/{EXTRACT}", EXTRACT),
    ],
)
def test_aliases_only_forward(alias, script, monkeypatch):
    path, called = ROOT / "udi" / alias, []
    assert len(path.read_text().splitlines()) <= 10
    forward = runpy.run_path
    with monkeypatch.context() as patch:
        patch.setattr(runpy, "run_path", lambda *args, **kwargs: called.append((args, kwargs)))
        forward(str(path))
    assert called == [((str(ROOT / "udi" / script),), {"run_name": "__main__"})]


# ---- users' mistakes on the command line: one line, exit status 2, nothing written

BAD = [
    (["--data_path", "/nowhere"], "--data_path /nowhere: no such folder"),
    (["--model", "deit_small_patch16_224"], "--model deit_small_patch16_224: expected one of vit_tiny, vit_small"),
    (["--nb_classes", "3"], "--nb_classes 3: the training images have 10 classes"),
    (["--enable_deepspeed"], "--enable_deepspeed: DeepSpeed is not supported; leave it out"),
    (["--batch_size", "7", "--mixup", "1"], "--batch_size 7: Mixup and CutMix need an even number"),
    (["--cutmix_minmax", "0.5"], "--cutmix_minmax 0.5: expected two shares, 0 to 1"),
    (["--update_freq", "7"], "7: an epoch has only 6 batches"),
    (["--layer_decay", "0"], "--layer_decay 0.0: expected"),
    (["--model_ema_decay", "2"], "--model_ema_decay 2.0: expected 0 to 1"),
    (["--drop", "2"], "--model vit_nano: "),
    (["--attn_drop_rate", "1.5"], "--model vit_nano: a share of 1.5 of the attention"),
    (["--crop_pct", "-1"], "--crop_pct -1.0: expected a share of the side"),
    (["--aa", "nonsense"], "--aa nonsense"),
    (["--remode", "nonsense"], "--remode nonsense"),
    (["--train_interpolation", "cubic", "--input_size", "36"], "--train_interpolation"),
    (["--opt", "lion9"], "--opt lion9 and its flags: "),
    (["--opt_betas", "0.9"], "--opt adamw and its flags: "),
    (["--opt_betas", "0.9", "2"], "--opt adamw and its flags: "),
    (["--input_size", "18"], "image size 18 is not a multiple of the patch size 4"),
    (["--patch_size", "0"], "--patch_size 0: expected at least 1"),
    (["--finetune", "missing.pth"], "missing.pth: no such checkpoint file"),
    (["--finetune", "/etc/hostname"], "/etc/hostname: not a checkpoint"),
    (
        ["--finetune", "PRETRAINED", "--model", "vit_tiny"],
        "check --model, --input_size and the positions' flags: 96 weights",
    ),
    (["--finetune", "EMPTY"], "EMPTY: holds no ViT under 'teacher'"),
    (["--finetune", "PRETRAINED", "--checkpoint_key", "head"], "holds no ViT under 'head'"),
    (["--finetune", "PRETRAINED", "--model_prefix", "vit."], "holds no ViT under names that start with vit."),
    (["--eval"], "--eval: name the checkpoint to evaluate with --resume"),
    (["--eval", "--resume", "missing.pth"], "missing.pth: no such checkpoint file"),
    (["--resume", "PRETRAINED"], "PRETRAINED: holds no weights under "),
    (["--device", "cuda"], "--device cuda: no CUDA device"),
    (["--amp_dtype", "fp16"], "--amp_dtype fp16: needs a GPU"),
    (["--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere: cannot be written"),
    (["--log_dir", "/proc/nowhere"], "/proc/nowhere"),
]


@pytest.mark.parametrize(("own", "expected"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_mistakes_are_one_line(own, expected, tmp_path, digits, pretrained, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "epoch": 1}, empty := str(tmp_path / "empty"))
    names = {"PRETRAINED": pretrained, "EMPTY": empty}
    own = [names.get(word, word) for word in own]
    for name, value in names.items():
        expected = expected.replace(name, value)
    error = mistake(main_finetune, *SMALL, "--data_path", digits, "--output_dir", "out", *own, capsys=capsys)
    assert expected in error
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([], "--checkpoint: must be given"),
        (["--checkpoint", "PRETRAINED"], "--output: must be given"),
        (["--checkpoint", "missing.pth", "--output", "x.pth"], "missing.pth: no such checkpoint file"),
        (["--checkpoint", "PRETRAINED", "--output", "x.bin"], "--output x.bin: expected a file that ends in .pth"),
        (["--checkpoint", "PRETRAINED", "--output", "x.pth"], "holds no ViT under 'state_dict'"),
        (["--checkpoint", "PRETRAINED", "--output", "x.pth", "--raw"], "has no key 'state_dict'; its keys: student, "),
        (
            ["--checkpoint", "PRETRAINED", "--output", "/proc/x/x.pth", "--checkpoint_key", "teacher"],
            "--output /proc/x/x.pth: cannot be written",
        ),
        (
            ["--checkpoint", "PRETRAINED", "--output", "x.pth", "--checkpoint_key", "optimizer", "--raw"],
            "holds no backbone under 'optimizer'",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_of_extraction(own, expected, tmp_path, pretrained, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = [pretrained if word == "PRETRAINED" else word for word in own]
    assert expected in mistake(extract, *own, capsys=capsys)
    assert not list(tmp_path.iterdir())
