"""The encoder of a checkpoint as a folder for timm and for a hub, or as one safetensors file.

Usage: python scripts/tools/export.py METHOD CHECKPOINT OUT [--format timm|safetensors] [--half] [--model ...]
python scripts/tools/export.py METHOD CHECKPOINT OUT --push USER/NAME [--dry_run]
timm: OUT is a folder with model.safetensors, config.json and README.md, a model card;
`timm.create_model("local-dir:OUT", pretrained=True)` loads it. safetensors: OUT is a file with the weights under the
method's own names, which every tool and main here reads like a checkpoint. Fine-tuned and probed checkpoints keep their
classifier. Of a segmentation network or detector the folder for timm has the encoder, the safetensors file the whole
network. What was written is read back and compared before OUT appears. --push sends the folder to the Hugging Face
hub, of whose account `hf auth login` keeps the token; --dry_run only lists what would be sent.
"""

import argparse
import contextlib
import copy
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import huggingface_hub
import timm
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import PretrainedCfg
from timm.models._hub import generate_readme, save_for_hf
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from common import distributed
from common.distributed import Exit, UserError
from common.distributed.checkpoint import ELSEWHERE
from scripts.tools import runs
from scripts.tools.differences import read_record
from scripts.tools.encoders import load as encoders
from scripts.tools.encoders.backbone import Backbone, dense_weights
from scripts.tools.encoders.timm_form import TimmForm
from scripts.tools.flags import Parser

TOLERANCE = 1e-5  # of features and logits, times the largest of them where that is above 1
# Flags of the machine and its files, here and in the authors' programs, which a card does not repeat.
MACHINE = {*ELSEWHERE, "config_file", "force", "rank", "gpu", "distributed"}
MACHINE |= {"dist_on_itp", "dist_backend", "print_freq"}
WRITTEN = "exported_from"  # key of config.json, or of the flags in a file: says that this script wrote it

PAPERS = {
    "saim": "Exploring Stochastic Autoregressive Image Modeling for Visual Representation (AAAI 2023)",
    "semaim": "Semantic-Aware Autoregressive Image Modeling for Visual Representation Learning (AAAI 2024)",
    "cae": "Context Autoencoder for Self-Supervised Representation Learning (arXiv 2202.03026)",
    "a2mim": "Architecture-Agnostic Masked Image Modeling - From ViT back to CNN (ICML 2023)",
    "udi": "Unsqueeze [CLS] bottleneck to Learn Rich Representations (ECCV 2024)",
}
# What a safetensors file keeps of an encoder beside its weights.
STORED = ("input_size", "patch_size", "in_chans", "pool", "mean", "std", "crop_pct", "interpolation")
POOLS = {"token": "the class token of the last block", "avg": "the mean over the last block's positions"}


def get_args_parser() -> argparse.ArgumentParser:
    p = Parser("Export an encoder")
    encoders.add_flags(p, timm=False)
    p.add_argument("out", metavar="OUT", help="folder, or with --format safetensors file, to write")
    p.add_argument("--format", default="timm", choices=["timm", "safetensors"], help="what OUT becomes; default: timm")
    p.add_argument("--half", action="store_true", help="with --format safetensors: 16-bit weights, of half the size")
    p.add_argument(
        "--classes",
        default="",
        help="text file with the classes' names, one a line, for the timm folder; default: those in the checkpoint",
    )
    p.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote to OUT")
    p.add_argument("--push", default="", metavar="USER/NAME", help="repository of the Hugging Face hub to send OUT to")
    p.add_argument("--dry_run", action="store_true", help="with --push: list what would be sent, send nothing")
    return p


# ---- files


def exported(out: Path) -> bool:
    """Whether this script wrote a file or folder."""
    with contextlib.suppress(OSError, ValueError, SafetensorError):
        if out.is_dir():
            return WRITTEN in json.loads((out / "config.json").read_text())
        with safe_open(out, "pt") as file:
            return WRITTEN in json.loads((file.metadata() or {}).get("args", "{}"))
    return False


