"""From a config dict that a stranger wrote to a transformers config object that we chose.

Nothing is built before it is bounded: the config class comes from transformers' own table of model types, its fields
are the allow-list, and every number is finite and within the table below. No remote code, no prompt, no kernel names.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tallystick_protocol.errors import ManifestError

FORBIDDEN = frozenset({"auto_map", "trust_remote_code", "custom_generate", "quantization_config", "custom_pipelines"})
"""Keys that name code, kernels or another numerics: refused wherever they come from, with their name."""

_LEFT_OUT = """
    _name_or_path name_or_path transformers_version architectures dtype torch_dtype use_cache return_dict
    output_hidden_states output_attentions id2label label2id chunk_size_feed_forward gradient_checkpointing
    task_specific_params finetuning_task _commit_hash torchscript use_bfloat16 position_embedding_type model_max_length
    initializer_factor pruned_heads sep_token_id decoder_start_token_id num_labels
"""
LEFT_OUT = frozenset(_LEFT_OUT.split())
"""Keys of a checkpoint that do not matter for what is computed here, or that the manifest says elsewhere."""

MUST_BE = {"chunk_size_feed_forward": (0,), "position_embedding_type": ("absolute",)}
"""Keys that are left out with one meaning only, unless the config class has a field of that name."""

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

KEPT = {"scale_decoder_outputs": "tie_word_embeddings"}
"""Attributes that models read and manifests hold, though no fields, and the key that the class makes them of.

T5 takes tie_word_embeddings for whether its decoder's output is scaled before the head, and says true from then on.
In a manifest tie_word_embeddings = false says of such a class that its head has weights of its own.
"""

UNREAD = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "n_positions", "output_past"})
"""Keys that checkpoints of classes without such a field often hold; nothing reads them."""

LEGACY = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor"})
"""Older spellings that a checkpoint may use; transformers turns them into fields, and manifests hold fields."""

PER_LAYER = "per_layer_config"
"""{layer: {field: value}} for models whose layers differ; not a field, and taken by the classes that have it."""

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

ROPE_TYPES = frozenset(ROPE_INIT_FUNCTIONS) | {"default", "axial"}
"""How rotary tables are made; "axial" is what vision towers say of theirs."""

_MAX_INT, _MAX_FLOAT, _MAX_ITEMS, _MAX_DEPTH = 1 << 31, 1e30, 8192, 5
_BUILD_ERRORS = (
    TypeError, ValueError, KeyError, AttributeError, ImportError, ArithmeticError, RuntimeError, StrictDataclassError,
)  # fmt: skip


def build_config(values: dict[str, Any]) -> Any:
    """The transformers config object of a manifest's `config`.

    Raises ManifestError naming the key: unknown, forbidden, of the wrong type or out of bounds.
    """
    cls = config_class(values)
    _refuse_unservable(values, cls)
    return _construct(cls, values)


def _refuse_unservable(values: dict[str, Any], cls: Any) -> None:
    extra = _kept(_defaults(cls)) | ({PER_LAYER} & _defaults(cls).keys())
    _refuse_keys(values, cls, allowed=frozenset(servable_fields(cls)) | {"model_type"} | extra)
    for layer in (values.get(PER_LAYER) or {}).values():
        _refuse_keys(layer if isinstance(layer, dict) else {}, cls, allowed=frozenset(servable_fields(cls)))
    for name in cls.sub_configs:
        if isinstance(inner := values.get(name), dict):
            _refuse_unservable(inner, _inner_class(cls, name, inner))


def checkpoint_config(values: dict[str, Any]) -> dict[str, Any]:
    """What a manifest holds of a checkpoint's config.json: every servable field, defaults written out.

    Raises ManifestError naming the key that is unknown, forbidden, of the wrong type or out of bounds.
    """
    cls = config_class(values)
    values = _spelt_out(values)
    written = _construct(cls, _accepted(values, cls, _defaults(cls))).to_dict()
    _check_derived(cls, values, written, _defaults(cls))
    return _written(cls, written)


def _spelt_out(value: Any) -> Any:
    """transformers writes numbers that JSON does not have as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _spelt_out(inner) for key, inner in value.items()}
    return [_spelt_out(inner) for inner in value] if isinstance(value, list) else value


