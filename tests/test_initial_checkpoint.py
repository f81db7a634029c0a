"""--initial_checkpoint: what pre-training takes of which file, what stays as drawn, and how such a run resumes."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor
from torchvision.models import convnext as torchvision_convnext
from torchvision.models import resnet as torchvision_resnet

import a2mim.initial
import a2mim.main_pretrain
import cae.main_pretrain
import saim.main_pretrain
import semaim.main_pretrain
import udi.main_pretrain
from a2mim import backbones, openmixup
from a2mim.losses import MIMLoss
from a2mim.models_a2mim import MaskedImageModel
from cae.models_cae import REVISION_A, ContextAutoencoderViT
from common import distributed
from saim.models_saim import SaimViT
from semaim.models_semaim import AimViT
from tests.support.cae import tokenizer_file
from tests.support.initial import METHODS, beit, drawn, timm_vit
from tests.support.runs import assert_same, mistake, run_main, spoil
from udi.models_udi import DINOHead, MultiCropWrapper

NANO = {"embed_dim": 96, "depth": 4, "num_heads": 3}
RESNET = {"layer1.0.conv1.weight": torch.ones(64, 64, 3, 3), "layer1.0.bn1.bias": torch.ones(64)}
IMGS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
methods = pytest.mark.parametrize("method", METHODS)


def built(method: str, seed: int = 0, **sizes) -> Any:
    torch.manual_seed(seed)
    return METHODS[method].build(**sizes).eval()


def read(content: Any, folder: Path) -> dict[str, Tensor]:
    """The weights of a file that holds the content, as a main reads them."""
    torch.save(content, folder / "x.pth")
    args = saim.main_pretrain.get_args_parser().parse_args(["--initial_checkpoint", str(folder / "x.pth")])
    return distributed.initial_weights(args, "")


def started(method: str, content: Any, folder: Path, **sizes) -> Any:
    """A network drawn with seed 0 that starts from a file; the start draws nothing."""
    model = built(method, **sizes)
    before = torch.get_rng_state()
    METHODS[method].start(model, read(content, folder), "x.pth")
    assert torch.equal(torch.get_rng_state(), before)
    return model


def assert_others_as_drawn(method: str, model: Any, **sizes) -> None:
    """Everything outside the encoder has the bits that the seed gives it."""
    drawn_alone = built(method, **sizes).state_dict()
    others = [name for name in drawn_alone if not name.startswith(METHODS[method].encoder)]
    assert others
    for name, value in model.state_dict().items():
        assert name not in others or torch.equal(value, drawn_alone[name]), name


# ---- encoders of other programs

VIT = timm_vit()
WEIGHTS = VIT.state_dict()
FILES = {
    "timm": WEIGHTS,
    "MAE": {"model": WEIGHTS | {f"decoder_{k}": v for k, v in WEIGHTS.items()} | {"mask_token": torch.ones(1, 1, 24)}},
    "DINO": {
        "student": {},
        "teacher": {f"backbone.{k}": v for k, v in WEIGHTS.items()} | {"head.mlp.0.weight": torch.ones(3, 24)},
    },
    "half precision": {"model": {name: value.half() for name, value in WEIGHTS.items()}},
}


@methods
@pytest.mark.parametrize("kind", [*list(FILES)[:-1], pytest.param(list(FILES)[-1], marks=[pytest.mark.slow])])
def test_a_foreign_vit_gives_its_outputs(method, kind, tmp_path):
    model = started(method, FILES[kind], tmp_path)
    rtol, atol = (1e-2, 2e-2) if kind == "half precision" else (1e-4, 1e-5)
    found = METHODS[method].tokens(model, IMGS)
    torch.testing.assert_close(found, VIT.forward_features(IMGS), rtol=rtol, atol=atol)
    assert_others_as_drawn(method, model)


@methods
def test_layer_scale_and_missing_positions_keep_the_outputs(method, tmp_path):
    """timm's ls1.gamma, as DINOv2; and a ViT whose class token has no position."""
    scaled = timm_vit(init_values=0.5, no_embed_class=True)
    model = started(method, scaled.state_dict(), tmp_path)
    torch.testing.assert_close(METHODS[method].tokens(model, IMGS), scaled.forward_features(IMGS), rtol=1e-4, atol=1e-5)


