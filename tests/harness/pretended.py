"""Devices that do not exist: tensors that say they are on "cuda:0" or "cuda:1" and hold their values on the CPU.

Within `pretending()`, `tensor.to("cuda:0")` and factories with such a device make them. As on a GPU, an operator
refuses operands of two devices, except for CPU tensors without dimensions and CPU indices. Values are the CPU's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_CPU = torch.device("cpu")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class Pretended(torch.Tensor):
    """held: the values, on the CPU. What torch itself asks in C++ is answered "cpu", what Python asks is not."""

    held: torch.Tensor
    _device: torch.device

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
        )  # fmt: skip
        made.held, made._device = held, device
        return made  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._device

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        held = self.held.to(self.held.dtype if dtype is None else dtype, copy=copy)
        device = self._device if device is None else device
        return Pretended(held, device) if device.type == "cuda" else held

    def __deepcopy__(self, memo: dict[int, Any]) -> Pretended:
        return Pretended(self.held.clone(), self._device)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """`torch.tensor` copies to the device below what a dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


@contextmanager
def pretending() -> Iterator[None]:
    """CUDA is not initialised meanwhile. Inference mode, which makes no views of such tensors, is `no_grad`."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), _Pretending(), _Literals():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.inference_mode, "__enter__", lambda self: torch.set_grad_enabled(False))
        patch.setattr(torch.inference_mode, "__exit__", lambda self, *_: None)
        yield


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = func._schema.name.partition("::")[2]
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    wanted = kwargs.get("device")
    device = _device_of(name, leaves)
    held_args, held_kwargs = tree_map(_held, (args, kwargs))
    if wanted is not None:
        device = torch.device(wanted)
        if device.type == "cuda":
            held_kwargs = {**held_kwargs, "device": _CPU}
    out = func(*held_args, **held_kwargs)
    if name.endswith("_") and isinstance(args[0], torch.Tensor):
        return args[0]
    if device.type != "cuda":
        return out
    if name in ("item", "_local_scalar_dense", "equal", "is_nonzero"):
        return out
    return tree_map(lambda leaf: Pretended(leaf, device) if isinstance(leaf, torch.Tensor) else leaf, out)


def _device_of(name: str, leaves: list[torch.Tensor]) -> torch.device:
    """The one device of the operands. Raises RuntimeError where there are two."""
    if name in ("copy_", "_to_copy"):
        return leaves[0].device
    if name in _INDEXING:
        leaves = [leaves[0], *(leaf for leaf in leaves[1:] if leaf.device.type != "cpu")]
    devices = {leaf.device for leaf in leaves if leaf.ndim or leaf.device.type != "cpu"}
    if len(devices) > 1:
        raise RuntimeError(f"{name}: operands on {', '.join(sorted(map(str, devices)))}")
    return devices.pop() if devices else _CPU


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Pretended) else leaf
