"""Exports of every kind of checkpoint of all five methods: what they hold, and what is refused."""

import argparse
import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from a2mim.losses import MIMLoss
from a2mim.models_a2mim import build_classifier, build_masked
from a2mim.openmixup import to_openmixup_state_dict
from cae import main_linprobe as cae_linprobe
from cae import models_cae
from cae import models_vit as cae_vit
from common import distributed
from saim import main_linprobe as saim_linprobe
from saim import models_saim
from saim import models_vit as saim_vit
from scripts.tools import export, runs
from scripts.tools.encoders import load as encoders
from semaim import models_semaim
from semaim import models_vit as semaim_vit
from tests.support.helpers import assert_close
from tests.support.runs import mistake, run_main
from udi import models_finetune, models_udi

SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8}


def randomised(model: Any) -> Any:
    """Every parameter and running statistic off its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * (torch.rand(value.shape, generator=generator) - 0.3))
    return model.eval()


def checkpoint(network: Any, key: str = "model", /, **args) -> dict[str, Any]:
    return {
        key: randomised(network).state_dict(),
        "epoch": 2,
        "args": {"data_path": "/some/where/images", "epochs": 3, **args},
    }


def openmixup(model: Any, **args) -> dict[str, Any]:
    return {"state_dict": to_openmixup_state_dict(randomised(model)), "meta": {"epoch": 3}, "args": args}


def probed(model: Any, linprobe: Any) -> Any:
    linprobe.add_probe(model)
    return model


# By method and kind: what makes a checkpoint, and the number of classes.
KINDS: dict[str, tuple[Callable[[], dict[str, Any]], int]] = {
    "saim pretrained": (lambda: checkpoint(models_saim.saim_nano(**SIZE, query_depth=2), model="saim_nano"), 0),
    "saim tuned": (lambda: checkpoint(saim_vit.vit_nano_patch16(**SIZE, num_classes=7, global_pool=True)), 7),
    "saim probed": (
        lambda: checkpoint(probed(saim_vit.vit_nano_patch16(**SIZE, num_classes=7, global_pool=False), saim_linprobe)),
        7,
    ),
    "semaim pretrained": (
        lambda: checkpoint(models_semaim.aim_nano(**SIZE, query_depth=2), "state_dict", model="aim_nano"),
        0,
    ),
    "semaim tuned": (lambda: checkpoint(semaim_vit.vit_nano_patch16(**SIZE, num_classes=7, global_pool=True)), 7),
    "cae pretrained": (lambda: checkpoint(models_cae.cae_nano(**SIZE), model="cae_nano"), 0),
    "cae tuned": (
        lambda: checkpoint(cae_vit.cae_nano(**SIZE, num_classes=7, use_rel_pos_bias=True, init_values=0.1)),
        7,
    ),
    "cae probed": (
        lambda: checkpoint(
            probed(cae_vit.cae_nano(**SIZE, num_classes=7, lin_probe=True, use_mean_pooling=False), cae_linprobe)
        ),
        7,
    ),
    "cae attentive": (
        lambda: checkpoint(
            cae_vit.cae_nano(**SIZE, num_classes=7, lin_probe=True, use_mean_pooling=False, linear_type="attentive")
        ),
        0,
    ),
    "a2mim pretrained vit": (lambda: openmixup(build_masked("vit_nano", MIMLoss(), **SIZE), backbone="vit_nano"), 0),
    "a2mim tuned vit": (lambda: openmixup(build_classifier("vit_nano", 7, **SIZE), val_crop=32, val_resize=37), 7),
    "a2mim pretrained resnet": (lambda: openmixup(build_masked("resnet_nano", MIMLoss(), 64), input_size=32), 0),
    "a2mim tuned resnet": (lambda: openmixup(build_classifier("resnet_nano", 7), val_crop=32, val_resize=37), 7),
    "a2mim pretrained convnext": (lambda: openmixup(build_masked("convnext_nano", MIMLoss(), 64), input_size=32), 0),
    "a2mim tuned convnext": (lambda: openmixup(build_classifier("convnext_nano", 7), val_crop=32, val_resize=37), 7),
    "udi pretrained": (
        lambda: checkpoint(
            models_udi.MODELS["vit_nano"](img_size=[32], patch_size=8, num_class_token=2), "teacher", arch="vit_nano"
        ),
        0,
    ),
    "udi tuned": (
        lambda: checkpoint(
            models_finetune.MODELS["vit_nano"](**SIZE, num_classes=7, use_rel_pos_bias=True, init_values=0.1),
            rel_pos_bias=True,
        ),
        7,
    ),
}


def written(tmp_path: Path, kind: str) -> tuple[str, str]:
    """Method and path of a checkpoint."""
    torch.save(KINDS[kind][0](), tmp_path / "checkpoint.pth")
    return kind.split()[0], str(tmp_path / "checkpoint.pth")


def load(method: str, path: str, **given) -> Any:
    return encoders.load_backbone(method, path, **given)


def images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "checkpoint.pth")


def kinds(*first: str) -> list[Any]:
    """All kinds of checkpoints; those that are not named cost the default suite more time than they tell."""
    return [pytest.param(kind, marks=[] if kind in first else pytest.mark.slow) for kind in KINDS]


@pytest.mark.parametrize("kind", kinds("saim probed", "cae tuned", "a2mim tuned resnet", "udi pretrained"))
def test_timm_folder(kind, tmp_path, capsys):
    """timm alone gives the features, and the logits, of the checkpoint's own network."""
    method, path = written(tmp_path, kind)
    out = tmp_path / "deep" / "out"
    run_main(export, method, path, str(out))
    assert "in float64: largest difference of features" in capsys.readouterr().out
    assert left_over(out) == ["README.md", "config.json", "model.safetensors"]
    assert left_over(out.parent) == ["out"]
    own, classes = load(method, path), KINDS[kind][1]
    model: Any = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    imgs = images(own.input_size)
    with torch.no_grad():
        features = model.double().forward_head(model.forward_features(imgs.double()), pre_logits=True)
        expected = own.double()(imgs.double())
        assert_close(features, expected, rtol=1e-5, atol=1e-6)
        assert model.num_classes == classes
        if classes:
            assert_close(model(imgs.double()), own.head(expected), rtol=1e-5, atol=1e-6)
    again = load(method, str(out / "model.safetensors"), model=own.model_name, input_size=own.input_size, pool=own.pool)
    assert_close(again.double()(imgs.double()), expected, rtol=1e-5, atol=1e-6)
    config = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined]
    assert tuple(config["input_size"]) == (3, own.input_size, own.input_size)
    assert (tuple(config["mean"]), tuple(config["std"]), config["crop_pct"]) == (own.mean, own.std, own.crop_pct)
    assert config["interpolation"] == own.interpolation


