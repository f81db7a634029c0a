"""Frozen teachers whose features SemAIM can regress: CLIP's image tower and DINO's ViT, read from the official files.

Legend: N batch, L patches, T = L + 1 tokens, D width, E output width, p patch side.
"""

import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

if not __package__:  # imported from inside the folder: take what it needs from this checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch._utils
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from common import distributed
from semaim.blocks import LayerNorm
from semaim.models_vit import interpolate_pos_embed


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 also for half-precision input, eps 1e-5."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


class ResidualAttentionBlock(nn.Module):
    """x + MHA(LN1 x), then x + MLP(LN2 x), named as in OpenAI's files."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = Float32LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": QuickGELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = Float32LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class ClipVisual(nn.Module):
    """CLIP's ViT image tower (arXiv 2103.00020), giving all tokens; state-dict keys as OpenAI's after `visual.`."""

    def __init__(self, img_size: int, patch_size: int, width: int, layers: int, output_dim: int):
        super().__init__()
        self.out_dim = output_dim
        self.num_patches = (img_size // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(self.num_patches + 1, width))
        self.ln_pre = Float32LayerNorm(width)
        blocks = nn.Sequential(*(ResidualAttentionBlock(width, width // 64) for _ in range(layers)))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_post = Float32LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, output_dim))

    def forward(self, imgs: Tensor) -> Tensor:
        """(N, 3, H, W) -> tokens (N, T, E), class token first. As upstream: images normalised as for ImageNet."""
        x = self.conv1(imgs).flatten(2).transpose(1, 2)  # (N, L, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer["resblocks"](self.ln_pre(x))
        return self.ln_post(x) @ self.proj


class DinoViT(TimmViT):
    """DINO's ViT (arXiv 2104.14294), giving all tokens after the final norm."""

    def __init__(self, img_size: int, patch_size: int, width: int, layers: int):
        heads = width // 64
        super().__init__(
            img_size, patch_size, 3, 0, embed_dim=width, depth=layers, num_heads=heads, norm_layer=LayerNorm
        )
        self.out_dim = width
        self.num_patches = (img_size // patch_size) ** 2

    def forward(self, imgs: Tensor) -> Tensor:  # type: ignore[override]
        """(N, 3, H, W) -> tokens (N, T, D), class token first."""
        return self.forward_features(imgs)


# ---- weight files


class _Archived:
    """A module of a TorchScript archive, as nothing but its attributes."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _ArchiveReader(pickle.Unpickler):
    """Reads the attributes of a TorchScript archive; tensors and containers only, no code of the archive is run."""

    ALLOWED = {
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        ("collections", "OrderedDict"): OrderedDict,
        **{("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "tensor", "double", "bool")},
        ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
    }

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Archived
        if module == "torch" and re.fullmatch(r"\w+Storage", name):
            return name
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it would execute {module}.{name}; refused")
        return self.ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, _ = pid
        dtype = {"HalfStorage": torch.float16, "FloatStorage": torch.float32, "LongStorage": torch.int64}[kind]
        data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.storage.TypedStorage(
            wrap_storage=torch.frombuffer(data, dtype=torch.uint8).untyped_storage(), dtype=dtype, _internal=True
        )


def _tensors(part: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of an archived module and of those inside it, named by their path."""
    found: dict[str, Tensor] = {}
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value.detach()
        elif isinstance(value, _Archived):
            found |= _tensors(value, f"{prefix}{name}.")
    return found


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict in a weight file: plain, a checkpoint of some training, or OpenAI's TorchScript archive.

    Nothing in the file is executed.
    Raises:
        distributed.UserError: the file is missing, damaged, or holds something else.
    """
    path = distributed.local_file(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                root = names[0].split("/")[0]
                if f"{root}/constants.pkl" in names:  # only TorchScript archives have it
                    return _tensors(_ArchiveReader(archive, root).load())
    except Exception as error:  # unpickling raises many types for damaged files
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise distributed.UserError(f"{path}: damaged TorchScript archive ({reason})") from error
    state = distributed.load(path)
    for key in ("teacher", "state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return {re.sub(r"^(module\.|backbone\.)+", "", name): value for name, value in tensors.items()}


def _fit_positions(table: Tensor, grid_size: int) -> Tensor:
    """Resize a position table (1+G², D) to another grid, bicubic."""
    return interpolate_pos_embed(table[None].float(), grid_size)[0]


def _clip(state: dict[str, Tensor], img_size: int) -> ClipVisual:
    state = {name.removeprefix("visual."): value.float() for name, value in state.items() if name.startswith("visual.")}
    width, _, patch_size, _ = state["conv1.weight"].shape
    layers = len({name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")})
    # As upstream: matrices and their biases have gone through half precision; norms and embeddings have not.
    halved = r"conv1\.weight|proj|.*\.(c_fc|c_proj|out_proj)\.(weight|bias)|.*\.in_proj_(weight|bias)"
    state = {name: value.half().float() if re.fullmatch(halved, name) else value for name, value in state.items()}
    state["positional_embedding"] = _fit_positions(state["positional_embedding"], img_size // patch_size)
    model = ClipVisual(img_size, patch_size, width, layers, state["proj"].shape[1])
    model.load_state_dict(state)
    return model


def _dino(state: dict[str, Tensor], img_size: int) -> DinoViT:
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    state["pos_embed"] = _fit_positions(state["pos_embed"][0], img_size // patch_size)[None]
    model = DinoViT(img_size, patch_size, width, layers)
    model.load_state_dict(state)
    return model


def load_teacher(kind: str, path: str, img_size: int) -> ClipVisual | DinoViT:
    """Build a frozen teacher for images of img_size pixels; its architecture follows from the weights.

    Args:
        kind: "clip" or "dino". path: the official file, or its state dict.
    Raises:
        distributed.UserError: the file is missing or damaged, or holds another network.
    """
    official = {"clip": "OpenAI's ViT-B-16.pt", "dino": "dino_vitbase16_pretrain.pth"}[kind]
    if not path:
        raise distributed.UserError(f"--predict_feature {kind}: name the weights of {official} with --teacher_path")
    if not path.startswith("https://") and not Path(path).is_file():
        raise distributed.UserError(f"--teacher_path {path}: no such file; expected {official}")
    state = read_weights(path)
    try:
        model = (_clip if kind == "clip" else _dino)(state, img_size)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise distributed.UserError(f"--teacher_path {path}: is no {kind} ViT like {official} ({reason})") from error
    return model.eval().requires_grad_(False)
