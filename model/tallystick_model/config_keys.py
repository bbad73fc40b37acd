"""What the keys of a config.json are: forbidden, left out, spelt in an older way, read by a model's code, or historic.

A config class's own fields are known. What else a model's code reads (`getattr(config, "head_dim", …)`), and which
older names its class still understands (`kwargs.pop("rotary_pct")`), stands in transformers' source and is found there.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

import transformers

FORBIDDEN = frozenset({"auto_map", "trust_remote_code", "custom_generate", "quantization_config", "custom_pipelines"})
"""Keys that name code, kernels or another numerics: refused wherever they come from, with their name."""

NAMED_ALIKE = {"cache_implementation": str, "_attn_implementation_autoset": bool}
"""Keys of older checkpoints that sound like kernels and name none, with the type that their values have: dropped."""

_LEFT_OUT = """
    _name_or_path name_or_path transformers_version architectures dtype torch_dtype use_cache return_dict
    output_hidden_states output_attentions id2label label2id chunk_size_feed_forward gradient_checkpointing
    task_specific_params finetuning_task _commit_hash torchscript use_bfloat16 position_embedding_type model_max_length
    initializer_factor pruned_heads sep_token_id decoder_start_token_id num_labels
"""
LEFT_OUT = frozenset(_LEFT_OUT.split())
"""Keys of a checkpoint that do not matter for what is computed here, or that the manifest says elsewhere."""

MUST_BE = {"chunk_size_feed_forward": (0,), "position_embedding_type": ("absolute",), "pruned_heads": ({},)}
"""Keys that are left out with one meaning only, unless the config class has a field of that name."""

KEPT = {"scale_decoder_outputs": "tie_word_embeddings"}
"""Attributes that models read and manifests hold, though no fields, and the key that the class makes them of.

T5 takes tie_word_embeddings for whether its decoder's output is scaled before the head, and says true from then on.
In a manifest tie_word_embeddings = false says of such a class that its head has weights of its own.
"""

PER_LAYER = "per_layer_config"
"""{layer: {field: value}} for models whose layers differ; not a field, and taken by the classes that have it."""

_HISTORIC = """
    _num_labels tokenizer_class prefix problem_type xla_device tf_legacy_loss output_past save_step tie_weights_
    bos_token_id eos_token_id pad_token_id unk_token_id cls_token_id mask_token_id vocab_file license
    language name tokenizer_name verbose unsloth_version unsloth_fixed transformers.js_config adapters is_llama_config
    sentence_transformers sbert_ce_default_activation_function
    n_ctx n_positions n_embed seq_length initial_context_length max_sequence_length
    summary_activation summary_proj_to_labels summary_type summary_use_proj summary_last_dropout
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    gap_size net_structure_type num_memory_blocks down_scale_factor
    add_bias_logits add_final_layer_norm normalize_before normalize_embedding static_position_embeddings
    extra_pos_embeddings extra_layer_norm layernorm_variant do_blenderbot_90_layernorm force_bos_token_to_be_generated
    attention_softmax_in_fp32 scale_attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion skip_bias_add
    skip_bias_add_qkv offset_alibi scale_attn_weights rotary pretraining_tp mlp_type norm_type rotary_scaling_factor
    ep_size moe_layer_freq seq_aux scoring_func topk_method max_window_layers
"""
HISTORIC = frozenset(_HISTORIC.split())
"""Names in well-known checkpoints that were fields once or are the notes of a tool.

One is dropped only where neither the class nor the model's code knows the name, so that transformers does the same.
"""

_SYNONYMS = (
    "hidden_act hidden_activation activation_function",
    "norm_eps norm_epsilon layer_norm_eps layer_norm_epsilon rms_norm_eps",
    "partial_rotary_factor rotary_pct rope_pct",
    "num_heads num_attention_heads n_head",
    "num_experts_per_tok experts_per_token",
    "dense_act_fn feed_forward_proj",
)
SYNONYMS = {name: frozenset(group.split()) - {name} for group in _SYNONYMS for name in group.split()}
"""Names that some checkpoints hold beside the one that their class has for the same: dropped where that one is set."""

_TRAINING = frozenset(("dropout", "dropouts", "pdrop", "layerdrop", "init", "initializer", "loss", "jitter"))
"""Words in the names of what matters in training alone."""

_SHARED = (
    "masking_utils", "cache_utils", "modeling_rope_utils", "modeling_layers", "conversion_mapping", "integrations/moe",
)  # fmt: skip
_SHARED_READS = frozenset({"tie_word_embeddings", "is_causal", "attention_chunk_size", "sliding_window"})
"""transformers' files that read the configs of all models, and what modeling_utils.py reads of them besides."""

