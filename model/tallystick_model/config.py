"""From a config dict that a stranger wrote to a transformers config object that we chose.

Nothing is built before it is bounded: the config class comes from transformers' own table of model types, its fields
are the allow-list, and every number is finite and within the table below. No remote code, no prompt, no kernel names.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from tallystick_protocol.errors import ManifestError

FORBIDDEN = frozenset({"auto_map", "trust_remote_code", "custom_generate", "quantization_config", "custom_pipelines"})
"""Keys that name code, kernels or another numerics: refused wherever they come from, with their name."""

_LEFT_OUT = """
    _name_or_path name_or_path transformers_version architectures dtype torch_dtype use_cache return_dict
    output_hidden_states output_attentions id2label label2id problem_type chunk_size_feed_forward gradient_checkpointing
    task_specific_params finetuning_task _commit_hash torchscript use_bfloat16 position_embedding_type model_max_length
    initializer_factor pruned_heads sep_token_id decoder_start_token_id num_labels
"""
LEFT_OUT = frozenset(_LEFT_OUT.split())
"""Keys of a checkpoint that do not matter for what is computed here, or that the manifest says elsewhere."""

MUST_BE = {"chunk_size_feed_forward": (0,), "position_embedding_type": ("absolute",), "is_encoder_decoder": (False,)}
"""Keys that are left out, or kept, with one meaning only."""

LEGACY = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"})
"""Older spellings that a checkpoint may use; transformers turns them into fields, and manifests hold fields."""

BOUNDS: dict[str, tuple[float, float]] = {
    "hidden_size": (1, 1 << 17),
    "intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 4096),
    "num_attention_heads": (1, 1 << 12),
    "num_key_value_heads": (1, 1 << 12),
    "head_dim": (1, 1 << 12),
    "vocab_size": (1, 1 << 22),
    "type_vocab_size": (0, 1 << 16),
    "max_position_embeddings": (1, 1 << 22),
    "rope_theta": (1e-3, 1e12),
    "rms_norm_eps": (0, 1),
    "layer_norm_eps": (0, 1),
    "layer_norm_epsilon": (0, 1),
}
MAX_POSITION_TABLE = 1 << 34
"""max_position_embeddings x hidden_size: some models compute such a table when they are built."""

ROPE_TYPES = frozenset(ROPE_INIT_FUNCTIONS) | {"default"}

_MAX_INT, _MAX_FLOAT, _MAX_ITEMS, _MAX_DEPTH = 1 << 31, 1e30, 8192, 5
_BUILD_ERRORS = (
    TypeError, ValueError, KeyError, AttributeError, ImportError, ArithmeticError, RuntimeError, StrictDataclassError,
)  # fmt: skip


def build_config(values: dict[str, Any]) -> Any:
    """The transformers config object of a manifest's `config`.

    Raises ManifestError naming the key: unknown, forbidden, of the wrong type or out of bounds.
    """
    cls = config_class(values)
    _refuse_keys(values, cls, allowed=frozenset(servable_fields(cls)) | {"model_type"})
    return _construct(cls, values)


def checkpoint_config(values: dict[str, Any]) -> dict[str, Any]:
    """What a manifest holds of a checkpoint's config.json: every servable field, defaults written out.

    Raises ManifestError naming the key that is unknown, forbidden, of the wrong type or out of bounds.
    """
    cls = config_class(values)
    names = {str(field.name) for field in dataclasses.fields(cls)} | {str(name) for name in cls.attribute_map}
    _refuse_keys(values, cls, allowed=names | LEFT_OUT | LEGACY | {"model_type", "tie_encoder_decoder"})
    config = _construct(cls, {key: value for key, value in values.items() if key not in LEFT_OUT})
    written = config.to_dict()
    kept = {name: written[name] for name in servable_fields(cls) if written.get(name) is not None}
    return {"model_type": cls.model_type, **kept}


def config_class(values: dict[str, Any]) -> Any:
    """transformers' own config class for the model type. Raises ManifestError for one it does not have."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        raise ManifestError(
            f"model_type {str(model_type)[:40]!r} is none that transformers {transformers.__version__} knows; "
            "models that bring their own code are not served"
        )
    return CONFIG_MAPPING[model_type]