def check_target(out: Path, form: str, overwrite: bool) -> None:
    """Raise UserError unless OUT is free, or an earlier export that may be replaced."""
    if form == "safetensors" and out.suffix != ".safetensors":
        raise UserError(f"OUT {out}: expected a name that ends in .safetensors")
    if not out.exists() or (form == "timm" and out.is_dir() and not any(out.iterdir())):
        return
    if out.is_dir() != (form == "timm"):
        raise UserError(f"OUT {out}: is a {'folder' if out.is_dir() else 'file'}, which --format {form} does not write")
    if not exported(out):
        raise UserError(f"OUT {out}: exists and was not written by this script, expected a new name")
    if not overwrite:
        raise UserError(f"OUT {out}: exists; --overwrite replaces it")


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A path beside OUT to write to, which becomes OUT if all goes well, and else vanishes.

    Raises:
        UserError: it cannot be written.
    """
    out = out.absolute()
    part = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")
    old = part.with_name(f"{part.name}.old")
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield part
        umask = os.umask(0)
        os.umask(umask)
        for path in (*part.iterdir(), part) if part.is_dir() else (part,):
            if path.is_file():
                path.chmod(0o666 & ~umask)  # safetensors writes for its owner only
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if out.is_dir() and any(out.iterdir()):
            os.rename(out, old)
        os.replace(part, out)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            os.rename(old, out)
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"OUT {out}: cannot be written ({why})") from error
    finally:
        for path in (part, old, *made):
            with contextlib.suppress(OSError):  # what is not there, and of the folders made those that are not empty
                path.unlink() if path.is_file() else path.rmdir() if path in made else shutil.rmtree(path)


def class_names(path: str, flags: dict[str, Any], classes: int) -> list[str]:
    """The lines of --classes, of which there must be as many as classes; else the names among a run's flags, if any.

    Raises:
        UserError: the file cannot be read or has other lines.
    """
    if not path:
        names = flags.get("class_names") or []
        return names if len(names) == classes else []
    try:
        names = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path}: cannot be read ({error})") from error
    if len(names) != classes:
        raise UserError(f"--classes {path}: has {len(names)} lines, the checkpoint has {classes} classes")
    return names


# ---- check


class Disagreement(Exit):
    """What was written does not do what the checkpoint does."""


def photographs(in_chans: int | None) -> list[Any]:
    """Pictures that scikit-learn brings along, as PIL images; of other than three channels as tensors of these."""
    images = [Image.fromarray(image) for image in load_sample_images().images]
    chans = in_chans or 3
    return images if chans == 3 else [to_tensor(image)[torch.arange(chans) % 3] for image in images]


@torch.inference_mode()
def outputs(backbone: Backbone, imgs: Tensor) -> dict[str, Tensor]:
    """Features and, of a classifier, logits (B, ...) of a network of `load_backbone`."""
    features = backbone(imgs)
    return {"features": features} | ({} if backbone.head is None else {"logits": backbone.head(features)})


@torch.inference_mode()
def timm_outputs(model: Any, imgs: Tensor) -> dict[str, Tensor]:
    """Features and, of a classifier, logits (B, ...) of a timm model."""
    features = model.forward_head(model.forward_features(imgs), pre_logits=True)
    return {"features": features} | ({"logits": model(imgs)} if model.num_classes else {})


def report(expected: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    """Print how far results are apart, by name; raises Disagreement if that is too far."""
    if expected.keys() != found.keys():
        raise Disagreement(f"{what} has {' and '.join(found)}, the checkpoint {' and '.join(expected)}")
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise Disagreement(f"{name} of {what} are {tuple(found[name].shape)}, expected {tuple(value.shape)}")
        scale = value.abs().max().item()
        apart = (found[name] - value).abs().max().item()
        distributed.log(f"{what}: largest difference of {name} {apart:.1e}, largest value {scale:.3g}")
        if not apart <= TOLERANCE * max(1.0, scale):
            raise Disagreement(f"{name} of {what} differ by {apart:.2e}, expected at most {TOLERANCE:g}")


def check_timm(folder: Path, backbone: Backbone) -> None:
    """Compare the folder's network, read anew, with the checkpoint's on photographs and noise.

    In float64, as the two sum in different orders: what remains are weights and architecture.
    Raises:
        Disagreement: they differ.
    """
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    own = encoders.eval_transform(backbone)
    other: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    views = [torch.stack([view(photo) for photo in photographs(backbone.in_chans)]) for view in (own, other)]
    noise = torch.randn(views[0].shape, generator=torch.Generator().manual_seed(0))
    report({"pixels": views[0]}, {"pixels": views[1]}, "timm's view of 2 photographs")
    ours, theirs = (torch.cat([view, noise]) for view in views)
    expected, found = outputs(backbone, ours), timm_outputs(model, theirs)
    apart = max((value - expected[name]).abs().max().item() for name, value in found.items())
    exact = outputs(copy.deepcopy(backbone).double(), ours.double())
    if not model.num_classes:  # a classifier that timm cannot express was left out, which the notes say
        exact.pop("logits", None)
    report(exact, timm_outputs(model.double(), theirs.double()), "timm's network, in float64")
    distributed.log(f"in float32, as it will run: largest difference {apart:.1e}")


def check_safetensors(path: Path, method: str, backbone: Backbone) -> None:
    """Compare the file's network, read anew, with the checkpoint's; raises Disagreement if any bit differs."""
    again = encoders.load_backbone(method, str(path))
    for name in ("model_name", "embed_dim", *STORED):
        own, found = getattr(backbone, name), getattr(again, name)
        if own != found:
            raise Disagreement(f"{name} of the written file is {found}, expected {own}")
    imgs = torch.stack([encoders.eval_transform(again)(photo) for photo in photographs(backbone.in_chans)])
    imgs = torch.cat([imgs, torch.randn(imgs.shape, generator=torch.Generator().manual_seed(0))])
    expected, found = outputs(backbone, imgs), outputs(again, imgs)
    report(expected, found, "the written file")
    if not all(torch.equal(found[name], value) for name, value in expected.items()):
        raise Disagreement("the written file's numbers are not those of the checkpoint")


# ---- what is written


def of_machine(flag: str, value: Any) -> bool:
    """Whether a flag is of the machine or a path."""
    return flag in MACHINE or (isinstance(value, str) and os.sep in value and flag != "dataset")


def plain_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """A run's flags without empty ones, without its machine's and its paths, and without its classes' names."""
    plain = {k: v for k, v in sorted(flags.items()) if v is not None and v is not False and v not in ("", [])}
    return {k: v for k, v in plain.items() if not of_machine(k, v)}


