"""The config of a GGUF file: what transformers reads of its metadata, and what it leaves out and the model depends on.

transformers' older reader takes some keys of each architecture and leaves the rest to the config class's defaults. A
file that says another base of its rotary tables, or scales them, would silently become another model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tallystick_model.config import build_config, checkpoint_config, config_class
from tallystick_model.config_keys import fields_of, read_keys, spelt_keys

_SAID: dict[str, tuple[str, ...]] = {
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "rope.freq_base": ("rope_theta",),
}
"""Metadata, after the architecture's name, and the names that config classes have for it."""

_SCALED = {"linear": ("factor",), "yarn": ("factor", "original_context_length")}
"""Scalings of rotary tables, and what a file says of each."""
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
"""What llama.cpp makes a file's rope_freqs of, but for the factor; no key says it."""


def as_written(config: dict[str, Any], architecture: str, reader: Any) -> dict[str, Any]:
    """transformers' config of a file, completed by what the file says besides.

    Raises ValueError for a scaling of rotary tables that cannot be told from the file.
    """
    config = without_unknown(_activated(config, architecture, reader))
    cls = config_class(config)
    known = fields_of(cls) | spelt_keys(cls)
    read = GGUF_CONFIG_MAPPING.get(config["model_type"].removesuffix("_text"), {})
    for key, names in _SAID.items():
        field = None if key in read else reader.get_field(f"{architecture}.{key}")
        name = next((name for name in names if name in known), None)
        if field is not None and name is not None:
            config.setdefault(name, field.contents())
    scaling = _scaling(config, architecture, reader)
    return {**config, "rope_scaling": scaling} if scaling else config


def without_unknown(config: dict[str, Any]) -> dict[str, Any]:
    """Without what transformers' tables call by names that neither the config class nor its models' code knows."""
    cls = config_class(config)
    known = fields_of(cls) | spelt_keys(cls) | read_keys(cls) | {"model_type", "architectures"}
    return {key: value for key, value in config.items() if key in known and value is not None}


def _activated(config: dict[str, Any], architecture: str, reader: Any) -> dict[str, Any]:
    """A T5's activation, which follows from its tensors, as in llama.cpp: gated GELU where there are gates, else ReLU.

    transformers says `is_gated_act` for both, and means gated ReLU by that.
    """
    if not architecture.startswith("t5"):
        return config
    gated = any(".ffn_gate." in tensor.name for tensor in reader.tensors)
    kept = {key: value for key, value in config.items() if key != "is_gated_act"}
    return {**kept, "feed_forward_proj": "gated-gelu" if gated else "relu"}


def _scaling(config: dict[str, Any], architecture: str, reader: Any) -> dict[str, Any]:
    prefix = f"{architecture}.rope.scaling."
    fields = {key.removeprefix(prefix): field for key, field in reader.fields.items() if key.startswith(prefix)}
    said = {key: field.contents() for key, field in fields.items()}
    table = next((tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    kind = said.pop("type", "none")
    if table is not None:
        return _llama3(config, torch.tensor(table.data).float())
    if kind == "none" or config.get("rope_scaling"):
        return {}
    if kind not in _SCALED or set(said) != set(_SCALED[kind]):
        raise ValueError(f"its rotary tables are scaled by {kind} with {sorted(said)}, which is not served")
    names = {"original_context_length": "original_max_position_embeddings"}
    return {"rope_type": kind, **{names.get(key, key): value for key, value in said.items()}}


def _llama3(config: dict[str, Any], factors: torch.Tensor) -> dict[str, Any]:
    """Llama 3.1's scaling, when a table of what each frequency is divided by is exactly that; nothing for all ones."""
    if bool((factors == 1).all()):
        return {}
    scaling = {**_LLAMA3, "factor": round(float(factors.max()), 3)}
    tables = [build_config(checkpoint_config({**config, **more})) for more in ({}, {"rope_scaling": scaling})]
    plain, scaled = (_frequencies(one) for one in tables)
    if factors.shape != plain.shape or not torch.allclose(plain / factors, scaled, rtol=1e-4):
        raise ValueError("its table rope_freqs is none that Llama 3.1's scaling makes")
    return scaling


def _frequencies(config: Any) -> torch.Tensor:
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2) / width)