_CONFIG = r"\w*(?:config|cfg)\w*(?:\.\w*config\w*(?:\([^()]*\))?)*"
_READ = re.compile(rf"\b{_CONFIG}\.([A-Za-z]\w*)")
_ASKED = re.compile(rf"\b(?:getattr|hasattr)\(\s*(?:self\.)?{_CONFIG},\s*[\"'](\w+)[\"']")
_OWN = re.compile(r"\bself\.([A-Za-z]\w*)|\bgetattr\(self,\s*[\"'](\w+)[\"']")
_SPELT = re.compile(r"\bkwargs\.(?:pop|get|setdefault)\(\s*[\"'](\w+)[\"']|[\"'](\w+)[\"'] in kwargs")
_IMPORTED = re.compile(r"from \.\.(\w+)\.(modeling_\w+) import")


def fields_of(cls: Any) -> frozenset[str]:
    """Fields of a config class, by all their names."""
    aliases = (*cls.attribute_map, *cls.attribute_map.values())
    return frozenset({field.name for field in dataclasses.fields(cls)} | set(aliases) | set(cls.sub_configs))


@functools.cache
def read_keys(cls: Any) -> frozenset[str]:
    """What the code of a config class's models reads of a config and the class does not declare; it may be set on one.

    The text says more than is read. What it says too much costs nothing: a key that is kept means what it means to
    transformers, and one that is not there is not kept.
    """
    found = set(_SHARED_READS)
    for text in map(_text, _modeling_files(cls)):
        found |= set(_READ.findall(text)) | set(_ASKED.findall(text))
    for text in map(_text, _configuration_files(cls)):
        found |= {name for pair in _OWN.findall(text) for name in pair}
    known = fields_of(cls) | LEFT_OUT | FORBIDDEN | {"", PER_LAYER}
    return frozenset(
        name for name in found - known if "implementation" not in name and name[:1] != "_" and not hasattr(cls, name)
    )


@functools.cache
def spelt_keys(cls: Any) -> frozenset[str]:
    """Older spellings that a config class turns into its fields: what it takes out of the arguments it is given."""
    files = (*_configuration_files(cls), _root() / "modeling_rope_utils.py")
    found = {name for path in files for pair in _SPELT.findall(_text(path)) for name in pair}
    return frozenset(found - {""} - FORBIDDEN - fields_of(cls)) - LEFT_OUT


@functools.cache
def generation_keys() -> frozenset[str]:
    """Settings of generation, which older checkpoints keep in config.json; the manifest's `generation` holds them."""
    return frozenset(name for name in vars(transformers.GenerationConfig()) if not name.startswith("_"))


def is_droppable(key: str, value: Any, known: Set[str]) -> bool:
    """Whether a key that nothing reads is known to say nothing: a switch that is off, historic, of training or
    generation, or a second name for what another key says. known: the keys beside it that its class knows."""
    if key in NAMED_ALIKE:
        return isinstance(value, NAMED_ALIKE[key])
    off = value is None or value is False or value in ({}, [])
    listed = key in HISTORIC or key in generation_keys() or not SYNONYMS.get(key, frozenset()).isdisjoint(known)
    return off or listed or not _TRAINING.isdisjoint(key.split("_"))


def _root() -> Path:
    return Path(str(transformers.__file__)).parent


def _configuration_files(cls: Any) -> tuple[Path, ...]:
    modules = [klass.__module__ for klass in cls.__mro__ if klass.__module__.startswith("transformers.models.")]
    return tuple(Path(str(sys.modules[name].__file__)) for name in dict.fromkeys(modules))


def _modeling_files(cls: Any) -> tuple[Path, ...]:
    """The models' files beside the config's, what these import from other models, and what all models share."""
    own = [path for file in _configuration_files(cls)[:1] for path in sorted(file.parent.glob("modeling_*.py"))]
    imported = [pair for path in own for pair in _IMPORTED.findall(_text(path))]
    others = [_root() / "models" / package / f"{module}.py" for package, module in imported]
    shared = [_root() / f"{name}.py" for name in _SHARED]
    return tuple(path for path in dict.fromkeys((*own, *others, *shared)) if path.is_file())


@functools.cache
def _text(path: Path) -> str:
    return path.read_text("utf-8")
