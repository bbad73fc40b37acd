"""Which torch operators keep a row's bits free of its neighbours: the table that decides canonical or stock.

Measured on torch 2.13 (docs/numerics.md). ROWWISE operators are exactly rounded, copy, or work through one row in an
order that only its length decides. BLOCKWISE operators are elementwise, but ATen's vectorised loop computes the last
`numel % 32` elements, and those at the seams between threads, with other code: they are run in blocks (`kernels.py`).
Whatever is in neither set has no rule yet, and a model that uses it is `stock`.
"""

from __future__ import annotations

from typing import Any

import torch

_ROWWISE = """
    add sub rsub mul div neg abs rsqrt sqrt reciprocal square relu clamp clamp_min clamp_max hardtanh maximum minimum
    where masked_fill eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not
    sign floor ceil round trunc threshold
    _to_copy to copy clone contiguous alias detach lift_fresh view _unsafe_view _reshape_alias reshape
    transpose t permute unsqueeze squeeze expand slice select split split_with_sizes unbind cat stack repeat embedding
    zeros ones empty full
    zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full arange fill zero as_strided chunk
    native_layer_norm rms_norm _fused_rms_norm native_dropout pow[2] pow[0.5]
    mean[last] sum[last] amax[last] amin[last] var[last] _softmax[last] _log_softmax[last]
    linalg_vector_norm[last] bmm[outer] mm[outer] index gather index_select
    topk[last] sort[last] argsort[last] argmax[last] max[last] min[last] cumsum[last] prod[last] logsumexp[last]
    lerp addcmul addcdiv remainder fmod nan_to_num scatter[last] isnan isinf one_hot
"""
ROWWISE = frozenset(_ROWWISE.split())

_BLOCKWISE = """
    silu gelu sigmoid tanh exp exp2 expm1 erf erfc sin cos tan log log2 log1p softplus mish elu selu celu hardswish
    hardsigmoid leaky_relu log_sigmoid_forward logit pow atan
"""
BLOCKWISE = frozenset(_BLOCKWISE.split())

PRODUCTS = {"mm": 1, "addmm": 2, "linear": 1, "matmul": 1}
"""Products of rows with a matrix: where the matrix is among the arguments. With a weight for it, `mm[weight]`, there is
a rule: it is packed like a linear module's."""

SCOPED = BLOCKWISE | {f"{name}[weight]" for name in PRODUCTS}
"""Operators that a module must be wrapped for (`scopes.py`)."""

COVERED = ROWWISE | SCOPED
"""Operators with a rule."""

_REDUCTIONS = frozenset(
    {"mean", "sum", "amax", "amin", "var", "_softmax", "_log_softmax", "linalg_vector_norm", "max", "min", "cumsum",
     "prod", "logsumexp", "topk", "sort", "argsort", "argmax", "scatter"}
)  # fmt: skip
_DIM_AT = {"linalg_vector_norm": 2, "topk": 2}
_LAST_UNLESS_SAID = frozenset({"topk", "sort", "argsort"})
_BATCHED = frozenset({"mm", "bmm"})


def operator_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """An ATen operator's name without its in-place mark, with what decides about it: `mean[last]`, `pow[2]`."""
    name = str(func._schema.name).partition("::")[2]
    name = name if name.startswith("__") else name.rstrip("_")
    if name in _REDUCTIONS:
        at = _DIM_AT.get(name, 1)
        dims = kwargs.get("dim", args[at] if len(args) > at else (-1 if name in _LAST_UNLESS_SAID else None))
        if name in ("max", "min") and isinstance(dims, torch.Tensor):
            return "maximum"  # of two tensors
        return f"{name}[last]" if _is_last(dims, args[0].ndim) else f"{name}[across]"
    if name in _BATCHED and args[0].shape[-1] == 1:
        return f"{name}[outer]"
    if name == "pow" and len(args) > 1 and not isinstance(args[1], torch.Tensor) and args[1] in (2, 0.5):
        return f"pow[{args[1]:g}]"
    return name


def _is_last(dims: Any, ndim: int) -> bool:
    listed = [dims] if isinstance(dims, int) else list(dims or [])
    return bool(listed) and all(dim % ndim == ndim - 1 for dim in listed)
