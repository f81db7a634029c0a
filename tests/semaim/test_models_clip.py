"""The frozen teachers: CLIP against the authors' numbers, both from every kind of file, and files that are refused."""

import hashlib
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from common.distributed import UserError
from semaim import main_pretrain
from semaim.blocks import LayerNorm
from semaim.models_clip import ClipVisual, load_teacher, read_weights
from semaim.models_semaim import AimViT, calculate_similarity
from tests.support.helpers import (
    assert_close,
    golden_files,
    load_golden,
    without_key_bias,
)
from tests.support.semaim_networks import check_ranks


class Node(nn.Module):
    """A module of a tree that has the names of a state dict."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def tree(state: dict[str, Tensor]) -> nn.Module:
    root = Node()
    for name, value in state.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, Node())
            node = getattr(node, part)
        if value.is_floating_point():
            node.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        else:
            node.register_buffer(leaf, value)
    return root


def save_archive(state: dict[str, Tensor], path: Path, traced: bool = False) -> None:
    """Write a state dict as OpenAI publishes its models: as a TorchScript archive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.jit.trace(tree(state), torch.zeros(1)) if traced else torch.jit.script(tree(state))
        module.save(str(path))  # type: ignore[union-attr]


TEXT = {  # what an official file holds besides the image tower
    "positional_embedding": torch.zeros(77, 512),
    "text_projection": torch.zeros(512, 512),
    "logit_scale": torch.zeros(()),
    "transformer.resblocks.0.ln_1.weight": torch.zeros(512),
    "ln_final.weight": torch.zeros(512),
    "token_embedding.weight": torch.zeros(10, 512),
    "input_resolution": torch.tensor(224),
    "context_length": torch.tensor(77),
    "vocab_size": torch.tensor(10),
}


# ---- goldens


@golden_files("semaim", "clip_teacher")
@pytest.mark.parametrize("kind", ["plain", "with text", "with the student", "scripted archive", "traced archive"])
def test_clip_tokens(path, kind, tmp_path):
    """The teacher's tokens, from every form in which its weights may come."""
    ref = load_golden(path)
    state, file = ref.group("sd_clip"), tmp_path / "ViT-B-16.pt"
    if kind.endswith("archive"):
        save_archive({**state, **TEXT}, file, traced=kind.startswith("traced"))
    else:
        torch.save({"plain": state, "with text": {**TEXT, **state}, "with the student": {**state, **TEXT}}[kind], file)
    teacher = load_teacher("clip", str(file), ref.kwargs["img_size"])
    assert (teacher.out_dim, teacher.training) == (ref.kwargs["out_dim"], False)
    assert not any(p.requires_grad for p in teacher.parameters())
    tokens, tol = teacher(ref["in/imgs"]), ref.meta["tol"]["tokens"]
    ref.check("out/tokens", tokens, rtol=tol, atol=tol)
    ref.check("out/attention_maps", calculate_similarity(tokens), rtol=1e-4, atol=10 * tol)


@golden_files("semaim", "clip_teacher")
def test_clip_weights_go_through_half_precision(path):
    """As upstream. Without that rounding the tokens are those stored beside, and plainly others."""
    ref = load_golden(path)
    if "out/tokens_without_fp16_rounding" not in ref:
        pytest.skip("the file holds no such tokens")
    sizes, tol = ref.meta["clip"], ref.meta["tol"]["tokens"]
    teacher = ClipVisual(
        sizes["input_resolution"], sizes["patch_size"], sizes["width"], sizes["layers"], sizes["output_dim"]
    )
    teacher.load_state_dict({k.removeprefix("visual."): v for k, v in ref.group("sd_clip").items()})
    expected = ref["out/tokens_without_fp16_rounding"]
    with torch.no_grad():
        tokens = teacher(ref["in/imgs"][: len(expected)])
    assert_close(tokens, expected, rtol=tol, atol=tol)
    if "out/tokens" in ref:
        assert (tokens - ref["out/tokens"][: len(expected)]).abs().max() > 5 * tol


