"""SemAIM networks for tests: of golden files, and small ones with their inputs."""

import re
from typing import Any

import torch
from torch import Tensor

from semaim import orders
from semaim.models_semaim import AimViT

BOX_ORDERS = ("stochastic_center", "attention_guided")
MAP_ORDERS = ("attention", "attention_guided", "attention_center")
EXACT = ("mask", "auto", "authors")  # with gradients on a CPU, ties or not; FlexAttention has none there


def has_ties(ranks: Tensor) -> bool:
    return bool((ranks.sort(dim=1).values.diff(dim=1) == 0).any())


def build(ref, **kwargs) -> AimViT:
    model = AimViT(**{**ref.kwargs, **kwargs})
    model.load_state_dict(ref.weights)
    return model.train(ref.meta.get("mode") == "train")


def rule_of(case: str) -> str:
    """The order of a case: its name, or the longest that its name begins with (attention_ties: attention)."""
    return max((rule for rule in orders.ORDERS if case.startswith(rule)), key=len)


def inputs(ref, case: str = "") -> dict[str, Tensor]:
    """Maps, noise and features to predict that a golden (or a case of it) holds for the network's forward."""
    found = {name: ref[f"in/{name}"] for name in ("tokens", "attention_maps", "noise") if f"in/{name}" in ref}
    if case and rule_of(case) in MAP_ORDERS:
        name = re.findall(r"out/\w+", ref.meta["attention_maps_for_attention_cases"])[0]
        maps = ref[name] if name in ref else build(ref).eval().semantic_pass(ref["in/imgs"], features=False)[1]
        found["attention_maps"] = maps
    own = {k: ref[f"in/{case}/{k}"] for k in ("attention_maps", "noise", "center_noise") if f"in/{case}/{k}" in ref}
    if ref.kwargs.get("predict_feature", "none") != "none" and "tokens" not in found:
        names = [name for name in ("out/tokens", "out/enc_tokens") if name in ref]
        found["tokens"] = ref[names[0]] if names else build(ref).eval().semantic_pass(ref["in/imgs"], features=True)[0]
    return found | own


def check_ranks(ref, name: str, permutation: Tensor, case: str) -> None:
    """A file's order, where it holds one."""
    if name in ref:
        assert permutation.dtype == ref[name].dtype, name
    ref.check(name, permutation, rtol=0, atol=1e-6 if rule_of(case) in MAP_ORDERS else 0)


def small(**kwargs) -> AimViT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "query_depth": 2,
        "permutation_type": "stochastic",
    }
    model = AimViT(**{**sizes, **kwargs}).eval()
    for p in model.parameters():  # zero biases would hide mistakes
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=p[0].item(), std=0.1)
    return model


def sources(model: AimViT, n: int = 3, levels: int = 0, seed: int = 1) -> dict[str, Tensor]:
    """Noise and maps for n images, drawn from `levels` values if that is not 0."""
    length = model.patch_embed.num_patches
    draw = torch.Generator().manual_seed(seed)
    maps, noise = torch.rand(2, n, length, generator=draw)
    if levels:
        maps, noise = ((x * levels).floor() / levels for x in (maps, noise))
    return {"attention_maps": maps, "noise": noise, "center_noise": torch.rand(2, n, generator=draw)}


def images(model: AimViT, n: int = 3, seed: int = 2) -> Tensor:
    side = model.patch_embed.img_size
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