def model_class(config: Any, architecture: str) -> Any:
    """The class that runs it: a causal LM or base model of this very model type. Raises ManifestError."""
    known: set[str] = set()
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES):
        names = mapping.get(config.model_type, ())
        known |= {names} if isinstance(names, str) else set(names)
    if architecture not in known:
        raise ManifestError(f"architecture {architecture[:60]!r} is not one of {sorted(known)} for {config.model_type}")
    return getattr(transformers, architecture)


def servable_fields(cls: Any) -> tuple[str, ...]:
    """The fields of a config class that a manifest may set."""
    names = (field.name for field in dataclasses.fields(cls))
    return tuple(
        name for name in names if not name.startswith("_") and name not in LEFT_OUT and "implementation" not in name
    )


def _construct(cls: Any, values: dict[str, Any]) -> Any:
    if getattr(cls, "sub_configs", None):
        raise ManifestError(f"{cls.model_type} is a composite of several models, which are not served yet")
    _check_value("config", values, _MAX_DEPTH)
    for key, value in values.items():
        if key in MUST_BE and value not in (*MUST_BE[key], None):
            raise ManifestError(f"config {key} is {str(value)[:40]!r}; only {MUST_BE[key][0]!r} is served")
        _check_bounds(cls.attribute_map.get(key, key), value)
    try:
        config = cls(**{key: value for key, value in values.items() if key != "model_type"})
    except _BUILD_ERRORS as error:
        raise ManifestError(f"config does not fit {cls.__name__}: {_one_line(error)}") from None
    for name in BOUNDS:
        _check_bounds(name, getattr(config, name, None))
    _check_relations(config)
    return config


def _check_relations(config: Any) -> None:
    length, width = getattr(config, "max_position_embeddings", 0) or 0, getattr(config, "hidden_size", 0) or 0
    if length * width > MAX_POSITION_TABLE:
        raise ManifestError(f"config: {length} positions of width {width} are more than {MAX_POSITION_TABLE}")
    heads, groups = getattr(config, "num_attention_heads", 1), getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ManifestError(f"config: {heads} attention heads cannot share {groups} key-value heads")


def _refuse_keys(values: dict[str, Any], cls: Any, allowed: frozenset[str] | set[str]) -> None:
    for key in values:
        if not isinstance(key, str):
            raise ManifestError("a config key is not text")
        if key in FORBIDDEN or "implementation" in key or "remote_code" in key:
            raise ManifestError(f"config key {key[:60]!r} is forbidden: it names code or kernels to load", key=key[:60])
        if key not in allowed:
            raise ManifestError(f"config key {key[:60]!r} is not one of {cls.__name__}'s: remove it", key=key[:60])


def _check_bounds(name: str, value: Any) -> None:
    if value is None or name not in BOUNDS:
        return
    low, high = BOUNDS[name]
    whole = isinstance(low, int) and not name.endswith(("eps", "epsilon"))
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (whole and not isinstance(value, int)):
        raise ManifestError(f"config {name} is {str(value)[:40]!r}, not a number from {low} to {high}", key=name)


def _check_value(name: str, value: Any, depth: int) -> None:
    """Plain, finite and small: what a config may hold at all."""
    if depth < 0:
        raise ManifestError(f"{name} is nested too deeply")
    if isinstance(value, dict | list | tuple):
        if len(value) > _MAX_ITEMS:
            raise ManifestError(f"{name} has {len(value)} entries, {_MAX_ITEMS} is the limit")
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            _check_bounds(str(key), inner)
            _check_value(f"{name}.{str(key)[:60]}", inner, depth - 1)
    elif isinstance(value, str):
        if name.endswith(".rope_type") and value not in ROPE_TYPES:
            raise ManifestError(f"{name} is {value[:40]!r}, not one of {sorted(ROPE_TYPES)}")
        if len(value) > 200 or not value.isprintable():
            raise ManifestError(f"{name} is not printable text of at most 200 characters")
    elif isinstance(value, float):
        if not math.isfinite(value) or abs(value) > _MAX_FLOAT:
            raise ManifestError(f"{name} is {value}, not a finite number")
    elif isinstance(value, int):
        if abs(value) > _MAX_INT:
            raise ManifestError(f"{name} is {value}, beyond {_MAX_INT}")
    elif value is not None:
        raise ManifestError(f"{name} is a {type(value).__name__}, which no config holds")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
