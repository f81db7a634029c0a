"""Checkpoints of CAE, A2MIM and UDI in diff_upstream.py: the authors' layouts by name and shape, and ours."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from a2mim import main_finetune as a2mim_finetune
from a2mim import main_linprobe as a2mim_linprobe
from a2mim import main_pretrain as a2mim_pretrain
from a2mim.openmixup import extract_encoder, to_openmixup_state_dict
from cae import main_attentive, main_finetune, main_linprobe, main_tokenizer
from cae import main_pretrain as cae_pretrain
from cae.models_cae import REVISION_A
from common import distributed
from scripts.tools import diff_upstream as diff
from tests.support.helpers import GOLDEN_DIR
from tests.support.udi_weights import SIXTEEN, pretrained
from udi import main_finetune as udi_finetune
from udi import main_linprobe as udi_linprobe
from udi.backbone import load_backbone
from udi.eval_finetuning.extract_backbone_weights_for_finetuning import raw_weights

State = dict[str, Any]
FAST = (
    "cae_tiny",
    "customized",
    "vit_tiny(num_class_token=2)",
    "semi_transfer:vit_tiny",
    "pretrain:vit_small,number_cls_token=2",
    "finetune:vit_small,use_cls",
    "a2mim/imagenet/r50_l3_sz224_init_8xb256_cos_ep100",
)


def manifest(method: str) -> dict[str, Any]:
    path = GOLDEN_DIR / method / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {"presets": {}}


def tensors(shapes: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of these shapes; each stores one number."""
    pairs = shapes.items() if isinstance(shapes, dict) else shapes
    return {prefix + key: torch.zeros(1).expand(shape) if shape else torch.zeros(()) for key, shape in pairs}


def cases(method: str, names: Iterable[str]) -> Callable:
    """Parametrize `name` over presets; most are slow."""
    marked = [n if any(word in n for word in FAST) else pytest.param(n, marks=pytest.mark.slow) for n in names]
    none = [pytest.param("", marks=pytest.mark.skip(f"no manifest of {method}"))]
    return lambda test: pytest.mark.golden(pytest.mark.parametrize("name", marked or none)(test))


def rows_of(method: str, path: str | Path, state: State | None = None, flags: str = "") -> dict[str, diff.Row]:
    """The rows of a checkpoint, which is written first if its content is given."""
    if state is not None:
        torch.save(state, path)
    return {row.name: row for row in diff.compare_checkpoint(method, diff.read_record(method), str(path), flags)}


def assert_same(rows: dict[str, diff.Row], kind: str, encoder: bool = False) -> None:
    assert [row for row in rows.values() if row.status != diff.SAME] == []
    assert rows["format"].upstream.startswith(f"{kind}, ")
    assert ("encoder" in rows) is encoder


# ---- the authors' layouts


CAE = manifest("cae")["presets"]
CAE_KINDS = {"pretrain": "pre-training", "finetune": "fine-tuning", "linear": "linear probe"} | {
    "attentive": "attentive probe",
    "tokenizer": "tokenizer",
}
CAE_NAMES = [
    name
    for name, preset in CAE.items()
    if "state_dict" in preset
    and "caev2" not in name
    and "384" not in name
    and "dalle" not in name
    and "clip" not in name
]


@cases("cae", CAE_NAMES)
def test_official_cae(name, tmp_path):
    preset, (kind, _) = CAE[name], name.split("/")
    weights = tensors(preset["state_dict"])
    if kind == "linear":  # the file is written after the batch norm was put in front
        width = weights["head.weight"].shape[1]
        weights = {k.replace("head.", "head.1."): v for k, v in weights.items()}
        weights |= tensors(
            {"head.0.running_mean": [width], "head.0.running_var": [width], "head.0.num_batches_tracked": []}
        )
    state: State = {"model": weights, "epoch": 3}
    encoder = kind == "pretrain"
    assert_same(rows_of("cae", tmp_path / "a.pth", state), CAE_KINDS[kind], encoder)
    if encoder:
        args = argparse.Namespace(model=preset["constructor"], dist_backend="nccl", **preset["args"])
        args.patch_size = (16, 16)  # the authors' program stores both sides
        args.layer_scale_init_value = preset["layer_scale_init_value"]
        assert_same(rows_of("cae", tmp_path / "a.pth", state | {"args": args}), "pre-training", encoder)


UDI = manifest("udi")["presets"]