@golden_files("semaim", "clip_teacher")
@pytest.mark.parametrize("impl", ["mask", "auto", "authors"])
def test_student_of_clip(path, impl, tmp_path):
    ref = load_golden(path)
    tol = ref.meta["tol"]
    model = AimViT(**ref.kwargs, attn_impl=impl)
    model.load_state_dict(ref.weights)
    given = {name: ref[f"in/{name}"] for name in ("noise", "center_noise") if f"in/{name}" in ref}
    torch.save(ref.group("sd_clip"), tmp_path / "clip.pth")
    teacher = load_teacher("clip", str(tmp_path / "clip.pth"), ref.kwargs["img_size"])
    tokens = ref["out/tokens"] if "out/tokens" in ref else teacher(ref["in/imgs"])
    maps = ref["out/attention_maps"] if "out/attention_maps" in ref else calculate_similarity(tokens)
    given |= {"tokens": tokens, "attention_maps": maps}
    loss, permutation, loss_map = model(ref["in/imgs"], **given)
    check_ranks(ref, "out/permutation", permutation, model.permutation_type)
    ref.check("out/loss", loss, rtol=tol["loss"], atol=0)
    ref.check("out/loss_map", loss_map, rtol=tol["tokens"], atol=tol["tokens"])
    loss.backward()
    for name, expected in ref.group("out/grad").items():
        grad = model.get_parameter(name).grad
        assert grad is not None, name
        actual, expected = (without_key_bias(name, g) for g in (grad, expected))
        if expected.numel():
            atol = min(tol["grad"], 0.01 * expected.abs().max().item())
            assert_close(actual, expected, rtol=tol["grad"], atol=atol, what=name)


# ---- files of CLIP


def clip_state(**kwargs) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = ClipVisual(**{"img_size": 16, "patch_size": 4, "width": 64, "layers": 1, "output_dim": 6, **kwargs})
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return {f"visual.{name}": value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("wrapped", ["{}", "state_dict", "model"])
def test_clip__checkpoint_of_a_training(tmp_path, wrapped):
    state = clip_state()
    prefixed = {f"module.{name}": value for name, value in state.items()}
    torch.save(state if wrapped == "{}" else {wrapped: prefixed, "epoch": 1}, tmp_path / "clip.pt")
    teacher = load_teacher("clip", str(tmp_path / "clip.pt"), 16)
    assert torch.equal(teacher.state_dict()["ln_pre.weight"], state["visual.ln_pre.weight"])


def test_clip__half_precision_file_gives_a_float32_teacher(tmp_path):
    state = clip_state()
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "clip.pt")
    teacher = load_teacher("clip", str(tmp_path / "clip.pt"), 16)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert torch.equal(teacher.state_dict()["proj"], state["visual.proj"].half().float())


def test_clip__another_image_size_resizes_the_positions(tmp_path):
    torch.save(clip_state(), tmp_path / "clip.pt")
    teacher = load_teacher("clip", str(tmp_path / "clip.pt"), 24)
    assert teacher(torch.rand(2, 3, 24, 24)).shape == (2, 37, 6)


def test_archive__tensors_of_every_kind(tmp_path):
    """Values, types, views of a shared storage and nesting survive; no code of the archive runs."""
    shared = torch.arange(6.0).reshape(2, 3)
    state = {
        "a.weight": shared,
        "a.0.transposed": shared.T,
        "b.halved": torch.randn(3).half(),
        "count": torch.tensor(7),
    }
    save_archive(state, tmp_path / "archive.pt")
    found = read_weights(str(tmp_path / "archive.pt"))
    assert set(found) == set(state)
    for name, value in state.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
        assert not found[name].requires_grad


# ---- files of DINO


def dino(**kwargs) -> TimmViT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 1}
    return TimmViT(**{**sizes, "num_classes": 0, "norm_layer": LayerNorm, **kwargs}).eval()