@methods
def test_beit_gives_its_outputs(method, tmp_path):
    """No bias of keys, layer scale, relative positions of all blocks: these are A2MIM's alone."""
    author = beit()
    file = {"model": author.state_dict() | {"mask_token": torch.ones(1, 1, 24), "lm_head.weight": torch.ones(3, 24)}}
    model = started(method, file, tmp_path)
    if method == "a2mim":
        assert not model.encoder.pos_embed.any()
        expected = author
    else:
        expected = beit(use_shared_rel_pos_bias=False, use_abs_pos_emb=True)
        weights = author.state_dict() | {"pos_embed": METHODS[method].vit(model).pos_embed}
        expected.load_state_dict({k: v for k, v in weights.items() if "rel_pos_bias" not in k})
    torch.testing.assert_close(
        METHODS[method].tokens(model, IMGS), expected.forward_features(IMGS), rtol=1e-4, atol=1e-5
    )
    assert_others_as_drawn(method, model)


NAMES = list(METHODS)
PAIRS = [
    pytest.param(name, NAMES[i - step], marks=[] if step == 1 else [pytest.mark.slow])
    for i, name in enumerate(NAMES)
    for step in (1, 2, 3, 4)
]


@pytest.mark.parametrize(("method", "author"), PAIRS)
def test_encoders_of_the_other_methods(method, author, tmp_path):
    """Pre-training files; layouts of queries, keys and values, prefixes and names differ."""
    other = drawn(METHODS[author].build())
    file = {"model": METHODS[author].stored(other)}
    model = started(method, file, tmp_path)
    vit = METHODS[method].vit(model)
    for block, name in ((0, "norm2.weight"), (1, "attn.proj.bias"), (1, "mlp.fc2.bias")):
        theirs = METHODS[author].vit(other).blocks[block]
        value = theirs.get_parameter(name).clone()
        gamma = {"attn.proj.bias": "gamma_1", "mlp.fc2.bias": "gamma_2"}.get(name, "")
        if hasattr(theirs, gamma) and not hasattr(vit.blocks[block], gamma):
            value *= getattr(theirs, gamma)
        assert torch.equal(vit.blocks[block].get_parameter(name), value)
    assert torch.equal(vit.pos_embed, METHODS[author].vit(other).pos_embed)


@methods
def test_an_own_pretraining_file_is_taken_whole(method, tmp_path, capsys):
    other = built(method, seed=5)
    model = started(method, {"model": METHODS[method].stored(other)}, tmp_path)
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    encoder = sum(name.startswith(METHODS[method].encoder) for name in other.state_dict())
    encoder = encoder // 2 if method == "cae" else encoder  # the targets' encoder has its names, too
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"x.pth: {encoder} of the encoder's {encoder} tensors and " in said
    assert said.endswith("new: none; unused: none")


def test_caes_files_of_the_earlier_revision_and_of_fine_tuning(tmp_path):
    other, weights = built("cae", seed=5), {}
    for name, value in other.state_dict().items():
        old = next((old for old, new in REVISION_A.items() if name.startswith(new)), "")
        weights[old + name.removeprefix(REVISION_A.get(old, ""))] = value
    assert any(name.startswith("pretext_neck.") for name in weights)
    for name, value in started("cae", {"model": weights}, tmp_path).state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    pooled = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: v for name, v in WEIGHTS.items()}
    model = started("cae", pooled, tmp_path)
    assert torch.equal(model.encoder.norm.weight, WEIGHTS["norm.weight"])


# ---- sizes


@methods
def test_other_sizes_are_fitted_as_by_fine_tuning(method, tmp_path, capsys):
    """32 pixels in patches of 4 from a file for 16 in patches of 8: grids of 8 x 8 and 2 x 2."""
    author = beit(use_abs_pos_emb=True, use_shared_rel_pos_bias=False, use_rel_pos_bias=True)
    if method not in ("cae", "a2mim"):
        author = VIT
    weights = author.state_dict()
    model = started(method, weights, tmp_path, img_size=32, patch_size=4)
    fitted = weights | {"patch_embed.proj.weight": resample_patch_embed(weights["patch_embed.proj.weight"], [4, 4])}
    if method == "saim":
        fitted = distributed.fitted(fitted, model.state_dict())
    expected = METHODS[method].tuned(fitted, img_size=32, patch_size=4).state_dict()
    own = METHODS[method].vit(model).state_dict()
    shared = [name for name in expected if name in own and not name.startswith("norm.")]
    assert len(shared) > 20 and {"pos_embed", "patch_embed.proj.weight"} <= set(shared)
    for name in shared:
        torch.testing.assert_close(own[name], expected[name], rtol=0, atol=0, msg=name)
    assert "of them resized (" in capsys.readouterr().out
    assert_others_as_drawn(method, model, img_size=32, patch_size=4)