@cases("udi", [name for name in UDI if name.startswith(("vit_", "pretrain:", "finetune:", "semi_transfer:"))])
def test_official_udi(name, tmp_path):
    weights = tensors(UDI[name]["state_dict"])
    if name.startswith("pretrain:"):
        student = {f"module.{key}": value for key, value in weights.items()}
        state: State = {"student": student, "teacher": weights, "epoch": 1, "udi_loss": {}}
        assert_same(rows_of("udi", tmp_path / "a.pth", state), "pre-training", encoder=True)
    elif name.startswith("finetune:"):
        assert_same(rows_of("udi", tmp_path / "a.pth", {"model": weights, "epoch": 1}), "fine-tuning")
    elif name.startswith("semi_transfer:"):
        state = {"model": weights, "lr_scheduler": {}, "epoch": 1}
        assert_same(rows_of("udi", tmp_path / "a.pth", state), "semi-supervised or transfer learning")
    else:
        assert_same(rows_of("udi", tmp_path / "a.pth", weights), "backbone", encoder=True)
        raw = {f"backbone.{key}": value for key, value in weights.items()}
        raw |= tensors({"attn.qkv.weight": [3], "norm1.weight": [3]})
        assert_same(rows_of("udi", tmp_path / "a.pth", raw), "backbone", encoder=True)


A2MIM = manifest("a2mim")


@cases("a2mim", A2MIM["presets"])
def test_official_a2mim(name, tmp_path):
    """The recipe's name stands in the file and tells the network."""
    preset = A2MIM["presets"][name]
    encoder = tensors(A2MIM["backbones"][preset["backbone"]])
    weights = {f"backbone.{key}": value for key, value in encoder.items()} | tensors(preset["other_keys"])
    state: State = {"meta": {"exp_name": f"{Path(name).name}.py"}, "state_dict": weights, "optimizer": {}}
    assert_same(rows_of("a2mim", tmp_path / "a.pth", state), "pre-training", encoder=True)
    if "resnet50" in preset["backbone"] or "vit_base" in preset["backbone"]:  # what an encoder alone tells of itself
        rows = rows_of("a2mim", tmp_path / "a.pth", {"state_dict": encoder, "author": "openmixup"})
        assert_same(rows, "encoder", encoder=True)


# ---- ours


def written(folder: Path, main: Any, flags: str, model: nn.Module | None = None) -> tuple[str, State]:
    """A checkpoint.pth of a network of the flags with its args, and its content."""
    args = main.get_args_parser().parse_args(flags.split())
    args.output_dir = str(folder)
    network: nn.Module = main.build_model(args) if model is None else model
    distributed.Checkpoint(str(folder), args, network, distributed.Files()).save(distributed.Position(1))
    path = str(folder / "checkpoint.pth")
    return path, distributed.load(path)


NANO = "--model cae_nano --input_size 16 --patch_size 4"
CAE_NANO = f"{NANO} --decoder_embed_dim 96 --decoder_num_heads 3 --regressor_depth 1 --decoder_depth 2"


def test_cae_pretraining__both_revisions_and_parts(tmp_path):
    path, state = written(tmp_path, cae_pretrain, f"{CAE_NANO} --decoder_num_classes 12")
    assert_same(rows_of("cae", path), "pre-training", encoder=True)
    bare = {key: state[key] for key in state if key != "args"}
    assert_same(rows_of("cae", path, bare, "--input_size 16"), "pre-training", encoder=True)
    renamed = {}
    for key, value in state["model"].items():
        early = next((old + key.removeprefix(new) for old, new in REVISION_A.items() if key.startswith(new)), key)
        renamed[early] = value
    assert_same(rows_of("cae", path, state | {"model": renamed}), "pre-training, earlier revision", encoder=True)
    encoder = {key: value for key, value in state["model"].items() if key.startswith("encoder.")}
    assert_same(rows_of("cae", path, {"model": encoder}, "--input_size 16"), "encoder of a pre-training", encoder=True)
    plain = {key.removeprefix("encoder."): value for key, value in encoder.items()}
    assert_same(rows_of("cae", path, plain, "--input_size 16"), "encoder", encoder=True)
    del state["model"]["regresser.norm.weight"]
    rows = rows_of("cae", path, state)
    assert [row.upstream for row in rows.values() if row.status == diff.UNEXPECTED] == ["regresser.norm.weight"]


def test_cae_evaluations(tmp_path):
    classes = f"{NANO} --nb_classes 10"
    for flags in ("", " --use_cls --disable_rel_pos_bias --layer_scale_init_value 0"):
        path, state = written(tmp_path / "ft", main_finetune, classes + flags)
        assert_same(rows_of("cae", path), "fine-tuning")
        assert_same(rows_of("cae", path, {"model": state["model"]}, "--input_size 16"), "fine-tuning")
    path, _ = written(
        tmp_path / "att", main_attentive, f"{classes} --use_cls --enable_linear_eval --linear_type attentive"
    )
    assert_same(rows_of("cae", path), "attentive probe")
    flags = f"{classes} --use_cls --disable_rel_pos_bias --enable_linear_eval"
    model = main_linprobe.build_model(main_linprobe.get_args_parser().parse_args(flags.split()))
    main_linprobe.add_probe(model)
    path, state = written(tmp_path / "lin", main_linprobe, flags, model)
    assert_same(rows_of("cae", path), "linear probe")
    assert_same(rows_of("cae", path, {"model": state["model"]}, "--input_size 16"), "linear probe")