@pytest.mark.parametrize("kind", kinds("saim probed", "semaim pretrained", "cae tuned", "udi tuned"))
def test_safetensors_file(kind, tmp_path):
    """The method reads it back to the bit, with its sizes, without any flag."""
    method, path = written(tmp_path, kind)
    out = tmp_path / "out.safetensors"
    run_main(export, method, path, str(out), "--format", "safetensors")
    assert left_over(tmp_path) == ["out.safetensors"]
    (tmp_path / "plain").touch()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    own, again = load(method, path), load(method, str(out))
    imgs = images(own.input_size)
    with torch.no_grad():
        assert torch.equal(own(imgs), again(imgs))
        if own.head is not None:
            assert torch.equal(own.head(own(imgs)), again.head(again(imgs)))
    for name in ("model_name", "input_size", "patch_size", "embed_dim", "pool", "mean", "std", "crop_pct"):
        assert getattr(own, name) == getattr(again, name), name


def test_safetensors_file__is_a_checkpoint_to_the_mains(tmp_path):
    method, path = written(tmp_path, "cae pretrained")
    out = str(tmp_path / "out.safetensors")
    run_main(export, method, path, out, "--format", "safetensors")
    again = str(tmp_path / "again.safetensors")
    run_main(export, method, path, again, "--format", "safetensors")
    assert Path(again).read_bytes() == Path(out).read_bytes()
    half = str(tmp_path / "half.safetensors")
    run_main(export, method, path, half, "--format", "safetensors", "--half")
    assert Path(half).stat().st_size < 0.6 * Path(out).stat().st_size
    models = [cae_vit.cae_nano(**SIZE, num_classes=3, init_values=0.1) for _ in range(3)]
    for model, file in zip(models, (path, out, half), strict=True):
        cae_vit.load_encoder(model, file)
    own, whole, rounded = (model.eval().forward_features(images()) for model in models)
    assert torch.equal(own, whole)
    assert_close(rounded, own, rtol=1e-2, atol=1e-2)  # 11 bits of a weight