def test_caes_own_positions_follow_the_grid(tmp_path):
    other = built("cae", seed=5)
    model = started("cae", {"model": other.state_dict()}, tmp_path, img_size=32, patch_size=8)
    assert torch.equal(model.encoder.pos_embed, built("cae", img_size=32).encoder.pos_embed)
    assert torch.equal(model.decoder.head.weight, other.decoder.head.weight)


def test_class_tokens_of_udi(tmp_path, capsys):
    """A file with one gives the first; one with two, registers counted, gives both; the others take its first."""
    alone, model = built("udi", num_class_token=2), started("udi", WEIGHTS, tmp_path, num_class_token=2)
    vit, drawn_vit = model.backbone.backbone, alone.backbone.backbone
    for name, row in (("cls_token", 0), ("pos_embed", 0)):
        assert torch.equal(getattr(vit, name)[:, row], WEIGHTS[name][:, row])
        assert torch.equal(getattr(vit, name)[:, 1], getattr(drawn_vit, name)[:, 1])
    assert torch.equal(vit.pos_embed[:, 2:], WEIGHTS["pos_embed"][:, 1:])
    two: Any = timm_vit(reg_tokens=1)
    model = started("udi", two.state_dict(), tmp_path, num_class_token=2)
    torch.testing.assert_close(METHODS["udi"].tokens(model, IMGS), two.forward_features(IMGS), rtol=1e-4, atol=1e-5)
    model = started("saim", two.state_dict(), tmp_path)
    assert torch.equal(model.cls_token, two.cls_token)
    assert torch.equal(model.pos_embed[:, 1:], two.pos_embed[:, 2:])
    assert capsys.readouterr().out.endswith("unused: reg_token, head (2)\n")


@pytest.mark.parametrize("method", ["saim", "udi"])
def test_a_vit_without_class_token(method, tmp_path):
    """As I-JEPA's: the token is new and stands at 0, the patches have their positions."""
    theirs: Any = timm_vit(class_token=False, global_pool="avg")
    vit = METHODS[method].vit(started(method, theirs.state_dict(), tmp_path))
    assert torch.equal(vit.cls_token, METHODS[method].vit(built(method)).cls_token)
    assert torch.equal(vit.pos_embed[:, 1:], theirs.pos_embed)
    assert not vit.pos_embed[:, 0].any()


# ---- CNNs


def cnn(kind: str, channels: int = 64) -> MaskedImageModel:
    torch.manual_seed(0)
    if kind == "resnet":
        net = backbones.resnet(depth=18, block_counts=(1, 1, 1, 1), base_channels=channels)
    else:
        net = backbones.convnext(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
    return MaskedImageModel(net, MIMLoss()).eval()


def their_resnet() -> torchvision_resnet.ResNet:
    return torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1])


def their_convnext() -> torchvision_convnext.ConvNeXt:
    blocks = [(8, 16, 1), (16, 24, 1), (24, 32, 2), (32, None, 1)]
    return torchvision_convnext.ConvNeXt([torchvision_convnext.CNBlockConfig(*block) for block in blocks])