def dino_file(form: str, folder: Path) -> str:
    state = dino().state_dict()
    head = {"head.mlp.0.weight": torch.zeros(3, 64), "head.last_layer.weight_g": torch.zeros(5, 1)}
    content: dict[str, Any] = {
        "plain": state,
        "with head": {**state, "head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)},
        "backbone": {"teacher": {**{f"backbone.{k}": v for k, v in state.items()}, **head}, "epoch": 100},
        "module.backbone": {
            "student": {f"module.backbone.{k}": v + 1 for k, v in state.items()},
            "teacher": {f"module.backbone.{k}": v for k, v in state.items()},
        },
        "state_dict": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }[form]
    torch.save(content, folder / "dino.pth")
    return str(folder / "dino.pth")


@pytest.mark.parametrize("form", ["plain", "with head", "backbone", "module.backbone", "state_dict"])
def test_dino__tokens_after_the_final_norm(tmp_path, form):
    teacher = load_teacher("dino", dino_file(form, tmp_path), 16)
    imgs = torch.rand(2, 3, 16, 16)
    assert (teacher.out_dim, teacher.training) == (64, False)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert_close(teacher(imgs), dino().forward_features(imgs), rtol=0, atol=1e-6)
    assert teacher(imgs).shape == (2, 17, 64)


def test_dino__another_image_size_resizes_the_positions(tmp_path):
    teacher = load_teacher("dino", dino_file("plain", tmp_path), 24)
    assert teacher(torch.rand(2, 3, 24, 24)).shape == (2, 37, 64)


# ---- refusals


def refusal(kind: str, path: Path | str) -> str:
    with pytest.raises(UserError) as error:
        load_teacher(kind, str(path), img_size=16)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_path_says_what_to_get():
    assert "name the weights of OpenAI's ViT-B-16.pt with --teacher_path" in refusal("clip", "")
    assert "name the weights of dino_vitbase16_pretrain.pth with --teacher_path" in refusal("dino", "")
    assert "--teacher_path /nowhere/clip.pt: no such file; expected OpenAI's" in refusal("clip", "/nowhere/clip.pt")
    assert "no such file" in refusal("clip", "/tmp")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("clip", dino().state_dict()),
        ("dino", clip_state()),
        ("clip", {"visual.conv1.weight": torch.zeros(64, 3, 4, 4)}),
        ("clip", {k: v for k, v in clip_state().items() if "resblocks.0.mlp" not in k}),
        ("clip", {**clip_state(), "visual.attnpool.c_proj.weight": torch.zeros(1)}),  # a ResNet of CLIP's
        ("clip", {**clip_state(), "visual.conv1.weight": torch.zeros(64, 3, 4)}),
        ("dino", {"patch_embed.proj.weight": torch.zeros(64, 3, 4, 4)}),
        ("dino", {**dino().state_dict(), "register_tokens": torch.zeros(1, 4, 64)}),  # DINOv2
        ("dino", {}),
        ("clip", {"model": "aim_base"}),
    ],
)
def test_other_networks_are_named(tmp_path, kind, content):
    torch.save(content, tmp_path / "file.pth")
    official = {"clip": "OpenAI's ViT-B-16.pt", "dino": "dino_vitbase16_pretrain.pth"}[kind]
    assert f"file.pth: is no {kind} ViT like {official} (" in refusal(kind, tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("clip", ["--patch_size", "8"], "gives 16 patches at 16 pixels, --model aim_nano predicts 4"),
        ("dino", ["--patch_size", "8"], "gives 16 patches at 16 pixels, --model aim_nano predicts 4"),
        ("dino", ["--patch_size", "4"], "gives 64 wide features at 16 pixels, --model aim_nano predicts 96"),
    ],
)
def test_tokens_that_do_not_fit_are_named(tmp_path, kind, flags, words):
    path = dino_file("plain", tmp_path) if kind == "dino" else str(tmp_path / "clip.pt")
    if kind == "clip":
        torch.save(clip_state(), path)
    argv = ["--model", "aim_nano", "--query_depth", "4", "--input_size", "16", "--predict_feature", kind, *flags]
    args = main_pretrain.get_args_parser().parse_args([*argv, "--teacher_path", path])
    with pytest.raises(UserError, match=f"--teacher_path {path}: {words}"):
        main_pretrain.build_with_teacher(args)


@pytest.mark.parametrize(("kind", "width"), [("clip", 6), ("dino", 64)])
def test_student_predicts_as_many_features_as_the_teacher_gives(tmp_path, monkeypatch, kind, width):
    path = dino_file("plain", tmp_path) if kind == "dino" else str(tmp_path / "clip.pt")
    if kind == "clip":
        torch.save(clip_state(), path)
    sizes = {"embed_dim": 64, "depth": 4, "num_heads": 1}
    monkeypatch.setitem(main_pretrain.MODELS, "aim_64", lambda **kwargs: AimViT(**sizes, **kwargs))
    argv = ["--model", "aim_64", "--query_depth", "4", "--input_size", "16", "--patch_size", "4"]
    args = main_pretrain.get_args_parser().parse_args([*argv, "--predict_feature", kind, "--teacher_path", path])
    model, teacher = main_pretrain.build_with_teacher(args)
    assert teacher is not None
    imgs = torch.rand(2, 3, 16, 16)
    assert model.forward_aim(imgs)[0].shape == teacher(imgs)[:, 1:].shape == (2, 16, width)