def measured(checkpoint: str, done: int | None) -> list[str]:
    """What the log beside a checkpoint says of its epoch: "top-1 57.8" (percent), "loss in training 0.21"."""
    path = Path(checkpoint)
    found: list[str] = []
    with contextlib.suppress(UserError):  # not a run's folder
        for file in runs.logs_in(path.parent)[: path.is_file()]:
            log = runs.read_log(str(file))
            last = max((e for e in log if done is None or e < done + (min(log) == 1)), default=None)
            values = {} if last is None else log[last]
            found += [f"{metric} {values[name]:.1f}" for name, metric in runs.METRICS.items() if name in values]
            found += [f"loss in training {values['train_loss']:.4g}"] if "train_loss" in values else []
    return found


def details(
    method: str, backbone: Backbone, form: TimmForm, done: int | None, results: list[str], source: dict[str, str]
) -> dict[str, Any]:
    """The model card's facts, by their titles."""
    authors = read_record(method)["repositories"][0]
    flags = plain_flags(backbone.args)
    if flags.pop(WRITTEN, None):  # a file of this script, which has the encoder's sizes among the flags
        flags = {k: v for k, v in flags.items() if k not in ("method", "model", *STORED)}
    count = sum(value.numel() for value in form.weights.values())
    data, planned = backbone.args.get("data_path"), flags.pop("epochs", None)
    if "iters" in flags:  # such a run counts updates, and its flags say how many
        planned = done = None
    images = flags.get("dataset") or (Path(data).name if isinstance(data, str) else "")
    unfinished = isinstance(planned, int) and done is not None and done < planned
    about = {
        "Method": f"{method}: {PAPERS[method]}; authors' code: {authors['url']}",
        "Task": "image classification" if form.num_classes else "features of images",
        "Architecture": f"{backbone.model_name}; in timm {form.architecture}, of the sizes in config.json",
        "Weights": f"{count:,}",
        "Features": f"{backbone.embed_dim} numbers an image, {POOLS[form.pool]}",
        "Classes": form.num_classes or "none: the encoder only",
        "Images": f"{backbone.input_size} x {backbone.input_size} pixels, shorter side resized to "
        f"{int(backbone.input_size / backbone.crop_pct)} ({backbone.interpolation}), centre crop; "
        f"mean {backbone.mean}, std {backbone.std}",
        "Trained on": images or "the checkpoint does not say it",
        "Epochs": f"{done} of {planned}" if unfinished else done or planned or "the checkpoint does not say it",
        "Measured in that training": ", ".join(results) or "nothing is known",
        "Checkpoint": f"{source['file']}, sha256 `{source['sha256']}`",
        "Licence": "of these weights: that of whoever trained them, and of the images; authors' repository: "
        + authors["licence"],
    }
    if form.notes:
        about["Not as in the checkpoint"] = form.notes
    if flags:
        about["Flags of the run"] = {k: f"`{v}`" for k, v in flags.items()}
    return about


