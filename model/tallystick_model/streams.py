"""What crosses the boundaries between layers: the hidden state, and whatever else follows the tokens along the stack.

Most layers hand on one tensor (1, n, width). Some take more that depends on the tokens: the embeddings again, a vector
per layer, the ids. A row on the wire holds all of it for one position, flattened, one stream behind the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is in a call: an argument's position or keyword, and its place among the leaves of that."""

    argument: int | str
    leaf: int

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]
        return tree_flatten(given)[0][self.leaf]

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: torch.Tensor) -> Arguments:
        """The same arguments with another tensor at this place."""
        given = args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]
        leaves, spec = tree_flatten(given)
        changed = tree_unflatten([*leaves[: self.leaf], value, *leaves[self.leaf + 1 :]], spec)
        if isinstance(self.argument, int):
            return (*args[: self.argument], changed, *args[self.argument + 1 :]), kwargs
        return args, {**kwargs, self.argument: changed}


@dataclass(frozen=True, slots=True)
class Stream:
    """One tensor that follows the tokens.

    shape: -1 where rows count, once; order: its dimensions from the outermost in memory to the innermost.
    born: how many layers are done when it exists; uses: {layer: where it is among the layer's arguments}.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    born: int
    uses: dict[int, Place]

    @property
    def row_axis(self) -> int:
        return self.shape.index(-1)

    @property
    def width(self) -> int:
        """Values per row."""
        width = 1
        for length in self.shape:
            width *= 1 if length == -1 else length
        return width

    def crosses(self, boundary: int) -> bool:
        """Whether layers from `boundary` on need it, and it exists before them."""
        return self.born <= boundary and any(layer >= boundary for layer in self.uses)

    def to_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """(n, width) fp32."""
        if self.shape[0] == 1 and len(self.shape) == 3 and self.shape[1] == -1 and tensor.dtype == torch.float32:
            return tensor[0]
        return tensor.movedim(self.row_axis, 0).reshape(tensor.shape[self.row_axis], -1).to(torch.float32)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The tensor, laid out in memory as the layer before would have left it."""
        if self.shape == (1, -1, self.width) and self.order == (0, 1, 2) and rows.dtype == self.dtype:
            return rows[None].contiguous()
        others = [length for length in self.shape if length != -1]
        tensor = rows.view(len(rows), *others).movedim(0, self.row_axis)
        kept = tensor.to(self.dtype)
        back = sorted(range(len(self.order)), key=lambda axis: self.order[axis])
        return kept.permute(self.order).contiguous().permute(back)


def memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Dimensions by stride, largest first; those of length one, whose stride says nothing, stay where they are."""
    order = list(range(tensor.ndim))
    real = [axis for axis in order if tensor.shape[axis] != 1]
    by_stride = sorted(real, key=lambda axis: -tensor.stride(axis))
    for axis, other in zip(real, by_stride, strict=True):
        order[axis] = other
    return tuple(order)


def pack_rows(streams: list[Stream], tensors: list[torch.Tensor], width: int) -> torch.Tensor:
    """(n, width) fp32, zeros behind the last stream."""
    rows = [stream.to_rows(tensor) for stream, tensor in zip(streams, tensors, strict=True)]
    packed = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
    missing = width - packed.shape[1]
    return packed if missing == 0 else torch.nn.functional.pad(packed, (0, missing))


def unpack_rows(streams: list[Stream], rows: torch.Tensor) -> list[torch.Tensor]:
    """Rows (n, width) as the tensors that enter a layer."""
    found, offset = [], 0
    for stream in streams:
        part = rows[:, offset : offset + stream.width]
        found.append(stream.from_rows(part.contiguous()))
        offset += stream.width
    return found