def test_safetensors_file__tells_nothing_of_the_machine(tmp_path):
    method, path = written(tmp_path, "saim pretrained")
    state = torch.load(path, weights_only=False)
    state["args"] |= {"data_path": "/home/me/photos", "output_dir": "runs", "initial_checkpoint": "/home/me/a.pth"}
    torch.save(state, path)
    out = tmp_path / "out.safetensors"
    run_main(export, method, path, str(out), "--format", "safetensors")
    flags = load(method, str(out)).args
    assert not {"output_dir", "initial_checkpoint"} & flags.keys() and "/home/me" not in str(flags)
    run_main(export, method, str(out), str(tmp_path / "timm"))
    card = (tmp_path / "timm" / "README.md").read_text()
    assert "- **Trained on:** photos\n- **Epochs:** 3\n" in card
    assert not any(
        f"\n  - {flag}: " in card for flag in ("data_path", "exported_from", "input_size", "model", "method")
    )


OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("cae tuned", "a2mim tuned convnext")]


@pytest.mark.parametrize("kind", ["a2mim pretrained vit", "udi pretrained", *OTHERS])
def test_another_size_and_pooling(kind, tmp_path):
    method, path = written(tmp_path, kind)
    pool = "avg" if "pretrained" in kind else ""
    flags = ["--input_size", "48", *(["--pool", pool] if pool else [])]
    run_main(export, method, path, str(tmp_path / "out"), *flags)
    run_main(export, method, path, str(tmp_path / "out.safetensors"), "--format", "safetensors", *flags)
    own = load(method, path, input_size=48, pool=pool)
    args = argparse.Namespace(
        method="timm", checkpoint=str(tmp_path / "out"), model="", input_size=None, key="", pool=""
    )
    with torch.no_grad():
        expected = own(images(48))
        assert torch.equal(load(method, str(tmp_path / "out.safetensors"))(images(48)), expected)
        assert_close(encoders.from_flags(args)(images(48)), expected, rtol=1e-4, atol=1e-4)


