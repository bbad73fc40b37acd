"""From a config dict that a stranger wrote to a transformers config object that we chose.

Nothing is built before it is bounded: the config class comes from transformers' own table of model types, its fields
and what its models' code reads besides are the allow-list, and every number is finite and bounded. No remote code, no
prompt, no kernel names. What a manifest holds of a checkpoint's config builds exactly what transformers builds of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tallystick_model.config_bounds import check_bounds, check_made, check_value
from tallystick_model.config_keys import (
    FORBIDDEN,
    KEPT,
    LEFT_OUT,
    MUST_BE,
    NAMED_ALIKE,
    PER_LAYER,
    fields_of,
    is_droppable,
    read_keys,
    spelt_keys,
)
from tallystick_protocol.errors import ManifestError

_BUILD_ERRORS = (
    TypeError, ValueError, KeyError, AttributeError, ImportError, ArithmeticError, RuntimeError, StrictDataclassError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """values: what a manifest holds. left_out: keys of config.json, dotted, that mean nothing to transformers."""

    values: dict[str, Any]
    left_out: tuple[str, ...]


def build_config(values: dict[str, Any]) -> Any:
    """The transformers config object of a manifest's `config`.

    Raises ManifestError naming the key: unknown, forbidden, of the wrong type or out of bounds.
    """
    cls = config_class(values)
    _refuse_unservable(values, cls)
    return _construct(cls, values)


def checkpoint_config(values: dict[str, Any]) -> dict[str, Any]:
    """What a manifest holds of a checkpoint's config.json; raises as `read_checkpoint` does."""
    return read_checkpoint(values).values


def read_checkpoint(values: dict[str, Any]) -> CheckpointConfig:
    """Every servable field of a checkpoint's config.json, defaults written out, and what its models read besides.

    Older spellings become fields, as in transformers. Raises ManifestError naming the key that is unknown, forbidden,
    of the wrong type or out of bounds, or that no manifest can hold.
    """
    cls = config_class(values)
    left_out: list[str] = []
    config = _construct(cls, _understood(_spelt_out(values), cls, _defaults(cls), "", left_out))
    held = _written(cls, config.to_dict())
    held = _merged(held, _differences(config, build_config(held)))
    if different := _differences(config, build_config(held)):
        raise ManifestError(f"config {next(iter(different))} cannot be held in a manifest, which builds another value")
    return CheckpointConfig(held, tuple(left_out))


def _spelt_out(value: Any) -> Any:
    """transformers writes numbers that JSON does not have as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _spelt_out(inner) for key, inner in value.items()}
    return [_spelt_out(inner) for inner in value] if isinstance(value, list) else value


def _understood(
    values: dict[str, Any], cls: Any, defaults: dict[str, Any], path: str, left_out: list[str]
) -> dict[str, Any]:
    """A checkpoint's values without those that do not matter; the keys among them that nothing knows go to left_out.

    defaults: what the class writes of itself, or of this part of it. Raises ManifestError for a key that has a meaning
    that is not known.
    """
    known = fields_of(cls) | spelt_keys(cls) | read_keys(cls) | {"model_type", PER_LAYER} | defaults.keys()
    apart = LEFT_OUT - frozenset(servable_fields(cls))
    kept: dict[str, Any] = {}
    for key, value in values.items():
        _refuse_forbidden(key)
        if key in apart:
            _check_meaning(key, value)
        elif key in known:
            kept |= {} if _is_default(cls, key, value) else {key: value}
        elif is_droppable(key, value, known & values.keys()):
            left_out.append(path + key)
        else:
            raise ManifestError(
                f"config key {key[:60]!r} is none that {cls.__name__} or its models' code in transformers "
                f"{transformers.__version__} knows: what it means is not known here, and a model whose config is not "
                "understood cannot be served right",
                key=key[:60],
            )
    for name in cls.sub_configs:
        if isinstance(inner := kept.get(name), dict):
            inner_cls = _inner_class(cls, name, inner)
            inner_defaults = {**_defaults(inner_cls), **_part(defaults, name)}
            kept[name] = _understood(inner, inner_cls, inner_defaults, f"{path}{name}.", left_out)
    return kept


def _part(values: dict[str, Any], name: str) -> dict[str, Any]:
    inner = values.get(name)
    return inner if isinstance(inner, dict) else {}


def _differences(made: Any, rebuilt: Any) -> dict[str, Any]:
    """What models would read differently of two configs, as it is in the first; of configs within them, too."""
    found: dict[str, Any] = {}
    cls: Any = type(made)
    one, other = _plain(made.to_dict()), _plain(rebuilt.to_dict())
    for name in sorted((frozenset(servable_fields(cls)) | read_keys(cls)) & (one.keys() | other.keys())):
        parts = [getattr(config, name, None) for config in (made, rebuilt)] if name in cls.sub_configs else [None]
        if all(isinstance(part, transformers.PreTrainedConfig) for part in parts):
            found |= {name: inner} if (inner := _differences(*parts)) else {}
        elif name not in one or name not in other or one[name] != other[name]:
            found[name] = one.get(name)
    return found


def _merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`more` over `values`, configs within them too."""
    parts = {name: _part(values, name) for name in more}
    inner = {name: _merged(part, more[name]) for name, part in parts.items() if "model_type" in part}
    return {**values, **more, **inner}


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
    check_value("config", values)
    for key, value in values.items():
        check_bounds(cls.attribute_map.get(key, key), value)
    if values.get("is_encoder_decoder") and not getattr(cls, "is_encoder_decoder", False):
        raise ManifestError(f"config is_encoder_decoder: {cls.model_type} is a single stack")
    try:
        config = cls(**{key: value for key, value in values.items() if key != "model_type"})
    except _BUILD_ERRORS as error:
        raise ManifestError(f"config does not fit {cls.__name__}: {_one_line(error)}") from None
    for part in (config, *(getattr(config, name, None) for name in cls.sub_configs)):
        if part is not None:
            check_made(part.to_dict(), part.attribute_map)
    return config


def _check_meaning(key: str, value: Any) -> None:
    if key in MUST_BE and value not in (*MUST_BE[key], None):
        raise ManifestError(f"config {key} is {str(value)[:40]!r}; only {MUST_BE[key][0]!r} is served")


def _refuse_unservable(values: dict[str, Any], cls: Any) -> None:
    fields = frozenset(servable_fields(cls)) | read_keys(cls)
    kept = {name for pair in KEPT.items() if pair[0] in _defaults(cls) for name in pair}
    _refuse_keys(values, cls, fields | {"model_type"} | kept | ({PER_LAYER} & _defaults(cls).keys()))
    for layer in (values.get(PER_LAYER) or {}).values():
        _refuse_keys(layer if isinstance(layer, dict) else {}, cls, fields)
    for name in cls.sub_configs:
        if isinstance(inner := values.get(name), dict):
            _refuse_unservable(inner, _inner_class(cls, name, inner))


def _refuse_keys(values: dict[str, Any], cls: Any, allowed: frozenset[str] | set[str]) -> None:
    for key in values:
        _refuse_forbidden(key)
        if key not in allowed:
            raise ManifestError(f"config key {key[:60]!r} is not one of {cls.__name__}'s", key=key[:60])


def _refuse_forbidden(key: Any) -> None:
    if not isinstance(key, str) or len(key) > 100 or not key.isprintable():
        raise ManifestError("a config key is not printable text of at most 100 characters")
    if key in FORBIDDEN or (("implementation" in key or "remote_code" in key) and key not in NAMED_ALIKE):
        raise ManifestError(f"config key {key[:60]!r} is forbidden: it names code or kernels to load", key=key[:60])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
