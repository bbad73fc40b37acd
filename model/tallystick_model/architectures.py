"""Which class runs a config: one of those that transformers lists for its model type."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto import modeling_auto as auto

from tallystick_protocol.errors import ManifestError

MAPPINGS = (
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    auto.MODEL_MAPPING_NAMES,
)
"""transformers' tables of classes for the tasks that are served; of those that also see or hear, the text part."""


def model_class(config: Any, architecture: str) -> Any:
    """The class that runs it: one that transformers lists for this very model type, or lists and makes for exactly
    this class of config (the text model inside a larger type). Raises ManifestError."""
    known = served_classes(config.model_type)
    if architecture in known:
        return getattr(transformers, architecture)
    listed = {name for mapping in MAPPINGS for names in mapping.values() for name in _all(names)}
    if architecture in listed and getattr(transformers, architecture).config_class is type(config):
        return getattr(transformers, architecture)
    raise ManifestError(f"architecture {architecture[:60]!r} is not one of {sorted(known)} for {config.model_type}")


def served_classes(model_type: str) -> tuple[str, ...]:
    """The classes that transformers lists for a model type and the tasks that are served, the base model last."""
    return tuple(dict.fromkeys(name for mapping in MAPPINGS for name in _all(mapping.get(model_type, ()))))


def base_class(model_type: str) -> str | None:
    """The class without a head."""
    return next(iter(_all(auto.MODEL_MAPPING_NAMES.get(model_type, ()))), None)


def _all(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