def test_config_and_card(tmp_path, monkeypatch, capsys):
    """The card tells the run, not the machine; its code runs as pasted."""
    method, path = written(tmp_path, "cae tuned")
    (tmp_path / "names.txt").write_text("".join(f"class {i}\n" for i in range(7)))
    run_main(export, method, path, str(tmp_path / "out"), "--classes", str(tmp_path / "names.txt"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("beit_base_patch16_224", 7, 96)
    assert (config["global_pool"], config["label_names"][6]) == ("avg", "class 6")
    assert config["pretrained_cfg"]["classifier"] == "head"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\ntags:\n- image-classification\n- timm\n- cae\n")
    assert "license: other" in card
    assert runs.sha256(path) in card
    assert "- **Trained on:** images\n- **Epochs:** 3\n" in card
    assert runs.sha256(str(tmp_path / "out" / "model.safetensors")) in card
    assert str(tmp_path) not in card
    assert "/some" not in card
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    exec(code[1], {})
    assert "torch.Size([1, 96])" in capsys.readouterr().out


def test_card__has_results_but_no_flags_of_the_machine(tmp_path):
    flags = {"num_workers": 10, "device": "cuda", "data_path": "/a/images", "finetune": "/a/b.pth", "lr": 1e-3}
    flags |= {"gpu": 3, "dist_url": "env://", "output_dir": "runs/x", "epochs": 5, "dataset": "torch/cifar10"}
    torch.save(checkpoint(saim_vit.vit_nano_patch16(**SIZE, num_classes=7), **flags), tmp_path / "checkpoint.pth")
    lines = [{"epoch": e, "train_loss": 2.0 - e, "test_acc1": 50.0 + e, "test_acc5": 90.0} for e in range(5)]
    (tmp_path / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_main(export, "saim", str(tmp_path / "checkpoint.pth"), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- **Epochs:** 3 of 5\n" in card and "- **Trained on:** torch/cifar10\n" in card
    assert re.search(r"Measured in that training:\*\* top-1 52\.0.*, loss in training 0\n", card)
    assert re.findall(r"^  - (\w+): `", card, re.MULTILINE) == ["dataset", "lr"]
    assert "/a" not in card and "runs/x" not in card


class Hub:
    """A stand-in for the hub, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def create_repo(self, name: str, exist_ok: bool) -> None:
        if name.startswith("another/"):
            raise RuntimeError("403 Forbidden:\n you are not in another")
        (self.folder / name).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    def download(self, repo_id: str, filename: str, **_) -> str:
        path = self.folder / repo_id / filename
        if not path.exists():
            raise EntryNotFoundError(filename)
        return str(path)


def test_push(tmp_path, monkeypatch, capsys):
    """What is sent is what timm loads from there; a dry run sends nothing."""
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", hub.download)
    method, path = written(tmp_path, "saim tuned")
    run_main(export, method, path, str(tmp_path / "dry"), "--push", "me/nano", "--dry_run")
    said = capsys.readouterr().out
    assert "would send model.safetensors" in said and "nothing was sent" in said
    assert not hub.folder.exists()
    run_main(export, method, path, str(tmp_path / "out"), "--push", "me/nano")
    assert "sent to https://hub/me/nano" in capsys.readouterr().out
    assert 'timm.create_model("hf-hub:me/nano", pretrained=True)' in (hub.folder / "me/nano/README.md").read_text()
    places = "hf-hub:me/nano", f"local-dir:{tmp_path / 'out'}"
    models = [timm.create_model(place, pretrained=True).eval() for place in places]
    assert torch.equal(models[0](images()), models[1](images()))
    refused = mistake(export, method, path, str(tmp_path / "third"), "--push", "another/nano", capsys=capsys)
    assert "--push another/nano: 403 Forbidden: you are not in another" in refused
    assert (tmp_path / "third" / "config.json").exists()


@pytest.mark.parametrize(
    "flags", [["--push", "nano"], ["--push", "a/b/c"], ["--dry_run"], ["--push", "a/b", "--format", "safetensors"]]
)
def test_push__mistakes(flags, tmp_path, capsys):
    method, path = written(tmp_path, "saim tuned")
    assert "--push" in mistake(export, method, path, str(tmp_path / "out.safetensors"), *flags, capsys=capsys)
    assert left_over(tmp_path) == []


def test_names_of_classes__are_those_of_the_checkpoint(tmp_path):
    names = [f"class {i}" for i in range(7)]
    torch.save(checkpoint(saim_vit.vit_nano_patch16(**SIZE, num_classes=7), class_names=names), tmp_path / "a.pth")
    run_main(export, "saim", str(tmp_path / "a.pth"), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == names
    assert "class_names" not in (tmp_path / "out" / "README.md").read_text()
    run_main(export, "saim", str(tmp_path / "a.pth"), str(tmp_path / "a.safetensors"), "--format", "safetensors")
    assert load("saim", str(tmp_path / "a.safetensors")).args["class_names"] == names


def test_notes_tell_what_is_left_out(tmp_path, capsys):
    method, path = written(tmp_path, "cae attentive")
    run_main(export, method, path, str(tmp_path / "out"))
    note = "The attentive probe's query and head, which timm cannot express, are left out."
    assert note in capsys.readouterr().out
    assert note in (tmp_path / "out" / "README.md").read_text()


def test_overwrite(tmp_path, capsys):
    """An earlier export is replaced on demand, anything else never."""
    method, path = written(tmp_path, "a2mim tuned resnet")
    for form, name in (("timm", "out"), ("safetensors", "out.safetensors")):
        out = str(tmp_path / name)
        run = [method, path, out, "--format", form]
        run_main(export, *run)
        assert f"OUT {out}: exists; --overwrite replaces it" in mistake(export, *run, capsys=capsys)
        (tmp_path / "out" / "more").touch()
        run_main(export, *run, "--overwrite")
    run_main(export, method, path, str(tmp_path / "out"), "--overwrite")
    assert left_over(tmp_path / "out") == ["README.md", "config.json", "model.safetensors"]
    assert left_over(tmp_path) == ["out", "out.safetensors"]
    (tmp_path / "empty").mkdir()
    run_main(export, method, path, str(tmp_path / "empty"))
    assert left_over(tmp_path / "empty") == left_over(tmp_path / "out")


def test_mistakes(tmp_path, capsys):
    method, path = written(tmp_path, "a2mim tuned resnet")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (tmp_path / "file.safetensors").write_text("mine")
    (tmp_path / "six.txt").write_text("a\n" * 6)
    Path(tmp_path / "damaged.pth").write_bytes(Path(path).read_bytes()[:999])
    before = left_over(tmp_path)
    new = str(tmp_path / "new" / "out")
    form = ["--format", "safetensors"]
    cases = [
        ([method, path, str(other), "--overwrite"], "exists and was not written by this script, expected a new name"),
        ([method, path, str(tmp_path / "file.safetensors"), *form, "--overwrite"], "was not written by this script"),
        ([method, path, str(tmp_path / "six.txt")], "is a file, which --format timm does not write"),
        ([method, path, str(other), *form], "expected a name that ends in .safetensors"),
        ([method, path, f"{path}/out"], "checkpoint.pth/out: cannot be written (File exists)"),
        (
            [method, path, new, "--classes", str(tmp_path / "six.txt")],
            "six.txt: has 6 lines, the checkpoint has 7 classes",
        ),
        ([method, path, new, "--classes", str(tmp_path / "none.txt")], "none.txt: cannot be read"),
        ([method, path, f"{new}.safetensors", *form, "--classes", path], "--classes: only a timm folder has names"),
        ([method, path, new, "--half"], "--half: expected --format safetensors"),
        ([method, path, new, "--model", "resnet50"], "is no resnet50; check --model"),
        ([method, path, new, "--key", "ema"], "holds no weights under 'ema'; its keys: state_dict"),
        ([method, str(tmp_path / "damaged.pth"), new], "damaged.pth: truncated or not a checkpoint"),
        ([method, str(tmp_path / "none.pth"), new], "none.pth: no such checkpoint file"),
        ([method, "random", new, "--model", "resnet_nano"], "CHECKPOINT random: expected a checkpoint file"),
        ([method, str(other), new], "other: expected a checkpoint file or https address"),
    ]
    for flags, message in cases:
        assert message in mistake(export, *flags, capsys=capsys)
        assert left_over(tmp_path) == before, flags


@pytest.mark.parametrize("form", ["timm", "safetensors"])
def test_full_disk(form, tmp_path, capsys, monkeypatch):
    """One line, and nothing but what was there, an earlier export included."""
    method, path = written(tmp_path, "a2mim tuned resnet")
    out = tmp_path / "old" / ("out.safetensors" if form == "safetensors" else "out")
    run_main(export, method, path, str(out), "--format", form)
    before = (out if form == "safetensors" else out / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export.os, "fsync", full)
    for target in (out, tmp_path / "new" / out.name):
        error = mistake(export, method, path, str(target), "--format", form, "--overwrite", capsys=capsys)
        assert f"OUT {target}: cannot be written (No space left on device)" in error
    assert left_over(tmp_path) == ["old"]
    assert left_over(out.parent) == [out.name]
    assert (out if form == "safetensors" else out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("form", ["timm", "safetensors"])
def test_disagreement__leaves_nothing_and_status_1(form, tmp_path, capsys, monkeypatch):
    method, path = written(tmp_path, "a2mim tuned resnet")
    plain = export.save_for_hf, export.save_file

    def spoil(weights: dict[str, Tensor]) -> None:
        next(value for name, value in weights.items() if name.endswith("bn1.weight")).mul_(1.01)

    def save_for_hf(model, *args, **kwargs):
        spoil(model.state_dict())
        plain[0](model, *args, **kwargs)

    def save_file(weights, *args, **kwargs):
        spoil(weights)
        plain[1](weights, *args, **kwargs)

    monkeypatch.setattr(export, "save_for_hf", save_for_hf)
    monkeypatch.setattr(export, "save_file", save_file)
    out = tmp_path / ("out.safetensors" if form == "safetensors" else "out")
    with pytest.raises(SystemExit) as end:
        run_main(export, method, path, str(out), "--format", form)
    assert end.value.code == 1
    assert re.search(r"features of .* differ by .*, expected at most 1e-05", capsys.readouterr().err)
    assert left_over(tmp_path) == []


def test_networks_that_timm_lacks__are_refused(tmp_path, capsys):
    model = cae_vit.cae_nano(**SIZE, num_classes=7, lin_probe=True, use_rel_pos_bias=True)
    torch.save(checkpoint(probed(model, cae_linprobe)), tmp_path / "checkpoint.pth")
    flags = ["cae", str(tmp_path / "checkpoint.pth"), str(tmp_path / "out")]
    assert "--format safetensors keeps it as it is" in mistake(export, *flags, capsys=capsys)
    run_main(export, *flags[:2], str(tmp_path / "out.safetensors"), "--format", "safetensors")
    assert left_over(tmp_path) == ["out.safetensors"]


def test_safetensors_files_that_are_none(tmp_path):
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in (("text", "truncated or not"), ("folder", "is a folder"), ("none", "no such checkpoint")):
        with pytest.raises(distributed.UserError, match=message):
            distributed.load(str(tmp_path / f"{name}.safetensors"))


def test_weights_are_those_of_the_folder(tmp_path):
    """Names and numbers of a ResNet are timm's own."""
    method, path = written(tmp_path, "a2mim tuned resnet")
    run_main(export, method, path, str(tmp_path / "out"))
    found, own = load_file(tmp_path / "out" / "model.safetensors"), load(method, path).network.net.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], value) for name, value in own.items())