def of_the_authors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ConvNeXt's weights under the names of its authors, from timm's."""
    for pattern, other in openmixup.CONVNEXT_NAMES:
        weights = {re.sub(pattern, other, name): value for name, value in weights.items()}
    names = {"depthwise_conv": "dwconv", "pointwise_conv": "pwconv", "norm3.": "norm."}
    for name, other in names.items():
        weights = {key.replace(name, other): value for key, value in weights.items()}
    return weights


CNNS = [("resnet", "torchvision"), ("resnet", "A2MIM")]
CNNS += [("convnext", author) for author in ("torchvision", "timm", "A2MIM", "its authors")]


@pytest.mark.parametrize(("kind", "author"), CNNS)
def test_cnns_give_their_outputs(kind, author, tmp_path, capsys):
    channels = 64 if author == "torchvision" else 8
    model, images = cnn(kind, channels), torch.rand(1, 3, 32, 32)
    before = model.decoder.weight.clone()
    if author == "torchvision":
        other: Any = drawn(their_resnet() if kind == "resnet" else their_convnext())
        weights = other.state_dict()
    else:
        other = drawn(cnn(kind, channels)).encoder
        weights = other.state_dict()
        if author == "A2MIM":
            weights = {f"backbone.{openmixup.encoder_name(other, k)}": v for k, v in weights.items()}
        if author == "its authors":
            weights = of_the_authors(weights)
    for name, value in weights.items():
        if name.endswith("running_var"):
            value.abs_()
    a2mim.initial.start_from(model, read(weights, tmp_path), "x.pth")
    whole = len(model.encoder.state_dict())
    assert f"{whole} of the encoder's {whole} tensors" in capsys.readouterr().out
    found = model.encoder.forward_features(images)
    if author == "torchvision" and kind == "resnet":
        expected = torch.nn.Sequential(*list(other.children())[:-2])(images)
    elif author == "torchvision":
        found, expected = model.encoder.forward_head(found, pre_logits=True), other.features(images).mean((2, 3))
        expected = other.classifier[0](expected[..., None, None]).flatten(1)
        found = found.flatten(1)
    else:
        expected = other.forward_features(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.decoder.weight, before)


# ---- reports and mistakes


@methods
def test_a_file_that_does_not_fit_is_one_sentence(method, tmp_path):
    wide = timm_vit(embed_dim=48).state_dict()
    nothing = "nothing of it fits this encoder"
    for content, words in (
        (RESNET, rf"x.pth \(weights of a ResNet\): {nothing}; a "),
        (wide, rf"x.pth: {nothing}: \S+ is \(.*\), expected \(.*\); a ViT of 2 blocks and width 24"),
    ):
        with pytest.raises(distributed.UserError, match=words):
            started(method, content, tmp_path)


def test_report_of_a_part(tmp_path, capsys):
    """Few of the blocks fit: a warning."""
    file = {name: value for name, value in WEIGHTS.items() if "blocks.1." not in name and "mlp" not in name}
    started("saim", file, tmp_path)
    said = capsys.readouterr().out.splitlines()[-1]
    new = "new: blocks (20), query_blocks (32), prediction_head (4)"
    assert f"WARNING: x.pth: 18 of the encoder's 38 tensors and 0 others taken; {new}; unused: head (2)" in said


# ---- runs

SHARED = "--num_workers 0 --device cpu --batch_size 16 --epochs 1 --warmup_epochs 0"  # 3 steps
CAE = "--model cae_nano --input_size 16 --patch_size 4 --second_input_size 16 --discrete_vae_type customized"
CAE += " --decoder_embed_dim 96 --decoder_num_heads 3 --regressor_depth 1 --decoder_depth 1"
CAE += " --decoder_num_classes 12 --num_mask_patches 8 --min_mask_patches_per_block 1 --base_momentum 0.9"
UDI = "--arch vit_nano --patch_size 8 --global_size 32 --local_size 16 --out_dim 64 --local_crops_number 1"
UDI += " --global_sampling_window_size 2 --local_sampling_window_size 1 --warmup_teacher_temp_epochs 1"
SEMAIM = "--model aim_nano --query_depth 1 --input_size 16 --patch_size 8 --use_ema_model --log_dir="
SAIM = "--model saim_nano --query_depth 1 --input_size 16 --patch_size 8"
RUNS: dict[str, tuple[Any, type, str]] = {
    "saim": (saim.main_pretrain, SaimViT, SAIM),
    "semaim": (semaim.main_pretrain, AimViT, SEMAIM),
    "cae": (cae.main_pretrain, ContextAutoencoderViT, CAE),
    "a2mim": (
        a2mim.main_pretrain,
        MaskedImageModel,
        "--backbone vit_nano --patch_size 8 --input_size 32 --mask_patch_size 16",
    ),
    "udi": (udi.main_pretrain, MultiCropWrapper, UDI),
}
LATEST = {"semaim": "aim_nano.exp.temp.pth", "a2mim": "latest.pth"}


@pytest.fixture(autouse=True)
def narrow_head(monkeypatch):
    """UDI's is 2,048 wide, which takes long to draw and to save."""
    monkeypatch.setattr(DINOHead.__init__, "__defaults__", (False, True, 3, 64, 32))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A file with the ViT of a nano network for 32 pixels and patches of 8."""
    path = tmp_path_factory.mktemp("encoder") / "vit.pth"
    vit = timm_vit(32, 8, **NANO)
    torch.save({"model": vit.state_dict()}, path)
    return path


def flags_of(method: str, digits: str, folder: Path, start: Path, *further: str) -> list[str]:
    flags = [*RUNS[method][2].split(), *SHARED.split(), "--data_path", digits, "--output_dir", str(folder)]
    if method == "cae":
        folder.mkdir(parents=True, exist_ok=True)
        flags += ["--discrete_vae_weight_path", tokenizer_file(folder.parent)]
    return [*flags, "--initial_checkpoint", str(start), *further]


@pytest.mark.parametrize("method", ["semaim", "cae", "udi"])
def test_copies_start_as_copies(method, digits, encoder, tmp_path):
    """At rate 0 the weights are those of the start after a run."""
    still = ["--lr", "0", "--min_lr", "0", "--weight_decay", "0", "--batch_size", "48"]
    run_main(RUNS[method][0], *flags_of(method, digits, tmp_path / "run", encoder, *still))
    state = distributed.load(str(tmp_path / "run" / LATEST.get(method, "checkpoint.pth")))
    weights = distributed.weights_of(state, "x", ("student", *distributed.WEIGHT_KEYS))
    copies = {
        "semaim": lambda: (weights, state["ema_state_dict"]),
        "cae": lambda: (distributed.part_of(weights, "encoder."), distributed.part_of(weights, "alignment_encoder.")),
        "udi": lambda: (weights, state["teacher"]),
    }
    own, copy = copies[method]()
    assert own.keys() == copy.keys()
    for name, value in own.items():
        torch.testing.assert_close(copy[name], value, rtol=1e-6, atol=1e-7)  # an average of equal values rounds
    taken = torch.load(encoder)["model"]["blocks.3.mlp.fc2.weight"]
    assert any(torch.equal(value, taken) for name, value in own.items() if name.endswith("blocks.3.mlp.fc2.weight"))


RESUMED = [pytest.param(name, marks=[] if name == "saim" else [pytest.mark.slow]) for name in RUNS]


@pytest.mark.parametrize("method", RESUMED)
def test_a_run_resumes_to_the_same_bits(method, digits, encoder, tmp_path, monkeypatch, capsys):
    """Its folder's checkpoint goes on, without the file; run.json keeps the file's SHA-256."""
    main, network, _ = RUNS[method]
    latest, digest = LATEST.get(method, "checkpoint.pth"), hashlib.sha256(encoder.read_bytes()).hexdigest()
    start = tmp_path / "start.pth"
    start.write_bytes(encoder.read_bytes())
    run_main(main, *flags_of(method, digits, tmp_path / "whole", start))
    flags = flags_of(method, digits, tmp_path / "broken", start)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        spoil(patch, network, 1, stop=True)
        run_main(main, *flags)
    start.unlink()
    run_main(main, *flags)
    log = latest.replace("temp.pth", "log.txt") if method == "semaim" else "log.txt"
    assert_same(tmp_path / "whole", tmp_path / "broken", latest, log)
    starts = json.loads((tmp_path / "broken" / "run.json").read_text())["starts"]
    assert [start["flags"]["initial_sha256"] for start in starts] == [digest, digest]
    assert distributed.load(str(tmp_path / "broken" / latest))["args"]["initial_sha256"] == digest
    said = capsys.readouterr().out
    assert said.count(f"{start}: ") == 2 and "of the encoder's" in said  # the two runs that began


def test_resume_wins(capsys):
    args = saim.main_pretrain.get_args_parser().parse_args(["--initial_checkpoint", "a.pth", "--resume", "b.pth"])
    assert distributed.initial_weights(args, args.resume) == {}
    assert "--resume b.pth wins: nothing is taken from --initial_checkpoint a.pth" in capsys.readouterr().out
    assert "initial_sha256" not in vars(args)


@methods
def test_mistakes_are_one_line(method, digits, encoder, tmp_path, capsys):
    main, missing = RUNS[method][0], tmp_path / "missing.pth"
    assert f"{missing}: no such" in mistake(main, *flags_of(method, digits, tmp_path / "run", missing), capsys=capsys)
    if method == "a2mim":
        both = flags_of(method, digits, tmp_path / "run", encoder, "--pretrained", str(encoder))
        words = "--pretrained and --initial_checkpoint: expected one of them"
        assert words in mistake(main, *both, capsys=capsys)
    if method == "saim":
        torch.save({"model": RESNET}, tmp_path / "x.pth")
        said = mistake(main, *flags_of(method, digits, tmp_path / "run", tmp_path / "x.pth"), capsys=capsys)
        words = "(weights of a ResNet): nothing of it fits this encoder; a ViT of 4 blocks and width 96 fits\n"
        assert said.endswith(words)
