"""Which tensors of a checkpoint make which weight of the model: names, ties, and transformers' own conversions.

transformers keeps checkpoints in the layout of their first release and converts while loading (experts that were
stored one by one become one tensor, older names become the present ones). The same table is used here, one weight at a
time, so that memory holds one weight.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from tallystick_model.anatomy import Anatomy
from tallystick_model.config_keys import KEPT
from tallystick_model.publishing.checkpoint import CHUNK_BYTES, TORCH_DTYPES, TensorSource
from tallystick_model.publishing.computed import computed_weights
from tallystick_model.publishing.leftovers import Leftovers
from tallystick_model.skeleton import BUILD_ERRORS, Skeleton
from tallystick_protocol.errors import ManifestError

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(slots=True)
class _Recipe:
    """stored: the tensors that make a weight, in order, each with the pattern of the conversion it goes into."""

    stored: list[tuple[str, str]]
    conversion: Any = None
    key: str = ""
    """The weight that transformers names the conversion by: its first result."""
    made: torch.Tensor | None = None
    """A table that no checkpoint holds, because the model computes it."""


class Weights:
    """The weights of a model as a checkpoint holds them. left_out: its tensors that make no weight of the model."""

    def __init__(
        self, source: TensorSource, skeleton: Skeleton, recipes: dict[str, _Recipe], left_out: tuple[str, ...] = ()
    ) -> None:
        self._source, self._skeleton, self._recipes, self.left_out = source, skeleton, recipes, left_out
        self._shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.weights().items()}

    def spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        """dtype as safetensors writes it, and shape."""
        if self._recipes[name].made is not None:
            return "F32", self._shapes[name]
        dtypes = {self._source.spec(stored)[0] for stored, _ in self._recipes[name].stored}
        widest = "F32" if len(dtypes) > 1 else dtypes.pop()
        return widest, self._shapes[name]

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """A weight in runs of whole rows. Raises ManifestError when it holds NaN or infinity."""
        recipe = self._recipes[name]
        chunks: Iterable[torch.Tensor]
        if recipe.made is not None:
            chunks = [recipe.made]
        elif recipe.conversion is None:
            chunks = self._source.chunks(recipe.stored[0][0])
        else:
            chunks = self._converted(name)
        for chunk in chunks:
            if not bool(torch.isfinite(chunk).all()):
                raise ManifestError(
                    f"{name} holds NaN or infinity: the checkpoint is damaged, or its training overflowed"
                )
            yield chunk

    def _converted(self, name: str) -> Iterator[torch.Tensor]:
        recipe, (dtype, shape) = self._recipes[name], self.spec(name)
        conversion = copy.deepcopy(recipe.conversion)
        for stored, pattern in recipe.stored:
            conversion.add_tensor(recipe.key, stored, pattern, lambda stored=stored: _whole(self._source, stored))
        try:
            made = conversion.convert(recipe.key, model=self._skeleton.model, config=self._skeleton.config)
        except BUILD_ERRORS as error:
            raise ManifestError(f"the tensors of {name} do not fit together: {str(error)[:120]}") from None
        tensor = made.get(name)
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        if tensor is None or tuple(tensor.shape) != shape:
            found = None if tensor is None else tuple(tensor.shape)
            raise ManifestError(f"{name} becomes {found} from the checkpoint; its config makes it {shape}")
        tensor = tensor.to(TORCH_DTYPES[dtype])
        yield from tensor.split(max(1, CHUNK_BYTES * len(tensor) // max(1, tensor.nbytes))) if shape else (tensor,)


def match(source: TensorSource, skeleton: Skeleton, anatomy: Anatomy) -> Weights:
    """Account for every tensor of a checkpoint and every weight that is stored.

    Raises ManifestError naming what is missing, doubled, unknown or of another shape or dtype, and a tied weight stored
    twice with two values.
    """
    found, left_out = _recipes(source, skeleton)
    _settle_ties(source, found, skeleton.ties)
    elsewhere = anatomy.tied.keys() | anatomy.aliases.keys()
    needed = {name for name in anatomy.roles if name not in elsewhere}
    computed = computed_weights(skeleton, needed - found.keys())
    found |= {name: _Recipe([], made=tensor) for name, tensor in computed.items()}
    missing = sorted(needed - found.keys())
    if missing:
        raise ManifestError(f"the checkpoint lacks {', '.join(missing[:3])} ({len(missing)} in all)")
    weights = skeleton.weights()
    for name in sorted(needed):
        _check(source, name, found[name], weights[name])
    return Weights(source, skeleton, {name: found[name] for name in needed}, left_out)


def unmade(source: TensorSource, skeleton: Skeleton) -> set[str]:
    """The weights of a model that no tensor of a checkpoint makes, needed or not. Raises as `match` does."""
    found, _ = _recipes(source, skeleton)
    _settle_ties(source, found, skeleton.ties)
    missing = skeleton.weights().keys() - found.keys()
    return missing - computed_weights(skeleton, missing).keys()


def _recipes(source: TensorSource, skeleton: Skeleton) -> tuple[dict[str, _Recipe], tuple[str, ...]]:
    """How each weight is made, and which tensors make none. Raises ManifestError for one that nobody knows."""
    weights, prefix = skeleton.weights(), skeleton.model.base_model_prefix
    leftovers, left_out = Leftovers(skeleton), list[str]()
    table = get_model_conversion_mapping(skeleton.model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, _Recipe] = {}
    for stored in sorted(source.names(), key=dot_natural_key):
        plain = next((name for name in _spellings(stored, prefix) if name in weights), None)
        name, pattern = rename_source_key(stored, renamings, converters, prefix, weights)
        if name in weights and pattern is not None:
            recipe = found.setdefault(name, _Recipe([], by_pattern[pattern], name))
            if recipe.conversion is None or recipe.conversion is not by_pattern[pattern]:
                raise ManifestError(f"the checkpoint holds {name} twice, as {recipe.stored[0][0]} and in {stored}")
            recipe.stored.append((stored, pattern))
            continue
        name = name if name in weights else plain or ""
        if not name:
            leftovers.expect(stored, source.spec(stored)[1], _spellings(stored, prefix))
            left_out.append(stored)
        elif name in found:
            raise ManifestError(f"the checkpoint holds {name} twice, as {found[name].stored[0][0]} and {stored}")
        else:
            found[name] = _Recipe([(stored, "")])
    for name, recipe in list(found.items()):
        if recipe.conversion is not None:
            first, *others = recipe.conversion.target_patterns
            found |= {name.replace(first, other): recipe for other in others if name.replace(first, other) in weights}
    return found, tuple(left_out)


def _check(source: TensorSource, name: str, recipe: _Recipe, weight: torch.Tensor) -> None:
    shape, served = tuple(weight.shape), ("F32", "F16", "BF16") if weight.is_floating_point() else ("I64",)
    for stored, _ in recipe.stored:
        dtype, found = source.spec(stored)
        if dtype not in served:
            raise ManifestError(f"{stored} is {dtype}; {', '.join(served)} can be served there")
        if recipe.conversion is None and found != shape:
            raise ManifestError(f"{stored} has shape {found}; its config makes it {shape}")
    if recipe.conversion is not None and recipe.key == name and len(recipe.conversion.target_patterns) == 1:
        held = sum(math.prod(source.spec(stored)[1]) for stored, _ in recipe.stored)
        if held != math.prod(shape):
            raise ManifestError(f"the parts of {name} hold {held} values; its config makes it {shape}")


def _spellings(stored: str, prefix: str) -> Iterable[str]:
    """A tensor's name with and without the base model's prefix, and in the spelling of older checkpoints."""
    modern = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", stored))
    for name in dict.fromkeys((stored, modern)):
        yield name
        yield f"{prefix}.{name}"
        yield name.removeprefix(f"{prefix}.")


def as_stored(config: dict[str, Any], source: TensorSource) -> dict[str, Any]:
    """A manifest's config that says whether the head is tied, where the class does not: as in transformers, two
    different tables in the checkpoint are two tables (T5 1.1, Flan-T5)."""
    table, head = "shared.weight", "lm_head.weight"
    if not KEPT.keys() & config.keys() or not {table, head} <= source.names() or _equal(source, table, head):
        return config
    return {**config, "tie_word_embeddings": False}


def _settle_ties(source: TensorSource, found: dict[str, _Recipe], ties: dict[str, str]) -> None:
    """One recipe for all weights that are tied; a checkpoint may hold each of them, all equal."""
    groups: dict[str, list[str]] = {}
    for late, early in ties.items():
        groups.setdefault(early, [early]).append(late)
    for names in groups.values():
        held = [name for name in names if name in found]
        for one, other in pairwise(held):
            if not _same(source, found[one], found[other]):
                raise ManifestError(f"{one} and {other} are tied by the config but stored with two values")
        for name in names if held else ():
            found.setdefault(name, found[held[0]])


def _same(source: TensorSource, one: _Recipe, other: _Recipe) -> bool:
    if one.stored == other.stored:
        return True
    if len(one.stored) != len(other.stored):
        return False
    return all(_equal(source, a, b) for (a, _), (b, _) in zip(one.stored, other.stored, strict=True))


def _equal(source: TensorSource, one: str, other: str) -> bool:
    if source.spec(one) != source.spec(other):
        return False
    return all(torch.equal(a, b) for a, b in zip(source.chunks(one), source.chunks(other), strict=True))


def _whole(source: TensorSource, name: str) -> torch.Tensor:
    parts = list(source.chunks(name))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
