"""A dispatch mode that follows a forward on meta tensors: hands the names of weights along with what they reach, and
notes which operators ran in which module.

Floating-point tensors are followed on meta, without values. Integers and truth values stay real, so that forwards that
branch or index by them (experts, masks) can be followed, too; where they would come from a value that is not there,
one is made up: 0 and false, or 0, 1, 2, … for an order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tallystick_model.canonical.operators import PRODUCTS, operator_name

_ORDERS = frozenset({"topk", "sort", "argsort"})
_INDEXED = frozenset({"index", "index_put", "_unsafe_index", "_unsafe_index_put", "_index_put_impl"})


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


class Taint(TorchDispatchMode):
    """Tags are kept per storage: views share them, and what is written into a tensor tags all of it. That may name
    too many weights, never too few.

    weights: {name: meta tensor}; skip: types of modules whose operators are not noted.
    operators: (module, name) of what ran; exposed: weights that operators outside the skipped modules took.
    clock: set by whoever follows the run; `born` tells its value when a tensor's storage first had a tag.
    """

    def __init__(self, weights: dict[str, torch.Tensor], skip: tuple[type, ...]) -> None:
        super().__init__()
        self.operators: set[tuple[str, str]] = set()
        self.exposed: set[str] = set()
        self.clock = 0
        self._skip = skip
        self._inside: list[tuple[str, bool]] = [("", False)]
        self._alive: list[torch.Tensor] = []
        self._tags: dict[int, frozenset[str]] = {}
        self._born: dict[int, int] = {}
        for name, tensor in weights.items():
            self.mark(tensor, {name})
        self._weights = frozenset(self._tags)

    def tags(self, tensor: torch.Tensor) -> frozenset[str]:
        """The names of the weights, and the marks, that reached a tensor."""
        return self._tags.get(_key(tensor), frozenset())

    def mark(self, tensor: torch.Tensor, tags: Iterable[str]) -> None:
        """Add tags to a tensor."""
        self._tags[_key(tensor)] = self.tags(tensor) | frozenset(tags)
        self._born.setdefault(_key(tensor), self.clock)
        self._alive.append(tensor)

    def born(self, tensor: torch.Tensor) -> int:
        """What the clock said when the tensor's storage was made."""
        return self._born.get(_key(tensor), 0)

    def identity(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Equal for two views of the same elements."""
        return _key(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()

    @contextmanager
    def naming(self, model: Any) -> Iterator[None]:
        """While held, operators are noted under the innermost module of `model` that runs them."""

        def enter(module: Any, args: Any, name: str) -> None:
            self._inside.append((name, self._inside[-1][1] or type(module) in self._skip))

        def leave(module: Any, args: Any, output: Any) -> None:
            self._inside.pop()

        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, a, name=name: enter(m, a, name), prepend=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def unnoted(self) -> Iterator[None]:
        """While held, operators are not noted."""
        self._inside.append((self._inside[-1][0], True))
        try:
            yield
        finally:
            self._inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, _ = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        name, quiet = self._inside[-1]
        if not quiet and any(tensor.is_floating_point() for tensor in tensors):
            self.operators.add((name, self._name(func, args, kwargs)))
            self.exposed.update(*(self.tags(tensor) for tensor in tensors if _key(tensor) in self._weights))
        tags: frozenset[str] = frozenset().union(*(self.tags(tensor) for tensor in tensors))
        output = _followed(func, args, kwargs, tensors)
        if tags:
            written = tensors[:1] if func._schema.name.endswith("_") else []
            for tensor in (*tensors_in(output), *written):
                self.mark(tensor, tags)
        return output

    def _name(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The operator's name; of a product with a weight that is a matrix, `mm[weight]`."""
        name = operator_name(func, args, kwargs)
        matrix = args[PRODUCTS[name]] if name in PRODUCTS and len(args) > PRODUCTS[name] else None
        known = isinstance(matrix, torch.Tensor) and matrix.ndim == 2 and _key(matrix) in self._weights
        return f"{name}[weight]" if known else name


def _followed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> Any:
    """The operator's output: floats on meta where an input is, integers and truth values real."""
    base = str(func._schema.name).partition("::")[2]
    if not any(tensor.device.type == "meta" for tensor in tensors):
        if not tensors and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)
    if base == "_local_scalar_dense":
        return 0.0
    if base.removesuffix("_") in _INDEXED:
        args = (args[0], _by_position(args[1]), *args[2:])
    if base == "masked_select":
        return args[0].reshape(-1)[_by_position([args[1].reshape(-1)])[0].to("meta")]
    leaves, shape = tree_flatten((args, kwargs))
    moved_args, moved = tree_unflatten([_to_meta(leaf) for leaf in leaves], shape)
    try:
        output = func(*moved_args, **moved)
    except NotImplementedError:
        real_args, real = tree_unflatten([_realised(leaf, "") for leaf in leaves], shape)
        output = tree_map(_to_meta, func(*real_args, **real))
    return tree_map(lambda leaf: leaf if _is_float(leaf) else _realised(leaf, base), output)


def _by_position(indices: Any) -> Any:
    """Truth values among indices as the positions where they hold, so that shapes are known."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
            found += list(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


def _is_float(leaf: Any) -> bool:
    return not isinstance(leaf, torch.Tensor) or leaf.is_floating_point() or leaf.is_complex()


def _realised(leaf: Any, operator: str) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if not isinstance(leaf, torch.Tensor) or leaf.device.type != "meta":
        return leaf
    if operator in _ORDERS and leaf.ndim:
        return torch.arange(leaf.shape[-1], dtype=leaf.dtype).expand(leaf.shape).clone()
    return torch.zeros(leaf.shape, dtype=leaf.dtype)


def _to_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.to("meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
