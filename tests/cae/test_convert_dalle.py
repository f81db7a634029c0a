"""Official pickles become plain tensors in both formats of torch.save; hostile and damaged ones cannot do anything."""

import contextlib
import io
import os
import pickle
import struct
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._utils import _rebuild_parameter_with_state

from cae import convert_dalle, models_dalle
from cae.models_dvae import load_tokenizer
from common.distributed import UserError
from tests.support.runs import mistake, run_main

SIZES: dict[str, Any] = {"n_hid": 4, "vocab_size": 12, "n_blk_per_group": 1}
FORMATS = ["zip", "legacy"]
pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # the legacy format keeps it


@pytest.fixture
def dall_e(monkeypatch):
    """The package of the official files, as classes that hold attributes only; gone when the files are read."""
    names = {"dall_e": (), "dall_e.encoder": ("Encoder", "EncoderBlock"), "dall_e.utils": ("Conv2d", "Evil")}
    names["dall_e.decoder"] = ("Decoder", "DecoderBlock")
    for module, classes in names.items():
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        for name in classes:
            setattr(sys.modules[module], name, type(name, (nn.Module,), {"__module__": module}))
    return sys.modules


def official(module: nn.Module, part: str, modules: Any) -> nn.Module:
    """The tree of our module out of the official classes, with the attributes they are known to have."""
    kinds = {
        models_dalle.DalleEncoder: "Encoder",
        models_dalle.DalleDecoder: "Decoder",
        models_dalle.ResidualBlock: f"{part.title()}Block",
    }
    children = {name: official(child, part, modules) for name, child in module.named_children()}
    if isinstance(module, nn.Sequential):
        return nn.Sequential(OrderedDict(children))
    if isinstance(module, models_dalle.Conv2d):
        copy = modules["dall_e.utils"].Conv2d()
    elif type(module) in kinds:
        copy = getattr(modules[f"dall_e.{part}"], kinds[type(module)])()
    else:
        return module  # torch's own
    copy.device, copy.requires_grad, copy.use_mixed_precision = torch.device("cpu"), False, True
    for name, value in module.named_parameters(recurse=False):
        copy.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))
    for name, child in children.items():
        copy.add_module(name, child)
    return copy


def save(value: Any, path: Path, form: str) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=form == "zip")


def tokenizer() -> models_dalle.DalleTokenizer:
    return models_dalle.DalleTokenizer(**SIZES, decoder_n_init=8)


def write_official(
    net: models_dalle.DalleTokenizer, folder: Path, form: str, modules: Any, parts: Sequence[str] = convert_dalle.PARTS
) -> None:
    folder.mkdir(exist_ok=True)
    for part in parts:
        save(official(getattr(net, part), part, modules), folder / f"{part}.pkl", form)
    for name in [name for name in modules if name.startswith("dall_e")]:
        del modules[name]  # reading must not need them


def assert_same_tokenizer(a: models_dalle.DalleTokenizer, b: models_dalle.DalleTokenizer) -> None:
    imgs = models_dalle.map_pixels(torch.rand(2, 3, 16, 16))
    assert torch.equal(a.logits(imgs), b.logits(imgs))
    if b.decoder is not None:
        indices = torch.randint(SIZES["vocab_size"], (2, 2, 2))
        assert torch.equal(a.decode(indices), b.decode(indices))


# ---- official files


@pytest.mark.parametrize("form", FORMATS)
def test_command_line(tmp_path, dall_e, form, capsys):
    net = tokenizer()
    write_official(net, tmp_path / "in", form, dall_e)
    run_main(convert_dalle, str(tmp_path / "in"), "--output_dir", str(tmp_path / "out"))
    said = capsys.readouterr().out
    parameters = sum(p.numel() for p in net.encoder.parameters())
    assert f"encoder.pkl ({form} format): 42 tensors, {parameters:,} parameters; n_hid 4" in said
    assert "wrote" in said
    for part in ("encoder", "decoder"):
        expected = getattr(net, part).state_dict()
        converted = load_file(tmp_path / "out" / f"{part}.safetensors")
        assert converted.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in converted.items())
    assert_same_tokenizer(net, convert_dalle.load_dalle(str(tmp_path / "out"), with_decoder=True))


@pytest.mark.slow  # the script in a process of its own; what it does is tested above, in this one
def test_script_from_another_folder(tmp_path, dall_e, run_script):
    write_official(tokenizer(), tmp_path / "in", "zip", dall_e, parts=["encoder"])
    script = Path(convert_dalle.__file__)
    said = run_script(script.name, str(tmp_path / "in"), cwd=script.parent).stdout
    assert "decoder.pkl: not there" in said
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["encoder.pkl", "encoder.safetensors"]