@pytest.mark.parametrize("form", ["plain", "archive"])
@pytest.mark.parametrize("keep", [0, 50, 0.3, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path, form, keep):
    path = tmp_path / "clip.pt"
    if form == "plain":
        torch.save(clip_state(), path)
    else:
        save_archive(clip_state(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    assert "clip.pt: truncated or not a checkpoint" in refusal("clip", path)


class Hostile:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return (os.system, (f"touch {self.victim}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_are_refused(tmp_path, zipped):
    path, victim = tmp_path / "evil.pt", tmp_path / "victim"
    torch.save({**clip_state(), "x": Hostile(victim)}, path, _use_new_zipfile_serialization=zipped)
    message = refusal("clip", path)
    assert "it would execute posix.system; refused" in message or "it would execute os.system; refused" in message
    assert not victim.exists()


def edit_archive(path: Path, name: str, data: bytes | None) -> None:
    """Replace a record of a TorchScript archive, or leave it out."""
    with zipfile.ZipFile(path) as archive:
        records = {info: archive.read(info) for info in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for info, content in records.items():
            if not info.endswith(name):
                archive.writestr(info, content)
            elif data is not None:
                archive.writestr(info, data)


def call_of(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls module.name(argument)."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.jit._pickle", "os"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.fromkeys"),
        ("torch", "os.systemStorage"),
    ],
)
def test_hostile_archives_are_refused(tmp_path, module, name):
    path, victim = tmp_path / "evil.pt", tmp_path / "victim"
    save_archive(clip_state(), path)
    edit_archive(path, "data.pkl", call_of(module, name, f"touch {victim}"))
    message = refusal("clip", path)
    assert f"damaged TorchScript archive (it would execute {module}.{name}; refused)" in message
    assert not victim.exists()


def test_code_of_an_archive_is_not_run(tmp_path):
    """An archive's own classes become plain containers, whatever their code says."""
    path = tmp_path / "clip.pt"
    save_archive(clip_state(), path)
    with zipfile.ZipFile(path) as archive:
        code = [name for name in archive.namelist() if name.endswith(".py")]
    assert code
    for name in code:
        edit_archive(path, name, b"this is no program")
    assert set(read_weights(str(path))) == set(clip_state())


@pytest.mark.parametrize(
    ("record", "data"),
    [
        ("data.pkl", None),
        ("data.pkl", b""),
        ("data.pkl", b"nonsense"),
        ("data.pkl", pickle.dumps([1, 2])),
        ("data.pkl", pickle.dumps({"a": 1})),
        ("data.pkl", b"c__torch__\nA\n(V1\ntR."),
        ("data/0", None),
        ("data/0", b""),
        ("data/0", b"1234"),
    ],
)
def test_damaged_archives_are_named(tmp_path, record, data):
    path = tmp_path / "clip.pt"
    save_archive(clip_state(), path)
    edit_archive(path, record, data)
    assert "clip.pt: " in refusal("clip", path)


def damaged_directory(path: Path) -> None:
    """Flip a byte of the file names at the end of a zip file."""
    save_archive(clip_state(), path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"data.pkl")] ^= 0x80
    path.write_bytes(data)


def empty_zip(path: Path) -> None:
    zipfile.ZipFile(path, "w").close()


ODD = {
    "damaged directory": damaged_directory,
    "empty zip": empty_zip,
    "number as key": lambda path: torch.save({0: torch.zeros(1)}, path),
    "vector as projection": lambda path: torch.save({**clip_state(), "visual.proj": torch.zeros(64)}, path),
    "no patch": lambda path: torch.save({**clip_state(), "visual.conv1.weight": torch.zeros(64, 3, 0, 0)}, path),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_odd_files_are_named(tmp_path, make):
    make(tmp_path / "clip.pt")
    assert "clip.pt: " in refusal("clip", tmp_path / "clip.pt")


def test_narrow_dino_is_named(tmp_path):
    torch.save(dino(embed_dim=32).state_dict(), tmp_path / "dino.pth")
    assert "dino.pth: is no dino ViT" in refusal("dino", tmp_path / "dino.pth")


def test_archive_by_address(tmp_path, monkeypatch):
    """A TorchScript archive loads from an https address as it does from a file, here from torch's download folder."""
    url = "https://example.org/ViT-B-16.pt"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-ViT-B-16.pt"
    target.parent.mkdir(parents=True)
    save_archive(clip_state(), target)
    assert load_teacher("clip", url, 16).num_patches == 16