def _accepted(values: dict[str, Any], cls: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's values without those that do not matter. Raises ManifestError for a key that is not known.

    defaults: what the class writes of itself, or of this part of it.
    """
    known = _names(cls) | LEGACY | {"model_type", PER_LAYER} | _kept(defaults)
    derived = frozenset(defaults) - known
    unread = derived | (UNREAD - known)
    _refuse_keys(values, cls, allowed=known | LEFT_OUT | unread | {"tie_encoder_decoder"})
    left_out = (LEFT_OUT - set(servable_fields(cls))) | unread
    kept = {key: value for key, value in values.items() if key not in left_out and not _is_default(cls, key, value)}
    for key in MUST_BE.keys() & values.keys() & left_out:
        _check_meaning(key, values[key])
    for name in cls.sub_configs:
        if isinstance(inner := kept.get(name), dict):
            inner_cls = _inner_class(cls, name, inner)
            kept[name] = _accepted(inner, inner_cls, _inner_defaults(inner_cls, defaults, name))
    return kept


def _kept(defaults: dict[str, Any]) -> set[str]:
    """The KEPT attributes of a class with these defaults, and what they are made of."""
    return {name for pair in KEPT.items() if pair[0] in defaults for name in pair}


def _inner_defaults(cls: Any, defaults: dict[str, Any], name: str) -> dict[str, Any]:
    """What a config within a config writes of itself: its own defaults, and what the outer one sets in it."""
    outer = defaults.get(name)
    return {**_defaults(cls), **(outer if isinstance(outer, dict) else {})}


def _check_derived(cls: Any, values: dict[str, Any], written: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Values that are no fields are what the class makes of its fields. Raises ManifestError for one that is not."""
    stated = _names(cls) | LEFT_OUT | LEGACY | {"model_type", PER_LAYER} | _kept(defaults)
    for name in cls.sub_configs:
        if isinstance(inner := values.get(name), dict) and isinstance(made := written.get(name), dict):
            inner_cls = _inner_class(cls, name, inner)
            _check_derived(inner_cls, inner, made, _inner_defaults(inner_cls, defaults, name))
    for key in sorted((defaults.keys() & values.keys()) - stated):
        if _plain(written.get(key)) != _plain(values[key]):
            raise ManifestError(
                f"config {key} is {str(values[key])[:40]!r}; the other keys make it {str(written.get(key))[:40]!r}"
            )


def _names(cls: Any) -> frozenset[str]:
    """Fields of a config class, by all their names."""
    aliases = (*cls.attribute_map, *cls.attribute_map.values())
    return frozenset({field.name for field in dataclasses.fields(cls)} | set(aliases) | set(cls.sub_configs))


@functools.cache
def _defaults(cls: Any) -> dict[str, Any]:
    """What the class's own defaults make, as it writes them; empty when it has none for everything."""
    try:
        return cls().to_dict()  # type: ignore[no-any-return]
    except _BUILD_ERRORS:
        return {}


def _is_default(cls: Any, key: str, value: Any) -> bool:
    """Whether a value that no manifest can hold is the class's own default."""
    return not _is_finite(value) and _plain(_defaults(cls).get(key)) == _plain(value)


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_finite(inner) for inner in value)
    return not isinstance(value, float) or math.isfinite(value)


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple | set | frozenset) else value