@pytest.mark.parametrize("form", FORMATS)
def test_half_precision_and_shared_storages(tmp_path, dall_e, form):
    """Weights may be stored as float16, and as views of one storage."""
    net = tokenizer()
    conv: Any = net.encoder.get_submodule("blocks.group_1.block_1.res_path.conv_2")
    joint = torch.cat([conv.w.flatten(), conv.b.flatten()]).half()
    conv.w.data, conv.b.data = joint[:9].view(1, 1, 3, 3).transpose(2, 3), joint[9:]
    write_official(net, tmp_path, form, dall_e, parts=["encoder"])
    loaded = convert_dalle.load_dalle(str(tmp_path))
    assert all(value.dtype == torch.float32 for value in loaded.state_dict().values())
    assert all(torch.equal(v, net.state_dict()[k].float()) for k, v in loaded.state_dict().items())


def test_first_use_converts(tmp_path, dall_e, capsys):
    net = tokenizer()
    write_official(net, tmp_path, "legacy", dall_e)
    assert_same_tokenizer(net, load_tokenizer("dall-e", str(tmp_path), 16))  # type: ignore[arg-type]
    assert "wrote" in capsys.readouterr().out
    assert not (tmp_path / "decoder.safetensors").exists()  # tokens do not need it
    (tmp_path / "encoder.pkl").unlink()
    assert_same_tokenizer(net, load_tokenizer("dall-e", str(tmp_path), 16, with_decoder=True))  # type: ignore[arg-type]
    assert (tmp_path / "decoder.safetensors").exists()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".pkl", ".safetensors", ".safetensors"]  # nothing left over


def test_first_use_in_a_folder_that_cannot_be_written(tmp_path, dall_e, capsys, monkeypatch):
    net = tokenizer()
    write_official(net, tmp_path, "zip", dall_e)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    assert_same_tokenizer(net, convert_dalle.load_dalle(str(tmp_path)))
    assert "cannot be written (Read-only file system); encoder.pkl is used as it is" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder.pkl", "encoder.pkl"]
    assert "encoder.safetensors: cannot be written" in mistake(convert_dalle, str(tmp_path), capsys=capsys)


# ---- files that are not the official ones


def problem(path: Path, part: str = "encoder") -> str:
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as error:
        convert_dalle.read_pickle(path, part)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert text.isprintable()
    return text.removeprefix(f"{path}: ")


def test_missing_files(tmp_path, capsys):
    text = mistake(convert_dalle, str(tmp_path / "none"), capsys=capsys)
    assert f"{tmp_path}/none: is no folder" in text
    assert "https://cdn.openai.com/dall-e/encoder.pkl" in text
    expected = f"{tmp_path}: has no encoder.pkl; the official file is https://cdn.openai.com/dall-e/encoder.pkl"
    assert expected in mistake(convert_dalle, str(tmp_path), capsys=capsys)
    with pytest.raises(UserError, match=r"has no encoder.safetensors or encoder.pkl"):
        convert_dalle.load_dalle(str(tmp_path))
    assert "No such file" in problem(tmp_path / "encoder.pkl")


@pytest.mark.parametrize("form", FORMATS)
def test_other_networks(tmp_path, dall_e, form):
    net = tokenizer()
    odd = official(net.encoder, "encoder", dall_e)
    odd.get_submodule("blocks.group_2.block_1.res_path.conv_1").b = nn.Parameter(torch.zeros(5))
    save(odd, tmp_path / "odd.pkl", form)
    more = official(net.encoder, "encoder", dall_e)
    more.register_buffer("extra", torch.zeros(1))
    save(more, tmp_path / "more.pkl", form)
    save(net.encoder.state_dict(), tmp_path / "state.pkl", form)
    save(official(net.decoder, "decoder", dall_e), tmp_path / "decoder.pkl", form)  # type: ignore[arg-type]
    assert "conv_1.b is (5,), expected (2,)" in problem(tmp_path / "odd.pkl")
    assert "extra is (1,), expected no such tensor" in problem(tmp_path / "more.pkl")
    assert "something else than modules" in problem(tmp_path / "state.pkl")
    assert "is no DALL-E encoder" in problem(tmp_path / "decoder.pkl")
    write_official(net, tmp_path, form, dall_e, parts=["encoder"])
    assert "is no DALL-E decoder" in problem(tmp_path / "encoder.pkl", "decoder")


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files(tmp_path, dall_e, form):
    write_official(tokenizer(), tmp_path, form, dall_e, parts=["encoder"])
    whole = (tmp_path / "encoder.pkl").read_bytes()
    assert convert_dalle.read_pickle(tmp_path / "encoder.pkl", "encoder")[1] == form
    for length in (0, 1, 50, 3000, len(whole) // 2, len(whole) - 20):
        (tmp_path / "cut.pkl").write_bytes(whole[:length])
        assert "damaged" in problem(tmp_path / "cut.pkl")
    (tmp_path / "page.pkl").write_text("<html>404 Not Found</html>")
    assert "damaged" in problem(tmp_path / "page.pkl")
    with open(tmp_path / "huge.pkl", "wb") as file:
        file.truncate(1 << 40)  # a sparse file
    assert "damaged" in problem(tmp_path / "huge.pkl")


def test_damaged_converted_files(tmp_path):
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match=f"{path}: cannot be read"):
        convert_dalle.load_dalle(str(tmp_path))
    net = tokenizer()
    path.write_bytes(convert_dalle.save(net.decoder.state_dict()))  # type: ignore[union-attr]
    with pytest.raises(UserError, match=f"{path}: is no DALL-E encoder"):
        convert_dalle.load_dalle(str(tmp_path))
    path.write_bytes(convert_dalle.save(net.encoder.state_dict()))
    other = models_dalle.DalleDecoder(8, 4, 1, vocab_size=13)
    (tmp_path / "decoder.safetensors").write_bytes(convert_dalle.save(other.state_dict()))
    with pytest.raises(UserError, match="do not fit together"):
        convert_dalle.load_dalle(str(tmp_path), with_decoder=True)