def test_cae_tokenizer(tmp_path):
    sizes = "--input_size 16 --num_tokens 12 --codebook_dim 4 --num_layers 2 --hidden_dim 8"
    path, _ = written(tmp_path, main_tokenizer, sizes)
    rows = rows_of("cae", path)
    assert_same(rows, "tokenizer")
    assert rows["format"].here == "cae/main_tokenizer.py:build_model"


def test_udi(tmp_path):
    path = pretrained(tmp_path, *SIXTEEN)
    rows = rows_of("udi", path)
    assert_same(rows, "pre-training", encoder=True)
    assert "norm1" not in rows["matched"].upstream
    state = {key: value for key, value in distributed.load(path).items() if key != "args"}
    assert_same(rows_of("udi", tmp_path / "b.pth", state, "--global_size 16"), "pre-training", encoder=True)
    plain, raw = load_backbone(path), raw_weights(path, "teacher")
    for weights in (plain, raw):
        assert_same(rows_of("udi", tmp_path / "b.pth", weights, "--global_size 16"), "backbone", encoder=True)
    # Fine-tuning keeps both class tokens, which no flag tells.
    flags = "--model vit_nano --input_size 16 --nb_classes 10 --abs_pos_emb --disable_rel_pos_bias --use_cls"
    args = udi_finetune.get_args_parser().parse_args(flags.split())
    path, _ = written(tmp_path / "ft", udi_finetune, flags, udi_finetune.build_model(args, plain))
    assert_same(rows_of("udi", path), "fine-tuning")
    probe = udi_linprobe.LinearClassifier(2 * 96, 10)
    weights = {f"module.{key}": value for key, value in probe.state_dict().items()}
    state = {"state_dict": weights, "best_acc": 1.0, "epoch": 1}
    rows = rows_of("udi", tmp_path / "b.pth", state, "--arch vit_nano --n_last_blocks 2")
    assert_same(rows, "linear probe")


RES, VIT = "--backbone resnet_nano --input_size 64", "--backbone vit_nano --patch_size 8 --input_size 32"


A2MIM_RUNS = (f"{RES} --mask_init 1e-6 --mask_layer 3", f"{VIT} --method simmim --mask_replace true")


def a2mim_pretraining(flags: str) -> State:
    args = a2mim_pretrain.get_args_parser().parse_args(flags.split())
    weights = to_openmixup_state_dict(a2mim_pretrain.build_model(args))
    return {"state_dict": weights, "args": vars(args), "meta": {"exp_name": ""}}


@pytest.mark.parametrize("flags", A2MIM_RUNS)
def test_a2mim_pretraining(flags, tmp_path):
    state, path = a2mim_pretraining(flags), tmp_path / "a.pth"
    assert_same(rows_of("a2mim", path, state), "pre-training", encoder=True)
    weights = extract_encoder(state)
    rows = rows_of("a2mim", path, {"state_dict": weights, "author": "openmixup"}, flags)
    assert_same(rows, "encoder", encoder=True)


@pytest.mark.parametrize("flags", [A2MIM_RUNS[0], pytest.param(A2MIM_RUNS[1], marks=pytest.mark.slow)])
def test_a2mim_pretraining__without_flags(flags, tmp_path):
    """It is taken for a ResNet-50's unless told otherwise; its encoder is known by its shapes."""
    state = a2mim_pretraining(flags)
    del state["args"]
    rows = rows_of("a2mim", tmp_path / "a.pth", state)
    assert rows["encoder"].status == diff.SAME
    assert any("missing" in name for name in rows)


@pytest.mark.parametrize("main", [a2mim_finetune, a2mim_linprobe])
@pytest.mark.parametrize("network", ["--backbone resnet_nano", "--backbone vit_nano --patch_size 8"])
def test_a2mim_evaluations(main, network, tmp_path):
    args = main.get_args_parser().parse_args(f"{network} --train_size 32 --val_crop 32 --nb_classes 10".split())
    weights = to_openmixup_state_dict(main.build_model(args))
    weights |= {f"ema_{key.replace('.', '_')}": value for key, value in weights.items()}  # a moving average
    state = {"state_dict": weights, "meta": {}, "args": vars(args)}
    rows = rows_of("a2mim", tmp_path / "a.pth", state)
    probe = main is a2mim_linprobe and "vit" in network
    assert_same(rows, "linear probe of a ViT" if probe else "fine-tuning or linear probe")