USAGE = """```python
import timm
import torch
from PIL import Image

model = timm.create_model("{where}", pretrained=True).eval(){beside}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
images = transform(Image.open("photo.jpg").convert("RGB"))[None]  # any picture
with torch.no_grad():
    features = model.forward_head(model.forward_features(images), pre_logits=True)
print(features.shape)  # (1, {dim})
{logits}```
"""
LOGITS = """with torch.no_grad():
    print(model(images).softmax(-1).topk({few}))  # classes and their probabilities
"""


def write_timm(
    folder: Path, name: str, method: str, backbone: Backbone, form: TimmForm, labels: list[str], **origin: Any
) -> None:
    """Write the weights, timm's configuration and a model card; name: of the folder, or USER/NAME of a hub."""
    known: Any = timm.get_pretrained_cfg(form.architecture)
    size = backbone.input_size
    about = PretrainedCfg(
        architecture=form.architecture,
        input_size=(backbone.in_chans or 3, size, size),
        fixed_input_size=known.fixed_input_size,
        interpolation=backbone.interpolation,
        crop_pct=backbone.crop_pct,
        mean=tuple(backbone.mean),
        std=tuple(backbone.std),
        num_classes=form.num_classes,
        first_conv=known.first_conv if (backbone.in_chans or 3) == 3 else None,  # of which timm would adapt channels
        classifier=known.classifier,
    )
    with distributed.user_errors(f"timm's {form.architecture}"):
        model = timm.create_model(
            form.architecture, num_classes=form.num_classes, pretrained_cfg=about.to_dict(), **form.model_args
        )
        model.load_state_dict(form.weights)
    source = origin["source"]
    config = {"global_pool": form.pool, WRITTEN: {"method": method, "in_chans": backbone.in_chans, **source}}
    if labels:
        config["label_names"] = labels
    save_for_hf(model, str(folder), model_config=config, model_args=form.model_args, safe_serialization=True)
    task = "image-classification" if form.num_classes else "image-feature-extraction"
    logits = LOGITS.format(few=min(5, form.num_classes)) if form.num_classes else ""
    where = f"hf-hub:{name}" if "/" in name else f"local-dir:{name}"
    beside = "" if "/" in name else "  # beside the folder"
    facts = details(method, backbone, form, **origin)
    facts["File"] = f"model.safetensors, sha256 `{runs.sha256(folder / 'model.safetensors')}`"
    card = {
        "tags": [task, "timm", method],
        "license": "other",
        "license_name": "see-below",
        "description": f"A network trained by {method}, written from a checkpoint for timm.",
        "details": facts,
        "usage": USAGE.format(where=where, beside=beside, dim=backbone.embed_dim, logits=logits),
    }
    (folder / "README.md").write_text(generate_readme(card, Path(name).name, task), encoding="utf-8")


def write_safetensors(path: Path, method: str, backbone: Backbone, source: dict[str, str], half: bool) -> None:
    """Write the method's own weights, with what `load_backbone` needs to know as JSON in the file's metadata."""
    known = {"method": method, "model": backbone.model_name} | {name: getattr(backbone, name) for name in STORED}
    flags = {k: v for k, v in backbone.args.items() if k == "class_names" or not of_machine(k, v)}
    if isinstance(images := backbone.args.get("data_path"), str):
        flags["data_path"] = Path(images).name  # which the model card tells
    weights = {k: v.detach().clone().contiguous() for k, v in backbone.weights().items()}
    if half:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    # One entry: several stand in random order, and equal exports are to be equal files.
    save_file(weights, path, {"args": json.dumps(flags | known | {WRITTEN: source}, default=str)})