# ---- hostile files


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touched(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix not in (".pkl", ".safetensors")]


@pytest.mark.parametrize("form", FORMATS)
def test_code_is_not_executed(tmp_path, dall_e, form, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = dall_e["dall_e.utils"].Evil()
    type(evil).__setstate__ = lambda self, state: os.mkdir("ran")
    command = "touch ran"
    cases = {
        "posix.system": Call(os.system, command),
        "builtins.eval": Call(eval, "__import__('os').mkdir('ran')"),
        "builtins.getattr": Call(getattr, "a", "upper"),
        "dall_e.utils.Evil": evil,
        "torch.nn.modules.conv.Conv2d": nn.Conv2d(1, 1, 1),
        "torch.nn.modules.module.Module": nn.Module(),
        "torch.serialization.load": Call(torch.load, "encoder.pkl"),
        "torch._utils._rebuild_parameter_with_state": Call(_rebuild_parameter_with_state, 1, 2, 3, 4),
    }
    for place in ("alone", "inside"):
        for name, value in cases.items():
            if place == "inside":
                whole = official(tokenizer().encoder, "encoder", dall_e)
                whole.get_submodule("blocks.group_1").hidden = value
                value = whole
            save(value, tmp_path / "x.pkl", form)
            text = problem(tmp_path / "x.pkl")
            # pickle protocol 2 writes Python 2's names of some modules
            assert text.replace("__builtin__", "builtins") == f"it would execute {name}; refused", name
    assert not touched(tmp_path)


def container(program: bytes, path: Path, form: str) -> None:
    """A file of torch.save whose pickle is this program."""
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
    else:
        header = [pickle.dumps(value, 2) for value in (convert_dalle.LEGACY_MAGIC, 1001, {}, [])]
        path.write_bytes(b"".join(header[:3]) + program + header[3])


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


ENCODER = b"cdall_e.encoder\nEncoder\n"
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n"
# memo 0: an encoder, with a state whose last entry is _modules, a dict that is still open
MODULE = ENCODER + b")\x81q\x00}(" + text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + b"}"
PROGRAMS = [
    # names that lead on from an allowed one
    ("it would execute collections.OrderedDict.fromkeys", b"ccollections\nOrderedDict.fromkeys\n."),
    ("it would execute dall_e.utils.Conv2d.__init__.__globals__", b"cdall_e.utils\nConv2d.__init__.__globals__\n."),
    ("it would execute torch.device.__class__", b"ctorch\ndevice.__class__\n."),
    ("it would execute torch._utils.torch.load", b"ctorch._utils\ntorch.load\n."),
    ("it would execute os\\x1b[2J\\n.system", text("os\x1b[2J\n") + text("system") + b"\x93."),
    # state written to an allowed class instead of to an object: a new __setstate__, __call__, ...
    ("damaged", ENCODER + b"N}" + text("__setstate__") + b"ctorch\ndevice\ns\x86b."),
    ("damaged", b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__code__") + b"Ns\x86b."),
    ("damaged", b"ccollections\nOrderedDict\nN}" + text("update") + b"ctorch\ndevice\ns\x86b."),
    # objects called as functions
    ("damaged", ENCODER + b")R)R."),
    ("damaged", b"ctorch\nFloatStorage\n)R."),
    ("damaged", ENCODER + b"}" + text("x") + b"K\x01s\x81."),
    # persistent ids
    ("no storage", b"K\x05Q."),
    ("no storage", b"P0\n."),
    ("no storage", b"(" + text("module") + text("os") + text("os.py") + text("import os") + b"tQ."),
    ("no storage", b"(" + text("module") + b"ctorch\ndevice\n" + text("a.py") + text("a") + b"tQ."),
    ("no storage", b"(" + text("storage") + text("os.system") + text("0") + text("cpu") + b"K\x01tQ."),
    ("no storage", STORAGE + b"K\x00" + text("cpu") + b"K\x01tQ."),
    ("no storage", STORAGE + text("0") + text("cpu") + b"K\x01(" + text("v") + b"K\x00K\x01ttQ."),
    # a module of modules that never ends, and one whose state is no state
    ("more than 1000 modules", MODULE + text("a") + b"h\x00sub."),
    ("damaged", ENCODER + b")\x81N}" + text("_modules") + b"K\x01s\x86b."),
    ("strange names", MODULE + text("a.") + b"Nsub."),
    # numbers beyond all bounds
    ("damaged", b"\x8e" + struct.pack("<Q", 1 << 62) + b"."),
    ("damaged", b"B\xff\xff\xff\x7f."),
    ("something else than modules", b"Nr\0\0\0\x40."),  # a memo of 2^30 entries
]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("expected", "program"), PROGRAMS)
def test_hand_written_programs(tmp_path, form, expected, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    container(program, tmp_path / "x.pkl", form)
    assert expected in problem(tmp_path / "x.pkl")
    assert not touched(tmp_path)
    assert convert_dalle._Module(1).args == (1,)
    assert not hasattr(convert_dalle._Module, "__code__")


def test_modules_that_share_children_without_end(tmp_path, dall_e):
    top = dall_e["dall_e.encoder"].Encoder()
    for _ in range(60):  # 2^60 paths
        parent = dall_e["dall_e.encoder"].Encoder()
        parent.a, parent.b = top, top
        top = parent
    save(top, tmp_path / "x.pkl", "zip")
    assert "more than 1000 modules" in problem(tmp_path / "x.pkl")


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_larger_than_the_file(tmp_path, dall_e, form):
    """Views with stride 0 repeat one number as often as they like."""
    net = tokenizer()
    whole = official(net.encoder, "encoder", dall_e)
    head = whole.get_submodule("blocks.output.conv")
    head.w = nn.Parameter(torch.zeros(1, 1, 1, 1).expand(10**11, 32, 1, 1), requires_grad=False)
    head.b = nn.Parameter(torch.zeros(1).expand(10**11), requires_grad=False)
    save(whole, tmp_path / "x.pkl", form)
    assert "larger than the file" in problem(tmp_path / "x.pkl")


def test_storages_that_are_not_there(tmp_path, dall_e):
    write_official(tokenizer(), tmp_path, "zip", dall_e, parts=["encoder"])
    with zipfile.ZipFile(tmp_path / "encoder.pkl") as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    first = next(name for name in entries if name.endswith("/data/0"))

    def rewritten(**changes) -> str:
        with zipfile.ZipFile(tmp_path / "x.pkl", "w", changes.get("compression", zipfile.ZIP_STORED)) as archive:
            for name, data in entries.items():
                if name != first or "data" in changes:
                    archive.writestr(name, changes.get("data", data) if name == first else data)
        return problem(tmp_path / "x.pkl")

    assert "damaged" in rewritten()
    assert "damaged" in rewritten(data=entries[first][:-4])
    assert "damaged" in rewritten(data=b"")
    assert "compressed" in rewritten(data=entries[first], compression=zipfile.ZIP_DEFLATED)


def test_legacy_storages_that_are_not_there(tmp_path, dall_e):
    write_official(tokenizer(), tmp_path, "legacy", dall_e, parts=["encoder"])
    whole = (tmp_path / "encoder.pkl").read_bytes()
    size = struct.pack("<q", 12)  # of the last storage, the head's biases
    place = whole.rindex(size)
    for wrong in (1 << 60, -(1 << 60), -1, 11):
        (tmp_path / "x.pkl").write_bytes(whole[:place] + struct.pack("<q", wrong) + whole[place + 8 :])
        assert "damaged" in problem(tmp_path / "x.pkl")


def test_other_containers(tmp_path, monkeypatch):
    """What torch.load would unpack or run by itself."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "tar.pkl", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert "damaged" in problem(tmp_path / "tar.pkl")
    with contextlib.suppress(RuntimeError):
        torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "script.pkl")
        assert "it would execute __torch__" in problem(tmp_path / "script.pkl")
    assert not touched(tmp_path)
