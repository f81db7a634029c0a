"""OpenAI's encoder.pkl and decoder.pkl as plain tensors: python cae/convert_dalle.py FOLDER [--output_dir OUT].

The files are pickled Python objects, which could run anything when unpickled freely. Here every object becomes an
inert record of what the file says about it: nothing of the file, of torch or of dall_e is called, names outside of a
short list are refused, and numbers are read only after all names and shapes were found to be the network's.
"""

import argparse
import contextlib
import io
import math
import mmap
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

if not __package__:  # run as a script: import from this checkout, whatever is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cae.models_dalle import DalleDecoder, DalleEncoder, DalleTokenizer
from common import distributed
from common.distributed import UserError

URL = "https://cdn.openai.com/dall-e/{part}.pkl"
PARTS = ("encoder", "decoder")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first value in a file of torch.save that is no zip archive
MAX_MODULES = 1000  # the official networks have about 100, containers included


def get_args_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("convert_dalle", allow_abbrev=False, description="Convert the DALL-E tokenizer.")
    p.add_argument("folder", help="folder with OpenAI's encoder.pkl and, for pictures, decoder.pkl")
    p.add_argument(
        "--output_dir",
        default="",
        help="folder that gets encoder.safetensors and decoder.safetensors; default: the same folder",
    )
    return p


# ---- inert records


class _Refused(ValueError):
    """The file is readable, but not what it should be; says why."""


class _Record:
    """An object of the file: the arguments it was made with and its state.

    Having __setstate__, neither it nor the class itself lets a file set attributes.
    """

    __slots__ = ("args", "state")

    def __new__(cls, *args: Any):
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *_args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Module(_Record):
    """state: its attributes."""

    __slots__ = ()


class _Tensor(_Record):
    """args: storage, offset, size, stride, ..."""

    __slots__ = ()


class _Parameter(_Record):
    """args: tensor, ..."""

    __slots__ = ()


class _Dict(dict):
    """An OrderedDict, without the attributes that it may carry."""

    __slots__ = ()

    def __setstate__(self, _state: Any) -> None:
        pass


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype


_LAYERS = (nn.Sequential, nn.ReLU, nn.MaxPool2d, nn.Identity, nn.Upsample)
ALLOWED: dict[tuple[str, str], Any] = {
    ("dall_e.encoder", "Encoder"): _Module,
    ("dall_e.encoder", "EncoderBlock"): _Module,
    ("dall_e.decoder", "Decoder"): _Module,
    ("dall_e.decoder", "DecoderBlock"): _Module,
    ("dall_e.utils", "Conv2d"): _Module,
    **{(layer.__module__, layer.__name__): _Module for layer in _LAYERS},
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "device"): _Record,
    ("builtins", "set"): _Record,
    ("__builtin__", "set"): _Record,  # as protocol 2 spells it
    ("collections", "OrderedDict"): _Dict,
}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler, as its twin in C allocates as much memory as a file asks for."""

    def __init__(self, file: Any):
        super().__init__(file)
        self.itemsize: dict[str, int] = {}  # of the storages, by key

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            printable = ascii(f"{module}.{name}")[1:-1][:100]  # a file may have put control characters there
            raise _Refused(f"it would execute {printable}; refused")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("module", kind, _, _) if kind is _Module:  # the legacy format adds the class's source text
                return kind
            case ("storage", torch.dtype() as dtype, str(key), _, int(), *view) if view in ([], [None]):
                self.itemsize[key] = dtype.itemsize
                return _Storage(key, dtype)
        raise _Refused("it refers to something that is no storage; refused")


# ---- the two formats of torch.save: the unpickled module, and how to read a storage's bytes

Read = Callable[[_Storage], bytes]


def _open_zip(archive: zipfile.ZipFile) -> tuple[Any, Read]:
    root = archive.namelist()[0].split("/")[0]

    def read(name: str) -> bytes:
        info = archive.getinfo(f"{root}/{name}")
        if info.compress_type != zipfile.ZIP_STORED:  # torch never compresses, bombs do
            raise _Refused("it is compressed; refused")
        return archive.read(info)

    return _Unpickler(io.BytesIO(read("data.pkl"))).load(), lambda storage: read(f"data/{storage.key}")


def _open_legacy(data: mmap.mmap) -> tuple[Any, Read]:
    if data[:1] != pickle.PROTO or _Unpickler(data).load() != LEGACY_MAGIC:
        raise ValueError("another format")
    for _ in ("version", "machine"):
        _Unpickler(data).load()
    unpickler = _Unpickler(data)
    module = unpickler.load()
    places: dict[str, slice] = {}  # bytes of each storage
    for key in _Unpickler(data).load():
        (numel,) = struct.unpack("<q", data.read(8))
        places[key] = slice(data.tell(), data.tell() + numel * unpickler.itemsize[key])
        data.seek(places[key].stop)
    return module, lambda storage: data[places[storage.key]]


# ---- from records to tensors


def _records(module: Any) -> dict[str, _Tensor]:
    """The tensors of a module and of those inside it, by state-dict key."""
    found: dict[str, _Tensor] = {}
    waiting = [("", module)]
    for _ in range(MAX_MODULES):
        if not waiting:
            return found
        path, part = waiting.pop()
        if type(part) is not _Module:
            raise _Refused("it holds something else than modules in modules")
        children = part.state["_modules"]
        own = {**part.state["_parameters"], **part.state["_buffers"]}
        if not all(re.fullmatch(r"\w{1,40}", name) for name in (*own, *children)):
            raise _Refused("it holds modules of strange names")
        for name, value in own.items():
            tensor = value.args[0] if type(value) is _Parameter else value
            if type(tensor) is _Tensor:
                found[path + name] = tensor
        waiting += [(f"{path}{name}.", child) for name, child in children.items()]
    raise _Refused(f"it has more than {MAX_MODULES} modules")


def _tensor(record: _Tensor, read: Read) -> Tensor:
    storage, offset, size, stride = record.args[:4]
    data = torch.frombuffer(bytearray(read(storage)), dtype=storage.dtype)
    return torch.as_strided(data, size, stride, offset).to(torch.float32, copy=True).contiguous()


def _sizes(part: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Keywords of the encoder or decoder whose tensors have these shapes, from two of them."""
    blocks = {name.split(".")[2] for name in shapes if name.startswith("blocks.group_1.block_")}
    first, last = shapes["blocks.input.w"], shapes["blocks.output.conv.w"]
    if part == "encoder":
        return {"n_hid": first[0], "n_blk_per_group": len(blocks), "vocab_size": last[0]}
    return {"n_init": first[0], "n_hid": last[1], "n_blk_per_group": len(blocks), "vocab_size": first[1]}