def _written(cls: Any, written: dict[str, Any]) -> dict[str, Any]:
    values = {name: written.get(name, written.get(cls.attribute_map.get(name, name))) for name in servable_fields(cls)}
    kept = {name: _plain(value) for name, value in values.items() if value is not None}
    kept = {name: value for name, value in kept.items() if not _is_default(cls, name, value)}
    kept |= {name: bool(written[name]) for name in KEPT.keys() & _defaults(cls).keys()}
    if written.get(PER_LAYER):
        kept[PER_LAYER] = _plain(written[PER_LAYER])
    for name in cls.sub_configs:
        if isinstance(inner := kept.get(name), dict):
            kept[name] = _written(_inner_class(cls, name, inner), inner)
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
    """The class that runs it: one that transformers lists for this very model type, or lists and makes for exactly
    this class of config (the text model inside a larger type). Raises ManifestError."""
    known: set[str] = set()
    listed: set[str] = set()
    for mapping in MAPPINGS:
        names = mapping.get(config.model_type, ())
        known |= {names} if isinstance(names, str) else set(names)
        listed |= {name for names in mapping.values() for name in ((names,) if isinstance(names, str) else names)}
    if architecture in known:
        return getattr(transformers, architecture)
    if architecture in listed and getattr(transformers, architecture).config_class is type(config):
        return getattr(transformers, architecture)
    raise ManifestError(f"architecture {architecture[:60]!r} is not one of {sorted(known)} for {config.model_type}")


def servable_fields(cls: Any) -> tuple[str, ...]:
    """The fields of a config class that a manifest may set."""
    names = {field.name for field in dataclasses.fields(cls)} | set(cls.sub_configs)
    left_out = LEFT_OUT - (MUST_BE.keys() & _own_fields(cls))
    return tuple(
        sorted(
            name for name in names if not name.startswith("_") and name not in left_out and "implementation" not in name
        )
    )


def _own_fields(cls: Any) -> frozenset[str]:
    """Fields that the class declares, beside those of every config."""
    every = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    return frozenset(field.name for field in dataclasses.fields(cls)) - every


def _inner_class(cls: Any, name: str, values: dict[str, Any]) -> Any:
    """The class of a config within a config; where any model may stand, the one that its values name."""
    inner = cls.sub_configs[name]
    return config_class(values) if inner is transformers.AutoConfig else inner


def _construct(cls: Any, values: dict[str, Any]) -> Any:
    _check_value("config", values, _MAX_DEPTH)
    for key, value in values.items():
        _check_bounds(cls.attribute_map.get(key, key), value)
    if values.get("is_encoder_decoder") and not getattr(cls, "is_encoder_decoder", False):
        raise ManifestError(f"config is_encoder_decoder: {cls.model_type} is a single stack")
    try:
        config = cls(**{key: value for key, value in values.items() if key != "model_type"})
    except _BUILD_ERRORS as error:
        raise ManifestError(f"config does not fit {cls.__name__}: {_one_line(error)}") from None
    for part in (config, *(getattr(config, name, None) for name in cls.sub_configs)):
        if part is not None:
            made = {part.attribute_map.get(name, name): value for name, value in part.to_dict().items()}
            for name in BOUNDS:
                _check_bounds(name, made.get(name, made.get(part.attribute_map.get(name, name))))
            _check_relations(made)
    return config


def _check_meaning(key: str, value: Any) -> None:
    if value not in (*MUST_BE[key], None):
        raise ManifestError(f"config {key} is {str(value)[:40]!r}; only {MUST_BE[key][0]!r} is served")


def _check_relations(made: dict[str, Any]) -> None:
    length, width = made.get("max_position_embeddings"), made.get("hidden_size")
    if isinstance(length, int) and isinstance(width, int) and length * width > MAX_POSITION_TABLE:
        raise ManifestError(f"config: {length} positions of width {width} are more than {MAX_POSITION_TABLE}")
    heads, groups = made.get("num_attention_heads", 1), made.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and groups > 0 and heads % groups:
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
    if isinstance(value, list | tuple):  # one for each layer
        for inner in value:
            _check_bounds(name, inner)
        return
    low, high = BOUNDS[name]
    whole = isinstance(low, int) and not name.endswith(("eps", "epsilon"))
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (whole and value != int(value)):
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
