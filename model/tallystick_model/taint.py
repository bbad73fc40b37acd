"""A dispatch mode for meta tensors: hands the names of weights along, and notes which operators ran in which module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from tallystick_model.operators import operator_name


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


class Taint(TorchDispatchMode):
    """Tags are kept per storage: views share them, and what is written into a tensor tags all of it. That may name
    too many weights, never too few. Real tensors (ids, positions, buffers) go to meta where they meet a meta tensor.

    weights: {name: meta tensor}; skip: types of modules whose operators are not noted.
    """

    def __init__(self, weights: dict[str, torch.Tensor], skip: tuple[type, ...]) -> None:
        super().__init__()
        self.operators: set[tuple[str, str]] = set()
        self._skip = skip
        self._inside: list[tuple[str, bool]] = [("", False)]
        self._alive: list[torch.Tensor] = list(weights.values())
        self._tags: dict[int, frozenset[str]] = {}
        for name, tensor in weights.items():
            self._tags[_key(tensor)] = self._tags.get(_key(tensor), frozenset()) | {name}

    def tags(self, tensor: torch.Tensor) -> frozenset[str]:
        """The names of the weights that reached a tensor."""
        return self._tags.get(_key(tensor), frozenset())

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
        leaves, shape = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        name, quiet = self._inside[-1]
        if not quiet and any(tensor.is_floating_point() for tensor in tensors):
            self.operators.add((name, operator_name(func, args, kwargs)))
        tags: frozenset[str] = frozenset().union(*(self.tags(tensor) for tensor in tensors))
        if any(tensor.device.type == "meta" for tensor in tensors):
            args, kwargs = tree_unflatten([_to_meta(leaf) for leaf in leaves], shape)
        output = func(*args, **kwargs)
        if tags:
            written = tensors[:1] if func._schema.name.endswith("_") else []
            for tensor in (*tensors_in(output), *written):
                self._tags[_key(tensor)] = self.tags(tensor) | tags
                self._alive.append(tensor)
        return output


def _to_meta(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.to("meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