def check_shapes(part: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Compare the shapes of tensors, by state-dict key, with those of the encoder or decoder of the same sizes.

    Returns:
        the sizes: keywords of `DalleEncoder` or `DalleDecoder`.
    Raises:
        ValueError: keys or shapes are not such a network's; names the first difference.
    """
    try:
        sizes = _sizes(part, shapes)
        with torch.device("meta"):
            network = DalleEncoder(**sizes) if part == "encoder" else DalleDecoder(**sizes)
    except (LookupError, RuntimeError, ZeroDivisionError) as error:
        raise _Refused(f"is no DALL-E {part}; it lacks blocks.input.w, blocks.output.conv.w or their likes") from error
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name in [*expected, *shapes]:
        found = tuple(shapes.get(name, ()))
        if found != expected.get(name):
            wanted = expected.get(name, "no such tensor")
            raise _Refused(f"is no DALL-E {part}: {name} is {found or 'missing'}, expected {wanted}")
    return sizes


def _parse(file: BinaryIO, part: str) -> tuple[dict[str, Tensor], str]:
    with contextlib.ExitStack() as opened:
        if zipfile.is_zipfile(file):
            kind, (module, read) = "zip", _open_zip(opened.enter_context(zipfile.ZipFile(file)))
        else:
            data = opened.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            kind, (module, read) = "legacy", _open_legacy(data)
        records = _records(module)
        shapes = {name: tuple(record.args[2]) for name, record in records.items()}
        check_shapes(part, shapes)
        if sum(map(math.prod, shapes.values())) > os.fstat(file.fileno()).st_size:  # views that repeat a few numbers
            raise _Refused("its tensors are larger than the file")
        return {name: _tensor(record, read) for name, record in records.items()}, kind


def read_pickle(path: Path, part: str) -> tuple[dict[str, Tensor], str]:
    """The state dict of an official file, float32, and the file's format, zip or legacy. Nothing in it is executed.

    Args:
        part: encoder or decoder.
    Raises:
        UserError: it cannot be read, is damaged, is no such network, or would need code to be executed.
    """
    try:
        with open(path, "rb") as file:
            try:
                return _parse(file, part)
            except _Refused as error:
                raise UserError(f"{path}: {str(error)[:300]}") from error
            except Exception as error:  # damage shows in many ways
                raise UserError(f"{path}: damaged, or no file that torch.save wrote") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


# ---- converted files


def _read_converted(path: Path, part: str) -> dict[str, Tensor]:
    try:
        state = {name: value.float() for name, value in load_file(path).items()}
        check_shapes(part, {name: value.shape for name, value in state.items()})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); convert {part}.pkl again") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return state


def _write(state: dict[str, Tensor], path: Path) -> None:
    """Atomic; raises OSError."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # several processes may convert on their first use
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(save(state))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _read_and_describe(path: Path, part: str) -> dict[str, Tensor]:
    state, kind = read_pickle(path, part)
    sizes = ", ".join(f"{k} {v}" for k, v in check_shapes(part, {k: v.shape for k, v in state.items()}).items())
    numbers = sum(value.numel() for value in state.values())
    distributed.log(f"{path} ({kind} format): {len(state)} tensors, {numbers:,} parameters; {sizes}")
    return state


def convert(folder: str, output_dir: str = "") -> dict[str, Path]:
    """Write encoder.safetensors and, where there is a decoder.pkl, decoder.safetensors; say what was found.

    Args:
        output_dir: default: the folder.
    Returns:
        the written files by part, encoder and decoder.
    Raises:
        UserError: encoder.pkl is missing, a file is not the official one's like, or nothing can be written.
    """
    sources = {part: Path(folder) / f"{part}.pkl" for part in PARTS}
    if not sources["encoder"].is_file():
        raise UserError(_missing(folder, "encoder", "encoder.pkl"))
    written: dict[str, Path] = {}
    for part, source in sources.items():
        if not source.is_file():
            distributed.log(f"{source}: not there; only pictures of what tokens show need it ({URL.format(part=part)})")
            continue
        state = _read_and_describe(source, part)
        target = Path(output_dir or folder) / f"{part}.safetensors"
        try:
            _write(state, target)
        except OSError as error:
            raise UserError(f"{target}: cannot be written ({error.strerror})") from error
        distributed.log(f"wrote {target}, {target.stat().st_size / 1e6:.1f} MB")
        written[part] = target
    return written


def _missing(folder: str, part: str, expected: str) -> str:
    what = f"has no {expected}" if Path(folder).is_dir() else f"is no folder; expected one with {expected}"
    return f"{folder}: {what}; the official file is {URL.format(part=part)}"


def _weights(folder: str, part: str) -> dict[str, Tensor] | None:
    """From the converted file, else from the official one, which is then converted; None if there is neither."""
    converted, official = (Path(folder) / f"{part}.{suffix}" for suffix in ("safetensors", "pkl"))
    if converted.is_file():
        return _read_converted(converted, part)
    if not official.is_file():
        return None
    state = _read_and_describe(official, part)
    try:
        _write(state, converted)
        distributed.log(f"wrote {converted}, which later runs read")
    except OSError as error:
        distributed.log(f"{converted}: cannot be written ({error.strerror}); {official.name} is used as it is")
    return state


def load_dalle(folder: str, with_decoder: bool = False, fp32: bool = False) -> DalleTokenizer:
    """The DALL-E tokenizer of a folder with the converted files, or with the official ones: converted on first use.

    Args:
        with_decoder: load the decoder, too, which makes pictures. fp32: as in `DalleTokenizer`.
    Raises:
        UserError: files are missing, damaged or of other networks.
    """
    states: dict[str, dict[str, Tensor]] = {}
    with distributed.on_main_first():
        for part in PARTS if with_decoder else PARTS[:1]:
            state = _weights(folder, part)
            if state is None:
                raise UserError(_missing(folder, part, f"{part}.safetensors or {part}.pkl"))
            states[part] = state
    sizes = [check_shapes(part, {k: v.shape for k, v in state.items()}) for part, state in states.items()]
    n_init = {} if len(sizes) == 1 else {"decoder_n_init": sizes[1].pop("n_init")}
    if sizes[0] != sizes[-1]:
        raise UserError(f"{folder}: encoder and decoder do not fit together, their sizes are {sizes[0]} and {sizes[1]}")
    with torch.device("meta"):
        tokenizer = DalleTokenizer(**sizes[0], **n_init, with_decoder=with_decoder, fp32=fp32)
    weights = {f"{part}.{name}": value for part, state in states.items() for name, value in state.items()}
    tokenizer.load_state_dict(weights, assign=True)
    return tokenizer


def main(args: argparse.Namespace) -> None:
    convert(args.folder, args.output_dir)


if __name__ == "__main__":
    distributed.run(main, get_args_parser().parse_args())
