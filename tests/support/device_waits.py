"""Finds, without a GPU, the places where a step would make the host wait for one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# What reads a value, or makes a tensor whose shape depends on values.
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique2", "_unique2", "unique_dim"}


class NoWaiting(TorchDispatchMode):
    """Raises where an operation on `device` ("cuda": of fake tensors; "cpu": as if it were a GPU) would wait for it."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def on_device(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.device.type == self.device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if self.on_device(x)]
        by_mask = name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])
        if tensors and (name in READS or by_mask and name in ("index", "index_put", "index_put_", "_index_put_impl_")):
            raise AssertionError(f"{func} makes the host wait for the device")
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source, copy = (args[1], args[0]) if name == "copy_" else (args[0], out)
            waits = not (kwargs.get("non_blocking") or len(args) > 2 and args[2])
            if waits and source.device.type != copy.device.type:
                raise AssertionError(f"copying {tuple(source.shape)} to {copy.device} makes the host wait")
        return out


def on_fake_gpu(value: Any) -> Any:
    """A fake CUDA tensor for each tensor of a value or, in place, of a module; call it under a FakeTensorMode."""
    if isinstance(value, nn.Module):
        made: dict[int, Tensor] = {}  # shared parameters stay shared
        for module in value.modules():
            for store in (module._parameters, module._buffers):
                for key, x in store.items():
                    if x is not None:
                        store[key] = made.setdefault(id(x), _fake(x))  # type: ignore[assignment]
        return value
    return pytree.tree_map(lambda x: _fake(x) if isinstance(x, Tensor) else x, value)


def _fake(x: Tensor) -> Tensor:
    fake = torch.empty(x.shape, dtype=x.dtype, device="cuda")
    return nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