def write_whole(path: Path, args: argparse.Namespace, source: dict[str, str]) -> bool:
    """Write a segmentation network or detector under its official names, and its run's flags; False for others.

    Raises:
        Disagreement: what was written is not what the checkpoint holds.
        UserError: --half.
    """
    state = distributed.load(args.checkpoint)
    found = distributed.weights_of(state, args.checkpoint, bare=True)
    if not dense_weights(found):
        return False
    if args.half:
        raise UserError("--half: expected a checkpoint of an encoder, not of a whole network for a dense task")
    weights = {k: v.clone().contiguous() for k, v in found.items()}
    flags = distributed.flags_of(state)
    save_file(weights, path, {"args": json.dumps(flags | {WRITTEN: source}, default=str)})
    again = distributed.weights_of(distributed.load(str(path)), str(path))
    if again.keys() != weights.keys() or not all(torch.equal(again[k], v) for k, v in weights.items()):
        raise Disagreement("the written file's numbers are not those of the checkpoint")
    task = "segmentation" if any(name.startswith("decode_head.") for name in weights) else "detection"
    classes, count = flags.get("class_names") or [], sum(v.numel() for v in weights.values())
    distributed.log(f"{args.method}'s {task} network: {count:,} weights, {len(classes) or 'unnamed'} classes")
    distributed.log(f"{args.method}/main_{task}.py evaluates it with the run's flags and --eval --resume {args.out}")
    return True


# ---- the hub


def check_repository(name: str) -> None:
    """Raise UserError for what is no USER/NAME."""
    with distributed.user_errors(f"--push {name}"):
        huggingface_hub.utils.validate_repo_id(name)
    if name.count("/") != 1:
        raise UserError(f"--push {name}: expected USER/NAME")


def push(folder: Path, name: str, dry_run: bool) -> None:
    """Send a folder's files to a repository of the hub, which is made if it does not exist.

    Raises:
        UserError: the hub cannot be reached, or refuses; the folder stays.
    """
    for path in sorted(folder.iterdir()):
        distributed.log(f"{'would send' if dry_run else 'sending'} {path.name}, {path.stat().st_size:,} bytes")
    if dry_run:
        distributed.log(f"nothing was sent to https://huggingface.co/{name}")
        return
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(name, exist_ok=True)
        sent = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Weights, configuration and card")
    except Exception as error:  # of the account, the network or the hub, and of several libraries
        raise UserError(f"--push {name}: {' '.join(str(error).split())[:300]}; {folder} is complete") from error
    distributed.log(f"sent to {sent}; timm.create_model('hf-hub:{name}', pretrained=True) loads it")


def main(args: argparse.Namespace) -> None:
    if args.checkpoint == "random" or Path(args.checkpoint).is_dir():
        raise UserError(f"CHECKPOINT {args.checkpoint}: expected a checkpoint file or https address")
    if args.classes and args.format != "timm":
        raise UserError("--classes: only a timm folder has names of classes")
    if args.half and args.format != "safetensors":
        raise UserError("--half: expected --format safetensors")
    if (args.push or args.dry_run) and (args.format != "timm" or not args.push):
        raise UserError("--push and --dry_run: expected --push USER/NAME and a timm folder")
    if args.push:
        check_repository(args.push)
    out = Path(args.out)
    check_target(out, args.format, args.overwrite)
    # ---- network
    backbone = encoders.from_flags(args)
    source = {"file": Path(args.checkpoint).name, "sha256": runs.sha256(distributed.local_file(args.checkpoint))}
    # ---- files
    if args.format == "safetensors":
        with appearing(out) as path:
            if not write_whole(path, args, source):
                if args.half:
                    backbone.half().float()  # rounds the weights with which the file is compared
                write_safetensors(path, args.method, backbone, source, args.half)
                check_safetensors(path, args.method, backbone)
    else:
        form = encoders.timm_form(args.method, backbone)
        labels = class_names(args.classes, backbone.args, form.num_classes)
        state = distributed.load(args.checkpoint)
        done = runs.epochs_done(state)
        name = args.push or out.absolute().name
        origin = {"done": done, "results": measured(args.checkpoint, done), "source": source}
        with appearing(out) as path:
            write_timm(path, name, args.method, backbone, form, labels, **origin)
            check_timm(path, backbone)
        for note in form.notes:
            distributed.log(note)
    distributed.log(f"wrote {out}")
    if args.push:
        push(out, args.push, args.dry_run)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args)
